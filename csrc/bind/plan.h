// SPDX-License-Identifier: Apache-2.0
// A Plan checks a set of variables and their slots once. Each call then checks gradients and numbers, and writes. It
// holds pointers, not state.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "../capi/prepare.h"
#include "../capi/run.h"
#include "../capi/step_checks.h"
#include "../core/float_mode.h"
#include "gil.h"
#include "parameters.h"
#include "step_log.h"
#include "tensors.h"

namespace fastadam::bind {

template <class Backend>
class Plan {
  using Scope = typename Backend::Scope;
  using Call = typename TensorSet<Backend>::Call;

  // Variables of one call that make steps of one number.
  struct Part {
    std::vector<int64_t> heads;
    std::vector<int64_t> offsets{0};
    StepArgs args;
  };
  static constexpr double kNoLimit = std::numeric_limits<double>::infinity();
  using Parts = std::map<int64_t, Part>;  // by the number of the step

 public:
  template <class... Arguments>
  explicit Plan(Arguments&&... arguments) : set_(std::forward<Arguments>(arguments)...) {}

  const VariableSet<typename Backend::Arrays>& variables() const { return set_.variables(); }
  Backend& backend() { return set_.backend(); }

  // Raises what is wrong with the gradients. Returns those that must be converted before step().
  std::vector<size_t> check(const py::list& gradients) {
    const Scope scope(backend(), variables().place());
    return Call(set_, gradients).to_convert();
  }

  // Raises what is wrong with the numbers of a step.
  void check_numbers(const AdamHyper& hyper, const std::vector<double>& factors) {
    const DefaultArithmetic arithmetic;
    arguments(hyper, factors);
  }

  // Does the step, or nothing if some gradients must be converted first: these are returned.
  // `counter`, if not null, goes up by one after the update, where no signal can come between.
  // `clip_factors`: what the gradients are multiplied by instead of their factors, if the caller has already joined the
  // norms of several plans (see norms()); otherwise empty.
  std::vector<size_t> step(const py::list& gradients, const AdamHyper& hyper, const std::vector<double>& factors,
                           int64_t* counter, const std::vector<Factor>& clip_factors = {}) {
    const Scope scope(backend(), variables().place());
    Call call(set_, gradients);
    if (!call.to_convert().empty()) return call.to_convert();
    StepArgs args = arguments(hyper, factors);
    args.factors = checked(clip_factors);
    sum_rows(call, hyper);
    call.read_histories(hyper, catch_up_with(args, counter));
    run(call, args, hyper, counter);
    return {};
  }

  // Like step(), but t of variable i is `steps[i]`. Only for variables in CPU memory that are not deferred tables.
  // Norms are not read: with norm clipping the caller gives `clip_factors`.
  std::vector<size_t> step_apart(const py::list& gradients, const AdamHyper& hyper, const std::vector<double>& factors,
                                 int64_t* counter, const std::vector<int64_t>& steps,
                                 const std::vector<Factor>& clip_factors) {
    const Scope scope(backend(), variables().place());
    Call call(set_, gradients);
    if (!call.to_convert().empty()) return call.to_convert();
    const Parts parts = parts_of(hyper, factors, steps);
    sum_rows(call, hyper);
    run(parts, hyper, counter, checked(clip_factors));
    return {};
  }

  // Whether a step with these gradients can be undone: all are dense, of float32 variables in CPU memory that have no
  // average, are not stored as in small_state.h and come once, and need no conversion.
  bool can_undo(const py::list& gradients) {
    const Scope scope(backend(), variables().place());
    const Call call(set_, gradients);
    if (!call.to_convert().empty() || !variables().place().on_host()) return false;
    size_t i = 0;
    return std::all_of(set_.tensors().begin(), set_.tensors().end(), [&](const TensorArgs& t) {
      const bool is_plain = t.dtype == FASTADAM_FLOAT32 && t.rows == nullptr && t.average == nullptr;
      return is_plain && !is_small(t) && t.telemetry == nullptr && !variables().is_repeated(i++);
    });
  }

