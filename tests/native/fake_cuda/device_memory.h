// SPDX-License-Identifier: Apache-2.0
// The memory that the fake runtime allocates. The host can access device memory only while work of that device runs.
// Memory that was freed and the page behind each allocation always fault. Addresses are never used twice.
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
  // Returns memory aligned to 256 bytes and filled with garbage, or null if there is not enough room.
  void* allocate(size_t bytes, cudaMemoryType type, int device);
  bool free(void* begin, cudaMemoryType type);

  // The allocation that contains this byte. If there is none: one of 0 bytes and type Unregistered.
  Allocation find(const void* pointer) const;
  bool holds(const void* pointer, size_t bytes) const;

  // Makes the memory of a set of devices (one bit each) accessible, and the memory of all others inaccessible.
  void open_only(unsigned devices);
  unsigned device_bit(const void* pointer) const;

 private:
  static constexpr size_t kArenaBytes = size_t{64} << 30;
  struct Arena {
    char* begin = nullptr;
    size_t used = 0;
  };

  Arena arenas_[kMostDevices + 1];  // the last one is for memory that the host may access
  std::map<const char*, Allocation> live_;
  unsigned open_ = 0;
};

}  // namespace fake_cuda
