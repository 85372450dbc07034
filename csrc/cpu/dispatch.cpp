// SPDX-License-Identifier: Apache-2.0
#include "dispatch.h"

#include <atomic>

#include "cpu_features.h"

namespace fastadam::cpu {
namespace {

// CMakeLists.txt defines a macro for each instruction set of the build.
std::vector<Isa> list_isas() {
  return {
#if defined(FASTADAM_BASELINE)
      {"baseline", &baseline::kernels, true},
#endif
#if defined(FASTADAM_AVX2)
      {"avx2", &avx2::kernels, has_avx2()},
#endif
#if defined(FASTADAM_AVX512)
      {"avx512", &avx512::kernels, has_avx512()},
#endif
#if defined(FASTADAM_NEON)
      {"neon", &neon::kernels, true},
#endif
  };
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

// Never destroyed: daemon threads may still make steps while the process exits.
const std::vector<Isa>& isas() {
  static const std::vector<Isa>& list = *new std::vector<Isa>(list_isas());
  return list;
}

const Isa& current_isa() { return *current().load(); }

void set_current_isa(const Isa& isa) { current().store(&isa); }

}  // namespace fastadam::cpu
