// SPDX-License-Identifier: Apache-2.0
// Part of kernels.cpp and included by nothing else: the operands of a loop over elements or rows, prefetching, and the
// conversion of half types.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

#include <cmath>

#include "../core/step_args.h"

namespace fastadam::cpu::FASTADAM_ISA {
namespace {

template <class T>
const StepScalars<T>& scalars_of(const StepArgs& step) {
  if constexpr (sizeof(T) == 8) {
    return step.scalars_f64;
  } else {
    return step.scalars_f32;
  }
}

// The same as pair_of(), for factors that are rare. Not inlined, like convert().
template <class T>
__attribute__((noinline)) FactorPair<T> rare_pair_of(double value, int64_t exponent) {
  return pair_of<T>(make_factor(value, exponent));
}

template <class T>
FASTADAM_INLINE FactorPair<T> pair_here(double value, int64_t exponent) {
  const bool is_usual = exponent == 0 && std::fabs(value) >= 0x1p-126;
  return is_usual ? FactorPair<T>{static_cast<T>(value), T(1)} : rare_pair_of<T>(value, exponent);
}

// The factor of a gradient.
template <class T>
FASTADAM_INLINE FactorPair<T> factor_of(const StepArgs& step, const TensorArgs& tensor) {
  if (step.factors == nullptr) return pair_here<T>(tensor.grad_factor, 0);
  const Factor& factor = step.factors[&tensor - step.chains.tensors];
  return pair_here<T>(factor.value, factor.exponent);
}

// The arrays that a loop reads and writes, in the compute type of the variable, starting at one of its elements.
template <class T>
struct Operands {
  T* var;
  const T* grad;  // null in loops over rows
  T* m;
  T* v;
  T* vhat;  // null without AMSGrad
};

// The operands of part of a row, which starts at element `at` of the table. `var` points to that element or to a
// converted copy.
template <bool kAmsgrad, class T>
FASTADAM_INLINE Operands<T> operands_of(const TensorArgs& tensor, int64_t at, T* var) {
  return {var, nullptr, static_cast<T*>(tensor.m) + at, static_cast<T*>(tensor.v) + at,
          kAmsgrad ? static_cast<T*>(tensor.vhat) + at : nullptr};
}

// The number of columns of a row that are summed and updated at a time.
constexpr int64_t kColumns = 128;

// The number of columns to process next, starting at `column` of a row and at element `at`, before `end`.
FASTADAM_INLINE int64_t columns_from(int64_t column, int64_t width, int64_t at, int64_t end) {
  const int64_t left = width - column < end - at ? width - column : end - at;
  return left < kColumns ? left : kColumns;
}

// The number of elements between two prefetches. Prefetching 1 KiB ahead gains 5 % in DRAM and costs 8 % in cache
// (bench/README.md). Arrays of a half type are prefetched as many elements ahead as arrays of float.
constexpr int64_t kBlock = 32;

template <class... Items>
FASTADAM_INLINE void prefetch_block(int64_t item_size, const Items*... arrays) {
  const int64_t ahead = 1024 / item_size;
  for (int64_t i = ahead; i < ahead + kBlock; i += 64 / item_size) (__builtin_prefetch(arrays + i), ...);
}

// The same for loops with more arithmetic, which keep fewer misses in flight: into L2, and further ahead.
template <class... Items>
FASTADAM_INLINE void prefetch_far(int64_t item_size, const Items*... arrays) {
  const int64_t ahead = 4096 / item_size;
  for (int64_t i = ahead; i < ahead + kBlock; i += 64 / item_size) (__builtin_prefetch(arrays + i, 0, 2), ...);
}

// Converts as many elements as it can with special instructions, and returns their number.
template <class From, class To>
FASTADAM_INLINE int64_t convert_fast(const From* /*from*/, To* /*to*/, int64_t /*size*/) {
  return 0;
}

#if defined(__AVX512F__)
// A mask of all ones: GCC 12 warns about undefined values in its unmasked intrinsics.
constexpr __mmask16 kAll = 0xffff;

// These instructions round as store() does, and flush-to-zero does not affect float16 denormals.
FASTADAM_INLINE int64_t convert_fast(const Float16* from, float* to, int64_t size) {
  for (int64_t i = 0; i + 16 <= size; i += 16) {
    _mm512_storeu_ps(to + i,
                     _mm512_maskz_cvtph_ps(kAll, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i))));
  }
  return size / 16 * 16;
}

FASTADAM_INLINE int64_t convert_fast(const float* from, Float16* to, int64_t size) {
  for (int64_t i = 0; i + 16 <= size; i += 16) {
    const __m256i bits = _mm512_maskz_cvtps_ph(kAll, _mm512_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), bits);
  }
  return size / 16 * 16;
}

// The same as load() and store(), which compilers vectorise badly because of the two-byte elements.
FASTADAM_INLINE int64_t convert_fast(const BFloat16* from, float* to, int64_t size) {
  for (int64_t i = 0; i + 16 <= size; i += 16) {
    const __m512i wide =
        _mm512_maskz_cvtepu16_epi32(kAll, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i)));
    _mm512_storeu_ps(to + i, _mm512_castsi512_ps(_mm512_maskz_slli_epi32(kAll, wide, 16)));
  }
  return size / 16 * 16;
}

