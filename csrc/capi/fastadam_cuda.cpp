// SPDX-License-Identifier: Apache-2.0
// The entry points of fastadam_cuda.h: checks, then the launches of csrc/cuda.
#include "../include/fastadam_cuda.h"

#include <algorithm>
#include <memory>
#include <optional>

#include "../cuda/device.h"
#include "../cuda/launch.h"
#include "calls.h"

using namespace fastadam;

namespace {

std::string name_of(int64_t place, const char* field) { return "tensors[" + std::to_string(place) + "]." + field; }

// Raises unless `data` is on the device. The current device must be usable; memory of size 0 may be anywhere.
void require_on_device(const void* data, int64_t size, int32_t device, const std::string& name) {
  if (data == nullptr || size == 0) return;
  const cuda::Location location = cuda::location_of(data);
  const bool is_on_device = location.place == cuda::Place::kDevice && location.device == device;
  if (is_on_device || location.place == cuda::Place::kManaged) return;
  throw std::invalid_argument(name + ": " +
                              (location.place == cuda::Place::kHost
                                   ? "CPU memory"
                                   : "memory of CUDA device " + std::to_string(location.device)) +
                              ", expected memory of CUDA device " + std::to_string(device));
}

// An array whose address belongs to the plan.
struct PlanArray {
  const char* name;
  void* TensorArgs::* data;
};
constexpr PlanArray kPlanArrays[] = {{"var", &TensorArgs::var},
                                     {"m", &TensorArgs::m},
                                     {"v", &TensorArgs::v},
                                     {"vhat", &TensorArgs::vhat},
                                     {"average", &TensorArgs::average},
                                     {"accumulator", &TensorArgs::accumulator}};

// During a call: makes the device current and lets the context use the stream.
class Entered {
 public:
  Entered(int32_t device, cuda::Context& context, void* stream) : device_(device), context_(context) {
    context_.enter(stream);
  }
  ~Entered() { context_.leave(); }
  Entered(const Entered&) = delete;
  Entered& operator=(const Entered&) = delete;

 private:
  cuda::DeviceScope device_;
  cuda::Context& context_;
};

}  // namespace

// Its device must be current when it is constructed and destroyed.
struct fastadam_cuda_plan {
  fastadam_cuda_plan(int32_t on, const fastadam_list& list)
      : device(on), heads_(heads_of(list)), tensors_(list.tensors, list.tensors + list.count) {
    for (int64_t i = 0; i < list.count; ++i) check_variable(i);
    const Entered entered(device, *context_, nullptr);
    launch_ = std::make_unique<cuda::Launch>(
        context_, tensors_, Chains{tensors_.data(), heads_.data(), nullptr, static_cast<int64_t>(heads_.size())});
    sorted_.resize(tensors_.size());
    located_gradients_.resize(tensors_.size());
  }

  const fastadam_rows* sort(int64_t place, const IndexArgs& indices, int64_t width, void* stream) {
    if (place < 0 || place >= count()) {
      throw std::invalid_argument("place: " + std::to_string(place) + ", expected one of " + std::to_string(count()) +
                                  " tensors");
    }
    const int64_t size = tensors_[static_cast<size_t>(place)].size;
    const bool fits = width == 0 ? size == 0 : size % width == 0 && size / width == indices.row_count;
    if (!fits) throw std::invalid_argument("row_count, width: do not match " + name_of(place, "size"));
    const cuda::DeviceScope scope(device);
    require_on_device(indices.indices, indices.count, device, "indices");
    const Entered entered(device, *context_, stream);
    Sorted& sorted = sorted_[static_cast<size_t>(place)];
    if (sorted.rows == nullptr) sorted.rows = std::make_unique<cuda::SortedRows>();
    sorted.rows->sort(indices.indices, indices.is_int64, indices.count, indices.row_count, width, place, *context_);
    sorted.row_count = indices.row_count;
    return &sorted.rows->rows();
  }

