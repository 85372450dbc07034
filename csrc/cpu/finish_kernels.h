// SPDX-License-Identifier: Apache-2.0
// Part of kernels.cpp and included by nothing else: what follows the update of some elements while they are in cache.
#pragma once

#include <type_traits>

#include "../core/adam_math.h"
#include "../core/split.h"
#include "lanes.h"

namespace fastadam::cpu::FASTADAM_ISA {
namespace {

template <class Storage>
__attribute__((noinline)) void average(const StepArgs& step, const TensorArgs& tensor, int64_t begin, int64_t end) {
  using T = Compute<Storage>;
  const T momentum = scalars_of<T>(step).ema_momentum;
  Storage* __restrict var = static_cast<Storage*>(tensor.var) + begin;
  T* __restrict averages = static_cast<T*>(tensor.average) + begin;
#pragma omp simd
  for (int64_t i = 0; i < end - begin; ++i) averages[i] = moving_average(averages[i], T(load(var[i])), momentum);
  if (!step.ema_overwrite) return;
#pragma omp simd
  for (int64_t i = 0; i < end - begin; ++i) var[i] = store<Storage>(averages[i]);
}

// Writes one cache line past the caches, which need not read it first. `to` is aligned.
FASTADAM_INLINE void stream_line(const void* line, void* to) {
#if defined(__AVX512F__)
  _mm512_stream_si512(static_cast<__m512i*>(to), _mm512_load_si512(line));
#elif defined(__AVX2__)
  const auto* from = static_cast<const __m256i*>(line);
  for (int i = 0; i < 2; ++i) _mm256_stream_si256(static_cast<__m256i*>(to) + i, _mm256_load_si256(from + i));
#elif defined(__SSE2__)
  const auto* from = static_cast<const __m128i*>(line);
  for (int i = 0; i < 4; ++i) _mm_stream_si128(static_cast<__m128i*>(to) + i, _mm_load_si128(from + i));
#else
  std::memcpy(to, line, kCacheLineBytes);
#endif
}

template <class From, class To>
FASTADAM_INLINE void round_to(const From* __restrict from, To* __restrict to, int64_t size) {
  if constexpr (std::is_same_v<From, To>) {
    std::memcpy(to, from, static_cast<size_t>(size) * sizeof(To));
  } else {
    convert_here(from, to, size);
  }
}

// Streams whole lines if the copy begins at one; otherwise each tile would leave two lines in parts.
template <class Copy>
__attribute__((noinline)) void round_all(const float* from, Copy* to, int64_t size, bool stream) {
  constexpr auto kLine = kCacheLineBytes / static_cast<int64_t>(sizeof(Copy));
  const bool is_aligned = reinterpret_cast<uintptr_t>(to) % static_cast<uintptr_t>(kCacheLineBytes) == 0;
  int64_t at = 0;
  for (; stream && is_aligned && at + kLine <= size; at += kLine) {
    alignas(kCacheLineBytes) Copy line[static_cast<size_t>(kLine)];
    round_to(from + at, line, kLine);
    stream_line(line, to + at);
  }
  round_to(from + at, to + at, size - at);
}

// In a lazy step [begin, end) counts the elements of the rows of the gradient.
template <class Copy>
void copy(const StepArgs& step, const TensorArgs& tensor, int64_t begin, int64_t end) {
  const float* var = static_cast<const float*>(tensor.var);
  Copy* to = static_cast<Copy*>(tensor.copy);
  if (tensor.rows == nullptr || !step.lazy) return round_all(var + begin, to + begin, end - begin, step.prefetch);
  const int64_t width = tensor.rows->width;
  for (int64_t at = begin; at < end;) {
    const int64_t size = columns_from(at % width, width, at, end);
    const int64_t place = tensor.rows->rows[at / width] * width + at % width;
    round_all(var + place, to + place, size, false);
    at += size;
  }
}

}  // namespace
}  // namespace fastadam::cpu::FASTADAM_ISA
