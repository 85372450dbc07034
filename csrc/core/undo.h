// SPDX-License-Identifier: Apache-2.0
// How a step of a float32 variable with a dense gradient is undone to the bit, with about one byte for each element.
//
// From the variable and its moments after the step, and the gradient, the values before the step are computed
// backwards. That misses them by a few units in the last place, which are logged: a byte has that of m in [-14, 13] and
// those of the variable and of v in [-1, 1]. Misses that do not fit escape: the byte is kNear, and a word of 32 bits
// has larger ones. If these do not fit either, as in the first steps, the whole block is kRaw, and its values are
// stored.
//
// The variable and vhat come back without the gradient. If it has changed, which a checksum shows, only the moments of
// the tile cannot be computed: they stay as the step has left them.
#pragma once

#include <cstdint>

#include "adam_math.h"
#include "split.h"

namespace fastadam {

enum LoggedArray : int { kLoggedVar, kLoggedM, kLoggedV, kLoggedVhat };
constexpr int64_t kLoggedArrays = 4;
constexpr int64_t kLogBlock = 16;            // elements that are stored together if one of them does not fit in a word
constexpr int64_t kWholeBytes = 16 * kTile;  // the most escapes of a tile: all of its values
static_assert(kTile % kLogBlock == 0, "a block is in one tile");

struct TileLog {
  int64_t offset;     // of its escapes in the arena, in the order of the elements
  uint32_t checksum;  // of the gradient
  bool is_changed;    // when it was undone, the gradient was another one
};

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

// How far `value` is from what was computed, in units in the last place: 0 to `count` - 1, or more if it does not fit.
FASTADAM_INLINE uint32_t miss(float value, float computed, uint32_t count) {
  return bit_cast<uint32_t>(value) - bit_cast<uint32_t>(computed) + count / 2;
}
FASTADAM_INLINE float corrected(float computed, uint32_t miss, uint32_t count) {
  return bit_cast<float>(bit_cast<uint32_t>(computed) + miss - count / 2);
}

// The misses of an element, by the number of values that each may have.
struct Misses {
  uint32_t var;
  uint32_t m;
  uint32_t v;
};

// How many values of each miss fit in a byte, and in a word.
constexpr Misses kInByte{3, 28, 3};
constexpr Misses kInWord{1 << 10, 1 << 14, 1 << 8};

// Bytes that are not the misses of an element: of an element that has a word, and with AMSGrad also the exclusive or of
// the bits of vhat before and after the step; and of all elements of a block whose values are stored.
constexpr uint8_t kNear = 254;
constexpr uint8_t kRaw = 255;
constexpr uint32_t kByteCodes = 252;
static_assert(kInByte.var * kInByte.m * kInByte.v == kByteCodes && kNear >= kByteCodes, "a byte holds them");

// Without branches, as loops over elements call these.
FASTADAM_INLINE bool fits(const Misses& misses, const Misses& counts) {
  return (misses.var < counts.var) & (misses.m < counts.m) & (misses.v < counts.v);
}

// A miss with the bias of a word, from one with the bias of a byte.
FASTADAM_INLINE uint32_t widened(uint32_t miss, uint32_t in_byte, uint32_t in_word) {
  return miss + (in_word / 2 - in_byte / 2);
}

FASTADAM_INLINE uint32_t byte_of(const Misses& misses) {
  return misses.m + kInByte.m * (misses.var + kInByte.var * misses.v);
}
// Its parts, one by one, as compilers do not vectorise loops that return structs.
FASTADAM_INLINE uint32_t byte_above_m(uint32_t code) { return (code * 2341) >> 16; }  // code / 28, exactly below 256
FASTADAM_INLINE uint32_t m_of(uint32_t code) { return code - byte_above_m(code) * kInByte.m; }
FASTADAM_INLINE uint32_t v_of(uint32_t code) { return (byte_above_m(code) * 86) >> 8; }  // exactly: a third, below 10
FASTADAM_INLINE uint32_t var_of(uint32_t code) { return byte_above_m(code) - v_of(code) * kInByte.var; }
static_assert(kInByte.m == 28 && kInByte.var == 3, "the divisions");

FASTADAM_INLINE uint32_t word_of(const Misses& misses) { return misses.m | misses.var << 14 | misses.v << 24; }
FASTADAM_INLINE Misses from_word(uint32_t word) { return {word >> 14 & 0x3ff, word & 0x3fff, word >> 24}; }

// Has the highest bit of each of eight bytes that are not the misses of an element.
FASTADAM_INLINE uint64_t escapes_among(uint64_t bytes) {
  return ((bytes & 0x7f7f7f7f7f7f7f7f) + 0x0404040404040404) & bytes & 0x8080808080808080;
}

// The checksum of a gradient has lanes; each takes its elements of a tile one after another. It differs if an
// element changes, or if elements change places; but for one time in 2^32.
FASTADAM_INLINE uint32_t checksum_with(uint32_t sum, float g) {
  const uint32_t mixed = (sum ^ bit_cast<uint32_t>(g)) * 0x9e3779b1u;
  return mixed ^ (mixed >> 15);
}
template <auto kLanes>
FASTADAM_INLINE uint32_t checksum_of(const uint32_t (&lanes)[kLanes]) {
  uint32_t sum = 0;
  for (const uint32_t lane : lanes) {
    sum = (sum ^ lane) * 0x85ebca6bu + 1;
    sum ^= sum >> 16;  // lanes that differ in sign differ in high bits, which the product does not bring down
  }
  return sum;
}

}  // namespace fastadam
