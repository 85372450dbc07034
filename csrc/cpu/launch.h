// SPDX-License-Identifier: Apache-2.0
// Runs a checked step on the CPU. Called by the binding without the GIL.
#pragma once

#include "../core/step_args.h"

namespace fastadam::cpu {

// Sorts the indices of IndexedSlices; writes nothing but what `args` points to.
void index_rows(IndexArgs& args);

// One parallel job for the whole step, equal shares of elements per thread; small steps stay on the caller's thread.
void run_step(const StepArgs& step);

// The same for gradients that are only added up.
void run_accumulate(const AccumulateArgs& args);

// Fills args.sums.
void run_norm(const NormArgs& args);

// Likewise.
void run_sum_rows(const SumArgs& args);

// 0: the default, the CPUs this process may run on.
void set_num_threads(int count);
int requested_threads();  // as last set
int num_threads();        // in force

}  // namespace fastadam::cpu
