// SPDX-License-Identifier: Apache-2.0
// Part of kernels.cpp and included by nothing else: the loops over variables whose arrays are stored as in
// ../core/small_state.h. Everything that is done to an element is done in registers, as the arithmetic would take
// longer than the memory otherwise.
#pragma once

#include "../core/adam_math.h"
#include "../core/small_state.h"
#include "dense_kernels.h"
#include "small_formats.h"
#include "tile_values.h"

namespace fastadam::cpu::FASTADAM_ISA {
namespace {

// Updates kCodeBlock elements from `begin`; or returns false, with nothing written, if that needs TileValues.
template <class Moments, class Variable, class Gradient, bool kTransforms>
FASTADAM_INLINE bool update_block(const TensorArgs& tensor, int64_t begin, const StepScalars<Lanes>& s,
                                  FactorPair<Lanes> factor, Lanes keep, uint64_t key) {
  constexpr bool kTakesNan = Moments::kTakesNan && std::is_same_v<Variable, FloatVariable>;
  Moments moments(tensor, begin);
  const Variable variable(tensor, begin);
  BlockValues values;
  NanCheck check;
  for (int64_t j = 0; j < kVectors; ++j) {
    Lanes g = Gradient::load(tensor, begin + j * kWidth);
    if constexpr (kTransforms) g = transform_gradient(g, s.clip_value, factor);
    values.var[j] = variable.load(j);
    values.m[j] = moments.load_m(j);
    values.v[j] = moments.load_v(j);
    Lanes vhat{};
    adam_update<false>(values.var[j], g, values.m[j], values.v[j], vhat, keep, s);
    moments.note(values.m[j], values.v[j]);
    if constexpr (!kTakesNan) check.add(values.var[j]);
  }
  if (!kTakesNan && __builtin_expect(check.has_found(), 0)) return false;
  variable.write(values.var, key, begin);
  moments.write(values, key, begin);
  return true;
}

// The same for any number of elements, options and formats.
template <class Storage>
__attribute__((noinline)) void update_tiles(const StepArgs& step, const TensorArgs& tensor, int64_t begin,
                                            int64_t end) {
  const StepScalars<float>& s = step.scalars_f32;
  const FactorPair<float> factor = factor_of<float>(step, tensor);
  const float keep = tensor.decays ? s.keep : 1.0f;
  const UpdateRange<float> update = update_for<float>(step);
  for (int64_t at = begin; at < end; at += kTile) {
    const int64_t size = end - at < kTile ? end - at : kTile;
    TileValues<Storage> values(step, tensor, at, size);
    const Operands<float>& all = values.operands();
    update(all.var, all.grad, all.m, all.v, all.vhat, size, s, factor, keep, false);
    values.finish();
  }
}

FASTADAM_INLINE StepScalars<Lanes> in_lanes(const StepScalars<float>& s) {
  return {Lanes(s.alpha),
          Lanes(s.row_alpha),
          Lanes(s.beta_1),
          Lanes(s.beta_2),
          Lanes(s.one_minus_beta_1),
          Lanes(s.one_minus_beta_2),
          Lanes(s.epsilon),
          Lanes(s.clip_value),
          Lanes(s.keep),
          Lanes(s.ema_momentum),
          Lanes(s.l2)};
}

// Brings a block that is kAhead elements further into L2, as prefetch_far() does.
template <class Moments, class Variable, class Gradient>
FASTADAM_INLINE void prefetch_ahead(const TensorArgs& tensor, int64_t begin) {
  constexpr int64_t kAhead = 16 * kCodeBlock;
  const auto lines = [begin](const void* array, int64_t bytes) {
    const char* from = static_cast<const char*>(array) + (begin + kAhead) * bytes;
    for (int64_t at = 0; at < kCodeBlock * bytes; at += kCacheLineBytes) __builtin_prefetch(from + at, 0, 2);
  };
  lines(tensor.var, sizeof(typename Variable::Storage));
  lines(tensor.grad, Gradient::kBytes);
  lines(tensor.m, Moments::kBytes);
  lines(tensor.v, Moments::kBytes);
  if (tensor.low != nullptr) lines(tensor.low, 2);
}

template <class Moments, class Variable, class Gradient, bool kTransforms>
void update_blocks(const StepArgs& step, const TensorArgs& tensor, int64_t begin, int64_t end) {
  const StepScalars<Lanes> s = in_lanes(step.scalars_f32);
  const FactorPair<float> pair = factor_of<float>(step, tensor);
  const FactorPair<Lanes> factor{Lanes(pair.first), Lanes(pair.second)};
  const Lanes keep(tensor.decays ? step.scalars_f32.keep : 1.0f);
  const uint64_t key = random_key(step.seed, step.number, tensor.parameter);
  const TensorArgs here = tensor;
  for (int64_t at = begin; at < end; at += kCodeBlock) {
    if (step.prefetch) prefetch_ahead<Moments, Variable, Gradient>(here, at);
    if (!update_block<Moments, Variable, Gradient, kTransforms>(here, at, s, factor, keep, key)) {
      update_tiles<typename Variable::Storage>(step, tensor, at, at + kCodeBlock);
    }
  }
}

template <class Moments, class Variable>
UpdateKernel blocks_for(const StepArgs& step, const TensorArgs& tensor) {
  static constexpr UpdateKernel kKernels[2][2] = {
      {update_blocks<Moments, Variable, FloatGradient, false>, update_blocks<Moments, Variable, FloatGradient, true>},
      {update_blocks<Moments, Variable, BFloat16Gradient, false>,
       update_blocks<Moments, Variable, BFloat16Gradient, true>}};
  return kKernels[tensor.grad_dtype == FASTADAM_BFLOAT16][step.transform != kAsItIs];
}

template <class Type>
struct Tag {
  using type = Type;
};

// The loop over whole blocks; null if the options of the step or the tensor have none.
template <class Storage>
UpdateKernel blocks_for(const StepArgs& step, const TensorArgs& tensor) {
  const bool has_loop = !step.amsgrad && step.transform != kAndL2 && tensor.grad_dtype != FASTADAM_FLOAT16;
  if (sizeof(Storage) == 2 && tensor.low == nullptr && !tensor.stochastic) return nullptr;
  if (!has_loop) return nullptr;
  const auto of_variable = [&](auto variable) -> UpdateKernel {
    using Variable = typename decltype(variable)::type;
    if (tensor.moments == FASTADAM_MOMENTS_8BIT) return blocks_for<CodedMoments, Variable>(step, tensor);
    if (tensor.moments == FASTADAM_MOMENTS_BFLOAT16) return blocks_for<RandomMoments, Variable>(step, tensor);
    if (tensor.moments == FASTADAM_MOMENTS_WIDE) return blocks_for<FloatMoments, Variable>(step, tensor);
    return nullptr;
  };
  if constexpr (std::is_same_v<Storage, BFloat16>) {
    return tensor.low != nullptr ? of_variable(Tag<SplitVariable>()) : of_variable(Tag<RandomVariable>());
  } else {
    return of_variable(Tag<FloatVariable>());
  }
}

// SSE2 lacks most of the instructions that these loops need, and their code would be a fifth of its kernels.
#if defined(__SSE2__) && !defined(__AVX2__)
constexpr bool kHasBlocks = false;
#else
constexpr bool kHasBlocks = true;
#endif

// Updates a variable whose arrays are stored as in small_state.h.
template <class Storage>
void adam_small(const StepArgs& step, const TensorArgs& tensor, int64_t begin, int64_t end) {
  if constexpr (kHasBlocks) {
    if (const UpdateKernel blocks = blocks_for<Storage>(step, tensor)) {
      const int64_t whole = begin + (end - begin) / kCodeBlock * kCodeBlock;
      blocks(step, tensor, begin, whole);
      begin = whole;
    }
  }
  if (begin < end) update_tiles<Storage>(step, tensor, begin, end);
}

}  // namespace
}  // namespace fastadam::cpu::FASTADAM_ISA
