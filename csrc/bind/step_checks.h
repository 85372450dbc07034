// SPDX-License-Identifier: Apache-2.0
// Numbers that are good in double but not in the arithmetic of the variables: 1 - 1e-10 is 1 in float32.
#pragma once

#include <pybind11/pybind11.h>

#include <cmath>
#include <limits>
#include <string>

#include "../core/step_scalars.h"

namespace fastadam::bind {

// The scalars of a step in the arithmetic T; a ValueError if a number is lost in it.
template <class T>
StepScalars<T> usable_scalars(const AdamHyper& hyper) {
  const StepScalars<T> scalars = make_step_scalars<T>(hyper);
  const auto refuse = [](const std::string& what, const std::string& expected) {
    throw pybind11::value_error(what + (sizeof(T) == 4 ? " in float32" : " in float64") + ", expected " + expected);
  };
  if (!(scalars.one_minus_beta_1 > 0)) refuse("beta_1: " + std::to_string(hyper.beta_1) + " is 1", "less");
  if (!(scalars.one_minus_beta_2 > 0)) refuse("beta_2: " + std::to_string(hyper.beta_2) + " is 1", "less");
  const bool is_none = hyper.epsilon_corrected && hyper.epsilon == 0;  // which PyTorch permits
  if (!is_none && !(scalars.epsilon >= std::numeric_limits<T>::min())) {
    refuse("epsilon: so small that it is flushed to zero", sizeof(T) == 4 ? "at least 1.2e-38" : "at least 2.3e-308");
  }
  if (!std::isfinite(scalars.epsilon)) refuse("epsilon: infinite", "a finite number");
  if (!std::isfinite(scalars.alpha) || !std::isfinite(scalars.row_alpha)) {
    refuse("learning_rate: with this decay the step size is not finite", "a finite step size");
  }
  if (!std::isfinite(scalars.l2)) refuse("l2: infinite", "a finite number");
  if (!std::isfinite(scalars.keep)) refuse("weight_decay: infinite", "a finite number");
  return scalars;
}

}  // namespace fastadam::bind
