// SPDX-License-Identifier: Apache-2.0
// Part of kernels.cpp and included by nothing else: the loops over the rows of IndexedSlices and of deferred tables.
#pragma once

#include <cstring>

#include "../core/adam_math.h"
#include "../core/at_rest.h"
#include "../core/closed_form.h"
#include "../core/split.h"
#include "dense_kernels.h"
#include "finish_kernels.h"
#include "lanes.h"

namespace fastadam::cpu::FASTADAM_ISA {
namespace {

template <class T>
constexpr T kNoClip = static_cast<T>(__builtin_huge_val());

// Functions that depend on fewer types than the kernels are not inlined, because inlining would make hundreds of
// copies.

// Sums the gradients of the k-th row, which has at least one, in order of occurrence: `size` columns, starting at
// `column`.
template <bool kTransform, class Grad, class T>
__attribute__((noinline)) void sum_row(const TensorArgs& tensor, int64_t k, int64_t column, int64_t size, T clip_value,
                                       FactorPair<T> factor, T* __restrict sums) {
  const Rows& rows = *tensor.rows;
  const auto value = [&](const Grad* grad, int64_t i) {
    const T g = load(grad[i]);
    return kTransform ? transform_gradient(g, clip_value, factor) : g;
  };
  const Grad* grads = static_cast<const Grad*>(tensor.grad) + column;
  const Grad* __restrict first = grads + rows.order[rows.starts[k]] * rows.width;
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) sums[i] = T(0) + value(first, i);
  for (int64_t at = rows.starts[k] + 1; at < rows.starts[k + 1]; ++at) {
    const Grad* __restrict grad = grads + rows.order[at] * rows.width;
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) sums[i] += value(grad, i);
  }
}

// Which sum_row() to use depends on the dtype of the gradient and on whether it is transformed.
template <class T>
using SumRow = void (*)(const TensorArgs& tensor, int64_t k, int64_t column, int64_t size, T clip_value,
                        FactorPair<T> factor, T* sums);

template <class Storage, class T>
SumRow<T> sum_row_for(const StepArgs& step, const TensorArgs& tensor) {
  static constexpr SumRow<T> kSums[2][2] = {{sum_row<false, Storage, T>, sum_row<true, Storage, T>},
                                            {sum_row<false, T, T>, sum_row<true, T, T>}};
  return kSums[tensor.grad_dtype != tensor.dtype][step.transform != kAsItIs];
}

template <bool kAmsgrad, bool kTouched, class T>
FASTADAM_INLINE void update_rows(const Operands<T>& operands, int64_t size, const T* sums, T keep,
                                 const StepScalars<T>& s) {
  T* __restrict var = operands.var;
  T* __restrict m = operands.m;
  T* __restrict v = operands.v;
  T* __restrict vhat = operands.vhat;
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    T var_i = var[i];
    T m_i = m[i];
    T v_i = v[i];
    T vhat_i = kAmsgrad ? vhat[i] : T(0);
    adam_update_row<kAmsgrad, kTouched>(var_i, kTouched ? sums[i] : T(0), m_i, v_i, vhat_i, keep, s);
    var[i] = var_i;
    m[i] = m_i;
    v[i] = v_i;
    if constexpr (kAmsgrad) vhat[i] = vhat_i;
  }
}

// Updates `size` elements of a row that has a gradient, starting at element `at` of the table.
template <bool kAmsgrad, class Storage, class T>
__attribute__((noinline)) void touch_row(const TensorArgs& tensor, int64_t at, int64_t size, const T* sums, T keep,
                                         const StepScalars<T>& s) {
  in_compute_type(static_cast<Storage*>(tensor.var) + at, size, [&](T* var, int64_t from, int64_t count) {
    update_rows<kAmsgrad, true>(operands_of<kAmsgrad>(tensor, at + from, var), count, sums + from, keep, s);
  });
}

