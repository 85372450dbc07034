// SPDX-License-Identifier: Apache-2.0
// Part of kernels.cpp and included by nothing else: one step of some columns of a row, with its gradient or without.
#pragma once

#include "../core/adam_math.h"
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

}  // namespace
}  // namespace fastadam::cpu::FASTADAM_ISA
