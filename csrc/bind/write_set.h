// SPDX-License-Identifier: Apache-2.0
// The memory that a step writes. Its arrays must not overlap, and gradients must not share memory with it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <string>
#include <utility>
#include <vector>

#include "buffer.h"

namespace fastadam::bind {

class WriteSet {
 public:
  // A variable or slot, which must outlive this.
  void add(const Buffer& buffer) { intervals_.push_back({buffer.begin(), buffer.end(), &buffer.label}); }

  // Call it after the last add(). `gradients`: their number.
  void refuse_overlaps(size_t gradients) {
    std::sort(intervals_.begin(), intervals_.end());
    for (size_t k = 1; k < intervals_.size(); ++k) {
      if (intervals_[k].begin >= intervals_[k - 1].end) continue;
      throw py::value_error(*intervals_[k].label + ": overlaps " + *intervals_[k - 1].label +
                            " in memory, expected separate arrays (or the same variable with the same state)");
    }
    apart_.resize(gradients);
  }

  // Raises if gradient i, which is read while the step writes, shares memory with this set.
  void require_apart(const void* data, int64_t nbytes, size_t i, const Label& label) {
    const auto begin = reinterpret_cast<uintptr_t>(data);
    const uintptr_t end = begin + static_cast<uintptr_t>(nbytes);
    if (nbytes == 0 || apart_[i] == std::make_pair(begin, end)) return;
    const auto after = std::lower_bound(intervals_.begin(), intervals_.end(), Interval{end, 0, nullptr});
    if (after == intervals_.begin() || std::prev(after)->end <= begin) {
      apart_[i] = {begin, end};
      return;
    }
    throw py::value_error(label() + ": shares memory with " + *std::prev(after)->label +
                          ", which the step writes; expected a separate array");
  }

 private:
  struct Interval {
    uintptr_t begin;
    uintptr_t end;
    const std::string* label;
    bool operator<(const Interval& other) const { return begin < other.begin; }
  };

  std::vector<Interval> intervals_;                     // by address
  std::vector<std::pair<uintptr_t, uintptr_t>> apart_;  // cache: for each i, the last memory that was apart
};

}  // namespace fastadam::bind
