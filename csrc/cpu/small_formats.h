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

// ---- how variables are read and written; load(j) and store(j) are for the kWidth elements from j * kWidth of a block
// --

struct FloatVariable {
  static constexpr int64_t kBytes = 4;
  float* at;

  FASTADAM_INLINE FloatVariable(const TensorArgs& tensor, uint64_t /*key*/, int64_t begin)
      : at(static_cast<float*>(tensor.var) + begin) {}
  FASTADAM_INLINE Lanes load(int64_t j) const { return Lanes::load(at + j * kWidth); }
  FASTADAM_INLINE void store(int64_t j, Lanes x) { x.store(at + j * kWidth); }
  FASTADAM_INLINE void finish() {}
};

// The most that magnitude() is of numbers that are not NaN: these are stored as the bits that they have, while those of
// NaN, which could become a number, need a second look.
constexpr uint32_t kMostFinite = 0x7f800000;

struct SplitVariable {
  static constexpr int64_t kBytes = 2;
  BFloat16* high;
  int16_t* low;
  Words top{};

  FASTADAM_INLINE SplitVariable(const TensorArgs& tensor, uint64_t /*key*/, int64_t begin)
      : high(static_cast<BFloat16*>(tensor.var) + begin), low(tensor.low + begin) {}
  FASTADAM_INLINE Lanes load(int64_t j) const {
    const Words highs = load_words(reinterpret_cast<const uint16_t*>(high) + j * kWidth) << 16;
    const Words magnitude = positive((highs & 0x7fffffffu) + load_words(low + j * kWidth));
    return Lanes(select(0x80000000u, highs, magnitude));
  }
  FASTADAM_INLINE void store(int64_t j, Lanes x) {
    top = larger(top, x.magnitude());
    store_words(reinterpret_cast<uint16_t*>(high) + j * kWidth, (x.bits() + 0x8000u) >> 16);
    store_words(reinterpret_cast<uint16_t*>(low) + j * kWidth, x.bits());
  }
  FASTADAM_INLINE void finish() {
    if (__builtin_expect(largest(top) > kMostFinite, 0)) store_nan();
  }

  __attribute__((noinline)) void store_nan() {
    float values[kCodeBlock];
    read_halves(high, low, kCodeBlock, values);
    write_halves(values, kCodeBlock, high, low);
  }
};

// The bits of a bfloat16, unless x is NaN.
FASTADAM_INLINE Words bfloat16_at_random(Lanes x, Words word) { return (x.bits() + (word >> 16)) >> 16; }

struct RandomVariable {
  static constexpr int64_t kBytes = 2;
  BFloat16* at;
  RandomWords words;

  FASTADAM_INLINE RandomVariable(const TensorArgs& tensor, uint64_t key, int64_t begin)
      : at(static_cast<BFloat16*>(tensor.var) + begin), words(key, kOfVariables, begin) {}
  FASTADAM_INLINE Lanes load(int64_t j) const {
    return Lanes(load_words(reinterpret_cast<const uint16_t*>(at) + j * kWidth) << 16);
  }
  FASTADAM_INLINE void store(int64_t j, Lanes x) {
    const Words is_nan = (Words)(x.magnitude() > kMostFinite);
    const Words bits = (is_nan & (x.bits() >> 16 | 0x40u)) | (~is_nan & bfloat16_at_random(x, words.next(j)));
    store_words(reinterpret_cast<uint16_t*>(at) + j * kWidth, bits);
  }
  FASTADAM_INLINE void finish() {}
};

// ---- how moments are read, kept until the block is done, and written ----

struct FloatMoments {
  static constexpr int64_t kBytes = 4;
  float* m;
  float* v;

  FASTADAM_INLINE FloatMoments(const TensorArgs& tensor, int64_t begin)
      : m(static_cast<float*>(tensor.m) + begin), v(static_cast<float*>(tensor.v) + begin) {}
  FASTADAM_INLINE Lanes load_m(int64_t j) const { return Lanes::load(m + j * kWidth); }
  FASTADAM_INLINE Lanes load_v(int64_t j) const { return Lanes::load(v + j * kWidth); }
  FASTADAM_INLINE void keep(int64_t j, Lanes m_j, Lanes v_j) {
    m_j.store(m + j * kWidth);
    v_j.store(v + j * kWidth);
  }
  FASTADAM_INLINE void write(uint64_t /*key*/, int64_t /*begin*/) {}
};

