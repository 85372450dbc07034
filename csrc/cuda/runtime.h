// SPDX-License-Identifier: Apache-2.0
// The CUDA runtime as the sources of this folder use it: errors as exceptions, memory that frees itself, launches of
// bodies. Included by .cu files only.
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
  static_cast<void>(cudaGetLastError());  // not to be found again by the next launch
  throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(status));
}

// Runs a body (dense_kernels.h).
template <class Body>
__global__ void __launch_bounds__(Body::kThreads) run(const __grid_constant__ Body body) {
  __shared__ typename Body::Shared shared;
  const int phases = body.phases();
  for (int phase = 0; phase < phases; ++phase) {
    if (phase > 0) __syncthreads();
    body.phase(phase, static_cast<int64_t>(blockIdx.x), static_cast<int64_t>(threadIdx.x), shared);
  }
}

template <class Body>
void launch(const Body& body, int64_t blocks, cudaStream_t stream) {
  static_assert(sizeof(Body) <= 4096, "kernel arguments are at most 4 KiB");
  if (blocks == 0) return;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(Body::kThreads);
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, run<Body>, body));
}

// Device memory that is made before a step and outlives it: to free it waits for the device.
template <class T>
class DeviceArray {
 public:
  DeviceArray() = default;
  explicit DeviceArray(int64_t count) : count_(count) {
    if (count > 0) check(cudaMalloc(&data_, static_cast<size_t>(count) * sizeof(T)));
  }
  DeviceArray(const std::vector<T>& values, cudaStream_t stream) : DeviceArray(static_cast<int64_t>(values.size())) {
    write(values.data(), static_cast<int64_t>(values.size()), stream);
  }
  ~DeviceArray() { static_cast<void>(cudaFree(data_)); }
  DeviceArray(DeviceArray&& other) noexcept { *this = std::move(other); }
  DeviceArray& operator=(DeviceArray&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(count_, other.count_);
    return *this;
  }

  // `values` may go once this has returned: the runtime stages memory that is not pinned.
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

// Grows by doubling, so that steps of about the same size allocate nothing.
template <class T>
T* room_for(DeviceArray<T>& memory, int64_t count) {
  if (memory.count() < count) memory = DeviceArray<T>(std::max(count, 2 * memory.count()));
  return memory.get();
}

// The memory of the host that the device reports to.
class HostReport {
 public:
  HostReport() {
    void* memory = nullptr;
    check(cudaHostAlloc(&memory, sizeof(Report), cudaHostAllocMapped));
    report_ = static_cast<Report*>(memory);
    *report_ = Report{};
    check(cudaHostGetDevicePointer(&memory, report_, 0));
    on_device_ = static_cast<Report*>(memory);
  }
  ~HostReport() { static_cast<void>(cudaFreeHost(report_)); }
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
