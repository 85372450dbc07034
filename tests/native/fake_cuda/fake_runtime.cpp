// SPDX-License-Identifier: Apache-2.0
// The functions of cuda_runtime.h for devices, memory and kernels.
#include <cstring>
#include <stdexcept>
#include <utility>

#include "grid.h"
#include "state.h"

using namespace fake_cuda;

namespace {

constexpr size_t kStagedAtOnce = 65536;  // an asynchronous copy of more pageable memory may wait for its stream

std::string copy_detail(size_t bytes, cudaMemcpyKind kind, bool waits) {
  static const char* const names[] = {"HostToHost", "HostToDevice", "DeviceToHost", "DeviceToDevice", "Default"};
  return std::to_string(bytes) + " " + (kind <= cudaMemcpyDefault ? names[kind] : "?") +
         (waits ? " " + wait_detail() : "");
}

bool may_copy(const Memory& memory, void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  const cudaMemoryType source = memory.find(from).type;
  const cudaMemoryType target = memory.find(to).type;
  if (source != cudaMemoryTypeUnregistered && !memory.holds(from, bytes)) return false;
  if (target != cudaMemoryTypeUnregistered && !memory.holds(to, bytes)) return false;
  if (kind == cudaMemcpyDefault) return true;
  const bool from_host = kind == cudaMemcpyHostToHost || kind == cudaMemcpyHostToDevice;
  const bool to_host = kind == cudaMemcpyHostToHost || kind == cudaMemcpyDeviceToHost;
  return source != (from_host ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered) &&
         target != (to_host ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered);
}

// Pageable memory is read at once, although the copy comes later, and a copy to it waits for its stream. In a capture
// neither holds: the graph keeps the pointer.
cudaError_t copy(Runtime& state, Stream& stream, void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  if (kind > cudaMemcpyDefault) return cudaErrorInvalidMemcpyDirection;
  if (bytes == 0) return cudaSuccess;
  if (!may_copy(state.memory, to, from, bytes, kind)) return cudaErrorInvalidValue;
  const unsigned devices = state.memory.device_bit(to) | state.memory.device_bit(from);
  const bool to_pageable = state.memory.find(to).type == cudaMemoryTypeUnregistered;
  const bool from_pageable = state.memory.find(from).type == cudaMemoryTypeUnregistered;
  if (from_pageable && stream.capture == nullptr) {
    const auto* bytes_now = static_cast<const char*>(from);
    const std::vector<char> staged(bytes_now, bytes_now + bytes);
    state.issue(stream, {devices, [=] { std::memcpy(to, staged.data(), bytes); }});
  } else {
    const cudaError_t error = state.issue(stream, {devices, [=] { std::memmove(to, from, bytes); }});
    if (error != cudaSuccess) return error;
  }
  return to_pageable && stream.capture == nullptr ? state.run_until(stream.last) : cudaSuccess;
}

cudaError_t allocate(Runtime& state, void** pointer, size_t bytes, cudaMemoryType type) {
  if (!state.may_allocate()) return state.refuse_in_capture();
  *pointer = bytes == 0 ? nullptr : state.memory.allocate(bytes, type, current_device());
  return bytes > 0 && *pointer == nullptr ? cudaErrorMemoryAllocation : cudaSuccess;
}

cudaError_t free_memory(Runtime& state, void* pointer, cudaMemoryType type) {
  if (pointer == nullptr) return cudaSuccess;
  if (!state.may_allocate()) return state.refuse_in_capture();
  const cudaError_t error = state.run_queue();
  if (error != cudaSuccess) return error;
  const bool is_managed = type == cudaMemoryTypeDevice && state.memory.find(pointer).type == cudaMemoryTypeManaged;
  return state.memory.free(pointer, is_managed ? cudaMemoryTypeManaged : type) ? cudaSuccess : cudaErrorInvalidValue;
}

// For a kernel, unlike for a copy, the device of the stream must be the current device of the caller.
cudaError_t issue_kernel(Runtime& state, Stream& stream, std::function<void()> run) {
  const int device = device_of(stream);
  if (device != current_device()) return cudaErrorInvalidResourceHandle;
  return state.issue(stream, {1U << device, std::move(run)});
}

}  // namespace

cudaError_t fake_cuda::launch(const cudaLaunchConfig_t& config, std::function<void()> thread) {
  const dim3 grid = config.gridDim;
  const dim3 block = config.blockDim;
  const auto blocks = std::to_string(uint64_t{grid.x} * grid.y * grid.z);
  return call("cudaLaunchKernelEx", config.stream, blocks, [&](Runtime& state, Stream& stream) {
    if (!is_launchable(grid, block)) return cudaErrorInvalidConfiguration;
    return issue_kernel(state, stream, [=] {
      if (!run_grid(grid, block, thread)) throw std::runtime_error("a thread threw");
    });
  });
}

