// SPDX-License-Identifier: Apache-2.0
// Devices, their memory and their streams, for the binding. Free of CUDA headers: a stream is a cudaStream_t. Errors of
// the CUDA runtime are thrown as std::runtime_error.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace fastadam::cuda {

// How many devices can be used, and in `reason` why there is none.
int device_count(std::string& reason);

enum class Place { kHost, kDevice, kManaged };

struct Location {
  Place place;
  int device;
};

Location location_of(const void* data);

// Makes a device current, and afterwards the one that was.
class DeviceScope {
 public:
  explicit DeviceScope(int device);
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int before_ = 0;
  int device_;
};

void* allocate(int64_t bytes);
void release(void* data);
void set_zero(void* data, int64_t bytes);  // waits for the device, and so do these
void copy_to_host(void* to, const void* from, int64_t bytes);
void overwrite(void* to, const void* from, int64_t bytes);

void copy_to_device(void* to, const void* from, int64_t bytes, void* stream);

bool is_capturing(void* stream);

// Work that comes on `later` waits, on the device, for what is on `earlier` now.
void order_after(void* later, void* earlier);

}  // namespace fastadam::cuda
