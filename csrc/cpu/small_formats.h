// SPDX-License-Identifier: Apache-2.0
// Part of kernels.cpp and included by nothing else: how the loops of small_kernels.h read and write blocks of
// kCodeBlock elements of gradients, variables and moments, kWidth at a time.
#pragma once

#include <cstring>

#include "../core/small_state.h"
#include "tile_values.h"
#include "vectors.h"

namespace fastadam::cpu::FASTADAM_ISA {
namespace {

constexpr int64_t kVectors = kCodeBlock / kWidth;  // of a block

// ---- how gradients are read ----

struct FloatGradient {
  static constexpr int64_t kBytes = 4;
  FASTADAM_INLINE static Lanes load(const TensorArgs& tensor, int64_t i) {
    return Lanes::load(static_cast<const float*>(tensor.grad) + i);
  }
};

struct BFloat16Gradient {
  static constexpr int64_t kBytes = 2;
  FASTADAM_INLINE static Lanes load(const TensorArgs& tensor, int64_t i) {
    return Lanes(load_words(static_cast<const uint16_t*>(tensor.grad) + i) << 16);
  }
};

// What a block has after its step, until all of it is written.
struct BlockValues {
  Lanes var[kVectors];
  Lanes m[kVectors];
  Lanes v[kVectors];
};

// Has the bits of a bfloat16 in the high halves, unless x is NaN, which may become a number.
FASTADAM_INLINE Words bfloat16_at_random(Lanes x, Words word) { return x.bits() + (word >> 16); }

FASTADAM_INLINE Lanes load_halves(const BFloat16* from) {
  return Lanes(load_words(reinterpret_cast<const uint16_t*>(from)) << 16);
}
FASTADAM_INLINE void store_high(BFloat16* to, Words first, Words second) {
  store_pair<true>(reinterpret_cast<uint16_t*>(to), first, second);
}

// ---- how variables are read and written; load(j) is for the kWidth elements from j * kWidth of a block ----
// If an element would be NaN, a block is left to TileValues, so these need not take care of NaN.

struct FloatVariable {
  using Storage = float;
  float* at;

  FASTADAM_INLINE FloatVariable(const TensorArgs& tensor, int64_t begin)
      : at(static_cast<float*>(tensor.var) + begin) {}
  FASTADAM_INLINE Lanes load(int64_t j) const { return Lanes::load(at + j * kWidth); }
  FASTADAM_INLINE void write(const Lanes* values, uint64_t /*key*/, int64_t /*begin*/) const {
    for (int64_t j = 0; j < kVectors; ++j) values[j].store(at + j * kWidth);
  }
};

struct SplitVariable {
  using Storage = BFloat16;
  BFloat16* high;
  int16_t* low;

  FASTADAM_INLINE SplitVariable(const TensorArgs& tensor, int64_t begin)
      : high(static_cast<BFloat16*>(tensor.var) + begin), low(tensor.low + begin) {}
  // Unlike joined(): what that takes for 0 is NaN.
  FASTADAM_INLINE Lanes load(int64_t j) const {
    return Lanes(load_halves(high + j * kWidth).bits() + load_words(low + j * kWidth));
  }
  FASTADAM_INLINE void write(const Lanes* values, uint64_t /*key*/, int64_t /*begin*/) const {
    for (int64_t j = 0; j < kVectors; j += 2) {
      const Words first = values[j].bits();
      const Words second = values[j + 1].bits();
      store_high(high + j * kWidth, first + 0x8000u, second + 0x8000u);
      store_pair<false>(reinterpret_cast<uint16_t*>(low) + j * kWidth, first, second);
    }
  }
};

struct RandomVariable {
  using Storage = BFloat16;
  BFloat16* at;

  FASTADAM_INLINE RandomVariable(const TensorArgs& tensor, int64_t begin)
      : at(static_cast<BFloat16*>(tensor.var) + begin) {}
  FASTADAM_INLINE Lanes load(int64_t j) const { return load_halves(at + j * kWidth); }
  FASTADAM_INLINE void write(const Lanes* values, uint64_t key, int64_t begin) const {
    RandomWords words(key, kOfVariables, begin);
    for (int64_t j = 0; j < kVectors; j += 2) {
      const Words first = bfloat16_at_random(values[j], words.next(j));
      store_high(at + j * kWidth, first, bfloat16_at_random(values[j + 1], words.next(j + 1)));
    }
  }
};

// ---- how moments are read, noted and written ----

struct FloatMoments {
  static constexpr int64_t kBytes = 4;
  static constexpr bool kTakesNan = true;
  float* m;
  float* v;

  FASTADAM_INLINE FloatMoments(const TensorArgs& tensor, int64_t begin)
      : m(static_cast<float*>(tensor.m) + begin), v(static_cast<float*>(tensor.v) + begin) {}
  FASTADAM_INLINE Lanes load_m(int64_t j) const { return Lanes::load(m + j * kWidth); }
  FASTADAM_INLINE Lanes load_v(int64_t j) const { return Lanes::load(v + j * kWidth); }
  FASTADAM_INLINE void note(Lanes /*m*/, Lanes /*v*/) {}
  FASTADAM_INLINE void write(const BlockValues& values, uint64_t /*key*/, int64_t /*begin*/) const {
    for (int64_t j = 0; j < kVectors; ++j) {
      values.m[j].store(m + j * kWidth);
      values.v[j].store(v + j * kWidth);
    }
  }
};

struct RandomMoments {
  static constexpr int64_t kBytes = 2;
  static constexpr bool kTakesNan = false;
  BFloat16* m;
  BFloat16* v;

