// SPDX-License-Identifier: Apache-2.0
// The Place of jax_handlers.h for buffers on a CUDA device. The host waits for the stream to read the numbers of a step
// and ids; the step itself is launched asynchronously.
#pragma once

#include <algorithm>
#include <list>
#include <map>
#include <mutex>
#include <optional>

#include "../cuda/device.h"
#include "../cuda/launch.h"
#include "../include/fastadam_cuda.h"
#include "jax_handlers.h"

namespace fastadam::bind {

inline void require_launched(fastadam_status status) {
  if (status == FASTADAM_OK) return;
  if (status == FASTADAM_NO_MEMORY) throw std::bad_alloc();
  if (status == FASTADAM_INVALID) throw std::invalid_argument(fastadam_cuda_error());
  throw std::runtime_error(fastadam_cuda_error());
}

// Device memory that grows on demand.
class Scratch {
 public:
  Scratch() = default;
  ~Scratch() { cuda::release(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  void* of(int64_t bytes) {
    if (bytes > bytes_) {
      cuda::release(data_);  // waits for work that uses it
      data_ = nullptr;
      bytes_ = 0;
      data_ = cuda::allocate(bytes);
      bytes_ = bytes;
    }
    return data_;
  }

 private:
  void* data_ = nullptr;
  int64_t bytes_ = 0;
};

// A plan for a set of arrays, which XLA passes to a computation again and again, and the memory that its steps need.
struct JaxPlan {
  JaxPlan(int device, const std::vector<fastadam_tensor>& arrays) : tensors(arrays) {
    const fastadam_list list = list_of(tensors);
    require_launched(fastadam_cuda_plan_create(device, &list, &native));
  }
  ~JaxPlan() { static_cast<void>(fastadam_cuda_plan_destroy(native)); }
  JaxPlan(const JaxPlan&) = delete;
  JaxPlan& operator=(const JaxPlan&) = delete;

  static fastadam_list list_of(const std::vector<fastadam_tensor>& tensors) {
    return {FASTADAM_ABI, tensors.data(), static_cast<int64_t>(tensors.size()), nullptr, nullptr, 0};
  }

  bool is_for(const std::vector<fastadam_tensor>& arrays) const {
    const auto same = [](const fastadam_tensor& a, const fastadam_tensor& b) {
      return a.var == b.var && a.m == b.m && a.v == b.v && a.vhat == b.vhat && a.size == b.size && a.dtype == b.dtype &&
             a.decays == b.decays && a.moments == b.moments;
    };
    return std::equal(tensors.begin(), tensors.end(), arrays.begin(), arrays.end(), same);
  }

  std::vector<fastadam_tensor> tensors;
  fastadam_cuda_plan* native = nullptr;
  Scratch ids, positions, values;  // of a shard, for work on `stream`
  void* stream = nullptr;
  cuda::Gather gather;
};

// The most recently used plans of one device. Plans contain only addresses, so it does no harm if the arrays no longer
// exist.
class JaxPlans {
 public:
  static constexpr size_t kMost = 256;

  // Each device has its own lock, because a wait for one device, under its lock, may depend on the program of another.
  // Never destroyed: at the end of a process the CUDA runtime may already be gone.
  static JaxPlans& on(int device) {
    static std::mutex& mutex_of_all = *new std::mutex;
    static std::map<int, JaxPlans>& all = *new std::map<int, JaxPlans>;
    const std::lock_guard lock(mutex_of_all);
    return all[device];
  }

  // Finds or makes the plan for these arrays. The device must be current.
  JaxPlan& find(int device, const std::vector<fastadam_tensor>& tensors) {
    for (auto plan = plans_.begin(); plan != plans_.end(); ++plan) {
      if (!plan->is_for(tensors)) continue;
      plans_.splice(plans_.begin(), plans_, plan);
      return plans_.front();
    }
    if (plans_.size() == kMost) plans_.pop_back();
    return plans_.emplace_front(device, tensors);
  }

  std::mutex mutex;  // held during a step

 private:
  std::list<JaxPlan> plans_;
};

class OnDevice {
 public:
  explicit OnDevice(void* stream) : stream_(stream) {}

  // Must be called first, because it determines the device.
  void read(void* to, const void* from, int64_t bytes) {
    if (bytes == 0) return;
    device_ = cuda::location_of(from).device;
    const cuda::DeviceScope scope(device_);
    cuda::copy_to_host(to, from, bytes, stream_);
  }

  void clear(void* data, int64_t bytes) const {
    const cuda::DeviceScope scope(device_);
    cuda::set_zero(data, bytes, stream_);
  }

  void step(const std::vector<fastadam_tensor>& tensors, const fastadam_hyper& hyper, bool lazy) const {
    JaxPlans& plans = JaxPlans::on(device_);
    const std::lock_guard lock(plans.mutex);
    const cuda::DeviceScope scope(device_);
    launch(plans.find(device_, tensors), tensors, hyper, lazy);
  }

  void step_rows(fastadam_tensor tensor, Ids ids, const Shard& shard, const fastadam_hyper& hyper, bool lazy) {
    const std::vector<int64_t> host_ids = read_ids(ids, shard.total);
    if (tensor.size == 0) return;
    JaxPlans& plans = JaxPlans::on(device_);
    const std::lock_guard lock(plans.mutex);
    const cuda::DeviceScope scope(device_);
    JaxPlan& plan = plans.find(device_, {tensor});
    if (shard.count != shard.total) select_shard(plan, host_ids, shard, ids, tensor);
    const fastadam_rows* rows = nullptr;
    require_launched(fastadam_cuda_sort_rows(plan.native, 0, ids.data, ids.is_long, ids.count, shard.count, ids.width,
                                             stream_, &rows));
    tensor.rows = rows;
    tensor.grad_size = ids.count * ids.width;
    launch(plan, {tensor}, hyper, lazy);
  }

 private:
  void launch(JaxPlan& plan, const std::vector<fastadam_tensor>& tensors, const fastadam_hyper& hyper,
              bool lazy) const {
    const fastadam_list list = JaxPlan::list_of(tensors);
    require_launched(fastadam_cuda_step(plan.native, &list, &hyper, lazy, stream_));
  }

  // Checks the ids here, because the device would detect an invalid one only after the step was launched.
  std::vector<int64_t> read_ids(const Ids& ids, int64_t row_count) {
    std::vector<int64_t> values(static_cast<size_t>(ids.count));
    if (ids.is_long) {
      read(values.data(), ids.data, ids.count * static_cast<int64_t>(sizeof(int64_t)));
    } else {
      std::vector<int32_t> narrow(values.size());
      read(narrow.data(), ids.data, ids.count * static_cast<int64_t>(sizeof(int32_t)));
      values.assign(narrow.begin(), narrow.end());
    }
    for (size_t i = 0; i < values.size(); ++i) {
      if (values[i] >= 0 && values[i] < row_count) continue;
      throw std::invalid_argument("indices[" + std::to_string(i) + "]: " + std::to_string(values[i]) +
                                  " is not a row, expected 0 <= index < " + std::to_string(row_count));
    }
    return values;
  }

  // Reduces `ids` and the gradient of `tensor` to the rows of the shard, in the same order. Ids then count from the
  // first row of the shard.
  void select_shard(JaxPlan& plan, const std::vector<int64_t>& host_ids, const Shard& shard, Ids& ids,
                    fastadam_tensor& tensor) const {
    std::vector<int64_t> shard_ids, positions;
    for (size_t i = 0; i < host_ids.size(); ++i) {
      if (host_ids[i] < shard.first || host_ids[i] >= shard.first + shard.count) continue;
      shard_ids.push_back(host_ids[i] - shard.first);
      positions.push_back(static_cast<int64_t>(i));
    }
    const auto count = static_cast<int64_t>(shard_ids.size());
    if (plan.stream != stream_) cuda::set_zero(nullptr, 0);  // waits for steps that may still read the plan's memory
    plan.stream = stream_;
    void* values = plan.values.of(count * ids.width * size_of(tensor.grad_dtype));
    plan.gather.run(tensor.grad, ids.count, ids.width, tensor.grad_dtype, upload(plan.positions, positions), true,
                    count, values, stream_);
    tensor.grad = values;
    ids = {upload(plan.ids, shard_ids), true, count, ids.width};
  }

  const void* upload(Scratch& to, const std::vector<int64_t>& values) const {
    const auto bytes = static_cast<int64_t>(values.size() * sizeof(int64_t));
    void* data = to.of(bytes);
    cuda::copy_to_device(data, values.data(), bytes, stream_);
    return data;
  }

  void* stream_;  // a cudaStream_t
  int device_ = 0;
};

}  // namespace fastadam::bind

template <>
struct xla::ffi::CtxDecoding<fastadam::bind::OnDevice> {
  using Type = fastadam::bind::OnDevice;
  static std::optional<Type> Decode(const XLA_FFI_Api* api, XLA_FFI_ExecutionContext* context,
                                    DiagnosticEngine& errors) {
    const auto stream = CtxDecoding<PlatformStream<void*>>::Decode(api, context, errors);
    return stream ? std::optional<Type>(Type(*stream)) : std::nullopt;
  }
};
