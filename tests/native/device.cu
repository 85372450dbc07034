// SPDX-License-Identifier: Apache-2.0
// Compiled where nvcc is found: the update rule and the conversions must stay usable in device code.
#include "../../csrc/core/adam_math.h"
#include "../../csrc/core/closed_form.h"
#include "../../csrc/core/split.h"
#include "../../csrc/cuda/row_bodies.h"

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

// A row that IndexedSlices touch and one that they do not, and the part of a step that a replay shares.
template <class Storage, bool kAmsgrad>
__global__ void update_row(Storage* var, const Storage* grad, fastadam::Compute<Storage>* state,
                           fastadam::StepScalars<fastadam::Compute<Storage>> s, fastadam::Rows rows) {
  using T = fastadam::Compute<Storage>;
  const int64_t place = fastadam::first_row_from(rows, threadIdx.x);
  T var_i = fastadam::load(var[threadIdx.x]);
  if (place < rows.count && rows.rows[place] == threadIdx.x) {
    const T g = fastadam::load(grad[rows.order[rows.starts[place]] * rows.width]);
    fastadam::adam_update_row<kAmsgrad, true>(var_i, g, state[0], state[1], state[2], s.keep, s);
  } else {
    fastadam::adam_update_row<kAmsgrad, false>(var_i, T(0), state[0], state[1], state[2], s.keep, s);
  }
  fastadam::adam_move<kAmsgrad>(var_i, state[0], state[1], state[2], s.keep, s.row_alpha, s.epsilon);
  var[threadIdx.x] = fastadam::store<Storage>(var_i);
}

template __global__ void update_row<fastadam::Float16, true>(fastadam::Float16*, const fastadam::Float16*, float*,
                                                             fastadam::StepScalars<float>, fastadam::Rows);
template __global__ void update_row<fastadam::BFloat16, false>(fastadam::BFloat16*, const fastadam::BFloat16*, float*,
                                                               fastadam::StepScalars<float>, fastadam::Rows);
template __global__ void update_row<float, false>(float*, const float*, float*, fastadam::StepScalars<float>,
                                                  fastadam::Rows);
template __global__ void update_row<double, true>(double*, const double*, double*, fastadam::StepScalars<double>,
                                                  fastadam::Rows);

// Missed steps in closed form, of a rule made on the device.
template <bool kAmsgrad>
__global__ void jump(float* state, const float* rates, fastadam::StepScalars<float> s) {
  fastadam::StepMeasure measure(0.9, 0.999, kAmsgrad);
  for (int i = 0; i < 100; ++i) measure.prepend(rates[i], 1);
  const fastadam::ClosedForm form = measure.closed_form();
  fastadam::adam_jump<kAmsgrad>(state[0], state[1], state[2], state[3], form, s.beta_2, s.epsilon);
}

template __global__ void jump<false>(float*, const float*, fastadam::StepScalars<float>);
template __global__ void jump<true>(float*, const float*, fastadam::StepScalars<float>);

// A launch of rows.
template <class Storage, bool kAmsgrad, bool kTransform>
__global__ void rows(fastadam::cuda::RowStep<Storage, kAmsgrad, kTransform> body) {
  fastadam::cuda::NoShared shared;
  body.phase(0, blockIdx.x, threadIdx.x, shared);
}

template __global__ void rows<fastadam::Float16, true, true>(fastadam::cuda::RowStep<fastadam::Float16, true, true>);
template __global__ void rows<float, false, false>(fastadam::cuda::RowStep<float, false, false>);
template __global__ void rows<double, false, true>(fastadam::cuda::RowStep<double, false, true>);

__global__ void cut(int64_t* n) { *n = fastadam::cut_at_line(16, 4, fastadam::share_begin(*n, 1, 3), *n); }

}  // namespace device_check
