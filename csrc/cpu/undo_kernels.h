// SPDX-License-Identifier: Apache-2.0
// Part of kernels.cpp and included by nothing else: steps that can be undone (../core/undo.h), and undoing them.
#pragma once

#include <cstring>

#include "../core/undo.h"
#include "lanes.h"

namespace fastadam::cpu::FASTADAM_ISA {
namespace {

// How far the values of a tile before a step are from what is computed backwards: by LoggedArray, see miss().
struct Misses {
  alignas(kCacheLineBytes) uint32_t of[kLoggedArrays][kTile];
  alignas(kCacheLineBytes) uint8_t escapes[kTile];  // the number of misses of each element that do not fit in its byte
};

template <bool kAmsgrad, int kTransform>
__attribute__((noinline)) void update_logged(const Operands<float>& all, int64_t size,
                                             const StepScalars<float>& scalars, FactorPair<float> factor, float keep,
                                             bool prefetch, Misses& misses) {
  const StepScalars<float> s = scalars;
  const Inverses inverse(s, keep);
  float* __restrict var = all.var;
  const float* __restrict grad = all.grad;
  float* __restrict m = all.m;
  float* __restrict v = all.v;
  float* __restrict vhat = all.vhat;
  uint32_t* __restrict var_misses = misses.of[kLoggedVar];
  uint32_t* __restrict m_misses = misses.of[kLoggedM];
  uint32_t* __restrict v_misses = misses.of[kLoggedV];
  uint32_t* __restrict vhat_misses = misses.of[kLoggedVhat];
  for (int64_t block = 0; block < size; block += kBlock) {
    if (prefetch) prefetch_far(sizeof(float), var + block, grad + block, m + block, v + block);
    const int64_t end = block + kBlock < size ? block + kBlock : size;
#pragma omp simd
    for (int64_t i = block; i < end; ++i) {
      const float var_was = var[i];
      const float m_was = m[i];
      const float v_was = v[i];
      const float vhat_was = kAmsgrad ? vhat[i] : 0.0f;
      float g = grad[i];
      if constexpr (kTransform != kAsItIs) g = transform_gradient(g, s.clip_value, factor);
      if constexpr (kTransform == kAndL2) g = add_l2(g, var_was, s.l2);
      float var_i = var_was;
      float m_i = m_was;
      float v_i = v_was;
      float vhat_i = vhat_was;
      const float displacement = adam_update<kAmsgrad>(var_i, g, m_i, v_i, vhat_i, keep, s);
      var_misses[i] = miss(var_was, var_before(var_i, displacement, inverse), kCodesOfVar);
      m_misses[i] = miss(m_was, m_before(m_i, g, s, inverse), kCodesOfM);
      v_misses[i] = miss(v_was, v_before(v_i, g, s, inverse), kCodesOfVar);
      if constexpr (kAmsgrad) {
        vhat_misses[i] = bit_cast<uint32_t>(vhat_was) ^ bit_cast<uint32_t>(vhat_i);
        vhat[i] = vhat_i;
      }
      var[i] = var_i;
      m[i] = m_i;
      v[i] = v_i;
    }
  }
}

using UpdateLogged = void (*)(const Operands<float>& all, int64_t size, const StepScalars<float>& scalars,
                              FactorPair<float> factor, float keep, bool prefetch, Misses& misses);

inline UpdateLogged update_logged_for(const StepArgs& step) {
  static constexpr UpdateLogged kUpdates[2][kTransformCount] = {
      {update_logged<false, kAsItIs>, update_logged<false, kClipAndFactor>, update_logged<false, kAndL2>},
      {update_logged<true, kAsItIs>, update_logged<true, kClipAndFactor>, update_logged<true, kAndL2>}};
  return kUpdates[step.amsgrad][step.transform];
}

inline Operands<float> operands_at(const StepArgs& step, const TensorArgs& tensor, int64_t begin, const float* grad) {
  return {static_cast<float*>(tensor.var) + begin, grad, static_cast<float*>(tensor.m) + begin,
          static_cast<float*>(tensor.v) + begin, step.amsgrad ? static_cast<float*>(tensor.vhat) + begin : nullptr};
}

// Packs misses into a byte for each element, and counts those that do not fit.
template <bool kAmsgrad>
int32_t pack_misses(Misses& misses, int64_t size, uint8_t* __restrict codes) {
  const uint32_t* __restrict var = misses.of[kLoggedVar];
  const uint32_t* __restrict m = misses.of[kLoggedM];
  const uint32_t* __restrict v = misses.of[kLoggedV];
  const uint32_t* __restrict vhat = misses.of[kLoggedVhat];
  uint32_t room[kTile];
  uint32_t counts[kTile];
  int32_t escapes = 0;
#pragma omp simd reduction(+ : escapes)
  for (int64_t i = 0; i < size; ++i) {
    const bool var_fits = var[i] < kCodesOfVar;
    const bool m_fits = m[i] < kCodesOfM;
    const bool v_fits = v[i] < kCodesOfVar;
    room[i] = packed(var_fits ? var[i] : 0, m_fits ? m[i] : 0, v_fits ? v[i] : 0);
    counts[i] = (var_fits ? 0u : 1u) + (m_fits ? 0u : 1u) + (v_fits ? 0u : 1u);
    if constexpr (kAmsgrad) counts[i] += vhat[i] == 0 ? 0u : 1u;
    escapes += static_cast<int32_t>(counts[i]);
  }
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) codes[i] = static_cast<uint8_t>(room[i]);
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) misses.escapes[i] = static_cast<uint8_t>(counts[i]);
  return escapes;
}

