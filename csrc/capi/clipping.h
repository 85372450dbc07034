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

  // Sums of squares over one gradient. Each is right where norm_unit(square) says that it is to be used.
  struct Sums {
    double square;  // infinite if it is above the largest float64, and NaN if the gradient had to be finite and is not
    double of_large;  // of elements times kUnitOfLarge
    double of_small;  // of elements times kUnitOfSmall
  };

  explicit GradientNorms(std::vector<Sums> sums) : sums_(std::move(sums)) {}

  const std::vector<Sums>& sums() const { return sums_; }
  size_t size() const { return sums_.size(); }

  void append(const GradientNorms& other) { sums_.insert(sums_.end(), other.sums_.begin(), other.sums_.end()); }

  // Whether every element of every gradient is finite. Valid only if that was to be found out.
  bool all_finite() const {
    for (const Sums& sums : sums_) {
      if (std::isnan(sums.square)) return false;
    }
    return true;
  }

  // The norm of all gradients together.
  double joint() const {
    return joint_norm(
        static_cast<int64_t>(size()), [this](int64_t i) { return sums_[static_cast<size_t>(i)].square; },
        [this](int64_t i) { return norm(i, 1); });
  }

  struct Clipping {
    std::vector<Factor> factors;  // of each gradient
    bool is_finite;               // whether all norms are
  };

  // clip_norm first, then global_clip_norm, as in TF. factor_of(i), the factor of gradient i without clipping, which
  // includes gradient_scale, is included.
  template <class FactorOf>
  Clipping clip(const AdamHyper& hyper, FactorOf factor_of) const {
    Clipping result{std::vector<Factor>(size()), true};
    const auto clip_one = [&](int64_t i) {
      return clip_gradient(norm(i, hyper.gradient_scale), make_factor(factor_of(static_cast<size_t>(i))),
                           hyper.clip_norm);
    };
    const auto square_of = [&](int64_t i) {
      const NormClip clip = clip_one(i);
      Factor& factor = result.factors[static_cast<size_t>(i)];
      factor.value = clip.factor.value;  // copied whole, it would be read back from memory as it is written
      factor.exponent = clip.factor.exponent;
      result.is_finite = result.is_finite && is_finite(clip.norm);
      return clip.square;
    };
    const double norm =
        joint_norm(static_cast<int64_t>(size()), square_of, [&](int64_t i) { return clip_one(i).norm; });
    if (!std::isfinite(hyper.global_clip_norm)) return result;
    const Factor global_factor = global_clip_factor(norm, hyper.global_clip_norm);
    for (Factor& factor : result.factors) factor = factor * global_factor;
    result.is_finite = result.is_finite && is_finite(norm);
    return result;
  }

 private:
  // The norm of one gradient times `scale`.
  double norm(int64_t gradient, double scale) const {
    const Sums& sums = sums_[static_cast<size_t>(gradient)];
    const double unit = norm_unit(sums.square);
    const double sum = unit == 1 ? sums.square : unit == kUnitOfLarge ? sums.of_large : sums.of_small;
    return norm_of(sum, scale, unit);
  }

  std::vector<Sums> sums_;
};

inline bool clips_norms(const AdamHyper& hyper) {
  return std::isfinite(hyper.clip_norm) || std::isfinite(hyper.global_clip_norm);
}

}  // namespace fastadam