// Updates elements [at, end) of the table, whose rows have no gradient.
template <bool kAmsgrad, class Storage, class T>
__attribute__((noinline)) void move_untouched_rows(const TensorArgs& tensor, int64_t at, int64_t end, T keep,
                                                   const StepScalars<T>& s, bool prefetch) {
  Storage* var = static_cast<Storage*>(tensor.var);
  const T* m = static_cast<const T*>(tensor.m);
  const T* v = static_cast<const T*>(tensor.v);
  const T* vhat = static_cast<const T*>(tensor.vhat);
  const auto update = [&](T* values, int64_t from, int64_t count) {
    const Operands<T> operands = operands_of<kAmsgrad>(tensor, at + from, values);
    update_rows<kAmsgrad, false>(operands, count, static_cast<const T*>(nullptr), keep, s);
  };
  for (; prefetch && at + kBlock <= end; at += kBlock) {
    prefetch_block(sizeof(T), var + at, m + at, v + at);
    if constexpr (kAmsgrad) prefetch_block(sizeof(T), vhat + at);
    block_in_compute_type(var + at, [&](T* values) { update(values, 0, kBlock); });
  }
  in_compute_type(var + at, end - at, update);
}

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

// Multiplies by `factor` once per step, because every step rounds. Stops early when all values are 0.
template <class T>
__attribute__((noinline)) void decay_repeatedly(T* values, int64_t size, T factor, int64_t times) {
  constexpr int64_t kGroup = 32;  // in registers
  for (int64_t at = 0; at < size; at += kGroup) {
    const int64_t count = size - at < kGroup ? size - at : kGroup;
    T group[kGroup] = {};
    for (int64_t i = 0; i < count; ++i) group[i] = values[at + i];
    for (int64_t done = 0; done < times;) {
      const int64_t stop = times - done < kPeakSteps ? times : done + kPeakSteps;
      for (; done < stop; ++done) {
#pragma omp simd
        for (int64_t i = 0; i < kGroup; ++i) group[i] *= factor;
      }
      int alive = 0;
#pragma omp simd reduction(+ : alive)
      for (int64_t i = 0; i < kGroup; ++i) alive += group[i] != T(0);
      if (alive == 0) break;
    }
    for (int64_t i = 0; i < count; ++i) values[at + i] = group[i];
  }
}

// Up to kColumns columns of one row, in the compute type.
template <class T>
struct RowPart {
  T var[kColumns];
  T m[kColumns];
  T v[kColumns];
  T vhat[kColumns];
};

template <bool kAmsgrad, class Storage, class T>
FASTADAM_INLINE void load_part(const TensorArgs& tensor, int64_t at, int64_t size, RowPart<T>& row) {
  const Storage* var = static_cast<const Storage*>(tensor.var) + at;
  const Operands<T> slots = operands_of<kAmsgrad>(tensor, at, static_cast<T*>(nullptr));
  if (size < 1) __builtin_unreachable();  // otherwise GCC warns of elements that are not set
  if constexpr (sizeof(Storage) == 2) convert(var, row.var, size);
  for (int64_t i = 0; i < size; ++i) {
    if constexpr (sizeof(Storage) != 2) row.var[i] = var[i];
    row.m[i] = slots.m[i];
    row.v[i] = slots.v[i];
    row.vhat[i] = kAmsgrad ? slots.vhat[i] : T(0);
  }
}

// Only if the values differ: a page that is not written stays clean, or is not even there.
template <class Item>
FASTADAM_INLINE void store_changed(const Item* values, Item* to, int64_t size) {
  const size_t bytes = static_cast<size_t>(size) * sizeof(Item);
  if (size == 0) return;
  const bool begins_alike = std::memcmp(values, to, sizeof(Item)) == 0;  // seldom, and without a call
  if (begins_alike && std::memcmp(values, to, bytes) == 0) return;
  for (int64_t i = 0; i < size; ++i) to[i] = values[i];
}

