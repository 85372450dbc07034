// SPDX-License-Identifier: Apache-2.0
// Part of kernels.cpp, compiled once per ISA: the loops over the rows of IndexedSlices. Included by nothing else.
#pragma once

#include "../core/adam_math.h"
#include "../core/at_rest.h"
#include "../core/closed_form.h"
#include "../core/split.h"
#include "lanes.h"

namespace fastadam::cpu::FASTADAM_ISA {
namespace {

template <class T>
constexpr T kNoClip = static_cast<T>(__builtin_huge_val());

// Functions that depend on fewer types than the kernels are not inlined: there would be hundreds of copies.

// Sums the gradients of one touched row, `size` columns from `column` on, in order of occurrence; there is at least
// one.
template <bool kTransform, class Grad, class T>
__attribute__((noinline)) void sum_row(const TensorArgs& tensor, int64_t k, int64_t column, int64_t size, T clip_value,
                                       T factor, T* __restrict sums) {
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

// How the gradients of a row are summed: by the dtype of the gradient, and whether it is transformed.
template <class T>
using SumRow = void (*)(const TensorArgs& tensor, int64_t k, int64_t column, int64_t size, T clip_value, T factor,
                        T* sums);

template <class Storage, class T>
SumRow<T> sum_row_for(const StepArgs& step, const TensorArgs& tensor) {
  static constexpr SumRow<T> kSums[2][2] = {{sum_row<false, Storage, T>, sum_row<true, Storage, T>},
                                            {sum_row<false, T, T>, sum_row<true, T, T>}};
  return kSums[tensor.grad_dtype != tensor.dtype][step.transform != kAsItIs];
}

template <bool kAmsgrad, bool kTouched, class T>
FASTADAM_INLINE void update_rows(const Streams<T>& streams, int64_t size, const T* sums, T keep,
                                 const StepScalars<T>& s) {
  T* __restrict var = streams.var;
  T* __restrict m = streams.m;
  T* __restrict v = streams.v;
  T* __restrict vhat = streams.vhat;
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

// Some columns of a touched row.
template <bool kAmsgrad, class Storage, class T>
__attribute__((noinline)) void touch_row(const TensorArgs& tensor, int64_t at, int64_t size, const T* sums, T keep,
                                         const StepScalars<T>& s) {
  in_compute_type(static_cast<Storage*>(tensor.var) + at, size, [&](T* var, int64_t from, int64_t count) {
    update_rows<kAmsgrad, true>(streams_of<kAmsgrad>(tensor, at + from, var), count, sums + from, keep, s);
  });
}

// Elements [at, end) of the table, in no row that is touched.
template <bool kAmsgrad, class Storage, class T>
__attribute__((noinline)) void rest_rows(const TensorArgs& tensor, int64_t at, int64_t end, T keep,
                                         const StepScalars<T>& s, bool prefetch) {
  Storage* var = static_cast<Storage*>(tensor.var);
  const T* m = static_cast<const T*>(tensor.m);
  const T* v = static_cast<const T*>(tensor.v);
  const T* vhat = static_cast<const T*>(tensor.vhat);
  const auto update = [&](T* values, int64_t from, int64_t count) {
    const Streams<T> streams = streams_of<kAmsgrad>(tensor, at + from, values);
    update_rows<kAmsgrad, false>(streams, count, static_cast<const T*>(nullptr), keep, s);
  };
  for (; prefetch && at + kBlock <= end; at += kBlock) {
    prefetch_block(sizeof(T), var + at, m + at, v + at);
    if constexpr (kAmsgrad) prefetch_block(sizeof(T), vhat + at);
    block_in_compute_type(var + at, [&](T* values) { update(values, 0, kBlock); });
  }
  in_compute_type(var + at, end - at, update);
}

// Fetches the row that comes a few rows after row k: they lie anywhere in the table.
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
  const char* grad = static_cast<const char*>(tensor.grad) + rows.order[rows.starts[k + kAhead]] * rows.width * item;
  for (int64_t i = 0; i < size; i += kStep) __builtin_prefetch(grad + i * item);
}

// Columns from `column` on of a row that are in [at, end), as many as are done at a time.
FASTADAM_INLINE int64_t columns_from(int64_t column, int64_t width, int64_t at, int64_t end) {
  const int64_t rest = width - column < end - at ? width - column : end - at;
  return rest < kColumns ? rest : kColumns;
}

// Elements [begin, end) of the table, every row of which moves.
template <class Storage>
void adam_all_rows(const StepArgs& step, const TensorArgs& tensor, int64_t begin, int64_t end) {
  using T = Compute<Storage>;
  const StepScalars<T> s = scalars_of<T>(step);
  const T factor = static_cast<T>(factor_of(step, tensor));
  const T keep = tensor.decays ? s.keep : T(1);
  const Rows& rows = *tensor.rows;
  const SumRow<T> sum = sum_row_for<Storage, T>(step, tensor);
  const auto touch = step.amsgrad ? touch_row<true, Storage, T> : touch_row<false, Storage, T>;
  const auto rest = step.amsgrad ? rest_rows<true, Storage, T> : rest_rows<false, Storage, T>;
  T sums[kColumns];
  int64_t k = first_row_from(rows, begin / rows.width);
  for (int64_t at = begin; at < end;) {
    const int64_t column = at % rows.width;
    if (k == rows.count || rows.rows[k] != at / rows.width) {
      const int64_t next = k < rows.count ? rows.rows[k] * rows.width : end;
      const int64_t stop = next < end ? next : end;
      rest(tensor, at, stop, keep, s, step.prefetch);
      at = stop;
      continue;
    }
    if (column == 0) prefetch_row<Storage>(tensor, k);
    const int64_t size = columns_from(column, rows.width, at, end);
    sum(tensor, k, column, size, s.clip_value, factor, sums);
    touch(tensor, at, size, sums, keep, s);
    at += size;
    if (column + size == rows.width) ++k;
  }
}

// Multiplies `times` times: as many roundings as the steps had.
template <class T>
__attribute__((noinline)) void decay_often(T* values, int64_t size, T factor, int64_t times) {
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
  if (step == stale.now) return;
  decay_often(row.m, size, s.beta_1, stale.now - step);
  decay_often(row.v, size, s.beta_2, stale.now - step);
}

// All of them at once.
template <bool kAmsgrad, class Storage, class T>
__attribute__((noinline)) void jump_row(const ClosedForm& form, const TensorArgs& tensor, int64_t at, int64_t size,
                                        const StepScalars<T>& s) {
  in_compute_type(static_cast<Storage*>(tensor.var) + at, size, [&](T* values, int64_t from, int64_t count) {
    const Streams<T> streams = streams_of<kAmsgrad>(tensor, at + from, values);
    T* __restrict var = streams.var;
    T* __restrict m = streams.m;
    T* __restrict v = streams.v;
    T* __restrict vhat = streams.vhat;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      T vhat_i = kAmsgrad ? vhat[i] : T(0);
      adam_jump<kAmsgrad>(var[i], m[i], v[i], vhat_i, form, s.beta_2, s.epsilon);
      if constexpr (kAmsgrad) vhat[i] = vhat_i;
    }
  });
}

// Some columns of a row get the steps [from, now), one after the other.
template <bool kAmsgrad, class Storage, class T>
__attribute__((noinline)) void replay_row(const TensorArgs& tensor, int64_t from, int64_t at, int64_t size,
                                          const StepScalars<T>& s) {
  Storage* var = static_cast<Storage*>(tensor.var) + at;
  const Streams<T> slots = streams_of<kAmsgrad>(tensor, at, static_cast<T*>(nullptr));
  RowPart<T> row;
  for (int64_t i = 0; i < size; ++i) {
    row.var[i] = load(var[i]);
    row.m[i] = slots.m[i];
    row.v[i] = slots.v[i];
    row.vhat[i] = kAmsgrad ? slots.vhat[i] : T(0);
  }
  replay<kAmsgrad, Storage>(*tensor.stale, from, row, size, s);
  for (int64_t i = 0; i < size; ++i) {
    var[i] = store<Storage>(row.var[i]);
    slots.m[i] = row.m[i];
    slots.v[i] = row.v[i];
    if constexpr (kAmsgrad) slots.vhat[i] = row.vhat[i];
  }
}

template <class Storage, class T>
FASTADAM_INLINE void catch_up_row(bool amsgrad, const TensorArgs& tensor, int64_t from, int64_t at, int64_t size,
                                  const StepScalars<T>& s) {
  const StaleRows& stale = *tensor.stale;
  if (stale.forms != nullptr && stale.now - from > kShortGap) {
    const ClosedForm& form = stale.forms[stale.places[from]];
    const auto jump = amsgrad ? jump_row<true, Storage, T> : jump_row<false, Storage, T>;
    if (form.exists) return jump(form, tensor, at, size, s);
  }
  (amsgrad ? replay_row<true, Storage, T> : replay_row<false, Storage, T>)(tensor, from, at, size, s);
}

// Rows that are touched, laid one after the other; of a stale table the steps they missed come first.
template <class Storage>
void adam_touched_rows(const StepArgs& step, const TensorArgs& tensor, int64_t begin, int64_t end) {
  using T = Compute<Storage>;
  const StepScalars<T> s = scalars_of<T>(step);
  const T factor = static_cast<T>(factor_of(step, tensor));
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
    const int64_t place = (tensor.rows == nullptr ? k : tensor.rows->rows[k]) * width + column;
    if (column == 0 && tensor.rows != nullptr) prefetch_row<Storage>(tensor, k);
    if (stale != nullptr && stale->from[k] != stale->now) {
      catch_up_row<Storage>(step.amsgrad, tensor, stale->from[k], place, size, s);
    }
    if (tensor.grad != nullptr) {
      sum(tensor, k, column, size, s.clip_value, factor, sums);
      touch(tensor, place, size, sums, keep, s);
    }
    at += size;
  }
}

}  // namespace
}  // namespace fastadam::cpu::FASTADAM_ISA
