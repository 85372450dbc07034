// SPDX-License-Identifier: Apache-2.0
// The table of kernels that kernels.cpp defines once per ISA, in namespace fastadam::cpu::<isa>.
#pragma once

#include <cstdint>

#include "../core/step_args.h"

namespace fastadam::cpu {

// Updates elements [begin, end) of one variable; of the rows that it touches, one after the other, if only these move.
// Never checks, allocates, prints or throws.
using UpdateKernel = void (*)(const StepArgs& step, const TensorArgs& tensor, int64_t begin, int64_t end);

// Sum of squares of `size` elements of a gradient from `begin` on, at most kNormBlock of them.
using NormKernel = double (*)(const void* grad, int64_t begin, int64_t size, double clip_value);

// Moves the average of elements [begin, end) towards the variable; with step.ema_overwrite the variable becomes it.
using AverageKernel = UpdateKernel;

// Adds elements [begin, end) of a gradient to the accumulator; `restart`: to zeros instead.
using AccumulateKernel = void (*)(const TensorArgs& tensor, int64_t begin, int64_t end, bool restart);

// Writes elements [begin, end) of the sums of the touched rows, laid end to end from `sums` on, in the state dtype.
using SumKernel = void (*)(const TensorArgs& tensor, int64_t begin, int64_t end, void* sums);

// By the dtype of the variable, or of the gradient where it says so.
struct Kernels {
  UpdateKernel dense[kDTypeCount];
  UpdateKernel all_rows[kDTypeCount];      // IndexedSlices, TF's rule: every row moves
  UpdateKernel touched_rows[kDTypeCount];  // only the rows that are touched, after the steps that they missed
  NormKernel norm[kDTypeCount][2];         // [gradient's dtype][require_finite]
  AverageKernel average[kDTypeCount];
  AccumulateKernel accumulate[kDTypeCount];  // [gradient's dtype]
  SumKernel sum_rows[kDTypeCount];           // [gradient's dtype]
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
