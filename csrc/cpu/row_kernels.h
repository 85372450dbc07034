// SPDX-License-Identifier: Apache-2.0
// Part of kernels.cpp and included by nothing else: the loops over the rows of IndexedSlices and of deferred tables.
#pragma once

#include "../core/adam_math.h"
#include "../core/at_rest.h"
#include "dense_kernels.h"
#include "finish_kernels.h"
#include "lanes.h"
#include "replay_kernels.h"
#include "row_steps.h"

namespace fastadam::cpu::FASTADAM_ISA {
namespace {

// Prefetches the row that comes a few rows after row k: consecutive rows of a gradient are far apart in the table.
template <class Storage>
FASTADAM_INLINE void prefetch_row(const TensorArgs& tensor, int64_t k) {
  using T = Compute<Storage>;
  constexpr int64_t kAhead = 4;
  constexpr auto kStep = static_cast<int64_t>(64 / sizeof(T));
  const Rows& rows = *tensor.rows;
  if (k + kAhead >= rows.count) return;
  const int64_t row = rows.rows[k + kAhead] * rows.width;
  const int64_t size = rows.width < kColumns ? rows.width : kColumns;
  for (int64_t i = row; i < row + size; i += kStep) {
    __builtin_prefetch(static_cast<Storage*>(tensor.var) + i, 1);
    __builtin_prefetch(static_cast<T*>(tensor.m) + i, 1);
    __builtin_prefetch(static_cast<T*>(tensor.v) + i, 1);
    if (tensor.vhat != nullptr) __builtin_prefetch(static_cast<T*>(tensor.vhat) + i, 1);
  }
  if (tensor.grad == nullptr) return;
  const int64_t item = size_of(tensor.grad_dtype);
  const int64_t place = is_accumulated(tensor) ? rows.rows[k + kAhead] : rows.order[rows.starts[k + kAhead]];
  const char* grad = static_cast<const char*>(tensor.grad) + place * rows.width * item;
  for (int64_t i = 0; i < size; i += kStep) __builtin_prefetch(grad + i * item);
}

// The first row from `row` on, before `end`, that has kMoves or not; `end` if there is none.
inline int64_t next_row(const uint8_t* flags, int64_t row, int64_t end, bool moves) {
  while (row < end && ((flags[row] & kMoves) != 0) != moves) ++row;
  return row;
}

// Calls move(at, end) for the runs of elements of [at, end) whose rows have kMoves.
template <class Move>
FASTADAM_INLINE void for_moving_rows(const uint8_t* flags, int64_t width, int64_t at, int64_t end, Move move) {
  const int64_t rows = (end + width - 1) / width;
  while (at < end) {
    const int64_t row = next_row(flags, at / width, rows, true);
    if (row == rows) return;
    const int64_t begin = row * width > at ? row * width : at;
    const int64_t stop = next_row(flags, row, rows, false) * width;
    at = stop < end ? stop : end;
    move(begin, at);
  }
}

// Updates elements [begin, end) of the table, which have a dense gradient.
template <class Storage>
__attribute__((noinline)) void update_densely(const StepArgs& step, const TensorArgs& tensor, int64_t begin,
                                              int64_t end) {
  if constexpr (sizeof(Storage) == 2) {
    adam_dense_half<Storage>(step, tensor, begin, end);
  } else {
    adam_dense<Storage>(step, tensor, begin, end);
  }
}

// Updates elements [at, end) of the table, whose rows have no gradient or one that is 0 in the accumulator.
template <class Storage, class T>
__attribute__((noinline)) void move_rows(const StepArgs& step, const TensorArgs& tensor, int64_t at, int64_t end,
                                         T keep, const StepScalars<T>& s) {
  if (is_accumulated(tensor)) return update_densely<Storage>(step, tensor, at, end);
  const auto move = step.amsgrad ? move_untouched_rows<true, Storage, T> : move_untouched_rows<false, Storage, T>;
  move(tensor, at, end, keep, s, step.prefetch);
}

// TF's rule: updates elements [begin, end) of the table, with or without a gradient. In a deferred table the rows
// without kMoves are left as they are: a step would flush their denormals and quiet their signalling NaNs, and nothing
// else. A gradient in the accumulator has the rule for dense ones.
template <class Storage>
void adam_all_rows(const StepArgs& step, const TensorArgs& tensor, int64_t begin, int64_t end) {
  using T = Compute<Storage>;
  const StepScalars<T> s = scalars_of<T>(step);
  const FactorPair<T> factor = factor_of<T>(step, tensor);
  const T keep = tensor.decays ? s.keep : T(1);
  const Rows& rows = *tensor.rows;
  const SumRow<T> sum = sum_row_for<Storage, T>(step, tensor);
  const auto touch = step.amsgrad ? touch_row<true, Storage, T> : touch_row<false, Storage, T>;
  const bool leaves = tensor.stale != nullptr && leaves_zeros(is_accumulated(tensor) ? s.alpha : s.row_alpha, keep);
  const uint8_t* flags = leaves ? tensor.stale->flags : nullptr;
  T sums[kColumns];
  int64_t k = first_row_from(rows, begin / rows.width);
  for (int64_t at = begin; at < end;) {
    const int64_t column = at % rows.width;
    if (k == rows.count || rows.rows[k] != at / rows.width) {
      const int64_t next = k < rows.count ? rows.rows[k] * rows.width : end;
      const int64_t stop = next < end ? next : end;
      const auto move = [&](int64_t from, int64_t to) { move_rows<Storage>(step, tensor, from, to, keep, s); };
      if (flags == nullptr) move(at, stop);
      if (flags != nullptr) for_moving_rows(flags, rows.width, at, stop, move);
      at = stop;
      continue;
    }
    if (column == 0) prefetch_row<Storage>(tensor, k);
    const int64_t size = columns_from(column, rows.width, at, end);
    if (is_accumulated(tensor)) {
      update_densely<Storage>(step, tensor, at, at + size);
    } else {
      sum(tensor, k, column, size, s.clip_value, factor, sums);
      touch(tensor, at, size, sums, keep, s);
    }
    at += size;
    if (column + size == rows.width) ++k;
  }
}

// The steps that a row has had of those that not every row has had; `k`: its place in stale.from.
FASTADAM_INLINE int64_t steps_had(const StaleRows& stale, int64_t k) {
  const int64_t steps = stale.from[k] - stale.synced;
  return steps < 0 ? 0 : steps;
}

// Updates only the rows of the gradient, counting their elements row after row, and their averages. In a deferred table
// a row first gets the steps that it missed; without a gradient it gets only these.
template <class Storage>
void adam_touched_rows(const StepArgs& step, const TensorArgs& tensor, int64_t begin, int64_t end) {
  using T = Compute<Storage>;
  const StepScalars<T> s = scalars_of<T>(step);
  const FactorPair<T> factor = factor_of<T>(step, tensor);
  const T keep = tensor.decays ? s.keep : T(1);
  const StaleRows* stale = tensor.stale;
  const int64_t width = stale != nullptr ? stale->width : tensor.rows->width;
  const SumRow<T> sum = sum_row_for<Storage, T>(step, tensor);
  const auto touch = step.amsgrad ? touch_row<true, Storage, T> : touch_row<false, Storage, T>;
  T sums[kColumns];
  for (int64_t at = begin; at < end;) {
    const int64_t k = at / width;
    const int64_t column = at % width;
    const int64_t size = columns_from(column, width, at, end);
    const int64_t row = tensor.rows == nullptr ? k : tensor.rows->rows[k];
    const int64_t place = row * width + column;
    if (column == 0 && tensor.rows != nullptr) prefetch_row<Storage>(tensor, k);
    if (stale != nullptr && (stale->flags == nullptr || (stale->flags[row] & kMoves) != 0)) {
      const int64_t from = steps_had(*stale, k);
      if (from != stale->now) catch_up_row<Storage>(step.amsgrad, tensor, from, place, size, s);
    } else if (tensor.rows == nullptr) {
      at = next_row(stale->flags, row, (end + width - 1) / width, true) * width;
      continue;
    }
    if (is_accumulated(tensor)) {
      update_densely<Storage>(step, tensor, place, place + size);
    } else if (tensor.grad != nullptr) {
      sum(tensor, k, column, size, s.clip_value, factor, sums);
      touch(tensor, place, size, sums, keep, s);
    }
    if (tensor.grad != nullptr && tensor.average != nullptr) average<Storage>(step, tensor, place, place + size);
    at += size;
  }
}

}  // namespace
}  // namespace fastadam::cpu::FASTADAM_ISA
