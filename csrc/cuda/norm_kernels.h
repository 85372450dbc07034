// SPDX-License-Identifier: Apache-2.0
// The kernels for norms, clip factors and the finite check. The rules of dense_kernels.h apply.
#pragma once

#include "dense_kernels.h"

namespace fastadam::cuda {

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
  // Null in the first pass. In the second pass the sums of the first: only float64 gradients whose sum is not finite
  // are read again, multiplied by kNormUnit; all other sums are 0.
  const double* overflowed;

  FASTADAM_INLINE int phases() const { return 2; }

  FASTADAM_INLINE void phase(int phase, int64_t block, int64_t thread, Shared& shared) const {
    const int64_t warp = thread / kNormLanes;
    const int64_t lane = thread % kNormLanes;
    const int64_t i = block * kWarps + warp;
    if (i >= block_offsets[tensor_count]) return;
    if (phase == 0) {
      shared.lanes[warp][lane] = is_wanted(i) ? sum_lane(i, lane) : 0.0;
    } else if (lane == 0) {
      sums[i] = pairwise_sum(shared.lanes[warp], kNormLanes);
    }
  }

 private:
  FASTADAM_INLINE bool is_wanted(int64_t i) const {
    if (overflowed == nullptr) return true;
    const int64_t t = find_variable(block_offsets, tensor_count, i);
    return gradients[t].dtype == FASTADAM_FLOAT64 && !is_finite(overflowed[block_offsets[t]]);
  }

  FASTADAM_INLINE double sum_lane(int64_t i, int64_t lane) const {
    const int64_t t = find_variable(block_offsets, tensor_count, i);
    const int64_t begin = (i - block_offsets[t]) * kNormBlock;
    const int64_t left = gradients[t].size - begin;
    const int64_t size = left < kNormBlock ? left : kNormBlock;
    const void* grad = gradients[t].data;
    switch (gradients[t].dtype) {
      case FASTADAM_FLOAT16:
        return sum<Float16>(static_cast<const Float16*>(grad) + begin, size, lane);
      case FASTADAM_BFLOAT16:
        return sum<BFloat16>(static_cast<const BFloat16*>(grad) + begin, size, lane);
      case FASTADAM_FLOAT32:
        return sum<float>(static_cast<const float*>(grad) + begin, size, lane);
      default:
        return sum<double>(static_cast<const double*>(grad) + begin, size, lane);
    }
  }

  template <class Storage>
  FASTADAM_INLINE double sum(const Storage* grad, int64_t size, int64_t lane) const {
    using T = Compute<Storage>;
    double total = 0;
    const T raw_clip = state == nullptr ? static_cast<T>(clip_value) : scalars_of<T>(*state).clip_value;
    // float32 does not represent the unit: beside a sum that overflows in float64 these gradients count as zero.
    const T unit = overflowed == nullptr ? T(1) : T(sizeof(T) == sizeof(double) ? kNormUnit : 0.0);
    T not_finite = T(0);  // becomes NaN if an element is not finite
    for (int64_t at = lane; at < size; at += kNormLanes) {
      const T g = load(grad[at]);
      if (require_finite) not_finite += g - g;
      const auto x = static_cast<double>(transform_gradient(g, raw_clip, unit));
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
  const double* factors;  // with norm clipping: what ClipFactors wrote; or null
  const double* squares;

  FASTADAM_INLINE int phases() const { return 2; }

  FASTADAM_INLINE void phase(int phase, int64_t, int64_t thread, Shared& shared) const {
    if (phase == 0) {
      shared.not_finite[thread] = false;
      for (int64_t t = thread; t < tensor_count; t += kThreads) {
        const bool is_empty = block_offsets[t] == block_offsets[t + 1];
        const bool is_element = !is_empty && is_nan(sums[block_offsets[t]]);
        const bool is_norm = factors != nullptr && (is_nan(factors[t]) || is_nan(squares[t]));
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
  double* factors;
  double* squares;         // memory for the squares of the clipped norms
  const double* rescaled;  // sums of float64 gradients whose sum is not finite, of elements times kNormUnit; or null

  FASTADAM_INLINE int phases() const { return 3; }

  FASTADAM_INLINE void phase(int phase, int64_t, int64_t thread, Shared&) const {
    const bool is_global = global_clip_norm < __builtin_huge_val();
    if (phase == 0) {
      for (int64_t t = thread; t < tensor_count; t += kThreads) clip(t);
    } else if (phase == 1 && is_global && thread == 0) {
      squares[0] = global_factor();
    } else if (phase == 2 && is_global) {
      for (int64_t t = thread; t < tensor_count; t += kThreads) factors[t] *= squares[0];
    }
  }

 private:
  FASTADAM_INLINE void clip(int64_t t) const {
    const NormClip clipped = clip_of(t);
    factors[t] = clipped.factor;
    squares[t] = clipped.square;
  }

  FASTADAM_INLINE NormClip clip_of(int64_t t) const {
    return clip_gradient(norm(t), gradients[t].factor * state->unscale, clip_norm);
  }

  FASTADAM_INLINE double norm(int64_t t) const {
    const double scale = gradient_scale * state->unscale;
    if (block_offsets[t] == block_offsets[t + 1]) return 0;
    const double sum = sums[block_offsets[t]];
    const bool is_rescaled = rescaled != nullptr && gradients[t].dtype == FASTADAM_FLOAT64 && !is_finite(sum);
    return is_rescaled ? norm_of_rescaled(rescaled[block_offsets[t]], scale) : norm_of(sum, scale);
  }

  FASTADAM_INLINE double global_factor() const {
    const double norm = joint_norm(
        tensor_count, [this](int64_t t) { return squares[t]; }, [this](int64_t t) { return clip_of(t).norm; });
    return global_clip_factor(norm, global_clip_norm);
  }
};

}  // namespace fastadam::cuda
