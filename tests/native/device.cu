// SPDX-License-Identifier: Apache-2.0
// Compiled where nvcc is found: the update rule and the conversions must stay usable in device code.
#include "../../csrc/core/adam_math.h"
#include "../../csrc/core/split.h"

namespace device_check {

template <class Storage, bool kAmsgrad>
__global__ void update(Storage* var, const Storage* grad, fastadam::Compute<Storage>* state,
                       fastadam::StepScalars<fastadam::Compute<Storage>> s) {
  using T = fastadam::Compute<Storage>;
  const T g = fastadam::transform_gradient(fastadam::load(grad[threadIdx.x]), s.clip_value, T(1));
  T var_i = fastadam::load(var[threadIdx.x]);
  fastadam::adam_update<kAmsgrad>(var_i, g, state[0], state[1], state[2], s.keep, s);
  state[3] = fastadam::moving_average(state[3], var_i, s.ema_momentum);
  var[threadIdx.x] = fastadam::store<Storage>(var_i);
}

template __global__ void update<fastadam::Float16, true>(fastadam::Float16*, const fastadam::Float16*, float*,
                                                         fastadam::StepScalars<float>);
template __global__ void update<fastadam::BFloat16, false>(fastadam::BFloat16*, const fastadam::BFloat16*, float*,
                                                           fastadam::StepScalars<float>);
template __global__ void update<float, true>(float*, const float*, float*, fastadam::StepScalars<float>);
template __global__ void update<double, false>(double*, const double*, double*, fastadam::StepScalars<double>);

__global__ void cut(int64_t* n) { *n = fastadam::cut_at_line(16, 4, fastadam::share_begin(*n, 1, 3), *n); }

}  // namespace device_check
