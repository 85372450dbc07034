// SPDX-License-Identifier: Apache-2.0
// Which instruction sets this build holds, which of them this CPU runs, and which one is used.
#pragma once

#include <vector>

#include "kernels.h"

namespace fastadam::cpu {

struct Isa {
  const char* name;
  const Kernels* kernels;
  bool usable;  // by this CPU
};

// Those compiled in, from the plainest to the widest. The last usable one is the default.
const std::vector<Isa>& isas();

const Isa& current_isa();

// `isa` is an element of isas() and usable.
void set_current_isa(const Isa& isa);

}  // namespace fastadam::cpu
