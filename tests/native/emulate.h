// SPDX-License-Identifier: Apache-2.0
// For the native tests: runs a launch of CUDA threads on the CPU.
#pragma once

#include "../../csrc/core/float_mode.h"

namespace kernel_test {

// Runs block by block and phase by phase. The threads of a phase run in descending order, which is as valid as any
// order on a GPU.
template <class Kernel>
void emulate(const Kernel& kernel, int64_t blocks) {
  const fastadam::FlushDenormals flush;
  for (int64_t block = 0; block < blocks; ++block) {
    typename Kernel::Shared shared{};
    for (int phase = 0; phase < kernel.phases(); ++phase) {
      for (int64_t thread = Kernel::kThreads - 1; thread >= 0; --thread) kernel.phase(phase, block, thread, shared);
    }
  }
}

}  // namespace kernel_test
