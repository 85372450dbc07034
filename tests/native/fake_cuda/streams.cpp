// SPDX-License-Identifier: Apache-2.0
// The functions of cuda_runtime.h for streams, events and errors.
#include <algorithm>
#include <utility>

#include "state.h"

using namespace fake_cuda;

namespace {

template <class Run>
cudaError_t call_on_event(const char* name, cudaStream_t on, cudaEvent_t event, Run run) {
  return call(name, on, std::to_string(reinterpret_cast<uintptr_t>(event)), [&](Runtime& state, Stream& stream) {
    const auto entry = state.events.find(event);
    return entry == state.events.end() ? cudaErrorInvalidResourceHandle : run(state, stream, entry->second);
  });
}

}  // namespace

const char* cudaGetErrorString(cudaError_t error) {
  static const std::map<cudaError_t, const char*> texts{
      {cudaSuccess, "no error"},
      {cudaErrorInvalidValue, "invalid argument"},
      {cudaErrorMemoryAllocation, "out of memory"},
      {cudaErrorInvalidConfiguration, "invalid configuration argument"},
      {cudaErrorInvalidMemcpyDirection, "invalid copy direction for memcpy"},
      {cudaErrorInsufficientDriver, "CUDA driver version is insufficient for CUDA runtime version"},
      {cudaErrorNoDevice, "no CUDA-capable device is detected"},
      {cudaErrorInvalidDevice, "invalid device ordinal"},
      {cudaErrorNoKernelImageForDevice, "no kernel image is available for execution on the device"},
      {cudaErrorInvalidResourceHandle, "invalid resource handle"},
      {cudaErrorIllegalState, "the operation cannot be performed in the present state"},
      {cudaErrorNotReady, "device not ready"},
      {cudaErrorIllegalAddress, "an illegal memory access was encountered"},
      {cudaErrorLaunchFailure, "unspecified launch failure"},
      {cudaErrorNotSupported, "operation not supported"},
      {cudaErrorStreamCaptureUnsupported, "operation not permitted when stream is capturing"},
      {cudaErrorStreamCaptureInvalidated, "operation failed due to a previous error during capture"},
      {cudaErrorStreamCaptureMerge, "operation would result in a merge of separate capture sequences"},
      {cudaErrorStreamCaptureIsolation, "dependency created on uncaptured work in another stream"},
      {cudaErrorUnknown, "unknown error"}};
  const auto text = texts.find(error);
  return text == texts.end() ? "unrecognized error code" : text->second;
}

cudaError_t cudaGetLastError() {
  const std::lock_guard lock(runtime().mutex);
  const cudaError_t failure = log_call("cudaGetLastError", kNoStream, "");
  const cudaError_t error = std::exchange(last_error(), runtime().fault);
  return failure != cudaSuccess ? failure : error;
}

cudaError_t cudaPeekAtLastError() {
  const std::lock_guard lock(runtime().mutex);
  const cudaError_t failure = log_call("cudaPeekAtLastError", kNoStream, "");
  return failure != cudaSuccess ? failure : last_error();
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return call("cudaStreamCreateWithFlags", std::to_string(flags), [&](Runtime& state) {
    *stream = state.make_stream(current_device());
    return cudaSuccess;
  });
}

cudaError_t cudaStreamDestroy(cudaStream_t on) {
  return call("cudaStreamDestroy", on, "", [&](Runtime& state, const Stream& stream) {
    if (stream.device == kCallersDevice) return cudaErrorInvalidResourceHandle;
    state.streams.erase(on);
    return cudaSuccess;
  });
}

cudaError_t cudaStreamSynchronize(cudaStream_t on) {
  return call("cudaStreamSynchronize", on, wait_detail(), [](Runtime& state, const Stream& stream) {
    return stream.capture != nullptr ? state.refuse_in_capture() : state.run_until(stream.last);
  });
}

cudaError_t cudaStreamIsCapturing(cudaStream_t on, cudaStreamCaptureStatus* status) {
  return call("cudaStreamIsCapturing", on, "", [&](Runtime&, const Stream& stream) {
    *status = stream.capture == nullptr  ? cudaStreamCaptureStatusNone
              : stream.capture->is_valid ? cudaStreamCaptureStatusActive
                                         : cudaStreamCaptureStatusInvalidated;
    return cudaSuccess;
  });
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  return call("cudaThreadExchangeStreamCaptureMode", std::to_string(*mode), [&](Runtime&) {
    if (*mode > cudaStreamCaptureModeRelaxed) return cudaErrorInvalidValue;
    std::swap(*mode, capture_mode());
    return cudaSuccess;
  });
}

cudaError_t cudaStreamGetDevice(cudaStream_t on, int* device) {
  return call("cudaStreamGetDevice", on, "", [&](Runtime&, const Stream& stream) {
    *device = device_of(stream);
    return cudaSuccess;
  });
}

cudaError_t cudaStreamWaitEvent(cudaStream_t on, cudaEvent_t event, unsigned) {
  return call_on_event("cudaStreamWaitEvent", on, event, [&](Runtime& state, Stream& stream, const Event& awaited) {
    if (stream.capture == nullptr && awaited.capture == nullptr) {
      stream.last.insert(stream.last.end(), awaited.after.begin(), awaited.after.end());
      return cudaSuccess;
    }
    if (stream.capture == awaited.capture || (stream.capture != nullptr && !awaited.is_recorded)) return cudaSuccess;
    if (stream.capture == nullptr) {
      stream.capture = awaited.capture;
      return cudaSuccess;
    }
    static_cast<void>(state.refuse_in_capture());
    return awaited.capture == nullptr ? cudaErrorStreamCaptureIsolation : cudaErrorStreamCaptureMerge;
  });
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  return call("cudaEventCreateWithFlags", std::to_string(flags), [&](Runtime& state) {
    *event = reinterpret_cast<cudaEvent_t>(state.make_handle());
    state.events[*event].device = current_device();
    return cudaSuccess;
  });
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t on) {
  return call_on_event("cudaEventRecord", on, event, [](const Runtime&, const Stream& stream, Event& recorded) {
    if (recorded.device != device_of(stream)) return cudaErrorInvalidResourceHandle;
    recorded.is_recorded = true;
    recorded.after = stream.last;
    recorded.capture = stream.capture;
    return cudaSuccess;
  });
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
  return call("cudaEventQuery", std::to_string(reinterpret_cast<uintptr_t>(event)), [&](Runtime& state) {
    if (state.is_capturing()) return state.refuse_in_capture();
    const auto entry = state.events.find(event);
    if (entry == state.events.end()) return cudaErrorInvalidResourceHandle;
    const WorkIds& after = entry->second.after;
    const bool has_happened =
        std::none_of(after.begin(), after.end(), [&](uint64_t id) { return state.queue.count(id) > 0; });
    return has_happened ? cudaSuccess : cudaErrorNotReady;
  });
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  return call("cudaEventDestroy", std::to_string(reinterpret_cast<uintptr_t>(event)), [&](Runtime& state) {
    return state.events.erase(event) == 0 ? cudaErrorInvalidResourceHandle : cudaSuccess;
  });
}
