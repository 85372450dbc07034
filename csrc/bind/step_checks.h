// SPDX-License-Identifier: Apache-2.0
// Numbers that are good in double but not in the arithmetic of the variables: 1 - 1e-10 is 1 in float32.
#pragma once

#include <pybind11/pybind11.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "../core/step_args.h"

namespace fastadam::bind {

template <class T>
void require_usable(const AdamHyper& hyper, const StepScalars<T>& scalars) {
  const std::string type = sizeof(T) == 4 ? " in float32" : " in float64";
  const auto refuse = [](const std::string& what) { throw pybind11::value_error(what); };
  if (!(scalars.one_minus_beta_1 > 0))
    refuse("beta_1: " + std::to_string(hyper.beta_1) + " is 1" + type + ", expected less");
  if (!(scalars.one_minus_beta_2 > 0))
    refuse("beta_2: " + std::to_string(hyper.beta_2) + " is 1" + type + ", expected less");
  if (!(scalars.epsilon >= std::numeric_limits<T>::min())) {
    refuse("epsilon: so small that it is flushed to zero" + type + ", expected at least " +
           (sizeof(T) == 4 ? "1.2e-38" : "2.3e-308"));
  }
  if (!std::isfinite(scalars.epsilon)) refuse("epsilon: infinite" + type + ", expected a finite number");
  if (!std::isfinite(scalars.alpha)) {
    refuse("learning_rate: with this decay the step size is not finite" + type + ", expected a finite step size");
  }
  if (!std::isfinite(scalars.keep)) refuse("weight_decay: infinite" + type + ", expected a finite number");
}

// For each arithmetic that occurs among the tensors.
inline void require_usable(const AdamHyper& hyper, const StepArgs& args, const std::vector<TensorArgs>& tensors) {
  bool has_double = false;
  bool has_single = false;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const bool is_double = tensors[i].dtype == DType::kFloat64;
    (is_double ? has_double : has_single) = true;
    if (!is_double && !std::isfinite(static_cast<float>(tensors[i].grad_factor))) {
      throw pybind11::value_error("grad_factor[" + std::to_string(i) +
                                  "]: infinite in float32, expected a finite number");
    }
  }
  if (has_single) require_usable(hyper, args.scalars_f32);
  if (has_double) require_usable(hyper, args.scalars_f64);
}

}  // namespace fastadam::bind
