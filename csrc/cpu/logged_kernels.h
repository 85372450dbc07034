// SPDX-License-Identifier: Apache-2.0
// Part of kernels.cpp and included by nothing else: steps that can be undone (../core/undo.h).
#pragma once

#include <cstring>

#include "../core/undo.h"
#include "lanes.h"

namespace fastadam::cpu::FASTADAM_ISA {
namespace {

// The numbers of the step of one tensor.
struct LoggedStep {
  LoggedStep(const StepArgs& step, const TensorArgs& tensor)
      : scalars(step.scalars_f32),
        factor(factor_of<float>(step, tensor)),
        keep(tensor.decays ? scalars.keep : 1.0f),
        inverse(scalars, keep),
        prefetch(step.prefetch) {}
  StepScalars<float> scalars;
  FactorPair<float> factor;
  float keep;
  Inverses inverse;
  bool prefetch;
};

template <bool kAmsgrad>
FASTADAM_INLINE Operands<float> operands_from(const Operands<float>& all, int64_t at) {
  return {all.var + at, all.grad + at, all.m + at, all.v + at, kAmsgrad ? all.vhat + at : nullptr};
}

template <int kTransform>
FASTADAM_INLINE float transformed(float g, float var, const LoggedStep& step) {
  if constexpr (kTransform != kAsItIs) g = transform_gradient(g, step.scalars.clip_value, step.factor);
  if constexpr (kTransform == kAndL2) g = add_l2(g, var, step.scalars.l2);
  return g;
}

// What a loop over a tile leaves for its log.
struct alignas(kCacheLineBytes) TileRoom {
  float before[kLoggedArrays][kTile];  // the values before the step
  uint32_t codes[kTile];
  uint32_t checksums[kBlock];  // of the gradient
};

// Updates at most kBlock elements, the first of which is at `place` of a tile.
template <bool kAmsgrad, int kTransform>
FASTADAM_INLINE void update_logged(const Operands<float>& block, int64_t size, int64_t place, const LoggedStep& step,
                                   TileRoom& room) {
  float* __restrict var_before_step = room.before[kLoggedVar] + place;
  float* __restrict m_before_step = room.before[kLoggedM] + place;
  float* __restrict v_before_step = room.before[kLoggedV] + place;
  float* __restrict vhat_before_step = room.before[kLoggedVhat] + place;
  uint32_t* __restrict codes = room.codes + place;
  uint32_t* __restrict checksums = room.checksums;
  const StepScalars<float>& s = step.scalars;
  float* __restrict var = block.var;
  const float* __restrict grad = block.grad;
  float* __restrict m = block.m;
  float* __restrict v = block.v;
  float* __restrict vhat = block.vhat;
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    const float var_was = var[i];
    const float m_was = m[i];
    const float v_was = v[i];
    const float vhat_was = kAmsgrad ? vhat[i] : 0.0f;
    const float g = transformed<kTransform>(grad[i], var_was, step);
    float var_i = var_was;
    float m_i = m_was;
    float v_i = v_was;
    float vhat_i = vhat_was;
    const float displacement = adam_update<kAmsgrad>(var_i, g, m_i, v_i, vhat_i, step.keep, s);
    const Misses misses{miss(var_was, var_before(var_i, displacement, step.inverse), kInByte.var),
                        miss(m_was, m_before(m_i, g, s, step.inverse), kInByte.m),
                        miss(v_was, v_before(v_i, g, s, step.inverse), kInByte.v)};
    bool is_small = fits(misses, kInByte);
    if constexpr (kAmsgrad) is_small &= bit_cast<uint32_t>(vhat_was) == bit_cast<uint32_t>(vhat_i);
    codes[i] = is_small ? byte_of(misses) : kNear;
    checksums[i] = checksum_with(checksums[i], grad[i]);
    var_before_step[i] = var_was;
    m_before_step[i] = m_was;
    v_before_step[i] = v_was;
    var[i] = var_i;
    m[i] = m_i;
    v[i] = v_i;
    if constexpr (kAmsgrad) vhat_before_step[i] = vhat_was;
    if constexpr (kAmsgrad) vhat[i] = vhat_i;
  }
}

// Calls visit(i) for each element of a block whose byte is not its misses.
template <class Visit>
FASTADAM_INLINE void for_each_escape(const uint8_t* codes, Visit visit) {
  for (int64_t first = 0; first < kLogBlock; first += 8) {
    uint64_t bytes;
    std::memcpy(&bytes, codes + first, sizeof(bytes));
    for (uint64_t left = escapes_among(bytes); left != 0; left &= left - 1) visit(first + __builtin_ctzll(left) / 8);
  }
}

// Writes the escapes of the block of a tile that starts at element `at`, and returns their end. Notes in `codes` if its
// values are stored instead.
template <bool kAmsgrad, int kTransform>
__attribute__((noinline)) char* write_escapes(const Operands<float>& all, int64_t at, int64_t size,
                                              const LoggedStep& step, const TileRoom& room, uint8_t* codes, char* to) {
  const StepScalars<float>& s = step.scalars;
  const Operands<float> block = operands_from<kAmsgrad>(all, at);
  const float* before[kLoggedArrays];
  for (int64_t array = 0; array < kLoggedArrays; ++array) before[array] = room.before[array] + at;
  uint32_t words[kLogBlock];
  uint32_t raised[kLogBlock];
  uint32_t far[kLogBlock] = {};
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    const float var_was = before[kLoggedVar][i];
    const float g = transformed<kTransform>(block.grad[i], var_was, step);
    float vhat_i = kAmsgrad ? block.vhat[i] : 0.0f;
    const float displacement = adam_displacement<kAmsgrad>(block.m[i], block.v[i], vhat_i, s.alpha, s.epsilon);
    const Misses misses{miss(var_was, var_before(block.var[i], displacement, step.inverse), kInWord.var),
                        miss(before[kLoggedM][i], m_before(block.m[i], g, s, step.inverse), kInWord.m),
                        miss(before[kLoggedV][i], v_before(block.v[i], g, s, step.inverse), kInWord.v)};
    words[i] = word_of(misses);
    far[i] = fits(misses, kInWord) ? 0 : 1;
    if constexpr (kAmsgrad) {
      raised[i] = bit_cast<uint32_t>(before[kLoggedVhat][i]) ^ bit_cast<uint32_t>(block.vhat[i]);
    }
  }
  uint32_t any_far = 0;
  for (const uint32_t one : far) any_far |= one;
  if (any_far != 0) {
    std::memset(codes, kRaw, kLogBlock);
    for (int array = 0; array < (kAmsgrad ? 4 : 3); ++array, to += kLogBlock * sizeof(float)) {
      std::memcpy(to, before[array], kLogBlock * sizeof(float));
    }
    return to;
  }
  for_each_escape(codes, [&](int64_t i) {
    std::memcpy(to, words + i, sizeof(uint32_t));
    to += sizeof(uint32_t);
    if constexpr (kAmsgrad) {
      std::memcpy(to, raised + i, sizeof(uint32_t));
      to += sizeof(uint32_t);
    }
  });
  return to;
}

