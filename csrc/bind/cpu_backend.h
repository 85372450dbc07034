// SPDX-License-Identifier: Apache-2.0
// The Backend of a Plan on the CPU.
#pragma once

#include <algorithm>
#include <memory>
#include <optional>
#include <vector>

#include "../capi/prepare.h"
#include "../capi/run.h"
#include "../core/float_mode.h"
#include "file_pages.h"
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
  void catch_up(const TensorArgs& tensor, const StepArgs& args, int64_t /*call*/) const {
    FilePages files;
    if (tensor.rows == nullptr && tensor.stale->flags == nullptr) {  // else only rows that steps have touched are read
      const auto count = static_cast<uint64_t>(tensor.size);
      files.add(tensor.var, count * static_cast<uint64_t>(size_of(tensor.dtype)));
      const uint64_t bytes = count * static_cast<uint64_t>(size_of(state_dtype(tensor.dtype)));
      for (const void* slot : {tensor.m, tensor.v, tensor.vhat, tensor.average}) files.add(slot, bytes);
    }
    if (files.empty()) return catch_up_at_once(tensor, args);
    const int64_t rows = tensor.size / tensor.stale->width;
    const int64_t most = FilePages::rows_of_piece(tensor.stale->width * size_of(state_dtype(tensor.dtype)));
    for (int64_t begin = 0; begin < rows; begin += most) {
      const int64_t end = std::min(begin + most, rows);
      files.enter(begin, end, rows);
      catch_up_piece(tensor, args, begin, end);
      files.leave(end, rows);
    }
  }

  bool is_capturing() const { return false; }

 private:
  static void catch_up_at_once(const TensorArgs& tensor, StepArgs args) {
    const int64_t head = 0;
    const int64_t offsets[] = {0, moved_elements(tensor, args.lazy)};
    args.chains = {&tensor, &head, offsets, 1};
    run_catch_up(args);
  }

  // Rows [begin, end) of a table whose rows all move.
  static void catch_up_piece(TensorArgs tensor, const StepArgs& args, int64_t begin, int64_t end) {
    StaleRows stale = *tensor.stale;
    const int64_t first = begin * stale.width;
    const int64_t item = size_of(state_dtype(tensor.dtype));
    tensor.var = static_cast<char*>(tensor.var) + first * size_of(tensor.dtype);
    for (void** slot : {&tensor.m, &tensor.v, &tensor.vhat, &tensor.average}) {
      if (*slot != nullptr) *slot = static_cast<char*>(*slot) + first * item;
    }
    tensor.size = (end - begin) * stale.width;
    stale.from += begin;
    tensor.stale = &stale;
    catch_up_at_once(tensor, args);
  }

  std::vector<PageSizes> page_sizes_;  // of tables, by tensor
};

}  // namespace fastadam::bind
