// SPDX-License-Identifier: Apache-2.0
// What the launches of a step share on the device, and the launch that begins it.
#pragma once

#include "../core/step_scalars.h"

namespace fastadam::cuda {

// Every launch of a step reads it; none writes to variables or slots once `skip` is set.
struct StepState {
  int64_t step;    // t of the last step that was made, or of the one that is being made
  bool failed;     // an invalid row index was found: no step moves anything until the host has raised the error
  bool told;       // and the host has been told
  bool skip;       // nothing of this step is written
  double unscale;  // multiplies the factors of its gradients: 1 / grad_scale, where that lies on the device
  StepScalars<float> single;
  StepScalars<double> twice;
};

template <class T>
FASTADAM_INLINE const StepScalars<T>& scalars_of(const StepState& state) {
  if constexpr (sizeof(T) == 8) {
    return state.twice;
  } else {
    return state.single;
  }
}

// What the device tells the host, in memory of the host that the device can write to.
struct Report {
  int64_t failed;  // 1: an index is not a row
  int64_t call;    // what the caller's counter was before the step that met it
  int64_t source;  // of the indices, as the host calls it
  int64_t position;
  int64_t index;
  int64_t not_finite;  // 1: a gradient of the last step that required it was not
};

// What is written before is seen by the host before what is written after.
FASTADAM_INLINE void fence_for_host() {
#if defined(__CUDA_ARCH__)
  __threadfence_system();
#endif
}

// Numbers of a step that lie on the device, where each step reads them anew; null: the host has said them.
struct DeviceNumbers {
  const void* rate = nullptr;  // one float32 or float64, in the place of hyper.learning_rate
  bool rate_is_double = false;
  const float* grad_scale = nullptr;  // what the gradients have been multiplied by
  const float* found_inf = nullptr;   // not 0: this step is skipped
  bool counts = false;                // t is that of the last step and one more, not hyper.step

  FASTADAM_INLINE double unscale() const {
    return grad_scale == nullptr ? 1.0 : 1.0 / static_cast<double>(*grad_scale);
  }
  FASTADAM_INLINE bool skips() const { return found_inf != nullptr && *found_inf != 0; }
};

constexpr int64_t kSameStep = -1;  // t stays as it is: no step, but something before or between them

// A step that is skipped leaves t at that of the step before it; those behind an index that was no row leave it alone.
FASTADAM_INLINE void begin_step(StepState& state, Report& report, int64_t step, int64_t call,
                                const DeviceNumbers& numbers) {
  state.skip = state.failed || numbers.skips();
  if (step != kSameStep && !(state.failed && state.told)) state.step = state.skip ? step - 1 : step;
  state.unscale = numbers.unscale();
  if (!state.failed || state.told) return;
  state.told = true;
  report.call = call;
  fence_for_host();
  report.failed = 1;
}

// The numbers of a step, as the host computed them.
struct BeginStep {
  static constexpr int kThreads = 1;
  struct Shared {};
  StepState* state;
  Report* report;
  int64_t step;
  int64_t call;
  StepScalars<float> single;
  StepScalars<double> twice;
  DeviceNumbers numbers;  // but for the rate and t
  double clip_value;      // of AdamHyper, likewise: read if there is a grad_scale
  double gradient_scale;

  FASTADAM_INLINE int phases() const { return 1; }
  FASTADAM_INLINE void phase(int, int64_t, int64_t, Shared&) const {
    state->single = single;
    state->twice = twice;
    begin_step(*state, *report, step, call, numbers);
    if (numbers.grad_scale == nullptr) return;
    const double raw_clip = clip_value / (gradient_scale * state->unscale);
    state->single.clip_value = static_cast<float>(raw_clip);
    state->twice.clip_value = raw_clip;
  }
};

// beta_1^t and beta_2^t for t = 0 to count - 1; after them 1 - beta^t rounds to 1.
template <class T>
struct Powers {
  const T* of_1;
  const T* of_2;
  int64_t count;

  FASTADAM_INLINE T at(const T* of, int64_t step) const { return step < count ? of[step] : T(0); }
};

// The numbers of a step that the host cannot compute: t is counted by the device, or the rate lies there.
struct AdvanceStep {
  static constexpr int kThreads = 1;
  struct Shared {};
  StepState* state;
  Report* report;
  int64_t call;
  AdamHyper hyper;
  DeviceNumbers numbers;
  bool is_captured;  // in a graph, whose steps report t in the place of `call`
  Powers<float> singles;
  Powers<double> doubles;
  bool has_single;
  bool has_double;

  FASTADAM_INLINE int phases() const { return 1; }
  FASTADAM_INLINE void phase(int, int64_t, int64_t, Shared&) const {
    AdamHyper now = hyper;
    if (numbers.counts) now.step = state->step + 1;
    now.gradient_scale = hyper.gradient_scale * numbers.unscale();
    if (has_single && !now.epsilon_corrected) state->single = scalars(now, singles);
    if (has_single && now.epsilon_corrected) state->single = rounded<float>(scalars(now, doubles));
    if (has_double) state->twice = scalars(now, doubles);
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