struct TileCodes {
  uint8_t* bytes;     // receives kTile
  char* escapes;      // receives at most kWholeBytes
  uint32_t checksum;  // result
};

// Updates at most kTile elements, and returns the end of their escapes.
template <bool kAmsgrad, int kTransform>
char* step_tile(const Operands<float>& all, int64_t size, const LoggedStep& step, TileCodes& log) {
  const LoggedStep here = step;
  TileRoom room;
  for (uint32_t& sum : room.checksums) sum = 0;
  for (int64_t at = 0; at < size; at += kBlock) {
    const Operands<float> block = operands_from<kAmsgrad>(all, at);
    if (here.prefetch) prefetch_far(sizeof(float), block.var, block.grad, block.m, block.v);
    if (size - at >= kBlock) {
      update_logged<kAmsgrad, kTransform>(block, kBlock, at, here, room);
    } else {
      update_logged<kAmsgrad, kTransform>(block, size - at, at, here, room);
    }
  }
  log.checksum = checksum_of(room.checksums);
  uint8_t* __restrict bytes = log.bytes;
  const int64_t filled = (size + kLogBlock - 1) / kLogBlock * kLogBlock;
  for (int64_t i = size; i < filled; ++i) {
    room.codes[i] = 0;
    for (auto& values : room.before) values[i] = 0;
  }
#pragma omp simd
  for (int64_t i = 0; i < filled; ++i) bytes[i] = static_cast<uint8_t>(room.codes[i]);
  char* escapes = log.escapes;
  for (int64_t at = 0; at < size; at += kLogBlock) {
    uint64_t halves[2];
    std::memcpy(halves, bytes + at, sizeof(halves));
    if ((escapes_among(halves[0]) | escapes_among(halves[1])) == 0) continue;
    const int64_t count = size - at < kLogBlock ? size - at : kLogBlock;
    escapes = write_escapes<kAmsgrad, kTransform>(all, at, count, here, room, bytes + at, escapes);
  }
  return escapes;
}

inline Operands<float> operands_at(const StepArgs& step, const TensorArgs& tensor, int64_t begin, const float* grad) {
  return {static_cast<float*>(tensor.var) + begin, grad, static_cast<float*>(tensor.m) + begin,
          static_cast<float*>(tensor.v) + begin, step.amsgrad ? static_cast<float*>(tensor.vhat) + begin : nullptr};
}

// Updates a tile of a float32 variable with a dense gradient, and logs what it was.
inline void adam_logged(const StepArgs& step, const TensorArgs& tensor, int64_t begin, int64_t end, int64_t place) {
  static constexpr decltype(&step_tile<false, kAsItIs>) kSteps[2][kTransformCount] = {
      {step_tile<false, kAsItIs>, step_tile<false, kClipAndFactor>, step_tile<false, kAndL2>},
      {step_tile<true, kAsItIs>, step_tile<true, kClipAndFactor>, step_tile<true, kAndL2>}};
  const int64_t size = end - begin;
  char escapes[kWholeBytes];
  float converted[kTile];
  const StepLog& log = *step.log;
  const Operands<float> all = operands_at(step, tensor, begin, gradient_of(tensor, begin, size, converted));
  TileCodes codes{log.codes + place * kTile, escapes, 0};
  const char* const last = kSteps[step.amsgrad][step.transform](all, size, LoggedStep(step, tensor), codes);
  const int64_t bytes = last - escapes;
  const int64_t offset = bytes == 0 ? 0 : __atomic_fetch_add(log.used, bytes, __ATOMIC_RELAXED);
  std::memcpy(log.arena + offset, escapes, static_cast<size_t>(bytes));
  log.tiles[place] = {offset, codes.checksum, false};
}

}  // namespace
}  // namespace fastadam::cpu::FASTADAM_ISA
