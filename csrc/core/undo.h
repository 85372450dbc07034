// SPDX-License-Identifier: Apache-2.0
// How a step of a float32 variable with a dense gradient is undone to the bit, with about one byte for each element.
//
// From the variable and its moments after the step, and the gradient, the values before the step are computed
// backwards. That misses them by a few units in the last place, which are logged: a byte has that of m in [-14, 13] and
// those of the variable and of v in [-1, 1]. A value that is further away is an escape: it is stored whole. A tile with
// many of these, as in the first steps, is stored whole too.
//
// The variable and vhat come back without the gradient. If it has changed, which a checksum shows, only the moments of
// the tile cannot be computed: they stay as the step has left them.
#pragma once

#include <cstdint>

#include "adam_math.h"
#include "split.h"

namespace fastadam {

// The miss of vhat is the exclusive or of its bits before and after the step: 0 unless AMSGrad has raised it.
enum LoggedArray : int { kLoggedVar, kLoggedM, kLoggedV, kLoggedVhat };
constexpr int64_t kLoggedArrays = 4;
constexpr int64_t kEscapeBytes =
    6;  // 16 bits: the place in the tile times kLoggedArrays, plus the array; then the miss
constexpr int64_t kWholeBytes = 16 * kTile;  // of a tile that is stored whole

struct TileLog {
  int64_t offset;     // in the arena
  uint32_t checksum;  // of the gradient
  uint16_t escapes;   // their number
  bool is_whole;      // then all misses are stored, array by array
  bool is_changed;    // when it was undone, the gradient was another one
};
static_assert(kTile * kLoggedArrays <= 0xffff, "escapes and their places have 16 bits");

// The log of one step. Room: a byte for each element, a TileLog for each tile, kWholeBytes for each tile.
struct StepLog {
  uint8_t* codes;  // of all tiles, kTile bytes each
  TileLog* tiles;
  const int64_t* tile_offsets;  // tiles[tile_offsets[k]]: the first tile of variable k
  char* arena;
  int64_t* used;  // bytes of the arena; raised atomically

  FASTADAM_INLINE int64_t tile(int64_t k, int64_t begin) const { return tile_offsets[k] + begin / kTile; }
};

// Numbers of a step that only undoing it needs.
struct Inverses {
  FASTADAM_INLINE Inverses(const StepScalars<float>& s, float keep_of_variable)
      : keep(1.0f / keep_of_variable),
        beta_1(1.0f / (1.0f - s.one_minus_beta_1)),
        beta_2(1.0f / (1.0f - s.one_minus_beta_2)) {}
  float keep;
  float beta_1;
  float beta_2;
};

// About what the values were before the step that made these of them.
FASTADAM_INLINE float var_before(float var, float displacement, const Inverses& inverse) {
  return (var + displacement) * inverse.keep;
}
FASTADAM_INLINE float m_before(float m, float g, const StepScalars<float>& s, const Inverses& inverse) {
  return (m - g * s.one_minus_beta_1) * inverse.beta_1;
}
FASTADAM_INLINE float v_before(float v, float g, const StepScalars<float>& s, const Inverses& inverse) {
  return (v - (g * g) * s.one_minus_beta_2) * inverse.beta_2;
}

// How far `value` is from what was computed, in units in the last place: 0 to `count` - 1, or more for an escape.
FASTADAM_INLINE uint32_t miss(float value, float computed, uint32_t count) {
  return bit_cast<uint32_t>(value) - bit_cast<uint32_t>(computed) + count / 2;
}
FASTADAM_INLINE float corrected(float computed, uint32_t miss, uint32_t count) {
  return bit_cast<float>(bit_cast<uint32_t>(computed) + miss - count / 2);
}

constexpr uint32_t kCodesOfM = 28;
constexpr uint32_t kCodesOfVar = 3;  // and of v

FASTADAM_INLINE uint32_t packed(uint32_t var, uint32_t m, uint32_t v) {
  return m + kCodesOfM * (var + kCodesOfVar * v);
}

}  // namespace fastadam
