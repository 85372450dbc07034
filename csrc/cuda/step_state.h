// SPDX-License-Identifier: Apache-2.0
// The state that the launches of a step share on the device, and the kernels that begin a step.
#pragma once

#include "../core/step_scalars.h"

namespace fastadam::cuda {

// Every launch of a step reads this state. After `skip` is set, no launch writes to variables or slots.
struct StepState {
  int64_t step;      // t of the current step, or of the last one if none is running
  bool failed;       // a row index was invalid: every step is skipped until the host has raised the error
  bool is_reported;  // the failure is in the Report
  bool skip;         // this step writes nothing
  double unscale;    // multiplies the factors of the gradients: 1 / grad_scale if the scale is on the device, or 1
  StepScalars<float> scalars_f32;
  StepScalars<double> scalars_f64;
};

template <class T>
FASTADAM_INLINE const StepScalars<T>& scalars_of(const StepState& state) {
  if constexpr (sizeof(T) == 8) {
    return state.scalars_f64;
  } else {
    return state.scalars_f32;
  }
}

// What the device reports to the host, in host memory that the device can write to.
struct Report {
  int64_t failed;  // 1: an index was invalid
  int64_t call;    // the caller's counter before the step with that index
  int64_t source;  // which array of indices: a number that the host passed
  int64_t position;
  int64_t index;
  int64_t not_finite;  // 1: in the last step with require_finite a gradient was not finite
};

// Makes all earlier writes visible to the host before any later write.
FASTADAM_INLINE void fence_for_host() {
#if defined(__CUDA_ARCH__)
  __threadfence_system();
#endif
}

// Numbers of a step that are stored on the device, where every step reads them again. Null: the host has passed them.
struct DeviceNumbers {
  const void* rate = nullptr;  // one float32 or float64, used instead of hyper.learning_rate
  bool rate_is_double = false;
  const float* grad_scale = nullptr;  // the gradients were multiplied by it
  const float* found_inf = nullptr;   // this step is skipped if it is not 0
  bool counts = false;                // t is the t of the last step plus 1, not hyper.step

  FASTADAM_INLINE double unscale() const {
    return grad_scale == nullptr ? 1.0 : 1.0 / static_cast<double>(*grad_scale);
  }
  FASTADAM_INLINE bool skips() const { return found_inf != nullptr && *found_inf != 0; }
};

constexpr int64_t kSameStep = -1;  // t stays as it is, for work other than a step

// A skipped step leaves t at its previous value. After an invalid index has been reported, no step changes t.
FASTADAM_INLINE void begin_step(StepState& state, Report& report, int64_t step, int64_t call,
                                const DeviceNumbers& numbers) {
  state.skip = state.failed || numbers.skips();
  if (step != kSameStep && !(state.failed && state.is_reported)) state.step = state.skip ? step - 1 : step;
  state.unscale = numbers.unscale();
  if (!state.failed || state.is_reported) return;
  state.is_reported = true;
  report.call = call;
  fence_for_host();
  report.failed = 1;
}

// Begins a step whose numbers the host has computed.
struct BeginStep {
  static constexpr int kThreads = 1;
  struct Shared {};
  StepState* state;
  Report* report;
  int64_t step;
  int64_t call;
  StepScalars<float> scalars_f32;
  StepScalars<double> scalars_f64;
  DeviceNumbers numbers;  // without a rate and without `counts`
  double clip_value;      // this and the next are of AdamHyper, and read only if there is a grad_scale
  double gradient_scale;

  FASTADAM_INLINE int phases() const { return 1; }
  FASTADAM_INLINE void phase(int, int64_t, int64_t, Shared&) const {
    state->scalars_f32 = scalars_f32;
    state->scalars_f64 = scalars_f64;
    begin_step(*state, *report, step, call, numbers);
    if (numbers.grad_scale == nullptr) return;
    const double raw_clip = clip_value / (gradient_scale * state->unscale);
    state->scalars_f32.clip_value = static_cast<float>(raw_clip);
    state->scalars_f64.clip_value = raw_clip;
  }
};

// beta_1^t and beta_2^t for t from 0 to count - 1. For larger t, 1 - beta^t rounds to 1.
template <class T>
struct Powers {
  const T* of_1;
  const T* of_2;
  int64_t count;

  FASTADAM_INLINE T at(const T* of, int64_t step) const { return step < count ? of[step] : T(0); }
};

// Begins a step whose numbers the host cannot compute, because the device counts t or stores the rate.
struct AdvanceStep {
  static constexpr int kThreads = 1;
  struct Shared {};
  StepState* state;
  Report* report;
  int64_t call;
  AdamHyper hyper;
  DeviceNumbers numbers;
  bool is_captured;  // in a graph, whose steps report t - 1 instead of `call`
  Powers<float> powers_f32;
  Powers<double> powers_f64;
  bool has_f32;  // some variable has arithmetic in float32
  bool has_f64;

  FASTADAM_INLINE int phases() const { return 1; }
  FASTADAM_INLINE void phase(int, int64_t, int64_t, Shared&) const {
    AdamHyper now = hyper;
    if (numbers.counts) now.step = state->step + 1;
    now.gradient_scale = hyper.gradient_scale * numbers.unscale();
    if (has_f32 && !now.epsilon_corrected) state->scalars_f32 = scalars(now, powers_f32);
    if (has_f32 && now.epsilon_corrected) state->scalars_f32 = rounded<float>(scalars(now, powers_f64));
    if (has_f64) state->scalars_f64 = scalars(now, powers_f64);
    begin_step(*state, *report, now.step, is_captured ? now.step - 1 : call, numbers);
  }

 private:
  template <class T>
  FASTADAM_INLINE StepScalars<T> scalars(const AdamHyper& now, const Powers<T>& powers) const {
    T learning_rate = static_cast<T>(now.learning_rate);
    if (numbers.rate != nullptr) {
      learning_rate = numbers.rate_is_double ? static_cast<T>(*static_cast<const double*>(numbers.rate))
                                             : static_cast<T>(*static_cast<const float*>(numbers.rate));
    }
    return step_scalars_of<T>(now, learning_rate, powers.at(powers.of_1, now.step), powers.at(powers.of_2, now.step));
  }
};

}  // namespace fastadam::cuda
