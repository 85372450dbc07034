// SPDX-License-Identifier: Apache-2.0
// Part of kernels.cpp and included by nothing else: the arrays of a tile in their compute type, however they are
// stored.
#pragma once

#include <cstring>

#include "../core/small_state.h"
#include "../core/split.h"
#include "lanes.h"
#include "vectors.h"

namespace fastadam::cpu::FASTADAM_ISA {
namespace {

// Elements of one or two bytes as words, or the low bits of words as elements.
template <class Element>
FASTADAM_INLINE void resize(const Element* __restrict from, uint32_t* __restrict to, int64_t size) {
  const int64_t whole = size / kWidth * kWidth;
  for (int64_t i = 0; i < whole; i += kWidth) store_vector(to + i, load_words(from + i));
#pragma omp simd
  for (int64_t i = whole; i < size; ++i) to[i] = from[i];
}
template <class Element>
FASTADAM_INLINE void resize(const uint32_t* __restrict from, Element* __restrict to, int64_t size) {
  const int64_t whole = size / kWidth * kWidth;
  for (int64_t i = 0; i < whole; i += kWidth) store_words(to + i, load_vector<Words>(from + i));
#pragma omp simd
  for (int64_t i = whole; i < size; ++i) to[i] = static_cast<Element>(from[i]);
}

// Calls work(first, count) for each block of codes, `count` being a constant for whole ones.
template <class Work>
FASTADAM_INLINE void for_each_code_block(int64_t size, Work work) {
  int64_t at = 0;
  for (; at + kCodeBlock <= size; at += kCodeBlock) work(at, kCodeBlock);
  if (at < size) work(at, size - at);
}

// The codes start at a block.
template <bool kIsM>
__attribute__((noinline)) void read_codes(const uint8_t* codes, const uint8_t* scales, int64_t size,
                                          float* __restrict to) {
  for_each_code_block(size, [&](int64_t first, int64_t count) {
    uint32_t wide[kCodeBlock];
    resize(codes + first, wide, count);
    const float scale = scale_value(scales[first / kCodeBlock]);
    float* __restrict values = to + first;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) values[i] = decoded<kIsM>(wide[i], scale);
  });
}

template <bool kIsM>
__attribute__((noinline)) void write_codes(const float* __restrict from, const uint32_t* __restrict words, int64_t size,
                                           uint8_t* codes, uint8_t* scales) {
  for_each_code_block(size, [&](int64_t first, int64_t count) {
    const float* __restrict values = from + first;
    const uint32_t* __restrict random = words + first;
    uint32_t top = 0;
#pragma omp simd reduction(max : top)
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t magnitude = magnitude_bits(values[i]);
      top = magnitude > top ? magnitude : top;
    }
    const uint8_t scale = scale_of<kIsM>(top);
    scales[first / kCodeBlock] = scale;
    if (scale == kNoScale) {
      std::memset(codes + first, 0, static_cast<size_t>(count));
      return;
    }
    const float inverse = inverse_scale(scale);
    uint32_t wide[kCodeBlock];
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) wide[i] = encoded<kIsM>(values[i], inverse, random[i] >> 12);
    resize(wide, codes + first, count);
  });
}

// Rounds values to bfloat16, in place or to other memory.
__attribute__((noinline)) inline void write_at_random(const float* __restrict from, const uint32_t* __restrict words,
                                                      int64_t size, BFloat16* to) {
  uint32_t wide[kTile];
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) wide[i] = bit_cast<uint32_t>(rounded_at_random(from[i], words[i] >> 16)) >> 16;
  resize(wide, reinterpret_cast<uint16_t*>(to), size);
}

__attribute__((noinline)) inline void read_halves(const BFloat16* high, const int16_t* low, int64_t size,
                                                  float* __restrict to) {
  uint32_t highs[kTile];
  uint32_t lows[kTile];
  resize(reinterpret_cast<const uint16_t*>(high), highs, size);
  resize(reinterpret_cast<const uint16_t*>(low), lows, size);
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    to[i] = joined(highs[i], static_cast<int32_t>(lows[i] << 16) >> 16);
  }
}

__attribute__((noinline)) inline void write_halves(const float* __restrict from, int64_t size, BFloat16* high,
                                                   int16_t* low) {
  uint32_t highs[kTile];
  uint32_t lows[kTile];
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    highs[i] = high_half(from[i]);
    lows[i] = low_half(from[i], highs[i]);
  }
  resize(highs, reinterpret_cast<uint16_t*>(high), size);
  resize(lows, reinterpret_cast<uint16_t*>(low), size);
}

