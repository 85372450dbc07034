// SPDX-License-Identifier: Apache-2.0
// Part of kernels.cpp, compiled once per ISA: what the loops over elements and over rows share. Included by nothing
// else.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

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

// What multiplies a gradient.
FASTADAM_INLINE double factor_of(const StepArgs& step, const TensorArgs& tensor) {
  return step.factors == nullptr ? tensor.grad_factor : step.factors[&tensor - step.chains.tensors];
}

// The streams of one variable in its compute type.
template <class T>
struct Streams {
  T* var;
  const T* grad;  // null for rows
  T* m;
  T* v;
  T* vhat;  // null without AMSGrad
};

// The streams from element `at` on, for a variable, and a gradient, that lie elsewhere: of a half type, converted.
template <class T>
FASTADAM_INLINE Streams<T> streams_of(const TensorArgs& tensor, int64_t at, T* var, const T* grad) {
  T* vhat = tensor.vhat == nullptr ? nullptr : static_cast<T*>(tensor.vhat) + at;
  return {var, grad, static_cast<T*>(tensor.m) + at, static_cast<T*>(tensor.v) + at, vhat};
}

// Elements between two prefetches. Fetching 1 KiB ahead gains 5 % in DRAM and costs 8 % in cache (bench/README.md).
constexpr int64_t kBlock = 32;

template <class T>
FASTADAM_INLINE void prefetch_block(const T* stream) {
  constexpr int64_t kAheadBytes = 1024;
  const auto* bytes = reinterpret_cast<const char*>(stream) + kAheadBytes;
  for (int64_t i = 0; i < kBlock * static_cast<int64_t>(sizeof(T)); i += 64) __builtin_prefetch(bytes + i);
}

template <bool kAmsgrad, class T>
FASTADAM_INLINE void prefetch_block(const Streams<T>& streams, int64_t at) {
  prefetch_block(streams.var + at);
  if (streams.grad != nullptr) prefetch_block(streams.grad + at);
  prefetch_block(streams.m + at);
  prefetch_block(streams.v + at);
  if constexpr (kAmsgrad) prefetch_block(streams.vhat + at);
}

// How many elements from the first on are converted by instructions of their own.
template <class From, class To>
FASTADAM_INLINE int64_t convert_fast(const From* /*from*/, To* /*to*/, int64_t /*size*/) {
  return 0;
}

#if defined(__F16C__)
// They round as store() does, and no mode for denormals touches those of float16.
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

#if defined(__AVX2__)
// load() and store(), which compilers vectorise by way of elements of two bytes.
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

// Not inlined: every kernel would have them several times.
template <class Half>
__attribute__((noinline)) void convert(const Half* __restrict from, float* __restrict to, int64_t size) {
#pragma omp simd
  for (int64_t i = convert_fast(from, to, size); i < size; ++i) to[i] = load(from[i]);
}

template <class Half>
__attribute__((noinline)) void convert(const float* __restrict from, Half* __restrict to, int64_t size) {
#pragma omp simd
  for (int64_t i = convert_fast(from, to, size); i < size; ++i) to[i] = store<Half>(from[i]);
}

// Elements of a half type that are converted at a time, and columns of a row that are summed before they are updated.
constexpr int64_t kColumns = 128;

// work(var) with at most kColumns elements in their compute type: themselves, or a copy that is rounded back. A loop
// over elements of two and of four bytes is vectorised badly, and float16 has instructions for its conversion.
template <class Storage, class Work>
FASTADAM_INLINE void with_compute_type(Storage* var, int64_t size, Work work) {
  if constexpr (sizeof(Storage) != 2) {
    work(var);
  } else {
    float copy[kColumns];
    convert(var, copy, size);
    work(copy);
    convert(copy, var, size);
  }
}

}  // namespace
}  // namespace fastadam::cpu::FASTADAM_ISA
