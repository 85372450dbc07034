// SPDX-License-Identifier: Apache-2.0
// The CPU kernels: plain loops, compiled once per instruction set with its compiler flags. FASTADAM_ISA names the
// namespace. Everything except the table has internal linkage or is always inlined, because code that runs on an older
// CPU must not share a symbol that was compiled for a newer one. Include only core headers, lanes.h, row_kernels.h and
// headers of intrinsics.
#include "kernels.h"

#include "../core/adam_math.h"
#include "../core/norm.h"
#include "../core/split.h"
#include "lanes.h"
#include "row_kernels.h"

namespace fastadam::cpu::FASTADAM_ISA {
namespace {

template <bool kAmsgrad, int kTransform, class T>
FASTADAM_INLINE void update_elements(const Operands<T>& operands, int64_t size, const StepScalars<T>& s,
                                     FactorPair<T> factor, T keep) {
  // The caller has checked that arrays written here overlap no other array.
  T* __restrict var = operands.var;
  const T* __restrict grad = operands.grad;
  T* __restrict m = operands.m;
  T* __restrict v = operands.v;
  T* __restrict vhat = operands.vhat;
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

// Updates any number of elements. Takes separate pointers, which are passed in registers: a list may have a thousand
// small tensors.
template <class T>
using UpdateRange = void (*)(T* var, const T* grad, T* m, T* v, T* vhat, int64_t size, const StepScalars<T>& scalars,
                             FactorPair<T> factor, T keep, bool prefetch);

template <bool kAmsgrad, int kTransform, class T>
void update_range(T* var, const T* grad, T* m, T* v, T* vhat, int64_t size, const StepScalars<T>& scalars,
                  FactorPair<T> factor, T keep, bool prefetch) {
  const StepScalars<T> s = scalars;
  int64_t at = 0;
  for (; prefetch && at + kBlock <= size; at += kBlock) {
    prefetch_block(sizeof(T), var + at, grad + at, m + at, v + at);
    if constexpr (kAmsgrad) prefetch_block(sizeof(T), vhat + at);
    update_elements<kAmsgrad, kTransform>(
        Operands<T>{var + at, grad + at, m + at, v + at, kAmsgrad ? vhat + at : nullptr}, kBlock, s, factor, keep);
  }
  update_elements<kAmsgrad, kTransform>(
      Operands<T>{var + at, grad + at, m + at, v + at, kAmsgrad ? vhat + at : nullptr}, size - at, s, factor, keep);
}

// Returns the loop for the options of a step. The half types share these loops.
template <class T>
UpdateRange<T> update_for(const StepArgs& step) {
  static constexpr UpdateRange<T> kUpdates[2][kTransformCount] = {
      {update_range<false, kAsItIs, T>, update_range<false, kClipAndFactor, T>, update_range<false, kAndL2, T>},
      {update_range<true, kAsItIs, T>, update_range<true, kClipAndFactor, T>, update_range<true, kAndL2, T>}};
  return kUpdates[step.amsgrad][step.transform];
}

// From this many elements on, it pays to start at a cache line: then no vector of the variable, or of an array with the
// same alignment, straddles two lines.
constexpr int64_t kLong = 512;

// The number of elements before the first cache line of a long variable; 0 for a short one.
template <class Storage>
FASTADAM_INLINE int64_t elements_to_begin(const Storage* var, int64_t size) {
  return size < kLong ? 0 : elements_to_line(reinterpret_cast<uintptr_t>(var), sizeof(Storage));
}

template <class T>
void adam_dense(const StepArgs& step, const TensorArgs& tensor, int64_t begin, int64_t end) {
  const StepScalars<T>& s = scalars_of<T>(step);
  const FactorPair<T> factor = factor_of<T>(step, tensor);
  const T keep = tensor.decays ? s.keep : T(1);
  const UpdateRange<T> update = update_for<T>(step);
  const auto update_part_at = [&](int64_t at, int64_t size, bool prefetch) {
    T* vhat = tensor.vhat == nullptr ? nullptr : static_cast<T*>(tensor.vhat) + at;
    update(static_cast<T*>(tensor.var) + at, static_cast<const T*>(tensor.grad) + at, static_cast<T*>(tensor.m) + at,
           static_cast<T*>(tensor.v) + at, vhat, size, s, factor, keep, prefetch);
  };
  const int64_t first = elements_to_begin(static_cast<const T*>(tensor.var) + begin, end - begin);
  if (first > 0) update_part_at(begin, first, false);
  update_part_at(begin + first, end - begin - first, step.prefetch);
}

// Returns kBlock elements as floats: the elements themselves, or a copy in `room` that put_floats() rounds back.
FASTADAM_INLINE float* floats_of(float* from, float* /*room*/) { return from; }
FASTADAM_INLINE const float* floats_of(const float* from, float* /*room*/) { return from; }
template <class Half>
FASTADAM_INLINE float* floats_of(const Half* from, float* room) {
  convert_here(from, room, kBlock);
  return room;
}
FASTADAM_INLINE void put_floats(const float* /*from*/, float* /*to*/) {}
template <class Half>
FASTADAM_INLINE void put_floats(const float* from, Half* to) {
  convert_here(from, to, kBlock);
}

// Updates kBlock elements of a half type: converts them to float, and rounds the results.
template <bool kAmsgrad, int kTransform, class Half, class Grad, class Slot>
FASTADAM_INLINE void update_half(Half* var, const Grad* grad, Slot* m, Slot* v, Slot* vhat, const StepScalars<float>& s,
                                 FactorPair<float> factor, float keep) {
  float room[5][kBlock];
  convert_here(var, room[0], kBlock);
  const Operands<float> floats{room[0], floats_of(grad, room[1]), floats_of(m, room[2]), floats_of(v, room[3]),
                               kAmsgrad ? floats_of(vhat, room[4]) : nullptr};
  update_elements<kAmsgrad, kTransform>(floats, kBlock, s, factor, keep);
  convert_here(room[0], var, kBlock);
  put_floats(floats.m, m);
  put_floats(floats.v, v);
  if constexpr (kAmsgrad) put_floats(floats.vhat, vhat);
}

// Updates fewer than kBlock elements, starting at `at`, for any types of gradient and slots, with the loop for float.
template <class Half>
__attribute__((noinline)) void update_part(const StepArgs& step, const TensorArgs& tensor, int64_t at, int64_t size,
                                           FactorPair<float> factor, float keep) {
  float room[5][kBlock];
  const auto read = [&](const void* array, bool is_half, int i) {
    if (is_half) convert(static_cast<const Half*>(array) + at, room[i], size);
    return is_half ? room[i] : static_cast<float*>(const_cast<void*>(array)) + at;
  };
  void* const slots[] = {tensor.m, tensor.v, tensor.vhat};
  const int slot_count = step.amsgrad ? 3 : 2;
  float* values[3] = {};
  for (int i = 0; i < slot_count; ++i) values[i] = read(slots[i], tensor.half_slots, 2 + i);
  const float* grad = read(tensor.grad, tensor.grad_dtype == tensor.dtype, 1);
  update_for<float>(step)(read(tensor.var, true, 0), grad, values[0], values[1], values[2], size, step.scalars_f32,
                          factor, keep, false);
  convert(room[0], static_cast<Half*>(tensor.var) + at, size);
  for (int i = 0; i < slot_count && tensor.half_slots; ++i) convert(values[i], static_cast<Half*>(slots[i]) + at, size);
}

template <class Half, class Grad, class Slot, bool kAmsgrad, int kTransform>
void adam_half(const StepArgs& step, const TensorArgs& tensor, int64_t begin, int64_t end) {
  const StepScalars<float> s = step.scalars_f32;
  const FactorPair<float> factor = factor_of<float>(step, tensor);
  const float keep = tensor.decays ? s.keep : 1.0f;
  Half* var = static_cast<Half*>(tensor.var);
  const Grad* grad = static_cast<const Grad*>(tensor.grad);
  Slot* m = static_cast<Slot*>(tensor.m);
  Slot* v = static_cast<Slot*>(tensor.v);
  Slot* vhat = static_cast<Slot*>(tensor.vhat);
  int64_t at = begin + elements_to_begin(var + begin, end - begin);
  if (at > begin) update_part<Half>(step, tensor, begin, at - begin, factor, keep);
  for (; at + kBlock <= end; at += kBlock) {
    if (step.prefetch) prefetch_block(sizeof(float), var + at, grad + at, m + at, v + at);
    if (kAmsgrad && step.prefetch) prefetch_block(sizeof(float), vhat + at);
    update_half<kAmsgrad, kTransform>(var + at, grad + at, m + at, v + at, kAmsgrad ? vhat + at : nullptr, s, factor,
                                      keep);
  }
  if (at < end) update_part<Half>(step, tensor, at, end - at, factor, keep);
}

template <class Half, class Grad, class Slot>
constexpr UpdateKernel kHalf[2][kTransformCount] = {
    {adam_half<Half, Grad, Slot, false, kAsItIs>, adam_half<Half, Grad, Slot, false, kClipAndFactor>,
     adam_half<Half, Grad, Slot, false, kAndL2>},
    {adam_half<Half, Grad, Slot, true, kAsItIs>, adam_half<Half, Grad, Slot, true, kClipAndFactor>,
     adam_half<Half, Grad, Slot, true, kAndL2>}};

// Updates a variable of a half type. Its gradient and its slots have the same type or are float.
template <class Half>
void adam_dense_half(const StepArgs& step, const TensorArgs& tensor, int64_t begin, int64_t end) {
  const auto& kernels = tensor.half_slots                   ? kHalf<Half, Half, Half>
                        : tensor.grad_dtype == tensor.dtype ? kHalf<Half, Half, float>
                                                            : kHalf<Half, float, float>;
  kernels[step.amsgrad][step.transform](step, tensor, begin, end);
}

// The hardware keeps too few misses of a single stream in flight. Prefetching 8 KiB ahead into L2 saves a fifth of the
// time in DRAM.
template <class Storage>
FASTADAM_INLINE void prefetch_gradient(const Storage* g) {
  constexpr auto kLine = static_cast<int64_t>(kCacheLineBytes / sizeof(Storage));
  for (int64_t i = 0; i < kNormLanes; i += kLine) __builtin_prefetch(g + 128 * kLine + i, 0, 2);
}

// Adds the square of element i to lanes[i], for `count` elements, and 0 (or NaN if it is not finite) to not_finite[i].
template <bool kRequireFinite, bool kRescaled, class Storage, class T>
FASTADAM_INLINE void add_squares(const Storage* __restrict g, int64_t count, T limit, T unit, double* __restrict lanes,
                                 T* __restrict not_finite) {
#pragma omp simd
  for (int64_t lane = 0; lane < count; ++lane) {
    const T g_i = load(g[lane]);
    if constexpr (kRequireFinite) not_finite[lane] += g_i - g_i;
    const T clipped = clip_by_value(g_i, limit);
    const auto x = static_cast<double>(kRescaled ? clipped * unit : clipped);
    lanes[lane] += x * x;
  }
}

template <class Storage, bool kRequireFinite, bool kRescaled>
FASTADAM_INLINE double sum_block(const void* grad, int64_t begin, int64_t size, double clip_value,
                                 Compute<Storage> unit) {
  using T = Compute<Storage>;
  const Storage* g = static_cast<const Storage*>(grad) + begin;
  const T limit = static_cast<T>(clip_value);
  double lanes[kNormLanes] = {};
  T not_finite[kNormLanes] = {};
  int64_t at = 0;
  for (; at + kNormLanes <= size; at += kNormLanes) {
    prefetch_gradient(g + at);
    add_squares<kRequireFinite, kRescaled>(g + at, kNormLanes, limit, unit, lanes, not_finite);
  }
  add_squares<kRequireFinite, kRescaled>(g + at, size - at, limit, unit, lanes, not_finite);
  if constexpr (kRequireFinite) {
    for (int64_t lane = 0; lane < kNormLanes; ++lane) lanes[lane] += static_cast<double>(not_finite[lane]);
  }
  return pairwise_sum(lanes, kNormLanes);
}

template <class Storage, bool kRequireFinite>
double sum_squares(const void* grad, int64_t begin, int64_t size, double clip_value) {
  return sum_block<Storage, kRequireFinite, false>(grad, begin, size, clip_value, 1);
}

double sum_rescaled_squares(const void* grad, int64_t begin, int64_t size, double clip_value, double unit) {
  return sum_block<double, false, true>(grad, begin, size, clip_value, unit);
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

// Adds IndexedSlices to elements [begin, end) of the accumulator, which has every row of the variable.
template <class Grad, class T>
void accumulate_rows(const TensorArgs& tensor, int64_t begin, int64_t end, bool restart) {
  const Rows& rows = *tensor.rows;
  const FactorPair<T> factor = pair_here<T>(tensor.grad_factor, 0);
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
      sum_row<true, Grad>(tensor, k, at - row, size, kNoClip<T>, factor, sums);
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
    sum_row<false, Grad>(tensor, at / width, at % width, size, T(0), FactorPair<T>{}, static_cast<T*>(sums) + at);
    at += size;
  }
}

template <class Grad>
void accumulate(const TensorArgs& tensor, int64_t begin, int64_t end, bool restart) {
  using T = Compute<Grad>;
  if (tensor.rows != nullptr) return accumulate_rows<Grad, T>(tensor, begin, end, restart);
  const FactorPair<T> factor = pair_here<T>(tensor.grad_factor, 0);
  const Grad* __restrict grad = static_cast<const Grad*>(tensor.grad) + begin;
  T* __restrict sums = static_cast<T*>(tensor.accumulator) + begin;
  if (restart) {
#pragma omp simd
    for (int64_t i = 0; i < end - begin; ++i) sums[i] = T(0) + multiply(load(grad[i]), factor);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < end - begin; ++i) sums[i] += multiply(load(grad[i]), factor);
  }
}

}  // namespace

extern const Kernels kernels = {
    {adam_dense_half<Float16>, adam_dense_half<BFloat16>, adam_dense<float>, adam_dense<double>},
    {adam_all_rows<Float16>, adam_all_rows<BFloat16>, adam_all_rows<float>, adam_all_rows<double>},
    {adam_touched_rows<Float16>, adam_touched_rows<BFloat16>, adam_touched_rows<float>, adam_touched_rows<double>},
    {{sum_squares<Float16, false>, sum_squares<Float16, true>},
     {sum_squares<BFloat16, false>, sum_squares<BFloat16, true>},
     {sum_squares<float, false>, sum_squares<float, true>},
     {sum_squares<double, false>, sum_squares<double, true>}},
    sum_rescaled_squares,
    {average<Float16>, average<BFloat16>, average<float>, average<double>},
    {accumulate<Float16>, accumulate<BFloat16>, accumulate<float>, accumulate<double>},
    {sum_rows<Float16>, sum_rows<BFloat16>, sum_rows<float>, sum_rows<double>}};

}  // namespace fastadam::cpu::FASTADAM_ISA
