// SPDX-License-Identifier: Apache-2.0
// The table of kernels that kernels.cpp defines once per ISA, in namespace fastadam::cpu::<isa>.
#pragma once

#include <cstdint>

#include "../core/step_args.h"

namespace fastadam::cpu {

// Updates elements [begin, end) of one variable. Never checks, allocates, prints or throws.
using DenseKernel = void (*)(const StepArgs& step, const TensorArgs& tensor, int64_t begin, int64_t end);

// Sum of squares of `size` elements of a gradient from `begin` on, at most kNormBlock of them.
using NormKernel = double (*)(const void* grad, int64_t begin, int64_t size, double clip_value);

// Moves the average of elements [begin, end) towards the variable; with step.ema_overwrite the variable becomes it.
using AverageKernel = DenseKernel;

struct Kernels {
  DenseKernel dense[kDTypeCount][2][2];  // [dtype][amsgrad][transform]
  NormKernel norm[kDTypeCount];
  AverageKernel average[kDTypeCount];
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
