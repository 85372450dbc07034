// SPDX-License-Identifier: Apache-2.0
// What the Python extension may do and a C program may not.
#pragma once

#include "fastadam.h"

namespace fastadam {

// The `abi` of lists whose chains, rows and histories were made by this very build: they are not checked once more, and
// `stale` may be set.
constexpr int32_t kTrustedAbi = FASTADAM_ABI | (1 << 30);

}  // namespace fastadam
