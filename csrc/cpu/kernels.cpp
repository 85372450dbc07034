// SPDX-License-Identifier: Apache-2.0
// The CPU kernels: plain loops, compiled once per ISA with that ISA's flags and FASTADAM_ISA naming its namespace.
// Everything but the table has internal linkage or is always inlined: no symbol compiled for a newer CPU may be
// shared with code that an older one runs. Include nothing but core headers here.
#include "kernels.h"

#include "../core/adam_math.h"
#include "../core/norm.h"
#include "../core/split.h"

namespace fastadam::cpu::FASTADAM_ISA {
namespace {

template <class T>
const StepScalars<T>& scalars_of(const StepArgs& step) {
  if constexpr (sizeof(T) == 8) {
    return step.scalars_f64;
  } else {
    return step.scalars_f32;
  }
}

// The streams of one variable, from one element on.
template <class Storage, class Grad>
struct Streams {
  using T = Compute<Storage>;
  Storage* var;
  const Grad* grad;
  T* m;
  T* v;
  T* vhat;  // null without AMSGrad

  Streams(const TensorArgs& tensor, int64_t begin)
      : var(static_cast<Storage*>(tensor.var) + begin),
        grad(static_cast<const Grad*>(tensor.grad) + begin),
        m(static_cast<T*>(tensor.m) + begin),
        v(static_cast<T*>(tensor.v) + begin),
        vhat(tensor.vhat == nullptr ? nullptr : static_cast<T*>(tensor.vhat) + begin) {}
};

template <bool kAmsgrad, bool kTransform, class Storage, class Grad, class T>
FASTADAM_INLINE void update_block(const Streams<Storage, Grad>& streams, int64_t at, int64_t size,
                                  const StepScalars<T>& s, T factor, T keep) {
  // The binding has proved that nothing written here overlaps anything else read here.
  Storage* __restrict var = streams.var + at;
  const Grad* __restrict grad = streams.grad + at;
  T* __restrict m = streams.m + at;
  T* __restrict v = streams.v + at;
  T* __restrict vhat = kAmsgrad ? streams.vhat + at : nullptr;
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    T g = load(grad[i]);
    if constexpr (kTransform) g = transform_gradient(g, s.clip_value, factor);
    T var_i = load(var[i]);
    T m_i = m[i];
    T v_i = v[i];
    T vhat_i = kAmsgrad ? vhat[i] : T(0);
    adam_update<kAmsgrad>(var_i, g, m_i, v_i, vhat_i, keep, s);
    var[i] = store<Storage>(var_i);
    m[i] = m_i;
    v[i] = v_i;
    if constexpr (kAmsgrad) vhat[i] = vhat_i;
  }
}

// In elements. Fetching 1 KiB ahead gains 5 % in DRAM and costs 8 % in cache (bench/README.md).
constexpr int64_t kBlock = 32;

template <bool kAmsgrad, bool kGrad, class Storage, class Grad>
FASTADAM_INLINE void prefetch_block(const Streams<Storage, Grad>& streams, int64_t at) {
  constexpr int64_t kAheadBytes = 1024;
  constexpr auto kStep = static_cast<int64_t>(64 / sizeof(Compute<Storage>));
  for (int64_t i = at; i < at + kBlock; i += kStep) {
    const int64_t ahead = i + kAheadBytes / static_cast<int64_t>(sizeof(Compute<Storage>));
    __builtin_prefetch(streams.var + ahead);
    if constexpr (kGrad) __builtin_prefetch(streams.grad + ahead);
    __builtin_prefetch(streams.m + ahead);
    __builtin_prefetch(streams.v + ahead);
    if constexpr (kAmsgrad) __builtin_prefetch(streams.vhat + ahead);
  }
}

template <class Storage, class Grad, bool kAmsgrad, bool kTransform>
void adam_dense(const StepArgs& step, const TensorArgs& tensor, int64_t begin, int64_t end) {
  using T = Compute<Storage>;
  const StepScalars<T> s = scalars_of<T>(step);
  const T factor = static_cast<T>(tensor.grad_factor);
  const T keep = tensor.decays ? s.keep : T(1);
  const Streams<Storage, Grad> streams(tensor, begin);
  const int64_t size = end - begin;
  int64_t at = 0;
  if (step.prefetch) {
    for (; at + kBlock <= size; at += kBlock) {
      prefetch_block<kAmsgrad, true>(streams, at);
      update_block<kAmsgrad, kTransform>(streams, at, kBlock, s, factor, keep);
    }
  }
  update_block<kAmsgrad, kTransform>(streams, at, size - at, s, factor, keep);
}

// Columns of a row whose gradient is summed before they are updated.
constexpr int64_t kColumns = 128;

// Sums the gradients of one touched row, `size` columns from `column` on, in order of occurrence.
template <bool kTransform, class Grad, class T>
FASTADAM_INLINE void sum_row(const TensorArgs& tensor, int64_t k, int64_t column, int64_t size, T clip_value, T* sums) {
  const Rows& rows = *tensor.rows;
  const T factor = static_cast<T>(tensor.grad_factor);
  for (int64_t i = 0; i < size; ++i) sums[i] = T(0);
  for (int64_t at = rows.starts[k]; at < rows.starts[k + 1]; ++at) {
    const Grad* __restrict grad = static_cast<const Grad*>(tensor.grad) + rows.order[at] * rows.width + column;
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) {
      T g = load(grad[i]);
      if constexpr (kTransform) g = transform_gradient(g, clip_value, factor);
      sums[i] += g;
    }
  }
}

