// SPDX-License-Identifier: Apache-2.0
// Cuts the elements of all variables of a step into equal shares. This is pure index arithmetic in int64, which the
// tests exercise far beyond what can be allocated.
#pragma once

#include <cstdint>

#include "dtypes.h"
#include "step_args.h"

namespace fastadam {

constexpr int64_t kCacheLineBytes = 64;

// The first element of part `share` when `total` is cut into `shares` equal parts. Cannot overflow if
// shares^2 < 2^63.
FASTADAM_INLINE int64_t share_begin(int64_t total, int64_t share, int64_t shares) {
  return total / shares * share + total % shares * share / shares;
}

// The number of elements before the next cache line. `address` is a multiple of `item_size`.
FASTADAM_INLINE int64_t elements_to_line(uint64_t address, int64_t item_size) {
  return static_cast<int64_t>((kCacheLineBytes - address % kCacheLineBytes) % kCacheLineBytes) / item_size;
}

// Variables are cut at multiples of so many elements. What is done with a tile once it was updated finds it in cache,
// and sums over tiles do not depend on how the work is shared.
constexpr int64_t kTile = 512;

FASTADAM_INLINE int64_t tiles_of(int64_t size) { return (size + kTile - 1) / kTile; }

// Moves a cut inside a variable up to the end of a tile.
FASTADAM_INLINE int64_t cut_at_tile(int64_t cut, int64_t size) {
  if (cut <= 0) return 0;
  return cut < size - size % kTile ? tiles_of(cut) * kTile : size;
}

// The index of the last variable that starts at or before `element` in the concatenation of all variables.
FASTADAM_INLINE int64_t find_variable(const int64_t* offsets, int64_t count, int64_t element) {
  int64_t low = 0;
  int64_t high = count;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (offsets[middle] <= element ? low : high) = middle;
  }
  return low;
}

// The position in rows.rows of the first row that is >= `row`.
FASTADAM_INLINE int64_t first_row_from(const Rows& rows, int64_t row) {
  int64_t low = 0;
  int64_t high = rows.count;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (rows.rows[middle] < row) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// Calls visit(variable, begin, end) for each piece of the share.
template <class Visit>
void for_each_piece(const int64_t* offsets, int64_t count, int64_t share, int64_t shares, Visit visit) {
  const int64_t first = share_begin(offsets[count], share, shares);
  const int64_t last = share_begin(offsets[count], share + 1, shares);
  if (first == last) return;
  for (int64_t k = find_variable(offsets, count, first); k < count && offsets[k] < last; ++k) {
    const int64_t size = offsets[k + 1] - offsets[k];
    const int64_t begin = cut_at_tile(first - offsets[k], size);
    const int64_t end = last >= offsets[k + 1] ? size : cut_at_tile(last - offsets[k], size);
    if (begin < end) visit(k, begin, end);
  }
}

}  // namespace fastadam