// The words of kCodeBlock elements from `begin`, a multiple of that.
FASTADAM_INLINE void random_words(uint64_t key, RandomStream stream, int64_t begin, uint32_t* __restrict words) {
  const uint64_t own = block_key(key, stream, begin);
  uint32_t lanes[kRandomLanes];
#pragma omp simd
  for (int64_t lane = 0; lane < kRandomLanes; ++lane) {
    lanes[lane] = first_word(own, begin, static_cast<uint32_t>(lane));
  }
  for (int64_t at = 0; at < kCodeBlock; at += kRandomLanes) {
#pragma omp simd
    for (int64_t lane = 0; lane < kRandomLanes; ++lane) {
      words[at + lane] = lanes[lane];
      lanes[lane] = next_word(lanes[lane]);
    }
  }
}

// The words of a tile, or of its first elements.
inline void words_of_tile(const StepArgs& step, const TensorArgs& tensor, RandomStream stream, int64_t begin,
                          int64_t size, uint32_t* words) {
  const uint64_t key = random_key(step.seed, step.number, tensor.parameter);
  for (int64_t at = 0; at < size; at += kCodeBlock) random_words(key, stream, begin + at, words + at);
}

// The arrays of at most kTile elements of a variable, starting at element `begin`, a multiple of that: themselves, or
// copies of them in their compute type until finish() stores these.
template <class Storage>
class TileValues {
  using T = Compute<Storage>;

 public:
  TileValues(const StepArgs& step, const TensorArgs& tensor, int64_t begin, int64_t size)
      : step_(step), tensor_(tensor), begin_(begin), size_(size) {
    Storage* const var = static_cast<Storage*>(tensor.var) + begin;
    values_.var = tensor.low == nullptr ? in_compute_type_of(var, size, room_[0]) : read_var();
    values_.grad = gradient_of(tensor, begin, size, room_[1]);
    values_.m = read<true>(tensor.m, tensor.m_scales, room_[2]);
    values_.v = read<false>(tensor.v, tensor.v_scales, room_[3]);
    values_.vhat = step.amsgrad ? read<false>(tensor.vhat, nullptr, room_[4]) : nullptr;
  }

  const Operands<T>& operands() const { return values_; }

  void finish() {
    if constexpr (sizeof(T) == 4) {
      uint32_t words[kTile];
      if (tensor_.moments > FASTADAM_MOMENTS_HALF) words_of_tile(step_, tensor_, kOfMoments, begin_, size_, words);
      write<true>(values_.m, words, tensor_.m, tensor_.m_scales);
      write<false>(values_.v, words, tensor_.v, tensor_.v_scales);
      if (step_.amsgrad) write<false>(values_.vhat, words, tensor_.vhat, nullptr);
      if constexpr (sizeof(Storage) == 2) write_var();
    }
  }

 private:
  template <bool kIsM>
  T* read(void* array, const uint8_t* scales, T* room) const {
    if constexpr (sizeof(T) == 4) {
      if (tensor_.moments == FASTADAM_MOMENTS_8BIT) {
        read_codes<kIsM>(static_cast<const uint8_t*>(array) + begin_, scales + begin_ / kCodeBlock, size_, room);
        return room;
      }
      if (tensor_.moments == FASTADAM_MOMENTS_BFLOAT16) {
        convert(static_cast<const BFloat16*>(array) + begin_, room, size_);
        return room;
      }
      if (has_half_moments(tensor_)) {
        return in_compute_type_of(static_cast<Storage*>(array) + begin_, size_, room);
      }
    }
    return static_cast<T*>(array) + begin_;
  }

  template <bool kIsM>
  void write(const T* values, const uint32_t* words, void* array, uint8_t* scales) const {
    if (tensor_.moments == FASTADAM_MOMENTS_8BIT) {
      write_codes<kIsM>(values, words, size_, static_cast<uint8_t*>(array) + begin_, scales + begin_ / kCodeBlock);
    } else if (tensor_.moments == FASTADAM_MOMENTS_BFLOAT16) {
      write_at_random(values, words, size_, static_cast<BFloat16*>(array) + begin_);
    } else if constexpr (sizeof(Storage) == 2) {
      if (has_half_moments(tensor_)) convert(values, static_cast<Storage*>(array) + begin_, size_);
    }
  }

  T* read_var() {
    if constexpr (sizeof(T) == 4) {
      read_halves(static_cast<const BFloat16*>(tensor_.var) + begin_, tensor_.low + begin_, size_, room_[0]);
    }
    return room_[0];
  }

  void write_var() const {
    auto* const halves = static_cast<BFloat16*>(tensor_.var) + begin_;  // unless the variable is float16
    if (tensor_.low != nullptr) return write_halves(values_.var, size_, halves, tensor_.low + begin_);
    if (!tensor_.stochastic) return convert(values_.var, static_cast<Storage*>(tensor_.var) + begin_, size_);
    uint32_t words[kTile];
    words_of_tile(step_, tensor_, kOfVariables, begin_, size_, words);
    write_at_random(values_.var, words, size_, halves);
  }

  const StepArgs& step_;
  const TensorArgs& tensor_;
  int64_t begin_;
  int64_t size_;
  T room_[5][kTile];
  Operands<T> values_;
};

}  // namespace
}  // namespace fastadam::cpu::FASTADAM_ISA
