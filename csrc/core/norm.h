// SPDX-License-Identifier: Apache-2.0
// Sums of squares by a reduction tree of fixed shape, which gives the same bits for every instruction set, thread
// count, alignment and device. A block has 4096 elements in 32 lanes. Each lane adds its squares in order; then the
// lanes, and then the blocks, are added pairwise. All sums are in double, where the square of a float32 is exact and
// cannot overflow or underflow. If a sum over float64 elements is not finite, or so small that squares may have been
// lost, it is computed again from elements times a power of two, so that a norm is right whenever it is itself finite.
// Elements that are denormal count as 0, as they do in a step.
#pragma once

#include "adam_math.h"

namespace fastadam {

constexpr int64_t kNormBlock = 4096;
constexpr int64_t kNormLanes = 32;
// Powers of two: multiplication rounds nothing, except elements that no longer matter beside those that overflowed.
// 2^59 squares of the largest float64 times the first are far from overflow; the square of the smallest normal float64
// times the second is far from underflow.
constexpr double kUnitOfLarge = 0x1p-600;
constexpr double kUnitOfSmall = 0x1p600;
// Beside a sum of this size 2^59 squares that were flushed to zero do not matter.
constexpr double kLeastSum = 0x1p-900;

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
FASTADAM_INLINE Factor clip_factor(double norm, double limit) {
  return norm <= limit ? kNoFactor : make_factor(limit) / make_factor(norm);
}

// The same for the norm of all gradients. A norm that is not finite makes every element NaN, as in
// tf.clip_by_global_norm.
FASTADAM_INLINE Factor global_clip_factor(double norm, double limit) {
  Factor factor = clip_factor(norm, limit);
  factor.value += norm - norm;  // 0 or NaN
  return factor;
}

FASTADAM_INLINE bool is_finite(double x) { return x - x == 0; }

// What elements must be multiplied by before they are squared, if this is the sum of their squares as they are.
FASTADAM_INLINE double norm_unit(double sum_of_squares) {
  if (sum_of_squares < kLeastSum) return kUnitOfSmall;
  return is_finite(sum_of_squares) ? 1.0 : kUnitOfLarge;
}

// The norm, times `scale`, of a gradient whose elements times `unit` have this sum of squares.
FASTADAM_INLINE double norm_of(double sum_of_squares, double scale, double unit) {
  const double norm = std::sqrt(sum_of_squares) * scale;
  return unit == 1 ? norm : norm / unit;
}

// How one gradient is clipped by its own norm.
struct NormClip {
  Factor factor;  // what the gradient is multiplied by: `grad_factor` times the clip factor
  double norm;    // after clipping; not finite if the norm before clipping is not
  double square;  // of that norm
};

// `norm` is the norm before clipping. An infinite `clip_norm` does not clip.
FASTADAM_INLINE NormClip clip_gradient(double norm, Factor grad_factor, double clip_norm) {
  const bool clips = clip_norm < __builtin_huge_val() && !(norm <= clip_norm);
  const double factor = clips ? clip_norm / norm : 1.0;
  if (__builtin_expect(factor >= kLeastValue, 1)) {
    return {grad_factor * Factor{factor, 0}, norm * factor, norm * factor * norm * factor};
  }
  const Factor before = make_factor(norm);
  const Factor exact = make_factor(clip_norm) / before;
  const Factor after = before * exact;
  return {grad_factor * exact, to_double(after), to_double(after * before * exact)};
}

// The norm of all gradients. square_of(i): the square of the norm of gradient i; norm_at(i): the norm itself, which is
// asked for only if the sum of the squares is not finite or very small.
template <class SquareOf, class NormAt>
FASTADAM_INLINE double joint_norm(int64_t count, SquareOf square_of, NormAt norm_at) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += square_of(i);
  const double unit = norm_unit(sum);
  if (unit == 1) return std::sqrt(sum);
  sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double norm = norm_at(i) * unit;
    sum += norm * norm;
  }
  return norm_of(sum, 1, unit);
}

}  // namespace fastadam
