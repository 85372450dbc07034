// SPDX-License-Identifier: Apache-2.0
// From the norms of gradients to the factors of norm clipping.
#pragma once

#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "../core/norm.h"
#include "../core/step_scalars.h"

namespace fastadam {

// The sums of squares of some gradients, in order. Those of several calls can be appended, and those of parts of one
// gradient added: what follows from them depends on their order only.
class GradientNorms {
 public:
  GradientNorms() = default;

  // `squares[i]`: the sum over gradient i; infinite if it is above the largest float64, and NaN if the gradient had to
  // be finite and is not. `rescaled[i]`: the same of elements times kNormUnit; it counts where squares[i] is not
  // finite.
  GradientNorms(std::vector<double> squares, std::vector<double> rescaled)
      : squares_(std::move(squares)), rescaled_(std::move(rescaled)) {}

  const std::vector<double>& squares() const { return squares_; }
  const std::vector<double>& rescaled() const { return rescaled_; }
  size_t size() const { return squares_.size(); }

  void append(const GradientNorms& other) {
    squares_.insert(squares_.end(), other.squares_.begin(), other.squares_.end());
    rescaled_.insert(rescaled_.end(), other.rescaled_.begin(), other.rescaled_.end());
  }

  // Whether every element of every gradient is finite. Valid only if that was to be found out.
  bool all_finite() const {
    for (double square : squares_) {
      if (std::isnan(square)) return false;
    }
    return true;
  }

  // The norm of all gradients together.
  double joint() const {
    return joint_norm(
        static_cast<int64_t>(size()), [this](int64_t i) { return squares_[static_cast<size_t>(i)]; },
        [this](int64_t i) { return norm(i, 1); });
  }

  struct Clipping {
    std::vector<double> factors;  // of each gradient
    bool is_finite;               // whether all norms are
  };

  // clip_norm first, then global_clip_norm, as in TF. factor_of(i), the factor of gradient i without clipping, which
  // includes gradient_scale, is included.
  template <class FactorOf>
  Clipping clip(const AdamHyper& hyper, FactorOf factor_of) const {
    Clipping result{std::vector<double>(size()), true};
    const auto clip_one = [&](int64_t i) {
      return clip_gradient(norm(i, hyper.gradient_scale), factor_of(static_cast<size_t>(i)), hyper.clip_norm);
    };
    const auto square_of = [&](int64_t i) {
      const NormClip clip = clip_one(i);
      result.factors[static_cast<size_t>(i)] = clip.factor;
      result.is_finite = result.is_finite && is_finite(clip.norm);
      return clip.square;
    };
    const double norm =
        joint_norm(static_cast<int64_t>(size()), square_of, [&](int64_t i) { return clip_one(i).norm; });
    if (!std::isfinite(hyper.global_clip_norm)) return result;
    const double global_factor = global_clip_factor(norm, hyper.global_clip_norm);
    for (double& factor : result.factors) factor *= global_factor;
    result.is_finite = result.is_finite && is_finite(norm);
    return result;
  }

 private:
  // The norm of one gradient times `scale`.
  double norm(int64_t gradient, double scale) const {
    const auto i = static_cast<size_t>(gradient);
    return is_finite(squares_[i]) ? norm_of(squares_[i], scale) : norm_of_rescaled(rescaled_[i], scale);
  }

  std::vector<double> squares_;
  std::vector<double> rescaled_;
};

inline bool clips_norms(const AdamHyper& hyper) {
  return std::isfinite(hyper.clip_norm) || std::isfinite(hyper.global_clip_norm);
}

}  // namespace fastadam