struct RandomMoments {
  static constexpr int64_t kBytes = 2;
  BFloat16* m;
  BFloat16* v;
  Lanes m_values[kVectors];
  Lanes v_values[kVectors];
  Words top{};

  FASTADAM_INLINE RandomMoments(const TensorArgs& tensor, int64_t begin)
      : m(static_cast<BFloat16*>(tensor.m) + begin), v(static_cast<BFloat16*>(tensor.v) + begin) {}
  FASTADAM_INLINE static Lanes load(const BFloat16* from) {
    return Lanes(load_words(reinterpret_cast<const uint16_t*>(from)) << 16);
  }
  FASTADAM_INLINE Lanes load_m(int64_t j) const { return load(m + j * kWidth); }
  FASTADAM_INLINE Lanes load_v(int64_t j) const { return load(v + j * kWidth); }
  FASTADAM_INLINE void keep(int64_t j, Lanes m_j, Lanes v_j) {
    m_values[j] = m_j;
    v_values[j] = v_j;
    top = larger(top, larger(m_j.magnitude(), v_j.magnitude()));
  }
  FASTADAM_INLINE void write(uint64_t key, int64_t begin) {
    RandomWords words(key, kOfMoments, begin);
    for (int64_t j = 0; j < kVectors; ++j) {
      const Words word = words.next(j);
      store_words(reinterpret_cast<uint16_t*>(m) + j * kWidth, bfloat16_at_random(m_values[j], word));
      store_words(reinterpret_cast<uint16_t*>(v) + j * kWidth, bfloat16_at_random(v_values[j], word));
    }
    if (__builtin_expect(largest(top) > kMostFinite, 0)) write_nan(key, begin);
  }

  __attribute__((noinline)) void write_nan(uint64_t key, int64_t begin) const {
    uint32_t words[kCodeBlock];
    float values[kCodeBlock];
    random_words(key, kOfMoments, begin, words);
    std::memcpy(values, m_values, sizeof(values));
    write_at_random(values, words, kCodeBlock, m);
    std::memcpy(values, v_values, sizeof(values));
    write_at_random(values, words, kCodeBlock, v);
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
  uint8_t* m;
  uint8_t* v;
  uint8_t* m_scale;
  uint8_t* v_scale;
  BlockCode<true> m_code;
  BlockCode<false> v_code;
  Lanes m_values[kVectors];
  Lanes v_values[kVectors];
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
  FASTADAM_INLINE void keep(int64_t j, Lanes m_j, Lanes v_j) {
    m_values[j] = m_j;
    v_values[j] = v_j;
    m_top = larger(m_top, m_j.magnitude());
    v_top = larger(v_top, v_j.magnitude());
  }
  FASTADAM_INLINE void write(uint64_t key, int64_t begin) {
    *m_scale = scale_of<true>(largest(m_top));
    *v_scale = scale_of<false>(largest(v_top));
    m_code = BlockCode<true>::to_write(*m_scale);
    v_code = BlockCode<false>::to_write(*v_scale);
    RandomWords words(key, kOfMoments, begin);
    for (int64_t j = 0; j < kVectors; ++j) {
      const Words random = words.next(j) >> 12;
      const Lanes m_j = m_values[j];
      const Lanes v_j = v_values[j];
      const Words m_bits = multiply_add(Lanes(m_j.magnitude()), m_code.scale, m_code.offset).bits() + random;
      const Words v_bits = multiply_add(v_j, v_code.scale, v_code.offset).bits() + random;
      const Words least = smaller(v_j.bits(), Words{} + (1u << kCodeShift)) + BlockCode<false>::kBase;
      store_words(m + j * kWidth, select(0x80, m_j.bits() >> 24, m_bits >> kCodeShift));
      store_words(v + j * kWidth, larger(v_bits, least) >> kCodeShift);
    }
    // 0 times infinity or NaN is NaN, whose code is not 0.
    if (__builtin_expect(*m_scale == kNoScale, 0)) std::memset(m, 0, kCodeBlock);
    if (__builtin_expect(*v_scale == kNoScale, 0)) std::memset(v, 0, kCodeBlock);
  }
};

}  // namespace
}  // namespace fastadam::cpu::FASTADAM_ISA
