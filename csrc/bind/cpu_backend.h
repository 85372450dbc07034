// SPDX-License-Identifier: Apache-2.0
// The Backend of a Plan on the CPU.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "../capi/prepare.h"
#include "../capi/run.h"
#include "../core/float_mode.h"
#include "page_sizes.h"
#include "slices.h"
#include "stale.h"
#include "variables.h"

namespace fastadam::bind {

class CpuBackend {
 public:
  using Arrays = HostArrays;
  using Index = RowIndex;
  using Table = StaleTable;

  // What must surround the calls of one step.
  class Scope {
   public:
    Scope(CpuBackend&, const Buffer&) {}

   private:
    DefaultArithmetic arithmetic_;
  };

  CpuBackend(const Buffer&, const std::vector<TensorArgs>&, const Chains&, const py::object&) {}

  bool takes_indices(const py::object& indices) const { return is_index_array(indices); }

  std::unique_ptr<Index> index_of(const py::object& indices, const Label&, const Buffer& variable) const {
    return std::make_unique<RowIndex>(py::reinterpret_borrow<py::array>(indices), variable);
  }

  std::unique_ptr<Table> table_of(const Table::Arrays& arrays, const Buffer& variable) const {
    return std::make_unique<StaleTable>(arrays, variable);
  }

  bool sort(Index& index, int64_t) const { return index.sort(); }

  void order_after(const std::optional<uintptr_t>&) const {}

  void* make_sums(Index& index, const TensorArgs& tensor) const {
    return index.make_sums(state_dtype(tensor.grad_dtype));
  }

  void run_sum_rows(const std::vector<TensorArgs>& tensors, const std::vector<void*>& sums) const {
    fastadam::run_sum_rows(tensors.data(), static_cast<int64_t>(tensors.size()), sums.data());
  }

  // Norms, clipping and the step. Returns false, with nothing written, if the gradients had to be finite and are not.
  bool step(const StepArgs& args, const std::vector<TensorArgs>& tensors, const AdamHyper& hyper, int64_t /*call*/) {
    if (!run_step(args, static_cast<int64_t>(tensors.size()), hyper)) return false;
    for (size_t i = 0; i < tensors.size(); ++i) {
      if (tensors[i].rows == nullptr || !moves_rows_alone(tensors[i], args.lazy)) continue;
      page_sizes_.resize(tensors.size());
      page_sizes_[i].note(tensors[i]);
    }
    return true;
  }

  bool accumulate(const AccumulateArgs& args, bool require_finite, const std::vector<TensorArgs>& tensors,
                  int64_t /*call*/) const {
    return run_accumulate(args, static_cast<int64_t>(tensors.size()), require_finite);
  }

  // All rows, or those in tensor.rows, of one table.
  void catch_up(const TensorArgs& tensor, StepArgs args, int64_t /*call*/) const {
    const int64_t head = 0;
    const int64_t offsets[] = {0, moved_elements(tensor, args.lazy)};
    args.chains = {&tensor, &head, offsets, 1};
    run_catch_up(args);
  }

  bool is_capturing() const { return false; }

 private:
  std::vector<PageSizes> page_sizes_;  // of tables, by tensor
};

}  // namespace fastadam::bind
