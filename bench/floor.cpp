// SPDX-License-Identifier: Apache-2.0
// Traffic floors: the reads and writes of an Adam step with almost no arithmetic, with all tensors of a list in one
// parallel region. No implementation of Adam can be faster in memory. bench/common.py builds and loads this file.
#include <omp.h>
#ifdef __SSE2__
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

struct List {
  int64_t count;
  const int64_t* offsets;  // the number of elements before each tensor; the last entry is the total
  void* const* var;
  void* const* grad;  // null: gradients are not read
  void* const* m;
  void* const* v;
  void* const* vhat;  // null without AMSGrad
  void* const* copy;  // bfloat16; null without a copy of the variables
  void* const* low;   // the low halves of split masters; null without
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

constexpr int64_t kLine = 32;    // bfloat16 numbers in a cache line
constexpr int64_t kBurst = 512;  // of them are written at once: line by line a step in DRAM took up to a tenth longer

// Writes a burst past the caches: the processor does not read the lines first. `to` begins at a cache line.
void stream(uint16_t* to, const uint16_t* burst) {
#if defined(__AVX__)
  for (int64_t at = 0; at < kBurst; at += 16) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + at),
                        _mm256_load_si256(reinterpret_cast<const __m256i*>(burst + at)));
  }
#elif defined(__SSE2__)
  for (int64_t at = 0; at < kBurst; at += 8) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + at), _mm_load_si128(reinterpret_cast<const __m128i*>(burst + at)));
  }
#else
  std::memcpy(to, burst, sizeof(uint16_t) * kBurst);
#endif
}

void finish_streams() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

float widened(float number) { return number; }
float widened(uint16_t bfloat16) {
  const uint32_t bits = uint32_t{bfloat16} << 16;
  float number;
  std::memcpy(&number, &bits, sizeof number);
  return number;
}

// Truncates the copy: rounding is arithmetic.
template <class Grad>
void touch_with_copy(float* __restrict var, const Grad* __restrict grad, float* __restrict m, float* __restrict v,
                     uint16_t* __restrict copy, int64_t count) {
#pragma omp simd
  for (int64_t at = 0; at < count; ++at) {
    const float new_m = m[at] + 1.0f;
    const float new_v = v[at] - 1.0f;
    const float new_var = var[at] + widened(grad[at]);
    uint32_t bits;
    std::memcpy(&bits, &new_var, sizeof bits);
    m[at] = new_m;
    v[at] = new_v;
    var[at] = new_var;
    copy[at] = static_cast<uint16_t>(bits >> 16);
  }
}

// float32 variables with a bfloat16 copy.
template <class Grad, bool kStream>
struct WithCopy {
  static void touch(const List& list, int64_t i, int64_t begin, int64_t end) {
    float* var = static_cast<float*>(list.var[i]);
    const Grad* grad = static_cast<const Grad*>(list.grad[i]);
    float* m = static_cast<float*>(list.m[i]);
    float* v = static_cast<float*>(list.v[i]);
    uint16_t* copy = static_cast<uint16_t*>(list.copy[i]);
    const auto plain = [&](int64_t from, int64_t to) {
      touch_with_copy(var + from, grad + from, m + from, v + from, copy + from, to - from);
    };
    if constexpr (!kStream) return plain(begin, end);
    const auto past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(copy + begin) % 64 / sizeof(uint16_t));
    int64_t at = std::min(end, begin + (kLine - past) % kLine);
    plain(begin, at);
    for (; at + kBurst <= end; at += kBurst) {
      alignas(64) uint16_t burst[kBurst];
      touch_with_copy(var + at, grad + at, m + at, v + at, burst, kBurst);
      stream(copy + at, burst);
    }
    plain(at, end);
    finish_streams();
  }
};

// Small moments, and gradients like the variables. Scales of 8-bit moments (1/32 byte moved) are left out.
template <class Storage, class Moment, bool kLow>
struct Small {
  static void touch(const List& list, int64_t i, int64_t begin, int64_t end) {
    Storage* __restrict var = static_cast<Storage*>(list.var[i]);
    const Storage* __restrict grad = static_cast<const Storage*>(list.grad[i]);
    Moment* __restrict m = static_cast<Moment*>(list.m[i]);
    Moment* __restrict v = static_cast<Moment*>(list.v[i]);
    uint16_t* __restrict low = kLow ? static_cast<uint16_t*>(list.low[i]) : nullptr;
#pragma omp simd
    for (int64_t at = begin; at < end; ++at) {
      const auto new_m = static_cast<Moment>(m[at] + 1);
      const auto new_v = static_cast<Moment>(v[at] - 1);
      const auto new_low = static_cast<uint16_t>(kLow ? low[at] + 1 : 0);
      const auto new_var = static_cast<Storage>(var[at] + grad[at]);
      m[at] = new_m;
      v[at] = new_v;
      if constexpr (kLow) low[at] = new_low;
      var[at] = new_var;
    }
  }
};

template <class Storage, bool kGrad, bool kAmsgrad>
struct Plain {
  static void touch(const List& list, int64_t i, int64_t begin, int64_t end) {
    ::touch<Storage, kGrad, kAmsgrad>(list, i, begin, end);
  }
};

template <class Kind>
void touch_share(const List& list, int64_t begin, int64_t end) {
  const int64_t* after = std::upper_bound(list.offsets, list.offsets + list.count, begin);
  for (int64_t i = after - list.offsets - 1; i < list.count && list.offsets[i] < end; ++i) {
    Kind::touch(list, i, std::max(begin, list.offsets[i]) - list.offsets[i],
                std::min(end, list.offsets[i + 1]) - list.offsets[i]);
  }
}

template <class Kind>
void floor_of(const List& list) {
  const int64_t total = list.offsets[list.count];
  if (total < 32768) return touch_share<Kind>(list, 0, total);
#pragma omp parallel
  {
    const int64_t threads = omp_get_num_threads();
    const int64_t thread = omp_get_thread_num();
    touch_share<Kind>(list, total * thread / threads, total * (thread + 1) / threads);
  }
}

}  // namespace

extern "C" void floor_float32(const List* list) { floor_of<Plain<float, true, false>>(*list); }
extern "C" void floor_amsgrad(const List* list) { floor_of<Plain<float, true, true>>(*list); }
extern "C" void floor_half(const List* list) { floor_of<Plain<uint16_t, true, false>>(*list); }
extern "C" void floor_copy_float32(const List* list) { floor_of<WithCopy<float, false>>(*list); }
extern "C" void floor_copy_bfloat16(const List* list) { floor_of<WithCopy<uint16_t, false>>(*list); }
extern "C" void floor_copy_float32_streamed(const List* list) { floor_of<WithCopy<float, true>>(*list); }
extern "C" void floor_copy_bfloat16_streamed(const List* list) { floor_of<WithCopy<uint16_t, true>>(*list); }
extern "C" void floor_bfloat16_moments(const List* list) { floor_of<Small<float, uint16_t, false>>(*list); }
extern "C" void floor_8bit_moments(const List* list) { floor_of<Small<float, uint8_t, false>>(*list); }
extern "C" void floor_split_bfloat16_moments(const List* list) { floor_of<Small<uint16_t, uint16_t, true>>(*list); }
extern "C" void floor_split_8bit_moments(const List* list) { floor_of<Small<uint16_t, uint8_t, true>>(*list); }

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
extern "C" void floor_table(const List* list) { floor_of<Plain<float, false, false>>(*list); }
