// SPDX-License-Identifier: Apache-2.0
// The entry points of fastadam.h: they check and prepare, then call run.h.
#include "../include/fastadam.h"

#include <limits>
#include <string>
#include <vector>

#include "../cpu/dispatch.h"
#include "../cpu/launch.h"
#include "calls.h"
#include "norms.h"
#include "run.h"

namespace {

using namespace fastadam;

// The variables of a list: grouped by its heads, or one for each tensor.
class Variables {
 public:
  Variables(const fastadam_list& list, bool lazy)
      : chains_{list.tensors, list.heads, list.offsets, list.variable_count} {
    if (list.heads != nullptr) {
      check(list, lazy);
      return;
    }
    heads_.reserve(static_cast<size_t>(list.count));
    offsets_.reserve(static_cast<size_t>(list.count) + 1);
    offsets_.push_back(0);
    for (int64_t i = 0; i < list.count; ++i) {
      heads_.push_back(i);
      offsets_.push_back(offsets_.back() + moved_elements(list.tensors[i], lazy));  // at most check_totals()
    }
    chains_ = {list.tensors, heads_.data(), offsets_.data(), list.count};
  }
  Variables(const Variables&) = delete;
  Variables& operator=(const Variables&) = delete;

  const Chains& chains() const { return chains_; }

 private:
  static void check(const fastadam_list& list, bool lazy) {
    heads_of(list);
    bool fits = list.offsets != nullptr && list.variable_count >= 0 && list.offsets[0] == 0;
    int64_t total = 0;
    for (int64_t k = 0; fits && k < list.variable_count; ++k) {
      total += moved_elements(list.tensors[list.heads[k]], lazy);
      fits = list.offsets[k + 1] == total;
    }
    if (!fits) throw std::invalid_argument("heads, offsets: do not match the tensors");
  }

  Chains chains_;
  std::vector<int64_t> heads_;
  std::vector<int64_t> offsets_;
};

fastadam_status status_of(bool is_done) {
  return is_done ? fastadam_status{FASTADAM_OK} : fail(FASTADAM_NOT_FINITE, "a gradient is not finite");
}

// Of the gradients of a list, which it checks. It passes on nothing but them: other fields have not been checked.
GradientNorms norms_of_checked(const fastadam_list& list) {
  std::vector<TensorArgs> gradients;
  gradients.reserve(static_cast<size_t>(list.count));
  for (int64_t i = 0; i < list.count; ++i) {
    const TensorArgs& given = list.tensors[i];
    TensorCheck(given, i, RowChecks::kAll).check_gradient_alone();
    gradients.push_back(fastadam_dense(nullptr, given.grad, nullptr, nullptr, given.grad_size, given.grad_dtype));
  }
  check_total(list, &TensorArgs::grad_size);
  // Without the part of Norms that points to the gradients, which end here.
  return Norms(gradients.data(), list.count, std::numeric_limits<double>::infinity(), false);
}

const cpu::Isa* isa_at(int32_t i) {
  const std::vector<cpu::Isa>& isas = cpu::isas();
  return i >= 0 && static_cast<size_t>(i) < isas.size() ? &isas[static_cast<size_t>(i)] : nullptr;
}

}  // namespace

