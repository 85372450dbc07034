// SPDX-License-Identifier: Apache-2.0
// Part of kernels.cpp and included by nothing else: the loops over variables with dense gradients.
#pragma once

#include "../core/adam_math.h"
#include "../core/split.h"
#include "lanes.h"

namespace fastadam::cpu::FASTADAM_ISA {
namespace {

template <bool kAmsgrad, int kTransform, class T>
FASTADAM_INLINE void update_elements(const Operands<T>& operands, int64_t size, const StepScalars<T>& s,
                                     FactorPair<T> factor, T keep) {
  // The caller has checked that arrays written here overlap no other array.
  T* __restrict var = operands.var;
  const T* __restrict grad = operands.grad;
  T* __restrict m = operands.m;
  T* __restrict v = operands.v;
  T* __restrict vhat = operands.vhat;
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    T g = grad[i];
    T var_i = var[i];
    if constexpr (kTransform != kAsItIs) g = transform_gradient(g, s.clip_value, factor);
    if constexpr (kTransform == kAndL2) g = add_l2(g, var_i, s.l2);
    T m_i = m[i];
    T v_i = v[i];
    T vhat_i = kAmsgrad ? vhat[i] : T(0);
    adam_update<kAmsgrad>(var_i, g, m_i, v_i, vhat_i, keep, s);
    var[i] = var_i;
    m[i] = m_i;
    v[i] = v_i;
    if constexpr (kAmsgrad) vhat[i] = vhat_i;
  }
}

// Updates any number of elements. Takes separate pointers, which are passed in registers: a list may have a thousand
// small tensors.
template <class T>
using UpdateRange = void (*)(T* var, const T* grad, T* m, T* v, T* vhat, int64_t size, const StepScalars<T>& scalars,
                             FactorPair<T> factor, T keep, bool prefetch);

template <bool kAmsgrad, int kTransform, class T>
void update_range(T* var, const T* grad, T* m, T* v, T* vhat, int64_t size, const StepScalars<T>& scalars,
                  FactorPair<T> factor, T keep, bool prefetch) {
  const StepScalars<T> s = scalars;
  int64_t at = 0;
  for (; prefetch && at + kBlock <= size; at += kBlock) {
    prefetch_block(sizeof(T), var + at, grad + at, m + at, v + at);
    if constexpr (kAmsgrad) prefetch_block(sizeof(T), vhat + at);
    update_elements<kAmsgrad, kTransform>(
        Operands<T>{var + at, grad + at, m + at, v + at, kAmsgrad ? vhat + at : nullptr}, kBlock, s, factor, keep);
  }
  update_elements<kAmsgrad, kTransform>(
      Operands<T>{var + at, grad + at, m + at, v + at, kAmsgrad ? vhat + at : nullptr}, size - at, s, factor, keep);
}

// Returns the loop for the options of a step. All types of arrays share these loops.
template <class T>
UpdateRange<T> update_for(const StepArgs& step) {
  static constexpr UpdateRange<T> kUpdates[2][kTransformCount] = {
      {update_range<false, kAsItIs, T>, update_range<false, kClipAndFactor, T>, update_range<false, kAndL2, T>},
      {update_range<true, kAsItIs, T>, update_range<true, kClipAndFactor, T>, update_range<true, kAndL2, T>}};
  return kUpdates[step.amsgrad][step.transform];
}

// The elements of a gradient of another type that are converted at a time.
constexpr int64_t kPart = 256;

// From this many elements on, it pays to start at a cache line: then no vector of the variable, or of an array with the
// same alignment, straddles two lines.
constexpr int64_t kLong = 512;

// The number of elements before the first cache line of a long variable; 0 for a short one.
template <class Storage>
FASTADAM_INLINE int64_t elements_to_begin(const Storage* var, int64_t size) {
  return size <= kLong ? 0 : elements_to_line(reinterpret_cast<uintptr_t>(var), sizeof(Storage));
}

// Updates a float32 or float64 variable.
template <class T>
__attribute__((noinline)) void adam_dense(const StepArgs& step, const TensorArgs& tensor, int64_t begin, int64_t end) {
  const StepScalars<T>& s = scalars_of<T>(step);
  const FactorPair<T> factor = factor_of<T>(step, tensor);
  const T keep = tensor.decays ? s.keep : T(1);
  const UpdateRange<T> update = update_for<T>(step);
  const auto update_part = [&](const T* grad, int64_t at, int64_t size, bool prefetch) {
    T* vhat = tensor.vhat == nullptr ? nullptr : static_cast<T*>(tensor.vhat) + at;
    update(static_cast<T*>(tensor.var) + at, grad, static_cast<T*>(tensor.m) + at, static_cast<T*>(tensor.v) + at, vhat,
           size, s, factor, keep, prefetch);
  };
  if (tensor.grad_dtype != tensor.dtype) {
    for (int64_t at = begin; at < end; at += kPart) {
      const int64_t size = end - at < kPart ? end - at : kPart;
      T room[kPart];
      update_part(gradient_of(tensor, at, size, room), at, size, step.prefetch);
    }
    return;
  }
  const T* grad = static_cast<const T*>(tensor.grad);
  const int64_t first = elements_to_begin(static_cast<const T*>(tensor.var) + begin, end - begin);
  if (first > 0) update_part(grad + begin, begin, first, false);
  update_part(grad + begin + first, begin + first, end - begin - first, step.prefetch);
}

// Returns kBlock elements as floats: the elements themselves, or a copy in `room` that put_floats() rounds back.
FASTADAM_INLINE float* floats_of(float* from, float* /*room*/) { return from; }
FASTADAM_INLINE const float* floats_of(const float* from, float* /*room*/) { return from; }
template <class Half>
FASTADAM_INLINE float* floats_of(const Half* from, float* room) {
  convert_here(from, room, kBlock);
  return room;
}
FASTADAM_INLINE void put_floats(const float* /*from*/, float* /*to*/) {}
template <class Half>
FASTADAM_INLINE void put_floats(const float* from, Half* to) {
  convert_here(from, to, kBlock);
}

// Updates kBlock elements of a half type: converts them to float, and rounds the results.
template <bool kAmsgrad, int kTransform, class Half, class Grad, class Slot>
FASTADAM_INLINE void update_half(Half* var, const Grad* grad, Slot* m, Slot* v, Slot* vhat, const StepScalars<float>& s,
                                 FactorPair<float> factor, float keep) {
  float room[5][kBlock];
  convert_here(var, room[0], kBlock);
  const Operands<float> floats{room[0], floats_of(grad, room[1]), floats_of(m, room[2]), floats_of(v, room[3]),
                               kAmsgrad ? floats_of(vhat, room[4]) : nullptr};
  update_elements<kAmsgrad, kTransform>(floats, kBlock, s, factor, keep);
  convert_here(room[0], var, kBlock);
  put_floats(floats.m, m);
  put_floats(floats.v, v);
  if constexpr (kAmsgrad) put_floats(floats.vhat, vhat);
}

// Updates fewer than kBlock elements, starting at `at`, for any types of gradient and slots, with the loop for float.
template <class Half>
__attribute__((noinline)) void update_part(const StepArgs& step, const TensorArgs& tensor, int64_t at, int64_t size,
                                           FactorPair<float> factor, float keep) {
  float room[5][kBlock];
  const auto read = [&](const void* array, bool is_half, int i) {
    if (is_half) convert(static_cast<const Half*>(array) + at, room[i], size);
    return is_half ? room[i] : static_cast<float*>(const_cast<void*>(array)) + at;
  };
  void* const slots[] = {tensor.m, tensor.v, tensor.vhat};
  const int slot_count = step.amsgrad ? 3 : 2;
  float* values[3] = {};
  for (int i = 0; i < slot_count; ++i) values[i] = read(slots[i], has_half_moments(tensor), 2 + i);
  const float* grad = read(tensor.grad, tensor.grad_dtype == tensor.dtype, 1);
  update_for<float>(step)(read(tensor.var, true, 0), grad, values[0], values[1], values[2], size, step.scalars_f32,
                          factor, keep, false);
  convert(room[0], static_cast<Half*>(tensor.var) + at, size);
  for (int i = 0; i < slot_count && has_half_moments(tensor); ++i)
    convert(values[i], static_cast<Half*>(slots[i]) + at, size);
}

template <class Half, class Grad, class Slot, bool kAmsgrad, int kTransform>
void adam_half(const StepArgs& step, const TensorArgs& tensor, int64_t begin, int64_t end) {
  const StepScalars<float> s = step.scalars_f32;
  const FactorPair<float> factor = factor_of<float>(step, tensor);
  const float keep = tensor.decays ? s.keep : 1.0f;
  Half* var = static_cast<Half*>(tensor.var);
  const Grad* grad = static_cast<const Grad*>(tensor.grad);
  Slot* m = static_cast<Slot*>(tensor.m);
  Slot* v = static_cast<Slot*>(tensor.v);
  Slot* vhat = static_cast<Slot*>(tensor.vhat);
  int64_t at = begin + elements_to_begin(var + begin, end - begin);
  if (at > begin) update_part<Half>(step, tensor, begin, at - begin, factor, keep);
  for (; at + kBlock <= end; at += kBlock) {
    if (step.prefetch) prefetch_block(sizeof(float), var + at, grad + at, m + at, v + at);
    if (kAmsgrad && step.prefetch) prefetch_block(sizeof(float), vhat + at);
    update_half<kAmsgrad, kTransform>(var + at, grad + at, m + at, v + at, kAmsgrad ? vhat + at : nullptr, s, factor,
                                      keep);
  }
  if (at < end) update_part<Half>(step, tensor, at, end - at, factor, keep);
}

template <class Half, class Grad, class Slot>
constexpr UpdateKernel kHalf[2][kTransformCount] = {
    {adam_half<Half, Grad, Slot, false, kAsItIs>, adam_half<Half, Grad, Slot, false, kClipAndFactor>,
     adam_half<Half, Grad, Slot, false, kAndL2>},
    {adam_half<Half, Grad, Slot, true, kAsItIs>, adam_half<Half, Grad, Slot, true, kClipAndFactor>,
     adam_half<Half, Grad, Slot, true, kAndL2>}};

// Updates a variable of a half type. Its gradient and its slots have the same type or are float.
template <class Half>
__attribute__((noinline)) void adam_dense_half(const StepArgs& step, const TensorArgs& tensor, int64_t begin,
                                               int64_t end) {
  const auto& kernels = has_half_moments(tensor)            ? kHalf<Half, Half, Half>
                        : tensor.grad_dtype == tensor.dtype ? kHalf<Half, Half, float>
                                                            : kHalf<Half, float, float>;
  kernels[step.amsgrad][step.transform](step, tensor, begin, end);
}

}  // namespace
}  // namespace fastadam::cpu::FASTADAM_ISA
