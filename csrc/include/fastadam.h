/* SPDX-License-Identifier: Apache-2.0
 *
 * The C interface of fastadam: steps of Adam and AMSGrad, in place, on memory that the caller owns.
 *
 *   m += (g - m) * (1 - beta_1)      v += (g * g - v) * (1 - beta_2)
 *   var -= m * alpha / (sqrt(v) + epsilon)      alpha = learning_rate * sqrt(1 - beta_2^t) / (1 - beta_1^t)
 *
 * Arrays have no strides: element i of every array of a tensor belongs to element i of `var`. Arrays that a call writes
 * must not share memory with any other array. The library looks for that within each tensor, not between tensors.
 * Everything else is checked before anything is written: a call that returns an error has changed nothing. Sizes may be
 * at most 2^59 elements, also of all tensors of a list together. Calls are thread-safe as long as they write to
 * different memory. They use the library's own threads and return when the work is done; a forked child may call too.
 *
 * Results do not depend on the caller's floating-point mode (rounding, flush-to-zero, denormals-are-zero, traps), which
 * calls restore.
 *
 * Norms are computed in double, over a tree of fixed shape: the same bits whatever the threads and the CPU. They are
 * right up to the largest float64, even if squares overflow or underflow. A norm above that, or of a gradient that is
 * not finite, is not finite: with require_finite such a step is not made; otherwise clip_norm makes finite elements of
 * that gradient 0, and global_clip_norm makes all variables NaN, as in TensorFlow.
 *
 * Within a step numbers below the smallest normal number of the variable's arithmetic (1.2e-38 in float32, 2.3e-308 in
 * float64) count as 0: elements of gradients, also in their norms, and every intermediate result. A factor of gradients
 * (a clip factor, grad_factor or their product) may be smaller; it counts as 0 below the square of that number.
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

/* Increases when a struct of this header changes. The library refuses lists of another ABI. */
#define FASTADAM_ABI 3

/* The largest argument of fastadam_set_num_threads. */
#define FASTADAM_MOST_THREADS 1024

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
  FASTADAM_INVALID,    /* an invalid argument: fastadam_error() says which */
  FASTADAM_NO_MEMORY,  /* the call could not allocate CPU memory for its own work */
  FASTADAM_NOT_FINITE, /* a gradient or its norm is not finite, and require_finite is set: no step was made */
  FASTADAM_CUDA_ERROR, /* the CUDA runtime failed (only fastadam_cuda.h) */
};

/* How the moments of a variable are stored. Rounding at random is decided by seed, step, parameter and element alone.
 */
#if defined(__cplusplus)
enum fastadam_moments : int32_t
#else
typedef int32_t fastadam_moments;
enum
#endif
{
  FASTADAM_MOMENTS_WIDE,     /* float32; float64 for a float64 variable */
  FASTADAM_MOMENTS_HALF,     /* dtype of a half variable, rounded to nearest. Its gradient has it too, and is dense */
  FASTADAM_MOMENTS_BFLOAT16, /* rounded at random; not for float64 variables and sparse gradients */
  FASTADAM_MOMENTS_8BIT,     /* codes of 8 bits with m_scales and v_scales, rounded at random; likewise; without vhat */
};

/* The numbers of one step, in double; each tensor rounds them to its arithmetic. fastadam_defaults() fills them in. */
typedef struct fastadam_hyper {
  int64_t step; /* t, from 1 */
  double learning_rate;
  double beta_1;
  double beta_2;
  double epsilon;
  double decay;            /* learning_rate / (1 + decay * (t - 1)) is used */
  double clip_value;       /* infinity: no clipping */
  double clip_norm;        /* bound of the norm of each gradient */
  double global_clip_norm; /* bound of the norm of all gradients together */
  double gradient_scale;   /* 1 / loss scale. Clip bounds refer to scaled gradients; each grad_factor must already
                              include it */
  double weight_decay;     /* decoupled (AdamW): the variable is first multiplied by 1 - weight_decay * learning_rate */
  double ema_momentum;     /* momentum of the averages, if any */
  bool ema_overwrite;      /* after this step the averages are copied to the variables */
  bool require_finite;     /* no step is made if an element of a gradient, or a norm to be clipped, is not finite */
  bool clip_after_dedupe;  /* for callers that sum repeated rows first (fastadam_sum_rows): ignored here */
  double l2;               /* coupled: l2 * variable is added to the gradient, after clip and factor; dense only */
  bool epsilon_corrected;  /* epsilon is added to the bias-corrected root, as PyTorch and optax do */
  bool zero_gradients;     /* gradients, which must be dense and writable, are 0 after the step */
  uint64_t seed;           /* of rounding at random */
} fastadam_hyper;

