// SPDX-License-Identifier: Apache-2.0
// The factors of gradients. The factor that clips gradients of 3e38 to a norm of 1 has no normal float32, and kernels
// flush what is not normal, so a factor has an exponent of its own, and kernels multiply by two numbers.
#pragma once

#include <cmath>

#include "dtypes.h"

namespace fastadam {

constexpr double kLeastValue = 0x1p-500;
constexpr double kMostValue = 0x1p500;

// The number value * 2^exponent. The size of `value` is within kLeastValue and kMostValue, or it is 0 or not finite, so
// that a product or quotient of two values neither overflows nor underflows.
struct Factor {
  double value;
  int64_t exponent;
};

constexpr Factor kNoFactor = {1, 0};

// 2^exponent, for -1022 <= exponent <= 1023.
FASTADAM_INLINE double power_of_two(int64_t exponent) {
  return bit_cast<double>(static_cast<uint64_t>(exponent + 1023) << 52);
}

// value * 2^exponent, in any floating-point mode.
FASTADAM_INLINE Factor make_factor(double value, int64_t exponent = 0) {
  constexpr uint64_t kMagnitude = ~uint64_t{0} >> 1;
  constexpr uint64_t kLeastNormal = uint64_t{1} << 52;
  const double size = std::fabs(value);
  if (__builtin_expect(size >= kLeastValue && size <= kMostValue, 1)) return {value, exponent};
  if (size - size != 0) return {value, exponent};  // not finite
  if (size > kMostValue) return {value * 0x1p-600, exponent + 600};
  const auto bits = bit_cast<uint64_t>(value);
  const uint64_t magnitude = bits & kMagnitude;
  if (magnitude == 0) return {value, exponent};
  if (magnitude >= kLeastNormal) return {value * 0x1p600, exponent - 600};
  // A denormal, which denormals-are-zero would not multiply.
  const double number = static_cast<double>(static_cast<int64_t>(magnitude)) * 0x1p-474;
  return {bits == magnitude ? number : -number, exponent - 600};
}

FASTADAM_INLINE Factor operator*(Factor a, Factor b) { return make_factor(a.value * b.value, a.exponent + b.exponent); }
FASTADAM_INLINE Factor operator/(Factor a, Factor b) { return make_factor(a.value / b.value, a.exponent - b.exponent); }

// The nearest double: 0 or infinity if the factor is out of range.
FASTADAM_INLINE double to_double(Factor factor) {
  constexpr int64_t kMost = 2000;  // beyond it the result is 0 or infinite for every value
  if (factor.exponent == 0) return factor.value;
  const int64_t exponent = factor.exponent < -kMost ? -kMost : (factor.exponent > kMost ? kMost : factor.exponent);
  return factor.value * power_of_two(exponent / 2) * power_of_two(exponent - exponent / 2);
}

// A factor in the arithmetic T: gradients are multiplied by `first`, then by `second`, which is 1 or, if the factor is
// smaller than every normal T, the smallest normal T. Then a product that is itself normal is rounded once. Factors
// below the square of the smallest normal T (float32: 1.4e-76) are 0.
template <class T>
struct FactorPair {
  T first;
  T second;
};

template <class T>
FASTADAM_INLINE FactorPair<T> pair_of(Factor factor) {
  constexpr int64_t kLeastExponent = sizeof(T) == 4 ? -126 : -1022;
  const double number = to_double(factor);
  const double least = power_of_two(kLeastExponent);
  if (!(std::fabs(number) < least) || factor.value == 0) return {static_cast<T>(number), T(1)};
  return {static_cast<T>(to_double({factor.value, factor.exponent - kLeastExponent})), static_cast<T>(least)};
}

}  // namespace fastadam
