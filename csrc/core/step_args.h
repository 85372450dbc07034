// SPDX-License-Identifier: Apache-2.0
// What a launch is given: plain pointers and scalars, checked by the binding, owned by the caller.
#pragma once

#include <cstdint>

#include "closed_form.h"
#include "dtypes.h"
#include "step_scalars.h"

namespace fastadam {

// What IndexedSlices touch: unique rows in ascending order, and where the values of each lie, in order of occurrence.
struct Rows {
  const int64_t* rows;
  const int64_t* starts;  // starts[k]: first occurrence of rows[k] in `order`; starts[count]: all of them
  const int64_t* order;   // places among the values
  int64_t count;
  int64_t width;  // elements of a row
};

// A table whose rows wait: each has had only the first `from` of the steps in its history. They are replayed.
struct StaleRows {
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
constexpr int64_t kPeakSteps = 64;

struct TensorArgs {
  void* var;
  const void* grad;  // dense, or the values of IndexedSlices; null: stale rows are only brought up to date
  void* m;
  void* v;
  void* vhat;  // null without AMSGrad
  int64_t size;
  int64_t next;        // the next gradient of the same variable, applied after this one; -1: none
  double grad_factor;  // multiplies the gradient after the value clip
  DType dtype;
  DType grad_dtype;        // dtype, or its state dtype
  bool decays;             // weight decay applies
  bool half_slots;         // m, v and vhat of a half variable have its dtype, as must its gradients, which are dense
  void* average;           // moving average of the variable, of its state dtype, or null
  void* accumulator;       // sum of gradients, of the state dtype, or null
  const Rows* rows;        // of IndexedSlices, or null
  const StaleRows* stale;  // of a table in a deferred mode, unless its gradient is dense
  int64_t grad_size;       // elements of `grad`
};

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
  bool lazy;  // IndexedSlices leave the rows alone that they do not touch
};

}  // namespace fastadam
