// SPDX-License-Identifier: Apache-2.0
// A Backend: how a Plan runs its steps on the CPU.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "../capi/fastadam.h"
#include "../capi/trusted.h"
#include "slices.h"
#include "stale.h"
#include "status.h"
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

  bool sort(Index& index, int64_t) const { return index.sort(); }

  void drop(std::unique_ptr<Index>& index) const { index.reset(); }

  void order_after(const std::optional<uintptr_t>&) const {}

  void* make_sums(Index& index, const TensorArgs& tensor) const {
    return index.make_sums(state_dtype(tensor.grad_dtype));
  }

  void run_sum_rows(const std::vector<TensorArgs>& tensors, const std::vector<void*>& sums) const {
    const fastadam_list list = list_of(tensors.data(), static_cast<int64_t>(tensors.size()));
    require_ok(fastadam_sum_rows(&list, sums.data()));
  }

  // Norms, clipping and the step; false, and nothing done, if the gradients had to be finite and are not.
  bool step(const StepArgs& args, const std::vector<TensorArgs>& tensors, const AdamHyper& hyper,
            int64_t /*call*/) const {
    const fastadam_list list = list_of(args.chains, tensors);
    return is_done(fastadam_step(&list, &hyper, args.lazy));
  }

  bool accumulate(const AccumulateArgs& args, bool require_finite, const std::vector<TensorArgs>& tensors,
                  int64_t /*call*/) const {
    const fastadam_list list = list_of(args.chains, tensors);
    return is_done(fastadam_accumulate(&list, args.restart, require_finite));
  }

  // The rows of one stale table.
  void catch_up(const TensorArgs& tensor, const AdamHyper& hyper, const StepArgs& /*args*/, int64_t /*call*/) const {
    const fastadam_list list = list_of(&tensor, 1);
    require_ok(fastadam_step(&list, &hyper, false));
  }

  bool is_capturing() const { return false; }

 private:
  static fastadam_list list_of(const TensorArgs* tensors, int64_t count) {
    return {kTrustedAbi, tensors, count, nullptr, nullptr, 0};
  }

  static fastadam_list list_of(const Chains& chains, const std::vector<TensorArgs>& tensors) {
    return {kTrustedAbi,  tensors.data(), static_cast<int64_t>(tensors.size()),
            chains.heads, chains.offsets, chains.count};
  }

  static bool is_done(fastadam_status status) {
    require_ok(status);
    return status != FASTADAM_NOT_FINITE;
  }
};

}  // namespace fastadam::bind
