// SPDX-License-Identifier: Apache-2.0
// What tests call through ctypes in place of drivers and frameworks, and to inject faults. None of it is logged.
#include <algorithm>
#include <cstring>

#include "state.h"

using namespace fake_cuda;

namespace {

void end_captures() {
  for (auto& [handle, stream] : runtime().streams) stream.capture = nullptr;
  for (auto& [handle, event] : runtime().events) event.capture = nullptr;
}

struct Copy {
  void* to;
  const void* from;
  int64_t bytes;
};

// Copies between host and device memory at once.
void copy_now(const Copy* copies, int64_t count) {
  Runtime& state = runtime();
  unsigned devices = 0;
  for (int64_t i = 0; i < count; ++i) {
    devices |= state.memory.device_bit(copies[i].to) | state.memory.device_bit(copies[i].from);
  }
  state.memory.open_only(devices);
  for (int64_t i = 0; i < count; ++i) {
    std::memcpy(copies[i].to, copies[i].from, static_cast<size_t>(copies[i].bytes));
  }
  state.memory.open_only(0);
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// Runs the queue and resets everything except memory, streams and events.
void fake_cuda_reset() {
  Runtime& state = runtime();
  const std::lock_guard lock(state.mutex);
  state.run_queue();
  end_captures();
  state.graphs.clear();
  state.device_count = 1;
  state.device_error = state.fault = last_error() = cudaSuccess;
  state.failures.clear();
  state.is_locked = nullptr;
  state.log.clear();
  current_device() = 0;
}

// If `error` is not 0, every call returns it, including cudaGetDeviceCount.
void fake_cuda_set_devices(int count, int error) {
  const std::lock_guard lock(runtime().mutex);
  runtime().device_count = std::min(count, kMostDevices);
  runtime().device_error = static_cast<cudaError_t>(error);
}

// The next call of the function fails and does nothing else.
void fake_cuda_fail(const char* function, int error) {
  const std::lock_guard lock(runtime().mutex);
  runtime().failures[function] = static_cast<cudaError_t>(error);
}

// The log has a line for each call: its name, device, stream or -, and details or -. Stores as much of it as fits,
// without a terminating zero, and returns its full length.
int64_t fake_cuda_log(char* out, int64_t size) {
  const std::lock_guard lock(runtime().mutex);
  const std::string& log = runtime().log;
  if (size > 0) std::memcpy(out, log.data(), std::min(static_cast<size_t>(size), log.size()));
  return static_cast<int64_t>(log.size());
}

void fake_cuda_clear_log() {
  const std::lock_guard lock(runtime().mutex);
  runtime().log.clear();
}

void* fake_cuda_allocate(int64_t bytes, int device, int managed) {
  const std::lock_guard lock(runtime().mutex);
  if (bytes < 0 || device < 0 || device >= kMostDevices) return nullptr;
  const cudaMemoryType type = managed != 0 ? cudaMemoryTypeManaged : cudaMemoryTypeDevice;
  return runtime().memory.allocate(static_cast<size_t>(bytes), type, device);
}

// Waits for nothing, as where a library has a pool of memory: queued work may go on using it.
void fake_cuda_free(void* pointer) {
  const std::lock_guard lock(runtime().mutex);
  runtime().dropped.push_back(pointer);
  if (runtime().queue.empty()) runtime().run_queue();
}

// Fills new memory, which no queued work uses.
void fake_cuda_write(void* device_to, const void* host_from, int64_t bytes) {
  const std::lock_guard lock(runtime().mutex);
  const Copy copy{device_to, host_from, bytes};
  copy_now(&copy, 1);
}

void fake_cuda_copy(const Copy* copies, int64_t count) {
  const std::lock_guard lock(runtime().mutex);
  runtime().run_queue();
  copy_now(copies, count);
}

void fake_cuda_read(void* host_to, const void* device_from, int64_t bytes) {
  const Copy copy{host_to, device_from, bytes};
  fake_cuda_copy(&copy, 1);
}

// Calls that wait ask it: see Runtime::is_locked. Null: they do not.
void fake_cuda_watch_waits(int (*is_locked)()) {
  const std::lock_guard lock(runtime().mutex);
  runtime().is_locked = is_locked;
}

void* fake_cuda_stream(int device) {
  const std::lock_guard lock(runtime().mutex);
  return runtime().make_stream(device);
}

// What is issued to the stream from now on waits for nothing that was issued to it before.
void fake_cuda_replace_stream(void* on) {
  const std::lock_guard lock(runtime().mutex);
  runtime().find_stream(static_cast<cudaStream_t>(on))->last = {};
}

int fake_cuda_begin_capture(void* on) {
  Runtime& state = runtime();
  const std::lock_guard lock(state.mutex);
  Stream* stream = state.find_stream(static_cast<cudaStream_t>(on));
  if (stream == nullptr) return cudaErrorInvalidResourceHandle;
  if (stream == state.find_stream(nullptr)) return cudaErrorStreamCaptureUnsupported;
  if (stream->capture != nullptr) return cudaErrorIllegalState;
  stream->capture = std::make_shared<Capture>();
  stream->capture->origin = static_cast<cudaStream_t>(on);
  return cudaSuccess;
}

// Returns the number of the new graph, or -1 if the capture was invalidated or began on another stream.
int64_t fake_cuda_end_capture(void* on) {
  Runtime& state = runtime();
  const std::lock_guard lock(state.mutex);
  Stream* origin = state.find_stream(static_cast<cudaStream_t>(on));
  if (origin == nullptr || origin->capture == nullptr || origin->capture->origin != on) return -1;
  const std::shared_ptr<Capture> capture = origin->capture;
  for (auto& [handle, stream] : state.streams) {
    if (stream.capture == capture) stream.capture = nullptr;
  }
  for (auto& [handle, event] : state.events) {
    if (event.capture == capture) event.capture = nullptr;
  }
  if (!capture->is_valid) return -1;
  state.graphs.push_back(std::move(capture->work));
  return static_cast<int64_t>(state.graphs.size()) - 1;
}

int fake_cuda_launch_graph(int64_t id, void* on) {
  Runtime& state = runtime();
  const std::lock_guard lock(state.mutex);
  Stream* stream = state.find_stream(static_cast<cudaStream_t>(on));
  if (stream == nullptr) return cudaErrorInvalidResourceHandle;
  if (id < 0 || id >= static_cast<int64_t>(state.graphs.size())) return cudaErrorInvalidValue;
  for (const Work& work : state.graphs[static_cast<size_t>(id)]) {
    const cudaError_t error = state.issue(*stream, work);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

void fake_cuda_flush() {
  const std::lock_guard lock(runtime().mutex);
  runtime().run_queue();
}

int64_t fake_cuda_queued() {
  const std::lock_guard lock(runtime().mutex);
  return static_cast<int64_t>(runtime().queue.size());
}

}  // extern "C"
#pragma GCC visibility pop