  // Like step() with clip factors, but it can be undone: see can_undo().
  void step_logged(const py::list& gradients, const AdamHyper& hyper, const std::vector<double>& factors,
                   const std::vector<Factor>& clip_factors, LogMemory& memory) {
    const Scope scope(backend(), variables().place());
    Call call(set_, gradients);
    StepArgs args = arguments(hyper, factors);
    args.factors = checked(clip_factors);
    args.log = &memory.open(args.chains);
    AdamHyper unconditional = hyper;
    unconditional.require_finite = false;
    if (args.factors == nullptr) unconditional.clip_norm = unconditional.global_clip_norm = kNoLimit;
    run(call, args, unconditional, nullptr);
  }

  // The variables whose gradients have changed since the last step_logged(), which had these arguments.
  std::vector<size_t> changed_since(const py::list& gradients, const AdamHyper& hyper,
                                    const std::vector<double>& factors, LogMemory& memory) {
    const Scope scope(backend(), variables().place());
    const Call call(set_, gradients);
    StepArgs args = arguments(hyper, factors);
    args.log = memory.log();
    const ReleasedGil unlocked;
    if (args.log == nullptr) return {};
    run_check(args);
    return memory.changed();
  }

  // Undoes the last step_logged(), which had these arguments, unless that was done already. Returns the variables whose
  // gradients have changed: of these only the moments are not undone (../core/undo.h). If `instead` is not null, makes
  // the step with these clip factors, or with none if they are empty, in its place.
  std::vector<size_t> undo(const py::list& gradients, const AdamHyper& hyper, const std::vector<double>& factors,
                           const std::vector<Factor>& clip_factors, LogMemory& memory,
                           const std::vector<Factor>* instead) {
    const Scope scope(backend(), variables().place());
    const Call call(set_, gradients);
    StepArgs args = arguments(hyper, factors);
    args.factors = checked(clip_factors);
    StepArgs other = args;
    if (instead != nullptr) other.factors = checked(*instead);
    args.log = memory.log();
    const ReleasedGil unlocked;
    if (args.log == nullptr) return {};
    memory.close();
    run_undo(args, instead == nullptr ? nullptr : &other);
    return memory.changed();
  }

  // The norms of gradients that need no conversion, as a step with these numbers clips them: values are clipped, and
  // repeated rows summed if hyper.clip_after_dedupe says so. Only in CPU memory.
  GradientNorms norms(const py::list& gradients, const AdamHyper& hyper) {
    const Scope scope(backend(), variables().place());
    Call call(set_, gradients);
    if (!call.to_convert().empty()) throw py::type_error("gradients: must be converted first");
    sum_rows(call, hyper);
    return norms_of(hyper);
  }

  // Has variables with telemetry report that the caller skips a step with these gradients, which need no conversion.
  void report_skip(const py::list& gradients, const AdamHyper& hyper) {
    const Scope scope(backend(), variables().place());
    Call call(set_, gradients);
    if (!call.to_convert().empty()) throw py::type_error("gradients: must be converted first");
    const ReleasedGil unlocked;
    fastadam::report_skip(variables().chains(), hyper);
  }

  // Keeps the numbers of the last step for step_again(). They are good as long as the caller's `stamp` is the same.
  void remember(const AdamHyper& hyper, int64_t stamp, std::vector<double> factors) {
    remembered_ = hyper;
    stamp_ = stamp;
    remembered_factors_ = std::move(factors);
  }

  // A step with the remembered numbers and the next t. Returns false, with nothing done, if the stamp differs, if the
  // (gradient, variable) pairs are not for the variables of this set, each with a gradient, or if a gradient must be
  // converted. `holder`: see VariableSet::gradients_of.
  bool step_again(const py::list& pairs, const py::type& holder, int64_t stamp, int64_t* counter) {
    if (!remembered_ || stamp != stamp_ || pairs.size() != variables().size()) return false;
    const std::optional<py::list> gradients = variables().gradients_of(pairs, holder);
    if (!gradients || *counter < 0 || *counter == std::numeric_limits<int64_t>::max()) return false;
    AdamHyper hyper = *remembered_;
    hyper.step = *counter + 1;
    return step(*gradients, hyper, remembered_factors_, counter).empty();
  }

