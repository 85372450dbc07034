// SPDX-License-Identifier: Apache-2.0
#include "state.h"

#include <set>
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

cudaStreamCaptureMode& capture_mode() {
  thread_local cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
  return mode;
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

std::string wait_detail() {
  int (*const is_locked)() = runtime().is_locked;
  return is_locked != nullptr && is_locked() != 0 ? "locked" : "";
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
  streams[stream] = {device, {}, {}};
  return stream;
}

cudaError_t Runtime::issue(Stream& stream, Work work) {
  if (stream.capture == nullptr) {
    // The two built-in streams wait for each other.
    const bool is_built_in = &stream == find_stream(nullptr) || &stream == find_stream(cudaStreamPerThread);
    WorkIds after = stream.last;
    if (is_built_in) {
      for (cudaStream_t other : {cudaStream_t{}, cudaStreamPerThread}) {
        const WorkIds& last = find_stream(other)->last;
        after.insert(after.end(), last.begin(), last.end());
      }
    }
    queue[++issued] = {std::move(work), std::move(after)};
    stream.last = {issued};
    return cudaSuccess;
  }
  if (!stream.capture->is_valid) return cudaErrorStreamCaptureInvalidated;
  stream.capture->work.push_back(std::move(work));
  return cudaSuccess;
}

cudaError_t Runtime::run_until(const WorkIds& ids) {
  std::set<uint64_t> needed;
  WorkIds open = ids;
  while (!open.empty()) {
    const uint64_t id = open.back();
    open.pop_back();
    const auto entry = queue.find(id);
    if (entry == queue.end() || !needed.insert(id).second) continue;
    open.insert(open.end(), entry->second.after.begin(), entry->second.after.end());
  }
  const fastadam::FlushDenormals flush;
  for (uint64_t id : needed) {
    const Work work = std::move(queue[id].work);
    queue.erase(id);
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

cudaError_t Runtime::run_queue() {
  while (!queue.empty()) static_cast<void>(run_until({queue.rbegin()->first}));
  for (void* pointer : std::exchange(dropped, {})) memory.free(pointer, memory.find(pointer).type);
  return fault;
}

bool Runtime::is_capturing() const {
  for (const auto& [handle, stream] : streams) {
    if (stream.capture != nullptr) return true;
  }
  return false;
}

// Captures are global, as PyTorch's are: they forbid it to every thread that has not relaxed its mode.
bool Runtime::may_allocate() const { return !is_capturing() || capture_mode() == cudaStreamCaptureModeRelaxed; }

cudaError_t Runtime::refuse_in_capture() {
  for (auto& [handle, stream] : streams) {
    if (stream.capture != nullptr) stream.capture->is_valid = false;
  }
  return cudaErrorStreamCaptureUnsupported;
}

}  // namespace fake_cuda
