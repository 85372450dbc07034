// SPDX-License-Identifier: Apache-2.0
// The norms of gradients in memory.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "../core/float_mode.h"
#include "../core/norm.h"
#include "../core/step_args.h"
#include "../cpu/launch.h"
#include "clipping.h"

namespace fastadam {

// The sum of squares of a gradient in an accumulator, which is 0 outside of its rows: the bits of the sum over all
// elements, since adding 0 to a sum of squares changes nothing. `unit` multiplies the elements.
template <class T>
double sum_squares_of_rows(const TensorArgs& tensor, double clip_value, bool require_finite, double unit) {
  const FlushDenormals flush;
  const T limit = static_cast<T>(clip_value);
  const int64_t width = tensor.rows->width;
  std::vector<std::pair<int64_t, double>> sums;  // of the blocks that rows reach, and the places of these
  double lanes[kNormLanes] = {};
  int64_t block = -1;
  const auto finish_block = [&] {
    if (block >= 0) sums.emplace_back(block, pairwise_sum(lanes, kNormLanes));
    for (double& lane : lanes) lane = 0;
  };
  for (int64_t k = 0; k < tensor.rows->count; ++k) {
    const int64_t begin = tensor.rows->rows[k] * width;
    for (int64_t at = begin; at < begin + width; ++at) {
      if (at / kNormBlock != block) {
        finish_block();
        block = at / kNormBlock;
      }
      const T g = static_cast<const T*>(tensor.grad)[at];
      const auto x = static_cast<double>(clip_by_value(g, limit)) * unit;
      lanes[at % kNormLanes] += require_finite ? x * x + static_cast<double>(g - g) : x * x;
    }
  }
  finish_block();
  for (int64_t count = norm_blocks(tensor.size); count > 1; count = (count + 1) / 2) {
    size_t kept = 0;
    for (const auto& [place, sum] : sums) {
      const bool joins = kept > 0 && sums[kept - 1].first == place / 2;
      if (joins) sums[kept - 1].second += sum;
      if (!joins) sums[kept++] = {place / 2, sum};
    }
    sums.resize(kept);
  }
  return sums.empty() ? 0 : sums[0].second;
}

// Reads the gradients of the tensors when it is made; float64 gradients a second time if their sum of squares is not
// finite or very small.
class Norms : public GradientNorms {
 public:
  Norms(const TensorArgs* tensors, int64_t count, double clip_value, bool require_finite)
      : GradientNorms(read(tensors, count, clip_value, require_finite)), tensors_(tensors) {}

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
      const int64_t blocks = is_accumulated(tensors[i]) ? 0 : norm_blocks(tensors[i].grad_size);
      block_offsets.push_back(block_offsets.back() + blocks);
    }
    std::vector<double> sums(static_cast<size_t>(block_offsets.back()));  // of blocks
    cpu::run_norm({tensors, block_offsets.data(), count, clip_value, require_finite, sums.data(), units});
    std::vector<double> squares(static_cast<size_t>(count));
    for (size_t i = 0; i < squares.size(); ++i) {
      squares[i] = pairwise_sum(sums.data() + block_offsets[i], block_offsets[i + 1] - block_offsets[i]);
      if (!is_accumulated(tensors[i])) continue;
      const auto sum =
          tensors[i].grad_dtype == FASTADAM_FLOAT64 ? sum_squares_of_rows<double> : sum_squares_of_rows<float>;
      squares[i] = sum(tensors[i], clip_value, require_finite, units == nullptr ? 1.0 : units[i]);
    }
    return squares;
  }

  const TensorArgs* tensors_;
};

}  // namespace fastadam