// Differs if an element changes, or if elements change places; but for one time in 2^32.
inline uint32_t checksum_of(const float* __restrict grad, int64_t size) {
  uint32_t sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < size; ++i) {
    const auto bits = bit_cast<uint32_t>(grad[i]);
    const uint32_t mixed = ((bits ^ (bits >> 16)) + static_cast<uint32_t>(i) * 0x85ebca6bu) * 0x9e3779b1u;
    sum += mixed ^ (mixed >> 15);
  }
  return sum;
}

inline void write_escape(char*& to, int64_t i, LoggedArray array, uint32_t miss) {
  const auto where = static_cast<uint16_t>(kLoggedArrays * i + array);
  std::memcpy(to, &where, sizeof(where));
  std::memcpy(to + sizeof(where), &miss, sizeof(miss));
  to += kEscapeBytes;
}

// `escapes`: their number.
inline void write_escapes(const Misses& misses, int32_t escapes, bool amsgrad, char* to) {
  for (int64_t i = 0; escapes > 0; ++i) {
    uint64_t eight = 1;
    if (i % 8 == 0) std::memcpy(&eight, misses.escapes + i, sizeof(eight));
    if (eight == 0) i += 7;  // nothing in eight elements
    if (eight == 0 || misses.escapes[i] == 0) continue;
    escapes -= misses.escapes[i];
    if (misses.of[kLoggedVar][i] >= kCodesOfVar) write_escape(to, i, kLoggedVar, misses.of[kLoggedVar][i]);
    if (misses.of[kLoggedM][i] >= kCodesOfM) write_escape(to, i, kLoggedM, misses.of[kLoggedM][i]);
    if (misses.of[kLoggedV][i] >= kCodesOfVar) write_escape(to, i, kLoggedV, misses.of[kLoggedV][i]);
    if (amsgrad && misses.of[kLoggedVhat][i] != 0) write_escape(to, i, kLoggedVhat, misses.of[kLoggedVhat][i]);
  }
}

// Updates a tile of a float32 variable with a dense gradient, and logs what it was.
inline void adam_logged(const StepArgs& step, const TensorArgs& tensor, int64_t begin, int64_t end, int64_t place) {
  const StepScalars<float>& s = step.scalars_f32;
  const int64_t size = end - begin;
  Misses misses;
  float converted[kTile];
  const float* grad = gradient_of(tensor, begin, size, converted);
  update_logged_for(step)(operands_at(step, tensor, begin, grad), size, s, factor_of<float>(step, tensor),
                          tensor.decays ? s.keep : 1.0f, step.prefetch, misses);
  const StepLog& log = *step.log;
  TileLog& tile = log.tiles[place];
  const auto pack = step.amsgrad ? pack_misses<true> : pack_misses<false>;
  const int32_t escapes = pack(misses, size, log.codes + place * kTile);
  tile.escapes = static_cast<uint16_t>(escapes);
  tile.checksum = checksum_of(grad, size);
  tile.is_changed = false;
  const int64_t arrays = step.amsgrad ? kLoggedArrays : kLoggedArrays - 1;
  const int64_t whole = arrays * size * static_cast<int64_t>(sizeof(uint32_t));
  tile.is_whole = escapes * kEscapeBytes > whole;
  const int64_t bytes = tile.is_whole ? whole : escapes * kEscapeBytes;
  tile.offset = bytes == 0 ? 0 : __atomic_fetch_add(log.used, bytes, __ATOMIC_RELAXED);
  char* to = log.arena + tile.offset;
  if (!tile.is_whole && bytes > 0) return write_escapes(misses, escapes, step.amsgrad, to);
  for (int64_t array = 0; tile.is_whole && array < arrays; ++array) {
    std::memcpy(to + array * (whole / arrays), misses.of[array], static_cast<size_t>(whole / arrays));
  }
}