  void* sum(int64_t place, const void* values, DType dtype, void* stream) {
    if (place < 0 || place >= count() || sorted_[static_cast<size_t>(place)].rows == nullptr) {
      throw std::invalid_argument("place: " + std::to_string(place) +
                                  " has no sorted rows, expected fastadam_cuda_sort_rows first");
    }
    cuda::SortedRows& rows = *sorted_[static_cast<size_t>(place)].rows;
    const int64_t size = rows.rows().count * rows.rows().width;
    if (size > 0 &&
        (values == nullptr || reinterpret_cast<uintptr_t>(values) % static_cast<uintptr_t>(size_of(dtype)))) {
      throw std::invalid_argument("values: null or misaligned");
    }
    const cuda::DeviceScope scope(device);
    require_on_device(values, size, device, "values");
    const Entered entered(device, *context_, stream);
    return rows.sum(values, dtype, *context_);
  }

  // Raises unless `list` is the list of the plan. Call this before all other checks.
  void check_list(const fastadam_list& list) const {
    if (list.count != count()) {
      throw std::invalid_argument("list: " + std::to_string(list.count) + " tensors, expected the " +
                                  std::to_string(count()) + " of the plan");
    }
    if (heads_of(list) != heads_) throw std::invalid_argument("heads: differ from the heads of the plan");
    for (int64_t i = 0; i < count(); ++i) check_tensor(list.tensors[i], i);
  }

  // Runs `work` on the stream. Raises if the device has reported an invalid index.
  template <class Run>
  fastadam_status run(const fastadam_list& list, void* stream, Run work) {
    const cuda::DeviceScope scope(device);
    for (int64_t i = 0; i < count(); ++i) locate_gradient(list.tensors[i], i);
    const Entered entered(device, *context_, stream);
    if (!context_->is_capturing() && find_failure()) throw std::invalid_argument(failure_text());
    call_tensors_.assign(list.tensors, list.tensors + list.count);
    return work(*launch_, call_tensors_, context_->is_capturing())
               ? fastadam_status{FASTADAM_OK}
               : fail(FASTADAM_NOT_FINITE, "a gradient is not finite");
  }

  // If an index was invalid, sets the error message and returns the last step before it.
  std::optional<int64_t> wait() {
    const cuda::DeviceScope scope(device);
    context_->wait();
    if (!find_failure()) return std::nullopt;
    fail(FASTADAM_INVALID, failure_text().c_str());
    const int64_t step = failure_->call;
    failure_.reset();
    return step;
  }

  const int32_t device;
  int64_t last_step = 0;

 private:
  struct Sorted {
    std::unique_ptr<cuda::SortedRows> rows;  // with memory for the next step
    int64_t row_count = 0;
  };

  int64_t count() const { return static_cast<int64_t>(tensors_.size()); }

  void check_variable(int64_t i) const {
    const TensorArgs& tensor = tensors_[static_cast<size_t>(i)];
    const TensorCheck check(tensor, i, RowChecks::kShape);
    check.check_variable();
    if (tensor.stale != nullptr) check.refuse("stale", "not null, expected null");
    for (const PlanArray& array : kPlanArrays) {
      require_on_device(tensor.*array.data, tensor.size, device, name_of(i, array.name));
    }
  }

  void check_tensor(const TensorArgs& tensor, int64_t i) const {
    const TensorArgs& own = tensors_[static_cast<size_t>(i)];
    const TensorCheck check(tensor, i, RowChecks::kShape);
    for (const PlanArray& array : kPlanArrays) {
      if (tensor.*array.data != own.*array.data) check.refuse(array.name, "expected the array of the plan");
    }
    const bool same = tensor.size == own.size && tensor.dtype == own.dtype && tensor.next == own.next &&
                      tensor.decays == own.decays && tensor.moments == own.moments;
    if (!same) check.refuse("size, dtype, next, decays, moments", "expected the values of the plan");
    if (tensor.stale != nullptr) check.refuse("stale", "not null, expected null");
    const cuda::SortedRows* sorted = sorted_[static_cast<size_t>(i)].rows.get();
    if (tensor.rows != nullptr && (sorted == nullptr || tensor.rows != &sorted->rows())) {
      check.refuse("rows", "expected the result of fastadam_cuda_sort_rows for this tensor");
    }
  }

