// SPDX-License-Identifier: Apache-2.0
#include "dispatch.h"

#if defined(FASTADAM_X86)
#include <cpuid.h>
#endif

#include <atomic>

namespace fastadam::cpu {
namespace {

std::vector<Isa> list_isas() {
#if defined(FASTADAM_X86)
  __builtin_cpu_init();
  unsigned a = 0;
  unsigned b = 0;
  unsigned c = 0;
  unsigned d = 0;
  const bool has_f16c = __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
  const bool has_avx2 = has_f16c && __builtin_cpu_supports("avx2");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return {{"baseline", &baseline::kernels, true},
          {"avx2", &avx2::kernels, has_avx2},
          {"avx512", &avx512::kernels, has_avx512}};
#elif defined(FASTADAM_AARCH64)
  return {{"neon", &neon::kernels, true}};
#else
  return {{"baseline", &baseline::kernels, true}};
#endif
}

const Isa* widest_usable() {
  const Isa* widest = nullptr;
  for (const Isa& isa : isas()) {
    if (isa.usable) widest = &isa;
  }
  return widest;
}

std::atomic<const Isa*>& current() {
  static std::atomic<const Isa*> isa{widest_usable()};
  return isa;
}

}  // namespace

const std::vector<Isa>& isas() {
  static const std::vector<Isa> list = list_isas();
  return list;
}

const Isa& current_isa() { return *current().load(); }

void set_current_isa(const Isa& isa) { current().store(&isa); }

}  // namespace fastadam::cpu
