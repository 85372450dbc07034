// SPDX-License-Identifier: Apache-2.0
// The kernels that run before and after the indices of IndexedSlices are sorted: they list the unique rows and the
// positions of their values. The rules of dense_kernels.h apply.
#pragma once

#include "dense_kernels.h"

namespace fastadam::cuda {

// Rows in device memory. Only the device knows how many there are; `count` is the number of indices, an upper bound.
struct DeviceRows : Rows {
  const int64_t* unique;  // the number of rows

  FASTADAM_INLINE Rows counted() const {
    Rows copy = *this;
    copy.count = *unique;
    return copy;
  }
};

constexpr unsigned long long kNoPosition = ~0ULL;

FASTADAM_INLINE void keep_lowest(unsigned long long* lowest, unsigned long long value) {
#if defined(__CUDA_ARCH__)
  atomicMin(lowest, value);
#else
  if (value < *lowest) *lowest = value;
#endif
}

FASTADAM_INLINE int64_t index_at(const void* indices, bool is_int64, int64_t i) {
  return is_int64 ? static_cast<const int64_t*>(indices)[i] : static_cast<const int32_t*>(indices)[i];
}

constexpr int kIndexThreads = 256;

FASTADAM_INLINE int64_t index_grid(int64_t count) { return (count + kIndexThreads - 1) / kIndexThreads; }

// Copies and numbers the indices, and finds the first invalid one.
struct ReadIndices {
  static constexpr int kThreads = kIndexThreads;
  using Shared = NoShared;
  const void* indices;
  bool is_int64;  // otherwise int32
  int64_t count;
  int64_t row_count;
  int64_t* keys;
  int64_t* order;
  unsigned long long* bad;  // must hold kNoPosition; receives the position of the first invalid index

  FASTADAM_INLINE int phases() const { return 1; }
  FASTADAM_INLINE void phase(int, int64_t block, int64_t thread, Shared&) const {
    const int64_t i = block * kThreads + thread;
    if (i >= count) return;
    const int64_t row = index_at(indices, is_int64, i);
    keys[i] = row;
    order[i] = i;
    if (row < 0 || row >= row_count) keep_lowest(bad, static_cast<unsigned long long>(i));
  }
};

// Marks with 1 where a row begins among the sorted keys. The running sum of the marks numbers the rows from 1.
struct MarkRows {
  static constexpr int kThreads = kIndexThreads;
  using Shared = NoShared;
  const int64_t* keys;
  int64_t count;
  int64_t* marks;

  FASTADAM_INLINE int phases() const { return 1; }
  FASTADAM_INLINE void phase(int, int64_t block, int64_t thread, Shared&) const {
    const int64_t i = block * kThreads + thread;
    if (i < count) marks[i] = i == 0 || keys[i] != keys[i - 1] ? 1 : 0;
  }
};

// Lists the rows and their starts. After an invalid index this step and all later ones fail.
struct ListRows {
  static constexpr int kThreads = kIndexThreads;
  using Shared = NoShared;
  const int64_t* keys;
  const int64_t* numbers;  // the running sums of the marks
  int64_t count;
  int64_t* rows;
  int64_t* starts;
  int64_t* unique;
  const int64_t* unsorted;  // the keys in their original order
  int64_t source;           // see Report
  unsigned long long* bad;
  StepState* state;
  Report* report;

  FASTADAM_INLINE int phases() const { return 1; }
  FASTADAM_INLINE void phase(int, int64_t block, int64_t thread, Shared&) const {
    const int64_t i = block * kThreads + thread;
    if (i == 0) report_bad_index();
    if (i == 0 && count == 0) *unique = starts[0] = 0;
    if (i >= count) return;
    if (i == 0 || numbers[i] != numbers[i - 1]) {
      rows[numbers[i] - 1] = keys[i];
      starts[numbers[i] - 1] = i;
    }
    if (i + 1 < count) return;
    starts[numbers[i]] = count;
    *unique = numbers[i];
  }

 private:
  FASTADAM_INLINE void report_bad_index() const {
    if (*bad == kNoPosition) return;
    if (!state->failed) {
      report->source = source;
      report->position = static_cast<int64_t>(*bad);
      report->index = unsorted[*bad];
      state->failed = true;
    }
    *bad = kNoPosition;
  }
};

// Replaces starts and order after the rows were summed: now there is one value per row, in the order of the rows.
struct NumberRows {
  static constexpr int kThreads = kIndexThreads;
  using Shared = NoShared;
  const int64_t* unique;
  int64_t* starts;
  int64_t* order;

  FASTADAM_INLINE int phases() const { return 1; }
  FASTADAM_INLINE void phase(int, int64_t block, int64_t thread, Shared&) const {
    const int64_t k = block * kThreads + thread;
    if (k <= *unique) starts[k] = k;
    if (k < *unique) order[k] = k;
  }
};

}  // namespace fastadam::cuda
