// SPDX-License-Identifier: Apache-2.0
// What the launches of a step share on the device, and the launch that begins it.
#pragma once

#include "../core/step_scalars.h"

namespace fastadam::cuda {

// Every launch of a step reads it; none writes to variables or slots once `skip` is set.
struct StepState {
  int64_t step;     // t, from 1
  int64_t replays;  // steps made by graphs
  bool failed;      // an index was found that is no row: nothing moves any more until the host has raised it
  bool told;        // and the host has been told
  bool skip;        // nothing of this step is written
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
  int64_t failed;  // 1: an index is no row
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

constexpr int64_t kSameStep = -1;  // t stays as it is: no step, but something before or between them

FASTADAM_INLINE void begin_step(StepState& state, Report& report, int64_t step, int64_t call) {
  if (step != kSameStep) state.step = step;
  state.skip = state.failed;
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

  FASTADAM_INLINE int phases() const { return 1; }
  FASTADAM_INLINE void phase(int, int64_t, int64_t, Shared&) const {
    state->single = single;
    state->twice = twice;
    begin_step(*state, *report, step, call);
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

// The numbers of a step that the host does not know: of a CUDA graph, in which t is that of the step before and one
// more, or with a rate that lies on the device.
struct AdvanceStep {
  static constexpr int kThreads = 1;
  struct Shared {};
  StepState* state;
  Report* report;
  int64_t call;
  AdamHyper hyper;
  bool counts;  // else hyper.step is t
  Powers<float> singles;
  Powers<double> doubles;
  const void* rate;  // or null: hyper.learning_rate
  bool rate_is_double;
  bool has_single;
  bool has_double;

  FASTADAM_INLINE int phases() const { return 1; }
  FASTADAM_INLINE void phase(int, int64_t, int64_t, Shared&) const {
    AdamHyper now = hyper;
    if (counts) now.step = state->skip ? state->step : state->step + 1;
    if (has_single && !now.epsilon_corrected) state->single = numbers(now, singles);
    if (has_single && now.epsilon_corrected) state->single = rounded<float>(numbers(now, doubles));
    if (has_double) state->twice = numbers(now, doubles);
    begin_step(*state, *report, now.step, counts ? now.step - 1 : call);
    if (counts && !state->skip) ++state->replays;
  }

 private:
  template <class T>
  FASTADAM_INLINE StepScalars<T> numbers(const AdamHyper& now, const Powers<T>& powers) const {
    T learning_rate = static_cast<T>(now.learning_rate);
    if (rate != nullptr) {
      learning_rate = rate_is_double ? static_cast<T>(*static_cast<const double*>(rate))
                                     : static_cast<T>(*static_cast<const float*>(rate));
    }
    return step_scalars_of<T>(now, learning_rate, powers.at(powers.of_1, now.step), powers.at(powers.of_2, now.step));
  }
};

}  // namespace fastadam::cuda
