// SPDX-License-Identifier: Apache-2.0
// The kernels for norms, clip factors and the finite check. The rules of dense_kernels.h apply.
#pragma once

#include "dense_kernels.h"

namespace fastadam::cuda {

// What the elements of a gradient are multiplied by before they are squared, if this is the sum of squares as they are.
FASTADAM_INLINE double unit_of(const Gradient& gradient, double sum_of_squares) {
  return gradient.dtype == FASTADAM_FLOAT64 ? norm_unit(sum_of_squares) : 1;
}

// Computes the sum of squares of each block of the gradients (core/norm.h). A warp does one block, a thread one lane.
struct SumSquares {
  static constexpr int kWarps = 8;
  static constexpr int kThreads = kWarps * static_cast<int>(kNormLanes);
  struct Shared {
    double lanes[kWarps][kNormLanes];
  };
  const Gradient* gradients;
  const int64_t* block_offsets;  // as in NormArgs
  int64_t tensor_count;
  const StepState* state;  // if not null, its clip value is used instead of `clip_value`
  double clip_value;
  bool require_finite;
  double* sums;
  // Null in the first pass. In the second pass the sums of the first: only float64 gradients with a norm_unit() other
  // than 1 are read again, multiplied by it; all other sums are 0.
  const double* first_sums;

  FASTADAM_INLINE int phases() const { return 2; }

  FASTADAM_INLINE void phase(int phase, int64_t block, int64_t thread, Shared& shared) const {
    const int64_t warp = thread / kNormLanes;
    const int64_t lane = thread % kNormLanes;
    const int64_t i = block * kWarps + warp;
    if (i >= block_offsets[tensor_count]) return;
    if (phase == 0) {
      shared.lanes[warp][lane] = sum_lane(i, lane);
    } else if (lane == 0) {
      sums[i] = pairwise_sum(shared.lanes[warp], kNormLanes);
    }
  }

 private:
  FASTADAM_INLINE double sum_lane(int64_t i, int64_t lane) const {
    const int64_t t = find_variable(block_offsets, tensor_count, i);
    double unit = 1;
    if (first_sums != nullptr) {
      unit = unit_of(gradients[t], first_sums[block_offsets[t]]);
      if (unit == 1) return 0;
    }
    const int64_t begin = (i - block_offsets[t]) * kNormBlock;
    const int64_t left = gradients[t].size - begin;
    const int64_t size = left < kNormBlock ? left : kNormBlock;
    const void* grad = gradients[t].data;
    switch (gradients[t].dtype) {
      case FASTADAM_FLOAT16:
        return sum<Float16>(static_cast<const Float16*>(grad) + begin, size, lane, unit);
      case FASTADAM_BFLOAT16:
        return sum<BFloat16>(static_cast<const BFloat16*>(grad) + begin, size, lane, unit);
      case FASTADAM_FLOAT32:
        return sum<float>(static_cast<const float*>(grad) + begin, size, lane, unit);
      default:
        return sum<double>(static_cast<const double*>(grad) + begin, size, lane, unit);
    }
  }

  template <class Storage>
  FASTADAM_INLINE double sum(const Storage* grad, int64_t size, int64_t lane, double unit) const {
    using T = Compute<Storage>;
    double total = 0;
    const T raw_clip = state == nullptr ? static_cast<T>(clip_value) : scalars_of<T>(*state).clip_value;
    T not_finite = T(0);  // becomes NaN if an element is not finite
    for (int64_t at = lane; at < size; at += kNormLanes) {
      const T g = load(grad[at]);
      if (require_finite) not_finite += g - g;
      const auto x = static_cast<double>(clip_by_value(g, raw_clip) * static_cast<T>(unit));
      total += x * x;
    }
    return require_finite ? total + static_cast<double>(not_finite) : total;
  }
};

// Sums the blocks of each tensor in the order of pairwise_sum(), in place. One block of threads sums one tensor.
struct SumBlocks {
  static constexpr int kThreads = 512;
  using Shared = NoShared;
  const int64_t* block_offsets;
  double* sums;         // sums[block_offsets[t]] receives the sum of tensor t
  int64_t most_blocks;  // the largest number of norm blocks of a tensor

  FASTADAM_INLINE int phases() const {
    int levels = 0;
    for (int64_t width = 1; width < most_blocks; width *= 2) ++levels;
    return levels;
  }

