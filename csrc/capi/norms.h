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
// finite or very small.
class Norms {
 public:
  Norms(const TensorArgs* tensors, int64_t count, double clip_value, bool require_finite)
      : Norms(tensors, count, clip_value, require_finite, nullptr) {
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

  // Of one gradient; infinite if it is above the largest float64, and inexact below kLeastSum.
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
    std::vector<Factor> factors;  // of each gradient
    bool is_finite;               // whether all norms are
  };

  // clip_norm first, then global_clip_norm, as in TF. The tensors' own factors, which already include gradient_scale,
  // are included.
  Clipping clip(const AdamHyper& hyper) const {
    Clipping result{std::vector<Factor>(static_cast<size_t>(args_.tensor_count)), true};
    const auto clip_one = [&](int64_t i) {
      return clip_gradient(norm(i, hyper.gradient_scale), make_factor(args_.tensors[i].grad_factor), hyper.clip_norm);
    };
    const auto square_of = [&](int64_t i) {
      const NormClip clip = clip_one(i);
      Factor& factor = result.factors[static_cast<size_t>(i)];
      factor.value = clip.factor.value;  // copied whole, it would be read back from memory as it is written
      factor.exponent = clip.factor.exponent;
      result.is_finite = result.is_finite && is_finite(clip.norm);
      return clip.square;
    };
    const auto norm_at = [&](int64_t i) { return clip_one(i).norm; };
    const double norm = joint_norm(args_.tensor_count, square_of, norm_at);
    if (!std::isfinite(hyper.global_clip_norm)) return result;
    const Factor global_factor = global_clip_factor(norm, hyper.global_clip_norm);
    for (Factor& factor : result.factors) factor = factor * global_factor;
    result.is_finite = result.is_finite && is_finite(norm);
    return result;
  }

 private:
  Norms(const TensorArgs* tensors, int64_t count, double clip_value, bool require_finite, const double* units) {
    block_offsets_.reserve(static_cast<size_t>(count) + 1);
    block_offsets_.push_back(0);
    for (int64_t i = 0; i < count; ++i) {
      block_offsets_.push_back(block_offsets_.back() + norm_blocks(tensors[i].grad_size));
    }
    sums_.resize(static_cast<size_t>(block_offsets_.back()));
    args_ = {tensors, block_offsets_.data(), count, clip_value, require_finite, sums_.data(), units};
    cpu::run_norm(args_);
    for (size_t i = 0; i + 1 < block_offsets_.size(); ++i) {
      pairwise_sum(sums_.data() + block_offsets_[i], block_offsets_[i + 1] - block_offsets_[i]);
    }
  }

  void rescale() {
    std::vector<TensorArgs> tensors;
    std::vector<double> units;
    for (int64_t i = 0; i < args_.tensor_count; ++i) {
      if (unit_of(i) == 1) continue;
      tensors.push_back(args_.tensors[i]);
      units.push_back(unit_of(i));
    }
    if (tensors.empty()) return;
    const Norms again(tensors.data(), static_cast<int64_t>(tensors.size()), args_.clip_value, false, units.data());
    for (int64_t i = 0, k = 0; i < args_.tensor_count; ++i) {
      rescaled_.push_back(unit_of(i) == 1 ? 0 : again.sum_of_squares(k++));
    }
  }

  // What the elements of a gradient are multiplied by before they are squared.
  double unit_of(int64_t tensor) const {
    const TensorArgs& t = args_.tensors[tensor];
    return t.grad_dtype == FASTADAM_FLOAT64 && t.grad_size > 0 ? norm_unit(sum_of_squares(tensor)) : 1;
  }

  // The norm of one gradient times `scale`.
  double norm(int64_t tensor, double scale) const {
    const double unit = rescaled_.empty() ? 1 : unit_of(tensor);
    const double sum = unit == 1 ? sum_of_squares(tensor) : rescaled_[static_cast<size_t>(tensor)];
    return norm_of(sum, scale, unit);
  }

  std::vector<int64_t> block_offsets_;
  std::vector<double> sums_;      // of blocks; the first of a tensor has then received the sum of all
  std::vector<double> rescaled_;  // by tensor, of elements times unit_of(); empty if every unit is 1
  NormArgs args_{};
};

}  // namespace fastadam
