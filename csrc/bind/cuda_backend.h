// SPDX-License-Identifier: Apache-2.0
// A Backend: how a Plan runs its steps on a GPU, on the current stream of the library that its variables come from.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "../cuda/launch.h"
#include "device_buffers.h"
#include "stale.h"
#include "variables.h"

namespace fastadam::bind {

// What the plans of one optimizer share on one device, and what an index was that is found bad there.
struct CudaContext {
  explicit CudaContext(int device_number) : device(device_number), native(make(device_number)) {}

  struct Source {
    std::string indices;   // "grads[3].indices"
    std::string variable;  // "variable 'w'"
    int64_t row_count;
    bool operator==(const Source& o) const {
      return indices == o.indices && variable == o.variable && row_count == o.row_count;
    }
  };

  int64_t number_of(const Source& source) {
    const auto found = std::find(sources.begin(), sources.end(), source);
    if (found != sources.end()) return found - sources.begin();
    sources.push_back(source);
    return static_cast<int64_t>(sources.size()) - 1;
  }

  // The counter before the first step that did nothing, and why.
  std::optional<std::pair<int64_t, std::string>> take_failure() {
    const cuda::DeviceScope scope(device);
    const std::optional<cuda::Failure> failure = native->take_failure();
    if (!failure) return std::nullopt;
    const Source& source = sources.at(static_cast<size_t>(failure->source));
    return std::make_pair(failure->call, source.indices + "[" + std::to_string(failure->position) + "]: " +
                                             std::to_string(failure->index) + " is no row of " + source.variable +
                                             ", expected 0 <= index < " + std::to_string(source.row_count));
  }

  void wait() {
    const cuda::DeviceScope scope(device);
    const py::gil_scoped_release unlocked;
    native->wait();
  }

  int64_t replays() {
    const cuda::DeviceScope scope(device);
    return native->replays();
  }

  void set_step(int64_t step) {
    const cuda::DeviceScope scope(device);
    native->set_step(step);
  }

  int device;
  std::shared_ptr<cuda::Context> native;
  std::vector<Source> sources;

 private:
  static std::shared_ptr<cuda::Context> make(int device) {
    const cuda::DeviceScope scope(device);
    return std::make_shared<cuda::Context>();
  }
};

// Indices on a device, or of the host: these are copied.
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
  CudaContext::Source source() const { return {label_(), variable_, row_count_}; }

  void sort(cuda::SortedRows& sorted, const void* indices, int64_t source, cuda::Context& context) {
    sorted_ = &sorted;
    sorted.sort(indices, is_int64_, count(), row_count_, rows_.width, source, context);
    rows_ = sorted.rows();
  }

  void* sum(const TensorArgs& tensor, const cuda::Context& context) {
    return sorted_->sum(tensor.grad, tensor.grad_dtype, context);
  }

  // What a device finds wrong is told later.
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

// A table on a device: its rates are those of the host, which hands each over, `last` is the device's own.
class DeviceTable : public History {
 public:
  // As StaleTable::Arrays, `last` on the device; a third count, of the steps that all rows have had; for each step the
  // caller's counter before it; the history on the device.
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

  const StaleRows& rows(const Rows*, const AdamHyper& hyper, bool amsgrad) {
    read(args_, hyper, amsgrad);
    if (forms_ != nullptr) write_forms(hyper, amsgrad);
    history_->point(args_);
    if (forms_ == nullptr) args_.forms = nullptr;
    args_.last = static_cast<int32_t*>(last_.data);
    return args_;
  }

  void note(const Rows&, const StepArgs* step, bool decays, int64_t call) {
    if (step == nullptr) return;
    calls_.mutable_data()[steps()] = call;
    append(*step, decays);
    history_->append(alphas_.data(), keeps_.data(), peaks_.data(), steps() - 1, context_->stream());
  }

  // The history stays: a step that turns out to have done nothing may have been the one that cleared it.
  void clear() {
    counts()[2] = steps();
    if (forms_ != nullptr) forms_->clear();
  }
  bool is_empty() const { return counts_.data()[2] == steps(); }

 private:
  // Of every gap since all rows were up to date: which there are is known to the device alone. As if the history began
  // there, like that of a table of the host.
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
    history_->write_forms(forms_->forms(), forms_->count(), places.data(), steps() + 1, context_->stream());
  }

  Buffer last_;
  py::array_t<int64_t> calls_;
  std::shared_ptr<cuda::DeviceHistory> history_;
  std::shared_ptr<cuda::Context> context_;
  cuda::DeviceStale args_{};
};

class CudaBackend {
 public:
  using Index = DeviceIndex;
  using Table = DeviceTable;

  // The device and the stream of the variables, for the calls of one step; what was current is so again afterwards.
  class Scope {
   public:
    Scope(CudaBackend& backend, const Buffer& place)
        : Scope(backend.context_->device, *backend.context_->native, place) {}
    Scope(int device, cuda::Context& context, const Buffer& place) : device_(device), context_(context) {
      void* stream = launch_stream(place);
      context_.enter(stream);
      if (place.is_torch) torch_stream_of_step = {device, reinterpret_cast<uintptr_t>(stream)};
    }
    ~Scope() {
      torch_stream_of_step = {};
      context_.leave();
    }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    cuda::DeviceScope device_;
    cuda::Context& context_;
  };