  void locate_gradient(const TensorArgs& tensor, int64_t i) {
    const void*& last = located_gradients_[static_cast<size_t>(i)];
    if (tensor.grad == last || tensor.grad_size == 0) return;
    require_on_device(tensor.grad, tensor.grad_size, device, name_of(i, "grad"));
    last = tensor.grad;
  }

  bool find_failure() {
    if (!failure_) failure_ = context_->take_failure();
    return failure_.has_value();
  }

  std::string failure_text() const {
    return "indices[" + std::to_string(failure_->position) + "] of tensors[" + std::to_string(failure_->source) +
           "]: " + std::to_string(failure_->index) + " is not a row, expected 0 <= index < " +
           std::to_string(sorted_[static_cast<size_t>(failure_->source)].row_count);
  }

  std::vector<int64_t> heads_;
  std::vector<TensorArgs> tensors_;
  std::shared_ptr<cuda::Context> context_ = std::make_shared<cuda::Context>();
  std::unique_ptr<cuda::Launch> launch_;
  std::vector<Sorted> sorted_;                  // by tensor
  std::vector<const void*> located_gradients_;  // the last gradients that were found on the device
  std::vector<TensorArgs> call_tensors_;        // the tensors of the current call
  std::optional<cuda::Failure> failure_;        // not reported yet
};

namespace {

template <class Work>
fastadam_status guarded_cuda(Work work) {
  return guarded([&] {
    try {
      return work();
    } catch (const std::runtime_error& error) {
      return fail(FASTADAM_CUDA_ERROR, error.what());
    }
  });
}

// The checks of every call with a plan and a list.
void check_call(const fastadam_cuda_plan* plan, const fastadam_list* list) {
  if (plan == nullptr) throw std::invalid_argument("plan: null");
  check_list(list);
  check_chains(list, false);
  plan->check_list(*list);
}

// Raises if an option is set that only the CPU has.
void refuse_host_options(const fastadam_list& list, const AdamHyper& hyper) {
  if (hyper.zero_gradients) throw std::invalid_argument("zero_gradients: true, expected false on a GPU");
  for (int64_t i = 0; i < list.count; ++i) {
    const TensorArgs& tensor = list.tensors[i];
    const TensorCheck check(tensor, i, RowChecks::kShape);
    if (tensor.copy != nullptr) check.refuse("copy", "not null, expected null on a GPU");
    if (is_small(tensor)) check.refuse("moments, low, stochastic", "expected wide or half moments alone on a GPU");
    if (tensor.telemetry != nullptr) check.refuse("telemetry", "not null, expected null on a GPU");
    const bool is_half = size_of(tensor.grad_dtype) == 2;
    if (is_half && tensor.grad_dtype != tensor.dtype)
      check.refuse("grad_dtype", "a half type, expected dtype on a GPU");
  }
}

}  // namespace

