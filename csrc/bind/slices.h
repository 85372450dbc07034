// SPDX-License-Identifier: Apache-2.0
// IndexedSlices as the kernels read them: the values as they lie or summed, the indices sorted into rows.
#pragma once

#include <pybind11/numpy.h>

#include <algorithm>
#include <cstddef>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "../core/step_args.h"
#include "buffers.h"

namespace fastadam::bind {

// The indices of one gradient, with the memory in which they are sorted.
class RowIndex {
 public:
  // `indices`: one-dimensional, contiguous, int32 or int64; read by sort(), which whoever calls keeps alive.
  RowIndex(const py::array& indices, const Buffer& variable) {
    args_.indices = indices.data();
    args_.is_int64 = indices.itemsize() == 8;
    args_.count = indices.size();
    args_.row_count = variable.shape[0];
    rows_.width = variable.shape[0] == 0 ? 0 : variable.size / variable.shape[0];
    const auto count = static_cast<size_t>(args_.count);
    memory_.resize(4 * count + 2);
    args_.keys = memory_.data();
    args_.spare_keys = args_.keys + count + 1;
    args_.order = args_.spare_keys + count + 1;
    args_.spare_order = args_.order + count;
  }
  RowIndex(const RowIndex&) = delete;
  RowIndex& operator=(const RowIndex&) = delete;

  int64_t count() const { return args_.count; }
  size_t rank() const { return 1; }

  // False if an index is not a row of the variable: bad() tells which. `sort_indices` does the work.
  template <class SortIndices>
  bool sort(SortIndices sort_indices) {
    sort_indices(args_);
    rows_.rows = args_.keys;
    rows_.starts = args_.spare_keys;
    rows_.order = args_.order;
    rows_.count = args_.unique;
    return args_.bad < 0;
  }

  int64_t bad() const { return args_.bad; }
  int64_t bad_index() const { return args_.keys[args_.bad]; }
  const Rows& rows() const { return rows_; }

  // Whether the values are the sums of the rows already: no row comes twice, and they ascend if they have to.
  bool is_summed(bool ascending) const {
    return args_.unique == args_.count && (!ascending || std::is_sorted(rows_.order, rows_.order + rows_.count));
  }

  // Memory for the sums, which lasts as long as this.
  void* make_sums(DType state) {
    sums_.reset(new std::byte[static_cast<size_t>(rows_.count * rows_.width * size_of(state))]);
    return sums_.get();
  }

  // The sums have taken the place of the values: one for each row, in the order of the rows.
  void use_sums() {
    std::iota(args_.spare_keys, args_.spare_keys + rows_.count + 1, int64_t{0});
    std::iota(args_.order, args_.order + rows_.count, int64_t{0});
  }

 private:
  IndexArgs args_{};
  Rows rows_{};
  std::vector<int64_t> memory_;
  std::unique_ptr<std::byte[]> sums_;
};

// Whether the kernels can read these indices as they lie.
inline bool is_index_array(const py::object& indices) {
  if (!py::isinstance<py::array>(indices)) return false;
  const auto array = py::reinterpret_borrow<py::array>(indices);
  const py::dtype dtype = array.dtype();
  return dtype.kind() == 'i' && (dtype.itemsize() == 4 || dtype.itemsize() == 8) && dtype.byteorder() == '=' &&
         array.ndim() == 1 && (array.flags() & py::array::c_style) != 0 &&
         (array.flags() & py::detail::npy_api::NPY_ARRAY_ALIGNED_) != 0;
}

}  // namespace fastadam::bind
