// SPDX-License-Identifier: Apache-2.0
// The CPU kernels: plain loops, compiled once per ISA with that ISA's flags and FASTADAM_ISA naming its namespace.
// Everything but the table has internal linkage or is always inlined: no symbol compiled for a newer CPU may be
// shared with code that an older one runs. Include nothing but core headers here.
#include "kernels.h"

#include "../core/adam_math.h"

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

template <class Storage, bool kAmsgrad, bool kTransform>
void adam_dense(const StepArgs& step, const TensorArgs& tensor, int64_t begin, int64_t end) {
  using T = Compute<Storage>;
  const StepScalars<T> s = scalars_of<T>(step);
  const T factor = static_cast<T>(tensor.grad_factor);
  Storage* __restrict var = static_cast<Storage*>(tensor.var) + begin;
  const Storage* __restrict grad = static_cast<const Storage*>(tensor.grad) + begin;
  T* __restrict m = static_cast<T*>(tensor.m) + begin;
  T* __restrict v = static_cast<T*>(tensor.v) + begin;
  T* __restrict vhat = kAmsgrad ? static_cast<T*>(tensor.vhat) + begin : nullptr;
  const int64_t size = end - begin;

// The binding has proved that nothing written here overlaps anything else read here.
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    T g = load(grad[i]);
    if constexpr (kTransform) g = transform_gradient(g, s.clip_value, factor);
    T var_i = load(var[i]);
    T m_i = m[i];
    T v_i = v[i];
    T vhat_i = kAmsgrad ? vhat[i] : T(0);
    adam_update<kAmsgrad>(var_i, g, m_i, v_i, vhat_i, s);
    var[i] = store<Storage>(var_i);
    m[i] = m_i;
    v[i] = v_i;
    if constexpr (kAmsgrad) vhat[i] = vhat_i;
  }
}

#define FASTADAM_DENSE_ROW(S) \
  {{adam_dense<S, false, false>, adam_dense<S, false, true>}, {adam_dense<S, true, false>, adam_dense<S, true, true>}}

}  // namespace

extern const Kernels kernels = {
    {FASTADAM_DENSE_ROW(Float16), FASTADAM_DENSE_ROW(BFloat16), FASTADAM_DENSE_ROW(float), FASTADAM_DENSE_ROW(double)}};

}  // namespace fastadam::cpu::FASTADAM_ISA
