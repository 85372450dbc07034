// SPDX-License-Identifier: Apache-2.0
// Part of kernels.cpp and included by nothing else: the steps that a row of a deferred table has missed, made one after
// another or all at once.
#pragma once

#include <cstring>

#include "../core/adam_math.h"
#include "../core/at_rest.h"
#include "../core/closed_form.h"
#include "lanes.h"
#include "row_steps.h"

namespace fastadam::cpu::FASTADAM_ISA {
namespace {

// Multiplies moments by `factor` once per step, because every step rounds. Stops early when all values are 0.
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
        for (int64_t i = 0; i < kGroup; ++i) group[i] = decayed_moment(group[i], factor);
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
  for (int64_t i = 0; i < size; ++i) moments[i] = moved_moment(moments[i], T(0), rate);
}

template <class T>
__attribute__((noinline)) void decay(T* __restrict moments, const T* /*var*/, int64_t size, T rate) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) moments[i] = decayed_moment(moments[i], rate);
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

}  // namespace
}  // namespace fastadam::cpu::FASTADAM_ISA
