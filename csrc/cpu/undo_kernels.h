// SPDX-License-Identifier: Apache-2.0
// Part of kernels.cpp and included by nothing else: undoing the steps of logged_kernels.h.
#pragma once

#include <cstring>

#include "../core/undo.h"
#include "lanes.h"
#include "logged_kernels.h"

namespace fastadam::cpu::FASTADAM_ISA {
namespace {

// What was logged of a tile, by LoggedArray: misses with the bias of kInWord, and of vhat the bits that have changed;
// or values, in blocks of which these are stored.
struct alignas(kCacheLineBytes) LoggedTile {
  uint32_t of[kLoggedArrays][kTile];
};

// Returns whether values of a block are stored.
template <bool kAmsgrad>
bool read_escapes(const uint8_t* codes, int64_t size, const char* from, LoggedTile& tile) {
  const auto take = [&from](void* to, size_t bytes) {
    std::memcpy(to, from, bytes);
    from += bytes;
  };
  bool has_values = false;
  for (int64_t at = 0; at < size; at += kLogBlock) {
    if (codes[at] == kRaw) {
      has_values = true;
      for (int array = 0; array < (kAmsgrad ? 4 : 3); ++array) take(tile.of[array] + at, kLogBlock * sizeof(uint32_t));
      continue;
    }
    for_each_escape(codes + at, [&](int64_t i) {
      uint32_t word;
      take(&word, sizeof(word));
      const Misses misses = from_word(word);
      tile.of[kLoggedVar][at + i] = misses.var;
      tile.of[kLoggedM][at + i] = misses.m;
      tile.of[kLoggedV][at + i] = misses.v;
      if constexpr (kAmsgrad) take(&tile.of[kLoggedVhat][at + i], sizeof(uint32_t));
    });
  }
  return has_values;
}

// Likewise.
template <bool kAmsgrad>
FASTADAM_INLINE bool read_tile(const uint8_t* __restrict codes, int64_t size, const char* escapes, LoggedTile& tile) {
  uint32_t* __restrict var = tile.of[kLoggedVar];
  uint32_t* __restrict m = tile.of[kLoggedM];
  uint32_t* __restrict v = tile.of[kLoggedV];
  uint32_t* __restrict vhat = tile.of[kLoggedVhat];
  uint32_t bytes[kTile];
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) bytes[i] = codes[i];
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    var[i] = widened(var_of(bytes[i]), kInByte.var, kInWord.var);
    m[i] = widened(m_of(bytes[i]), kInByte.m, kInWord.m);
    v[i] = widened(v_of(bytes[i]), kInByte.v, kInWord.v);
    if constexpr (kAmsgrad) vhat[i] = 0;
  }
  return read_escapes<kAmsgrad>(codes, size, escapes, tile);
}

// Undoes the step of a block that starts at element `at` of a tile.
template <bool kAmsgrad, int kTransform>
FASTADAM_INLINE void undo_elements(const Operands<float>& block, int64_t at, int64_t size, const LoggedStep& step,
                                   const LoggedTile& tile) {
  const StepScalars<float>& s = step.scalars;
  const uint32_t* __restrict var_misses = tile.of[kLoggedVar] + at;
  const uint32_t* __restrict m_misses = tile.of[kLoggedM] + at;
  const uint32_t* __restrict v_misses = tile.of[kLoggedV] + at;
  const uint32_t* __restrict raised = tile.of[kLoggedVhat] + at;
  float* __restrict var = block.var;
  const float* __restrict grad = block.grad;
  float* __restrict m = block.m;
  float* __restrict v = block.v;
  float* __restrict vhat = block.vhat;
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    float vhat_i = kAmsgrad ? vhat[i] : 0.0f;
    const float displacement = adam_displacement<kAmsgrad>(m[i], v[i], vhat_i, s.alpha, s.epsilon);
    const float var_i = corrected(var_before(var[i], displacement, step.inverse), var_misses[i], kInWord.var);
    const float g = transformed<kTransform>(grad[i], var_i, step);
    var[i] = var_i;
    m[i] = corrected(m_before(m[i], g, s, step.inverse), m_misses[i], kInWord.m);
    v[i] = corrected(v_before(v[i], g, s, step.inverse), v_misses[i], kInWord.v);
    if constexpr (kAmsgrad) vhat[i] = bit_cast<float>(bit_cast<uint32_t>(vhat[i]) ^ raised[i]);
  }
}

