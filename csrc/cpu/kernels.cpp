// SPDX-License-Identifier: Apache-2.0
// The CPU kernels: plain loops, compiled once per ISA with that ISA's flags and FASTADAM_ISA naming its namespace.
// Everything but the table has internal linkage or is always inlined: no symbol compiled for a newer CPU may be
// shared with code that an older one runs. Include nothing but core headers, the
// parts of this source here and, in them, intrinsics.
#include "kernels.h"

#include "../core/adam_math.h"
#include "../core/norm.h"
#include "../core/split.h"
#include "row_kernels.h"
#include "streams.h"

namespace fastadam::cpu::FASTADAM_ISA {
namespace {

template <bool kAmsgrad, int kTransform, class Storage, class Grad, class T>
FASTADAM_INLINE void update_elements(const Streams<Storage, Grad>& streams, int64_t at, int64_t size,
                                     const StepScalars<T>& s, T factor, T keep) {
  // The binding has proved that nothing written here overlaps anything else read here.
  Storage* __restrict var = streams.var + at;
  const Grad* __restrict grad = streams.grad + at;
  T* __restrict m = streams.m + at;
  T* __restrict v = streams.v + at;
  T* __restrict vhat = kAmsgrad ? streams.vhat + at : nullptr;
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    T g = grad[i];
    T var_i = var[i];
    if constexpr (kTransform != kAsItIs) g = transform_gradient(g, s.clip_value, factor);
    if constexpr (kTransform == kAndL2) g = add_l2(g, var_i, s.l2);
    T m_i = m[i];
    T v_i = v[i];
    T vhat_i = kAmsgrad ? vhat[i] : T(0);
    adam_update<kAmsgrad>(var_i, g, m_i, v_i, vhat_i, keep, s);
    var[i] = var_i;
    m[i] = m_i;
    v[i] = v_i;
    if constexpr (kAmsgrad) vhat[i] = vhat_i;
  }
}

// The same for a half type, converted around it: a loop over elements of two and of four bytes is vectorised badly, and
// float16 has instructions for it.
template <bool kAmsgrad, int kTransform, class Storage, class Grad, class Slot>
FASTADAM_INLINE void update_half(const Streams<Storage, Grad, Slot>& streams, int64_t at, int64_t size,
                                 const StepScalars<float>& s, float factor, float keep) {
  float room[5][kBlock];
  convert(streams.var + at, room[0], size);
  const float* grad = floats_of(streams.grad + at, room[1], size);
  float* m = floats_of(streams.m + at, room[2], size);
  float* v = floats_of(streams.v + at, room[3], size);
  float* vhat = kAmsgrad ? floats_of(streams.vhat + at, room[4], size) : nullptr;
  update_elements<kAmsgrad, kTransform>(Streams<float, float>{room[0], grad, m, v, vhat}, 0, size, s, factor, keep);
  convert(room[0], streams.var + at, size);
  put_floats(m, streams.m + at, size);
  put_floats(v, streams.v + at, size);
  if constexpr (kAmsgrad) put_floats(vhat, streams.vhat + at, size);
}

// Any number of elements. Not inlined: every kernel would have it three times.
template <bool kAmsgrad, int kTransform, class Storage, class Grad, class Slot, class T>
__attribute__((noinline)) void update_range(const Streams<Storage, Grad, Slot>& streams, int64_t at, int64_t size,
                                            const StepScalars<T> s, T factor, T keep) {
  if constexpr (sizeof(Storage) != 2) {
    update_elements<kAmsgrad, kTransform>(streams, at, size, s, factor, keep);
  } else {
    const int64_t end = at + size;
    for (; at + kBlock <= end; at += kBlock) update_half<kAmsgrad, kTransform>(streams, at, kBlock, s, factor, keep);
    if (at < end) update_half<kAmsgrad, kTransform>(streams, at, end - at, s, factor, keep);
  }
}

// From so many elements on it pays to begin at a cache line: no vector of the variable, and of what is placed like it,
// then lies across two.
constexpr int64_t kLong = 512;

template <class Storage, class Grad, class Slot, bool kAmsgrad, int kTransform>
void adam_dense(const StepArgs& step, const TensorArgs& tensor, int64_t begin, int64_t end) {
  using T = Compute<Storage>;
  const StepScalars<T> s = scalars_of<T>(step);
  const T factor = static_cast<T>(factor_of(step, tensor));
  const T keep = tensor.decays ? s.keep : T(1);
  const auto streams = streams_of<Storage, Grad, Slot>(tensor, begin);
  const int64_t size = end - begin;
  int64_t at = 0;
  if (size >= kLong) {
    at = elements_to_line(reinterpret_cast<uintptr_t>(streams.var), sizeof(Storage));
    update_range<kAmsgrad, kTransform>(streams, 0, at, s, factor, keep);
  }
  if (step.prefetch) {
    for (; at + kBlock <= size; at += kBlock) {
      prefetch_block<kAmsgrad, true>(streams, at);
      if constexpr (sizeof(Storage) == 2) {
        update_half<kAmsgrad, kTransform>(streams, at, kBlock, s, factor, keep);
      } else {
        update_elements<kAmsgrad, kTransform>(streams, at, kBlock, s, factor, keep);
      }
    }
  }
  update_range<kAmsgrad, kTransform>(streams, at, size - at, s, factor, keep);
}

// The hardware keeps too few misses of a single stream in flight: 8 KiB ahead, into L2, take a fifth off the time in
// DRAM.
template <class Storage>
FASTADAM_INLINE void prefetch_gradient(const Storage* g) {
  constexpr auto kLine = static_cast<int64_t>(kCacheLineBytes / sizeof(Storage));
  for (int64_t i = 0; i < kNormLanes; i += kLine) __builtin_prefetch(g + 128 * kLine + i, 0, 2);
}

// Adds the squares of `count` elements to as many lanes; 0, or NaN, to `not_finite`.
template <bool kRequireFinite, class Storage, class T>
FASTADAM_INLINE void add_squares(const Storage* __restrict g, int64_t count, T limit, double* __restrict lanes,
                                 T* __restrict not_finite) {
#pragma omp simd
  for (int64_t lane = 0; lane < count; ++lane) {
    const T g_i = load(g[lane]);
    if constexpr (kRequireFinite) not_finite[lane] += g_i - g_i;
    const auto x = static_cast<double>(transform_gradient(g_i, limit, T(1)));
    lanes[lane] += x * x;
  }
}

template <class Storage, bool kRequireFinite>
double sum_squares(const void* grad, int64_t begin, int64_t size, double clip_value) {
  using T = Compute<Storage>;
  const Storage* g = static_cast<const Storage*>(grad) + begin;
  const T limit = static_cast<T>(clip_value);
  double lanes[kNormLanes] = {};
  T not_finite[kNormLanes] = {};
  int64_t at = 0;
  for (; at + kNormLanes <= size; at += kNormLanes) {
    prefetch_gradient(g + at);
    add_squares<kRequireFinite>(g + at, kNormLanes, limit, lanes, not_finite);
  }
  add_squares<kRequireFinite>(g + at, size - at, limit, lanes, not_finite);
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
      sum_row<true, Grad>(tensor, k, at - row, size, kNoClip<T>, static_cast<T>(tensor.grad_factor), sums);
      for (int64_t i = 0; i < size; ++i) accumulator[at + i] += sums[i];
    }
  }
}

