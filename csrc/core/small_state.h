// SPDX-License-Identifier: Apache-2.0
// Moments of one or two bytes, and variables in two halves: how they are stored, rounded at random, and read again.
//
// 8-bit moments come in blocks of kCodeBlock elements with a byte f each, whose scale is 2^(f - 127). An element has a
// code: of m a sign, 4 bits of exponent and 3 of mantissa; of v 5 bits of exponent and 3 of mantissa. It is the float32
// of |x| / scale + kOffset without the bits that are lost, and rounding is the addition of random bits before these are
// cut off: what is read is right in the mean. The offset makes code 0 exactly 0. A v above 0 never becomes 0. If an
// element is not finite, the whole block reads as NaN. Memory of zeros is a state of zeros. No number that is read is
// denormal.
//
// bfloat16 moments, and bfloat16 variables that are to be, are rounded at random too. A variable in two halves is a
// bfloat16 and an int16, which together have the bits of a float32; ties are rounded away from zero, as the int16 of
// one neighbour of a tie would overflow otherwise.
#pragma once

#include <cstdint>

#include "dtypes.h"

namespace fastadam {

constexpr int64_t kCodeBlock = 128;

FASTADAM_INLINE int64_t code_blocks(int64_t size) { return (size + kCodeBlock - 1) / kCodeBlock; }

constexpr int kCodeShift = 20;        // the bits of a float32 that a code lacks
constexpr uint32_t kNoScale = 255;    // the byte of a block that is not finite
constexpr uint32_t kLeastScale = 35;  // of other bytes, except 0
constexpr uint32_t kMostScale = 253;

// The code of m, or of v.
template <bool kIsM>
struct Code {
  static constexpr float kOffset = kIsM ? 0x1p-15f : 0x1p-31f;
  static constexpr uint32_t kBase = kIsM ? 896 : 768;            // of kOffset, without the lost bits
  static constexpr uint32_t kRoom = kIsM ? 0x1000ff : 0x0fffff;  // keeps the largest code from a carry
};

// The byte of a block whose largest |x| has the bits `top`.
template <bool kIsM>
FASTADAM_INLINE uint8_t scale_of(uint32_t top) {
  const uint32_t scale = (top + Code<kIsM>::kRoom) >> 23;
  return static_cast<uint8_t>(scale > kMostScale ? kNoScale : scale < kLeastScale ? kLeastScale : scale);
}

// What codes are multiplied by, and what |x| is multiplied by before it is encoded: 0 makes all codes 0.
FASTADAM_INLINE float scale_value(uint8_t scale) {
  return bit_cast<float>(scale == kNoScale ? 0x7fc00000u : static_cast<uint32_t>(scale) << 23);
}
FASTADAM_INLINE float inverse_scale(uint8_t scale) {
  return scale == kNoScale ? 0.0f : bit_cast<float>((254u - scale) << 23);
}

FASTADAM_INLINE uint32_t magnitude_bits(float x) { return bit_cast<uint32_t>(x) & 0x7fffffffu; }

// `random`: 20 bits.
template <bool kIsM>
FASTADAM_INLINE uint32_t encoded(float x, float inverse, uint32_t random) {
  const float y = bit_cast<float>(magnitude_bits(x)) * inverse + Code<kIsM>::kOffset;
  const uint32_t code = ((bit_cast<uint32_t>(y) + random) >> kCodeShift) - Code<kIsM>::kBase;
  if constexpr (kIsM) return code | ((bit_cast<uint32_t>(x) >> 24) & 0x80u);
  const uint32_t least = x > 0 ? 1 : 0;
  return code > least ? code : least;
}

template <bool kIsM>
FASTADAM_INLINE float decoded(uint32_t code, float scale) {
  const uint32_t magnitude = kIsM ? code & 0x7fu : code;
  const float x = (bit_cast<float>((magnitude + Code<kIsM>::kBase) << kCodeShift) - Code<kIsM>::kOffset) * scale;
  return kIsM ? bit_cast<float>(bit_cast<uint32_t>(x) | (code & 0x80u) << 24) : x;
}

// A float32 of which only the bits of a bfloat16 are left. `random`: 16 bits.
FASTADAM_INLINE float rounded_at_random(float x, uint32_t random) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t is_nan = magnitude_bits(x) > 0x7f800000u ? 1 : 0;
  return bit_cast<float>(is_nan != 0 ? bits : (bits + random) & 0xffff0000u);
}

// The halves of a variable, and the float32 that they are.
FASTADAM_INLINE uint32_t high_half(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  return magnitude_bits(x) > 0x7f800000u ? bits >> 16 | 0x40u : (bits + 0x8000u) >> 16;
}
FASTADAM_INLINE uint32_t low_half(float x, uint32_t high) {
  return magnitude_bits(x) > 0x7f800000u ? 0 : bit_cast<uint32_t>(x) - (high << 16);
}
// If something else has set the variable to zero, a negative low half is left over and is ignored.
FASTADAM_INLINE float joined(uint32_t high, int32_t low) {
  const int32_t magnitude = static_cast<int32_t>((high & 0x7fffu) << 16) + low;
  return bit_cast<float>((high & 0x8000u) << 16 | static_cast<uint32_t>(magnitude < 0 ? 0 : magnitude));
}

// ---- random numbers: of an element of a parameter in a step, whichever thread asks for them ----

// SplitMix64 (Steele, Lea, Flood 2014).
FASTADAM_INLINE uint64_t mix64(uint64_t z) {
  z += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

enum RandomStream : uint64_t { kOfMoments, kOfVariables };

FASTADAM_INLINE uint64_t random_key(uint64_t seed, int64_t step, uint64_t parameter) {
  return mix64(mix64(mix64(seed) + static_cast<uint64_t>(step)) + parameter);
}

constexpr int64_t kRandomLanes = 16;

// The key of the words of kCodeBlock elements from `begin`, a multiple of that. Lane i has the words of elements i, i +
// kRandomLanes, ... of these. Only the high 20 bits of a word are random enough.
FASTADAM_INLINE uint64_t block_key(uint64_t key, RandomStream stream, int64_t begin) {
  return mix64(key + 2 * (static_cast<uint64_t>(begin) >> 32) + stream);
}
// The first words of lanes, whose numbers are `lane`: uint32_t, or a vector of these.
template <class Word>
FASTADAM_INLINE Word first_word(uint64_t key_of_block, int64_t begin, Word lane) {
  const uint32_t block = static_cast<uint32_t>(begin) / static_cast<uint32_t>(kCodeBlock);
  Word x = (lane + block * static_cast<uint32_t>(kRandomLanes)) * 0x9e3779b9u + static_cast<uint32_t>(key_of_block);
  x ^= x >> 16;
  x *= 0x21f0aaadu;
  x ^= x >> 15;
  x += static_cast<uint32_t>(key_of_block >> 32);
  x *= 0x735a2d97u;
  return x ^ (x >> 15);
}
template <class Word>
FASTADAM_INLINE Word next_word(Word word) {
  return word * 0x915f77f5u + 0x6a09e667u;
}

}  // namespace fastadam
