// SPDX-License-Identifier: Apache-2.0
// A step in two halves: Plan(...) checks a set of variables and their state once, check()/step() the gradients each
// time. A cache of pointers, not state: the optimizer rebuilds it whenever the set of buffers changes.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "../core/step_args.h"
#include "buffers.h"
#include "norms.h"
#include "step_checks.h"

namespace fastadam::bind {

class Plan {
 public:
  // `positions[i]`: the place of variable i in the caller's list, for error texts about its gradient.
  // `vhat` and `average` are lists or None; `decays[i]`: weight decay applies to variable i.
  Plan(std::vector<Buffer> variables, const py::list& m, const py::list& v, const py::object& vhat,
       const py::object& average, const std::vector<bool>& decays, std::vector<int64_t> positions)
      : variables_(std::move(variables)),
        positions_(std::move(positions)),
        amsgrad_(!vhat.is_none()),
        has_average_(!average.is_none()) {
    require_length("m", m.size());
    require_length("v", v.size());
    if (amsgrad_) require_length("vhat", py::len(vhat));
    if (has_average_) require_length("average", py::len(average));
    require_length("decays", decays.size());
    for (size_t i = 0; i < variables_.size(); ++i) {
      add_state("m", m[i], i);
      add_state("v", v[i], i);
      if (amsgrad_) add_state("vhat", vhat.cast<py::list>()[i], i);
      if (has_average_) add_state("average", average.cast<py::list>()[i], i);
      add_tensor(i, decays[i]);
    }
    chain_repeats();
    refuse_overlaps();
  }

  bool matches(const py::list& objects, const std::vector<int64_t>& positions) const {
    if (objects.size() != variables_.size() || positions != positions_) return false;
    for (size_t i = 0; i < variables_.size(); ++i) {
      if (!is_current(variables_[i]) || !is_variable(objects[i], variables_[i])) return false;
    }
    return true;
  }

  // Raises what is wrong with the gradients; returns those that must be converted before step().
  std::vector<size_t> check(const py::list& gradients) {
    require_length("grads", gradients.size());
    std::vector<size_t> to_convert;
    exported_.clear();
    for (size_t i = 0; i < variables_.size(); ++i) {
      if (!add_gradient(gradients[i], i)) to_convert.push_back(i);
    }
    return to_convert;
  }

  // Raises what is wrong with the numbers of a step.
  void check_numbers(const AdamHyper& hyper, const std::vector<double>& factors) { arguments(hyper, factors); }

  // Does the step, or nothing if some gradients must be converted first: these are returned.
  // `counter`, a writable int64 scalar array, goes up by one after the update, where no signal can come between.
  template <class Backend>
  std::vector<size_t> step(const py::list& gradients, const AdamHyper& hyper, const std::vector<double>& factors,
                           std::optional<py::array_t<int64_t>> counter) {
    std::vector<size_t> to_convert = check(gradients);
    if (!to_convert.empty()) return to_convert;
    const StepArgs args = arguments(hyper, factors);
    require_current();
    const bool clip_norms = clips_norms(hyper);
    if (clip_norms) norms_.resize(tensors_, raw_clip_value(hyper));
    int64_t* count = counter ? counter->mutable_data() : nullptr;
    {
      // Safe: the kernels touch only memory that this Plan, `gradients` and `counter` keep alive.
      const py::gil_scoped_release unlocked;
      if (clip_norms) {
        Backend::run_norm(norms_.args());
        norms_.fold_into(tensors_, hyper);
      }
      Backend::run_step(args);
      if (count != nullptr) ++*count;
    }
    exported_.clear();
    return {};
  }

 private:
  struct Interval {
    uintptr_t begin;
    uintptr_t end;
    const std::string* label;
    bool operator<(const Interval& other) const { return begin < other.begin; }
  };

  static bool clips_norms(const AdamHyper& hyper) {
    return std::isfinite(hyper.clip_norm) || std::isfinite(hyper.global_clip_norm);
  }

