// SPDX-License-Identifier: Apache-2.0
// The instruction sets of this build: which of them this CPU supports, and which one is in use.
#pragma once

#include <vector>

#include "kernels.h"

namespace fastadam::cpu {

struct Isa {
  const char* name;
  const Kernels* kernels;
  bool usable;  // this CPU supports it
};

// The instruction sets of this build, from the plainest to the widest. The last usable one is the default.
const std::vector<Isa>& isas();

const Isa& current_isa();

// `isa` must be an element of isas() and usable.
void set_current_isa(const Isa& isa);

}  // namespace fastadam::cpu
