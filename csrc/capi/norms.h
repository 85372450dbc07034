// SPDX-License-Identifier: Apache-2.0
// The norms of gradients, and the factors of norm clipping.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "../core/norm.h"
#include "../core/step_args.h"
#include "../cpu/launch.h"

namespace fastadam {

// Reads the gradients of the tensors when it is made; float64 gradients a second time if their sum of squares is not
// finite.
class Norms {
 public:
  Norms(const TensorArgs* tensors, int64_t count, double clip_value, bool require_finite)
      : Norms(tensors, count, clip_value, require_finite, false) {
    rescale();
  }
  Norms(const Norms&) = delete;
  Norms& operator=(const Norms&) = delete;

  // Whether every element of every gradient is finite. Valid only with `require_finite`.
  bool all_finite() const {
    for (int64_t i = 0; i < args_.tensor_count; ++i) {
      if (std::isnan(sum_of_squares(i))) return false;
    }
    return true;
  }

  // Of one gradient; infinite if it is above the largest float64.
  double sum_of_squares(int64_t tensor) const {
    const auto i = static_cast<size_t>(tensor);
    return block_offsets_[i] == block_offsets_[i + 1] ? 0 : sums_[static_cast<size_t>(block_offsets_[i])];
  }

  // The norm of all gradients together.
  double joint() const {
    return joint_norm(
        args_.tensor_count, [this](int64_t i) { return sum_of_squares(i); }, [this](int64_t i) { return norm(i, 1); });
  }

  struct Clipping {
    std::vector<double> factors;  // of each gradient
    bool is_finite;               // whether all norms are
  };

  // clip_norm first, then global_clip_norm, as in TF. The tensors' own factors, which already include gradient_scale,
  // are included.
  Clipping clip(const AdamHyper& hyper) const {
    Clipping result{std::vector<double>(static_cast<size_t>(args_.tensor_count)), true};
    const auto clip_one = [&](int64_t i) {
      return clip_gradient(norm(i, hyper.gradient_scale), args_.tensors[i].grad_factor, hyper.clip_norm);
    };
    const auto square_of = [&](int64_t i) {
      const NormClip clip = clip_one(i);
      result.factors[static_cast<size_t>(i)] = clip.factor;
      result.is_finite = result.is_finite && is_finite(clip.norm);
      return clip.square;
    };
    const double norm = joint_norm(args_.tensor_count, square_of, [&](int64_t i) { return clip_one(i).norm; });
    if (!std::isfinite(hyper.global_clip_norm)) return result;
    const double global_factor = global_clip_factor(norm, hyper.global_clip_norm);
    for (double& factor : result.factors) factor *= global_factor;
    result.is_finite = result.is_finite && is_finite(norm);
    return result;
  }

 private:
  Norms(const TensorArgs* tensors, int64_t count, double clip_value, bool require_finite, bool rescaled) {
    block_offsets_.reserve(static_cast<size_t>(count) + 1);
    block_offsets_.push_back(0);
    for (int64_t i = 0; i < count; ++i) {
      block_offsets_.push_back(block_offsets_.back() + norm_blocks(tensors[i].grad_size));
    }
    sums_.resize(static_cast<size_t>(block_offsets_.back()));
    args_ = {tensors, block_offsets_.data(), count, clip_value, require_finite, sums_.data(), rescaled};
    cpu::run_norm(args_);
    for (size_t i = 0; i + 1 < block_offsets_.size(); ++i) {
      pairwise_sum(sums_.data() + block_offsets_[i], block_offsets_[i + 1] - block_offsets_[i]);
    }
  }

  void rescale() {
    std::vector<TensorArgs> overflowed;
    for (int64_t i = 0; i < args_.tensor_count; ++i) {
      if (may_have_overflowed(i)) overflowed.push_back(args_.tensors[i]);
    }
    if (overflowed.empty()) return;
    const Norms again(overflowed.data(), static_cast<int64_t>(overflowed.size()), args_.clip_value, false, true);
    for (int64_t i = 0, k = 0; i < args_.tensor_count; ++i) {
      rescaled_.push_back(may_have_overflowed(i) ? again.sum_of_squares(k++) : 0);
    }
  }

  bool may_have_overflowed(int64_t tensor) const {
    return args_.tensors[tensor].grad_dtype == FASTADAM_FLOAT64 && !is_finite(sum_of_squares(tensor));
  }

  // The norm of one gradient times `scale`.
  double norm(int64_t tensor, double scale) const {
    if (rescaled_.empty() || !may_have_overflowed(tensor)) return norm_of(sum_of_squares(tensor), scale);
    return norm_of_rescaled(rescaled_[static_cast<size_t>(tensor)], scale);
  }

  std::vector<int64_t> block_offsets_;
  std::vector<double> sums_;      // of blocks; the first of a tensor has then received the sum of all
  std::vector<double> rescaled_;  // by tensor, of elements times kNormUnit; empty if no sum is to be rescaled
  NormArgs args_{};
};

}  // namespace fastadam
