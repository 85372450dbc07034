// SPDX-License-Identifier: Apache-2.0
// Devices, their memory and their streams, for the bindings. It includes no CUDA header: a `void* stream` is a
// cudaStream_t. Errors of the CUDA runtime are thrown as std::runtime_error.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "../core/dtypes.h"

namespace fastadam::cuda {

// The number of usable devices. If it is 0, `reason` says why.
FASTADAM_API int device_count(std::string& reason);

// What the kernels are compiled for, such as "80-real,90".
FASTADAM_API const char* architectures();

enum class Place { kHost, kDevice, kManaged };

struct Location {
  Place place;
  int device;
};

FASTADAM_API Location location_of(const void* data);

// Makes a device current for a scope, then restores the previous one.
class FASTADAM_API DeviceScope {
 public:
  explicit DeviceScope(int device);
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int before_ = 0;
  int device_;
};

FASTADAM_API void* allocate(int64_t bytes);
FASTADAM_API void release(void* data);

// These wait for the device.
FASTADAM_API void set_zero(void* data, int64_t bytes);
FASTADAM_API void copy_to_host(void* to, const void* from, int64_t bytes);
FASTADAM_API void overwrite(void* to, const void* from, int64_t bytes);

// These use a stream. copy_to_host() waits for it; copy_to_device() returns when pageable `from` has been staged.
FASTADAM_API void set_zero(void* data, int64_t bytes, void* stream);
FASTADAM_API void copy_to_host(void* to, const void* from, int64_t bytes, void* stream);
FASTADAM_API void copy_to_device(void* to, const void* from, int64_t bytes, void* stream);

FASTADAM_API bool is_capturing(void* stream);

// Work submitted to `later` from now on waits, on the device, for all work already submitted to `earlier`.
FASTADAM_API void order_after(void* later, void* earlier);

}  // namespace fastadam::cuda
