// SPDX-License-Identifier: Apache-2.0
// Part of kernels.cpp and included by nothing else: the loops over dense gradients that also measure the step
// (../core/telemetry.h). A second pass over the same tile would add a third to the time of a step.
#pragma once

#include <type_traits>

#include "../core/adam_math.h"
#include "../core/norm.h"
#include "../core/split.h"
#include "../core/telemetry.h"
#include "lanes.h"
#include "tile_values.h"

namespace fastadam::cpu::FASTADAM_ISA {
namespace {

// What the elements of a variable are rounded to before they are compared with what they were.
enum Rounding : int { kNotRounded, kToBFloat16 };

// Whether two numbers are equal once they are rounded to nearest even: 0 and -0 are, NaN is not.
template <int kRounding>
FASTADAM_INLINE int32_t is_same(float a, float b) {
  if constexpr (kRounding == kNotRounded) return a == b ? 1 : 0;
  const auto rounded = [](float x) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    return bit_cast<float>((bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000);
  };
  return rounded(a) == rounded(b) ? 1 : 0;
}
template <int kRounding>
FASTADAM_INLINE int32_t is_same(double a, double b) {
  return a == b ? 1 : 0;
}

// Sums over one tile. Each lane adds its elements of a group before it adds that to its sum: lanes are in memory.
constexpr int64_t kLanes = 16;
constexpr int64_t kLaneGroup = 4 * kLanes;

template <class T>
struct TileSums {
  alignas(kCacheLineBytes) T gradient[kLanes];
  alignas(kCacheLineBytes) T update[kLanes];
  alignas(kCacheLineBytes) T parameter[kLanes];
  alignas(kCacheLineBytes) int32_t unchanged[kLanes];

