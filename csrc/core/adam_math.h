// SPDX-License-Identifier: Apache-2.0
// The update rule of Adam and AMSGrad: the only copy in C++, for host and device.
// It uses only + - * / sqrt and comparisons, each correctly rounded and never contracted, so that every instruction
// set, thread count and device gives the same bits. The order of operations matches TensorFlow's CPU kernels.
#pragma once

#include <cmath>

#include "dtypes.h"
#include "factor.h"
#include "step_scalars.h"

namespace fastadam {

// NaN passes through both comparisons.
template <class T>
FASTADAM_INLINE T clip_by_value(T g, T clip_value) {
  g = clip_value < g ? clip_value : g;
  return g < -clip_value ? -clip_value : g;
}

template <class T>
FASTADAM_INLINE T multiply(T g, FactorPair<T> factor) {
  return g * factor.first * factor.second;
}

// Clips by value, then multiplies by the factor of norm clipping and loss scaling (the order of TF >= 2.4).
template <class T>
FASTADAM_INLINE T transform_gradient(T g, T clip_value, FactorPair<T> factor) {
  return multiply(clip_by_value(g, clip_value), factor);
}

// Coupled weight decay (PyTorch's Adam), applied after the clip and the factor.
template <class T>
FASTADAM_INLINE T add_l2(T g, T var, T l2) {
  return g + l2 * var;
}

// AMSGrad's second moment: the maximum. If v is NaN the old value stays, as in TF.
template <class T>
FASTADAM_INLINE T raise_vhat(T& vhat, T v) {
  vhat += T(0);  // flushes a denormal, which some instructions would otherwise compare unflushed
  vhat = v > vhat ? v : vhat;
  return vhat;
}

// A moment moves towards `target` by the share 1 - beta, as for dense gradients; without a gradient the target is 0.
template <class T>
FASTADAM_INLINE T moved_moment(T moment, T target, T one_minus_beta) {
  return moment + (target - moment) * one_minus_beta;
}

// What a step without a gradient leaves of a moment by the rule for IndexedSlices.
template <class T>
FASTADAM_INLINE T decayed_moment(T moment, T beta) {
  return moment * beta;
}

// What the moments subtract from an element of a variable. Only AMSGrad reads and writes `vhat`.
template <bool kAmsgrad, class T>
FASTADAM_INLINE T adam_displacement(T m, T v, T& vhat, T alpha, T epsilon) {
  using std::sqrt;
  T second_moment = v;
  if constexpr (kAmsgrad) second_moment = raise_vhat(vhat, v);
  return (m * alpha) / (sqrt(second_moment) + epsilon);
}

// Updates one element of a variable from its moments, and returns the displacement. `keep` is 1 without weight decay,
// which leaves every bit unchanged.
template <bool kAmsgrad, class T>
FASTADAM_INLINE T adam_move(T& var, T m, T v, T& vhat, T keep, T alpha, T epsilon) {
  const T displacement = adam_displacement<kAmsgrad>(m, v, vhat, alpha, epsilon);
  var = var * keep - displacement;
  return displacement;
}

// Updates one element that has a dense gradient, and returns its displacement.
template <bool kAmsgrad, class T>
FASTADAM_INLINE T adam_update(T& var, T g, T& m, T& v, T& vhat, T keep, const StepScalars<T>& s) {
  m = moved_moment(m, g, s.one_minus_beta_1);
  v = moved_moment(v, g * g, s.one_minus_beta_2);
  return adam_move<kAmsgrad>(var, m, v, vhat, keep, s.alpha, s.epsilon);
}

// Updates one element of a row in TF's order of operations for IndexedSlices. `kTouched`: the row has a gradient.
// Otherwise no zero is added, because it would turn a moment that has decayed to -0 into +0.
template <bool kAmsgrad, bool kTouched, class T>
FASTADAM_INLINE void adam_update_row(T& var, T g, T& m, T& v, T& vhat, T keep, const StepScalars<T>& s) {
  m = decayed_moment(m, s.beta_1);
  v = decayed_moment(v, s.beta_2);
  if constexpr (kTouched) {
    m += g * s.one_minus_beta_1;
    v += (g * g) * s.one_minus_beta_2;
  }
  adam_move<kAmsgrad>(var, m, v, vhat, keep, s.row_alpha, s.epsilon);
}

// The exponential moving average of a variable, in Keras 3's order of operations.
template <class T>
FASTADAM_INLINE T moving_average(T average, T var, T momentum) {
  return momentum * average + (T(1) - momentum) * var;
}

}  // namespace fastadam