// Reads what adam_logged() has logged of a tile.
inline void read_misses(const StepLog& log, int64_t place, int64_t size, bool amsgrad, Misses& misses) {
  const TileLog& tile = log.tiles[place];
  const int64_t arrays = amsgrad ? kLoggedArrays : kLoggedArrays - 1;
  const char* from = log.arena + tile.offset;
  const size_t row = static_cast<size_t>(size) * sizeof(uint32_t);
  for (int64_t array = 0; tile.is_whole && array < arrays; ++array, from += row) {
    std::memcpy(misses.of[array], from, row);
  }
  if (tile.is_whole) return;
  const uint8_t* __restrict codes = log.codes + place * kTile;
  uint32_t* __restrict var = misses.of[kLoggedVar];
  uint32_t* __restrict m = misses.of[kLoggedM];
  uint32_t* __restrict v = misses.of[kLoggedV];
  uint32_t* __restrict vhat = misses.of[kLoggedVhat];
  uint32_t room[kTile];
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) room[i] = codes[i];
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    const uint32_t others = (room[i] * 2341) >> 16;  // room[i] / kCodesOfM, exactly below 256
    m[i] = room[i] - others * kCodesOfM;
    v[i] = (others * 86) >> 8;  // others / kCodesOfVar, exactly below 10
    var[i] = others - v[i] * kCodesOfVar;
    vhat[i] = 0;
  }
  static_assert(kCodesOfM == 28 && kCodesOfVar == 3, "the divisions above");
  for (int k = 0; k < tile.escapes; ++k, from += kEscapeBytes) {
    uint16_t where;
    std::memcpy(&where, from, sizeof(where));
    std::memcpy(&misses.of[where % kLoggedArrays][where / kLoggedArrays], from + sizeof(where), sizeof(uint32_t));
  }
}

template <bool kAmsgrad, int kTransform>
__attribute__((noinline)) void undo_elements(const Operands<float>& all, int64_t size,
                                             const StepScalars<float>& scalars, FactorPair<float> factor, float keep,
                                             const Misses& misses) {
  const StepScalars<float> s = scalars;
  const Inverses inverse(s, keep);
  float* __restrict var = all.var;
  const float* __restrict grad = all.grad;
  float* __restrict m = all.m;
  float* __restrict v = all.v;
  float* __restrict vhat = all.vhat;
  const uint32_t* __restrict var_misses = misses.of[kLoggedVar];
  const uint32_t* __restrict m_misses = misses.of[kLoggedM];
  const uint32_t* __restrict v_misses = misses.of[kLoggedV];
  const uint32_t* __restrict vhat_misses = misses.of[kLoggedVhat];
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    float vhat_i = kAmsgrad ? vhat[i] : 0.0f;
    const float displacement = adam_displacement<kAmsgrad>(m[i], v[i], vhat_i, s.alpha, s.epsilon);
    const float var_i = corrected(var_before(var[i], displacement, inverse), var_misses[i], kCodesOfVar);
    float g = grad[i];
    if constexpr (kTransform != kAsItIs) g = transform_gradient(g, s.clip_value, factor);
    if constexpr (kTransform == kAndL2) g = add_l2(g, var_i, s.l2);
    var[i] = var_i;
    m[i] = corrected(m_before(m[i], g, s, inverse), m_misses[i], kCodesOfM);
    v[i] = corrected(v_before(v[i], g, s, inverse), v_misses[i], kCodesOfVar);
    if constexpr (kAmsgrad) vhat[i] = bit_cast<float>(bit_cast<uint32_t>(vhat[i]) ^ vhat_misses[i]);
  }
}

// Undoes adam_logged(), of the moments only with the same gradient.
inline void adam_undo(const StepArgs& step, const TensorArgs& tensor, int64_t begin, int64_t end, int64_t place) {
  static constexpr decltype(&undo_elements<false, kAsItIs>) kUndo[2][kTransformCount] = {
      {undo_elements<false, kAsItIs>, undo_elements<false, kClipAndFactor>, undo_elements<false, kAndL2>},
      {undo_elements<true, kAsItIs>, undo_elements<true, kClipAndFactor>, undo_elements<true, kAndL2>}};
  const StepScalars<float>& s = step.scalars_f32;
  const int64_t size = end - begin;
  Misses misses;
  read_misses(*step.log, place, size, step.amsgrad, misses);
  float converted[kTile];
  const float* grad = gradient_of(tensor, begin, size, converted);
  const Operands<float> all = operands_at(step, tensor, begin, grad);
  TileLog& tile = step.log->tiles[place];
  tile.is_changed = checksum_of(grad, size) != tile.checksum;
  float moments[2][kTile];
  const size_t bytes = tile.is_changed ? static_cast<size_t>(size) * sizeof(float) : 0;
  std::memcpy(moments[0], all.m, bytes);
  std::memcpy(moments[1], all.v, bytes);
  kUndo[step.amsgrad][step.transform](all, size, s, factor_of<float>(step, tensor), tensor.decays ? s.keep : 1.0f,
                                      misses);
  std::memcpy(all.m, moments[0], bytes);
  std::memcpy(all.v, moments[1], bytes);
}

}  // namespace
}  // namespace fastadam::cpu::FASTADAM_ISA
