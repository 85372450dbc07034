// SPDX-License-Identifier: Apache-2.0
// Detects which instruction sets of kernels.h this CPU supports. isas.cmake compiles this header on its own when CMake
// configures a build.
#pragma once

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fastadam::cpu {

#if defined(__x86_64__)
inline bool has_avx2() {
  __builtin_cpu_init();
  unsigned a = 0;
  unsigned b = 0;
  unsigned c = 0;
  unsigned d = 0;
  const bool has_f16c = __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
  return has_f16c && __builtin_cpu_supports("avx2");
}

inline bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#else
inline bool has_avx2() { return false; }
inline bool has_avx512() { return false; }
#endif

}  // namespace fastadam::cpu