  // The variables are parameters of PyTorch with these states, or their masters: see Parameters. Returns whether a step
  // can be repeated: see Repeat.
  bool follow(const py::list& states, const py::tuple& keys, const py::list& masters) {
    parameters_.emplace(states, keys, masters);
    if (!parameters_->are_usable()) parameters_.reset();
    return parameters_.has_value();
  }

  // A step with the remembered numbers for the parameters that the plan follows, checked but not made yet.
  class Repeat {
   public:
    // `steps[i]`: the number of the step of variable i.
    Repeat(Plan& plan, const py::list& gradients, std::vector<int64_t> steps)
        : plan_(plan),
          scope_(plan.backend(), plan.variables().place()),
          call_(plan.set_, gradients),
          steps_(std::move(steps)) {
      hyper_ = *plan.remembered_;
      hyper_.step = steps_[0];
      if (!is_ready()) return;
      is_apart_ = std::adjacent_find(steps_.begin(), steps_.end(), std::not_equal_to<>()) != steps_.end();
      if (is_apart_) {
        parts_ = plan.parts_of(hyper_, plan.remembered_factors_, steps_);
      } else {
        args_ = plan.arguments(hyper_, plan.remembered_factors_);
      }
    }

    // False if a gradient must be converted.
    bool is_ready() const { return call_.to_convert().empty(); }

    const AdamHyper& hyper() const { return hyper_; }
    size_t size() const { return steps_.size(); }
    GradientNorms norms() { return plan_.norms_of(hyper_); }

    // Adds the factors of the gradients, without clipping.
    void append_factors(std::vector<double>& factors) const {
      for (const TensorArgs& tensor : plan_.set_.tensors()) factors.push_back(tensor.grad_factor);
    }

    // Makes the step and writes the step counts. `clip_factors`: of the gradients with norm clipping; otherwise null.
    // That gradients are finite, if they must be, has been found out before.
    void run(const Factor* clip_factors) {
      hyper_.require_finite = false;
      if (is_apart_) {
        plan_.run(parts_, hyper_, nullptr, clip_factors);
      } else {
        args_.factors = clip_factors;
        plan_.run(call_, args_, hyper_, nullptr);
      }
      plan_.parameters_->counts().set(steps_);
    }

    // Reports that the step is not made.
    void report_skip() {
      const ReleasedGil unlocked;
      fastadam::report_skip(plan_.variables().chains(), hyper_);
    }

   private:
    Plan& plan_;
    Scope scope_;
    Call call_;
    std::vector<int64_t> steps_;
    bool is_apart_ = false;  // step counts differ
    AdamHyper hyper_;
    StepArgs args_;  // of all variables, unless they are apart
    Parts parts_;
  };

  // The gradients of the next step if the parameters of a group, their copies and their states are what the plan
  // follows; otherwise empty.
  std::optional<py::list> gradients_to_repeat(const py::dict& group, const py::tuple& followed) const {
    static const py::handle params_key = PyUnicode_InternFromString("params");
    static const py::handle computed_key = PyUnicode_InternFromString("compute_params");
    if (!parameters_ || !remembered_) return std::nullopt;
    const py::object params = group[params_key];
    const py::handle computed = PyDict_GetItemWithError(group.ptr(), computed_key.ptr());
    if (!computed && PyErr_Occurred() != nullptr) throw py::error_already_set();
    const bool has_computed = computed && !computed.is_none();
    if (!py::isinstance<py::list>(params) || (has_computed && !py::isinstance<py::list>(computed))) return std::nullopt;
    const auto copies = has_computed ? py::reinterpret_borrow<py::list>(computed) : py::list(0);
    std::optional<py::list> gradients = parameters_->gradients_of(variables(), py::reinterpret_borrow<py::list>(params),
                                                                  followed, has_computed ? &copies : nullptr);
    return gradients && parameters_->are_current(variables()) ? gradients : std::nullopt;
  }

