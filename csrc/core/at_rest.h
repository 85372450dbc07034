// SPDX-License-Identifier: Apache-2.0
// Replays the steps that a row has missed, until its variable cannot change any more.
#pragma once

#include <cmath>

#include "adam_math.h"
#include "step_args.h"

namespace fastadam {

FASTADAM_INLINE uint32_t bits_of(float x) { return bit_cast<uint32_t>(x); }
FASTADAM_INLINE uint64_t bits_of(double x) { return bit_cast<uint64_t>(x); }

// By how much any later step without a gradient may change an element, if m / sqrt(second_moment) only falls from now
// on.
template <class T>
FASTADAM_INLINE T largest_change(T m, T second_moment, T peak, T epsilon) {
  using std::sqrt;
  constexpr T kMargin = T(1) + T(0x1p-20);
  return (m * peak) / (sqrt(second_moment) + epsilon) * kMargin;
}

// Whether no later step without a gradient can change this element: the largest rate to come times m / sqrt(v), which
// only falls from now on, is lost in rounding. The product comes first, as in adam_move, because the quotient alone may
// be flushed to zero. A -0 is never at rest: a change of -0 turns it into +0.
template <bool kAmsgrad, class Storage, class T>
FASTADAM_INLINE bool is_at_rest(T var, T m, T v, T vhat, T peak, T epsilon) {
  const T change = largest_change(m, kAmsgrad ? vhat : v, peak, epsilon);
  return bits_of(load(store<Storage>(var - change))) == bits_of(var) &&
         bits_of(load(store<Storage>(var + change))) == bits_of(var);
}

// The largest |alpha| of the steps [from, now), possibly including a few earlier steps.
template <class T>
FASTADAM_INLINE T peak_from(const StaleRows& stale, int64_t from) {
  const T* peaks = static_cast<const T*>(stale.peaks);
  T peak = T(0);
  for (int64_t i = from / kPeakSteps; i * kPeakSteps < stale.now; ++i) peak = peaks[i] > peak ? peaks[i] : peak;
  return peak;
}

// Whether a step leaves elements as they are whose moments are +0. A displacement of -0 turns a variable of -0 into +0,
// and an infinite rate makes NaN.
template <class T>
FASTADAM_INLINE bool leaves_zeros(T alpha, T keep) {
  const bool is_negative = bits_of(alpha) >> (8 * sizeof(T) - 1) != 0;
  return keep == T(1) && !is_negative && alpha - alpha == T(0);
}

// Calls make_step(alpha, keep) for the steps [from, now) of the history, in which the row had no gradient. If the
// history permits stopping, asks all_at_rest(peak) after every few steps, and stops when it is true. Returns the number
// of steps of the history that the variable has had; in the remaining ones only the moments decay, which is left to the
// caller.
template <class T, class MakeStep, class AllAtRest>
FASTADAM_INLINE int64_t replay_steps(const StaleRows& stale, int64_t from, MakeStep make_step, AllAtRest all_at_rest) {
  constexpr int64_t kCheckSteps = 8;
  const T* alphas = static_cast<const T*>(stale.alphas);
  const T* keeps = static_cast<const T*>(stale.keeps);
  const T peak = stale.may_stop ? peak_from<T>(stale, from) : T(0);
  int64_t step = from;
  while (step < stale.now) {
    const int64_t stop = stale.now - step < kCheckSteps ? stale.now : step + kCheckSteps;
    for (; step < stop; ++step) make_step(alphas[step], keeps[step]);
    if (stale.may_stop && all_at_rest(peak)) break;
  }
  return step;
}

}  // namespace fastadam
