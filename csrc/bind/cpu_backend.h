// SPDX-License-Identifier: Apache-2.0
// A Backend: how a Plan runs its steps on the CPU.
#pragma once

#include <cmath>
#include <limits>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "../cpu/launch.h"
#include "norms.h"
#include "slices.h"
#include "stale.h"
#include "variables.h"

namespace fastadam::bind {

class CpuBackend {
 public:
  using Index = RowIndex;
  using Table = StaleTable;

  // What the calls of one step need around them: nothing here.
  struct Scope {
    Scope(CpuBackend&, const Buffer&) {}
  };

  CpuBackend(const VariableSet&, const std::vector<TensorArgs>&, const py::object&) {}

  bool takes_indices(const py::object& indices) const { return is_index_array(indices); }

  std::unique_ptr<Index> index_of(const py::object& indices, const Label&, const Buffer& variable) const {
    return std::make_unique<RowIndex>(py::reinterpret_borrow<py::array>(indices), variable);
  }

  std::unique_ptr<Table> table_of(const Table::Arrays& arrays, const Buffer& variable) const {
    return std::make_unique<StaleTable>(arrays, variable);
  }

  bool sort(Index& index, int64_t) const {
    return index.sort([](IndexArgs& args) { cpu::index_rows(args); });
  }

  void drop(std::unique_ptr<Index>& index) const { index.reset(); }

  void order_after(const std::optional<uintptr_t>&) const {}

  void* make_sums(Index& index, const TensorArgs& tensor) const {
    return index.make_sums(state_dtype(tensor.grad_dtype));
  }

  void run_sum_rows(const SumArgs& args) const { cpu::run_sum_rows(args); }

  // Norms, clipping and the step; false, and nothing done, if the gradients had to be finite and are not.
  bool step(const StepArgs& args, std::vector<TensorArgs>& tensors, const AdamHyper& hyper, int64_t /*call*/) {
    const bool clip_norms = std::isfinite(hyper.clip_norm) || std::isfinite(hyper.global_clip_norm);
    if (clip_norms || hyper.require_finite) {
      norms_.resize(tensors, raw_clip_value(hyper), hyper.require_finite);
      cpu::run_norm(norms_.args());
      if (hyper.require_finite && !norms_.all_finite()) return false;
    }
    if (clip_norms) norms_.fold_into(tensors, hyper);
    cpu::run_step(args);
    return true;
  }

  bool accumulate(const AccumulateArgs& args, bool require_finite, const std::vector<TensorArgs>& tensors,
                  int64_t /*call*/) {
    if (require_finite) {
      norms_.resize(tensors, std::numeric_limits<double>::infinity(), true);
      cpu::run_norm(norms_.args());
      if (!norms_.all_finite()) return false;
    }
    cpu::run_accumulate(args);
    return true;
  }

  // The rows of one stale table.
  void catch_up(StepArgs args, const TensorArgs& tensor, int64_t /*call*/) const {
    constexpr int64_t kHead = 0;
    const bool only_rows = tensor.rows != nullptr;
    const int64_t offsets[] = {0, only_rows ? tensor.rows->count * tensor.rows->width : tensor.size};
    args.chains = {&tensor, &kHead, offsets, 1};
    cpu::run_step(args);
  }

  bool is_capturing() const { return false; }

 private:
  Norms norms_;
};

}  // namespace fastadam::bind
