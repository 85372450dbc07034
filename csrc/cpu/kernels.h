// SPDX-License-Identifier: Apache-2.0
// The table of kernels that kernels.cpp defines once per ISA, in namespace fastadam::cpu::<isa>.
#pragma once

#include <cstdint>

#include "../core/step_args.h"

namespace fastadam::cpu {

// Updates elements [begin, end) of one variable; of the rows that it touches, one after the other, if only these move.
// Never checks, allocates, prints or throws.
using UpdateKernel = void (*)(const StepArgs& step, const TensorArgs& tensor, int64_t begin, int64_t end);

// Of one combination of dtypes: [amsgrad][transform], for dense gradients and for rows.
struct DenseKernels {
  UpdateKernel of[2][kTransformCount];
};
struct UpdateKernels {
  UpdateKernel of[2][2];
};

// Sum of squares of `size` elements of a gradient from `begin` on, at most kNormBlock of them.
using NormKernel = double (*)(const void* grad, int64_t begin, int64_t size, double clip_value);

// Moves the average of elements [begin, end) towards the variable; with step.ema_overwrite the variable becomes it.
using AverageKernel = UpdateKernel;

// Adds elements [begin, end) of a gradient to the accumulator; `restart`: to zeros instead.
using AccumulateKernel = void (*)(const TensorArgs& tensor, int64_t begin, int64_t end, bool restart);

// Writes elements [begin, end) of the sums of the touched rows, laid end to end from `sums` on, in the state dtype.
using SumKernel = void (*)(const TensorArgs& tensor, int64_t begin, int64_t end, void* sums);

// The dtypes, then the half types with gradients of their state dtype.
constexpr int kPairCount = kDTypeCount + 2;
inline int pair_of(const TensorArgs& tensor) {
  return static_cast<int>(tensor.dtype) + (tensor.grad_dtype == tensor.dtype ? 0 : kDTypeCount);
}

// These, then the half types with slots, and gradients, of their own dtype.
constexpr int kDensePairCount = kPairCount + 2;
inline int dense_pair_of(const TensorArgs& tensor) {
  return tensor.half_slots ? kPairCount + static_cast<int>(tensor.dtype) : pair_of(tensor);
}

struct Kernels {
  DenseKernels dense[kDensePairCount];
  UpdateKernels all_rows[kPairCount];      // IndexedSlices, TF's rule: every row moves
  UpdateKernels touched_rows[kPairCount];  // only the rows that are touched, after the steps that they missed
  NormKernel norm[kDTypeCount][2];         // [gradient's dtype][require_finite]
  AverageKernel average[kDTypeCount];
  AccumulateKernel accumulate[kPairCount];
  SumKernel sum_rows[kDTypeCount];  // [gradient's dtype]
};

namespace baseline {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace neon {
extern const Kernels kernels;
}

}  // namespace fastadam::cpu
