// SPDX-License-Identifier: Apache-2.0
// Computes, on the host, the tables that say how launches are cut. They are made once for a set of buffers.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "norm_kernels.h"

namespace fastadam::cuda {

// Groups tensors that can be updated at the same time: rounds[i] has the i-th gradient of every variable.
inline std::vector<std::vector<int64_t>> rounds_of(const Chains& chains) {
  std::vector<std::vector<int64_t>> rounds;
  for (int64_t k = 0; k < chains.count; ++k) {
    size_t round = 0;
    for (int64_t t = chains.heads[k]; t >= 0; t = chains.tensors[t].next, ++round) {
      if (round == rounds.size()) rounds.emplace_back();
      rounds[round].push_back(t);
    }
  }
  return rounds;
}

// The chunks of the tensors at `positions` that have this dtype.
inline std::vector<Chunk> chunks_of(const std::vector<TensorArgs>& tensors, const std::vector<int64_t>& positions,
                                    DType dtype) {
  std::vector<Chunk> chunks;
  for (int64_t t : positions) {
    const TensorArgs& tensor = tensors[static_cast<size_t>(t)];
    if (tensor.dtype != dtype) continue;
    for (int64_t begin = 0; begin < tensor.size; begin += kChunkElements) chunks.push_back({t, begin});
  }
  return chunks;
}

inline Gradient gradient_of(const TensorArgs& tensor) {
  return {tensor.grad, tensor.grad_factor, tensor.grad_size, tensor.grad_dtype};
}

// Copies the gradients for one SetGradients, starting at `first`, and returns their number.
inline int64_t fill_gradients(Gradient* target, const std::vector<Gradient>& gradients, size_t first) {
  const size_t count = std::min<size_t>(SetGradients::kCount, gradients.size() - first);
  std::copy_n(gradients.begin() + static_cast<std::ptrdiff_t>(first), count, target);
  return static_cast<int64_t>(count);
}

// The number of norm blocks before each gradient; the last entry is the total.
inline std::vector<int64_t> norm_offsets(const std::vector<TensorArgs>& tensors) {
  std::vector<int64_t> offsets{0};
  for (const TensorArgs& tensor : tensors) offsets.push_back(offsets.back() + norm_blocks(tensor.grad_size));
  return offsets;
}

inline int64_t most_blocks(const std::vector<int64_t>& offsets) {
  int64_t most = 0;
  for (size_t t = 1; t < offsets.size(); ++t) most = std::max(most, offsets[t] - offsets[t - 1]);
  return most;
}

// The number of blocks of threads for SumSquares.
inline int64_t norm_grid(const std::vector<int64_t>& offsets) {
  return (offsets.back() + SumSquares::kWarps - 1) / SumSquares::kWarps;
}

// beta^t for t = 0, 1, ... up to the first for which 1 - beta^t is 1 in T. Empty if that table would be too large.
template <class T>
std::vector<T> powers_of(double beta) {
  constexpr int64_t kMost = int64_t{1} << 20;
  constexpr T kLost = sizeof(T) == 4 ? T(0x1p-25) : T(0x1p-54);
  std::vector<T> powers;
  for (int64_t t = 0; t < kMost; ++t) {
    powers.push_back(std::pow(static_cast<T>(beta), static_cast<T>(t)));
    if (powers.back() <= kLost) return powers;
  }
  return {};
}

// Calls run(amsgrad, transform) with both values as types, std::integral_constant.
template <class Run>
void with_options(bool amsgrad, int transform, Run run) {
  const auto with = [&](auto kind) { return amsgrad ? run(std::true_type{}, kind) : run(std::false_type{}, kind); };
  if (transform == kAsItIs) return with(std::integral_constant<int, kAsItIs>{});
  if (transform == kClipAndFactor) return with(std::integral_constant<int, kClipAndFactor>{});
  with(std::integral_constant<int, kAndL2>{});
}

// Calls run() with a value of the storage type of a dtype.
template <class Run>
void with_storage(DType dtype, Run run) {
  switch (dtype) {
    case FASTADAM_FLOAT16:
      return run(Float16{});
    case FASTADAM_BFLOAT16:
      return run(BFloat16{});
    case FASTADAM_FLOAT32:
      return run(0.0F);
    default:
      return run(0.0);
  }
}

}  // namespace fastadam::cuda