  // The next step; null if a step count is not a whole number or a gradient must be converted.
  std::unique_ptr<Repeat> repeat(const py::list& gradients) {
    std::optional<std::vector<int64_t>> steps = parameters_->counts().next();
    if (!steps) return nullptr;
    auto step = std::make_unique<Repeat>(*this, gradients, *std::move(steps));
    return step->is_ready() ? std::move(step) : nullptr;
  }

  // Adds the gradients, times `scale`, to their accumulators, which count as zero if `restart`; then `update`, if not
  // null, makes a step with what its accumulators hold. Returns gradients to convert, as step() does.
  // `rows`: for each variable of `update`: see Gradients::read_accumulators.
  std::vector<size_t> accumulate(const py::list& gradients, double scale, bool require_finite, bool restart,
                                 Plan* update, const py::list& rows, const AdamHyper& hyper, int64_t* counter) {
    {
      const Scope scope(backend(), variables().place());
      Call call(set_, gradients);
      if (!call.to_convert().empty()) return call.to_convert();
      call.cover_all_rows();
      if (update != nullptr) {  // refused before anything is written
        update->variables().require_current();
        update->arguments(hyper, {});
      }
      for (size_t i = 0; i < set_.tensors().size(); ++i) set_.tensors()[i].grad_factor = usable_factor(scale, i);
      const ReleasedGil unlocked;
      all_finite_ =
          backend().accumulate({variables().chains(), restart}, require_finite, set_.tensors(), value_of(counter));
    }
    if (!all_finite_) return {};
    if (update == nullptr) {
      count(counter);
    } else {
      update->step_accumulated(rows, hyper, counter);
    }
    return {};
  }

  // Brings rows of a deferred table, the only variable, up to date: the rows `ids`, or all. Makes no step.
  void catch_up(const std::optional<py::object>& ids, const AdamHyper& hyper, const int64_t* counter) {
    const Scope scope(backend(), variables().place());
    const StepArgs args = arguments(hyper, {});
    Call call(set_, ids, hyper);
    {
      const ReleasedGil unlocked;
      backend().catch_up(set_.tensors()[0], args, value_of(counter));
    }
    if (ids) call.note_histories(nullptr, 0);
    if (!ids) call.note_pass();
  }

  // Has later steps report what they do to each variable, or not.
  void set_telemetry(bool wanted) { set_.set_telemetry(wanted); }

  // False if the last call required finite gradients and they were not: then it has written nothing.
  bool all_finite() const { return all_finite_; }

 private:
  static bool clips(const AdamHyper& hyper) { return clips_norms(hyper) || std::isfinite(hyper.clip_value); }

  // Before values or norms are clipped: sums repeated rows if the clip is for the sums.
  static void sum_rows(Call& call, const AdamHyper& hyper) {
    if (hyper.clip_after_dedupe && clips(hyper)) call.sum_rows(clips_norms(hyper));
  }

  // Of the gradients of the current call.
  GradientNorms norms_of(const AdamHyper& hyper) {
    const ReleasedGil unlocked;
    return run_norms(set_.tensors().data(), static_cast<int64_t>(set_.tensors().size()), hyper);
  }

  // Factors for the kernels; null for none.
  const Factor* checked(const std::vector<Factor>& clip_factors) const {
    if (clip_factors.empty()) return nullptr;
    variables().require_length("clip_factors", clip_factors.size());
    return clip_factors.data();
  }

  static int64_t value_of(const int64_t* counter) { return counter == nullptr ? 0 : *counter; }

  static void count(int64_t* counter) {
    if (counter != nullptr) ++*counter;
  }