  FASTADAM_INLINE TileSums() {
#pragma omp simd
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      gradient[lane] = update[lane] = parameter[lane] = T(0);
      unchanged[lane] = 0;
    }
  }
};

// Adds the lanes in double, half to half, which vectorises.
template <class T>
FASTADAM_INLINE double sum_of_lanes(const T* lanes) {
  alignas(kCacheLineBytes) double sums[kLanes / 2];
#pragma omp simd
  for (int64_t i = 0; i < kLanes / 2; ++i) {
    sums[i] = static_cast<double>(lanes[i]) + static_cast<double>(lanes[i + kLanes / 2]);
  }
  for (int64_t i = 0; i < 4; ++i) sums[i] += sums[i + 4];
  return (sums[0] + sums[2]) + (sums[1] + sums[3]);
}

// Updates kCount elements for each of `lanes` lanes, and adds them to the sums; what is added to a variable times
// `unit`. Of float32, `was` receives the values before.
template <bool kAmsgrad, int kTransform, int kRounding, int64_t kCount, class T>
FASTADAM_INLINE void update_lanes(const Operands<T>& operands, int64_t lanes, const StepScalars<T>& s,
                                  FactorPair<T> factor, T keep, T unit, TileSums<T>& sums, T* __restrict was) {
  T* __restrict var = operands.var;
  const T* __restrict grad = operands.grad;
  T* __restrict m = operands.m;
  T* __restrict v = operands.v;
  T* __restrict vhat = operands.vhat;
#pragma omp simd
  for (int64_t lane = 0; lane < lanes; ++lane) {
    T gradients = 0;
    T updates = 0;
    T parameters = 0;
    int32_t unchanged = 0;
    for (int64_t k = 0; k < kCount; ++k) {
      const int64_t i = k * kLanes + lane;
      T g = grad[i];
      const T before = var[i];
      T var_i = before;
      if constexpr (sizeof(T) == 4) was[i] = before;
      gradients += g * g;
      if constexpr (kTransform != kAsItIs) g = transform_gradient(g, s.clip_value, factor);
      if constexpr (kTransform == kAndL2) g = add_l2(g, var_i, s.l2);
      T m_i = m[i];
      T v_i = v[i];
      T vhat_i = kAmsgrad ? vhat[i] : T(0);
      adam_update<kAmsgrad>(var_i, g, m_i, v_i, vhat_i, keep, s);
      const T added = (var_i - before) * unit;
      updates += added * added;
      parameters += var_i * var_i;
      unchanged += is_same<kRounding>(before, var_i);
      var[i] = var_i;
      m[i] = m_i;
      v[i] = v_i;
      if constexpr (kAmsgrad) vhat[i] = vhat_i;
    }
    sums.gradient[lane] += gradients;
    sums.update[lane] += updates;
    sums.parameter[lane] += parameters;
    sums.unchanged[lane] += unchanged;
  }
}

template <class T>
using UpdateTile = TileMeasure (*)(const Operands<T>& operands, int64_t size, const StepScalars<T>& scalars,
                                   FactorPair<T> factor, T keep, T unit, bool prefetch, T* was);

// Updates at most kTile elements, and measures the step. Of float32, `was` receives the values before.
template <bool kAmsgrad, int kTransform, int kRounding, class T>
TileMeasure update_tile(const Operands<T>& all, int64_t size, const StepScalars<T>& scalars, FactorPair<T> factor,
                        T keep, T unit, bool prefetch, T* was) {
  const StepScalars<T> s = scalars;
  TileSums<T> sums;
  const auto from = [&all](int64_t at) {
    return Operands<T>{all.var + at, all.grad + at, all.m + at, all.v + at, kAmsgrad ? all.vhat + at : nullptr};
  };
  int64_t at = 0;
  for (; at + kLaneGroup <= size; at += kLaneGroup) {
    const Operands<T> group = from(at);
    for (int64_t i = 0; i < kLaneGroup && prefetch; i += kBlock) {
      prefetch_far(sizeof(T), group.var + i, group.grad + i, group.m + i, group.v + i);
    }
    update_lanes<kAmsgrad, kTransform, kRounding, kLaneGroup / kLanes>(group, kLanes, s, factor, keep, unit, sums,
                                                                       was + at);
  }
  for (; at < size; at += kLanes) {
    const int64_t lanes = size - at < kLanes ? size - at : kLanes;
    update_lanes<kAmsgrad, kTransform, kRounding, 1>(from(at), lanes, s, factor, keep, unit, sums, was + at);
  }
  TileMeasure result{};
  result.gradient = sum_of_lanes(sums.gradient);
  result.update = sum_of_lanes(sums.update);
  result.parameter = sum_of_lanes(sums.parameter);
  for (int32_t count : sums.unchanged) result.unchanged += count;
  return result;
}

template <int kRounding, class T>
UpdateTile<T> update_tile_for(const StepArgs& step) {
  static constexpr UpdateTile<T> kUpdates[2][kTransformCount] = {
      {update_tile<false, kAsItIs, kRounding, T>, update_tile<false, kClipAndFactor, kRounding, T>,
       update_tile<false, kAndL2, kRounding, T>},
      {update_tile<true, kAsItIs, kRounding, T>, update_tile<true, kClipAndFactor, kRounding, T>,
       update_tile<true, kAndL2, kRounding, T>}};
  return kUpdates[step.amsgrad][step.transform];
}

// The sum of squares of `size` elements in double.
template <class T>
__attribute__((noinline)) double exact_sum(const T* values, int64_t size) {
  double lanes[kNormLanes] = {};
  for (int64_t i = 0; i < size; ++i) {
    const auto x = static_cast<double>(values[i]);
    lanes[i % kNormLanes] += x * x;
  }
  return pairwise_sum(lanes, kNormLanes);
}

// The same of what was added to `size` elements, times `unit`.
template <class T>
__attribute__((noinline)) double exact_sum_of_changes(const T* before, const T* now, int64_t size, double unit) {
  double lanes[kNormLanes] = {};
  for (int64_t i = 0; i < size; ++i) {
    const double added = (static_cast<double>(now[i]) - static_cast<double>(before[i])) * unit;
    lanes[i % kNormLanes] += added * added;
  }
  return pairwise_sum(lanes, kNormLanes);
}

// Whether a sum of squares in float32 may have overflowed, or lack elements whose squares were flushed to zero.
template <class T>
FASTADAM_INLINE bool is_doubtful(double sum) {
  return sizeof(T) == 4 && !(sum >= kLeastTileSum && is_finite(sum));
}

template <class Copy, class T>
__attribute__((noinline)) int32_t count_same(const T* before, const T* now, int64_t size) {
  int32_t same = 0;
  for (int64_t i = 0; i < size; ++i) same += load(store<Copy>(before[i])) == load(store<Copy>(now[i])) ? 1 : 0;
  return same;
}

// The same of the high halves of a variable in two halves.
__attribute__((noinline)) inline int32_t count_same_high(const float* before, const float* now, int64_t size) {
  int32_t same = 0;
  const auto high = [](float x) { return load(BFloat16{static_cast<uint16_t>(high_half(x))}); };
  for (int64_t i = 0; i < size; ++i) same += high(before[i]) == high(now[i]) ? 1 : 0;
  return same;
}

// Measures again what rounding to Half has changed.
template <class Half>
__attribute__((noinline)) void measure_rounded(const Half* var, const float* before, int64_t size, double unit,
                                               TileMeasure& result) {
  float now[kTile];
  convert(var, now, size);
  result.unchanged = 0;
  for (int64_t i = 0; i < size; ++i) result.unchanged += now[i] == before[i] ? 1 : 0;
  result.update = exact_sum_of_changes(before, now, size, unit);
  result.parameter = exact_sum(now, size);
}

// Updates a tile of a dense variable, and measures the step.
template <class Storage>
TileMeasure adam_measured(const StepArgs& step, const TensorArgs& tensor, int64_t begin, int64_t end) {
  using T = Compute<Storage>;
  constexpr bool kIsHalf = sizeof(Storage) == 2;
  const StepScalars<T>& s = scalars_of<T>(step);
  const FactorPair<T> factor = factor_of<T>(step, tensor);
  const T keep = tensor.decays ? s.keep : T(1);
  const T unit = static_cast<T>(step.telemetry_unit);
  const bool is_to_bfloat16 = tensor.copy != nullptr && tensor.copy_dtype == FASTADAM_BFLOAT16;
  const bool is_to_float16 = tensor.copy != nullptr && tensor.copy_dtype == FASTADAM_FLOAT16;
  const int64_t size = end - begin;
  TileValues<Storage> values(step, tensor, begin, size);
  const Operands<T>& all = values.operands();
  alignas(kCacheLineBytes) T before[kTile];
  UpdateTile<T> update = update_tile_for<kNotRounded, T>(step);
  if constexpr (sizeof(T) == 4) {
    if (is_to_bfloat16) update = update_tile_for<kToBFloat16, T>(step);
  }
  TileMeasure result = update(all, size, s, factor, keep, unit, step.prefetch, before);
  if (is_doubtful<T>(result.gradient)) result.gradient = exact_sum(all.grad, size);
  if (is_doubtful<T>(result.parameter)) result.parameter = exact_sum(all.var, size);
  if (is_doubtful<T>(result.update)) result.update = exact_sum_of_changes(before, all.var, size, step.telemetry_unit);
  if constexpr (sizeof(T) == 4) {
    if (is_to_float16) result.unchanged = count_same<Float16>(before, all.var, size);
    if (tensor.low != nullptr) result.unchanged = count_same_high(before, all.var, size);
  }
  for (int64_t i = 0; i < size && !is_finite(result.gradient); ++i) {
    result.not_finite += is_finite(static_cast<double>(all.grad[i])) ? 0 : 1;
  }
  values.finish();
  if constexpr (kIsHalf) {
    const auto* var = static_cast<const Storage*>(tensor.var) + begin;
    if (tensor.low == nullptr) measure_rounded(var, before, size, step.telemetry_unit, result);
  }
  return result;
}

}  // namespace
}  // namespace fastadam::cpu::FASTADAM_ISA
