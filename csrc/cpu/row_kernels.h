// SPDX-License-Identifier: Apache-2.0
// Part of kernels.cpp, compiled once per ISA: the loops over the rows of IndexedSlices. Included by nothing else.
#pragma once

#include "../core/adam_math.h"
#include "../core/closed_form.h"
#include "../core/rest.h"
#include "../core/split.h"
#include "streams.h"

namespace fastadam::cpu::FASTADAM_ISA {
namespace {

// Columns of a row whose gradient is summed before they are updated.
constexpr int64_t kColumns = 128;

template <class T>
constexpr T kNoClip = static_cast<T>(__builtin_huge_val());

// Functions that depend on fewer types than the kernels are not inlined: there would be hundreds of copies.

// Sums the gradients of one touched row, `size` columns from `column` on, in order of occurrence.
template <bool kTransform, class Grad, class T>
__attribute__((noinline)) void sum_row(const TensorArgs& tensor, int64_t k, int64_t column, int64_t size, T clip_value,
                                       T factor, T* sums) {
  const Rows& rows = *tensor.rows;
  for (int64_t i = 0; i < size; ++i) sums[i] = T(0);
  for (int64_t at = rows.starts[k]; at < rows.starts[k + 1]; ++at) {
    const Grad* __restrict grad = static_cast<const Grad*>(tensor.grad) + rows.order[at] * rows.width + column;
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) {
      T g = load(grad[i]);
      if constexpr (kTransform) g = transform_gradient(g, clip_value, factor);
      sums[i] += g;
    }
  }
}

template <bool kAmsgrad, bool kTouched, class Storage, class T>
FASTADAM_INLINE void update_rows(const Streams<Storage, T>& streams, int64_t at, int64_t size, const T* sums, T keep,
                                 const StepScalars<T>& s) {
  Storage* __restrict var = streams.var + at;
  T* __restrict m = streams.m + at;
  T* __restrict v = streams.v + at;
  T* __restrict vhat = kAmsgrad ? streams.vhat + at : nullptr;
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    T var_i = load(var[i]);
    T m_i = m[i];
    T v_i = v[i];
    T vhat_i = kAmsgrad ? vhat[i] : T(0);
    adam_update_row<kAmsgrad, kTouched>(var_i, kTouched ? sums[i] : T(0), m_i, v_i, vhat_i, keep, s);
    var[i] = store<Storage>(var_i);
    m[i] = m_i;
    v[i] = v_i;
    if constexpr (kAmsgrad) vhat[i] = vhat_i;
  }
}

// Some columns of a touched row.
template <bool kAmsgrad, class Storage, class T>
__attribute__((noinline)) void touch_row(const Streams<Storage, T>& streams, int64_t at, int64_t size, const T* sums,
                                         T keep, const StepScalars<T>& s) {
  update_rows<kAmsgrad, true>(streams, at, size, sums, keep, s);
}

// Rows that are not touched, side by side.
template <bool kAmsgrad, class Storage, class T>
__attribute__((noinline)) void rest_rows(const Streams<Storage, T>& streams, int64_t at, int64_t end, T keep,
                                         const StepScalars<T>& s, bool prefetch) {
  for (; prefetch && at + kBlock <= end; at += kBlock) {
    prefetch_block<kAmsgrad, false>(streams, at);
    update_rows<kAmsgrad, false>(streams, at, kBlock, static_cast<const T*>(nullptr), keep, s);
  }
  update_rows<kAmsgrad, false>(streams, at, end - at, static_cast<const T*>(nullptr), keep, s);
}

