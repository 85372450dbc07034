// SPDX-License-Identifier: Apache-2.0
// The working memory of norm clipping: block sums of the gradients of a step, and the factors that follow from them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "../core/norm.h"
#include "../core/step_args.h"

namespace fastadam::bind {

class Norms {
 public:
  void resize(const std::vector<TensorArgs>& tensors, double clip_value, bool require_finite = false) {
    block_offsets_.assign(1, 0);
    for (const TensorArgs& tensor : tensors)
      block_offsets_.push_back(block_offsets_.back() + norm_blocks(tensor.grad_size));
    sums_.resize(static_cast<size_t>(block_offsets_.back()));
    args_ = {tensors.data(), block_offsets_.data(), static_cast<int64_t>(tensors.size()),
             clip_value,     require_finite,        sums_.data()};
  }

  const NormArgs& args() const { return args_; }

  // Whether every gradient was, where that was required.
  bool all_finite() const {
    return std::none_of(sums_.begin(), sums_.end(), [](double sum) { return std::isnan(sum); });
  }

  // Sum of squares of one gradient, once the blocks are there; overwrites them.
  double sum_squares(size_t tensor) {
    return pairwise_sum(sums_.data() + block_offsets_[tensor], block_offsets_[tensor + 1] - block_offsets_[tensor]);
  }

  // Clips each norm, then the norm of all: TF's order. The factors hold gradient_scale already.
  void fold_into(std::vector<TensorArgs>& tensors, const AdamHyper& hyper) {
    double sum = 0;
    for (size_t i = 0; i < tensors.size(); ++i) {
      const double norm = std::sqrt(sum_squares(i)) * hyper.gradient_scale;
      const double factor = std::isfinite(hyper.clip_norm) ? clip_factor(norm, hyper.clip_norm) : 1.0;
      tensors[i].grad_factor *= factor;
      sum += norm * factor * norm * factor;
    }
    if (!std::isfinite(hyper.global_clip_norm)) return;
    const double factor = global_clip_factor(std::sqrt(sum), hyper.global_clip_norm);
    for (TensorArgs& tensor : tensors) tensor.grad_factor *= factor;
  }

 private:
  std::vector<int64_t> block_offsets_;
  std::vector<double> sums_;
  NormArgs args_{};
};

}  // namespace fastadam::bind