  // The numbers of the step for the kernels, found usable in the arithmetic of the variables.
  StepArgs arguments(const AdamHyper& hyper, const std::vector<double>& factors) {
    if (!factors.empty()) require_length("grad_factor", factors.size());
    StepArgs args{};
    args.tensors = tensors_.data();
    args.heads = heads_.data();
    args.offsets = offsets_.data();
    args.head_count = static_cast<int64_t>(heads_.size());
    if (has_single_) args.scalars_f32 = usable_scalars<float>(hyper);
    if (has_double_) args.scalars_f64 = usable_scalars<double>(hyper);
    args.amsgrad = amsgrad_;
    args.transform =
        clips_norms(hyper) || !factors.empty() || std::isfinite(hyper.clip_value) || hyper.gradient_scale != 1;
    args.ema_overwrite = hyper.ema_overwrite;
    for (size_t i = 0; args.transform && i < tensors_.size(); ++i) {
      tensors_[i].grad_factor = usable_factor(hyper.gradient_scale * (factors.empty() ? 1.0 : factors[i]), i);
    }
    return args;
  }

  double usable_factor(double factor, size_t i) const {
    const bool is_double = tensors_[i].dtype == DType::kFloat64;
    if (is_double || std::isfinite(static_cast<float>(factor))) return factor;
    throw py::value_error(Label{"grad_factor", positions_[i]}() + ": infinite in float32, expected a finite number");
  }

  void require_length(const char* name, size_t length) const {
    if (length == variables_.size()) return;
    throw py::value_error(std::string(name) + ": " + std::to_string(length) + " arrays, expected " +
                          std::to_string(variables_.size()) + ", one for each variable");
  }

  // The last check: a gradient that runs Python code while it is read could have freed anything.
  void require_current() const {
    for (const std::vector<Buffer>* buffers : {&variables_, &state_}) {
      for (const Buffer& b : *buffers) {
        if (!is_current(b)) throw py::value_error(b.label + ": was given other memory while the step was prepared");
      }
    }
    for (const Buffer& b : state_) {
      if (!is_still_writable(b)) throw py::value_error(b.label + ": was made read-only, expected a writable array");
    }
  }

  size_t slots_per_variable() const { return 2 + (amsgrad_ ? 1 : 0) + (has_average_ ? 1 : 0); }

  Label gradient_label(size_t i) const { return {"grads", positions_[i]}; }

  static bool is_variable(const py::object& object, const Buffer& variable) {
    if (is_ndarray_like(object, variable)) {
      const auto array = py::reinterpret_borrow<py::array>(object);
      return array.data() == variable.data && array.writeable();
    }
    const std::optional<Buffer> b = read_array(object, Label{variable.label});
    return b && b->same_memory(variable) && b->writable;
  }

  void add_state(const char* name, const py::object& object, size_t i) {
    state_.push_back(read_state(object, Label{name, positions_[i]}(), variables_[i]));
  }

  void add_tensor(size_t i, bool decays) {
    TensorArgs t{};
    const Buffer* state = &state_[state_.size() - slots_per_variable()];
    t.var = variables_[i].data;
    t.m = state[0].data;
    t.v = state[1].data;
    t.vhat = amsgrad_ ? state[2].data : nullptr;
    t.average = has_average_ ? state[amsgrad_ ? 3 : 2].data : nullptr;
    t.decays = decays;
    t.size = variables_[i].size;
    t.next = -1;
    t.dtype = *variables_[i].dtype;
    (t.dtype == DType::kFloat64 ? has_double_ : has_single_) = true;
    tensors_.push_back(t);
  }

  bool is_repeat(size_t earlier, size_t later) const {
    const TensorArgs& a = tensors_[earlier];
    const TensorArgs& b = tensors_[later];
    return variables_[earlier].same_memory(variables_[later]) && a.m == b.m && a.v == b.v && a.vhat == b.vhat;
  }