// Fetches the row that comes a few rows after row k: they lie anywhere in the table.
template <bool kAmsgrad, class Grad, class Storage, class T>
FASTADAM_INLINE void prefetch_row(const Streams<Storage, T>& streams, const TensorArgs& tensor, int64_t k) {
  constexpr int64_t kAhead = 4;
  constexpr auto kStep = static_cast<int64_t>(64 / sizeof(T));
  const Rows& rows = *tensor.rows;
  if (k + kAhead >= rows.count) return;
  const int64_t row = rows.rows[k + kAhead] * rows.width;
  const int64_t size = rows.width < kColumns ? rows.width : kColumns;
  for (int64_t i = 0; i < size; i += kStep) {
    __builtin_prefetch(streams.var + row + i, 1);
    __builtin_prefetch(streams.m + row + i, 1);
    __builtin_prefetch(streams.v + row + i, 1);
    if constexpr (kAmsgrad) __builtin_prefetch(streams.vhat + row + i, 1);
  }
  if (tensor.grad == nullptr) return;
  const Grad* grad = static_cast<const Grad*>(tensor.grad) + rows.order[rows.starts[k + kAhead]] * rows.width;
  for (int64_t i = 0; i < size; i += kStep) __builtin_prefetch(grad + i);
}

// Columns from `column` on of a row that are in [at, end), as many as are done at a time.
FASTADAM_INLINE int64_t columns_from(int64_t column, int64_t width, int64_t at, int64_t end) {
  const int64_t rest = width - column < end - at ? width - column : end - at;
  return rest < kColumns ? rest : kColumns;
}

// Elements [begin, end) of the table, every row of which moves.
template <class Storage, class Grad, bool kAmsgrad, bool kTransform>
void adam_all_rows(const StepArgs& step, const TensorArgs& tensor, int64_t begin, int64_t end) {
  using T = Compute<Storage>;
  const StepScalars<T> s = scalars_of<T>(step);
  const T factor = static_cast<T>(factor_of(step, tensor));
  const T keep = tensor.decays ? s.keep : T(1);
  const Rows& rows = *tensor.rows;
  const Streams<Storage, T> streams = streams_of<Storage, T>(tensor, 0);
  T sums[kColumns];
  int64_t k = first_row_from(rows, begin / rows.width);
  for (int64_t at = begin; at < end;) {
    const int64_t column = at % rows.width;
    if (k == rows.count || rows.rows[k] != at / rows.width) {
      const int64_t next = k < rows.count ? rows.rows[k] * rows.width : end;
      const int64_t stop = next < end ? next : end;
      rest_rows<kAmsgrad>(streams, at, stop, keep, s, step.prefetch);
      at = stop;
      continue;
    }
    if (column == 0) prefetch_row<kAmsgrad, Grad>(streams, tensor, k);
    const int64_t size = columns_from(column, rows.width, at, end);
    sum_row<kTransform, Grad>(tensor, k, column, size, s.clip_value, factor, sums);
    touch_row<kAmsgrad>(streams, at, size, sums, keep, s);
    at += size;
    if (column + size == rows.width) ++k;
  }
}

// Multiplies `times` times: as many roundings as the steps had.
template <class T>
FASTADAM_INLINE void decay_often(T* values, int64_t size, T factor, int64_t times) {
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

// Some columns of one row, in the compute type.
template <class T>
struct RowPart {
  T var[kColumns];
  T m[kColumns];
  T v[kColumns];
  T vhat[kColumns];
};

// Whether none of the columns moves any more.
template <bool kAmsgrad, class Storage, class T>
FASTADAM_INLINE bool at_rest(const RowPart<T>& row, int64_t size, T peak, T epsilon) {
  int moving = 0;
#pragma omp simd reduction(+ : moving)
  for (int64_t i = 0; i < size; ++i) {
    moving += !rests<kAmsgrad, Storage>(row.var[i], row.m[i], row.v[i], row.vhat[i], peak, epsilon);
  }
  return moving == 0;
}

// The steps [from, now) of the history, in which the row had no gradient.
template <bool kAmsgrad, class Storage, class T>
FASTADAM_INLINE void replay(const StaleRows& stale, int64_t from, RowPart<T>& row, int64_t size, StepScalars<T> s) {
  constexpr int64_t kCheckSteps = 8;
  const T* alphas = static_cast<const T*>(stale.alphas);
  const T* keeps = static_cast<const T*>(stale.keeps);
  const T peak = stale.may_stop ? peak_from<T>(stale, from) : T(0);
  int64_t step = from;
  while (step < stale.now) {
    const int64_t stop = stale.now - step < kCheckSteps ? stale.now : step + kCheckSteps;
    for (; step < stop; ++step) {
      s.row_alpha = alphas[step];
      const T keep = keeps[step];
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) {
        T var = row.var[i];
        adam_update_row<kAmsgrad, false>(var, T(0), row.m[i], row.v[i], row.vhat[i], keep, s);
        row.var[i] = load(store<Storage>(var));
      }
    }
    if (stale.may_stop && at_rest<kAmsgrad, Storage>(row, size, peak, s.epsilon)) break;
  }
  decay_often(row.m, size, s.beta_1, stale.now - step);
  decay_often(row.v, size, s.beta_2, stale.now - step);
}

