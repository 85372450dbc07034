// SPDX-License-Identifier: Apache-2.0
// The scalars of one step. They are computed once per step, in the arithmetic of the variable's dtype, as TF does.
#pragma once

#include <cmath>
#include <cstdint>

#include "dtypes.h"

namespace fastadam {

using AdamHyper = fastadam_hyper;  // in the order of StepHyper in python/fastadam/_core/hyper.py

// The value clip for a gradient as it was passed, before gradient_scale.
FASTADAM_INLINE double raw_clip_value(const AdamHyper& hyper) { return hyper.clip_value / hyper.gradient_scale; }

template <class T>
struct StepScalars {
  T alpha;      // learning_rate * sqrt(1 - beta_2^t) / (1 - beta_1^t)
  T row_alpha;  // learning_rate * (sqrt(1 - beta_2^t) / (1 - beta_1^t)), for IndexedSlices
  T beta_1;
  T beta_2;
  T one_minus_beta_1;
  T one_minus_beta_2;
  T epsilon;
  T clip_value;  // raw_clip_value
  T keep;        // 1 - weight_decay * learning_rate
  T ema_momentum;
  T l2;
};

// In float32 this matches TF bit for bit: powf of libm, every operation rounded to float, from left to right
// (tensorflow/core/kernels/training_ops.cc, ApplyAdamNonCuda; Keras optimizer_v2 `_decayed_lr`). `power_1` and
// `power_2` are beta_1^t and beta_2^t; a GPU reads them from tables, because its `pow` rounds differently.
template <class T>
FASTADAM_INLINE StepScalars<T> step_scalars_of(const AdamHyper& hyper, T learning_rate, T power_1, T power_2) {
  using std::sqrt;
  const T one(1);
  if (hyper.decay > 0) {
    learning_rate = learning_rate / (one + static_cast<T>(hyper.decay) * static_cast<T>(hyper.step - 1));
  }
  StepScalars<T> scalars;
  const T root = sqrt(one - power_2);
  const T correction = one - power_1;
  scalars.alpha = learning_rate * root / correction;
  scalars.row_alpha = learning_rate * (root / correction);
  scalars.beta_1 = static_cast<T>(hyper.beta_1);
  scalars.beta_2 = static_cast<T>(hyper.beta_2);
  scalars.one_minus_beta_1 = one - scalars.beta_1;
  scalars.one_minus_beta_2 = one - scalars.beta_2;
  scalars.epsilon = hyper.epsilon_corrected ? static_cast<T>(hyper.epsilon) * root : static_cast<T>(hyper.epsilon);
  scalars.clip_value = static_cast<T>(raw_clip_value(hyper));
  scalars.keep = one - static_cast<T>(hyper.weight_decay) * learning_rate;
  scalars.ema_momentum = static_cast<T>(hyper.ema_momentum);
  scalars.l2 = static_cast<T>(hyper.l2);
  return scalars;
}

// Rounds scalars that were computed in double once, as PyTorch does; used with PyTorch's epsilon.
template <class T>
FASTADAM_INLINE StepScalars<T> rounded(const StepScalars<double>& s) {
  return {static_cast<T>(s.alpha),
          static_cast<T>(s.row_alpha),
          static_cast<T>(s.beta_1),
          static_cast<T>(s.beta_2),
          static_cast<T>(s.one_minus_beta_1),
          static_cast<T>(s.one_minus_beta_2),
          static_cast<T>(s.epsilon),
          static_cast<T>(s.clip_value),
          static_cast<T>(s.keep),
          static_cast<T>(s.ema_momentum),
          static_cast<T>(s.l2)};
}

template <class T>
StepScalars<T> make_step_scalars(const AdamHyper& hyper) {
  if (sizeof(T) == 4 && hyper.epsilon_corrected) return rounded<T>(make_step_scalars<double>(hyper));
  const T step = static_cast<T>(hyper.step);
  return step_scalars_of<T>(hyper, static_cast<T>(hyper.learning_rate), std::pow(static_cast<T>(hyper.beta_1), step),
                            std::pow(static_cast<T>(hyper.beta_2), step));
}

}  // namespace fastadam