template <bool kAmsgrad, class Storage, class T>
FASTADAM_INLINE void store_part(const RowPart<T>& row, const TensorArgs& tensor, int64_t at, int64_t size) {
  Storage* to = static_cast<Storage*>(tensor.var) + at;
  if constexpr (sizeof(Storage) != 2) {
    store_changed(row.var, to, size);
  } else {
    Storage var[kColumns];
    convert(row.var, var, size);
    store_changed(var, to, size);
  }
  const Operands<T> slots = operands_of<kAmsgrad>(tensor, at, static_cast<T*>(nullptr));
  store_changed(row.m, slots.m, size);
  store_changed(row.v, slots.v, size);
  if constexpr (kAmsgrad) store_changed(row.vhat, slots.vhat, size);
}

// Whether all moments are +0.
template <bool kAmsgrad, class T>
FASTADAM_INLINE bool has_zeros(const RowPart<T>& row, int64_t size) {
  if (bits_of(row.m[0]) != 0 || bits_of(row.v[0]) != 0) return false;  // nearly always
  decltype(bits_of(T(0))) bits = 0;
  for (int64_t i = 0; i < size; ++i) bits |= bits_of(row.m[i]) | bits_of(row.v[i]) | bits_of(row.vhat[i]);
  return bits == 0;
}

template <bool kAmsgrad, class Storage, class T>
FASTADAM_INLINE bool all_at_rest(const RowPart<T>& row, int64_t size, T peak, T epsilon) {
  int moving = 0;
#pragma omp simd reduction(+ : moving)
  for (int64_t i = 0; i < size; ++i) {
    moving += !is_at_rest<kAmsgrad, Storage>(row.var[i], row.m[i], row.v[i], row.vhat[i], peak, epsilon);
  }
  return moving == 0;
}

// Applies the steps [from, now) of the history, in which the row had no gradient.
template <bool kAmsgrad, class Storage, class T>
FASTADAM_INLINE void replay(const StaleRows& stale, int64_t from, RowPart<T>& row, int64_t size, StepScalars<T> s) {
  const auto make_step = [&](T alpha, T keep) {
    s.row_alpha = alpha;
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) {
      T var = row.var[i];
      adam_update_row<kAmsgrad, false>(var, T(0), row.m[i], row.v[i], row.vhat[i], keep, s);
      row.var[i] = load(store<Storage>(var));
    }
  };
  const int64_t step = replay_steps<T>(
      stale, from, make_step, [&](T peak) { return all_at_rest<kAmsgrad, Storage>(row, size, peak, s.epsilon); });
  if (step == stale.now) return;
  decay_repeatedly(row.m, size, s.beta_1, stale.now - step);
  decay_repeatedly(row.v, size, s.beta_2, stale.now - step);
}

// Applies all missed steps at once to `size` elements of a row, starting at element `at` of the table.
template <bool kAmsgrad, class Storage, class T>
__attribute__((noinline)) void jump_row(const ClosedForm& form, const TensorArgs& tensor, int64_t at, int64_t size,
                                        const StepScalars<T>& s) {
  RowPart<T> row;
  load_part<kAmsgrad, Storage>(tensor, at, size, row);
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    adam_jump<kAmsgrad>(row.var[i], row.m[i], row.v[i], row.vhat[i], form, s.beta_2, s.epsilon);
  }
  store_part<kAmsgrad, Storage>(row, tensor, at, size);
}

// Applies the steps [from, now) one after another to `size` elements of a row, starting at element `at` of the table.
template <bool kAmsgrad, class Storage, class T>
__attribute__((noinline)) void replay_row(const TensorArgs& tensor, int64_t from, int64_t at, int64_t size,
                                          const StepScalars<T>& s) {
  RowPart<T> row;
  load_part<kAmsgrad, Storage>(tensor, at, size, row);
  StaleRows stale = *tensor.stale;
  if (stale.leaves_zeros && has_zeros<kAmsgrad>(row, size)) stale.now = from + 1;  // all steps do what one does
  replay<kAmsgrad, Storage>(stale, from, row, size, s);
  store_part<kAmsgrad, Storage>(row, tensor, at, size);
}

