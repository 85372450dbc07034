// SPDX-License-Identifier: Apache-2.0
// What a step reports of a variable, summed tile by tile over a tree of fixed shape: the same bits for every
// instruction set, thread count and alignment.
//
// Squares of a tile are added in the arithmetic of the variable, in lanes, and lanes and tiles in double: a sum is
// within 1e-6 of the exact one. If float32 may have overflowed or flushed squares to zero, the sum of the tile is
// computed again in double. Updates are measured in units of about the step size, so that they rarely need it.
#pragma once

#include <cmath>
#include <cstdint>

#include "norm.h"
#include "split.h"

namespace fastadam {

struct TileMeasure {
  double gradient;   // sum of squares of the gradients as they were passed
  double update;     // of what was added to the variable, times telemetry_unit
  double parameter;  // of the variable after the step
  int32_t unchanged;
  int32_t not_finite;
};

// Below this a sum of squares in float32 may lack a share of 2^-37.
constexpr double kLeastTileSum = 0x1p-80;

// The unit of updates for a step size: float32 can represent the squares of 1e-19 to 1e19 of it.
inline double telemetry_unit(double step_size) {
  int exponent = 0;
  std::frexp(step_size, &exponent);
  return std::ldexp(1.0, exponent > 100 ? -100 : exponent < -100 ? 100 : -exponent);
}

// Reduces `count` tiles, which it overwrites, to a report of `size` elements.
inline fastadam_telemetry summed(TileMeasure* tiles, int64_t count, int64_t size, double gradient_scale, double unit) {
  fastadam_telemetry result{};
  for (int64_t i = 0; i < count; ++i) {
    result.unchanged += tiles[i].unchanged;
    result.not_finite += tiles[i].not_finite;
  }
  for (int64_t left = count; left > 1; left = (left + 1) / 2) {
    for (int64_t i = 0; i < left / 2; ++i) {
      const TileMeasure& a = tiles[2 * i];
      const TileMeasure& b = tiles[2 * i + 1];
      tiles[i] = {a.gradient + b.gradient, a.update + b.update, a.parameter + b.parameter, 0, 0};
    }
    if (left % 2 == 1) tiles[left / 2] = tiles[left - 1];
  }
  result.size = size;
  if (count == 0) return result;
  result.gradient_norm = std::sqrt(tiles[0].gradient) * gradient_scale;
  result.update_rms = std::sqrt(tiles[0].update / static_cast<double>(size)) / unit;
  result.parameter_rms = std::sqrt(tiles[0].parameter / static_cast<double>(size));
  return result;
}

}  // namespace fastadam
