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
  constexpr py::ssize_t kFields = 17;
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
                   flag()};
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

inline std::vector<double> vector_of(const Numbers& numbers) {
  return {numbers.data(), numbers.data() + numbers.size()};
}

inline Numbers array_of(const std::vector<double>& numbers) {
  return Numbers(static_cast<py::ssize_t>(numbers.size()), numbers.data());
}

// The norms of several plans, joined in the order of the arrays: the factors of the gradients, and whether all
// gradients (with hyper.require_finite) and all norms that are clipped are finite.
inline std::pair<Numbers, bool> clip(const Numbers& squares, const Numbers& rescaled, const py::tuple& numbers,
                                     const Numbers& grad_factors) {
  if (squares.size() != rescaled.size() || squares.size() != grad_factors.size()) {
    throw py::value_error("squares, rescaled, grad_factors: expected one number for each gradient");
  }
  const AdamHyper hyper = hyper_of(numbers);
  const DefaultArithmetic arithmetic;
  const GradientNorms norms(vector_of(squares), vector_of(rescaled));
  const double* factors = grad_factors.data();
  GradientNorms::Clipping clipping = norms.clip(hyper, [&](size_t i) { return hyper.gradient_scale * factors[i]; });
  const bool is_finite = (!hyper.require_finite || norms.all_finite()) && (!clips_norms(hyper) || clipping.is_finite);
  return {array_of(clipping.factors), is_finite};
}

// Steps of parameters of PyTorch: of several plans whose norms are joined, with step counts that differ, and steps that
// are repeated without Python.
template <class Backend>
void register_repeats(py::module_& m, py::class_<Plan<Backend>>& type) {
  m.def("same_items", &same_items, py::arg("a"), py::arg("b"));
  m.def("clip", &clip, py::arg("squares"), py::arg("rescaled"), py::arg("hyper"), py::arg("grad_factors"));
  type.def(
          "norms",
          [](Plan<Backend>& plan, const py::list& gradients, const py::tuple& hyper) {
            const GradientNorms norms = plan.norms(gradients, hyper_of(hyper));
            return std::make_pair(array_of(norms.squares()), array_of(norms.rescaled()));
          },
          py::arg("gradients"), py::arg("hyper"))
      .def(
          "step_clipped",
          [](Plan<Backend>& plan, const py::list& gradients, const py::tuple& hyper,
             const std::vector<double>& grad_factors, const py::object& counter, const Numbers& clip_factors) {
            return plan.step(gradients, hyper_of(hyper), grad_factors, place_of(counter), vector_of(clip_factors));
          },
          py::arg("gradients"), py::arg("hyper"), py::arg("grad_factors"), py::arg("counter"), py::arg("clip_factors"))
      .def(
          "step_apart",
          [](Plan<Backend>& plan, const py::list& gradients, const py::tuple& hyper,
             const std::vector<double>& grad_factors, const py::object& counter, const std::vector<int64_t>& steps,
             const Numbers& clip_factors) {
            return plan.step_apart(gradients, hyper_of(hyper), grad_factors, place_of(counter), steps,
                                   vector_of(clip_factors));
          },
          py::arg("gradients"), py::arg("hyper"), py::arg("grad_factors"), py::arg("counter"), py::arg("steps"),
          py::arg("clip_factors"));
  type.def("follow", &Plan<Backend>::follow, py::arg("states"), py::arg("keys"));
  m.def("step_groups_again", &step_groups_again<Backend>, py::arg("plans"), py::arg("groups"), py::arg("followed"),
        py::arg("state"), py::arg("known"));
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
  type.def(py::init<std::vector<Buffer>, const py::dict&, const std::vector<bool>&, std::vector<int64_t>, bool,
                    const typename TensorSet<Backend>::Histories&, const py::object&>(),
           py::arg("variables"), py::arg("slots"), py::arg("decays"), py::arg("positions"), py::arg("lazy"),
           py::arg("histories"), py::arg("context") = py::none())
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
          [](const BackendPlan& plan, const py::list& variables, const py::dict& slots) {
            return plan.variables().holds(variables, slots);
          },
          py::arg("variables"), py::arg("slots"))
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
             BackendPlan* update, const py::tuple& hyper, const py::object& counter) {
            return plan.accumulate(gradients, scale, require_finite, restart, update, hyper_of(hyper),
                                   place_of(counter));
          },
          py::arg("gradients"), py::arg("scale"), py::arg("require_finite"), py::arg("restart"), py::arg("update"),
          py::arg("hyper"), py::arg("counter"));
  if constexpr (std::is_same_v<typename Backend::Arrays, HostArrays>) register_repeats<Backend>(m, type);
  return type;
}

}  // namespace fastadam::bind
