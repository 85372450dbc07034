// SPDX-License-Identifier: Apache-2.0
#include "device_memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <new>
#include <stdexcept>

namespace fake_cuda {
namespace {

constexpr size_t kAlignment = 256;
constexpr int kGarbage = 0xcd;  // not zero, not a plausible index, and not a NaN, which max(NaN, x) would drop

size_t round_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

size_t page_bytes() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

// Maps an empty file, so that an access raises SIGBUS even if mprotect allows it.
char* map_nothing(char* at, size_t bytes) {
  static const int empty_file = memfd_create("fake_cuda", MFD_CLOEXEC);
  const int flags = MAP_SHARED | MAP_NORESERVE | (at == nullptr ? 0 : MAP_FIXED);
  void* memory = mmap(at, bytes, PROT_NONE, flags, empty_file, 0);
  return memory == MAP_FAILED ? nullptr : static_cast<char*>(memory);
}

}  // namespace

void* Memory::allocate(size_t bytes, cudaMemoryType type, int device) {
  Arena& arena = arenas_[type == cudaMemoryTypeDevice ? device : kMostDevices];
  if (arena.begin == nullptr) arena.begin = map_nothing(nullptr, kArenaBytes);
  const size_t room = kArenaBytes - arena.used;
  const size_t mapped = round_up(bytes, page_bytes());
  if (arena.begin == nullptr || bytes == 0 || bytes > room || mapped + page_bytes() > room) return nullptr;
  char* pages = arena.begin + arena.used;
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
  if (mmap(pages, mapped, PROT_READ | PROT_WRITE, flags, -1, 0) == MAP_FAILED) return nullptr;
  arena.used += mapped + page_bytes();
  char* begin = pages + mapped - round_up(bytes, kAlignment);
  std::memset(begin, kGarbage, bytes);
  if (type == cudaMemoryTypeDevice) mprotect(pages, mapped, PROT_NONE);
  live_[begin] = {begin, bytes, type, device};
  return begin;
}

bool Memory::free(void* begin, cudaMemoryType type) {
  const Allocation allocation = find(begin);
  if (begin == nullptr || allocation.begin != begin || allocation.type != type) return false;
  char* end = allocation.begin + round_up(allocation.bytes, kAlignment);
  const size_t mapped = round_up(allocation.bytes, page_bytes());
  if (map_nothing(end - mapped, mapped) == nullptr) throw std::bad_alloc();
  live_.erase(allocation.begin);
  return true;
}

Allocation Memory::find(const void* pointer) const {
  const auto* byte = static_cast<const char*>(pointer);
  auto entry = live_.upper_bound(byte);
  if (entry != live_.begin()) {
    --entry;
    if (byte < entry->second.begin + entry->second.bytes) return entry->second;
  }
  return {nullptr, 0, cudaMemoryTypeUnregistered, -2};
}

bool Memory::holds(const void* pointer, size_t bytes) const {
  const Allocation allocation = find(pointer);
  if (allocation.type == cudaMemoryTypeUnregistered) return false;
  return bytes <= static_cast<size_t>(allocation.begin + allocation.bytes - static_cast<const char*>(pointer));
}

void Memory::open_only(unsigned devices) {
  for (int i = 0; i < kMostDevices; ++i) {
    const unsigned bit = 1U << i;
    if (((devices ^ open_) & bit) == 0 || arenas_[i].used == 0) continue;
    const int protection = (devices & bit) != 0 ? PROT_READ | PROT_WRITE : PROT_NONE;
    const auto first = live_.lower_bound(arenas_[i].begin);
    char* end = arenas_[i].begin + arenas_[i].used;
    if (first == live_.end() || first->first >= end) continue;
    const auto before = static_cast<size_t>(first->first - arenas_[i].begin) / page_bytes() * page_bytes();
    char* begin = arenas_[i].begin + before;  // memory before it that was freed stays inaccessible
    if (mprotect(begin, static_cast<size_t>(end - begin), protection) != 0) throw std::runtime_error("mprotect");
  }
  open_ = devices;
}

unsigned Memory::device_bit(const void* pointer) const {
  const Allocation allocation = find(pointer);
  return allocation.type == cudaMemoryTypeDevice ? 1U << allocation.device : 0;
}

}  // namespace fake_cuda
