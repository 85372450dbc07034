// SPDX-License-Identifier: Apache-2.0
// Part of kernels.cpp and included by nothing else: numbers in the lanes of one register, for loops that mix elements
// of one, two and four bytes, which compilers vectorise badly. Lanes has the operators that the update rule needs.
#pragma once

#include <cstring>

#include "../core/small_state.h"
#include "lanes.h"

namespace fastadam::cpu::FASTADAM_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int64_t kWidth = 16;
#elif defined(__AVX2__)
constexpr int64_t kWidth = 8;
#else
constexpr int64_t kWidth = 4;
#endif

using Words = uint32_t __attribute__((vector_size(4 * kWidth)));

template <class Vector>
FASTADAM_INLINE Vector load_vector(const void* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof(vector));
  return vector;
}
template <class Vector>
FASTADAM_INLINE void store_vector(void* to, const Vector& vector) {
  std::memcpy(to, &vector, sizeof(vector));
}

// load_words: elements of one or two bytes, signed or not, as words. store_words: the low bits of words.
#if defined(__AVX512F__)
FASTADAM_INLINE Words load_words(const uint8_t* from) {
  return (Words)_mm512_maskz_cvtepu8_epi32(kAll, load_vector<__m128i>(from));
}
FASTADAM_INLINE Words load_words(const int8_t* from) {
  return (Words)_mm512_maskz_cvtepi8_epi32(kAll, load_vector<__m128i>(from));
}
FASTADAM_INLINE Words load_words(const uint16_t* from) {
  return (Words)_mm512_maskz_cvtepu16_epi32(kAll, load_vector<__m256i>(from));
}
FASTADAM_INLINE Words load_words(const int16_t* from) {
  return (Words)_mm512_maskz_cvtepi16_epi32(kAll, load_vector<__m256i>(from));
}
FASTADAM_INLINE void store_words(uint8_t* to, Words words) {
  store_vector(to, _mm512_maskz_cvtepi32_epi8(kAll, (__m512i)words));
}
FASTADAM_INLINE void store_words(uint16_t* to, Words words) {
  store_vector(to, _mm512_maskz_cvtepi32_epi16(kAll, (__m512i)words));
}
#elif defined(__AVX2__)
FASTADAM_INLINE Words load_words(const uint8_t* from) {
  return (Words)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
}
FASTADAM_INLINE Words load_words(const int8_t* from) {
  return (Words)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
}
FASTADAM_INLINE Words load_words(const uint16_t* from) {
  return (Words)_mm256_cvtepu16_epi32(load_vector<__m128i>(from));
}
FASTADAM_INLINE Words load_words(const int16_t* from) {
  return (Words)_mm256_cvtepi16_epi32(load_vector<__m128i>(from));
}
FASTADAM_INLINE __m128i narrowed(Words words) {
  const auto all = (__m256i)words;
  return _mm_packus_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
}
FASTADAM_INLINE void store_words(uint8_t* to, Words words) {
  const __m128i halves = narrowed(words & 0xffu);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(halves, halves));
}
FASTADAM_INLINE void store_words(uint16_t* to, Words words) { store_vector(to, narrowed(words & 0xffffu)); }
#else
using Bytes = uint8_t __attribute__((vector_size(kWidth)));
using SignedBytes = int8_t __attribute__((vector_size(kWidth)));
using Halves = uint16_t __attribute__((vector_size(2 * kWidth)));
using SignedHalves = int16_t __attribute__((vector_size(2 * kWidth)));
using SignedWords = int32_t __attribute__((vector_size(4 * kWidth)));

FASTADAM_INLINE Words load_words(const uint8_t* from) {
  return __builtin_convertvector(load_vector<Bytes>(from), Words);
}
FASTADAM_INLINE Words load_words(const int8_t* from) {
  return (Words) __builtin_convertvector(load_vector<SignedBytes>(from), SignedWords);
}
FASTADAM_INLINE Words load_words(const uint16_t* from) {
  return __builtin_convertvector(load_vector<Halves>(from), Words);
}
FASTADAM_INLINE Words load_words(const int16_t* from) {
  return (Words) __builtin_convertvector(load_vector<SignedHalves>(from), SignedWords);
}
FASTADAM_INLINE void store_words(uint8_t* to, Words words) { store_vector(to, __builtin_convertvector(words, Bytes)); }
FASTADAM_INLINE void store_words(uint16_t* to, Words words) {
  store_vector(to, __builtin_convertvector(words, Halves));
}
#endif