extern "C" {

fastadam_status fastadam_step(const fastadam_list* list, const fastadam_hyper* hyper, bool lazy) {
  return guarded([&] {
    check_list(list);
    check_chains(list, lazy);
    if (hyper == nullptr) throw std::invalid_argument("hyper: null");
    check_hyper(*hyper);
    StepArgs args = step_args(*list, *hyper, lazy, RowChecks::kAll);
    const Variables variables(*list, lazy);
    args.chains = variables.chains();
    return status_of(run_step(args, list->count, *hyper));
  });
}

fastadam_status fastadam_accumulate(const fastadam_list* list, bool restart, bool require_finite) {
  return guarded([&] {
    check_list(list);
    check_chains(list, false);
    for (int64_t i = 0; i < list->count; ++i) TensorCheck(list->tensors[i], i, RowChecks::kAll).check_accumulate();
    check_totals(*list);
    const Variables variables(*list, false);
    return status_of(run_accumulate({variables.chains(), restart}, list->count, require_finite));
  });
}

int64_t fastadam_sort_memory(int64_t count) { return count < 0 || count > kMostIndices ? -1 : 4 * count + 2; }

fastadam_status fastadam_sort_rows(const void* indices, bool is_int64, int64_t count, int64_t row_count, int64_t width,
                                   int64_t* memory, fastadam_rows* rows, int64_t* bad) {
  return guarded([&] {
    check_indices(indices, is_int64, count, row_count, width);
    if (memory == nullptr || rows == nullptr) throw std::invalid_argument("memory or rows: null");
    if (reinterpret_cast<uintptr_t>(memory) % sizeof(int64_t) != 0) {
      throw std::invalid_argument("memory: misaligned, expected an array of int64");
    }
    IndexArgs args{};
    args.indices = indices;
    args.is_int64 = is_int64;
    args.count = count;
    args.row_count = row_count;
    args.keys = memory;
    args.spare_keys = args.keys + count + 1;
    args.order = args.spare_keys + count + 1;
    args.spare_order = args.order + count;
    cpu::index_rows(args);
    if (bad != nullptr) *bad = args.bad;
    if (args.bad >= 0) {
      throw std::invalid_argument("indices[" + std::to_string(args.bad) + "]: " + std::to_string(args.keys[args.bad]) +
                                  " is not a row, expected 0 <= index < " + std::to_string(row_count));
    }
    *rows = {args.keys, args.spare_keys, args.order, args.unique, width};
    return fastadam_status{FASTADAM_OK};
  });
}

fastadam_status fastadam_sum_rows(const fastadam_list* list, void* const* sums) {
  return guarded([&] {
    check_list(list);
    if (sums == nullptr && list->count > 0) throw std::invalid_argument("sums: null");
    int64_t value_count = 0;
    for (int64_t i = 0; i < list->count; ++i) {
      const TensorArgs& tensor = list->tensors[i];
      if (sums[i] == nullptr) continue;
      if (tensor.rows == nullptr) throw std::invalid_argument("tensors[" + std::to_string(i) + "].rows: null");
      const TensorCheck check(tensor, i, RowChecks::kAll);
      check.check_gradient_alone();
      check.check_rows();
      check.check_sums(sums[i]);
      value_count += tensor.grad_size;
      if (value_count > kMostElements) {
        throw std::invalid_argument("tensors: more than 2^59 elements together, expected fewer");
      }
    }
    run_sum_rows(list->tensors, list->count, sums);
    return fastadam_status{FASTADAM_OK};
  });
}

fastadam_status fastadam_sum_squares(const fastadam_list* list, double* sums) {
  return guarded([&] {
    check_list(list);
    if (sums == nullptr && list->count > 0) throw std::invalid_argument("sums: null");
    const GradientNorms norms = norms_of_checked(*list);
    for (int64_t i = 0; i < list->count; ++i) sums[i] = norms.sums()[static_cast<size_t>(i)].square;
    return fastadam_status{FASTADAM_OK};
  });
}

fastadam_status fastadam_norm(const fastadam_list* list, double* norm) {
  return guarded([&] {
    check_list(list);
    if (norm == nullptr) throw std::invalid_argument("norm: null");
    *norm = norms_of_checked(*list).joint();
    return fastadam_status{FASTADAM_OK};
  });
}

fastadam_status fastadam_set_num_threads(int32_t count) {
  if (count < 0 || count > FASTADAM_MOST_THREADS) {
    return fail(
        FASTADAM_INVALID,
        ("count: " + std::to_string(count) + ", expected 0 to " + std::to_string(FASTADAM_MOST_THREADS)).c_str());
  }
  cpu::set_num_threads(count);
  return FASTADAM_OK;
}

int32_t fastadam_num_threads(void) { return cpu::num_threads(); }
int32_t fastadam_requested_threads(void) { return cpu::requested_threads(); }

const char* fastadam_isa(int32_t i) { return isa_at(i) == nullptr ? nullptr : isa_at(i)->name; }
bool fastadam_isa_is_usable(int32_t i) { return isa_at(i) != nullptr && isa_at(i)->usable; }
const char* fastadam_current_isa(void) { return cpu::current_isa().name; }

fastadam_status fastadam_set_isa(const char* name) {
  for (const cpu::Isa& isa : cpu::isas()) {
    if (name == nullptr || std::string(name) != isa.name || !isa.usable) continue;
    cpu::set_current_isa(isa);
    return FASTADAM_OK;
  }
  return fail(FASTADAM_INVALID, "name: expected an instruction set of this build that this CPU supports");
}

int32_t fastadam_abi(void) { return FASTADAM_ABI; }
const char* fastadam_version(void) { return FASTADAM_VERSION; }
const char* fastadam_error(void) { return message; }

}  // extern "C"