template <bool kAmsgrad, bool kTouched, class Storage, class T>
FASTADAM_INLINE void update_rows(const Streams<Storage, T>& streams, int64_t at, int64_t size, const T* sums, T keep,
                                 const StepScalars<T>& s) {
  Storage* __restrict var = streams.var + at;
  T* __restrict m = streams.m + at;
  T* __restrict v = streams.v + at;
  T* __restrict vhat = kAmsgrad ? streams.vhat + at : nullptr;
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    T var_i = load(var[i]);
    T m_i = m[i];
    T v_i = v[i];
    T vhat_i = kAmsgrad ? vhat[i] : T(0);
    adam_update_row<kAmsgrad, kTouched>(var_i, kTouched ? sums[i] : T(0), m_i, v_i, vhat_i, keep, s);
    var[i] = store<Storage>(var_i);
    m[i] = m_i;
    v[i] = v_i;
    if constexpr (kAmsgrad) vhat[i] = vhat_i;
  }
}

// Rows that are not touched, side by side.
template <bool kAmsgrad, class Storage, class T>
FASTADAM_INLINE void rest_rows(const Streams<Storage, T>& streams, int64_t at, int64_t end, T keep,
                               const StepScalars<T>& s, bool prefetch) {
  for (; prefetch && at + kBlock <= end; at += kBlock) {
    prefetch_block<kAmsgrad, false>(streams, at);
    update_rows<kAmsgrad, false>(streams, at, kBlock, static_cast<const T*>(nullptr), keep, s);
  }
  update_rows<kAmsgrad, false>(streams, at, end - at, static_cast<const T*>(nullptr), keep, s);
}

// Fetches the row that comes a few rows after row k: they lie anywhere in the table.
template <class Grad, class Storage, class T>
FASTADAM_INLINE void prefetch_row(const Streams<Storage, T>& streams, const TensorArgs& tensor, int64_t k) {
  constexpr int64_t kAhead = 4;
  constexpr auto kStep = static_cast<int64_t>(64 / sizeof(T));
  const Rows& rows = *tensor.rows;
  if (k + kAhead >= rows.count) return;
  const int64_t row = rows.rows[k + kAhead] * rows.width;
  const Grad* grad = static_cast<const Grad*>(tensor.grad) + rows.order[rows.starts[k + kAhead]] * rows.width;
  const int64_t size = rows.width < kColumns ? rows.width : kColumns;
  for (int64_t i = 0; i < size; i += kStep) {
    __builtin_prefetch(streams.var + row + i, 1);
    __builtin_prefetch(streams.m + row + i, 1);
    __builtin_prefetch(streams.v + row + i, 1);
    __builtin_prefetch(grad + i);
  }
}

