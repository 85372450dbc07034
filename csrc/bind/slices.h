// SPDX-License-Identifier: Apache-2.0
// IndexedSlices as the kernels read them: indices sorted into rows, and values, either as stored or summed.
#pragma once

#include <pybind11/numpy.h>

#include <algorithm>
#include <cstddef>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "../core/step_args.h"
#include "read_buffer.h"
#include "status.h"

namespace fastadam::bind {

// The indices of one gradient and the memory in which they are sorted.
class RowIndex {
 public:
  // `indices`: one-dimensional, contiguous, int32 or int64. sort() reads them: the caller keeps them alive until then.
  RowIndex(const py::array& indices, const Buffer& variable) {
    indices_ = indices.data();
    is_int64_ = indices.itemsize() == 8;
    count_ = indices.size();
    row_count_ = variable.shape[0];
    rows_.width = row_count_ == 0 ? 0 : variable.size / row_count_;
    memory_.resize(static_cast<size_t>(fastadam_sort_memory(count_)));
  }
  RowIndex(const RowIndex&) = delete;
  RowIndex& operator=(const RowIndex&) = delete;

  int64_t count() const { return count_; }
  size_t rank() const { return 1; }

  // False if an index is out of range: bad() is its position.
  bool sort() {
    const fastadam_status status =
        fastadam_sort_rows(indices_, is_int64_, count_, row_count_, rows_.width, memory_.data(), &rows_, &bad_);
    if (bad_ >= 0) return false;
    require_ok(status);
    return true;
  }

  int64_t bad() const { return bad_; }
  int64_t bad_index() const {
    const auto* data = static_cast<const char*>(indices_) + bad_ * (is_int64_ ? 8 : 4);
    return is_int64_ ? *reinterpret_cast<const int64_t*>(data) : *reinterpret_cast<const int32_t*>(data);
  }
  const Rows& rows() const { return rows_; }

  // Whether the values are already the sums of the rows: no row is repeated, and with `ascending` they are in order.
  bool is_summed(bool ascending) const {
    return rows_.count == count_ && (!ascending || std::is_sorted(rows_.order, rows_.order + rows_.count));
  }

  // Memory for the sums, which belongs to this object.
  void* make_sums(DType state) {
    sums_.reset(new std::byte[static_cast<size_t>(rows_.count * rows_.width * size_of(state))]);
    return sums_.get();
  }

  // From now on the sums are the values: one for each row, in the order of the rows.
  void use_sums() {
    places_.resize(static_cast<size_t>(rows_.count) + 1);
    std::iota(places_.begin(), places_.end(), int64_t{0});
    rows_.starts = rows_.order = places_.data();
  }

 private:
  const void* indices_;
  bool is_int64_;
  int64_t count_;
  int64_t row_count_;
  int64_t bad_ = -1;
  Rows rows_{};
  std::vector<int64_t> memory_;
  std::vector<int64_t> places_;  // positions of the sums: 0, 1, 2, ...
  std::unique_ptr<std::byte[]> sums_;
};

// Whether the kernels can read these indices without a conversion.
inline bool is_index_array(const py::object& indices) {
  if (!py::isinstance<py::array>(indices)) return false;
  const auto array = py::reinterpret_borrow<py::array>(indices);
  const py::dtype dtype = array.dtype();
  return dtype.kind() == 'i' && (dtype.itemsize() == 4 || dtype.itemsize() == 8) && dtype.byteorder() == '=' &&
         array.ndim() == 1 && (array.flags() & py::array::c_style) != 0 &&
         (array.flags() & py::detail::npy_api::NPY_ARRAY_ALIGNED_) != 0;
}

}  // namespace fastadam::bind
