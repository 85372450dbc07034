// SPDX-License-Identifier: Apache-2.0
// The table of kernels. kernels.cpp defines it once per instruction set, in namespace fastadam::cpu::<isa>.
#pragma once

#include <cstdint>

#include "../core/step_args.h"
#include "../core/telemetry.h"

namespace fastadam::cpu {

// Updates elements [begin, end) of one variable. A kernel that updates only the rows of a gradient counts the elements
// of these rows, one row after another. Kernels never check, allocate, print or throw.
using UpdateKernel = void (*)(const StepArgs& step, const TensorArgs& tensor, int64_t begin, int64_t end);

// Returns the sum of squares of `size` elements of a gradient, at most kNormBlock, starting at `begin`.
using NormKernel = double (*)(const void* grad, int64_t begin, int64_t size, double clip_value);

// The same of elements that are multiplied by `unit` after the clip.
using RescaledNormKernel = double (*)(const void* grad, int64_t begin, int64_t size, double clip_value, double unit);

// Moves the average of elements [begin, end) towards the variable, then copies it there if step.ema_overwrite is set.
using AverageKernel = UpdateKernel;

// Rounds elements [begin, end) of a float32 variable to its copy.
using CopyKernel = UpdateKernel;

// Like a dense UpdateKernel for one tile, which it also measures.
using MeasuredKernel = TileMeasure (*)(const StepArgs& step, const TensorArgs& tensor, int64_t begin, int64_t end);

// Whether the gradient of one tile is the one that was logged.
using CheckKernel = bool (*)(const StepArgs& step, const TensorArgs& tensor, int64_t begin, int64_t end, int64_t place);

// Makes or undoes the logged step of one tile of a float32 variable; `place`: of the tile in the log.
using LoggedKernel = void (*)(const StepArgs& step, const TensorArgs& tensor, int64_t begin, int64_t end,
                              int64_t place);

// Adds a gradient to elements [begin, end) of the accumulator. `restart`: the accumulator counts as zero.
using AccumulateKernel = void (*)(const TensorArgs& tensor, int64_t begin, int64_t end, bool restart);

// Writes elements [begin, end) of the row sums to `sums`, which stores them row after row in the state dtype.
using SumKernel = void (*)(const TensorArgs& tensor, int64_t begin, int64_t end, void* sums);

// Indexed by the dtype of the variable, except where a comment says otherwise.
struct Kernels {
  UpdateKernel dense[kDTypeCount];
  UpdateKernel small[kDTypeCount];         // dense, with arrays as in small_state.h; null for float64
  UpdateKernel all_rows[kDTypeCount];      // IndexedSlices, TF's rule: updates every row
  UpdateKernel touched_rows[kDTypeCount];  // updates only the rows of the gradient, first by the steps that they missed
  NormKernel norm[kDTypeCount][2];         // [dtype of the gradient][require_finite]
  RescaledNormKernel rescaled_norm;        // of a float64 gradient
  AverageKernel average[kDTypeCount];
  CopyKernel copy[kDTypeCount];  // [dtype of the copy]; null for float64
  MeasuredKernel measured[kDTypeCount];
  LoggedKernel logged;
  LoggedKernel undo;
  CheckKernel has_logged_gradient;
  AccumulateKernel accumulate[kDTypeCount];  // [dtype of the gradient]
  SumKernel sum_rows[kDTypeCount];           // [dtype of the gradient]
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