  // The step with what the accumulators hold, which nothing refuses any more. Where a table has `rows`, the others wait
  // as they do in steps with IndexedSlices.
  void step_accumulated(const py::list& rows, const AdamHyper& hyper, int64_t* counter) {
    const Scope scope(backend(), variables().place());
    Call call(set_, typename Call::Accumulated{rows});
    StepArgs args = arguments(hyper, {});
    std::vector<Factor> factors;
    if constexpr (std::is_same_v<typename Backend::Arrays, HostArrays>) {  // tables on a GPU have no rows here
      if (clips_norms(hyper) && call.has_rows()) {
        const std::vector<TensorArgs>& tensors = set_.tensors();
        factors = norms_of(hyper).clip(hyper, [&](size_t i) { return tensors[i].grad_factor; }).factors;
        args.factors = factors.data();
      }
    }
    // A factor that is NaN makes NaN of the zeros in all other rows, too.
    const bool is_usual =
        std::all_of(factors.begin(), factors.end(), [](const Factor& factor) { return factor.value == factor.value; });
    call.read_histories(hyper, catch_up_with(args, counter), !is_usual);
    run(call, args, hyper, counter);
  }

  // Brings the rows of one table up to date, before a step with these arguments.
  auto catch_up_with(const StepArgs& args, const int64_t* counter) {
    return [this, &args, counter](const TensorArgs& table) {
      const ReleasedGil unlocked;
      backend().catch_up(table, args, value_of(counter));
    };
  }

  // The step of a call, which is ready for it.
  void run(Call& call, const StepArgs& args, const AdamHyper& hyper, int64_t* counter) {
    {
      // Safe: the kernels touch only memory that this Plan and the gradients' owners keep alive.
      const ReleasedGil unlocked;
      all_finite_ = backend().step(args, set_.tensors(), hyper, value_of(counter));
    }
    if (!all_finite_) return;
    call.note_histories(&args, value_of(counter));
    if (!backend().is_capturing()) count(counter);
  }

  // The step of variables whose step counts differ. `clip_factors`: of all gradients, or null.
  void run(const Parts& parts, AdamHyper hyper, int64_t* counter, const Factor* clip_factors) {
    {
      const ReleasedGil unlocked;
      for (const auto& [step, part] : parts) {
        hyper.step = step;
        StepArgs args = part.args;
        args.factors = clip_factors;
        backend().step(args, set_.tensors(), hyper, value_of(counter));
      }
    }
    all_finite_ = true;
    count(counter);
  }

  // Raises if a number is not usable, in whichever step.
  Parts parts_of(AdamHyper hyper, const std::vector<double>& factors, const std::vector<int64_t>& steps) {
    variables().require_length("steps", steps.size());
    const Chains all = variables().chains();
    Parts parts;
    for (int64_t k = 0; k < all.count; ++k) {
      Part& part = parts[steps[static_cast<size_t>(all.heads[k])]];
      part.heads.push_back(all.heads[k]);
      part.offsets.push_back(part.offsets.back() + all.offsets[k + 1] - all.offsets[k]);
    }
    for (auto& [step, part] : parts) {
      hyper.step = step;
      part.args = arguments(hyper, factors);
      part.args.chains = {all.tensors, part.heads.data(), part.offsets.data(), static_cast<int64_t>(part.heads.size())};
    }
    return parts;
  }

  // The arguments of the kernels. Raises if a number is not usable in the arithmetic of the variables.
  StepArgs arguments(const AdamHyper& hyper, const std::vector<double>& factors) {
    if (!factors.empty()) variables().require_length("grad_factor", factors.size());
    check_hyper(hyper);
    set_.require_options(hyper);
    std::vector<TensorArgs>& tensors = set_.tensors();
    for (size_t i = 0; i < tensors.size(); ++i) {
      tensors[i].grad_factor = usable_factor(hyper.gradient_scale * (factors.empty() ? 1.0 : factors[i]), i);
    }
    StepArgs args = prepare_step(tensors.data(), static_cast<int64_t>(tensors.size()), hyper, set_.lazy());
    args.chains = variables().chains();
    return args;
  }

  double usable_factor(double factor, size_t i) {
    const char* why = lost_factor(factor, set_.tensors()[i].dtype);
    if (why == nullptr) return factor;
    throw py::value_error(variables().label("grad_factor", "grad_factor", i)() + ": " + why);
  }

  TensorSet<Backend> set_;
  std::optional<AdamHyper> remembered_;
  int64_t stamp_ = 0;
  std::vector<double> remembered_factors_;
  std::optional<Parameters> parameters_;
  bool all_finite_ = true;
};

}  // namespace fastadam::bind