// Elements [begin, end) of the table; if kLazy of the touched rows alone, laid one after the other.
template <bool kLazy, class Storage, class Grad, bool kAmsgrad, bool kTransform>
void adam_rows(const StepArgs& step, const TensorArgs& tensor, int64_t begin, int64_t end) {
  using T = Compute<Storage>;
  const StepScalars<T> s = scalars_of<T>(step);
  const T keep = tensor.decays ? s.keep : T(1);
  const Rows& rows = *tensor.rows;
  const Streams<Storage, T> streams(tensor, 0);
  T sums[kColumns];
  int64_t k = kLazy ? begin / rows.width : first_row_from(rows, begin / rows.width);
  for (int64_t at = begin; at < end;) {
    const int64_t row = at / rows.width;
    const int64_t column = at % rows.width;
    const bool is_touched = kLazy || (k < rows.count && rows.rows[k] == row);
    if (!is_touched) {
      const int64_t next = k < rows.count ? rows.rows[k] * rows.width : end;
      const int64_t size = (next < end ? next : end) - at;
      rest_rows<kAmsgrad>(streams, at, at + size, keep, s, step.prefetch);
      at += size;
      continue;
    }
    if (column == 0) prefetch_row<Grad>(streams, tensor, k);
    const int64_t rest = rows.width - column < end - at ? rows.width - column : end - at;
    const int64_t size = rest < kColumns ? rest : kColumns;
    sum_row<kTransform, Grad>(tensor, k, column, size, s.clip_value, sums);
    update_rows<kAmsgrad, true>(streams, rows.rows[k] * rows.width + column, size, sums, keep, s);
    at += size;
    if (column + size == rows.width) ++k;
  }
}

template <class Storage, bool kRequireFinite>
double sum_squares(const void* grad, int64_t begin, int64_t size, double clip_value) {
  using T = Compute<Storage>;
  const Storage* __restrict g = static_cast<const Storage*>(grad) + begin;
  const T limit = static_cast<T>(clip_value);
  double lanes[kNormLanes] = {};
  T not_finite[kNormLanes] = {};  // 0, or NaN
  for (int64_t at = 0; at < size; at += kNormLanes) {
    const int64_t count = size - at < kNormLanes ? size - at : kNormLanes;
#pragma omp simd
    for (int64_t lane = 0; lane < count; ++lane) {
      const T g_i = load(g[at + lane]);
      if constexpr (kRequireFinite) not_finite[lane] += g_i - g_i;
      const auto x = static_cast<double>(transform_gradient(g_i, limit, T(1)));
      lanes[lane] += x * x;
    }
  }
  if constexpr (kRequireFinite) {
    for (int64_t lane = 0; lane < kNormLanes; ++lane) lanes[lane] += static_cast<double>(not_finite[lane]);
  }
  return pairwise_sum(lanes, kNormLanes);
}

template <class Storage>
void average(const StepArgs& step, const TensorArgs& tensor, int64_t begin, int64_t end) {
  using T = Compute<Storage>;
  const T momentum = scalars_of<T>(step).ema_momentum;
  Storage* __restrict var = static_cast<Storage*>(tensor.var) + begin;
  T* __restrict averages = static_cast<T*>(tensor.average) + begin;
#pragma omp simd
  for (int64_t i = 0; i < end - begin; ++i) averages[i] = moving_average(averages[i], T(load(var[i])), momentum);
  if (!step.ema_overwrite) return;
#pragma omp simd
  for (int64_t i = 0; i < end - begin; ++i) var[i] = store<Storage>(averages[i]);
}

