// SPDX-License-Identifier: Apache-2.0
// Norm clipping: block sums of the gradients of a step, and the clip factors computed from them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "../core/norm.h"
#include "../core/step_args.h"

namespace fastadam {

class Norms {
 public:
  Norms(const TensorArgs* tensors, int64_t count, double clip_value, bool require_finite) {
    block_offsets_.reserve(static_cast<size_t>(count) + 1);
    block_offsets_.push_back(0);
    for (int64_t i = 0; i < count; ++i) {
      block_offsets_.push_back(block_offsets_.back() + norm_blocks(tensors[i].grad_size));
    }
    sums_.resize(static_cast<size_t>(block_offsets_.back()));
    args_ = {tensors, block_offsets_.data(), count, clip_value, require_finite, sums_.data()};
  }
  Norms(const Norms&) = delete;
  Norms& operator=(const Norms&) = delete;

  const NormArgs& args() const { return args_; }

  // Whether every gradient is finite. Valid only with `require_finite`.
  bool all_finite() const {
    return std::none_of(sums_.begin(), sums_.end(), [](double sum) { return std::isnan(sum); });
  }

  // Sum of squares of one gradient, after the blocks were summed. Overwrites the block sums.
  double sum_squares(size_t tensor) {
    return pairwise_sum(sums_.data() + block_offsets_[tensor], block_offsets_[tensor + 1] - block_offsets_[tensor]);
  }

  // The factor of each gradient: clip_norm first, then global_clip_norm, as in TF. The tensors' own factors, which
  // already include gradient_scale, are included.
  std::vector<double> clip_factors(const AdamHyper& hyper) {
    std::vector<double> factors(static_cast<size_t>(args_.tensor_count));
    double sum = 0;
    for (size_t i = 0; i < factors.size(); ++i) {
      const NormClip clip =
          clip_gradient(sum_squares(i), hyper.gradient_scale, args_.tensors[i].grad_factor, hyper.clip_norm);
      factors[i] = clip.factor;
      sum += clip.square;
    }
    if (!std::isfinite(hyper.global_clip_norm)) return factors;
    const double global_factor = global_clip_factor(std::sqrt(sum), hyper.global_clip_norm);
    for (double& factor : factors) factor *= global_factor;
    return factors;
  }

 private:
  std::vector<int64_t> block_offsets_;
  std::vector<double> sums_;
  NormArgs args_{};
};

}  // namespace fastadam
