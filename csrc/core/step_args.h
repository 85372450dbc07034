// SPDX-License-Identifier: Apache-2.0
// Arguments of the kernels: plain pointers and scalars. The caller owns the memory and has checked everything.
#pragma once

#include <cstdint>

#include "closed_form.h"
#include "dtypes.h"
#include "factor.h"
#include "step_scalars.h"

namespace fastadam {

using Rows = fastadam_rows;
using TensorArgs = fastadam_tensor;

}  // namespace fastadam

// A deferred table. Steps count from the last one that every row has had. Each row has had `from` - `synced` of them,
// or none if that is negative; the others are applied now.
struct fastadam_stale_rows {
  using ClosedForm = fastadam::ClosedForm;
  const void* alphas;   // row_alpha of each step, or alpha with `dense`, in the compute type of the variable
  const void* keeps;    // the weight-decay factor of each step
  const void* peaks;    // the largest |alpha| of each group of kPeakSteps steps
  const int32_t* from;  // of rows[k], or of row k if the tensor has no `rows`
  int64_t now;          // the number of steps in the history
  int64_t width;        // the number of elements in a row
  bool may_stop;        // a row at rest need not be replayed further: see StaleTable in csrc/bind/stale.h
  // forms[places[from]] is the closed form of a gap longer than kShortGap. Null if every step is replayed.
  const ClosedForm* forms = nullptr;
  const int32_t* places = nullptr;
  int64_t synced = 0;
  // The steps change nothing where all moments are +0: none decays weights, and no rate is negative or infinite.
  bool leaves_zeros = false;
  // By row: one without kMoves has moments of +0 and is left as it is, not even read. Null if every row is replayed.
  const uint8_t* flags = nullptr;
  bool moves_all = false;  // no row is behind, and the step moves every row that has kMoves in `flags`
  bool dense = false;      // the steps followed the rule for dense gradients, which were 0 in these rows
};

namespace fastadam {

using StaleRows = fastadam_stale_rows;
constexpr int64_t kPeakSteps = 64;

// Flags of a row.
constexpr uint8_t kMoves = 1;    // its moments may be other than +0
constexpr uint8_t kChanged = 2;  // it had a gradient since Python cleared this

// Whether the steps of a gradient, or catching up, move only some rows.
FASTADAM_INLINE bool moves_rows_alone(const TensorArgs& tensor, bool lazy) {
  return tensor.stale != nullptr ? !tensor.stale->moves_all : lazy && tensor.rows != nullptr;
}

struct TileMeasure;
struct StepLog;

FASTADAM_INLINE bool has_half_moments(const TensorArgs& tensor) { return tensor.moments == FASTADAM_MOMENTS_HALF; }

// Whether arrays of a variable are stored as in small_state.h.
FASTADAM_INLINE bool is_small(const TensorArgs& tensor) {
  return tensor.moments > FASTADAM_MOMENTS_HALF || tensor.low != nullptr || tensor.stochastic;
}

// Whether the gradient of the rows is in the accumulator, at the place of each row. They are then updated as by a dense
// gradient.
FASTADAM_INLINE bool is_accumulated(const TensorArgs& tensor) {
  return tensor.rows != nullptr && tensor.grad != nullptr && tensor.grad == tensor.accumulator;
}

// All gradients of a step, grouped by variable: TensorArgs::next chains the gradients of one variable.
struct Chains {
  const TensorArgs* tensors;
  const int64_t* heads;    // tensors[heads[k]]: the first gradient of variable k
  const int64_t* offsets;  // offsets[k]: elements before variable k; offsets[count]: the total
  int64_t count;           // of variables
};

// Indices to be sorted into Rows, and the memory for that: `count` elements per array, one more in both arrays of keys.
struct IndexArgs {
  const void* indices;
  bool is_int64;  // otherwise int32
  int64_t count;
  int64_t row_count;  // of the variable
  int64_t* keys;      // receives the unique rows
  int64_t* order;
  int64_t* spare_keys;  // receives `starts`. Sorting swaps the spare arrays with the other two
  int64_t* spare_order;
  int64_t unique;  // result: the number of unique rows
  int64_t bad;     // result: the position of the first index outside [0, row_count), or -1
};

// Sums the repeated rows of IndexedSlices. The sums of a tensor are stored contiguously, row after row.
struct SumArgs {
  const TensorArgs* tensors;
  const int64_t* offsets;  // offsets[i]: elements of sums before tensor i; offsets[tensor_count]: the total
  int64_t tensor_count;
  int64_t value_count;  // the number of elements to add
  void* const* sums;    // sums[i]: receives the sums of tensor i, in the state dtype
};

// Computes sums of squares of the gradients, block by block (norm.h).
struct NormArgs {
  const TensorArgs* tensors;
  const int64_t* block_offsets;  // block_offsets[i]: blocks before tensor i; block_offsets[tensor_count]: the total
  int64_t tensor_count;
  double clip_value;    // applied before squaring
  bool require_finite;  // the sum of a block is NaN if an element is not finite before clipping
  double* sums;         // receives one sum per block
  const double* units;  // units[i] multiplies the elements of tensor i, all float64; require_finite is ignored; or null
};

// Adds gradients times grad_factor to the accumulators.
struct AccumulateArgs {
  Chains chains;
  bool restart;  // the accumulators count as zero
};

// What is done to a gradient before the update. Dense kernels have a loop for each, row kernels only for the first two.
enum Transform : int { kAsItIs, kClipAndFactor, kAndL2 };
constexpr int kTransformCount = 3;

struct StepArgs {
  Chains chains;
  StepScalars<float> scalars_f32;
  StepScalars<double> scalars_f64;
  bool amsgrad;
  int transform;  // a Transform
  bool prefetch;  // the arrays of the step do not fit in cache
  bool ema_overwrite;
  bool zero_gradients;
  bool lazy;                       // IndexedSlices update only the rows that they name
  TileMeasure* measures;           // of the tiles of variables with telemetry
  double telemetry_unit;           // a power of two: what is added to a variable is measured times this
  const int64_t* measure_offsets;  // measures[measure_offsets[k]]: the first tile of variable k
  const StepLog* log;              // receives what undoes the step, or null
  uint64_t seed;
  int64_t number;         // of the step
  const Factor* factors;  // with norm clipping: the factor of each tensor, which replaces its grad_factor; or null
};

}  // namespace fastadam