/* The rows of a sparse gradient, unique and ascending, and the positions of their values. See fastadam_sort_rows. */
typedef struct fastadam_rows {
  const int64_t* rows;
  const int64_t* starts; /* rows[k] has order[starts[k]] to order[starts[k + 1] - 1] */
  const int64_t* order;  /* positions among the values, in order of occurrence within each row */
  int64_t count;
  int64_t width; /* elements of a row */
} fastadam_rows;

/* What a step did to a variable. Sums are in double, over a tree of fixed shape, and within 1e-6 of the exact ones. */
typedef struct fastadam_telemetry {
  double gradient_norm; /* times gradient_scale, before clipping; of all gradients of the variable together */
  double update_rms;    /* root mean square of what was added to the variable */
  double parameter_rms; /* of the variable after the step */
  int64_t unchanged;    /* elements that the step left as they were: of the copy if there is one */
  int64_t not_finite;   /* elements of the gradients that are infinite or NaN */
  int64_t size;
} fastadam_telemetry;

struct fastadam_stale_rows; /* for the Python package's deferred tables; its layout is not part of this interface */

/* One variable and its gradient. fastadam_dense() and fastadam_sparse() fill in the usual values. */
typedef struct fastadam_tensor {
  void* var;
  const void* grad; /* dense, or values: one row for each index */
  void* m;
  void* v;
  void* vhat; /* null without AMSGrad. All tensors of a step have one, or none has; empty tensors do not count */
  int64_t size;
  int64_t next;       /* a later tensor of the list, with the next gradient of the same variable; -1: none */
  double grad_factor; /* multiplies the gradient after the value clip */
  fastadam_dtype dtype;
  fastadam_dtype grad_dtype; /* dtype; float32 for a half variable; a half type for a dense gradient of a float32 one */
  bool decays;               /* weight_decay applies; l2 always does */
  fastadam_moments moments;
  bool stochastic;    /* a bfloat16 variable without `low` is rounded at random */
  uint64_t parameter; /* the number of the variable among those of one seed */
  uint8_t* m_scales;  /* of 8-bit moments: one for each 128 elements. Zeros are a state of zeros */
  uint8_t* v_scales;
  int16_t* low;  /* the low halves of float32 values whose high halves are a bfloat16 variable; or null */
  void* average; /* moving average of the variable, float32 or float64, or null */
  void* copy;    /* receives a float32 variable after the step, rounded to nearest even; or null. If a variable
                    has several gradients, that of the first counts */
  fastadam_dtype copy_dtype;               /* float16, bfloat16 or float32 */
  fastadam_telemetry* telemetry;           /* receives what the step did, or null; after FASTADAM_NOT_FINITE what its
                                              gradients were. Likewise; not for sparse gradients */
  void* accumulator;                       /* sum of gradients, float32 or float64, for fastadam_accumulate; or null */
  const fastadam_rows* rows;               /* the rows of a sparse gradient, or null */
  const struct fastadam_stale_rows* stale; /* must be null */
  int64_t grad_size;                       /* number of elements of grad */
} fastadam_tensor;

/* The tensors of a call. `heads` and `offsets` group them by variable; if null, each is a variable of its own. */
typedef struct fastadam_list {
  int32_t abi; /* FASTADAM_ABI */
  const fastadam_tensor* tensors;
  int64_t count;
  const int64_t* heads;   /* tensors[heads[k]]: the first gradient of variable k */
  const int64_t* offsets; /* offsets[k]: number of elements before variable k; offsets[variable_count]: of all. If only
                             the rows of a sparse gradient move, only their elements count */
  int64_t variable_count;
} fastadam_list;