template <bool kAmsgrad>
void restore_block(const Operands<float>& block, int64_t at, int64_t size, const LoggedTile& tile) {
  float* const arrays[] = {block.var, block.m, block.v, block.vhat};
  for (int array = 0; array < (kAmsgrad ? 4 : 3); ++array) {
    std::memcpy(arrays[array], tile.of[array] + at, static_cast<size_t>(size) * sizeof(float));
  }
}

template <bool kAmsgrad, int kTransform>
void undo_tile(const Operands<float>& all, int64_t size, const LoggedStep& step, const uint8_t* codes,
               const char* escapes) {
  const LoggedStep here = step;
  LoggedTile tile;
  const bool has_values = read_tile<kAmsgrad>(codes, size, escapes, tile);
  for (int64_t at = 0; at < size; at += kBlock) {
    const Operands<float> block = operands_from<kAmsgrad>(all, at);
    if (here.prefetch) prefetch_far(sizeof(float), block.var, block.grad, block.m, block.v);
    if (!has_values && size - at >= kBlock) {
      undo_elements<kAmsgrad, kTransform>(block, at, kBlock, here, tile);
      continue;
    }
    for (int64_t i = at; i < size && i < at + kBlock; i += kLogBlock) {
      const int64_t count = size - i < kLogBlock ? size - i : kLogBlock;
      if (codes[i] == kRaw) {
        restore_block<kAmsgrad>(operands_from<kAmsgrad>(all, i), i, count, tile);
      } else {
        undo_elements<kAmsgrad, kTransform>(operands_from<kAmsgrad>(all, i), i, count, here, tile);
      }
    }
  }
}

// Of the elements of a tile.
inline uint32_t checksum_of_tile(const float* __restrict grad, int64_t size) {
  uint32_t lanes[kBlock] = {};
  int64_t at = 0;
  for (; at + kBlock <= size; at += kBlock) {
#pragma omp simd
    for (int64_t i = 0; i < kBlock; ++i) lanes[i] = checksum_with(lanes[i], grad[at + i]);
  }
  for (int64_t i = 0; at + i < size; ++i) lanes[i] = checksum_with(lanes[i], grad[at + i]);
  return checksum_of(lanes);
}

// Whether the gradient of a tile is the one of adam_logged().
inline bool has_logged_gradient(const StepArgs& step, const TensorArgs& tensor, int64_t begin, int64_t end,
                                int64_t place) {
  float converted[kTile];
  const float* const grad = gradient_of(tensor, begin, end - begin, converted);
  return checksum_of_tile(grad, end - begin) == step.log->tiles[place].checksum;
}

// Undoes adam_logged(), of the moments only with the same gradient.
inline void adam_undo(const StepArgs& step, const TensorArgs& tensor, int64_t begin, int64_t end, int64_t place) {
  static constexpr decltype(&undo_tile<false, kAsItIs>) kUndo[2][kTransformCount] = {
      {undo_tile<false, kAsItIs>, undo_tile<false, kClipAndFactor>, undo_tile<false, kAndL2>},
      {undo_tile<true, kAsItIs>, undo_tile<true, kClipAndFactor>, undo_tile<true, kAndL2>}};
  const int64_t size = end - begin;
  float converted[kTile];
  const float* grad = gradient_of(tensor, begin, size, converted);
  const Operands<float> all = operands_at(step, tensor, begin, grad);
  TileLog& tile = step.log->tiles[place];
  tile.is_changed = checksum_of_tile(grad, size) != tile.checksum;
  float moments[2][kTile];
  const size_t bytes = tile.is_changed ? static_cast<size_t>(size) * sizeof(float) : 0;
  std::memcpy(moments[0], all.m, bytes);
  std::memcpy(moments[1], all.v, bytes);
  kUndo[step.amsgrad][step.transform](all, size, LoggedStep(step, tensor), step.log->codes + place * kTile,
                                      step.log->arena + tile.offset);
  std::memcpy(all.m, moments[0], bytes);
  std::memcpy(all.v, moments[1], bytes);
}

}  // namespace
}  // namespace fastadam::cpu::FASTADAM_ISA
