// SPDX-License-Identifier: Apache-2.0
// What the build knows, for show_config(): in a source of its own, so that no other is compiled again when it differs.
#pragma once

namespace fastadam::bind {

extern const char* const kCompiler;
extern const char* const kCudaBuild;

}  // namespace fastadam::bind
