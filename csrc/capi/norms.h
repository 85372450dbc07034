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
// finite.
class Norms : public GradientNorms {
 public:
  Norms(const TensorArgs* tensors, int64_t count, double clip_value, bool require_finite)
      : GradientNorms(read(tensors, count, clip_value, require_finite)), tensors_(tensors) {}

  double sum_of_squares(int64_t tensor) const { return squares()[static_cast<size_t>(tensor)]; }

  // With the factors that the tensors have.
  Clipping clip(const AdamHyper& hyper) const {
    return GradientNorms::clip(hyper, [this](size_t i) { return tensors_[i].grad_factor; });
  }

 private:
  static GradientNorms read(const TensorArgs* tensors, int64_t count, double clip_value, bool require_finite) {
    std::vector<double> squares = sum_squares(tensors, count, clip_value, require_finite, false);
    std::vector<TensorArgs> overflowed;
    const auto may_have_overflowed = [&](size_t i) {
      return tensors[i].grad_dtype == FASTADAM_FLOAT64 && !is_finite(squares[i]);
    };
    std::vector<double> rescaled(squares.size());
    for (size_t i = 0; i < squares.size(); ++i) {
      rescaled[i] = squares[i] * kNormUnit * kNormUnit;
      if (may_have_overflowed(i)) overflowed.push_back(tensors[i]);
    }
    if (!overflowed.empty()) {
      const std::vector<double> again =
          sum_squares(overflowed.data(), static_cast<int64_t>(overflowed.size()), clip_value, false, true);
      for (size_t i = 0, k = 0; i < squares.size(); ++i) {
        if (may_have_overflowed(i)) rescaled[i] = again[k++];
      }
    }
    return {std::move(squares), std::move(rescaled)};
  }

  static std::vector<double> sum_squares(const TensorArgs* tensors, int64_t count, double clip_value,
                                         bool require_finite, bool is_rescaled) {
    std::vector<int64_t> block_offsets{0};
    block_offsets.reserve(static_cast<size_t>(count) + 1);
    for (int64_t i = 0; i < count; ++i) {
      block_offsets.push_back(block_offsets.back() + norm_blocks(tensors[i].grad_size));
    }
    std::vector<double> sums(static_cast<size_t>(block_offsets.back()));  // of blocks
    cpu::run_norm({tensors, block_offsets.data(), count, clip_value, require_finite, sums.data(), is_rescaled});
    std::vector<double> squares(static_cast<size_t>(count));
    for (size_t i = 0; i < squares.size(); ++i) {
      squares[i] = pairwise_sum(sums.data() + block_offsets[i], block_offsets[i + 1] - block_offsets[i]);
    }
    return squares;
  }

  const TensorArgs* tensors_;
};

}  // namespace fastadam
