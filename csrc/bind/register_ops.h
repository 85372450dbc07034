// SPDX-License-Identifier: Apache-2.0
// The m.def lines, the same for every Backend (see tensors.h): python/fastadam/_cpu.pyi says what they do. Types are
// local to each module, because both may be loaded.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "../core/float_mode.h"
#include "group_steps.h"
#include "plan.h"

namespace fastadam::bind {

template <class Arrays>
void register_buffer(py::module_& m) {
  py::class_<Buffer>(m, "Buffer", py::module_local())
      .def(py::init(&read_variable<Arrays>), py::arg("object"), py::arg("label"))
      .def_readonly("label", &Buffer::label)
      .def_readonly("size", &Buffer::size)
      .def_property_readonly("address", &Buffer::begin)
      .def_property_readonly("nbytes", [](const Buffer& b) { return b.size * b.item_size; })
      .def_property_readonly("shape", [](const Buffer& b) { return py::tuple(py::cast(b.shape)); })
      .def_property_readonly("dtype", [](const Buffer& b) { return name_of(*b.dtype); })
      .def_property_readonly("state_dtype", [](const Buffer& b) { return name_of(state_dtype(*b.dtype)); })
      .def_property_readonly("order", &Buffer::order)
      .def_property_readonly("device", [](const Buffer& b) { return b.device(); })
      .def_property_readonly("source", [](const Buffer& b) { return b.gpu ? b.gpu->source : b.owner; })
      .def("is_current", &is_alive)
      .def("array", &as_numpy<Arrays>);
  m.def(
      "require_place", [](const Buffer& b, const Buffer& like) { require_place(b, b.label, like); }, py::arg("buffer"),
      py::arg("like"));
  m.def("bfloat16_bits", &bfloat16_bits, py::arg("bits").noconvert());
  m.def(
      "read_array",
      [](const py::object& object, const std::string& label) -> std::optional<std::pair<py::array, bool>> {
        std::optional<Buffer> b = read_array<Arrays>(object, Label{label});
        const bool unknown_to_numpy = b && !b->dtype && !py::isinstance<py::array>(b->owner);
        if (!b || unknown_to_numpy) return std::nullopt;
        b->label = label;
        return std::make_pair(as_numpy<Arrays>(*b), b->dtype == FASTADAM_BFLOAT16);
      },
      py::arg("object"), py::arg("label"));
}

// From StepHyper (python/fastadam/_core/native/plan.py), a tuple in the order of AdamHyper. The caster of std::tuple
// would get each item of a NamedTuple through Python, which is slow.
inline AdamHyper hyper_of(const py::tuple& numbers) {
  constexpr py::ssize_t kFields = 19;
  if (PyTuple_GET_SIZE(numbers.ptr()) != kFields) throw py::type_error("hyper: expected a StepHyper");
  py::ssize_t at = 0;
  const auto next = [&numbers, &at] { return py::handle(PyTuple_GET_ITEM(numbers.ptr(), at++)); };
  const auto number = [&next] {
    const double value = PyFloat_AsDouble(next().ptr());
    if (value == -1 && PyErr_Occurred() != nullptr) throw py::error_already_set();
    return value;
  };
  const auto flag = [&next] { return next().cast<bool>(); };
  return AdamHyper{next().cast<int64_t>(),
                   number(),
                   number(),
                   number(),
                   number(),
                   number(),
                   number(),
                   number(),
                   number(),
                   number(),
                   number(),
                   number(),
                   flag(),
                   flag(),
                   flag(),
                   number(),
                   flag(),
                   flag(),
                   next().cast<uint64_t>()};
}

// The memory of a step count: a writable int64 array, or None. The check of py::array_t<int64_t> is slower.
inline int64_t* place_of(const py::object& counter) {
  if (counter.is_none()) return nullptr;
  auto array = py::isinstance<py::array>(counter) ? py::reinterpret_borrow<py::array>(counter) : py::array();
  const py::dtype dtype = array.dtype();
  if (dtype.kind() != 'i' || dtype.itemsize() != 8 || dtype.byteorder() != '=' || array.size() == 0) {
    throw py::type_error("counter: expected an int64 array");
  }
  return static_cast<int64_t*>(array.mutable_data());
}

using Numbers = py::array_t<double, py::array::c_style | py::array::forcecast>;

// Sums of squares as rows of three numbers, factors as rows of two.
inline Numbers rows_of(const GradientNorms& norms) {
  Numbers rows({static_cast<py::ssize_t>(norms.size()), py::ssize_t{3}});
  double* at = rows.mutable_data();
  for (const auto& sums : norms.sums()) {
    for (double sum : {sums.square, sums.of_large, sums.of_small}) *at++ = sum;
  }
  return rows;
}

inline Numbers rows_of(const std::vector<Factor>& factors) {
  Numbers rows({static_cast<py::ssize_t>(factors.size()), py::ssize_t{2}});
  double* at = rows.mutable_data();
  for (const Factor& factor : factors) {
    *at++ = factor.value;
    *at++ = static_cast<double>(factor.exponent);
  }
  return rows;
}

inline void require_columns(const Numbers& rows, py::ssize_t columns) {
  if (rows.ndim() != 2 || rows.shape(1) != columns) throw py::value_error("expected rows of numbers");
}

inline std::vector<Factor> factors_of(const Numbers& rows) {
  require_columns(rows, 2);
  std::vector<Factor> factors;
  for (py::ssize_t i = 0; i < rows.shape(0); ++i) {
    factors.push_back({rows.at(i, 0), static_cast<int64_t>(rows.at(i, 1))});
  }
  return factors;
}

// The norms of several plans, joined in the order of the rows: the factors of the gradients, and whether all gradients
// (with hyper.require_finite) and all norms that are clipped are finite.
inline std::pair<Numbers, bool> clip(const Numbers& rows, const py::tuple& numbers, const Numbers& grad_factors) {
  require_columns(rows, 3);
  if (rows.shape(0) != grad_factors.size()) throw py::value_error("grad_factors: expected one for each gradient");
  const AdamHyper hyper = hyper_of(numbers);
  const DefaultArithmetic arithmetic;
  std::vector<GradientNorms::Sums> sums;
  for (py::ssize_t i = 0; i < rows.shape(0); ++i) sums.push_back({rows.at(i, 0), rows.at(i, 1), rows.at(i, 2)});
  const GradientNorms norms(std::move(sums));
  const double* factors = grad_factors.data();
  GradientNorms::Clipping clipping = norms.clip(hyper, [&](size_t i) { return hyper.gradient_scale * factors[i]; });
  const bool is_finite = (!hyper.require_finite || norms.all_finite()) && (!clips_norms(hyper) || clipping.is_finite);
  return {rows_of(clipping.factors), is_finite};
}

// Steps of parameters of PyTorch: of several plans whose norms are joined, with step counts that differ, and steps that
// are repeated without Python.
template <class Backend>
void register_repeats(py::module_& m, py::class_<Plan<Backend>>& type) {
  m.def(
      "same_items",
      [](const py::object& a, const py::object& b) {
        return py::isinstance<py::dict>(a) && py::isinstance<py::dict>(b) &&
               same_items(py::reinterpret_borrow<py::dict>(a), py::reinterpret_borrow<py::dict>(b));
      },
      py::arg("a"), py::arg("b"));
  py::class_<LogMemory>(m, "StepLog", py::module_local())
      .def(py::init<>())
      .def_property_readonly("nbytes", &LogMemory::size);
  m.def("set_thread_budget", &set_thread_budget, py::arg("threads"));
  m.def("clip", &clip, py::arg("norms"), py::arg("hyper"), py::arg("grad_factors"));
  type.def(
          "norms",
          [](Plan<Backend>& plan, const py::list& gradients, const py::tuple& hyper) {
            return rows_of(plan.norms(gradients, hyper_of(hyper)));
          },
          py::arg("gradients"), py::arg("hyper"))
      .def("can_undo", &Plan<Backend>::can_undo, py::arg("gradients"))
      .def(
          "step_logged",
          [](Plan<Backend>& plan, const py::list& gradients, const py::tuple& hyper,
             const std::vector<double>& grad_factors, const Numbers& clip_factors, LogMemory& log) {
            plan.step_logged(gradients, hyper_of(hyper), grad_factors, factors_of(clip_factors), log);
          },
          py::arg("gradients"), py::arg("hyper"), py::arg("grad_factors"), py::arg("clip_factors"), py::arg("log"))
      .def(
          "changed_since",
          [](Plan<Backend>& plan, const py::list& gradients, const py::tuple& hyper,
             const std::vector<double>& grad_factors,
             LogMemory& log) { return plan.changed_since(gradients, hyper_of(hyper), grad_factors, log); },
          py::arg("gradients"), py::arg("hyper"), py::arg("grad_factors"), py::arg("log"))
      .def(
          "undo",
          [](Plan<Backend>& plan, const py::list& gradients, const py::tuple& hyper,
             const std::vector<double>& grad_factors, const Numbers& clip_factors, LogMemory& log,
             const std::optional<Numbers>& instead) {
            std::vector<Factor> others;
            if (instead) others = factors_of(*instead);
            return plan.undo(gradients, hyper_of(hyper), grad_factors, factors_of(clip_factors), log,
                             instead ? &others : nullptr);
          },
          py::arg("gradients"), py::arg("hyper"), py::arg("grad_factors"), py::arg("clip_factors"), py::arg("log"),
          py::arg("instead") = py::none())
      .def(
          "step_clipped",
          [](Plan<Backend>& plan, const py::list& gradients, const py::tuple& hyper,
             const std::vector<double>& grad_factors, const py::object& counter, const Numbers& clip_factors) {
            return plan.step(gradients, hyper_of(hyper), grad_factors, place_of(counter), factors_of(clip_factors));
          },
          py::arg("gradients"), py::arg("hyper"), py::arg("grad_factors"), py::arg("counter"), py::arg("clip_factors"))
      .def(
          "step_apart",
          [](Plan<Backend>& plan, const py::list& gradients, const py::tuple& hyper,
             const std::vector<double>& grad_factors, const py::object& counter, const std::vector<int64_t>& steps,
             const Numbers& clip_factors) {
            return plan.step_apart(gradients, hyper_of(hyper), grad_factors, place_of(counter), steps,
                                   factors_of(clip_factors));
          },
          py::arg("gradients"), py::arg("hyper"), py::arg("grad_factors"), py::arg("counter"), py::arg("steps"),
          py::arg("clip_factors"));
  type.def(
          "report_skip",
          [](Plan<Backend>& plan, const py::list& gradients, const py::tuple& hyper) {
            plan.report_skip(gradients, hyper_of(hyper));
          },
          py::arg("gradients"), py::arg("hyper"))
      .def("follow", &Plan<Backend>::follow, py::arg("states"), py::arg("keys"), py::arg("masters") = py::list());
  m.def("step_groups_again", &step_groups_again<Backend>, py::arg("plans"), py::arg("groups"), py::arg("followed"),
        py::arg("state"), py::arg("known"));
}

// One row for each variable: gradient_norm, update_rms, parameter_rms, unchanged, not_finite, size.
inline py::array_t<double> rows_of(const std::vector<fastadam_telemetry>& telemetry) {
  py::array_t<double> rows({static_cast<py::ssize_t>(telemetry.size()), py::ssize_t{6}});
  double* at = rows.mutable_data();
  for (const fastadam_telemetry& t : telemetry) {
    for (double number : {t.gradient_norm, t.update_rms, t.parameter_rms, static_cast<double>(t.unchanged),
                          static_cast<double>(t.not_finite), static_cast<double>(t.size)}) {
      *at++ = number;
    }
  }
  return rows;
}

template <class Backend>
py::class_<Plan<Backend>> register_ops(py::module_& m) {
  register_buffer<typename Backend::Arrays>(m);
  py::class_<Slices>(m, "Slices", py::module_local())
      .def(py::init<py::object, py::object>(), py::arg("values"), py::arg("indices"))
      .def_readonly("values", &Slices::values)
      .def_readonly("indices", &Slices::indices);
  py::class_<ClosedForms, std::shared_ptr<ClosedForms>>(m, "ClosedForms", py::module_local())
      .def(py::init<>())
      .def_static("exist", &ClosedForms::exist, py::arg("beta_1"), py::arg("beta_2"), py::arg("amsgrad"));
  using BackendPlan = Plan<Backend>;
  py::class_<BackendPlan> type(m, "Plan", py::module_local());
  type.def(py::init([](std::vector<Buffer> variables, const py::dict& slots, const std::vector<bool>& decays,
                       std::vector<int64_t> positions, bool lazy,
                       const typename TensorSet<Backend>::Histories& histories, const py::object& context,
                       const py::list& copies, bool stochastic_moments, bool stochastic_variables,
                       std::vector<uint64_t> numbers, const py::dict& names) {
             const Randomness random{stochastic_moments, stochastic_variables, std::move(numbers)};
             return std::make_unique<BackendPlan>(std::move(variables), slots, decays, std::move(positions), lazy,
                                                  histories, context, copies, names, random);
           }),
           py::arg("variables"), py::arg("slots"), py::arg("decays"), py::arg("positions"), py::arg("lazy"),
           py::arg("histories"), py::arg("context") = py::none(), py::arg("copies") = py::list(),
           py::arg("stochastic_moments") = false, py::arg("stochastic_variables") = false,
           py::arg("numbers") = std::vector<uint64_t>(), py::arg("names") = py::dict())
      .def(
          "catch_up",
          [](BackendPlan& plan, const std::optional<py::object>& ids, const py::tuple& hyper,
             const py::object& counter) { plan.catch_up(ids, hyper_of(hyper), place_of(counter)); },
          py::arg("ids"), py::arg("hyper"), py::arg("counter"))
      .def_property_readonly("all_finite", &BackendPlan::all_finite)
      .def(
          "gradients_of",
          [](const BackendPlan& plan, const py::list& pairs, const py::type& holder) {
            return plan.variables().gradients_of(pairs, holder);
          },
          py::arg("pairs"), py::arg("holder"))
      .def(
          "holds",
          [](const BackendPlan& plan, const py::list& variables, const py::dict& slots, const py::list& copies) {
            return plan.variables().holds(variables, slots, copies);
          },
          py::arg("variables"), py::arg("slots"), py::arg("copies"))
      .def(
          "has_copies",
          [](const BackendPlan& plan, const py::list& copies) { return plan.variables().has_copies(copies); },
          py::arg("copies"))
      .def(
          "gradient_dtype",
          [](const BackendPlan& plan, size_t place) { return name_of(plan.variables().gradient_dtype(place)); },
          py::arg("place"))
      .def("set_telemetry", &BackendPlan::set_telemetry, py::arg("wanted"))
      .def("telemetry", [](const BackendPlan& plan) { return rows_of(plan.variables().telemetry()); })
      .def("check", &BackendPlan::check, py::arg("gradients"))
      .def(
          "check_numbers",
          [](BackendPlan& plan, const py::tuple& hyper, const std::vector<double>& grad_factors) {
            plan.check_numbers(hyper_of(hyper), grad_factors);
          },
          py::arg("hyper"), py::arg("grad_factors"))
      .def(
          "step",
          [](BackendPlan& plan, const py::list& gradients, const py::tuple& hyper,
             const std::vector<double>& grad_factors, const py::object& counter) {
            return plan.step(gradients, hyper_of(hyper), grad_factors, place_of(counter));
          },
          py::arg("gradients"), py::arg("hyper"), py::arg("grad_factors"), py::arg("counter"))
      .def(
          "remember",
          [](BackendPlan& plan, const py::tuple& hyper, int64_t stamp, std::vector<double> grad_factors) {
            plan.remember(hyper_of(hyper), stamp, std::move(grad_factors));
          },
          py::arg("hyper"), py::arg("stamp"), py::arg("grad_factors"))
      .def(
          "step_again",
          [](BackendPlan& plan, const py::list& pairs, const py::type& holder, int64_t stamp,
             const py::array& counter) { return plan.step_again(pairs, holder, stamp, place_of(counter)); },
          py::arg("pairs"), py::arg("holder"), py::arg("stamp"), py::arg("counter"))
      .def(
          "accumulate",
          [](BackendPlan& plan, const py::list& gradients, double scale, bool require_finite, bool restart,
             BackendPlan* update, const py::list& rows, const py::tuple& hyper, const py::object& counter) {
            return plan.accumulate(gradients, scale, require_finite, restart, update, rows, hyper_of(hyper),
                                   place_of(counter));
          },
          py::arg("gradients"), py::arg("scale"), py::arg("require_finite"), py::arg("restart"), py::arg("update"),
          py::arg("rows"), py::arg("hyper"), py::arg("counter"));
  if constexpr (std::is_same_v<typename Backend::Arrays, HostArrays>) register_repeats<Backend>(m, type);
  return type;
}

}  // namespace fastadam::bind
