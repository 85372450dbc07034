// SPDX-License-Identifier: Apache-2.0
// Runs the threads of a kernel.
#pragma once

#include <cuda_runtime.h>

#include <functional>

namespace fake_cuda {

bool is_launchable(const dim3& grid, const dim3& block);

// Runs block by block. Between barriers the threads of a block run in descending order. Returns false if a thread
// threw. Not reentrant.
bool run_grid(const dim3& grid, const dim3& block, const std::function<void()>& thread);

}  // namespace fake_cuda
