// SPDX-License-Identifier: Apache-2.0
#include "state.h"

#include <utility>

#include "../../../csrc/core/float_mode.h"

namespace fake_cuda {

Runtime& runtime() {
  static auto* const instance = new Runtime;  // never destroyed: it may be called at exit
  return *instance;
}

int& current_device() {
  thread_local int device = 0;
  return device;
}

cudaError_t& last_error() {
  thread_local cudaError_t error = cudaSuccess;
  return error;
}

int device_of(const Stream& stream) { return stream.device == kCallersDevice ? current_device() : stream.device; }

cudaError_t remember(cudaError_t error) {
  if (error != cudaSuccess) last_error() = error;
  return error;
}

cudaError_t log_call(const char* name, cudaStream_t stream, const std::string& detail) {
  Runtime& state = runtime();
  const Stream* known_stream = state.find_stream(stream);
  const int device = known_stream == nullptr ? current_device() : device_of(*known_stream);
  const auto handle = std::to_string(reinterpret_cast<uintptr_t>(stream));
  state.log += std::string(name) + " " + std::to_string(device) + " " + (stream == kNoStream ? "-" : handle) + " " +
               (detail.empty() ? "-" : detail) + "\n";
  const auto failure = state.failures.extract(name);
  return failure.empty() ? cudaSuccess : failure.mapped();
}

cudaError_t begin_call(const char* name, cudaStream_t stream, const std::string& detail) {
  const Runtime& state = runtime();
  const cudaError_t failure = log_call(name, stream, detail);
  if (failure != cudaSuccess) return failure;
  if (state.device_error != cudaSuccess) return state.device_error;
  return state.device_count == 0 ? cudaErrorNoDevice : state.fault;
}

Stream* Runtime::find_stream(cudaStream_t stream) {
  const auto entry = streams.find(stream == cudaStreamLegacy ? nullptr : stream);
  return entry == streams.end() ? nullptr : &entry->second;
}

cudaStream_t Runtime::make_stream(int device) {
  const auto stream = reinterpret_cast<cudaStream_t>(make_handle());
  streams[stream] = {device, {}};
  return stream;
}

cudaError_t Runtime::issue(Stream& stream, Work work) {
  if (stream.capture == nullptr) {
    queue.push_back(std::move(work));
    ++issued;
    return cudaSuccess;
  }
  if (!stream.capture->is_valid) return cudaErrorStreamCaptureInvalidated;
  stream.capture->work.push_back(std::move(work));
  return cudaSuccess;
}

cudaError_t Runtime::run_queue() {
  const fastadam::FlushDenormals flush;
  while (!queue.empty()) {
    const Work work = std::move(queue.front());
    queue.pop_front();
    if (fault != cudaSuccess) continue;
    memory.open_only(work.devices);
    try {
      work.run();
    } catch (...) {
      fault = cudaErrorLaunchFailure;
    }
  }
  memory.open_only(0);
  return fault;
}

bool Runtime::is_capturing() const {
  for (const auto& [handle, stream] : streams) {
    if (stream.capture != nullptr) return true;
  }
  return false;
}

cudaError_t Runtime::refuse_in_capture() {
  for (auto& [handle, stream] : streams) {
    if (stream.capture != nullptr) stream.capture->is_valid = false;
  }
  return cudaErrorStreamCaptureUnsupported;
}

}  // namespace fake_cuda