// All of them at once.
template <bool kAmsgrad, class Storage, class T>
__attribute__((noinline)) void jump_row(const ClosedForm& form, const Streams<Storage, T>& streams, int64_t at,
                                        int64_t size, const StepScalars<T>& s) {
  Storage* __restrict var = streams.var + at;
  T* __restrict m = streams.m + at;
  T* __restrict v = streams.v + at;
  T* __restrict vhat = kAmsgrad ? streams.vhat + at : nullptr;
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    T var_i = load(var[i]);
    T vhat_i = kAmsgrad ? vhat[i] : T(0);
    adam_jump<kAmsgrad>(var_i, m[i], v[i], vhat_i, form, s.beta_2, s.epsilon);
    var[i] = store<Storage>(var_i);
    if constexpr (kAmsgrad) vhat[i] = vhat_i;
  }
}

template <bool kAmsgrad, class Storage, class T>
__attribute__((noinline)) void catch_up_row(const StaleRows& stale, int64_t from, const Streams<Storage, T>& streams,
                                            int64_t at, int64_t size, const StepScalars<T>& s) {
  if (from == stale.now) return;
  if (stale.forms != nullptr && stale.now - from > kShortGap) {
    const ClosedForm& form = stale.forms[stale.places[from]];
    if (form.exists) return jump_row<kAmsgrad>(form, streams, at, size, s);
  }
  RowPart<T> row;
  for (int64_t i = 0; i < size; ++i) {
    row.var[i] = load(streams.var[at + i]);
    row.m[i] = streams.m[at + i];
    row.v[i] = streams.v[at + i];
    row.vhat[i] = kAmsgrad ? streams.vhat[at + i] : T(0);
  }
  replay<kAmsgrad, Storage>(stale, from, row, size, s);
  for (int64_t i = 0; i < size; ++i) {
    streams.var[at + i] = store<Storage>(row.var[i]);
    streams.m[at + i] = row.m[i];
    streams.v[at + i] = row.v[i];
    if constexpr (kAmsgrad) streams.vhat[at + i] = row.vhat[i];
  }
}

// Rows that are touched, laid one after the other; of a stale table the steps they missed come first.
template <class Storage, class Grad, bool kAmsgrad, bool kTransform>
void adam_touched_rows(const StepArgs& step, const TensorArgs& tensor, int64_t begin, int64_t end) {
  using T = Compute<Storage>;
  const StepScalars<T> s = scalars_of<T>(step);
  const T factor = static_cast<T>(factor_of(step, tensor));
  const T keep = tensor.decays ? s.keep : T(1);
  const StaleRows* stale = tensor.stale;
  const int64_t width = stale != nullptr ? stale->width : tensor.rows->width;
  const Streams<Storage, T> streams = streams_of<Storage, T>(tensor, 0);
  T sums[kColumns];
  for (int64_t at = begin; at < end;) {
    const int64_t k = at / width;
    const int64_t column = at % width;
    const int64_t size = columns_from(column, width, at, end);
    const int64_t place = (tensor.rows == nullptr ? k : tensor.rows->rows[k]) * width + column;
    if (column == 0 && tensor.rows != nullptr) prefetch_row<kAmsgrad, Grad>(streams, tensor, k);
    if (stale != nullptr) catch_up_row<kAmsgrad>(*stale, stale->from[k], streams, place, size, s);
    if (tensor.grad != nullptr) {
      sum_row<kTransform, Grad>(tensor, k, column, size, s.clip_value, factor, sums);
      touch_row<kAmsgrad>(streams, place, size, sums, keep, s);
    }
    at += size;
  }
}

}  // namespace
}  // namespace fastadam::cpu::FASTADAM_ISA
