// SPDX-License-Identifier: Apache-2.0
// Sums of squares by a reduction tree of fixed shape, which gives the same bits for every instruction set, thread
// count, alignment and device. A block has 4096 elements in 32 lanes. Each lane adds its squares in order; then the
// lanes, and then the blocks, are added pairwise. All sums are in double, where the square of a float32 is exact and
// cannot overflow. If a sum over float64 elements is not finite, it is computed again from elements times kNormUnit, so
// that a norm is right whenever it is itself below infinity.
#pragma once

#include "adam_math.h"

namespace fastadam {

constexpr int64_t kNormBlock = 4096;
constexpr int64_t kNormLanes = 32;
// A power of two: multiplication rounds nothing, except elements that no longer matter beside those that overflowed.
// 2^59 squares of the largest float64 times this are far from overflow.
constexpr double kNormUnit = 0x1p-600;

FASTADAM_INLINE int64_t norm_blocks(int64_t size) { return (size + kNormBlock - 1) / kNormBlock; }

// Adds neighbours until one value is left; the last of an odd number moves up unchanged. Overwrites `values`.
FASTADAM_INLINE double pairwise_sum(double* values, int64_t count) {
  for (; count > 1; count = (count + 1) / 2) {
    for (int64_t i = 0; i < count / 2; ++i) values[i] = values[2 * i] + values[2 * i + 1];
    if (count % 2 == 1) values[count / 2] = values[count - 1];
  }
  return count == 1 ? values[0] : 0.0;
}

// The factor that reduces a gradient of this norm to norm `limit`. An infinite norm gives 0, so that finite elements
// become 0 and infinite ones NaN, as in tf.clip_by_norm.
FASTADAM_INLINE double clip_factor(double norm, double limit) { return norm <= limit ? 1.0 : limit / norm; }

// The same for the norm of all gradients. A norm that is not finite makes every element NaN, as in
// tf.clip_by_global_norm.
FASTADAM_INLINE double global_clip_factor(double norm, double limit) {
  const double not_finite = norm - norm;  // 0 or NaN
  return clip_factor(norm, limit) + not_finite;
}

FASTADAM_INLINE bool is_finite(double x) { return x - x == 0; }

// The norm of a gradient of which this is the sum of squares, times `scale`.
FASTADAM_INLINE double norm_of(double sum_of_squares, double scale) { return std::sqrt(sum_of_squares) * scale; }

// The same for the sum of squares of elements times kNormUnit.
FASTADAM_INLINE double norm_of_rescaled(double sum_of_squares, double scale) {
  return norm_of(sum_of_squares, scale) * (1 / kNormUnit);
}

// How one gradient is clipped by its own norm.
struct NormClip {
  double factor;  // what the gradient is multiplied by: `grad_factor` times the clip factor
  double norm;    // after clipping; not finite if the norm before clipping is not
  double square;  // of that norm
};

// `norm` is the norm before clipping. An infinite `clip_norm` does not clip.
FASTADAM_INLINE NormClip clip_gradient(double norm, double grad_factor, double clip_norm) {
  const double factor = clip_norm < __builtin_huge_val() ? clip_factor(norm, clip_norm) : 1.0;
  return {grad_factor * factor, norm * factor, norm * factor * norm * factor};
}

// The norm of all gradients. square_of(i): the square of the norm of gradient i; norm_of(i): the norm itself, which is
// asked for only if the sum of the squares is not finite.
template <class SquareOf, class NormOf>
FASTADAM_INLINE double joint_norm(int64_t count, SquareOf square_of, NormOf norm_of) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += square_of(i);
  if (is_finite(sum)) return std::sqrt(sum);
  sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double norm = norm_of(i) * kNormUnit;
    sum += norm * norm;
  }
  return norm_of_rescaled(sum, 1);
}

}  // namespace fastadam
