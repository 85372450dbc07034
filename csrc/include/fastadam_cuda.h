/* SPDX-License-Identifier: Apache-2.0
 *
 * The C interface of fastadam for CUDA devices: the structs and rules of fastadam.h, with pointers to memory of one
 * device (or managed memory), and a cudaStream_t for the work. Results have the bits of fastadam_step.
 *
 *   cc program.c $(python -m fastadam --include) $(python -m fastadam --libs) -lfastadam_cuda
 *
 * The library contains the CUDA runtime and links no driver: without a driver it loads and finds no devices. Calls
 * check before they launch: one that returns FASTADAM_INVALID or FASTADAM_NOT_FINITE has changed nothing. After
 * FASTADAM_CUDA_ERROR some of the work may have been launched. Calls restore the current device of the thread.
 */
#ifndef FASTADAM_CUDA_H
#define FASTADAM_CUDA_H

#include "fastadam.h"

/* What the steps of one list need on a device. Only one thread at a time may use it. */
typedef struct fastadam_cuda_plan fastadam_cuda_plan;

#if defined(__cplusplus)
extern "C" {
#endif

/* The number of usable devices. If it is 0, fastadam_cuda_error() says why. */
FASTADAM_API int32_t fastadam_cuda_device_count(void);

/* Makes a plan for these variables, slots and options, which must not move or change until the plan is destroyed. Does
 * not read gradients or list->offsets. `stale` must be null. Allocates on the legacy stream. */
FASTADAM_API fastadam_status fastadam_cuda_plan_create(int32_t device, const fastadam_list* list,
                                                       fastadam_cuda_plan** plan);

/* Frees the plan; waits for the device. `plan` may be null. */
FASTADAM_API fastadam_status fastadam_cuda_plan_destroy(fastadam_cuda_plan* plan);

/* Sorts indices on the device, int32 or int64, for tensors[place]. The rows belong to the plan and serve as `rows` of
 * that tensor (and for fastadam_sparse) until the next sort for it. rows->count is the number of indices; only the
 * device can read the arrays. The device detects an index outside [0, row_count): see fastadam_cuda_wait. */
FASTADAM_API fastadam_status fastadam_cuda_sort_rows(fastadam_cuda_plan* plan, int64_t place, const void* indices,
                                                     bool is_int64, int64_t count, int64_t row_count, int64_t width,
                                                     void* stream, const fastadam_rows** rows);

/* Sums the repeated rows of `values`, which has one row for each index, in order of occurrence. The sums are in memory
 * of the plan: float32, or float64 for float64 values. Afterwards the rows of `place` belong to the sums, whose
 * grad_size is rows->count * rows->width; sums after the last row are zero. */
FASTADAM_API fastadam_status fastadam_cuda_sum_rows(fastadam_cuda_plan* plan, int64_t place, const void* values,
                                                    fastadam_dtype dtype, void* stream, void** sums);

/* One step, like fastadam_step. `list` must be the list of the plan, but gradients, their factors and `rows` may be
 * new. Gradients must not change until the stream has finished the step. Waits for the stream only with
 * hyper->require_finite. Allocates only if sparse gradients or sizes are new. Work of one plan on several streams stays
 * in order.
 *
 * A step may be captured in a CUDA graph after one like it was made. Each replay is then the next step, whatever
 * hyper->step, with the betas of the plan's first step. A captured plan serves its graph only; require_finite is
 * refused. */
FASTADAM_API fastadam_status fastadam_cuda_step(fastadam_cuda_plan* plan, const fastadam_list* list,
                                                const fastadam_hyper* hyper, bool lazy, void* stream);

/* Like fastadam_accumulate. Waits only with `require_finite`. Cannot be captured. */
FASTADAM_API fastadam_status fastadam_cuda_accumulate(fastadam_cuda_plan* plan, const fastadam_list* list, bool restart,
                                                      bool require_finite, void* stream);

/* Like fastadam_sum_squares; `sums` is memory of the device. */
FASTADAM_API fastadam_status fastadam_cuda_sum_squares(fastadam_cuda_plan* plan, const fastadam_list* list,
                                                       double* sums, void* stream);

/* Waits for the device. Returns FASTADAM_INVALID if an index was out of range: then the first step or accumulation with
 * it and all later ones changed nothing. `*step`, if `step` is not null, receives hyper->step of the last step before
 * that, or 0 with FASTADAM_OK. Afterwards the plan may be used again; until then calls with a list also return
 * FASTADAM_INVALID, as soon as they see the invalid index. */
FASTADAM_API fastadam_status fastadam_cuda_wait(fastadam_cuda_plan* plan, int64_t* step);

/* The message of the last call to this library in this thread that did not return FASTADAM_OK. */
FASTADAM_API const char* fastadam_cuda_error(void);

#if defined(__cplusplus)
}
#endif

#endif