// For small code, where time is spent in what it calls.
#define FASTADAM_RARE __attribute__((noinline, cold))

// What follows is for steps that move averages, too, or follow the rule for dense gradients, which were 0 in the rows
// that waited. It is made of loops that there are anyway, and small ones, which are called where replay() is one loop:
// few options need it, and each copy would be compiled for every type and instruction set.

// Moves values by one step: a moment whose gradient is 0 by `rate`, or averages towards their variable.
template <class T>
using MoveOnce = void (*)(T* __restrict values, const T* __restrict var, int64_t size, T rate);

template <class T>
__attribute__((noinline)) void fall(T* __restrict moments, const T* /*var*/, int64_t size, T rate) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) moments[i] += (T(0) - moments[i]) * rate;
}

template <class T>
__attribute__((noinline)) void decay(T* __restrict moments, const T* /*var*/, int64_t size, T rate) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) moments[i] *= rate;
}

template <class T>
__attribute__((noinline)) void move_averages(T* __restrict averages, const T* __restrict var, int64_t size,
                                             T momentum) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) averages[i] = moving_average(averages[i], var[i], momentum);
}

// Stops early when a step changes nothing.
template <class T>
FASTADAM_RARE void move_repeatedly(MoveOnce<T> move, T* values, const T* var, int64_t size, T rate, int64_t times) {
  T before[kColumns];
  const size_t bytes = static_cast<size_t>(size) * sizeof(T);
  for (int64_t done = 0; done < times; ++done) {
    const bool looks = done % kPeakSteps == 0;
    if (looks) std::memcpy(before, values, bytes);
    move(values, var, size, rate);
    if (looks && std::memcmp(before, values, bytes) == 0) return;
  }
}

// Rounds values to the type in which the variable is stored; null if that is T.
template <class T>
using RoundThrough = void (*)(T* values, int64_t size);

template <class Half>
__attribute__((noinline)) void round_through(float* values, int64_t size) {
  Half rounded[kColumns];
  convert(values, rounded, size);
  convert(rounded, values, size);
}

// The same as all_at_rest().
template <class T>
__attribute__((noinline)) bool rests(const RowPart<T>& row, bool amsgrad, RoundThrough<T> round, int64_t size, T peak,
                                     T epsilon) {
  const T* second_moment = amsgrad ? row.vhat : row.v;
  T below[kColumns];
  T above[kColumns];
  for (int64_t i = 0; i < size; ++i) {
    const T change = largest_change(row.m[i], second_moment[i], peak, epsilon);
    below[i] = row.var[i] - change;
    above[i] = row.var[i] + change;
  }
  if (round != nullptr) round(below, size);
  if (round != nullptr) round(above, size);
  const size_t bytes = static_cast<size_t>(size) * sizeof(T);
  return std::memcmp(below, row.var, bytes) == 0 && std::memcmp(above, row.var, bytes) == 0;
}