  CudaBackend(const VariableSet& set, const std::vector<TensorArgs>& tensors, const py::object& context)
      : context_(context.is_none() ? std::make_shared<CudaContext>(set.place().device)
                                   : context.cast<std::shared_ptr<CudaContext>>()) {
    const Scope scope(*this, set.place());
    if (context_->native->is_capturing()) {
      throw std::runtime_error("a step with these variables was not made before it was captured; make one first");
    }
    launch_ = std::make_unique<cuda::Launch>(context_->native, tensors, set.chains());
    sorted_.resize(tensors.size());
    copies_.resize(tensors.size());
  }

  bool takes_indices(const py::object&) const { return true; }

  std::unique_ptr<Index> index_of(const py::object& indices, const Label& label, const Buffer& variable) const {
    auto index = std::make_unique<DeviceIndex>(indices, label, variable);
    order_after(index->buffer().stream);
    return index;
  }

  std::unique_ptr<Table> table_of(const Table::Arrays& arrays, const Buffer& variable) const {
    return std::make_unique<DeviceTable>(arrays, variable, context_->native);
  }

  bool sort(Index& index, int64_t tensor) {
    const auto i = static_cast<size_t>(tensor);
    if (sorted_[i] == nullptr) sorted_[i] = std::make_unique<cuda::SortedRows>();
    index.sort(*sorted_[i], on_device(index.buffer(), i), context_->number_of(index.source()), *context_->native);
    return true;
  }

  void drop(std::unique_ptr<Index>& index) const { index.reset(); }

  // Work on the stream of an array's owner comes before what is launched from here on.
  void order_after(const std::optional<uintptr_t>& other) const {
    if (!other) return;
    void* stream = context_->native->stream();
    const auto on = reinterpret_cast<uintptr_t>(stream);
    const bool is_legacy = *other <= 1 && on <= 1;
    if (*other != on && !is_legacy) cuda::order_after(stream, reinterpret_cast<void*>(*other));
  }

  void* make_sums(Index& index, const TensorArgs& tensor) const { return index.sum(tensor, *context_->native); }
  void run_sum_rows(const SumArgs&) const {}  // make_sums has

  bool step(const StepArgs& args, const std::vector<TensorArgs>& tensors, const AdamHyper& hyper, int64_t call) {
    if (context_->native->is_capturing()) {
      for (const TensorArgs& tensor : tensors) {
        if (tensor.stale != nullptr) throw std::runtime_error("sparse_update: a deferred table cannot be captured");
      }
      if (hyper.require_finite) throw std::runtime_error("a step that waits to see its gradients cannot be captured");
    }
    if (rate_.data != nullptr && !context_->native->is_capturing()) order_after(rate_stream_);
    return launch_->step(args, tensors, hyper, rate_, call);
  }

  bool accumulate(const AccumulateArgs& args, bool require_finite, const std::vector<TensorArgs>& tensors,
                  int64_t call) {
    if (context_->native->is_capturing()) {
      throw std::runtime_error("gradient_accumulation_steps: calls that are counted by the host cannot be captured");
    }
    return launch_->accumulate(args.restart, require_finite, tensors, call);
  }

  void catch_up(const StepArgs& args, const TensorArgs& tensor, int64_t call) { launch_->catch_up(args, tensor, call); }

  bool is_capturing() const { return context_->native->is_capturing(); }

  // A learning rate that lies on the device, or None.
  void set_rate(const py::object& rate) {
    rate_ = {};
    if (rate.is_none()) return;
    const Buffer b = require_cuda_array(rate, "learning_rate");
    const bool is_float = b.dtype == DType::kFloat32 || b.dtype == DType::kFloat64;
    if (!is_float || b.size != 1 || b.device != context_->device) {
      throw py::value_error("learning_rate: " + tuple_text(b.shape) + " " +
                            (b.dtype ? name_of(*b.dtype) : b.dtype_name) + " in " + place_text(b) +
                            ", expected one float32 or float64 on CUDA device " + std::to_string(context_->device));
    }
    rate_ = {b.data, b.dtype == DType::kFloat64};
    rate_stream_ = b.stream;
  }

 private:
  // 0 and "none" mean the legacy stream.
  static void* launch_stream(const Buffer& place) {
    const std::optional<uintptr_t> stream = place.stream_source ? stream_of(place.stream_source) : std::nullopt;
    return reinterpret_cast<void*>(stream.value_or(0) == 1 ? 0 : stream.value_or(0));
  }

  const void* on_device(const Buffer& indices, size_t i) {
    if (indices.device != Buffer::kHost) return indices.data;
    if (context_->native->is_capturing()) {
      throw std::runtime_error("indices in CPU memory, which a CUDA graph would read again, expected them on the GPU");
    }
    const int64_t bytes = indices.size * indices.item_size;
    if (copies_[i].bytes < bytes) copies_[i] = {std::shared_ptr<void>(cuda::allocate(bytes), &cuda::release), bytes};
    const auto* data = static_cast<const char*>(indices.data);
    const std::vector<char> pageable(data, data + bytes);  // which the runtime stages, as it would not pinned memory
    cuda::copy_to_device(copies_[i].memory.get(), pageable.data(), bytes, context_->native->stream());
    return copies_[i].memory.get();
  }

  struct Copy {
    std::shared_ptr<void> memory;
    int64_t bytes = 0;
  };

  std::shared_ptr<CudaContext> context_;
  std::unique_ptr<cuda::Launch> launch_;
  std::vector<std::unique_ptr<cuda::SortedRows>> sorted_;  // by tensor, with memory for the next step
  std::vector<Copy> copies_;                               // of indices of the host
  cuda::Rate rate_{};
  std::optional<uintptr_t> rate_stream_;  // of whoever writes to it
};

}  // namespace fastadam::bind
