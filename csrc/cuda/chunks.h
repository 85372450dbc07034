// SPDX-License-Identifier: Apache-2.0
// The tables that the launches are cut by, made on the host once for a set of buffers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "bodies.h"

namespace fastadam::cuda {

// Of the variables of this dtype: an empty one has none.
inline std::vector<Chunk> chunks_of(const Chains& chains, DType dtype) {
  std::vector<Chunk> chunks;
  for (int64_t k = 0; k < chains.count; ++k) {
    const TensorArgs& tensor = chains.tensors[chains.heads[k]];
    if (tensor.dtype != dtype) continue;
    for (int64_t begin = 0; begin < tensor.size; begin += kChunkElements) chunks.push_back({chains.heads[k], begin});
  }
  return chunks;
}

inline int most_gradients(const Chains& chains) {
  int most = 0;
  for (int64_t k = 0; k < chains.count; ++k) {
    int count = 0;
    for (int64_t t = chains.heads[k]; t >= 0; t = chains.tensors[t].next) ++count;
    most = std::max(most, count);
  }
  return most;
}

// What one SetGradients takes of the tensors from `first` on; returns how many.
inline int64_t fill_gradients(Gradient* gradients, const std::vector<TensorArgs>& tensors, size_t first) {
  const size_t count = std::min<size_t>(SetGradients::kCount, tensors.size() - first);
  for (size_t i = 0; i < count; ++i) {
    const TensorArgs& tensor = tensors[first + i];
    gradients[i] = {tensor.grad, tensor.grad_factor, tensor.grad_dtype};
  }
  return static_cast<int64_t>(count);
}

// Blocks of a norm before each tensor, and all of them.
inline std::vector<int64_t> norm_offsets(const std::vector<TensorArgs>& tensors) {
  std::vector<int64_t> offsets{0};
  for (const TensorArgs& tensor : tensors) offsets.push_back(offsets.back() + norm_blocks(tensor.size));
  return offsets;
}

inline int64_t most_blocks(const std::vector<int64_t>& offsets) {
  int64_t most = 0;
  for (size_t t = 1; t < offsets.size(); ++t) most = std::max(most, offsets[t] - offsets[t - 1]);
  return most;
}

// Blocks of threads for SumSquares.
inline int64_t norm_grid(const std::vector<int64_t>& offsets) {
  return (offsets.back() + SumSquares::kWarps - 1) / SumSquares::kWarps;
}

// Calls run with the two as std::bool_constant.
template <class Run>
void choose(bool amsgrad, bool transform, Run run) {
  using Yes = std::true_type;
  using No = std::false_type;
  if (amsgrad) return transform ? run(Yes{}, Yes{}) : run(Yes{}, No{});
  return transform ? run(No{}, Yes{}) : run(No{}, No{});
}

}  // namespace fastadam::cuda
