// SPDX-License-Identifier: Apache-2.0
// Runs steps on the CPU, with arguments that are already checked. The bindings call these functions without the GIL.
#pragma once

#include "../core/step_args.h"

namespace fastadam::cpu {

// Sorts the indices of IndexedSlices. Writes only to memory that `args` points to.
void index_rows(IndexArgs& args);

// Runs the whole step as one parallel job, with an equal share of the elements for each thread. A small step stays on
// the caller's thread.
void run_step(const StepArgs& step);

// Sets TileLog::is_changed in step.log, for a step with these arguments that filled it.
void run_check(const StepArgs& step);

// Undoes a step that filled step.log, whose arguments these are; its gradients must be as they were. If `instead` is
// not null, makes that step of the same variables in its place, while they are in cache.
void run_undo(const StepArgs& step, const StepArgs* instead);

void run_accumulate(const AccumulateArgs& args);

// Writes args.sums.
void run_norm(const NormArgs& args);
void run_sum_rows(const SumArgs& args);

// 0 restores the default, which is the number of CPUs that this process may run on.
void set_num_threads(int count);
int set_thread_budget(int threads);
int requested_threads();  // the number last set
int num_threads();        // the number in use

}  // namespace fastadam::cpu
