// SPDX-License-Identifier: Apache-2.0
#include "device.h"
#include "runtime.h"

namespace fastadam::cuda {

namespace {

cudaStream_t stream_of(void* stream) { return static_cast<cudaStream_t>(stream); }

}  // namespace

int device_count(std::string& reason) {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaSuccess) {
    reason = count > 0 ? "" : "no CUDA device";
    return count;
  }
  static_cast<void>(cudaGetLastError());  // clears the error, which the next launch would report
  reason = cudaGetErrorString(status);
  return 0;
}

const char* architectures() { return FASTADAM_CUDA_ARCHITECTURES; }

Location location_of(const void* data) {
  cudaPointerAttributes attributes{};
  check(cudaPointerGetAttributes(&attributes, data));
  if (attributes.type == cudaMemoryTypeManaged) return {Place::kManaged, attributes.device};
  return {attributes.type == cudaMemoryTypeDevice ? Place::kDevice : Place::kHost, attributes.device};
}

DeviceScope::DeviceScope(int device) : device_(device) {
  check(cudaGetDevice(&before_));
  if (before_ != device_) check(cudaSetDevice(device_));
}

DeviceScope::~DeviceScope() {
  if (before_ != device_) static_cast<void>(cudaSetDevice(before_));
}

void* allocate(int64_t bytes) { return device_memory(static_cast<size_t>(bytes)); }

void release(void* data) { free_device_memory(data); }

void set_zero(void* data, int64_t bytes) {
  if (bytes > 0) check(cudaMemsetAsync(data, 0, static_cast<size_t>(bytes), nullptr));
  check(cudaDeviceSynchronize());
}

void copy_to_host(void* to, const void* from, int64_t bytes) {
  check(cudaDeviceSynchronize());
  if (bytes > 0) check(cudaMemcpy(to, from, static_cast<size_t>(bytes), cudaMemcpyDeviceToHost));
}

void overwrite(void* to, const void* from, int64_t bytes) {
  check(cudaDeviceSynchronize());
  if (bytes > 0) check(cudaMemcpy(to, from, static_cast<size_t>(bytes), cudaMemcpyHostToDevice));
  check(cudaDeviceSynchronize());
}

void set_zero(void* data, int64_t bytes, void* stream) {
  if (bytes > 0) check(cudaMemsetAsync(data, 0, static_cast<size_t>(bytes), stream_of(stream)));
}

void copy_to_host(void* to, const void* from, int64_t bytes, void* stream) {
  if (bytes > 0) {
    check(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDeviceToHost, stream_of(stream)));
  }
  check(cudaStreamSynchronize(stream_of(stream)));
}

void copy_to_device(void* to, const void* from, int64_t bytes, void* stream) {
  if (bytes == 0) return;
  check(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyHostToDevice, stream_of(stream)));
}

bool is_capturing(void* stream) { return is_capturing(stream_of(stream)); }

void order_after(void* later, void* earlier) {
  if (later == earlier) return;
  cudaEvent_t event = nullptr;
  check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  cudaError_t status = cudaEventRecord(event, stream_of(earlier));
  if (status == cudaSuccess) status = cudaStreamWaitEvent(stream_of(later), event, 0);
  static_cast<void>(cudaEventDestroy(event));  // CUDA keeps it until it has completed
  check(status);
}

}  // namespace fastadam::cuda
