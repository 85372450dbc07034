// SPDX-License-Identifier: Apache-2.0
// Traffic floors: the reads and writes of an Adam step with almost no arithmetic, with all tensors of a list in one
// parallel region. No implementation of Adam can be faster in memory. bench/common.py builds and loads this file.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace {

struct List {
  int64_t count;
  const int64_t* offsets;  // the number of elements before each tensor; the last entry is the total
  void* const* var;
  void* const* grad;  // null: gradients are not read
  void* const* m;
  void* const* v;
  void* const* vhat;  // null without AMSGrad
};

// Does all loads before all stores: a load after a store to the same offset in another page waits for the store.
template <class Storage, bool kGrad, bool kAmsgrad>
void touch(const List& list, int64_t i, int64_t begin, int64_t end) {
  Storage* __restrict var = static_cast<Storage*>(list.var[i]);
  const Storage* __restrict grad = kGrad ? static_cast<const Storage*>(list.grad[i]) : nullptr;
  float* __restrict m = static_cast<float*>(list.m[i]);
  float* __restrict v = static_cast<float*>(list.v[i]);
  float* __restrict vhat = kAmsgrad ? static_cast<float*>(list.vhat[i]) : nullptr;
#pragma omp simd
  for (int64_t at = begin; at < end; ++at) {
    const Storage g = kGrad ? grad[at] : Storage(1);
    const float new_m = m[at] + 1.0f;
    const float new_v = v[at] - 1.0f;
    const float new_vhat = kAmsgrad ? vhat[at] + 1.0f : 0.0f;
    const auto new_var = static_cast<Storage>(var[at] + g);
    m[at] = new_m;
    v[at] = new_v;
    if constexpr (kAmsgrad) vhat[at] = new_vhat;
    var[at] = new_var;
  }
}

template <class Storage, bool kGrad, bool kAmsgrad>
void touch_share(const List& list, int64_t begin, int64_t end) {
  const int64_t* after = std::upper_bound(list.offsets, list.offsets + list.count, begin);
  for (int64_t i = after - list.offsets - 1; i < list.count && list.offsets[i] < end; ++i) {
    touch<Storage, kGrad, kAmsgrad>(list, i, std::max(begin, list.offsets[i]) - list.offsets[i],
                                    std::min(end, list.offsets[i + 1]) - list.offsets[i]);
  }
}

template <class Storage, bool kGrad, bool kAmsgrad>
void floor_of(const List& list) {
  const int64_t total = list.offsets[list.count];
  if (total < 32768) return touch_share<Storage, kGrad, kAmsgrad>(list, 0, total);
#pragma omp parallel
  {
    const int64_t threads = omp_get_num_threads();
    const int64_t thread = omp_get_thread_num();
    touch_share<Storage, kGrad, kAmsgrad>(list, total * thread / threads, total * (thread + 1) / threads);
  }
}

}  // namespace

extern "C" void floor_float32(const List* list) { floor_of<float, true, false>(*list); }
extern "C" void floor_amsgrad(const List* list) { floor_of<float, true, true>(*list); }
extern "C" void floor_half(const List* list) { floor_of<uint16_t, true, false>(*list); }

// The compute limit: one square root and one division per element of `list`, on numbers that stay in L1.
extern "C" void floor_divider(const List* list) {
  const int64_t total = list->offsets[list->count];
#pragma omp parallel if (total >= 32768)
  {
    constexpr int64_t kBlock = 1024;
    alignas(64) float v[kBlock] = {};
    alignas(64) float quotients[kBlock];
    const int64_t share = total / omp_get_num_threads();
    for (int64_t begin = 0; begin < share; begin += kBlock) {
      const int64_t size = std::min(kBlock, share - begin);
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) quotients[i] = v[i] / (std::sqrt(v[i]) + 1.0f);
      asm volatile("" ::"r"(v), "r"(quotients) : "memory");  // the compiler must assume that both are read and written
    }
  }
}

// A pass over a table in which almost no row has a gradient: 3 reads and 3 writes.
extern "C" void floor_table(const List* list) { floor_of<float, false, false>(*list); }
