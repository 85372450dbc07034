// SPDX-License-Identifier: Apache-2.0
// The part of the DLPack ABI that is used here, with the names of its header
// (https://dmlc.github.io/dlpack/latest/c_api.html).
#pragma once

#include <cstdint>

namespace fastadam::dlpack {

constexpr int32_t kDLCPU = 1;
constexpr int32_t kDLCUDA = 2;
constexpr int32_t kDLCUDAManaged = 13;
constexpr uint8_t kDLInt = 0;
constexpr uint8_t kDLUInt = 1;
constexpr uint8_t kDLFloat = 2;
constexpr uint8_t kDLBfloat = 4;
constexpr uint64_t kReadOnlyFlag = 1;
constexpr uint32_t kMajorVersion = 1;

struct DLDevice {
  int32_t device_type;
  int32_t device_id;
};

struct DLDataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; null: C-contiguous
  uint64_t byte_offset;
};

struct DLManagedTensor {
  DLTensor dl_tensor;
  void* manager_ctx;
  void (*deleter)(DLManagedTensor*);
};

struct DLManagedTensorVersioned {
  struct {
    uint32_t major;
    uint32_t minor;
  } version;
  void* manager_ctx;
  void (*deleter)(DLManagedTensorVersioned*);
  uint64_t flags;
  DLTensor dl_tensor;
};

// The C functions of a library's array type. The type has it in the capsule `__dlpack_c_exchange_api__`, and it lives
// as long as the process.
struct ExchangeApi {
  struct {
    uint32_t major;
    uint32_t minor;
  } version;
  const ExchangeApi* previous;
  void* managed_tensor_allocator;
  int (*managed_tensor_from_object)(void* object, DLManagedTensorVersioned** out);  // waits for no device
  void* managed_tensor_to_object;
  int (*tensor_from_object)(void* object, DLTensor* out);  // may be null; shape and strides belong to the object
  void* current_work_stream;
};

}  // namespace fastadam::dlpack