template <class T>
FASTADAM_RARE void replay_with_options(const StaleRows& stale, bool amsgrad, RoundThrough<T> round, int64_t from,
                                       RowPart<T>& row, T* averages, int64_t size, StepScalars<T> s) {
  static constexpr T kZeros[kColumns] = {};
  TensorArgs part{};
  part.var = row.var;
  part.m = row.m;
  part.v = row.v;
  part.vhat = row.vhat;
  const auto step_densely = amsgrad ? update_range<true, kAsItIs, T> : update_range<false, kAsItIs, T>;
  const auto step_rows = amsgrad ? move_untouched_rows<true, T, T> : move_untouched_rows<false, T, T>;
  const auto make_step = [&](T alpha, T keep) {
    s.alpha = s.row_alpha = alpha;
    if (stale.dense) {
      step_densely(row.var, kZeros, row.m, row.v, row.vhat, size, s, FactorPair<T>{}, keep, false);
    } else {
      step_rows(part, 0, size, keep, s, false);
    }
    if (round != nullptr) round(row.var, size);
    if (averages != nullptr) move_averages(averages, row.var, size, s.ema_momentum);
  };
  // By the dense rule m stops falling where m (1 - beta_1) is flushed to zero, and then m / sqrt(v) may grow. It does
  // not matter if m times any rate to come is flushed, too.
  const int64_t step = replay_steps<T>(stale, from, make_step, [&](T peak) {
    return (!stale.dense || peak <= s.one_minus_beta_1) && rests(row, amsgrad, round, size, peak, s.epsilon);
  });
  const int64_t left = stale.now - step;
  if (averages != nullptr) move_repeatedly<T>(move_averages, averages, row.var, size, s.ema_momentum, left);
  const MoveOnce<T> move = stale.dense ? fall<T> : decay<T>;
  move_repeatedly(move, row.m, row.var, size, stale.dense ? s.one_minus_beta_1 : s.beta_1, left);
  move_repeatedly(move, row.v, row.var, size, stale.dense ? s.one_minus_beta_2 : s.beta_2, left);
}

// Copies `size` elements of the slots to the row and the averages, or back.
template <class T>
FASTADAM_RARE void copy_slots(const TensorArgs& tensor, int64_t at, int64_t size, bool back, RowPart<T>& row,
                              T* averages) {
  T* const parts[] = {row.m, row.v, row.vhat, averages};
  void* const slots[] = {tensor.m, tensor.v, tensor.vhat, tensor.average};
  for (int i = 0; i < 4; ++i) {
    T* slot = static_cast<T*>(slots[i]) + at;
    if (back && slots[i] != nullptr) store_changed(parts[i], slot, size);
    if (!back) std::memset(parts[i], 0, static_cast<size_t>(size) * sizeof(T));
    if (!back && slots[i] != nullptr) std::memcpy(parts[i], slot, static_cast<size_t>(size) * sizeof(T));
  }
}

template <class Storage, class T>
FASTADAM_RARE void replay_row_with_options(bool amsgrad, const TensorArgs& tensor, int64_t from, int64_t at,
                                           int64_t size, const StepScalars<T>& s) {
  RowPart<T> row;
  T averages[kColumns];
  copy_slots(tensor, at, size, false, row, averages);
  Storage* var = static_cast<Storage*>(tensor.var) + at;
  T* average = tensor.average == nullptr ? nullptr : averages;
  if constexpr (sizeof(Storage) == 2) {
    Storage stored[kColumns];
    convert(var, row.var, size);
    replay_with_options<T>(*tensor.stale, amsgrad, round_through<Storage>, from, row, average, size, s);
    convert(row.var, stored, size);
    store_changed(stored, var, size);
  } else {
    std::memcpy(row.var, var, static_cast<size_t>(size) * sizeof(T));
    replay_with_options<T>(*tensor.stale, amsgrad, nullptr, from, row, average, size, s);
    store_changed(row.var, var, size);
  }
  copy_slots(tensor, at, size, true, row, averages);
}

template <class Storage, class T>
FASTADAM_INLINE void catch_up_row(bool amsgrad, const TensorArgs& tensor, int64_t from, int64_t at, int64_t size,
                                  const StepScalars<T>& s) {
  const StaleRows& stale = *tensor.stale;
  const bool jumps = stale.forms != nullptr && tensor.average == nullptr;
  if (jumps && stale.now - from > kShortGap) {
    const ClosedForm& form = stale.forms[stale.places[from]];
    const auto jump = amsgrad ? jump_row<true, Storage, T> : jump_row<false, Storage, T>;
    if (form.exists) return jump(form, tensor, at, size, s);
  }
  if (stale.dense || tensor.average != nullptr) {
    return replay_row_with_options<Storage>(amsgrad, tensor, from, at, size, s);
  }
  (amsgrad ? replay_row<true, Storage, T> : replay_row<false, Storage, T>)(tensor, from, at, size, s);
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
