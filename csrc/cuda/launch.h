// SPDX-License-Identifier: Apache-2.0
// Entry points of the CUDA backend. The caller has checked the arguments, made the device current and, where a Context
// is used, entered it. Errors of the CUDA runtime are thrown as std::runtime_error. This header includes no CUDA
// header: a `void* stream` is a cudaStream_t.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "../core/step_args.h"
#include "../core/step_scalars.h"
#include "index_kernels.h"

namespace fastadam::cuda {

// A deferred table on a device, which uses `last` instead of `from`.
struct DeviceStale : StaleRows {
  int32_t* last;  // the number of steps of the history that each row has had
};

// An invalid index. The steps from `call` on have changed nothing.
struct Failure {
  int64_t call;
  int64_t source;  // the argument of SortedRows::sort
  int64_t position;
  int64_t index;
};

// What all launches of one optimizer share on one device: t, and whether an index was invalid.
class FASTADAM_API Context {
 public:
  Context();  // waits for the device
  ~Context();
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  // Until leave(), work goes to this stream. It runs after all earlier work of this context, on whatever stream.
  void enter(void* stream);
  void leave();
  void* stream() const;
  bool is_capturing() const;

  void wait();  // for the device

  // Returns and clears the invalid index that the device has reported so far, if any; then steps run again. Waits only
  // if there is one.
  std::optional<Failure> take_failure();
  bool has_failed() const;  // whether there is one; quick, and needs no current device

  bool is_captured() const;  // whether any step was captured
  int64_t step();            // t of the last step; waits for the device

  struct Parts;
  Parts& parts() { return *parts_; }

 private:
  std::unique_ptr<Parts> parts_;
};

// The launches for one set of buffers, whose tables are made once. All work goes to the stream of the context, and no
// function waits unless its comment says so. TensorArgs and StepArgs are structs on the host with pointers to device
// memory; `rows` points to DeviceRows and `stale` to DeviceStale, both on the host.
class FASTADAM_API Launch {
 public:
  Launch(std::shared_ptr<Context> context, const std::vector<TensorArgs>& tensors, const Chains& chains);  // waits
  ~Launch();
  Launch(const Launch&) = delete;
  Launch& operator=(const Launch&) = delete;

  // Norms, clipping, and the step. `call`: the caller's counter. With hyper.require_finite it waits, and returns false
  // if a gradient was not finite and nothing was done. The host does not learn whether numbers.found_inf skips the
  // step.
  bool step(const StepArgs& step, const std::vector<TensorArgs>& tensors, const AdamHyper& hyper,
            const DeviceNumbers& numbers, int64_t call);

  // Whether the device can count t or read a rate in a step with these betas. It needs tables of their powers, which
  // exist only for the betas of the first step, and not for a beta too close to 1. Do not call this in a capture.
  bool can_count(const AdamHyper& hyper);

  // Adds gradients to the accumulators; otherwise like step(). Waits only with `require_finite`.
  bool accumulate(bool restart, bool require_finite, const std::vector<TensorArgs>& tensors, int64_t call);

  // Writes the sum of squares of each gradient to `sums`, in device memory.
  void sum_squares(const std::vector<TensorArgs>& tensors, double* sums);

  // Brings rows of one deferred table up to date.
  void catch_up(const StepArgs& step, const TensorArgs& tensor, int64_t call);

 private:
  struct Tables;
  std::unique_ptr<Tables> tables_;
};

// The rows that the indices of one gradient name, in memory that is reused from step to step.
class FASTADAM_API SortedRows {
 public:
  SortedRows();
  ~SortedRows();
  SortedRows(const SortedRows&) = delete;
  SortedRows& operator=(const SortedRows&) = delete;

  // `indices` are in device memory. Context::take_failure() reports an invalid one, with this `source`. Throws before
  // anything is launched if a captured call would have to allocate.
  void sort(const void* indices, bool is_int64, int64_t count, int64_t row_count, int64_t width, int64_t source,
            Context& context);
  const DeviceRows& rows() const;

  // Returns the sums of the rows in the state dtype, rows().count of them; sums after the last row are zero.
  void* sum(const void* values, DType dtype, Context& context);

 private:
  struct Memory;
  std::unique_ptr<Memory> memory_;
};

// The history of a deferred table in device memory.
class FASTADAM_API DeviceHistory {
 public:
  DeviceHistory(bool is_double, int64_t room);
  ~DeviceHistory();
  DeviceHistory(const DeviceHistory&) = delete;
  DeviceHistory& operator=(const DeviceHistory&) = delete;

  // Writes all `steps` of the history from arrays of the host.
  void write(const void* alphas, const void* keeps, const void* peaks, int64_t steps, void* stream);
  // Appends one step.
  void append(const void* alphas, const void* keeps, const void* peaks, int64_t step, void* stream);
  void write_forms(const ClosedForm* forms, int64_t form_count, const int32_t* places, int64_t place_count,
                   void* stream);
  void point(StaleRows& stale) const;  // sets its `alphas`, `keeps`, `peaks`, `forms` and `places`

 private:
  struct Memory;
  std::unique_ptr<Memory> memory_;
};

// Gathers rows of a table by ids on the device. An invalid id gives zeros, and take_failure() reports the first of a
// call later. The caller sees to it that calls on several streams do not overlap.
class FASTADAM_API Gather {
 public:
  Gather();
  ~Gather();
  Gather(const Gather&) = delete;
  Gather& operator=(const Gather&) = delete;

  void run(const void* table, int64_t row_count, int64_t width, DType dtype, const void* ids, bool is_int64,
           int64_t id_count, void* out, void* stream);
  std::optional<Failure> take_failure();

 private:
  struct Memory;
  std::unique_ptr<Memory> memory_;
};

// Used by Launch: updates the rows of one tensor with a sparse gradient, or brings rows up to date.
void step_rows(const StepArgs& step, const TensorArgs& tensor, const Factor* factor, const StepState* state,
               void* stream);
void accumulate_rows(const TensorArgs& tensor, bool restart, const StepState* state, void* stream);

}  // namespace fastadam::cuda
