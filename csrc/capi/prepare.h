// SPDX-License-Identifier: Apache-2.0
// Converts checked tensors and hyperparameters to the arguments of the kernels.
#pragma once

#include <cmath>
#include <cstdint>

#include "step_checks.h"

namespace fastadam {

// The number of elements of a variable that a step with this gradient updates.
inline int64_t moved_elements(const TensorArgs& tensor, bool lazy) {
  const bool only_rows = tensor.rows != nullptr && moves_rows_alone(tensor, lazy);
  return only_rows ? tensor.rows->count * tensor.rows->width : tensor.size;
}

// Returns everything that a step needs except its chains. Throws std::invalid_argument if the arithmetic of a tensor
// cannot represent a number. grad_factor must be set.
inline StepArgs prepare_step(const TensorArgs* tensors, int64_t count, const AdamHyper& hyper, bool lazy) {
  StepArgs args{};
  args.lazy = lazy;
  args.ema_overwrite = hyper.ema_overwrite;
  args.zero_gradients = hyper.zero_gradients;
  args.seed = hyper.seed;
  args.number = hyper.step;
  bool has_single = false;
  bool has_double = false;
  bool has_factor =
      std::isfinite(hyper.clip_value) || std::isfinite(hyper.clip_norm) || std::isfinite(hyper.global_clip_norm);
  for (int64_t i = 0; i < count; ++i) {
    args.amsgrad = args.amsgrad || tensors[i].vhat != nullptr;
    (tensors[i].dtype == FASTADAM_FLOAT64 ? has_double : has_single) = true;
    has_factor = has_factor || tensors[i].grad_factor != 1;
  }
  if (has_single) args.scalars_f32 = usable_scalars<float>(hyper);
  if (has_double) args.scalars_f64 = usable_scalars<double>(hyper);
  args.transform = hyper.l2 != 0 ? kAndL2 : has_factor ? kClipAndFactor : kAsItIs;
  return args;
}

}  // namespace fastadam