  // A variable given twice is updated twice, in order, with the same step count, as TF does.
  void chain_repeats() {
    std::vector<size_t> order;
    for (size_t i = 0; i < tensors_.size(); ++i) {
      if (variables_[i].size > 0) order.push_back(i);  // an empty one may share the address of any other
    }
    std::stable_sort(order.begin(), order.end(),
                     [this](size_t a, size_t b) { return variables_[a].begin() < variables_[b].begin(); });
    std::vector<bool> is_head(tensors_.size(), true);
    for (size_t k = 1; k < order.size(); ++k) {
      if (!is_repeat(order[k - 1], order[k])) continue;
      tensors_[order[k - 1]].next = static_cast<int64_t>(order[k]);
      is_head[order[k]] = false;
    }
    offsets_.push_back(0);
    for (size_t i = 0; i < tensors_.size(); ++i) {
      if (!is_head[i]) continue;
      heads_.push_back(static_cast<int64_t>(i));
      offsets_.push_back(offsets_.back() + tensors_[i].size);
    }
  }

  void refuse_overlaps() {
    const size_t per_variable = slots_per_variable();
    for (int64_t head : heads_) {
      const auto i = static_cast<size_t>(head);
      if (variables_[i].size == 0) continue;
      written_.push_back({variables_[i].begin(), variables_[i].end(), &variables_[i].label});
      for (size_t k = 0; k < per_variable; ++k) {
        const Buffer& state = state_[i * per_variable + k];
        written_.push_back({state.begin(), state.end(), &state.label});
      }
    }
    std::sort(written_.begin(), written_.end());
    for (size_t k = 1; k < written_.size(); ++k) {
      if (written_[k].begin >= written_[k - 1].end) continue;
      throw py::value_error(*written_[k].label + ": overlaps " + *written_[k - 1].label +
                            " in memory, expected separate arrays (or the same variable with the same state)");
    }
  }

  // False if the gradient has to be converted first.
  bool add_gradient(const py::object& object, size_t i) {
    const Buffer& var = variables_[i];
    if (is_ndarray_like(object, var)) {
      set_gradient(py::reinterpret_borrow<py::array>(object).data(), i);
      return true;
    }
    std::optional<Buffer> g = read_array(object, gradient_label(i));
    if (!g) return false;
    if (g->shape != var.shape) {
      throw py::value_error(gradient_label(i)() + ": shape " + tuple_text(g->shape) + ", expected " +
                            tuple_text(var.shape) + " like " + var.label);
    }
    if (g->dtype != var.dtype || !g->native_order || !g->same_layout(var) || !g->aligned()) return false;
    set_gradient(g->data, i);
    exported_.push_back(std::move(g->owner));
    return true;
  }

  void set_gradient(const void* data, size_t i) {
    if (variables_[i].size > 0) refuse_alias(reinterpret_cast<uintptr_t>(data), i);
    tensors_[i].grad = data;
  }

  void refuse_alias(uintptr_t begin, size_t i) const {
    const Interval wanted{begin + variables_[i].end() - variables_[i].begin(), 0, nullptr};
    const auto after = std::lower_bound(written_.begin(), written_.end(), wanted);
    if (after == written_.begin() || std::prev(after)->end <= begin) return;
    throw py::value_error(gradient_label(i)() + ": shares memory with " + *std::prev(after)->label +
                          ", which the step writes; expected a separate array");
  }

  std::vector<Buffer> variables_;
  std::vector<Buffer> state_;         // m, v[, vhat][, average] of variable 0, then of variable 1, ...
  std::vector<py::object> exported_;  // keep gradients that are not ndarrays alive during a step
  std::vector<int64_t> positions_;
  std::vector<TensorArgs> tensors_;
  std::vector<int64_t> heads_;
  std::vector<int64_t> offsets_;
  std::vector<Interval> written_;  // by address
  Norms norms_;
  bool amsgrad_;
  bool has_average_;
  bool has_single_ = false;  // some variable is computed in float32
  bool has_double_ = false;
};

}  // namespace fastadam::bind
