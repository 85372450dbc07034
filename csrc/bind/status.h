// SPDX-License-Identifier: Apache-2.0
// Converts statuses of the C interface to exceptions that pybind11 translates.
#pragma once

#include <new>
#include <stdexcept>

#include "../include/fastadam.h"

namespace fastadam::bind {

// Raises ValueError or MemoryError.
inline void require_ok(fastadam_status status) {
  if (status == FASTADAM_NO_MEMORY) throw std::bad_alloc();
  if (status == FASTADAM_INVALID) throw std::invalid_argument(fastadam_error());
}

}  // namespace fastadam::bind
