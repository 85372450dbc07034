// SPDX-License-Identifier: Apache-2.0
// What the fake runtime allocates. Memory of a device faults on the host except while work of the device runs; so do,
// always, memory that was freed and the page behind each allocation. Addresses are never used twice.
#pragma once

#include <cuda_runtime.h>

#include <map>

namespace fake_cuda {

constexpr int kMostDevices = 8;

struct Allocation {
  char* begin;
  size_t bytes;
  cudaMemoryType type;
  int device;
};

class Memory {
 public:
  // Aligned to 256 bytes, and full of garbage. Null where there is no room.
  void* allocate(size_t bytes, cudaMemoryType type, int device);
  bool free(void* begin, cudaMemoryType type);

  // The allocation with this byte; one of no bytes and type Unregistered where there is none.
  Allocation find(const void* pointer) const;
  bool holds(const void* pointer, size_t bytes) const;

  // Lets the CPU at the memory of a set of devices (a bit for each), and at that of no others.
  void open_only(unsigned devices);
  unsigned device_bit(const void* pointer) const;

 private:
  static constexpr size_t kArenaBytes = size_t{64} << 30;
  struct Arena {
    char* begin = nullptr;
    size_t used = 0;
  };

  Arena arenas_[kMostDevices + 1];  // the last is for what the host may use
  std::map<const char*, Allocation> live_;
  unsigned open_ = 0;
};

}  // namespace fake_cuda