cudaError_t fake_cuda::submit(const char* name, cudaStream_t on, int64_t items, std::function<void()> run) {
  return call(name, on, std::to_string(items),
              [&](Runtime& state, Stream& stream) { return issue_kernel(state, stream, run); });
}

cudaError_t cudaGetDeviceCount(int* count) {
  const std::lock_guard lock(runtime().mutex);
  *count = 0;
  const cudaError_t failure = log_call("cudaGetDeviceCount", kNoStream, "");
  const cudaError_t error = failure != cudaSuccess ? failure : runtime().device_error;
  if (error == cudaSuccess) *count = runtime().device_count;
  return remember(error);
}

cudaError_t cudaGetDevice(int* device) {
  return call("cudaGetDevice", "", [&](Runtime&) {
    *device = current_device();
    return cudaSuccess;
  });
}

cudaError_t cudaSetDevice(int device) {
  return call("cudaSetDevice", std::to_string(device), [&](const Runtime& state) {
    if (device < 0 || device >= state.device_count) return cudaErrorInvalidDevice;
    current_device() = device;
    return cudaSuccess;
  });
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  return call("cudaDeviceGetAttribute", std::to_string(attribute), [&](const Runtime& state) {
    if (device < 0 || device >= state.device_count) return cudaErrorInvalidDevice;
    if (attribute != cudaDevAttrMultiProcessorCount) return cudaErrorInvalidValue;
    *value = 4;
    return cudaSuccess;
  });
}

cudaError_t cudaDeviceSynchronize() {
  return call("cudaDeviceSynchronize", wait_detail(),
              [](Runtime& state) { return state.is_capturing() ? state.refuse_in_capture() : state.run_queue(); });
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  return call("cudaPointerGetAttributes", "", [&](const Runtime& state) {
    const Allocation allocation = state.memory.find(pointer);
    void* same = allocation.type == cudaMemoryTypeUnregistered ? nullptr : const_cast<void*>(pointer);
    *attributes = {allocation.type, allocation.device, same, allocation.type == cudaMemoryTypeDevice ? nullptr : same};
    return cudaSuccess;
  });
}

cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  return call("cudaMalloc", std::to_string(bytes),
              [&](Runtime& state) { return allocate(state, pointer, bytes, cudaMemoryTypeDevice); });
}

cudaError_t cudaFree(void* pointer) {
  return call("cudaFree", "", [&](Runtime& state) { return free_memory(state, pointer, cudaMemoryTypeDevice); });
}

cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned) {
  return call("cudaHostAlloc", std::to_string(bytes),
              [&](Runtime& state) { return allocate(state, pointer, bytes, cudaMemoryTypeHost); });
}

cudaError_t cudaFreeHost(void* pointer) {
  return call("cudaFreeHost", "", [&](Runtime& state) { return free_memory(state, pointer, cudaMemoryTypeHost); });
}

cudaError_t cudaHostGetDevicePointer(void** on_device, void* host, unsigned) {
  return call("cudaHostGetDevicePointer", "", [&](const Runtime& state) {
    if (state.memory.find(host).type != cudaMemoryTypeHost) return cudaErrorInvalidValue;
    *on_device = host;
    return cudaSuccess;
  });
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  return call("cudaMemcpy", nullptr, copy_detail(bytes, kind, true), [&](Runtime& state, Stream& stream) {
    if (state.is_capturing()) return state.refuse_in_capture();
    const bool is_staged = state.memory.find(from).type == cudaMemoryTypeUnregistered;
    cudaError_t error = state.run_until(stream.last);
    if (error == cudaSuccess) error = copy(state, stream, to, from, bytes, kind);
    return error == cudaSuccess && !is_staged ? state.run_until(stream.last) : error;
  });
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t on) {
  return call("cudaMemcpyAsync", on, copy_detail(bytes, kind, bytes > kStagedAtOnce || kind == cudaMemcpyDeviceToHost),
              [&](Runtime& state, Stream& stream) { return copy(state, stream, to, from, bytes, kind); });
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t on) {
  return call("cudaMemsetAsync", on, std::to_string(bytes), [&](Runtime& state, Stream& stream) {
    if (bytes == 0) return cudaSuccess;
    if (!state.memory.holds(to, bytes)) return cudaErrorInvalidValue;
    return state.issue(stream, {state.memory.device_bit(to), [=] { std::memset(to, value, bytes); }});
  });
}
