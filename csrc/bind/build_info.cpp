// SPDX-License-Identifier: Apache-2.0
#include "build_info.h"

namespace fastadam::bind {

const char* const kCompiler = FASTADAM_COMPILER;
const char* const kCudaBuild = FASTADAM_CUDA_BUILD;

}  // namespace fastadam::bind
