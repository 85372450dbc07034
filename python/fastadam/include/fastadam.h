/* SPDX-License-Identifier: Apache-2.0
 *
 * The C interface of fastadam: steps of Adam and AMSGrad, in place, on memory that the caller owns.
 *
 *   m += (g - m) * (1 - beta_1)      v += (g * g - v) * (1 - beta_2)
 *   var -= m * alpha / (sqrt(v) + epsilon)      alpha = learning_rate * sqrt(1 - beta_2^t) / (1 - beta_1^t)
 *
 * Arrays have no strides: element i of every array of a tensor belongs to element i of `var`. They must not overlap;
 * the library does not look. Everything else is checked before anything is written: a call that returns an error has
 * changed nothing. Calls are thread-safe as long as they write to different memory. They use the library's own threads
 * and return when the work is done; a forked child may call too.
 */
#ifndef FASTADAM_H
#define FASTADAM_H

#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define FASTADAM_API __declspec(dllexport)
#else
#define FASTADAM_API __attribute__((visibility("default")))
#endif

/* Goes up when a struct of this header changes; a library refuses the calls of another ABI. */
#define FASTADAM_ABI 1

#if defined(__cplusplus)
enum fastadam_dtype : int32_t
#else
typedef int32_t fastadam_dtype;
enum
#endif
{
  FASTADAM_FLOAT16,
  FASTADAM_BFLOAT16,
  FASTADAM_FLOAT32,
  FASTADAM_FLOAT64
};

/* What a call returns. */
#if defined(__cplusplus)
enum fastadam_status : int32_t
#else
typedef int32_t fastadam_status;
enum
#endif
{
  FASTADAM_OK,
  FASTADAM_INVALID,    /* an argument: fastadam_error() says which */
  FASTADAM_NO_MEMORY,  /* of the host, for the work itself */
  FASTADAM_NOT_FINITE, /* hyper.require_finite, and a gradient is not: no step was made */
  FASTADAM_CUDA_ERROR, /* of the CUDA runtime (fastadam_cuda.h alone) */
};

/* The numbers of one step, in double; rounded to the arithmetic of each tensor. FASTADAM_HYPER has the defaults. */
typedef struct fastadam_hyper {
  int64_t step; /* t, from 1 */
  double learning_rate;
  double beta_1;
  double beta_2;
  double epsilon;
  double decay;            /* learning_rate / (1 + decay * (t - 1)) is used */
  double clip_value;       /* infinity: no clipping */
  double clip_norm;        /* of each gradient */
  double global_clip_norm; /* of all gradients together */
  double gradient_scale;   /* 1 / loss scale, of which the clips are those of what results: held by each grad_factor */
  double weight_decay;     /* decoupled: the variable shrinks by weight_decay * learning_rate first (AdamW) */
  double ema_momentum;     /* of the averages, where there are any */
  bool ema_overwrite;      /* this step ends with the averages in the variables */
  bool require_finite;     /* a gradient with an element that is not finite: no step at all */
  bool clip_after_dedupe;  /* for callers that sum repeated rows first (fastadam_sum_rows): not read here */
  double l2;               /* coupled: l2 * variable is added to the gradient, after clip and factor; dense only */
  bool epsilon_corrected;  /* epsilon is added to the bias-corrected root, as PyTorch and optax do */
} fastadam_hyper;

/* Rows that a sparse gradient names, unique and ascending, and where the values of each lie: fastadam_sort_rows. */
typedef struct fastadam_rows {
  const int64_t* rows;
  const int64_t* starts; /* starts[k]: first occurrence of rows[k] in `order`; starts[count]: all of them */
  const int64_t* order;  /* places among the values, in order of occurrence */
  int64_t count;
  int64_t width; /* elements of a row */
} fastadam_rows;

struct fastadam_stale_rows; /* of the Python package's deferred tables; its layout is not part of this interface */

/* One variable and its gradient. fastadam_dense() and fastadam_sparse() fill in what is usual. */
typedef struct fastadam_tensor {
  void* var;
  const void* grad; /* dense, or values: one row for each index */
  void* m;
  void* v;
  void* vhat; /* null without AMSGrad, in all tensors of a step or in none; empty ones do not matter */
  int64_t size;
  int64_t next;       /* the tensor with the next gradient of the same variable, further on in the list; -1: none */
  double grad_factor; /* multiplies the gradient after the value clip */
  fastadam_dtype dtype;
  fastadam_dtype grad_dtype; /* dtype; or float32 for a half variable */
  bool decays;               /* weight_decay applies; l2 does in any case */
  bool half_slots;           /* m, v and vhat of a half variable have its dtype, as must its gradient, which is dense */
  void* average;             /* moving average of the variable, float32 or float64, or null */
  void* accumulator;         /* sum of gradients, float32 or float64, for fastadam_accumulate; or null */
  const fastadam_rows* rows; /* of a sparse gradient, or null */
  const struct fastadam_stale_rows* stale; /* null */
  int64_t grad_size;                       /* elements of grad */
} fastadam_tensor;