#if defined(__cplusplus)
extern "C" {
#endif

/* One step. If `lazy`, sparse gradients move only their own rows; otherwise every row moves, as in TensorFlow. */
FASTADAM_API fastadam_status fastadam_step(const fastadam_list* list, const fastadam_hyper* hyper, bool lazy);

/* Adds the gradients, times grad_factor, to the accumulators; with `restart` the accumulators count as zero. */
FASTADAM_API fastadam_status fastadam_accumulate(const fastadam_list* list, bool restart, bool require_finite);

/* The number of int64_t that fastadam_sort_rows needs as memory for `count` indices; -1 if `count` is not 0 to 2^57. */
FASTADAM_API int64_t fastadam_sort_memory(int64_t count);

/* Sorts indices, int32 or int64, into `rows`, whose arrays are stored in `memory`. Repeated rows keep their order.
 * `bad`, if not null, receives the position of the first index outside [0, row_count), or -1. */
FASTADAM_API fastadam_status fastadam_sort_rows(const void* indices, bool is_int64, int64_t count, int64_t row_count,
                                                int64_t width, int64_t* memory, fastadam_rows* rows, int64_t* bad);

/* For each tensor with sums[i] not null: sums its repeated rows in order of occurrence and stores the sums, one for
 * each row, in sums[i]; in float32, or in float64 for a float64 gradient. */
FASTADAM_API fastadam_status fastadam_sum_rows(const fastadam_list* list, void* const* sums);

/* The sum of squares of each gradient, in double; infinite if it is above the largest float64, and inexact or 0 below
 * 1e-271. Only grad, grad_dtype and grad_size are read. */
FASTADAM_API fastadam_status fastadam_sum_squares(const fastadam_list* list, double* sums);

/* The norm of all gradients together. Only grad, grad_dtype and grad_size are read. */
FASTADAM_API fastadam_status fastadam_norm(const fastadam_list* list, double* norm);

/* The number of threads for all later calls, at most FASTADAM_MOST_THREADS; 0: one for each CPU that this process may
 * run on. */
FASTADAM_API fastadam_status fastadam_set_num_threads(int32_t count);
FASTADAM_API int32_t fastadam_num_threads(void);       /* the number in use */
FASTADAM_API int32_t fastadam_requested_threads(void); /* the number last set */

/* The name of instruction set i of this build, from the plainest to the widest; null if i is out of range. The last
 * usable one is the default. */
FASTADAM_API const char* fastadam_isa(int32_t i);
FASTADAM_API bool fastadam_isa_is_usable(int32_t i);
FASTADAM_API const char* fastadam_current_isa(void);
FASTADAM_API fastadam_status fastadam_set_isa(const char* name);

FASTADAM_API int32_t fastadam_abi(void);
FASTADAM_API const char* fastadam_version(void);

/* The message of the last call in this thread that did not return FASTADAM_OK. */
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
  hyper.zero_gradients = false;
  hyper.seed = 0;
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
  tensor.vhat = tensor.average = tensor.copy = tensor.accumulator = NULL;
  tensor.telemetry = NULL;
  tensor.size = tensor.grad_size = size;
  tensor.next = -1;
  tensor.grad_factor = 1;
  tensor.dtype = tensor.grad_dtype = tensor.copy_dtype = dtype;
  tensor.decays = true;
  tensor.moments = FASTADAM_MOMENTS_WIDE;
  tensor.stochastic = false;
  tensor.parameter = 0;
  tensor.m_scales = tensor.v_scales = NULL;
  tensor.low = NULL;
  tensor.rows = NULL;
  tensor.stale = NULL;
  return tensor;
}

/* A table with a sparse gradient: `values` has rows->width elements for each of `index_count` indices. If their product
 * overflows, calls with the tensor are refused. */
static inline fastadam_tensor fastadam_sparse(void* var, const void* values, int64_t index_count,
                                              const fastadam_rows* rows, void* m, void* v, int64_t size,
                                              fastadam_dtype dtype) {
  fastadam_tensor tensor = fastadam_dense(var, values, m, v, size, dtype);
  tensor.rows = rows;
  const int64_t most = rows->width > 0 ? INT64_MAX / rows->width : INT64_MAX;
  tensor.grad_size = index_count >= 0 && index_count <= most ? index_count * rows->width : -1;
  return tensor;
}

#endif
