// SPDX-License-Identifier: Apache-2.0
// A step in two halves: Plan(...) checks a set of variables and their slots once, the calls check the gradients and
// numbers each time, then write. A cache of pointers, not state.
#pragma once

#include <cmath>
#include <optional>
#include <utility>
#include <vector>

#include "../capi/prepare.h"
#include "../capi/step_checks.h"
#include "tensors.h"

namespace fastadam::bind {

template <class Backend>
class Plan {
 public:
  template <class... Arguments>
  explicit Plan(Arguments&&... arguments) : set_(std::forward<Arguments>(arguments)...) {}

  const TensorSet<Backend>& set() const { return set_; }
  Backend& backend() { return set_.backend(); }

  // Raises what is wrong with the gradients; returns those that must be converted before step().
  std::vector<size_t> check(const py::list& gradients) {
    const typename Backend::Scope scope(backend(), set_.place());
    std::vector<size_t> to_convert = set_.check(gradients);
    if (!to_convert.empty()) return to_convert;
    set_.index_rows();
    set_.require_current();
    return to_convert;
  }

  // Raises what is wrong with the numbers of a step.
  void check_numbers(const AdamHyper& hyper, const std::vector<double>& factors) { arguments(hyper, factors); }

  // Does the step, or nothing if some gradients must be converted first: these are returned.
  // `counter`, if not null, goes up by one after the update, where no signal can come between.
  std::vector<size_t> step(const py::list& gradients, const AdamHyper& hyper, const std::vector<double>& factors,
                           int64_t* counter) {
    const typename Backend::Scope scope(backend(), set_.place());
    std::vector<size_t> to_convert = set_.check(gradients);
    if (!to_convert.empty()) return to_convert;
    set_.index_rows();
    const StepArgs args = arguments(hyper, factors);
    set_.require_current();
    if (hyper.clip_after_dedupe && clips(hyper)) set_.sum_rows(clips_norms(hyper));
    for (size_t i : set_.crowded_tables()) catch_up_table(i, args, hyper, counter);
    set_.read_histories(hyper);
    run(args, hyper, counter);
    return {};
  }

  // Adds the gradients, times `scale`, to their accumulators, which count as zero if `restart`; then `update`, if it is
  // not null, makes the step with what its accumulators hold. Returns gradients to convert, like step().
  std::vector<size_t> accumulate(const py::list& gradients, double scale, bool require_finite, bool restart,
                                 Plan* update, const AdamHyper& hyper, int64_t* counter) {
    const typename Backend::Scope scope(backend(), set_.place());
    std::vector<size_t> to_convert = set_.check(gradients);
    if (!to_convert.empty()) return to_convert;
    set_.require_current();
    set_.index_rows();
    if (update != nullptr) {  // refused before anything is written
      update->set_.require_current();
      update->arguments(hyper, {});
    }
    for (size_t i = 0; i < set_.tensors().size(); ++i) set_.tensors()[i].grad_factor = usable_factor(scale, i);
    {
      const py::gil_scoped_release unlocked;
      all_finite_ = backend().accumulate({set_.chains(), restart}, require_finite, set_.tensors(), call_of(counter));
    }
    set_.forget_gradients();
    if (!all_finite_) return {};
    if (update == nullptr) {
      count(counter);
    } else {
      const typename Backend::Scope update_scope(update->backend(), update->set_.place());
      update->set_.read_accumulators();
      update->run(update->arguments(hyper, {}), hyper, counter);
    }
    return {};
  }

  // Brings rows of a stale table, the only variable, up to date: those that `ids` name, or all. No step.
  void catch_up(const std::optional<py::object>& ids, const AdamHyper& hyper, const int64_t* counter) {
    const typename Backend::Scope scope(backend(), set_.place());
    const StepArgs args = arguments(hyper, {});
    set_.require_current();
    set_.choose_rows(ids, hyper);
    {
      const py::gil_scoped_release unlocked;
      backend().catch_up(set_.tensors()[0], args, call_of(counter));
    }
    if (ids) set_.note_histories(nullptr, 0);
    if (!ids) set_.clear_history(0);
    set_.forget_gradients();
  }

  // Of the gradients of the last call, where its numbers required it. If they were not, nothing was done.
  bool all_finite() const { return all_finite_; }

 private:
  static bool clips_norms(const AdamHyper& hyper) {
    return std::isfinite(hyper.clip_norm) || std::isfinite(hyper.global_clip_norm);
  }

  static bool clips(const AdamHyper& hyper) { return clips_norms(hyper) || std::isfinite(hyper.clip_value); }

  static int64_t call_of(const int64_t* counter) { return counter == nullptr ? 0 : *counter; }

  static void count(int64_t* counter) {
    if (counter != nullptr) ++*counter;
  }

  // Changes no bit that is read by gather or sync: it may come before the gradients are found finite.
  void catch_up_table(size_t i, const StepArgs& args, const AdamHyper& hyper, const int64_t* counter) {
    const TensorArgs tensor = set_.all_rows_of(i, hyper);
    {
      const py::gil_scoped_release unlocked;
      backend().catch_up(tensor, args, call_of(counter));
    }
    set_.clear_history(i);
  }

  void run(const StepArgs& args, const AdamHyper& hyper, int64_t* counter) {
    set_.require_current();
    {
      // Safe: the kernels touch only memory that this Plan and the gradients' owners keep alive.
      const py::gil_scoped_release unlocked;
      all_finite_ = backend().step(args, set_.tensors(), hyper, call_of(counter));
    }
    if (all_finite_) set_.note_histories(&args, call_of(counter));
    if (all_finite_ && !backend().is_capturing()) count(counter);
    set_.forget_gradients();
  }

  // The numbers of the step for the kernels, found usable in the arithmetic of the variables.
  StepArgs arguments(const AdamHyper& hyper, const std::vector<double>& factors) {
    if (!factors.empty()) set_.require_length("grad_factor", factors.size());
    check_hyper(hyper);
    set_.require_options(hyper);
    for (size_t i = 0; i < set_.tensors().size(); ++i) {
      set_.tensors()[i].grad_factor = usable_factor(hyper.gradient_scale * (factors.empty() ? 1.0 : factors[i]), i);
    }
    StepArgs args =
        prepare_step(set_.tensors().data(), static_cast<int64_t>(set_.tensors().size()), hyper, set_.lazy());
    args.chains = set_.chains();
    return args;
  }

  double usable_factor(double factor, size_t i) {
    const char* why = lost_factor(factor, set_.tensors()[i].dtype);
    if (why == nullptr) return factor;
    throw py::value_error(Label{"grad_factor", set_.position(i)}() + ": " + why);
  }

  TensorSet<Backend> set_;
  bool all_finite_ = true;
};

}  // namespace fastadam::bind