// The same for IndexedSlices: elements [begin, end) of the whole accumulator.
template <class Grad, class T>
void accumulate_rows(const TensorArgs& tensor, int64_t begin, int64_t end, bool restart) {
  const Rows& rows = *tensor.rows;
  T* accumulator = static_cast<T*>(tensor.accumulator);
  if (restart) {
    for (int64_t i = begin; i < end; ++i) accumulator[i] = T(0);
  }
  T sums[kColumns];
  for (int64_t k = first_row_from(rows, begin / rows.width); k < rows.count; ++k) {
    const int64_t row = rows.rows[k] * rows.width;
    if (row >= end) return;
    const int64_t last = row + rows.width < end ? row + rows.width : end;
    for (int64_t at = row > begin ? row : begin; at < last; at += kColumns) {
      const int64_t size = last - at < kColumns ? last - at : kColumns;
      sum_row<true, Grad>(tensor, k, at - row, size, static_cast<T>(__builtin_huge_val()), sums);
      for (int64_t i = 0; i < size; ++i) accumulator[at + i] += sums[i];
    }
  }
}

template <class Storage, class Grad = Storage>
void accumulate(const TensorArgs& tensor, int64_t begin, int64_t end, bool restart) {
  using T = Compute<Storage>;
  if (tensor.rows != nullptr) return accumulate_rows<Grad, T>(tensor, begin, end, restart);
  const T factor = static_cast<T>(tensor.grad_factor);
  const Grad* __restrict grad = static_cast<const Grad*>(tensor.grad) + begin;
  T* __restrict sums = static_cast<T*>(tensor.accumulator) + begin;
  if (restart) {
#pragma omp simd
    for (int64_t i = 0; i < end - begin; ++i) sums[i] = T(0) + load(grad[i]) * factor;
  } else {
#pragma omp simd
    for (int64_t i = 0; i < end - begin; ++i) sums[i] += load(grad[i]) * factor;
  }
}

template <class Storage, class Grad = Storage>
constexpr UpdateKernels dense_kernels = {
    {{adam_dense<Storage, Grad, false, false>, adam_dense<Storage, Grad, false, true>},
     {adam_dense<Storage, Grad, true, false>, adam_dense<Storage, Grad, true, true>}}};

template <bool kLazy, class Storage, class Grad = Storage>
constexpr UpdateKernels row_kernels = {
    {{adam_rows<kLazy, Storage, Grad, false, false>, adam_rows<kLazy, Storage, Grad, false, true>},
     {adam_rows<kLazy, Storage, Grad, true, false>, adam_rows<kLazy, Storage, Grad, true, true>}}};

}  // namespace

extern const Kernels kernels = {
    {dense_kernels<Float16>, dense_kernels<BFloat16>, dense_kernels<float>, dense_kernels<double>,
     dense_kernels<Float16, float>, dense_kernels<BFloat16, float>},
    {row_kernels<false, Float16>, row_kernels<false, BFloat16>, row_kernels<false, float>, row_kernels<false, double>,
     row_kernels<false, Float16, float>, row_kernels<false, BFloat16, float>},
    {row_kernels<true, Float16>, row_kernels<true, BFloat16>, row_kernels<true, float>, row_kernels<true, double>,
     row_kernels<true, Float16, float>, row_kernels<true, BFloat16, float>},
    {{sum_squares<Float16, false>, sum_squares<Float16, true>},
     {sum_squares<BFloat16, false>, sum_squares<BFloat16, true>},
     {sum_squares<float, false>, sum_squares<float, true>},
     {sum_squares<double, false>, sum_squares<double, true>}},
    {average<Float16>, average<BFloat16>, average<float>, average<double>},
    {accumulate<Float16>, accumulate<BFloat16>, accumulate<float>, accumulate<double>, accumulate<Float16, float>,
     accumulate<BFloat16, float>}};

}  // namespace fastadam::cpu::FASTADAM_ISA