template <class Grad>
void sum_rows(const TensorArgs& tensor, int64_t begin, int64_t end, void* sums) {
  using T = Compute<Grad>;
  const int64_t width = tensor.rows->width;
  for (int64_t at = begin; at < end;) {
    const int64_t size = columns_from(at % width, width, at, end);
    sum_row<false, Grad>(tensor, at / width, at % width, size, T(0), T(0), static_cast<T*>(sums) + at);
    at += size;
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

template <class Storage, class Grad = Storage, class Slot = Compute<Storage>>
constexpr DenseKernels dense_kernels = {
    {{adam_dense<Storage, Grad, Slot, false, kAsItIs>, adam_dense<Storage, Grad, Slot, false, kClipAndFactor>,
      adam_dense<Storage, Grad, Slot, false, kAndL2>},
     {adam_dense<Storage, Grad, Slot, true, kAsItIs>, adam_dense<Storage, Grad, Slot, true, kClipAndFactor>,
      adam_dense<Storage, Grad, Slot, true, kAndL2>}}};

template <class Storage, class Grad = Storage>
constexpr UpdateKernels all_rows_kernels = {
    {{adam_all_rows<Storage, Grad, false, false>, adam_all_rows<Storage, Grad, false, true>},
     {adam_all_rows<Storage, Grad, true, false>, adam_all_rows<Storage, Grad, true, true>}}};

template <class Storage, class Grad = Storage>
constexpr UpdateKernels touched_rows_kernels = {
    {{adam_touched_rows<Storage, Grad, false, false>, adam_touched_rows<Storage, Grad, false, true>},
     {adam_touched_rows<Storage, Grad, true, false>, adam_touched_rows<Storage, Grad, true, true>}}};

}  // namespace

extern const Kernels kernels = {
    {dense_kernels<Float16>, dense_kernels<BFloat16>, dense_kernels<float>, dense_kernels<double>,
     dense_kernels<Float16, float>, dense_kernels<BFloat16, float>, dense_kernels<Float16, Float16, Float16>,
     dense_kernels<BFloat16, BFloat16, BFloat16>},
    {all_rows_kernels<Float16>, all_rows_kernels<BFloat16>, all_rows_kernels<float>, all_rows_kernels<double>,
     all_rows_kernels<Float16, float>, all_rows_kernels<BFloat16, float>},
    {touched_rows_kernels<Float16>, touched_rows_kernels<BFloat16>, touched_rows_kernels<float>,
     touched_rows_kernels<double>, touched_rows_kernels<Float16, float>, touched_rows_kernels<BFloat16, float>},
    {{sum_squares<Float16, false>, sum_squares<Float16, true>},
     {sum_squares<BFloat16, false>, sum_squares<BFloat16, true>},
     {sum_squares<float, false>, sum_squares<float, true>},
     {sum_squares<double, false>, sum_squares<double, true>}},
    {average<Float16>, average<BFloat16>, average<float>, average<double>},
    {accumulate<Float16>, accumulate<BFloat16>, accumulate<float>, accumulate<double>, accumulate<Float16, float>,
     accumulate<BFloat16, float>},
    {sum_rows<Float16>, sum_rows<BFloat16>, sum_rows<float>, sum_rows<double>}};

}  // namespace fastadam::cpu::FASTADAM_ISA
