// SPDX-License-Identifier: Apache-2.0
// What the entry points of fastadam.h and fastadam_cuda.h share: the error message, exceptions, the checks of a list.
#pragma once

#include <algorithm>
#include <cstdio>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "../core/float_mode.h"
#include "prepare.h"
#include "step_checks.h"

namespace fastadam {

inline thread_local char message[256] = "";

inline fastadam_status fail(fastadam_status status, const char* what) {
  std::snprintf(message, sizeof(message), "%s", what);
  return status;
}

// No exception leaves the library, and the caller's floating-point mode does not enter it.
template <class Work>
fastadam_status guarded(Work work) {
  const DefaultArithmetic arithmetic;
  try {
    return work();
  } catch (const std::invalid_argument& refusal) {
    return fail(FASTADAM_INVALID, refusal.what());
  } catch (const std::bad_alloc&) {
    return fail(FASTADAM_NO_MEMORY, "out of memory");
  } catch (const std::length_error&) {  // a vector longer than memory can be
    return fail(FASTADAM_NO_MEMORY, "out of memory");
  }
}

inline void check_list(const fastadam_list* list) {
  if (list == nullptr) throw std::invalid_argument("list: null");
  if (list->abi != FASTADAM_ABI) {
    throw std::invalid_argument("list: ABI " + std::to_string(list->abi) + ", expected " +
                                std::to_string(FASTADAM_ABI) + ", the ABI of this library");
  }
  if (list->count < 0) {
    throw std::invalid_argument("count: " + std::to_string(list->count) + ", expected 0 or more tensors");
  }
  if (list->tensors == nullptr && list->count > 0) throw std::invalid_argument("tensors: null");
  if (list->heads == nullptr && list->offsets != nullptr) {
    throw std::invalid_argument("offsets: expected null without heads");
  }
}

// Raises if a sum of the sizes of all tensors could overflow. The sizes themselves have been checked.
inline void check_total(const fastadam_list& list, int64_t TensorArgs::* size) {
  int64_t total = 0;
  for (int64_t i = 0; i < list.count; ++i) {
    total += list.tensors[i].*size;
    if (total > kMostElements) throw std::invalid_argument("tensors: more than 2^59 elements together, expected fewer");
  }
}

inline void check_totals(const fastadam_list& list) {
  check_total(list, &TensorArgs::size);
  check_total(list, &TensorArgs::grad_size);
}

// The arguments of fastadam_sort_rows and fastadam_cuda_sort_rows.
inline void check_indices(const void* indices, bool is_int64, int64_t count, int64_t row_count, int64_t width) {
  if (count < 0 || count > kMostIndices) {
    throw std::invalid_argument("count: " + std::to_string(count) + ", expected 0 to 2^57");
  }
  if (product(row_count, width) < 0 || product(count, width) < 0) {
    throw std::invalid_argument("row_count, width: " + std::to_string(row_count) + ", " + std::to_string(width) +
                                ", expected 0 or more each and tables and gradients of at most 2^59 elements");
  }
  const uintptr_t item_size = is_int64 ? 8 : 4;
  if (count > 0 && (indices == nullptr || reinterpret_cast<uintptr_t>(indices) % item_size != 0)) {
    throw std::invalid_argument("indices: null or misaligned, expected an array of " +
                                std::string(is_int64 ? "int64" : "int32"));
  }
}

// In a lazy step a variable with rows may have only one gradient, because threads share its rows, not its elements.
inline void check_chains(const fastadam_list* list, bool lazy) {
  for (int64_t i = 0; i < list->count; ++i) {
    const TensorArgs& tensor = list->tensors[i];
    if (tensor.next == -1) continue;
    const auto refuse = [&](const char* why) {
      throw std::invalid_argument("tensors[" + std::to_string(i) + "].next: " + std::to_string(tensor.next) + why);
    };
    const bool exists = list->heads != nullptr && tensor.next > i && tensor.next < list->count;
    const TensorArgs* next = exists ? list->tensors + tensor.next : nullptr;
    if (!exists || next->var != tensor.var || next->size != tensor.size) {
      refuse(", expected -1 or, in a list with heads, a later tensor of the same variable");
    }
    if (lazy && (tensor.rows != nullptr || next->rows != nullptr)) {
      refuse(" for a tensor with rows, expected -1 in a lazy step");
    }
  }
}

// The first tensor of each variable: list.heads, or every tensor if that is null. Raises unless each tensor belongs to
// exactly one variable.
inline std::vector<int64_t> heads_of(const fastadam_list& list) {
  std::vector<int64_t> heads;
  std::vector<bool> is_reached(static_cast<size_t>(list.count));
  int64_t reached = 0;
  bool fits = true;
  const int64_t count = list.heads != nullptr ? list.variable_count : list.count;
  for (int64_t k = 0; fits && k < count; ++k) {
    heads.push_back(list.heads != nullptr ? list.heads[k] : k);
    fits = heads.back() >= 0 && heads.back() < list.count;
    for (int64_t t = heads.back(); fits && t >= 0; t = list.tensors[t].next, ++reached) {
      fits = !is_reached[static_cast<size_t>(t)];
      is_reached[static_cast<size_t>(t)] = true;
    }
  }
  if (fits && reached == list.count) return heads;
  throw std::invalid_argument("heads: expected each tensor to belong to exactly one variable");
}

// Checks every tensor, and returns everything that a step needs except its chains.
inline StepArgs step_args(const fastadam_list& list, const AdamHyper& hyper, bool lazy, RowChecks row_checks) {
  const bool amsgrad =
      std::any_of(list.tensors, list.tensors + list.count, [](const auto& t) { return t.vhat != nullptr; });
  for (int64_t i = 0; i < list.count; ++i) TensorCheck(list.tensors[i], i, row_checks).check_step(hyper, amsgrad);
  check_totals(list);
  return prepare_step(list.tensors, list.count, hyper, lazy);
}

}  // namespace fastadam
