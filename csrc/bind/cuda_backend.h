// SPDX-License-Identifier: Apache-2.0
// The Backend of a Plan on a GPU. It works on the current stream of the library that the variables come from.
#pragma once

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "../core/float_mode.h"
#include "../cuda/launch.h"
#include "device_buffers.h"
#include "device_rows.h"
#include "gil.h"
#include "variables.h"

namespace fastadam::bind {

// Shared by the plans of one optimizer on one device.
struct CudaContext {
  explicit CudaContext(int device_number) : device(device_number), native(make(device_number)) {}

  int64_t number_of(const IndexSource& source) {
    const auto found = std::find(sources.begin(), sources.end(), source);
    if (found != sources.end()) return found - sources.begin();
    sources.push_back(source);
    return static_cast<int64_t>(sources.size()) - 1;
  }

  // If a step did nothing because of an invalid index: the counter before that step, and the error text.
  std::optional<std::pair<int64_t, std::string>> take_failure() {
    if (!native->has_failed()) return std::nullopt;
    std::optional<cuda::Failure> failure;
    {
      const cuda::DeviceScope scope(device);
      const ReleasedGil unlocked;
      failure = native->take_failure();
    }
    if (!failure) return std::nullopt;
    const IndexSource& source = sources.at(static_cast<size_t>(failure->source));
    return std::make_pair(failure->call, source.indices + "[" + std::to_string(failure->position) + "]: " +
                                             std::to_string(failure->index) + " is not a row of " + source.variable +
                                             ", expected 0 <= index < " + std::to_string(source.row_count));
  }

  void wait() {
    const cuda::DeviceScope scope(device);
    const ReleasedGil unlocked;
    native->wait();
  }

  int64_t step() {
    const cuda::DeviceScope scope(device);
    const ReleasedGil unlocked;
    return native->step();
  }

  int device;
  std::shared_ptr<cuda::Context> native;
  std::vector<IndexSource> sources;

 private:
  static std::shared_ptr<cuda::Context> make(int device) {
    const cuda::DeviceScope scope(device);
    return std::make_shared<cuda::Context>();
  }
};

// Launches of the context from here on wait for the work on stream `other`. Not in a graph: whoever replays it decides
// when it runs.
inline void order_after(const cuda::Context& context, const std::optional<uintptr_t>& other) {
  if (!other || context.is_capturing()) return;
  void* stream = context.stream();
  const auto on = reinterpret_cast<uintptr_t>(stream);
  const bool is_legacy = *other <= 1 && on <= 1;
  if (*other != on && !is_legacy) cuda::order_after(stream, reinterpret_cast<void*>(*other));
}

class CudaBackend {
 public:
  using Arrays = CudaArrays;
  using Index = DeviceIndex;
  using Table = DeviceTable;

  // Selects the device and the stream of the variables for the calls of one step, and restores them afterwards.
  class Scope {
   public:
    Scope(CudaBackend& backend, const Buffer& place)
        : Scope(backend.context_->device, *backend.context_->native, place) {}
    Scope(int device, cuda::Context& context, const Buffer& place) : device_(device), context_(context) {
      void* stream = launch_stream(place);
      context_.enter(stream);
      if (place.gpu && place.gpu->is_torch) torch_stream_of_step = {device, reinterpret_cast<uintptr_t>(stream)};
    }
    ~Scope() {
      torch_stream_of_step = {};
      context_.leave();
    }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    DefaultArithmetic arithmetic_;
    cuda::DeviceScope device_;
    cuda::Context& context_;
  };

  // `place`: a Buffer on the device of all variables.
  CudaBackend(const Buffer& place, const std::vector<TensorArgs>& tensors, const Chains& chains,
              const py::object& context)
      : context_(context.is_none() ? std::make_shared<CudaContext>(place.device())
                                   : context.cast<std::shared_ptr<CudaContext>>()) {
    void* stream = launch_stream(place);
    if (reinterpret_cast<uintptr_t>(stream) >= 2 && cuda::is_capturing(stream)) {
      throw std::runtime_error("a step with these variables was not made before it was captured; make one first");
    }
    const Scope scope(*this, place);
    {
      const ReleasedGil unlocked;
      launch_ = std::make_unique<cuda::Launch>(context_->native, tensors, chains);
    }
    sorted_.resize(tensors.size());
    copies_.resize(tensors.size());
  }

  bool takes_indices(const py::object&) const { return true; }