extern "C" {

int32_t fastadam_cuda_device_count(void) {
  std::string reason;
  const int32_t count = cuda::device_count(reason);
  if (count == 0) fail(FASTADAM_CUDA_ERROR, reason.c_str());
  return count;
}

fastadam_status fastadam_cuda_plan_create(int32_t device, const fastadam_list* list, fastadam_cuda_plan** plan) {
  return guarded_cuda([&] {
    if (plan == nullptr) throw std::invalid_argument("plan: null");
    check_list(list);
    check_chains(list, false);
    const cuda::DeviceScope scope(device);
    *plan = new fastadam_cuda_plan(device, *list);
    return fastadam_status{FASTADAM_OK};
  });
}

fastadam_status fastadam_cuda_plan_destroy(fastadam_cuda_plan* plan) {
  if (plan == nullptr) return FASTADAM_OK;
  return guarded_cuda([&] {
    const cuda::DeviceScope scope(plan->device);
    delete plan;
    return fastadam_status{FASTADAM_OK};
  });
}

fastadam_status fastadam_cuda_sort_rows(fastadam_cuda_plan* plan, int64_t place, const void* indices, bool is_int64,
                                        int64_t count, int64_t row_count, int64_t width, void* stream,
                                        const fastadam_rows** rows) {
  return guarded_cuda([&] {
    if (plan == nullptr || rows == nullptr) throw std::invalid_argument("plan or rows: null");
    check_indices(indices, is_int64, count, row_count, width);
    IndexArgs args{};
    args.indices = indices;
    args.is_int64 = is_int64;
    args.count = count;
    args.row_count = row_count;
    *rows = plan->sort(place, args, width, stream);
    return fastadam_status{FASTADAM_OK};
  });
}

fastadam_status fastadam_cuda_sum_rows(fastadam_cuda_plan* plan, int64_t place, const void* values,
                                       fastadam_dtype dtype, void* stream, void** sums) {
  return guarded_cuda([&] {
    if (plan == nullptr || sums == nullptr) throw std::invalid_argument("plan or sums: null");
    if (dtype < FASTADAM_FLOAT16 || dtype > FASTADAM_FLOAT64)
      throw std::invalid_argument("dtype: " + std::to_string(static_cast<int>(dtype)) + ", expected a fastadam_dtype");
    *sums = plan->sum(place, values, dtype, stream);
    return fastadam_status{FASTADAM_OK};
  });
}

fastadam_status fastadam_cuda_step(fastadam_cuda_plan* plan, const fastadam_list* list, const fastadam_hyper* hyper,
                                   bool lazy, void* stream) {
  return guarded_cuda([&] {
    check_call(plan, list);
    if (hyper == nullptr) throw std::invalid_argument("hyper: null");
    check_hyper(*hyper);
    refuse_host_options(*list, *hyper);
    const StepArgs args = step_args(*list, *hyper, lazy, RowChecks::kShape);
    return plan->run(
        *list, stream, [&](cuda::Launch& launch, const std::vector<TensorArgs>& tensors, bool is_capturing) {
          if (is_capturing && hyper->require_finite) {
            throw std::invalid_argument(
                "require_finite: true, expected false: a step that waits for its gradients cannot be captured");
          }
          const bool is_done = launch.step(args, tensors, *hyper, cuda::DeviceNumbers{}, hyper->step - 1);
          if (is_done) plan->last_step = hyper->step;
          return is_done;
        });
  });
}

fastadam_status fastadam_cuda_accumulate(fastadam_cuda_plan* plan, const fastadam_list* list, bool restart,
                                         bool require_finite, void* stream) {
  return guarded_cuda([&] {
    check_call(plan, list);
    for (int64_t i = 0; i < list->count; ++i) {
      TensorCheck(list->tensors[i], i, RowChecks::kShape).check_accumulate();
    }
    check_totals(*list);
    return plan->run(*list, stream,
                     [&](cuda::Launch& launch, const std::vector<TensorArgs>& tensors, bool is_capturing) {
                       if (is_capturing)
                         throw std::invalid_argument(
                             "stream: is being captured, expected a step: an accumulation cannot be captured");
                       return launch.accumulate(restart, require_finite, tensors, plan->last_step);
                     });
  });
}

fastadam_status fastadam_cuda_sum_squares(fastadam_cuda_plan* plan, const fastadam_list* list, double* sums,
                                          void* stream) {
  return guarded_cuda([&] {
    check_call(plan, list);
    if (list->count > 0 && (sums == nullptr || reinterpret_cast<uintptr_t>(sums) % sizeof(double) != 0)) {
      throw std::invalid_argument("sums: null or misaligned");
    }
    for (int64_t i = 0; i < list->count; ++i) {
      TensorCheck(list->tensors[i], i, RowChecks::kShape).check_gradient_alone();
    }
    check_total(*list, &TensorArgs::grad_size);
    return plan->run(*list, stream, [&](cuda::Launch& launch, const std::vector<TensorArgs>& tensors, bool) {
      require_on_device(sums, list->count, plan->device, "sums");
      launch.sum_squares(tensors, sums);
      return true;
    });
  });
}

fastadam_status fastadam_cuda_wait(fastadam_cuda_plan* plan, int64_t* step) {
  return guarded_cuda([&] {
    if (plan == nullptr) throw std::invalid_argument("plan: null");
    const std::optional<int64_t> failed = plan->wait();
    if (step != nullptr) *step = failed.value_or(0);
    return failed ? fastadam_status{FASTADAM_INVALID} : fastadam_status{FASTADAM_OK};
  });
}

const char* fastadam_cuda_error(void) { return message; }

}  // extern "C"
