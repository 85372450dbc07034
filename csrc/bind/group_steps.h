// SPDX-License-Identifier: Apache-2.0
// Steps of all parameter groups of an optimizer of PyTorch that are repeated without Python.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "plan.h"

namespace fastadam::bind {

// A step of all groups of an optimizer of PyTorch, each of which `plans` has one plan for, if nothing but gradients,
// values and step counts has changed since the last; otherwise empty, and nothing has changed. `given`: the groups, as
// dicts in a list; other types are not read. `followed[i]`: what the parameters of group i were; `state` is that of the
// optimizer, and `known` what it was. Norms are those of all groups.
// Returns whether the step was made: false, and nothing has changed, if gradients had to be finite and are not. Raises
// what is wrong before anything is written.
template <class Backend>
std::optional<bool> step_groups_again(const py::list& plans, const py::object& given, const py::list& followed,
                                      const py::object& state, const py::dict& known) {
  if (!py::isinstance<py::list>(given) || !py::isinstance<py::dict>(state)) return std::nullopt;
  const auto groups = py::reinterpret_borrow<py::list>(given);
  if (groups.size() != plans.size() || !same_items(py::reinterpret_borrow<py::dict>(state), known)) return std::nullopt;
  std::vector<py::list> gradients;
  for (size_t i = 0; i < plans.size(); ++i) {
    const py::object group = groups[i];
    if (!py::isinstance<py::dict>(group)) return std::nullopt;
    auto found = plans[i].cast<const Plan<Backend>&>().gradients_to_repeat(py::reinterpret_borrow<py::dict>(group),
                                                                           followed[i].cast<py::tuple>());
    if (!found) return std::nullopt;
    gradients.push_back(*std::move(found));
  }
  std::vector<std::unique_ptr<typename Plan<Backend>::Repeat>> steps;
  for (size_t i = 0; i < plans.size(); ++i) {
    steps.push_back(plans[i].cast<Plan<Backend>&>().repeat(gradients[i]));
    if (steps.back() == nullptr) return std::nullopt;
  }
  std::vector<double> factors;
  std::vector<Factor> clipped;
  if (!steps.empty() && (clips_norms(steps[0]->hyper()) || steps[0]->hyper().require_finite)) {
    const AdamHyper& hyper = steps[0]->hyper();  // whose bounds and scale are those of all groups
    GradientNorms norms;
    for (const auto& step : steps) {
      norms.append(step->norms());
      step->append_factors(factors);
    }
    GradientNorms::Clipping clipping = norms.clip(hyper, [&](size_t i) { return factors[i]; });
    if (hyper.require_finite && (!norms.all_finite() || (clips_norms(hyper) && !clipping.is_finite))) {
      for (const auto& step : steps) step->report_skip();
      return false;
    }
    if (clips_norms(hyper)) clipped = std::move(clipping.factors);
  }
  const Factor* clip_factors = clipped.empty() ? nullptr : clipped.data();
  for (const auto& step : steps) {
    step->run(clip_factors);
    if (clip_factors != nullptr) clip_factors += step->size();
  }
  return true;
}

}  // namespace fastadam::bind
