// SPDX-License-Identifier: Apache-2.0
// For the native tests: a launch of CUDA threads, run on the CPU.
#pragma once

#include "../../csrc/cpu/flush_denormals.h"

namespace kernel_test {

// Block by block, phase by phase, the threads of a phase in falling order: as good as any on a GPU.
template <class Body>
void emulate(const Body& body, int64_t blocks) {
  const fastadam::cpu::FlushDenormals flush;
  for (int64_t block = 0; block < blocks; ++block) {
    typename Body::Shared shared{};
    for (int phase = 0; phase < body.phases(); ++phase) {
      for (int64_t thread = Body::kThreads - 1; thread >= 0; --thread) body.phase(phase, block, thread, shared);
    }
  }
}

}  // namespace kernel_test
