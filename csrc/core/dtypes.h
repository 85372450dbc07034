// SPDX-License-Identifier: Apache-2.0
// Element types: how each is stored, converted for arithmetic, and rounded when stored again. Every kernel and the
// bindings include this file, so it must not depend on Python, OpenMP, the CUDA runtime or std containers. The
// conversions have no branches, so that compilers vectorise them for every instruction set, and no denormal operands,
// which would be flushed.
#pragma once

#include <cstdint>
#include <cstring>

#include "../include/fastadam.h"

// Always inlined: if an object compiled for AVX-512 contained an out-of-line copy, the linker could use it everywhere.
#if defined(__CUDACC__)
#define FASTADAM_INLINE __host__ __device__ __forceinline__
#else
#define FASTADAM_INLINE inline __attribute__((always_inline))
#endif

namespace fastadam {

using DType = fastadam_dtype;
constexpr int kDTypeCount = 4;

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// The half types use float32 for arithmetic and state: in TF's own half arithmetic bfloat16 variables never change.
template <class Storage>
struct ComputeOf {
  using type = Storage;
};
template <>
struct ComputeOf<Float16> {
  using type = float;
};
template <>
struct ComputeOf<BFloat16> {
  using type = float;
};
template <class Storage>
using Compute = typename ComputeOf<Storage>::type;

template <class To, class From>
FASTADAM_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

FASTADAM_INLINE float load(float x) { return x; }
FASTADAM_INLINE double load(double x) { return x; }

FASTADAM_INLINE float load(BFloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

FASTADAM_INLINE float load(Float16 x) {
  const uint32_t magnitude = x.bits & 0x7fffu;
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  // Changes the exponent bias from 15 to 127. Infinities and NaNs need the all-ones exponent, which is 112 higher
  // still.
  const uint32_t normal = (magnitude << 13) + (magnitude >= 0x7c00u ? 0x70000000u : 0x38000000u);
  const uint32_t subnormal = bit_cast<uint32_t>(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  return bit_cast<float>(sign | (magnitude < 0x400u ? subnormal : normal));
}

// store<Storage>(x) rounds to nearest even. NaN stays NaN; overflow becomes infinity.
template <class Storage>
FASTADAM_INLINE Storage store(Compute<Storage> x) {
  return x;
}

template <>
FASTADAM_INLINE BFloat16 store<BFloat16>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet_nan = (bits >> 16) | 0x40u;
  return {static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded)};
}

template <>
FASTADAM_INLINE Float16 store<Float16>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14 float16 values are 2^-24 apart, as float32 values are at 0.5, so adding 0.5 does the rounding.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;                                  // 65520 and above
  half = magnitude > 0x7f800000u ? (0x7e00u | ((magnitude >> 13) & 0x1ffu)) : half;  // quiet NaN
  return {static_cast<uint16_t>(sign | half)};
}

FASTADAM_INLINE int64_t size_of(DType dtype) {
  return dtype == FASTADAM_FLOAT64 ? 8 : dtype == FASTADAM_FLOAT32 ? 4 : 2;
}

// The dtype of m, v and vhat of a variable of this dtype.
FASTADAM_INLINE DType state_dtype(DType dtype) {
  return dtype == FASTADAM_FLOAT64 ? FASTADAM_FLOAT64 : FASTADAM_FLOAT32;
}

}  // namespace fastadam
