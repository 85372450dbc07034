// SPDX-License-Identifier: Apache-2.0
// IndexedSlices and deferred tables on a GPU; slices.h and stale.h are for CPU memory.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../cuda/launch.h"
#include "device_buffers.h"
#include "stale.h"

namespace fastadam::bind {

// Describes indices in the error about one that the device found to be out of range.
struct IndexSource {
  std::string indices;   // "grads[3].indices"
  std::string variable;  // "variable 'w'"
  int64_t row_count;
  bool operator==(const IndexSource& o) const {
    return indices == o.indices && variable == o.variable && row_count == o.row_count;
  }
};

// Indices on a device, or in CPU memory, which are copied to it.
class DeviceIndex {
 public:
  DeviceIndex(const py::object& indices, const Label& label, const Buffer& variable)
      : label_(label), variable_(variable.label), row_count_(variable.shape[0]) {
    if (py::isinstance<py::array>(indices)) {
      buffer_ = from_ndarray(py::reinterpret_borrow<py::array>(indices));
    } else {
      buffer_ = require_cuda_array(indices, label());
      require_place(buffer_, label(), variable);
    }
    is_int64_ = buffer_.item_size == 8;
    const bool is_integer = !buffer_.dtype && (buffer_.dtype_name == "int32" || buffer_.dtype_name == "int64");
    if (!is_integer || !buffer_.c_contiguous) {
      throw py::value_error(label() + ": " + (buffer_.dtype ? name_of(*buffer_.dtype) : buffer_.dtype_name) + " " +
                            tuple_text(buffer_.shape) + ", expected a contiguous array of int32 or int64");
    }
    rows_.width = row_count_ == 0 ? 0 : variable.size / row_count_;
    rows_.count = buffer_.size;
  }
  DeviceIndex(const DeviceIndex&) = delete;
  DeviceIndex& operator=(const DeviceIndex&) = delete;

  int64_t count() const { return buffer_.size; }
  size_t rank() const { return buffer_.shape.size(); }
  const Rows& rows() const { return rows_; }
  const Buffer& buffer() const { return buffer_; }
  IndexSource source() const { return {label_(), variable_, row_count_}; }

  void sort(cuda::SortedRows& sorted, const void* indices, int64_t source, cuda::Context& context) {
    sorted_ = &sorted;
    sorted.sort(indices, is_int64_, count(), row_count_, rows_.width, source, context);
    rows_ = sorted.rows();
  }

  void* sum(const TensorArgs& tensor, cuda::Context& context) {
    return sorted_->sum(tensor.grad, tensor.grad_dtype, context);
  }

  // The device reports an invalid index later.
  int64_t bad() const { return -1; }
  int64_t bad_index() const { return -1; }
  bool is_summed(bool) const { return false; }
  void use_sums() const {}

 private:
  Label label_;
  std::string variable_;
  int64_t row_count_;
  Buffer buffer_;
  bool is_int64_ = false;
  cuda::DeviceRows rows_{};
  cuda::SortedRows* sorted_ = nullptr;
};

// A table on a device. The host keeps the rates and sends each to the device; `last` is kept by the device only.
class DeviceTable : public History {
 public:
  // Like StaleTable::Arrays, with `last` on the device and a third count: the steps that all rows have seen. Then the
  // caller's counter before each step, and the history on the device.
  using Arrays =
      std::tuple<py::object, py::array, py::array, py::array, py::array_t<int64_t>, std::shared_ptr<ClosedForms>,
                 double, py::array_t<int64_t>, std::shared_ptr<cuda::DeviceHistory>>;

  DeviceTable(const Arrays& arrays, const Buffer& variable, std::shared_ptr<cuda::Context> context)
      : History(std::get<1>(arrays), std::get<2>(arrays), std::get<3>(arrays), std::get<4>(arrays), std::get<5>(arrays),
                std::get<6>(arrays), variable),
        last_(require_cuda_array(std::get<0>(arrays), "last")),
        calls_(std::get<7>(arrays)),
        history_(std::get<8>(arrays)),
        context_(std::move(context)) {}

  const StaleRows& rows(const TensorArgs&, const AdamHyper& hyper, bool amsgrad) {
    read(args_, 0, hyper, amsgrad);
    if (forms_ != nullptr) write_forms(hyper, amsgrad);
    history_->point(args_);
    if (forms_ == nullptr) args_.forms = nullptr;
    args_.last = static_cast<int32_t*>(last_.data);
    return args_;
  }

  const StaleRows* all_rows() const { return nullptr; }

  void note(const TensorArgs& tensor, const StepArgs* step, int64_t call) {
    if (step == nullptr || tensor.stale == nullptr) return;
    calls_.mutable_data()[steps()] = call;
    append(*step, tensor.decays, 0);
    history_->append(alphas_.data(), keeps_.data(), peaks_.data(), steps() - 1, context_->stream());
  }

  // The pass may later turn out to have done nothing.
  void note_pass() {
    counts()[2] = steps();
    if (forms_ != nullptr) forms_->clear();
  }
  bool is_empty() const { return steps() == synced(); }

 private:
  // Writes the forms of every gap since all rows were up to date: only the device knows which gaps exist. The forms are
  // computed as if the history began there, as for a table in CPU memory.
  void write_forms(const AdamHyper& hyper, bool amsgrad) {
    const int64_t first = counts()[2];
    const auto count = static_cast<size_t>(steps() - first);
    StaleRows since = args_;
    since.alphas = static_cast<const float*>(args_.alphas) + first;
    since.keeps = static_cast<const float*>(args_.keeps) + first;
    since.now = steps() - first;
    std::vector<float> peaks(count / kPeakSteps + 1, 0.0F);
    std::vector<int32_t> every(count);
    for (size_t i = 0; i < count; ++i) {
      every[i] = static_cast<int32_t>(i);
      float& peak = peaks[i / kPeakSteps];
      peak = std::max(peak, std::abs(static_cast<const float*>(since.alphas)[i]));
    }
    since.peaks = peaks.data();
    forms_->prepare(every.data(), since.now, since, hyper, amsgrad);
    std::vector<int32_t> places(static_cast<size_t>(steps()) + 1, 0);
    std::copy_n(forms_->places(), count + 1, places.begin() + static_cast<std::ptrdiff_t>(first));
    const ReleasedGil unlocked;
    history_->write_forms(forms_->forms(), forms_->count(), places.data(), steps() + 1, context_->stream());
  }

  Buffer last_;
  py::array_t<int64_t> calls_;
  std::shared_ptr<cuda::DeviceHistory> history_;
  std::shared_ptr<cuda::Context> context_;
  cuda::DeviceStale args_{};
};

}  // namespace fastadam::bind
