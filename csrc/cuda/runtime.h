// SPDX-License-Identifier: Apache-2.0
// Wrappers of the CUDA runtime for the .cu files of this folder: errors become exceptions, memory frees itself, and
// kernels (dense_kernels.h) are launched.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "step_state.h"

namespace fastadam::cuda {

inline void check(cudaError_t status) {
  if (status == cudaSuccess) return;
  static_cast<void>(cudaGetLastError());  // clears the error, which the next launch would report again
  throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(status));
}

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads) run_phases(const __grid_constant__ Kernel kernel) {
  __shared__ typename Kernel::Shared shared;
  const int phases = kernel.phases();
  for (int phase = 0; phase < phases; ++phase) {
    if (phase > 0) __syncthreads();
    kernel.phase(phase, static_cast<int64_t>(blockIdx.x), static_cast<int64_t>(threadIdx.x), shared);
  }
}

template <class Kernel>
void launch(const Kernel& kernel, int64_t blocks, cudaStream_t stream) {
  static_assert(sizeof(Kernel) <= 4096, "kernel arguments are at most 4 KiB");
  if (blocks == 0) return;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(Kernel::kThreads);
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, run_phases<Kernel>, kernel));
}

// Lets this thread allocate and free memory while any thread captures a CUDA graph. Without it a capture in global
// mode, as PyTorch makes, fails when Python collects garbage of ours.
class DuringCaptures {
 public:
  DuringCaptures() { exchange(); }
  ~DuringCaptures() { exchange(); }
  DuringCaptures(const DuringCaptures&) = delete;
  DuringCaptures& operator=(const DuringCaptures&) = delete;

 private:
  void exchange() { static_cast<void>(cudaThreadExchangeStreamCaptureMode(&other_)); }

  cudaStreamCaptureMode other_ = cudaStreamCaptureModeRelaxed;  // the mode that the thread does not have now
};

inline void* device_memory(size_t bytes) {
  void* data = nullptr;
  const DuringCaptures may_allocate;
  if (bytes > 0) check(cudaMalloc(&data, bytes));
  return data;
}

inline void free_device_memory(void* data) {
  if (data == nullptr) return;
  const DuringCaptures may_free;
  static_cast<void>(cudaFree(data));
}

// Device memory. Freeing it waits for the device, so it is allocated before a step and kept for later ones.
template <class T>
class DeviceArray {
 public:
  DeviceArray() = default;
  explicit DeviceArray(int64_t count)
      : data_(static_cast<T*>(device_memory(static_cast<size_t>(count) * sizeof(T)))), count_(count) {}
  DeviceArray(const std::vector<T>& values, cudaStream_t stream) : DeviceArray(static_cast<int64_t>(values.size())) {
    write(values.data(), static_cast<int64_t>(values.size()), stream);
  }
  ~DeviceArray() { free_device_memory(data_); }
  DeviceArray(DeviceArray&& other) noexcept { *this = std::move(other); }
  DeviceArray& operator=(DeviceArray&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(count_, other.count_);
    return *this;
  }

  // `values` may be freed as soon as this returns: the runtime stages memory that is not pinned.
  void write(const T* values, int64_t count, cudaStream_t stream) {
    if (count == 0) return;
    check(cudaMemcpyAsync(data_, values, static_cast<size_t>(count) * sizeof(T), cudaMemcpyHostToDevice, stream));
  }

  T* get() const { return data_; }
  int64_t count() const { return count_; }

 private:
  T* data_ = nullptr;
  int64_t count_ = 0;
};

// Returns memory for `count` elements. It grows by doubling, so that steps of similar sizes allocate nothing.
template <class T>
T* room_for(DeviceArray<T>& memory, int64_t count) {
  if (memory.count() < count) memory = DeviceArray<T>(std::max(count, 2 * memory.count()));
  return memory.get();
}

// A Report in host memory that the device can write to.
class HostReport {
 public:
  HostReport() {
    void* memory = nullptr;
    const DuringCaptures may_allocate;
    check(cudaHostAlloc(&memory, sizeof(Report), cudaHostAllocMapped));
    report_ = static_cast<Report*>(memory);
    *report_ = Report{};
    check(cudaHostGetDevicePointer(&memory, report_, 0));
    on_device_ = static_cast<Report*>(memory);
  }
  ~HostReport() {
    const DuringCaptures may_free;
    static_cast<void>(cudaFreeHost(report_));
  }
  HostReport(const HostReport&) = delete;
  HostReport& operator=(const HostReport&) = delete;

  Report* on_device() const { return on_device_; }
  volatile Report* get() const { return report_; }

 private:
  Report* report_ = nullptr;
  Report* on_device_ = nullptr;
};

inline bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &status));
  return status != cudaStreamCaptureStatusNone;
}

}  // namespace fastadam::cuda
