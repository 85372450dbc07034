/* SPDX-License-Identifier: Apache-2.0
 *
 * The C interface of fastadam for CUDA devices: the structs and rules of fastadam.h, with pointers to memory of one
 * device (or managed memory), and a cudaStream_t on which the work is put. Results have the bits of fastadam_step.
 *
 *   cc program.c $(python -m fastadam --include) $(python -m fastadam --libs) -lfastadam_cuda
 *
 * The library brings the CUDA runtime with it and links no driver: without one it loads, and there are no devices.
 * Calls check before they launch: one that returns FASTADAM_INVALID or FASTADAM_NOT_FINITE has changed nothing. After
 * FASTADAM_CUDA_ERROR a part may have been launched. The calling thread's device is afterwards what it was.
 */
#ifndef FASTADAM_CUDA_H
#define FASTADAM_CUDA_H

#include "fastadam.h"

/* What a list needs on its device from step to step. One thread at a time may use it. */
typedef struct fastadam_cuda_plan fastadam_cuda_plan;

#if defined(__cplusplus)
extern "C" {
#endif

/* Devices that can be used. If there is none, fastadam_cuda_error() says why. */
FASTADAM_API int32_t fastadam_cuda_device_count(void);

/* A plan for these variables, their slots and their options, which must stay where and what they are until it is
 * destroyed. Gradients are not read, nor is list->offsets. `stale` must be null. Allocates, on the legacy stream. */
FASTADAM_API fastadam_status fastadam_cuda_plan_create(int32_t device, const fastadam_list* list,
                                                       fastadam_cuda_plan** plan);

/* Frees it, which waits for the device. Null is permitted. */
FASTADAM_API fastadam_status fastadam_cuda_plan_destroy(fastadam_cuda_plan* plan);

/* Sorts indices on the device, int32 or int64, for tensors[place], into rows of the plan: for that tensor's `rows` (and
 * fastadam_sparse), until the next sort for it. Their `count` is that of the indices; only the device can read their
 * arrays. An index outside [0, row_count) is found there: see fastadam_cuda_wait. */
FASTADAM_API fastadam_status fastadam_cuda_sort_rows(fastadam_cuda_plan* plan, int64_t place, const void* indices,
                                                     bool is_int64, int64_t count, int64_t row_count, int64_t width,
                                                     void* stream, const fastadam_rows** rows);

/* The sums of repeated rows of `values`, one row for each index, in order of occurrence and in memory of the plan:
 * float32, or float64 for float64 values. From here on the rows of `place` are those of the sums, whose grad_size is
 * rows->count * rows->width; the sums behind the last row are zero. */
FASTADAM_API fastadam_status fastadam_cuda_sum_rows(fastadam_cuda_plan* plan, int64_t place, const void* values,
                                                    fastadam_dtype dtype, void* stream, void** sums);

/* One step, as fastadam_step. `list` is that of the plan; gradients, their factors and `rows` may be new. Gradients
 * must not change until the stream has come past it. Waits for the stream only with hyper->require_finite, and
 * allocates only where a list has other sparse gradients or sizes than before. Work of one plan on several streams
 * stays in order.
 *
 * In a CUDA graph, after one like it was made: each replay is the step after the last one, whatever hyper->step, with
 * the betas of the plan's first step. A plan that was captured is for its graph alone; require_finite is refused. */
FASTADAM_API fastadam_status fastadam_cuda_step(fastadam_cuda_plan* plan, const fastadam_list* list,
                                                const fastadam_hyper* hyper, bool lazy, void* stream);

/* As fastadam_accumulate. Waits only with `require_finite`. Not to be captured. */
FASTADAM_API fastadam_status fastadam_cuda_accumulate(fastadam_cuda_plan* plan, const fastadam_list* list, bool restart,
                                                      bool require_finite, void* stream);

/* As fastadam_sum_squares, into memory of the device. */
FASTADAM_API fastadam_status fastadam_cuda_sum_squares(fastadam_cuda_plan* plan, const fastadam_list* list,
                                                       double* sums, void* stream);

/* Waits for the device. FASTADAM_INVALID if an index was no row: from the first step or accumulation with it on,
 * nothing was changed. `*step`, if `step` is not null: hyper->step of the last step before that, or 0 with FASTADAM_OK.
 * After this call the plan may be used again; before it, calls with a list return FASTADAM_INVALID too once they find
 * it. */
FASTADAM_API fastadam_status fastadam_cuda_wait(fastadam_cuda_plan* plan, int64_t* step);

/* What the last call of this thread to this library that did not return FASTADAM_OK complained about. */
FASTADAM_API const char* fastadam_cuda_error(void);

#if defined(__cplusplus)
}
#endif

#endif
