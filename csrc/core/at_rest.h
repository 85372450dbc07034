// SPDX-License-Identifier: Apache-2.0
// When a row that misses steps need not be moved any more.
#pragma once

#include <cmath>

#include "adam_math.h"
#include "step_args.h"

namespace fastadam {

FASTADAM_INLINE uint32_t bits_of(float x) { return bit_cast<uint32_t>(x); }
FASTADAM_INLINE uint64_t bits_of(double x) { return bit_cast<uint64_t>(x); }

// Whether no later step can move a variable: the largest rate to come, times what m / sqrt(v) is now and never exceeds
// again, is lost in the rounding. Multiplied first, as in adam_move: the quotient alone may be flushed. A -0 never
// rests: a change of -0 makes it +0.
template <bool kAmsgrad, class Storage, class T>
FASTADAM_INLINE bool rests(T var, T m, T v, T vhat, T peak, T epsilon) {
  using std::sqrt;
  constexpr T kMargin = T(1) + T(0x1p-20);
  const T change = (m * peak) / (sqrt(kAmsgrad ? vhat : v) + epsilon) * kMargin;
  return bits_of(load(store<Storage>(var - change))) == bits_of(var) &&
         bits_of(load(store<Storage>(var + change))) == bits_of(var);
}

// The largest |alpha| of the steps [from, now), and perhaps of some before them.
template <class T>
FASTADAM_INLINE T peak_from(const StaleRows& stale, int64_t from) {
  const T* peaks = static_cast<const T*>(stale.peaks);
  T peak = T(0);
  for (int64_t i = from / kPeakSteps; i * kPeakSteps < stale.now; ++i) peak = peaks[i] > peak ? peaks[i] : peak;
  return peak;
}

}  // namespace fastadam
