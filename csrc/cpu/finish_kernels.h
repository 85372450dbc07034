// SPDX-License-Identifier: Apache-2.0
// Part of kernels.cpp and included by nothing else: what follows the update of some elements while they are in cache.
#pragma once

#include <type_traits>

#include "../core/adam_math.h"
#include "../core/split.h"
#include "../core/telemetry.h"
#include "lanes.h"

namespace fastadam::cpu::FASTADAM_ISA {
namespace {

template <class Storage>
void average(const StepArgs& step, const TensorArgs& tensor, int64_t begin, int64_t end) {
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

template <class Copy>
__attribute__((noinline)) void round_all(const float* from, Copy* to, int64_t size, bool stream) {
  constexpr auto kLine = kCacheLineBytes / static_cast<int64_t>(sizeof(Copy));
  int64_t at = 0;
  if (stream) {
    at = elements_to_line(reinterpret_cast<uintptr_t>(to), sizeof(Copy));
    at = at < size ? at : size;
    round_to(from, to, at);
    for (; at + kLine <= size; at += kLine) {
      alignas(kCacheLineBytes) Copy line[static_cast<size_t>(kLine)];
      round_to(from + at, line, kLine);
      stream_line(line, to + at);
    }
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

// The elements in their compute type: themselves, or a copy in `room`.
template <class Storage, class T>
FASTADAM_INLINE const T* in_compute_type_of(const Storage* from, int64_t size, T* room) {
  if constexpr (std::is_same_v<Storage, T>) {
    return from;
  } else {
    convert(from, room, size);
    return room;
  }
}

template <class Storage>
void read(const void* from, int64_t begin, int64_t end, void* to) {
  round_to(static_cast<const Storage*>(from) + begin, static_cast<Compute<Storage>*>(to), end - begin);
}

// Adds the squares of value(i) for `count` elements, at most kNormLanes of them, to `squares`.
template <class T, class Value>
FASTADAM_INLINE void add_lanes(int64_t count, Value value, T* __restrict squares) {
#pragma omp simd
  for (int64_t lane = 0; lane < count; ++lane) squares[lane] += value(lane) * value(lane);
}

// The sum of squares of value(i) for i in [0, size), at most kTile.
template <class T, class Value>
FASTADAM_INLINE double tile_sum(int64_t size, Value value) {
  constexpr int64_t kGroup = 8 * kNormLanes;  // eight squares of each lane are added in T
  double sums[kNormLanes] = {};
  const auto add_group = [&](int64_t at, bool is_whole) {
    T squares[kNormLanes] = {};
    if (is_whole) {
      for (int64_t row = 0; row < 8; ++row) {
        add_lanes<T>(kNormLanes, [&](int64_t lane) { return value(at + row * kNormLanes + lane); }, squares);
      }
    } else {
      for (int64_t row = at; row < size; row += kNormLanes) {
        add_lanes<T>(size - row < kNormLanes ? size - row : kNormLanes, [&](int64_t lane) { return value(row + lane); },
                     squares);
      }
    }
#pragma omp simd
    for (int64_t lane = 0; lane < kNormLanes; ++lane) sums[lane] += static_cast<double>(squares[lane]);
  };
  int64_t at = 0;
  for (; at + kGroup <= size; at += kGroup) add_group(at, true);
  if (at < size) add_group(at, false);
  return pairwise_sum(sums, kNormLanes);
}

template <class T, class Value>
FASTADAM_INLINE double sum_of_tile(int64_t size, Value value) {
  const double sum = tile_sum<T>(size, value);
  if (sizeof(T) == 8 || (sum >= kLeastSum && is_finite(sum))) return sum;
  return tile_sum<double>(size, [&](int64_t i) { return static_cast<double>(value(i)); });
}

// How many elements of `before` and `now` are the same once they are rounded to Copy.
template <class Copy, class T>
FASTADAM_INLINE int32_t count_same(const T* before, const T* now, int64_t size) {
  Copy old_copy[kTile];
  Copy new_copy[kTile];
  round_to(before, old_copy, size);
  round_to(now, new_copy, size);
  int32_t same = 0;
  using Bits = std::conditional_t<sizeof(Copy) == 2, uint16_t, std::conditional_t<sizeof(Copy) == 4, uint32_t, uint64_t>>;
#pragma omp simd reduction(+ : same)
  for (int64_t i = 0; i < size; ++i) same += bit_cast<Bits>(old_copy[i]) == bit_cast<Bits>(new_copy[i]) ? 1 : 0;
  return same;
}

template <class T>
int32_t count_unchanged(const TensorArgs& head, const T* before, const T* now, int64_t size) {
  if constexpr (sizeof(T) == 4) {
    if (head.copy_dtype == FASTADAM_FLOAT16 && head.copy != nullptr) return count_same<Float16>(before, now, size);
    if (head.copy_dtype == FASTADAM_BFLOAT16 && head.copy != nullptr) return count_same<BFloat16>(before, now, size);
  }
  return count_same<T>(before, now, size);
}

// The elements of a dense gradient in T.
template <class T>
const T* gradient_of(const TensorArgs& tensor, int64_t begin, int64_t size, T* room) {
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

template <class T>
void measure_gradient(const TensorArgs& tensor, int64_t begin, int64_t size, TileMeasure& result) {
  T room[kTile];
  const T* grad = gradient_of(tensor, begin, size, room);
  result.gradient += sum_of_tile<T>(size, [&](int64_t i) { return grad[i]; });
  if (is_finite(result.gradient)) return;
  for (int64_t i = 0; i < size; ++i) result.not_finite += is_finite(static_cast<double>(grad[i])) ? 0 : 1;
}

template <class Storage>
TileMeasure measure(const TensorArgs* tensors, const TensorArgs& head, int64_t begin, int64_t end, const void* before) {
  using T = Compute<Storage>;
  const int64_t size = end - begin;
  TileMeasure result{};
  for (const TensorArgs* tensor = &head;; tensor = tensors + tensor->next) {
    measure_gradient<T>(*tensor, begin, size, result);
    if (tensor->next < 0) break;
  }
  T room[kTile];
  const T* old = static_cast<const T*>(before);
  const T* now = in_compute_type_of(static_cast<const Storage*>(head.var) + begin, size, room);
  result.update = sum_of_tile<T>(size, [&](int64_t i) { return now[i] - old[i]; });
  result.parameter = sum_of_tile<T>(size, [&](int64_t i) { return now[i]; });
  result.unchanged = count_unchanged(head, old, now, size);
  return result;
}

}  // namespace
}  // namespace fastadam::cpu::FASTADAM_ISA
