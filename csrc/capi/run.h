// SPDX-License-Identifier: Apache-2.0
// Steps on the CPU whose arguments are already checked. The entry points of fastadam.h call these after their checks;
// the Python extensions call them directly, so they are exported, but they are not part of the C interface: only
// callers from the same build may use them. They may throw std::bad_alloc, before anything is written.
#pragma once

#include "../core/step_args.h"
#include "clipping.h"

namespace fastadam {

// The norms that a step with these numbers clips, of gradients whose values are clipped; squares are NaN where
// hyper.require_finite is set and an element is not finite.
FASTADAM_API GradientNorms run_norms(const TensorArgs* tensors, int64_t tensor_count, const AdamHyper& hyper);

// Norms, clipping and the step of args.chains, whose gradients belong to `tensor_count` tensors. Returns false, with
// nothing written, if hyper.require_finite is set and a gradient, or a norm that is to be clipped, is not finite. With
// args.factors, which then come from the caller, norms are not read and nothing is required.
FASTADAM_API bool run_step(StepArgs args, int64_t tensor_count, const AdamHyper& hyper);

// Finds the tiles whose gradients have changed since run_step() made a step with these arguments and args.log.
FASTADAM_API void run_check(const StepArgs& args);

// Undoes that step; gradients must be as they were. If `instead` is not null, makes that step in its place: one of the
// same variables, without telemetry or a log, whose factors are known.
FASTADAM_API void run_undo(const StepArgs& args, const StepArgs* instead);

// The most threads that calls from this thread use; 0: as many as all others. Returns what it was.
FASTADAM_API int set_thread_budget(int threads);

// Has the variables of `chains` with telemetry report a step that is not made. Call it instead of run_step if the
// gradients had to be finite and the caller has found that they are not.
FASTADAM_API void report_skip(const Chains& chains, const AdamHyper& hyper);

// Brings the rows of args.chains, whose tensors have no gradients, up to date.
FASTADAM_API void run_catch_up(const StepArgs& args);

// Adds the gradients to the accumulators. Returns false, with nothing written, if `require_finite` is set and a
// gradient is not finite.
FASTADAM_API bool run_accumulate(const AccumulateArgs& args, int64_t tensor_count, bool require_finite);

// Sums the repeated rows of each tensor for which sums[i] is not null.
FASTADAM_API void run_sum_rows(const TensorArgs* tensors, int64_t tensor_count, void* const* sums);

}  // namespace fastadam
