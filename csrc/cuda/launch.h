// SPDX-License-Identifier: Apache-2.0
// Entry points of the CUDA backend. Arguments have been checked by the binding; errors of the CUDA runtime are thrown
// as std::runtime_error. Free of CUDA headers: a stream is a cudaStream_t. Whoever calls has made the device current
// and, with a Context, entered it.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "../core/step_args.h"
#include "../core/step_scalars.h"
#include "index_kernels.h"

namespace fastadam::cuda {

// A table in a deferred mode: `from` is not used, but these.
struct DeviceStale : StaleRows {
  int32_t* last;  // steps of the history that each row has had
};

// An index that was no row. The steps from `call` on have changed nothing.
struct Failure {
  int64_t call;
  int64_t source;  // as given to SortedRows::sort
  int64_t position;
  int64_t index;
};

// What all launches of one optimizer share on one device: t, and whether an index was bad.
class FASTADAM_API Context {
 public:
  Context();  // waits
  ~Context();
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  // Work begins on this stream: after all that was begun before, on whatever stream.
  void enter(void* stream);
  void leave();
  void* stream() const;
  bool is_capturing() const;

  void wait();                            // for the device
  std::optional<Failure> take_failure();  // as far as it is known; waits if there is one; steps go on after it

  bool is_captured() const;  // some step was
  int64_t step();            // t of the last step that was made; waits

  struct Parts;
  Parts& parts() { return *parts_; }

 private:
  std::unique_ptr<Parts> parts_;
};

// The launches of one set of buffers, whose tables are made once. Everything runs on the stream of the context; nothing
// waits, but where it says so. TensorArgs and StepArgs have host structs with pointers to the device; `rows` points to
// DeviceRows, `stale` to DeviceStale.
class FASTADAM_API Launch {
 public:
  Launch(std::shared_ptr<Context> context, const std::vector<TensorArgs>& tensors, const Chains& chains);  // waits
  ~Launch();
  Launch(const Launch&) = delete;
  Launch& operator=(const Launch&) = delete;

  // Norms, clipping, and the step. `call`: the caller's counter. Waits, and returns false if nothing was done, where
  // the gradients had to be finite. Whether it is skipped for `numbers.found_inf` is not known to the host.
  bool step(const StepArgs& step, const std::vector<TensorArgs>& tensors, const AdamHyper& hyper,
            const DeviceNumbers& numbers, int64_t call);

  // Whether the device can count t, or read a rate, for a step with these betas: it has powers of those of the first
  // step alone, and none of one too near to 1. Not to be asked in a capture.
  bool can_count(const AdamHyper& hyper);

  // As step(), for gradients that are added up. Those that have to be finite wait.
  bool accumulate(bool restart, bool require_finite, const std::vector<TensorArgs>& tensors, int64_t call);

  // Of each gradient, to memory of the device.
  void sum_squares(const std::vector<TensorArgs>& tensors, double* sums);

  // Rows of one stale table get the steps that they missed.
  void catch_up(const StepArgs& step, const TensorArgs& tensor, int64_t call);

 private:
  struct Tables;
  std::unique_ptr<Tables> tables_;
};

// The rows that the indices of one gradient name, in memory that is kept from step to step.
class FASTADAM_API SortedRows {
 public:
  SortedRows();
  ~SortedRows();
  SortedRows(const SortedRows&) = delete;
  SortedRows& operator=(const SortedRows&) = delete;

  // `indices` on the device. One that is not a row is reported as of `source` (Context::take_failure).
  void sort(const void* indices, bool is_int64, int64_t count, int64_t row_count, int64_t width, int64_t source,
            Context& context);
  const DeviceRows& rows() const;

  // The sums of the rows, of the state dtype: slices.count rows, those behind the last are zero.
  void* sum(const void* values, DType dtype, const Context& context);

 private:
  struct Memory;
  std::unique_ptr<Memory> memory_;
};

// The history of a table, as the device reads it.
class FASTADAM_API DeviceHistory {
 public:
  DeviceHistory(bool is_double, int64_t room);
  ~DeviceHistory();
  DeviceHistory(const DeviceHistory&) = delete;
  DeviceHistory& operator=(const DeviceHistory&) = delete;

  // All `steps` of it, from arrays of the host.
  void write(const void* alphas, const void* keeps, const void* peaks, int64_t steps, void* stream);
  // One step more.
  void append(const void* alphas, const void* keeps, const void* peaks, int64_t step, void* stream);
  void write_forms(const ClosedForm* forms, int64_t form_count, const int32_t* places, int64_t place_count,
                   void* stream);
  void point(StaleRows& stale) const;  // `alphas`, `keeps`, `peaks`, `forms` and `places`

 private:
  struct Memory;
  std::unique_ptr<Memory> memory_;
};

// Rows of a table by ids on the device; an id that is not a row gives zeros and is reported by the next call.
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

// For Launch: updates the rows of one tensor whose gradient is sparse, or brings them up to date.
void step_rows(const StepArgs& step, const TensorArgs& tensor, const double* factor, const StepState* state,
               void* stream);
void accumulate_rows(const TensorArgs& tensor, bool restart, const StepState* state, void* stream);

}  // namespace fastadam::cuda
