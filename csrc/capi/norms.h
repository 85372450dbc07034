// SPDX-License-Identifier: Apache-2.0
// The norms of gradients in memory.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "../core/norm.h"
#include "../core/step_args.h"
#include "../cpu/launch.h"
#include "clipping.h"

namespace fastadam {

// Reads the gradients of the tensors when it is made; float64 gradients a second time if their sum of squares is not
// finite or very small.
class Norms : public GradientNorms {
 public:
  Norms(const TensorArgs* tensors, int64_t count, double clip_value, bool require_finite)
      : GradientNorms(read(tensors, count, clip_value, require_finite)), tensors_(tensors) {}

  double sum_of_squares(int64_t tensor) const { return sums()[static_cast<size_t>(tensor)].square; }

  // With the factors that the tensors have.
  Clipping clip(const AdamHyper& hyper) const {
    return GradientNorms::clip(hyper, [this](size_t i) { return tensors_[i].grad_factor; });
  }

 private:
  static GradientNorms read(const TensorArgs* tensors, int64_t count, double clip_value, bool require_finite) {
    const std::vector<double> squares = sum_squares(tensors, count, clip_value, require_finite, nullptr);
    std::vector<Sums> sums;
    std::vector<TensorArgs> again;
    std::vector<double> units;
    const auto unit_of = [&](size_t i) {
      return tensors[i].grad_dtype == FASTADAM_FLOAT64 && tensors[i].grad_size > 0 ? norm_unit(squares[i]) : 1;
    };
    for (size_t i = 0; i < squares.size(); ++i) {
      // of_small matters only if all shards of the gradient are small; then it is set below, or they are 0.
      sums.push_back({squares[i], squares[i] * kUnitOfLarge * kUnitOfLarge, 0});
      if (tensors[i].grad_dtype != FASTADAM_FLOAT64) sums[i].of_small = squares[i] * kUnitOfSmall * kUnitOfSmall;
      if (unit_of(i) == 1) continue;
      again.push_back(tensors[i]);
      units.push_back(unit_of(i));
    }
    if (again.empty()) return GradientNorms(std::move(sums));
    const std::vector<double> rescaled =
        sum_squares(again.data(), static_cast<int64_t>(again.size()), clip_value, false, units.data());
    for (size_t i = 0, k = 0; i < squares.size(); ++i) {
      if (unit_of(i) == 1) continue;
      (unit_of(i) == kUnitOfLarge ? sums[i].of_large : sums[i].of_small) = rescaled[k++];
    }
    return GradientNorms(std::move(sums));
  }

  static std::vector<double> sum_squares(const TensorArgs* tensors, int64_t count, double clip_value,
                                         bool require_finite, const double* units) {
    std::vector<int64_t> block_offsets{0};
    block_offsets.reserve(static_cast<size_t>(count) + 1);
    for (int64_t i = 0; i < count; ++i) {
      block_offsets.push_back(block_offsets.back() + norm_blocks(tensors[i].grad_size));
    }
    std::vector<double> sums(static_cast<size_t>(block_offsets.back()));  // of blocks
    cpu::run_norm({tensors, block_offsets.data(), count, clip_value, require_finite, sums.data(), units});
    std::vector<double> squares(static_cast<size_t>(count));
    for (size_t i = 0; i < squares.size(); ++i) {
      squares[i] = pairwise_sum(sums.data() + block_offsets[i], block_offsets[i + 1] - block_offsets[i]);
    }
    return squares;
  }

  const TensorArgs* tensors_;
};

}  // namespace fastadam