  std::unique_ptr<Index> index_of(const py::object& indices, const Label& label, const Buffer& variable) const {
    auto index = std::make_unique<DeviceIndex>(indices, label, variable);
    order_after(index->buffer().stream());
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

  void order_after(const std::optional<uintptr_t>& other) const { bind::order_after(*context_->native, other); }

  void* make_sums(Index& index, const TensorArgs& tensor) const { return index.sum(tensor, *context_->native); }
  void run_sum_rows(const std::vector<TensorArgs>&, const std::vector<void*>&) const {}  // make_sums did it

  bool step(const StepArgs& args, const std::vector<TensorArgs>& tensors, const AdamHyper& hyper, int64_t call) {
    if (context_->native->is_capturing() && hyper.require_finite) {
      throw std::runtime_error("a step that waits to see its gradients cannot be captured");
    }
    if (numbers_.found_inf != nullptr) {
      for (const TensorArgs& tensor : tensors) {
        if (tensor.stale != nullptr) {
          throw std::runtime_error(
              "found_inf: on the GPU, of a step with a deferred table, whose history the host has");
        }
      }
      if (hyper.require_finite)
        throw std::runtime_error("found_inf: on the GPU, of a step that requires finite gradients");
    }
    for (const Buffer& number : number_buffers_) order_after(number.stream());
    return launch_->step(args, tensors, hyper, numbers_, call);
  }

  bool accumulate(const AccumulateArgs& args, bool require_finite, const std::vector<TensorArgs>& tensors,
                  int64_t call) {
    if (context_->native->is_capturing()) {
      throw std::runtime_error("gradient_accumulation_steps: calls that are counted by the host cannot be captured");
    }
    if (numbers_.grad_scale != nullptr || numbers_.found_inf != nullptr) {
      throw std::runtime_error("gradient_accumulation_steps: with grad_scale or found_inf on the GPU");
    }
    return launch_->accumulate(args.restart, require_finite, tensors, call);
  }

  void catch_up(const TensorArgs& tensor, const StepArgs& args, int64_t call) { launch_->catch_up(args, tensor, call); }

  bool is_capturing() const { return context_->native->is_capturing(); }

  // Sets the numbers, or None, that the device itself reads in every later step.
  void set_device_numbers(const py::object& rate, const py::object& grad_scale, const py::object& found_inf,
                          bool counts) {
    cuda::DeviceNumbers numbers{};
    std::vector<Buffer> buffers;
    const auto read = [&](const py::object& number, const char* name, bool may_be_double) -> const Buffer& {
      return buffers.emplace_back(require_number(number, name, may_be_double));
    };
    if (!rate.is_none()) {
      const Buffer& b = read(rate, "learning_rate", true);
      numbers.rate = b.data;
      numbers.rate_is_double = b.dtype == FASTADAM_FLOAT64;
    }
    if (!grad_scale.is_none()) {
      numbers.grad_scale = static_cast<const float*>(read(grad_scale, "grad_scale", false).data);
    }
    if (!found_inf.is_none()) {
      numbers.found_inf = static_cast<const float*>(read(found_inf, "found_inf", false).data);
    }
    numbers.counts = counts;
    numbers_ = numbers;
    number_buffers_ = std::move(buffers);
  }

  // Whether the device can count t with these betas; see cuda::Launch.
  bool can_count(const AdamHyper& hyper) { return launch_->can_count(hyper); }

 private:
  Buffer require_number(const py::object& number, const char* name, bool may_be_double) const {
    Buffer b = require_cuda_array(number, name);
    const bool is_float = b.dtype == FASTADAM_FLOAT32 || (may_be_double && b.dtype == FASTADAM_FLOAT64);
    if (is_float && b.size == 1 && b.device() == context_->device) return b;
    throw py::value_error(std::string(name) + ": " + tuple_text(b.shape) + " " +
                          (b.dtype ? name_of(*b.dtype) : b.dtype_name) + " in " + place_text(b) + ", expected one " +
                          (may_be_double ? "float32 or float64" : "float32") + " on CUDA device " +
                          std::to_string(context_->device));
  }

  // 0, 1 and no stream mean the legacy stream.
  static void* launch_stream(const Buffer& place) {
    const std::optional<uintptr_t> stream = place.gpu ? stream_of(place.gpu->source) : std::nullopt;
    return reinterpret_cast<void*>(stream.value_or(0) == 1 ? 0 : stream.value_or(0));
  }

  const void* on_device(const Buffer& indices, size_t i) {
    if (indices.gpu) return indices.data;
    if (context_->native->is_capturing()) {
      throw std::runtime_error("indices in CPU memory, which a CUDA graph would read again, expected them on the GPU");
    }
    const int64_t bytes = indices.size * indices.item_size;
    if (copies_[i].bytes < bytes) copies_[i] = {std::shared_ptr<void>(cuda::allocate(bytes), &cuda::release), bytes};
    const auto* data = static_cast<const char*>(indices.data);
    // The runtime copies pageable memory before it returns, but not pinned memory.
    const std::vector<char> pageable(data, data + bytes);
    cuda::copy_to_device(copies_[i].memory.get(), pageable.data(), bytes, context_->native->stream());
    return copies_[i].memory.get();
  }

  struct Copy {
    std::shared_ptr<void> memory;
    int64_t bytes = 0;
  };

  std::shared_ptr<CudaContext> context_;
  std::unique_ptr<cuda::Launch> launch_;
  std::vector<std::unique_ptr<cuda::SortedRows>> sorted_;  // by tensor; their memory is reused
  std::vector<Copy> copies_;                               // of indices in CPU memory
  cuda::DeviceNumbers numbers_{};
  std::vector<Buffer> number_buffers_;  // keep the numbers alive, and know which streams write them
};

}  // namespace fastadam::bind
