// SPDX-License-Identifier: Apache-2.0
// The kernels for IndexedSlices that visit every row of a table, with or without a gradient. The threads of a block do
// consecutive rows. The rules of dense_kernels.h apply.
#pragma once

#include "row_kernels.h"

namespace fastadam::cuda {

// The consecutive rows of a block. Every group of lanes does up to kTurns of them, so that one search, and one load of
// the scalars, serves them all; RowSearch has room for kRowThreads.
struct TableRows {
  static constexpr int64_t kTurns = 8;
  int bits;  // of the number of lanes
  int64_t number;

  FASTADAM_INLINE explicit TableRows(int64_t width) : bits(row_lane_bits(width)) {
    const int64_t most = kTurns * (kRowThreads >> bits);
    number = most < kRowThreads ? most : kRowThreads;
  }

  // The number of blocks of threads for a table.
  FASTADAM_INLINE int64_t grid(int64_t row_count) const { return (row_count + number - 1) / number; }

  // Calls function(i, column, lanes) for each row i of the block that this thread works on. `left`: rows of the table
  // from the first of the block on.
  template <class Function>
  FASTADAM_INLINE void for_each(int64_t thread, int64_t left, Function function) const {
    const int64_t lanes = int64_t{1} << bits;
    const int64_t end = left < number ? left : number;
    for (int64_t i = thread >> bits; i < end; i += kRowThreads >> bits) function(i, thread & (lanes - 1), lanes);
  }
};

// Finds the rows of a block of threads in the sorted list of the rows with a gradient, in as many phases as phases()
// says. Each phase cuts the part of the list where the first row may be into kRowThreads parts: for 65536 rows that is
// two loads that depend on each other, where a binary search for each row has sixteen.
struct RowSearch {
  struct Shared {
    int64_t low[2];  // of the part after even and after odd phases
    int64_t high[2];
    int64_t places[kRowThreads];  // by row of the block: its position in the list, or -1
  };

  const Rows& rows;
  int64_t first;   // row of the block
  int64_t number;  // of rows of the block

  // `count`: at least the length of the list.
  FASTADAM_INLINE static int phases(int64_t count) {
    int phases = 2;
    for (; count > kRowThreads; count = (count + kRowThreads - 1) / kRowThreads) ++phases;
    return phases;
  }

  FASTADAM_INLINE void phase(int phase, int phases, int64_t thread, Shared& shared) const {
    if (phase == 0) shared.places[thread] = -1;
    const int from = (phase + 1) % 2;
    const int64_t low = phase == 0 ? 0 : shared.low[from];
    const int64_t high = phase == 0 ? rows.count : shared.high[from];
    if (phase + 1 < phases) return narrow(low, high, phase % 2, thread, shared);
    for (int64_t k = low + thread; k <= low + number && k < rows.count; k += kRowThreads) {
      const int64_t row = rows.rows[k] - first;
      if (row >= 0 && row < number) shared.places[row] = k;
    }
  }

 private:
  // The first row of the list that is >= `first` is at low, at high, or between them. Exactly one thread finds it
  // between the ends of its part.
  FASTADAM_INLINE void narrow(int64_t low, int64_t high, int to, int64_t thread, Shared& shared) const {
    const int64_t step = (high - low + kRowThreads - 1) / kRowThreads;
    const int64_t begin = low + thread * step;
    const int64_t end = high - begin < step ? high : begin + step;
    const bool is_empty = low == high;
    if (is_empty ? thread > 0 : begin >= high) return;
    const bool is_found =
        is_empty || ((begin == low || rows.rows[begin - 1] < first) && (end == high || rows.rows[end - 1] >= first));
    if (!is_found) return;
    shared.low[to] = begin;
    shared.high[to] = end;
  }
};

// TF's rule: every row is updated. Lanes take packs of up to 16 bytes where all rows are aligned.
template <class Storage, bool kAmsgrad, bool kTransform>
struct TableStep {
  static constexpr int kThreads = kRowThreads;
  static constexpr int kPack = 16 / sizeof(Storage);
  using Shared = RowSearch::Shared;
  using T = Compute<Storage>;
  using Scalars = StepScalars<T>;
  const StepState* state;
  TensorArgs tensor;  // with pointers to device memory
  DeviceRows slices;
  const Factor* factor;  // with norm clipping: the factor of the gradient; or null
  int64_t row_count;     // of the table

  FASTADAM_INLINE bool is_packed() const {
    return slices.width % kPack == 0 && is_aligned(tensor.var) && is_aligned(tensor.m) && is_aligned(tensor.v) &&
           (!kAmsgrad || is_aligned(tensor.vhat));
  }

  FASTADAM_INLINE TableRows block_rows() const { return TableRows(is_packed() ? slices.width / kPack : slices.width); }

  FASTADAM_INLINE int64_t grid() const { return block_rows().grid(row_count); }

  FASTADAM_INLINE int phases() const { return RowSearch::phases(slices.count) + 1; }

