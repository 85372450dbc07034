// SPDX-License-Identifier: Apache-2.0
// Emulates XLA on a GPU. JAX calls these handlers on the CPU. They copy the buffers to memory of the fake device, which
// only work of that device may access, and call the handlers for CUDA devices with a stream of it. A buffer that comes
// again gets the same device memory again.
#include <cstdint>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

struct Copy {
  void* to;
  const void* from;
  int64_t bytes;
};

extern "C" {
void* fake_cuda_allocate(int64_t bytes, int device, int managed);
void fake_cuda_copy(const Copy* copies, int64_t count);
void* fake_cuda_stream(int device);
}

namespace {

using Buffers = std::vector<XLA_FFI_Buffer>;

XLA_FFI_Handler* handlers[2];
std::map<std::pair<void*, int64_t>, void*> device_memory;  // by host address and size
std::mutex mutex;

int64_t bytes_of(const XLA_FFI_Buffer& buffer) {
  auto bytes = static_cast<int64_t>(xla::ffi::ByteWidth(static_cast<xla::ffi::DataType>(buffer.dtype)));
  for (int64_t i = 0; i < buffer.rank; ++i) bytes *= buffer.dims[i];
  return bytes;
}

void* device_memory_of(const XLA_FFI_Buffer& buffer) {
  const int64_t bytes = bytes_of(buffer);
  if (bytes == 0) return nullptr;
  void*& memory = device_memory[{buffer.data, bytes}];
  if (memory == nullptr) memory = fake_cuda_allocate(bytes, 0, 0);
  return memory;
}

Buffers on_device(void** buffers, int64_t count) {
  Buffers copies;
  for (int64_t i = 0; i < count; ++i) {
    copies.push_back(*static_cast<XLA_FFI_Buffer*>(buffers[i]));
    copies.back().data = device_memory_of(copies.back());
  }
  return copies;
}

std::vector<void*> pointers(Buffers& buffers) {
  std::vector<void*> result;
  for (XLA_FFI_Buffer& buffer : buffers) result.push_back(&buffer);
  return result;
}

XLA_FFI_Error* give_stream(XLA_FFI_Stream_Get_Args* args) {
  static void* stream = fake_cuda_stream(0);
  args->stream = stream;
  return nullptr;
}

XLA_FFI_Error* call(XLA_FFI_Handler* handler, XLA_FFI_CallFrame* frame) {
  if (frame->extension_start != nullptr) return handler(frame);  // XLA asks for metadata
  const std::lock_guard lock(mutex);
  XLA_FFI_Api api = *frame->api;
  api.XLA_FFI_Stream_Get = give_stream;
  XLA_FFI_CallFrame device_frame = *frame;
  device_frame.api = &api;
  Buffers args = on_device(frame->args.args, frame->args.size);
  Buffers rets = on_device(frame->rets.rets, frame->rets.size);
  std::vector<void*> arg_pointers = pointers(args), ret_pointers = pointers(rets);
  device_frame.args.args = arg_pointers.data();
  device_frame.rets.rets = ret_pointers.data();
  std::vector<Copy> before, after;
  for (size_t i = 0; i < args.size(); ++i) {
    const auto* host = static_cast<const XLA_FFI_Buffer*>(frame->args.args[i]);
    if (args[i].data != nullptr) before.push_back({args[i].data, host->data, bytes_of(args[i])});
  }
  for (size_t i = 0; i < rets.size(); ++i) {
    const auto* host = static_cast<const XLA_FFI_Buffer*>(frame->rets.rets[i]);
    if (rets[i].data != nullptr) after.push_back({host->data, rets[i].data, bytes_of(rets[i])});
  }
  fake_cuda_copy(before.data(), static_cast<int64_t>(before.size()));
  XLA_FFI_Error* error = handler(&device_frame);
  fake_cuda_copy(after.data(), static_cast<int64_t>(after.size()));
  return error;
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

void fake_xla_set(int which, void* handler) { handlers[which] = reinterpret_cast<XLA_FFI_Handler*>(handler); }
XLA_FFI_Error* fake_xla_dense(XLA_FFI_CallFrame* frame) { return call(handlers[0], frame); }
XLA_FFI_Error* fake_xla_sparse(XLA_FFI_CallFrame* frame) { return call(handlers[1], frame); }

}  // extern "C"
#pragma GCC visibility pop