  FASTADAM_INLINE void phase(int level, int64_t tensor, int64_t thread, Shared&) const {
    double* values = sums + block_offsets[tensor];
    const int64_t count = block_offsets[tensor + 1] - block_offsets[tensor];
    const int64_t step = int64_t{1} << level;
    for (int64_t i = thread * 2 * step; i + step < count; i += kThreads * 2 * step) values[i] += values[i + step];
  }
};

// Copies the sums of the tensors to a contiguous array.
struct ListSums {
  static constexpr int kThreads = 256;
  using Shared = NoShared;
  const int64_t* block_offsets;
  const double* sums;  // after SumBlocks
  int64_t tensor_count;
  double* result;

  FASTADAM_INLINE int phases() const { return 1; }

  FASTADAM_INLINE void phase(int, int64_t, int64_t thread, Shared&) const {
    for (int64_t t = thread; t < tensor_count; t += kThreads) {
      const bool is_empty = block_offsets[t] == block_offsets[t + 1];
      result[t] = is_empty ? 0.0 : sums[block_offsets[t]];
    }
  }
};

// Skips the step if an element of any gradient is not finite, or a norm that is clipped.
struct CheckFinite {
  static constexpr int kThreads = 256;
  struct Shared {
    bool not_finite[kThreads];
  };
  StepState* state;
  Report* report;
  const int64_t* block_offsets;
  const double* sums;  // after SumBlocks
  int64_t tensor_count;
  bool is_step;           // otherwise an accumulation, which does not count in t
  const Factor* factors;  // with norm clipping: what ClipFactors wrote; or null
  const double* squares;

  FASTADAM_INLINE int phases() const { return 2; }

  FASTADAM_INLINE void phase(int phase, int64_t, int64_t thread, Shared& shared) const {
    if (phase == 0) {
      shared.not_finite[thread] = false;
      for (int64_t t = thread; t < tensor_count; t += kThreads) {
        const bool is_empty = block_offsets[t] == block_offsets[t + 1];
        const bool is_element = !is_empty && is_nan(sums[block_offsets[t]]);
        const bool is_norm = factors != nullptr && (is_nan(factors[t].value) || is_nan(squares[t]));
        if (is_element || is_norm) shared.not_finite[thread] = true;
      }
    } else if (thread == 0) {
      bool not_finite = false;
      for (int i = 0; i < kThreads; ++i) not_finite = not_finite || shared.not_finite[i];
      report->not_finite = not_finite ? 1 : 0;
      if (not_finite && is_step && !state->skip) --state->step;
      if (not_finite) state->skip = true;
    }
  }

 private:
  static FASTADAM_INLINE bool is_nan(double x) { return x != x; }
};

// Computes the factor of each gradient with norm clipping, like Norms::clip in csrc/capi/norms.h. A norm that is not
// finite makes a factor or a square NaN.
struct ClipFactors {
  static constexpr int kThreads = 256;
  using Shared = NoShared;
  const StepState* state;
  const Gradient* gradients;
  const int64_t* block_offsets;
  const double* sums;
  int64_t tensor_count;
  double clip_norm;
  double global_clip_norm;
  double gradient_scale;
  Factor* factors;
  double* squares;         // memory for the squares of the clipped norms
  const double* rescaled;  // what a second pass of SumSquares has summed; or null

  FASTADAM_INLINE int phases() const { return 3; }

  FASTADAM_INLINE void phase(int phase, int64_t, int64_t thread, Shared&) const {
    const bool is_global = global_clip_norm < __builtin_huge_val();
    if (phase == 0) {
      for (int64_t t = thread; t < tensor_count; t += kThreads) clip(t);
    } else if (phase == 1 && is_global && thread == 0) {
      squares[0] = global_norm();
    } else if (phase == 2 && is_global) {
      const Factor factor = global_clip_factor(squares[0], global_clip_norm);
      for (int64_t t = thread; t < tensor_count; t += kThreads) factors[t] = factors[t] * factor;
    }
  }

 private:
  FASTADAM_INLINE void clip(int64_t t) const {
    const NormClip clipped = clip_of(t);
    factors[t] = clipped.factor;
    squares[t] = clipped.square;
  }

  FASTADAM_INLINE NormClip clip_of(int64_t t) const {
    return clip_gradient(norm(t), factor_of(gradients[t], *state), clip_norm);
  }

  FASTADAM_INLINE double norm(int64_t t) const {
    const double scale = gradient_scale * state->unscale;
    if (block_offsets[t] == block_offsets[t + 1]) return 0;
    const double sum = sums[block_offsets[t]];
    const double unit = rescaled == nullptr ? 1 : unit_of(gradients[t], sum);
    return norm_of(unit == 1 ? sum : rescaled[block_offsets[t]], scale, unit);
  }

  FASTADAM_INLINE double global_norm() const {
    return joint_norm(
        tensor_count, [this](int64_t t) { return squares[t]; }, [this](int64_t t) { return clip_of(t).norm; });
  }
};

}  // namespace fastadam::cuda
