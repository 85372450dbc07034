// SPDX-License-Identifier: Apache-2.0
// The update rule of Adam and AMSGrad: the only copy in C++, for host and device.
// Only + - * / sqrt and comparisons, each correctly rounded and never contracted, so that every ISA, every
// thread count and every device gives the same bits. Order of operations: TensorFlow's CPU kernel.
#pragma once

#include <cmath>

#include "dtypes.h"
#include "step_scalars.h"

namespace fastadam {

// Clip by value, then multiply by the factor that norm clip and loss scale ask for (TF >= 2.4 order).
// NaN passes through both comparisons.
template <class T>
FASTADAM_INLINE T transform_gradient(T g, T clip_value, T factor) {
  g = clip_value < g ? clip_value : g;
  g = g < -clip_value ? -clip_value : g;
  return g * factor;
}

// Coupled weight decay (PyTorch's Adam): after clip and factor.
template <class T>
FASTADAM_INLINE T add_l2(T g, T var, T l2) {
  return g + l2 * var;
}

// AMSGrad's second moment: the maximum, which keeps the old value against a NaN, as TF's does.
template <class T>
FASTADAM_INLINE T raise_vhat(T& vhat, T v) {
  vhat += T(0);  // flushes a denormal; else it would depend on the instruction that compares
  vhat = v > vhat ? v : vhat;
  return vhat;
}

// Moves one variable along its moments. `keep` is 1 without weight decay, and then changes nothing. `vhat` is read and
// written by AMSGrad only.
template <bool kAmsgrad, class T>
FASTADAM_INLINE void adam_move(T& var, T m, T v, T& vhat, T keep, T alpha, T epsilon) {
  using std::sqrt;
  T second_moment = v;
  if constexpr (kAmsgrad) second_moment = raise_vhat(vhat, v);
  var = var * keep - (m * alpha) / (sqrt(second_moment) + epsilon);
}

// One element of a dense gradient.
template <bool kAmsgrad, class T>
FASTADAM_INLINE void adam_update(T& var, T g, T& m, T& v, T& vhat, T keep, const StepScalars<T>& s) {
  m += (g - m) * s.one_minus_beta_1;
  v += (g * g - v) * s.one_minus_beta_2;
  adam_move<kAmsgrad>(var, m, v, vhat, keep, s.alpha, s.epsilon);
}

// One element of a row that IndexedSlices touch, and of one that they do not: TF's other order of operations. A zero
// gradient is not added, or a moment that has decayed to -0 would become +0.
template <bool kAmsgrad, bool kTouched, class T>
FASTADAM_INLINE void adam_update_row(T& var, T g, T& m, T& v, T& vhat, T keep, const StepScalars<T>& s) {
  m *= s.beta_1;
  v *= s.beta_2;
  if constexpr (kTouched) {
    m += g * s.one_minus_beta_1;
    v += (g * g) * s.one_minus_beta_2;
  }
  adam_move<kAmsgrad>(var, m, v, vhat, keep, s.row_alpha, s.epsilon);
}

// Exponential moving average of a variable (Keras 3's order of operations).
template <class T>
FASTADAM_INLINE T moving_average(T average, T var, T momentum) {
  return momentum * average + (T(1) - momentum) * var;
}

}  // namespace fastadam
