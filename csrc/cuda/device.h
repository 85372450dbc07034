// SPDX-License-Identifier: Apache-2.0
// Devices, their memory and their streams, for the binding. Free of CUDA headers: a stream is a cudaStream_t. Errors of
// the CUDA runtime are thrown as std::runtime_error.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "../core/dtypes.h"

namespace fastadam::cuda {

// How many devices can be used, and in `reason` why there is none.
FASTADAM_API int device_count(std::string& reason);

enum class Place { kHost, kDevice, kManaged };

struct Location {
  Place place;
  int device;
};

FASTADAM_API Location location_of(const void* data);

// Makes a device current, and afterwards the one that was.
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
FASTADAM_API void set_zero(void* data, int64_t bytes);  // waits for the device, and so do these
FASTADAM_API void copy_to_host(void* to, const void* from, int64_t bytes);
FASTADAM_API void overwrite(void* to, const void* from, int64_t bytes);

// On a stream. What is read there is waited for, what is written comes from pageable memory, which is staged.
FASTADAM_API void set_zero(void* data, int64_t bytes, void* stream);
FASTADAM_API void copy_to_host(void* to, const void* from, int64_t bytes, void* stream);
FASTADAM_API void copy_to_device(void* to, const void* from, int64_t bytes, void* stream);

FASTADAM_API bool is_capturing(void* stream);

// Work that comes on `later` waits, on the device, for what is on `earlier` now.
FASTADAM_API void order_after(void* later, void* earlier);

}  // namespace fastadam::cuda
