// SPDX-License-Identifier: Apache-2.0
// A pass over a table in a memory map of a file: pages that only the pass made resident are given back, so that a table
// larger than memory can be passed over. Their values are in the file.
#pragma once

#if defined(__linux__)
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cinttypes>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <limits>
#include <new>
#include <string>
#include <vector>

namespace fastadam::bind {

// The arrays of a pass that are shared memory maps of files. The destructor gives back what is left.
class FilePages {
 public:
  static constexpr uint64_t kPiece = uint64_t{1} << 22;  // bytes of an array that are passed over at a time

  FilePages() = default;
  FilePages(const FilePages&) = delete;
  FilePages& operator=(const FilePages&) = delete;
  ~FilePages() {
    for (Mapped& array : arrays_) give_back(array, std::numeric_limits<uintptr_t>::max());
  }

  // Arrays of less than a few pieces are left alone.
  void add([[maybe_unused]] const void* array, [[maybe_unused]] uint64_t bytes) {
#if defined(__linux__)
    const auto begin = reinterpret_cast<uintptr_t>(array);
    if (array != nullptr && bytes >= 2 * kPiece && is_of_file(begin, begin + bytes)) {
      arrays_.push_back({begin, begin + bytes, begin, {}});
    }
#endif
  }

  bool empty() const { return arrays_.empty(); }

  // How many rows of so many bytes are a piece.
  static int64_t rows_of_piece(int64_t row_bytes) {
    return std::max<int64_t>(static_cast<int64_t>(kPiece) / std::max<int64_t>(row_bytes, 1), 1);
  }

  // Before the pass reads rows [begin, end) of `count` in each array. They are asked for at once, which is fast even
  // where steps expect random rows.
  void enter([[maybe_unused]] int64_t begin, [[maybe_unused]] int64_t end, [[maybe_unused]] int64_t count) {
#if defined(__linux__)
    for (Mapped& array : arrays_) {
      const uint64_t row = (array.end - array.begin) / static_cast<uint64_t>(count);
      const uintptr_t first = std::max(array.begin + static_cast<uint64_t>(begin) * row, array.noted);
      array.noted = std::min(array.begin + static_cast<uint64_t>(end) * row + kAround, array.end);
      if (first >= array.noted) continue;
      try {
        note_absent(array.absent, first, array.noted);
      } catch (const std::bad_alloc&) {  // what is not noted stays resident; the pass must not end half way
      }
      const uintptr_t page = first / page_size() * page_size();
      if (!array.absent.empty()) madvise(reinterpret_cast<void*>(page), array.noted - page, MADV_WILLNEED);
    }
#endif
  }

  // After it.
  void leave(int64_t end, int64_t count) {
    for (Mapped& array : arrays_) {
      const uint64_t row = (array.end - array.begin) / static_cast<uint64_t>(count);
      give_back(array, array.begin + static_cast<uint64_t>(end) * row);
    }
  }

 private:
  static constexpr uintptr_t kAround = uintptr_t{1} << 16;  // the kernel maps so much around a page that is touched

  // Of whole pages.
  struct Span {
    uintptr_t begin;
    uintptr_t end;
  };

  struct Mapped {
    uintptr_t begin;
    uintptr_t end;
    uintptr_t noted;           // `absent` is known up to here
    std::vector<Span> absent;  // not mapped by this process before the pass, and not given back yet; in order
  };

  std::vector<Mapped> arrays_;

#if defined(__linux__)
  static uintptr_t page_size() { return static_cast<uintptr_t>(sysconf(_SC_PAGESIZE)); }

  // The pages that lie before an address.
  static void give_back(Mapped& array, uintptr_t before) {
    before = before / page_size() * page_size();
    auto left = array.absent.begin();
    for (; left != array.absent.end() && left->begin < before; ++left) {
      const uintptr_t end = std::min(left->end, before);
      madvise(reinterpret_cast<void*>(left->begin), end - left->begin, MADV_DONTNEED);
      if (end < left->end) {
        left->begin = end;
        break;
      }
    }
    array.absent.erase(array.absent.begin(), left);
  }

  // Whether what is written to this memory goes to an ordinary file. Private maps have values that no file has; the
  // memory of a driver is not ours to give back.
  static bool is_of_file(uintptr_t at, uintptr_t stop) {
    std::ifstream maps("/proc/self/maps");
    for (std::string line; at < stop && std::getline(maps, line);) {
      uintptr_t begin = 0;
      uintptr_t end = 0;
      char access[5] = "";
      unsigned long inode = 0;
      int path = 0;
      const int found = std::sscanf(line.c_str(), "%" SCNxPTR "-%" SCNxPTR " %4s %*s %*s %lu %n", &begin, &end, access,
                                    &inode, &path);
      if (found < 4 || end <= at) continue;
      const char* name = line.c_str() + path;
      const bool is_file = inode != 0 && path > 0 && name[0] == '/' && std::strncmp(name, "/dev/", 5) != 0;
      if (begin > at || access[3] != 's' || !is_file) return false;
      at = end;
    }
    return at >= stop;
  }

  // Adds the pages between the addresses that this process has not mapped; all, where the system does not tell.
  static void note_absent(std::vector<Span>& absent, uintptr_t begin, uintptr_t end) {
    const uintptr_t page = page_size();
    begin = begin / page * page;
    end = (end + page - 1) / page * page;
    std::vector<uint64_t> entries((end - begin) / page);
    const size_t size = entries.size() * sizeof(uint64_t);
    absent.reserve(absent.size() + entries.size() + 1);
    const int file = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    const auto place = static_cast<off_t>(begin / page * sizeof(uint64_t));
    const bool is_known = file >= 0 && pread(file, entries.data(), size, place) == static_cast<ssize_t>(size);
    if (file >= 0) close(file);
    for (size_t i = 0; i < entries.size(); ++i) {
      if (is_known && (entries[i] >> 63) != 0) continue;  // present
      const uintptr_t at = begin + i * page;
      if (!absent.empty() && absent.back().end >= at) {
        absent.back().end = at + page;
      } else {
        absent.push_back({at, at + page});
      }
    }
  }
#else
  static void give_back(Mapped&, uintptr_t) {}
#endif
};

}  // namespace fastadam::bind