/* The tensors of a call. `heads` and `offsets` say which begin a variable; null: each is a variable of its own. */
typedef struct fastadam_list {
  int32_t abi; /* FASTADAM_ABI */
  const fastadam_tensor* tensors;
  int64_t count;
  const int64_t* heads;   /* tensors[heads[k]]: the first gradient of variable k */
  const int64_t* offsets; /* offsets[k]: elements before variable k; offsets[variable_count]: all of them. Of tensors
                             whose rows alone move, the elements of these rows */
  int64_t variable_count;
} fastadam_list;

#if defined(__cplusplus)
extern "C" {
#endif

/* One step. `lazy`: sparse gradients move only the rows that they name, else every row, as TensorFlow does. */
FASTADAM_API fastadam_status fastadam_step(const fastadam_list* list, const fastadam_hyper* hyper, bool lazy);

/* Adds the gradients, times grad_factor, to the accumulators, which count as zero if `restart`. */
FASTADAM_API fastadam_status fastadam_accumulate(const fastadam_list* list, bool restart, bool require_finite);

/* int64_t of memory that fastadam_sort_rows needs for so many indices; -1 for a count that cannot be. */
FASTADAM_API int64_t fastadam_sort_memory(int64_t count);

/* Sorts indices, int32 or int64, into `rows`, which then lie in `memory`. Stable: repeated rows keep their order.
 * `bad`, if not null: the place of the first index outside [0, row_count), or -1. */
FASTADAM_API fastadam_status fastadam_sort_rows(const void* indices, bool is_int64, int64_t count, int64_t row_count,
                                                int64_t width, int64_t* memory, fastadam_rows* rows, int64_t* bad);

/* Of each tensor with sums[i] not null: the sums of its repeated rows, in order of occurrence, one after the other;
 * in float32, or float64 for a float64 gradient. */
FASTADAM_API fastadam_status fastadam_sum_rows(const fastadam_list* list, void* const* sums);

/* The sum of squares of each gradient, in double: the same bits whatever the threads and the CPU. Only grad,
 * grad_dtype and grad_size are read. */
FASTADAM_API fastadam_status fastadam_sum_squares(const fastadam_list* list, double* sums);

/* Threads of the calls that follow, of whatever thread; 0: as many as CPUs that this process may run on. */
FASTADAM_API fastadam_status fastadam_set_num_threads(int32_t count);
FASTADAM_API int32_t fastadam_num_threads(void); /* in force */
FASTADAM_API int32_t fastadam_requested_threads(void);

/* The instruction sets of this build, from the plainest to the widest: null from the first i that there is not.
 * The last usable one is the default. */
FASTADAM_API const char* fastadam_isa(int32_t i);
FASTADAM_API bool fastadam_isa_is_usable(int32_t i);
FASTADAM_API const char* fastadam_current_isa(void);
FASTADAM_API fastadam_status fastadam_set_isa(const char* name);

FASTADAM_API int32_t fastadam_abi(void);
FASTADAM_API const char* fastadam_version(void);

/* What the last call of this thread that did not return FASTADAM_OK complained about. */
FASTADAM_API const char* fastadam_error(void);

#if defined(__cplusplus)
}
#endif

/* Keras's and TensorFlow's defaults. */
static inline fastadam_hyper fastadam_defaults(int64_t step) {
  fastadam_hyper hyper;
  hyper.step = step;
  hyper.learning_rate = 0.001;
  hyper.beta_1 = 0.9;
  hyper.beta_2 = 0.999;
  hyper.epsilon = 1e-7;
  hyper.decay = 0;
  hyper.clip_value = hyper.clip_norm = hyper.global_clip_norm = HUGE_VAL;
  hyper.gradient_scale = 1;
  hyper.weight_decay = hyper.ema_momentum = hyper.l2 = 0;
  hyper.ema_overwrite = hyper.require_finite = hyper.clip_after_dedupe = hyper.epsilon_corrected = false;
  return hyper;
}

/* A variable with a dense gradient of its dtype. m and v: float32, or float64 for a float64 variable. */
static inline fastadam_tensor fastadam_dense(void* var, const void* grad, void* m, void* v, int64_t size,
                                             fastadam_dtype dtype) {
  fastadam_tensor tensor;
  tensor.var = var;
  tensor.grad = grad;
  tensor.m = m;
  tensor.v = v;
  tensor.vhat = tensor.average = tensor.accumulator = NULL;
  tensor.size = tensor.grad_size = size;
  tensor.next = -1;
  tensor.grad_factor = 1;
  tensor.dtype = tensor.grad_dtype = dtype;
  tensor.decays = true;
  tensor.half_slots = false;
  tensor.rows = NULL;
  tensor.stale = NULL;
  return tensor;
}

/* A table with a sparse gradient: `values` has rows->width elements for each of `index_count` indices. */
static inline fastadam_tensor fastadam_sparse(void* var, const void* values, int64_t index_count,
                                              const fastadam_rows* rows, void* m, void* v, int64_t size,
                                              fastadam_dtype dtype) {
  fastadam_tensor tensor = fastadam_dense(var, values, m, v, size, dtype);
  tensor.rows = rows;
  tensor.grad_size = index_count * rows->width;
  return tensor;
}

#endif
