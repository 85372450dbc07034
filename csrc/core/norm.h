// SPDX-License-Identifier: Apache-2.0
// Sums of squares by a reduction tree of fixed shape: the same bits for any ISA, thread count, alignment and device.
// A block has 4096 elements in 32 lanes; lanes are added in order, then pairwise; blocks pairwise. All in double, in
// which the square of a float32 is exact and cannot overflow.
#pragma once

#include "adam_math.h"

namespace fastadam {

constexpr int64_t kNormBlock = 4096;
constexpr int64_t kNormLanes = 32;

FASTADAM_INLINE int64_t norm_blocks(int64_t size) { return (size + kNormBlock - 1) / kNormBlock; }

// Adds neighbours until one is left; an odd one goes up as it is. Overwrites `values`.
FASTADAM_INLINE double pairwise_sum(double* values, int64_t count) {
  for (; count > 1; count = (count + 1) / 2) {
    for (int64_t i = 0; i < count / 2; ++i) values[i] = values[2 * i] + values[2 * i + 1];
    if (count % 2 == 1) values[count / 2] = values[count - 1];
  }
  return count == 1 ? values[0] : 0.0;
}

// Factor that brings a gradient of this norm down to `limit`; an infinite norm gives 0, so that finite elements vanish
// and infinite ones become NaN, as tf.clip_by_norm has it.
FASTADAM_INLINE double clip_factor(double norm, double limit) { return norm <= limit ? 1.0 : limit / norm; }

// The same for the norm of all gradients together; one that is not finite makes every element NaN, as
// tf.clip_by_global_norm has it.
FASTADAM_INLINE double global_clip_factor(double norm, double limit) {
  const double not_finite = norm - norm;  // 0, or NaN
  return clip_factor(norm, limit) + not_finite;
}

}  // namespace fastadam