#if defined(__AVX512F__)
// The high halves of the words of two vectors, or the low ones.
template <bool kHigh>
FASTADAM_INLINE __m512i halves_of(Words first, Words second) {
  alignas(64) static constexpr int16_t kPlaces[2][32] = {
      {0,  2,  4,  6,  8,  10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
       32, 34, 36, 38, 40, 42, 44, 46, 48, 50, 52, 54, 56, 58, 60, 62},
      {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
       33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63}};
  return _mm512_permutex2var_epi16((__m512i)first, _mm512_load_si512(kPlaces[kHigh]), (__m512i)second);
}
#endif

// Stores them.
template <bool kHigh>
FASTADAM_INLINE void store_pair(uint16_t* to, Words first, Words second) {
#if defined(__AVX512F__)
  store_vector(to, halves_of<kHigh>(first, second));
#else
  store_words(to, kHigh ? first >> 16 : first);
  store_words(to + kWidth, kHigh ? second >> 16 : second);
#endif
}

// Stores the highest bytes of the words of four vectors.
FASTADAM_INLINE void store_top_bytes(uint8_t* to, const Words (&words)[4]) {
#if defined(__AVX512F__)
  __m512i halves[2];
  for (int k = 0; k < 2; ++k) {
    halves[k] = _mm512_maskz_srli_epi16(0xffffffff, halves_of<true>(words[2 * k], words[2 * k + 1]), 8);
  }
  const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
  const __m512i bytes = _mm512_maskz_packus_epi16(~__mmask64{0}, halves[0], halves[1]);
  store_vector(to, _mm512_maskz_permutexvar_epi64(0xff, order, bytes));
#elif defined(__AVX2__)
  __m256i halves[2];
  for (int k = 0; k < 2; ++k) {
    halves[k] = _mm256_packus_epi32((__m256i)(words[2 * k] >> 24), (__m256i)(words[2 * k + 1] >> 24));
  }
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  store_vector(to, _mm256_permutevar8x32_epi32(_mm256_packus_epi16(halves[0], halves[1]), order));
#else
  for (int k = 0; k < 4; ++k) store_words(to + k * kWidth, words[k] >> 24);
#endif
}

// The bits of `ones` where the mask has ones, else those of `zeros`.
FASTADAM_INLINE Words select(uint32_t mask, Words ones, Words zeros) {
#if defined(__AVX512F__)
  const __m512i all = _mm512_set1_epi32(static_cast<int>(mask));
  return (Words)_mm512_ternarylogic_epi32(all, (__m512i)ones, (__m512i)zeros, 0xca);
#else
  return (ones & mask) | (zeros & ~mask);
#endif
}

struct Lanes {
  using Floats = float __attribute__((vector_size(4 * kWidth)));

  Floats x;

  Lanes() = default;
  FASTADAM_INLINE explicit Lanes(float value) : x(value - Floats{}) {}
  FASTADAM_INLINE explicit Lanes(Words bits) : x((Floats)bits) {}
  FASTADAM_INLINE explicit Lanes(Floats values) : x(values) {}
  FASTADAM_INLINE static Lanes load(const float* from) { return Lanes(load_vector<Floats>(from)); }

  FASTADAM_INLINE void store(float* to) const { store_vector(to, x); }
  FASTADAM_INLINE Words bits() const { return (Words)x; }
  FASTADAM_INLINE Words magnitude() const { return bits() & 0x7fffffffu; }

  FASTADAM_INLINE friend Lanes operator+(Lanes a, Lanes b) { return Lanes(a.x + b.x); }
  FASTADAM_INLINE friend Lanes operator-(Lanes a, Lanes b) { return Lanes(a.x - b.x); }
  FASTADAM_INLINE friend Lanes operator*(Lanes a, Lanes b) { return Lanes(a.x * b.x); }
  FASTADAM_INLINE friend Lanes operator/(Lanes a, Lanes b) { return Lanes(a.x / b.x); }
  FASTADAM_INLINE Lanes& operator+=(Lanes other) { return *this = *this + other; }

