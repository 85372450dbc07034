// SPDX-License-Identifier: Apache-2.0
// Part of kernels.cpp and included by nothing else: steps that can be undone (../core/undo.h), and undoing them.
#pragma once

#include <cstring>

#include "../core/undo.h"
#include "lanes.h"

namespace fastadam::cpu::FASTADAM_ISA {
namespace {

// The values of a tile before a step, and what is logged of each element.
struct TileRoom {
  alignas(kCacheLineBytes) float var[kTile];
  alignas(kCacheLineBytes) float m[kTile];
  alignas(kCacheLineBytes) float v[kTile];
  alignas(kCacheLineBytes) float vhat[kTile];
  alignas(kCacheLineBytes) uint32_t codes[kTile];
  alignas(kCacheLineBytes) uint32_t escapes[kTile];  // a bit for each LoggedArray
};

template <bool kAmsgrad, int kTransform>
__attribute__((noinline)) void update_logged(const Operands<float>& all, int64_t size,
                                             const StepScalars<float>& scalars, FactorPair<float> factor, float keep,
                                             bool prefetch, TileRoom& room) {
  const StepScalars<float> s = scalars;
  const Inverses inverse(s, keep);
  float* __restrict var = all.var;
  const float* __restrict grad = all.grad;
  float* __restrict m = all.m;
  float* __restrict v = all.v;
  float* __restrict vhat = all.vhat;
  for (int64_t block = 0; block < size; block += kBlock) {
    if (prefetch) prefetch_block(sizeof(float), var + block, grad + block, m + block, v + block);
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
      const uint32_t var_code = miss(var_was, var_before(var_i, displacement, inverse), kCodesOfVar);
      const uint32_t m_code = miss(m_was, m_before(m_i, g, s, inverse), kCodesOfM);
      const uint32_t v_code = miss(v_was, v_before(v_i, g, s, inverse), kCodesOfVar);
      room.codes[i] = packed(var_code, m_code, v_code);
      room.escapes[i] = (var_code < kCodesOfVar ? 0u : 1u << kLoggedVar) | (m_code < kCodesOfM ? 0u : 1u << kLoggedM) |
                        (v_code < kCodesOfVar ? 0u : 1u << kLoggedV);
      if constexpr (kAmsgrad) {
        room.escapes[i] |= bit_cast<uint32_t>(vhat_i) == bit_cast<uint32_t>(vhat_was) ? 0u : 1u << kLoggedVhat;
        room.vhat[i] = vhat_was;
        vhat[i] = vhat_i;
      }
      room.var[i] = var_was;
      room.m[i] = m_was;
      room.v[i] = v_was;
      var[i] = var_i;
      m[i] = m_i;
      v[i] = v_i;
    }
  }
}

using UpdateLogged = void (*)(const Operands<float>& all, int64_t size, const StepScalars<float>& scalars,
                              FactorPair<float> factor, float keep, bool prefetch, TileRoom& room);

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

// Appends `bytes` to the arena.
inline char* append(const StepLog& log, TileLog& tile, int64_t bytes) {
  tile.offset = __atomic_fetch_add(log.used, bytes, __ATOMIC_RELAXED);
  return log.arena + tile.offset;
}

inline void write_escape(char*& to, int64_t i, LoggedArray array, float value) {
  const auto where = static_cast<uint16_t>(4 * i + array);
  std::memcpy(to, &where, 2);
  std::memcpy(to + 2, &value, 4);
  to += kEscapeBytes;
}

inline void write_escapes(const TileRoom& room, int64_t size, char* to) {
  for (int64_t i = 0; i < size; ++i) {
    const uint32_t bits = room.escapes[i];
    if (bits == 0) continue;
    if ((bits >> kLoggedVar & 1) != 0) write_escape(to, i, kLoggedVar, room.var[i]);
    if ((bits >> kLoggedM & 1) != 0) write_escape(to, i, kLoggedM, room.m[i]);
    if ((bits >> kLoggedV & 1) != 0) write_escape(to, i, kLoggedV, room.v[i]);
    if ((bits >> kLoggedVhat & 1) != 0) write_escape(to, i, kLoggedVhat, room.vhat[i]);
  }
}

inline int32_t count_escapes(const TileRoom& room, int64_t size) {
  int32_t count = 0;
#pragma omp simd reduction(+ : count)
  for (int64_t i = 0; i < size; ++i) {
    const auto bits = static_cast<int32_t>(room.escapes[i]);
    count += (bits & 1) + (bits >> 1 & 1) + (bits >> 2 & 1) + (bits >> 3 & 1);
  }
  return count;
}

// Updates a tile of a float32 variable with a dense gradient, and logs what it was.
inline void adam_logged(const StepArgs& step, const TensorArgs& tensor, int64_t begin, int64_t end, int64_t place) {
  const StepScalars<float>& s = step.scalars_f32;
  const int64_t size = end - begin;
  const auto floats = static_cast<size_t>(size) * sizeof(float);
  TileRoom room;
  float converted[kTile];
  const float* grad = gradient_of(tensor, begin, size, converted);
  update_logged_for(step)(operands_at(step, tensor, begin, grad), size, s, factor_of<float>(step, tensor),
                          tensor.decays ? s.keep : 1.0f, step.prefetch, room);
  const StepLog& log = *step.log;
  TileLog& tile = log.tiles[place];
  tile.escapes = count_escapes(room, size);
  tile.is_whole = tile.escapes * kEscapeBytes > static_cast<int64_t>(3 * floats);
  if (tile.is_whole) {
    char* to = append(log, tile, static_cast<int64_t>((step.amsgrad ? 4 : 3) * floats));
    const float* const arrays[] = {room.var, room.m, room.v, room.vhat};
    for (int i = 0; i < (step.amsgrad ? 4 : 3); ++i, to += floats) std::memcpy(to, arrays[i], floats);
    return;
  }
  uint8_t* __restrict codes = log.codes + place * kTile;
  for (int64_t i = 0; i < size; ++i) codes[i] = static_cast<uint8_t>(room.codes[i]);
  write_escapes(room, size, append(log, tile, tile.escapes * kEscapeBytes));
}

// Puts escapes of one array back.
inline void restore_escapes(const char* from, int32_t count, LoggedArray array, float* values) {
  for (int32_t k = 0; k < count; ++k, from += kEscapeBytes) {
    uint16_t where;
    std::memcpy(&where, from, 2);
    if (where % 4 == array) std::memcpy(values + where / 4, from + 2, 4);
  }
}

template <bool kAmsgrad>
void undo_tile(const StepArgs& step, const TensorArgs& tensor, int64_t begin, int64_t size, const TileLog& tile,
               const uint8_t* codes) {
  const StepScalars<float> s = step.scalars_f32;
  const FactorPair<float> factor = factor_of<float>(step, tensor);
  const float keep = tensor.decays ? s.keep : 1.0f;
  const Inverses inverse(s, keep);
  float converted[kTile];
  const Operands<float> all = operands_at(step, tensor, begin, gradient_of(tensor, begin, size, converted));
  const char* escapes = step.log->arena + tile.offset;
  for (int64_t i = 0; i < size; ++i) {
    float vhat = kAmsgrad ? all.vhat[i] : 0.0f;
    const float displacement = adam_displacement<kAmsgrad>(all.m[i], all.v[i], vhat, s.alpha, s.epsilon);
    const uint32_t code = codes[i] / kCodesOfM % kCodesOfVar;
    all.var[i] = corrected(var_before(all.var[i], displacement, inverse), code, kCodesOfVar);
  }
  restore_escapes(escapes, tile.escapes, kLoggedVar, all.var);
  for (int64_t i = 0; i < size; ++i) {
    float g = all.grad[i];
    if (step.transform != kAsItIs) g = transform_gradient(g, s.clip_value, factor);
    if (step.transform == kAndL2) g = add_l2(g, all.var[i], s.l2);
    all.m[i] = corrected(m_before(all.m[i], g, s, inverse), codes[i] % kCodesOfM, kCodesOfM);
    all.v[i] = corrected(v_before(all.v[i], g, s, inverse), codes[i] / (kCodesOfM * kCodesOfVar), kCodesOfVar);
  }
  restore_escapes(escapes, tile.escapes, kLoggedM, all.m);
  restore_escapes(escapes, tile.escapes, kLoggedV, all.v);
  if constexpr (kAmsgrad) restore_escapes(escapes, tile.escapes, kLoggedVhat, all.vhat);
}

// Undoes adam_logged().
inline void adam_undo(const StepArgs& step, const TensorArgs& tensor, int64_t begin, int64_t end, int64_t place) {
  const int64_t size = end - begin;
  const TileLog& tile = step.log->tiles[place];
  if (!tile.is_whole) {
    const auto undo = step.amsgrad ? undo_tile<true> : undo_tile<false>;
    return undo(step, tensor, begin, size, tile, step.log->codes + place * kTile);
  }
  const auto floats = static_cast<size_t>(size) * sizeof(float);
  const char* from = step.log->arena + tile.offset;
  void* const arrays[] = {tensor.var, tensor.m, tensor.v, tensor.vhat};
  for (int i = 0; i < (step.amsgrad ? 4 : 3); ++i, from += floats) {
    std::memcpy(static_cast<float*>(arrays[i]) + begin, from, floats);
  }
}

}  // namespace
}  // namespace fastadam::cpu::FASTADAM_ISA