FASTADAM_INLINE int64_t convert_fast(const float* from, BFloat16* to, int64_t size) {
  for (int64_t i = 0; i + 16 <= size; i += 16) {
    const __m512 values = _mm512_loadu_ps(from + i);
    const __m512i bits = _mm512_castps_si512(values);
    const __m512i high = _mm512_maskz_srli_epi32(kAll, bits, 16);
    const __m512i half = _mm512_add_epi32(_mm512_and_si512(high, _mm512_set1_epi32(1)), _mm512_set1_epi32(0x7fff));
    const __m512i rounded = _mm512_maskz_srli_epi32(kAll, _mm512_add_epi32(bits, half), 16);
    const __mmask16 is_nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
    const __m512i result = _mm512_mask_or_epi32(rounded, is_nan, high, _mm512_set1_epi32(0x40));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), _mm512_maskz_cvtepi32_epi16(kAll, result));
  }
  return size / 16 * 16;
}
#elif defined(__F16C__)
// These instructions round as store() does, and flush-to-zero does not affect float16 denormals.
FASTADAM_INLINE int64_t convert_fast(const Float16* from, float* to, int64_t size) {
  for (int64_t i = 0; i + 8 <= size; i += 8) {
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  }
  return size / 8 * 8;
}

FASTADAM_INLINE int64_t convert_fast(const float* from, Float16* to, int64_t size) {
  for (int64_t i = 0; i + 8 <= size; i += 8) {
    const __m128i bits = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), bits);
  }
  return size / 8 * 8;
}
#endif

#if defined(__AVX2__) && !defined(__AVX512F__)
// The same as load() and store(), which compilers vectorise badly because of the two-byte elements.
FASTADAM_INLINE int64_t convert_fast(const BFloat16* from, float* to, int64_t size) {
  for (int64_t i = 0; i + 8 <= size; i += 8) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
    _mm256_storeu_ps(to + i, _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16)));
  }
  return size / 8 * 8;
}

FASTADAM_INLINE __m256i rounded_to_bfloat16(const float* from) {
  const __m256i bits = _mm256_castps_si256(_mm256_loadu_ps(from));
  const __m256i high = _mm256_srli_epi32(bits, 16);
  const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
  const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
  const __m256i magnitude = _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff));
  const __m256i is_nan = _mm256_cmpgt_epi32(magnitude, _mm256_set1_epi32(0x7f800000));
  return _mm256_blendv_epi8(rounded, _mm256_or_si256(high, _mm256_set1_epi32(0x40)), is_nan);
}

FASTADAM_INLINE int64_t convert_fast(const float* from, BFloat16* to, int64_t size) {
  for (int64_t i = 0; i + 16 <= size; i += 16) {
    const __m256i packed = _mm256_packus_epi32(rounded_to_bfloat16(from + i), rounded_to_bfloat16(from + i + 8));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), _mm256_permute4x64_epi64(packed, 0xd8));
  }
  return size / 16 * 16;
}
#endif

template <class Half>
FASTADAM_INLINE void convert_here(const Half* __restrict from, float* __restrict to, int64_t size) {
#pragma omp simd
  for (int64_t i = convert_fast(from, to, size); i < size; ++i) to[i] = load(from[i]);
}

template <class Half>
FASTADAM_INLINE void convert_here(const float* __restrict from, Half* __restrict to, int64_t size) {
#pragma omp simd
  for (int64_t i = convert_fast(from, to, size); i < size; ++i) to[i] = store<Half>(from[i]);
}

// The same, not inlined, for places where speed does not justify a copy in every kernel.
template <class From, class To>
__attribute__((noinline)) void convert(const From* from, To* to, int64_t size) {
  convert_here(from, to, size);
}

// The elements in their compute type: themselves, or a copy in `room`.
template <class Storage, class T>
FASTADAM_INLINE auto* in_compute_type_of(Storage* from, int64_t size, T* room) {
  if constexpr (sizeof(Storage) == 2) {
    convert(from, room, size);
    return room;
  } else {
    return from;
  }
}

// Elements of a dense gradient in the compute type of its variable.
template <class T>
FASTADAM_INLINE const T* gradient_of(const TensorArgs& tensor, int64_t begin, int64_t size, T* room) {
  if constexpr (sizeof(T) == 4) {
    if (tensor.grad_dtype == FASTADAM_FLOAT16) {
      return in_compute_type_of(static_cast<const Float16*>(tensor.grad) + begin, size, room);
    }
    if (tensor.grad_dtype == FASTADAM_BFLOAT16) {
      return in_compute_type_of(static_cast<const BFloat16*>(tensor.grad) + begin, size, room);
    }
  }
  return static_cast<const T*>(tensor.grad) + begin;
}

// Calls work(var) with kBlock elements in their compute type: the elements themselves, or a copy that is rounded back.
// Compilers vectorise a loop that mixes two-byte and four-byte elements badly, and float16 has conversion instructions.
template <class Storage, class Work>
FASTADAM_INLINE void block_in_compute_type(Storage* var, Work work) {
  if constexpr (sizeof(Storage) != 2) {
    work(var);
  } else {
    float copy[kBlock];
    convert_here(var, copy, kBlock);
    work(copy);
    convert_here(copy, var, kBlock);
  }
}

// Calls work(var, from, count) for `size` elements: once for all of them, or block by block for a half type.
template <class Storage, class Work>
FASTADAM_INLINE void in_compute_type(Storage* var, int64_t size, Work work) {
  if constexpr (sizeof(Storage) != 2) {
    work(var, int64_t{0}, size);
  } else {
    int64_t from = 0;
    for (; from + kBlock <= size; from += kBlock) {
      block_in_compute_type(var + from, [&](float* values) { work(values, from, kBlock); });
    }
    if (from == size) return;
    float copy[kBlock];
    convert(var + from, copy, size - from);
    work(copy, from, size - from);
    convert(copy, var + from, size - from);
  }
}

}  // namespace
}  // namespace fastadam::cpu::FASTADAM_ISA