  FASTADAM_INLINE friend Lanes sqrt(Lanes a) {
#if defined(__AVX512F__)
    return Lanes(_mm512_maskz_sqrt_ps(kAll, a.x));
#elif defined(__AVX2__)
    return Lanes(_mm256_sqrt_ps(a.x));
#else
    Lanes result;
    for (int64_t i = 0; i < kWidth; ++i) result.x[i] = std::sqrt(a.x[i]);
    return result;
#endif
  }

  // NaN passes through both comparisons.
  FASTADAM_INLINE friend Lanes clip_by_value(Lanes g, Lanes limit) {
    g = Lanes(limit.x < g.x ? limit.x : g.x);
    return Lanes(g.x < -limit.x ? -limit.x : g.x);
  }
};

// a * b + c where neither order of rounding matters: the product is exact, or nothing is lost of it.
FASTADAM_INLINE Lanes multiply_add(Lanes a, Lanes b, Lanes c) {
#if defined(__AVX512F__)
  return Lanes(_mm512_maskz_fmadd_ps(kAll, a.x, b.x, c.x));
#else
  return a * b + c;
#endif
}

FASTADAM_INLINE Words larger(Words a, Words b) { return a > b ? a : b; }

// `words`, but at least `least` where a is above 0.
FASTADAM_INLINE Words at_least_if_positive(Words words, uint32_t least, Lanes a) {
#if defined(__AVX512F__)
  const __mmask16 positive = _mm512_cmp_ps_mask(a.x, _mm512_setzero_ps(), _CMP_GT_OQ);
  const __m512i leasts = _mm512_set1_epi32(static_cast<int>(least));
  return (Words)_mm512_mask_max_epu32((__m512i)words, positive, (__m512i)words, leasts);
#else
  return larger(words, (Words)(a.x > 0) & least);
#endif
}

#if defined(__AVX2__)
FASTADAM_INLINE uint32_t largest(__m256i words) {
  __m128i four = _mm_max_epu32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  four = _mm_max_epu32(four, _mm_shuffle_epi32(four, 0x4e));
  four = _mm_max_epu32(four, _mm_shuffle_epi32(four, 0xb1));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(four));
}
#endif

FASTADAM_INLINE uint32_t largest(Words words) {
#if defined(__AVX512F__)
  __m256i halves[2];
  std::memcpy(halves, &words, sizeof(halves));
  return largest(_mm256_max_epu32(halves[0], halves[1]));
#elif defined(__AVX2__)
  return largest((__m256i)words);
#else
  uint32_t result = words[0];
  for (int64_t i = 1; i < kWidth; ++i) result = words[i] > result ? words[i] : result;
  return result;
#endif
}

// Whether one of the numbers is NaN.
class NanCheck {
 public:
#if defined(__AVX512F__)
  FASTADAM_INLINE void add(Lanes a) { found_ |= _mm512_cmp_ps_mask(a.x, a.x, _CMP_UNORD_Q); }
  FASTADAM_INLINE bool has_found() const { return found_ != 0; }

 private:
  __mmask16 found_ = 0;
#else
  FASTADAM_INLINE void add(Lanes a) { found_ |= (Words)(a.x != a.x); }
  FASTADAM_INLINE bool has_found() const { return largest(found_) != 0; }

 private:
  Words found_{};
#endif
};

// The words of kCodeBlock elements from `begin`, a multiple of that, in order.
class RandomWords {
 public:
  FASTADAM_INLINE RandomWords(uint64_t key, RandomStream stream, int64_t begin) {
    const uint64_t own = block_key(key, stream, begin);
    for (int64_t k = 0; k < kRegisters; ++k) {
      Words lane{};
      for (int64_t i = 0; i < kWidth; ++i) lane[i] = static_cast<uint32_t>(k * kWidth + i);
      lanes_[k] = first_word(own, begin, lane);
    }
  }

  // Those of the kWidth elements that start at element j * kWidth; must be called for j = 0, 1, ...
  FASTADAM_INLINE Words next(int64_t j) {
    Words& lane = lanes_[j % kRegisters];
    const Words result = lane;
    lane = next_word(lane);
    return result;
  }

 private:
  static constexpr int64_t kRegisters = kRandomLanes / kWidth;
  Words lanes_[kRegisters];
};

}  // namespace
}  // namespace fastadam::cpu::FASTADAM_ISA
