// SPDX-License-Identifier: Apache-2.0
// What a launch is given: plain pointers and scalars, checked by the binding, owned by the caller.
#pragma once

#include <cstdint>

#include "closed_form.h"
#include "dtypes.h"
#include "step_scalars.h"

namespace fastadam {

using Rows = fastadam_rows;
using TensorArgs = fastadam_tensor;

}  // namespace fastadam

// A table whose rows wait: each has had only the first `from` of the steps in its history. They are replayed.
struct fastadam_stale_rows {
  using ClosedForm = fastadam::ClosedForm;
  const void* alphas;   // row_alpha of each step, in the compute type of the variable
  const void* keeps;    // its factor of weight decay
  const void* peaks;    // the largest |alpha| of every kPeakSteps steps
  const int32_t* from;  // of rows[k], or of row k if there are no `rows`
  int64_t now;          // steps in the history
  int64_t width;        // elements of a row
  bool may_stop;        // a row that has come to rest moves no more: see StaleTable in csrc/bind/stale.h
  // forms[places[from]]: of a gap longer than kShortGap; null if every step is replayed.
  const ClosedForm* forms = nullptr;
  const int32_t* places = nullptr;
};

namespace fastadam {

using StaleRows = fastadam_stale_rows;
constexpr int64_t kPeakSteps = 64;

// All gradients of a step: those of one variable are chained.
struct Chains {
  const TensorArgs* tensors;
  const int64_t* heads;    // tensors[heads[k]]: the first gradient of variable k
  const int64_t* offsets;  // offsets[k]: elements before variable k; offsets[count]: all of them
  int64_t count;
};

// Indices to be sorted into Rows, with the memory for it: `count` elements each, the two arrays of keys one more.
struct IndexArgs {
  const void* indices;
  bool is_int64;  // else int32
  int64_t count;
  int64_t row_count;  // of the variable
  int64_t* keys;      // becomes the unique rows
  int64_t* order;
  int64_t* spare_keys;  // becomes `starts`; the arrays change places while they are sorted
  int64_t* spare_order;
  int64_t unique;  // result
  int64_t bad;     // result: the first index outside [0, row_count), or -1
};

// Sums of the rows that IndexedSlices touch, laid end to end.
struct SumArgs {
  const TensorArgs* tensors;
  const int64_t* offsets;  // offsets[i]: sums before those of tensor i, which may have none; offsets[tensor_count]: all
  int64_t tensor_count;
  int64_t value_count;  // elements that are added up
  void* const* sums;    // sums[i]: of tensor i, of the state dtype
};

// Sums of squares of the gradients, block by block (norm.h).
struct NormArgs {
  const TensorArgs* tensors;
  const int64_t* block_offsets;  // block_offsets[i]: blocks before tensor i; block_offsets[tensor_count]: all of them
  int64_t tensor_count;
  double clip_value;    // applied first
  bool require_finite;  // a block with an element that is not finite, before it is clipped, gives NaN
  double* sums;         // one for each block
};

// Adds gradients, times grad_factor, to the accumulators.
struct AccumulateArgs {
  Chains chains;
  bool restart;  // the accumulators count as zero
};

// What is done to gradients first: the dense kernels have a loop for each, those of rows for the first two.
enum Transform : int { kAsItIs, kClipAndFactor, kAndL2 };
constexpr int kTransformCount = 3;

struct StepArgs {
  Chains chains;
  StepScalars<float> scalars_f32;
  StepScalars<double> scalars_f64;
  bool amsgrad;
  int transform;  // a Transform
  bool prefetch;  // the step does not fit in cache
  bool ema_overwrite;
  bool lazy;              // IndexedSlices leave the rows alone that they do not touch
  const double* factors;  // of norm clips, one for each tensor, in the place of its grad_factor; or null
};

}  // namespace fastadam