  FASTADAM_INLINE void phase(int phase, int64_t block, int64_t thread, Shared& shared) const {
    if (state->skip) return;
    const TableRows mine = block_rows();
    const Rows rows = slices.counted();
    const int64_t first = block * mine.number;
    const int searches = RowSearch::phases(slices.count);
    if (phase < searches) return RowSearch{rows, first, mine.number}.phase(phase, searches, thread, shared);
    Operands s{rows, -1, tensor.decays ? scalars().keep : T(1), factor_of_rows<T>(tensor, factor, *state), scalars()};
    const bool packed = is_packed();
    mine.for_each(thread, row_count - first, [&](int64_t i, int64_t lane, int64_t lanes) {
      s.k = shared.places[i];
      const int64_t row = (first + i) * slices.width;
      if (packed) {
        for (int64_t column = lane * kPack; column < slices.width; column += lanes * kPack) {
          update<kPack>(s, row, column);
        }
      } else {
        for (int64_t column = lane; column < slices.width; column += lanes) update<1>(s, row, column);
      }
    });
  }

 private:
  struct Operands {
    const Rows& rows;
    int64_t k;  // the position in rows.rows, or -1 without a gradient
    T keep;
    FactorPair<T> factor;
    Scalars scalars;
  };

  FASTADAM_INLINE const Scalars& scalars() const { return scalars_of<T>(*state); }

  template <int kCount>
  FASTADAM_INLINE void update(const Operands& s, int64_t row, int64_t column) const {
    const int64_t at = row + column;
    auto var = pack_at<kCount>(static_cast<Storage*>(tensor.var), at);
    auto m = pack_at<kCount>(static_cast<T*>(tensor.m), at);
    auto v = pack_at<kCount>(static_cast<T*>(tensor.v), at);
    auto vhat = pack_at<kCount>(static_cast<T*>(kAmsgrad ? tensor.vhat : tensor.v), at);
    for (int i = 0; i < kCount; ++i) {
      T value = load(var.of[i]);
      if (s.k >= 0) {
        const T g = tensor.grad_dtype == tensor.dtype ? sum<Storage>(s, column + i) : sum<T>(s, column + i);
        adam_update_row<kAmsgrad, true>(value, g, m.of[i], v.of[i], vhat.of[i], s.keep, s.scalars);
      } else {
        adam_update_row<kAmsgrad, false>(value, T(0), m.of[i], v.of[i], vhat.of[i], s.keep, s.scalars);
      }
      var.of[i] = store<Storage>(value);
    }
    pack_at<kCount>(static_cast<Storage*>(tensor.var), at) = var;
    pack_at<kCount>(static_cast<T*>(tensor.m), at) = m;
    pack_at<kCount>(static_cast<T*>(tensor.v), at) = v;
    if constexpr (kAmsgrad) pack_at<kCount>(static_cast<T*>(tensor.vhat), at) = vhat;
  }

  template <class Grad>
  FASTADAM_INLINE T sum(const Operands& s, int64_t column) const {
    return sum_values<kTransform, Grad>(s.rows, tensor.grad, s.k, column, s.scalars.clip_value, s.factor);
  }
};

// Adds IndexedSlices times their factor to the accumulator of a table.
template <class Storage>
struct AccumulateRows {
  static constexpr int kThreads = kRowThreads;
  using Shared = RowSearch::Shared;
  using T = Compute<Storage>;
  const StepState* state;
  TensorArgs tensor;
  DeviceRows slices;
  int64_t row_count;  // of the table
  bool restart;       // the accumulator counts as zero

  FASTADAM_INLINE int64_t grid() const { return TableRows(slices.width).grid(row_count); }

  FASTADAM_INLINE int phases() const { return RowSearch::phases(slices.count) + 1; }

  FASTADAM_INLINE void phase(int phase, int64_t block, int64_t thread, Shared& shared) const {
    if (state->skip) return;
    const TableRows mine(slices.width);
    const Rows rows = slices.counted();
    const int64_t first = block * mine.number;
    const int searches = RowSearch::phases(slices.count);
    if (phase < searches) return RowSearch{rows, first, mine.number}.phase(phase, searches, thread, shared);
    mine.for_each(thread, row_count - first, [&](int64_t i, int64_t lane, int64_t lanes) {
      const int64_t k = shared.places[i];
      T* accumulator = static_cast<T*>(tensor.accumulator) + (first + i) * slices.width;
      for (int64_t column = lane; column < slices.width; column += lanes) {
        if (restart) accumulator[column] = T(0);
        if (k < 0) continue;
        accumulator[column] +=
            tensor.grad_dtype == tensor.dtype ? sum<Storage>(rows, k, column) : sum<T>(rows, k, column);
      }
    });
  }

 private:
  template <class Grad>
  FASTADAM_INLINE T sum(const Rows& rows, int64_t k, int64_t column) const {
    constexpr T kNoClip = static_cast<T>(__builtin_huge_val());
    return sum_values<true, Grad>(rows, tensor.grad, k, column, kNoClip, pair_of<T>(make_factor(tensor.grad_factor)));
  }
};

}  // namespace fastadam::cuda
