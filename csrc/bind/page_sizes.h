// SPDX-License-Identifier: Apache-2.0
// Huge pages for the moments of a table once most of their small ones are resident.
//
// Python has the moments of a table in small pages, so that a step makes resident what its rows need and no more. Once
// half of that is resident, huge pages cost little memory, and rows at random are found faster: with small ones each is
// a miss of the TLB.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "../core/step_args.h"

namespace fastadam::bind {

// Of one table.
class PageSizes {
 public:
  // After a step that moved only rows of the table.
  void note(const TensorArgs& tensor) {
    const auto item = static_cast<uint64_t>(size_of(state_dtype(tensor.dtype)));
    const uint64_t bytes = static_cast<uint64_t>(tensor.size) * item;
    if (at_ != kNowhere) return next(tensor, bytes);
    touched_ +=
        static_cast<uint64_t>(tensor.rows->count) * (static_cast<uint64_t>(tensor.rows->width) * item / kSmall + 1);
    if (bytes < 2 * kHuge || touched_ < std::max(due_, bytes / kSmall / 2)) return;
    due_ = 2 * touched_;
    if (are_resident(tensor.m, bytes)) at_ = 0;
  }

 private:
  static constexpr uint64_t kSmall = 4096;
  static constexpr uint64_t kHuge = uint64_t{1} << 21;
  static constexpr uint64_t kNowhere = std::numeric_limits<uint64_t>::max();

#if defined(__linux__) && defined(MADV_HUGEPAGE)
  // Whether half of the pages are.
  static bool are_resident(const void* array, uint64_t bytes) {
    const auto page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
    const uintptr_t begin = reinterpret_cast<uintptr_t>(array) / page * page;
    const uint64_t size = reinterpret_cast<uintptr_t>(array) + bytes - begin;
    std::vector<unsigned char> pages((size + page - 1) / page);
    if (mincore(reinterpret_cast<void*>(begin), size, pages.data()) != 0) return false;
    const auto resident = std::count_if(pages.begin(), pages.end(), [](unsigned char p) { return (p & 1) != 0; });
    return static_cast<uint64_t>(resident) * 2 >= pages.size();
  }

  // One huge page of each moment, so that no step takes much longer than others. The kernel copies what is resident;
  // for an array of a file, or if the kernel is older than 6.1, it does nothing here.
  void next(const TensorArgs& tensor, uint64_t bytes) {
    constexpr int kCollapse = 25;  // MADV_COLLAPSE
    if (at_ >= bytes) return;
    for (void* array : {tensor.m, tensor.v, tensor.vhat}) {
      if (array == nullptr) continue;
      const uintptr_t first = (reinterpret_cast<uintptr_t>(array) + kHuge - 1) / kHuge * kHuge;
      const uintptr_t end = (reinterpret_cast<uintptr_t>(array) + bytes) / kHuge * kHuge;
      if (first + at_ >= end) continue;
      if (at_ == 0) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
      madvise(reinterpret_cast<void*>(first + at_), kHuge, kCollapse);
    }
    at_ += kHuge;
  }
#else
  static bool are_resident(const void*, uint64_t) { return false; }
  void next(const TensorArgs&, uint64_t) {}
#endif

  uint64_t touched_ = 0;    // pages, if each row is in pages of its own
  uint64_t due_ = 0;        // look again when so many are touched
  uint64_t at_ = kNowhere;  // bytes of each moment that are in huge pages
};

}  // namespace fastadam::bind