  FASTADAM_INLINE RandomMoments(const TensorArgs& tensor, int64_t begin)
      : m(static_cast<BFloat16*>(tensor.m) + begin), v(static_cast<BFloat16*>(tensor.v) + begin) {}
  FASTADAM_INLINE Lanes load_m(int64_t j) const { return load_halves(m + j * kWidth); }
  FASTADAM_INLINE Lanes load_v(int64_t j) const { return load_halves(v + j * kWidth); }
  FASTADAM_INLINE void note(Lanes /*m*/, Lanes /*v*/) {}
  // NaN in a moment makes the variable NaN.
  FASTADAM_INLINE void write(const BlockValues& values, uint64_t key, int64_t begin) const {
    RandomWords words(key, kOfMoments, begin);
    for (int64_t j = 0; j < kVectors; j += 2) {
      const Words first = words.next(j);
      const Words second = words.next(j + 1);
      store_high(m + j * kWidth, bfloat16_at_random(values.m[j], first), bfloat16_at_random(values.m[j + 1], second));
      store_high(v + j * kWidth, bfloat16_at_random(values.v[j], first), bfloat16_at_random(values.v[j + 1], second));
    }
  }
};

// The scale of a block, or its inverse, and the offset of its codes.
template <bool kIsM>
struct BlockCode {
  static constexpr uint32_t kBase = Code<kIsM>::kBase << kCodeShift;
  Lanes scale;
  Lanes offset;

  FASTADAM_INLINE static BlockCode to_read(uint8_t byte) {
    const float value = scale_value(byte);
    return {Lanes(value), Lanes(-Code<kIsM>::kOffset * value)};
  }
  FASTADAM_INLINE static BlockCode to_write(uint8_t byte) {
    return {Lanes(inverse_scale(byte)), Lanes(Code<kIsM>::kOffset)};
  }
};

struct CodedMoments {
  static constexpr int64_t kBytes = 1;
  static constexpr bool kTakesNan = true;
  uint8_t* m;
  uint8_t* v;
  uint8_t* m_scale;
  uint8_t* v_scale;
  BlockCode<true> m_code;
  BlockCode<false> v_code;
  Words m_top{};
  Words v_top{};

  FASTADAM_INLINE CodedMoments(const TensorArgs& tensor, int64_t begin)
      : m(static_cast<uint8_t*>(tensor.m) + begin),
        v(static_cast<uint8_t*>(tensor.v) + begin),
        m_scale(tensor.m_scales + begin / kCodeBlock),
        v_scale(tensor.v_scales + begin / kCodeBlock),
        m_code(BlockCode<true>::to_read(*m_scale)),
        v_code(BlockCode<false>::to_read(*v_scale)) {}
  FASTADAM_INLINE Lanes load_m(int64_t j) const {
    // With its sign extended, a code that is shifted to the place of a mantissa has its sign at the highest bit.
    const Words codes = load_words(reinterpret_cast<const int8_t*>(m) + j * kWidth) << kCodeShift;
    const Lanes x(BlockCode<true>::kBase | (codes & (0x7fu << kCodeShift)));
    return Lanes(multiply_add(x, m_code.scale, m_code.offset).bits() | (codes & 0x80000000u));
  }
  FASTADAM_INLINE Lanes load_v(int64_t j) const {
    const Lanes x(BlockCode<false>::kBase | (load_words(v + j * kWidth) << kCodeShift));
    return multiply_add(x, v_code.scale, v_code.offset);
  }
  // v has no sign, except that of NaN.
  FASTADAM_INLINE void note(Lanes m_j, Lanes v_j) {
    m_top = larger(m_top, m_j.magnitude());
    v_top = larger(v_top, v_j.bits());
  }
  FASTADAM_INLINE void write(const BlockValues& values, uint64_t key, int64_t begin) {
    *m_scale = scale_of<true>(largest(m_top));
    *v_scale = scale_of<false>(largest(v_top) & 0x7fffffffu);
    m_code = BlockCode<true>::to_write(*m_scale);
    v_code = BlockCode<false>::to_write(*v_scale);
    RandomWords words(key, kOfMoments, begin);
    // Codes are moved to the highest byte of a word.
    constexpr int kUp = 24 - kCodeShift;
    for (int64_t j = 0; j < kVectors; j += 4) {
      Words m_codes[4];
      Words v_codes[4];
      for (int64_t k = 0; k < 4; ++k) {
        const Words random = words.next(j + k) >> 12;
        const Lanes m_k = values.m[j + k];
        const Lanes v_k = values.v[j + k];
        const Words m_bits = multiply_add(Lanes(m_k.magnitude()), m_code.scale, m_code.offset).bits() + random;
        const Words v_bits = multiply_add(v_k, v_code.scale, v_code.offset).bits() + random;
        m_codes[k] = select(0x80000000u, m_k.bits(), m_bits << kUp);
        v_codes[k] = at_least_if_positive(v_bits, BlockCode<false>::kBase + (1u << kCodeShift), v_k) << kUp;
      }
      store_top_bytes(m + j * kWidth, m_codes);
      store_top_bytes(v + j * kWidth, v_codes);
    }
    // 0 times infinity or NaN is NaN, whose code is not 0.
    if (__builtin_expect(*m_scale == kNoScale, 0)) std::memset(m, 0, kCodeBlock);
    if (__builtin_expect(*v_scale == kNoScale, 0)) std::memset(v, 0, kCodeBlock);
  }
};

}  // namespace
}  // namespace fastadam::cpu::FASTADAM_ISA
