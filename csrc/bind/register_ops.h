// SPDX-License-Identifier: Apache-2.0
// The m.def lines, once for every backend: python/fastadam/_cpu.pyi says what they do.
// A Backend is that of tensors.h. Types are local to each module: both may be loaded.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>
#include <memory>
#include <tuple>

#include "plan.h"

namespace fastadam::bind {

inline void register_buffer(py::module_& m) {
  py::class_<Buffer>(m, "Buffer", py::module_local())
      .def(py::init(&read_variable), py::arg("object"), py::arg("label"))
      .def_readonly("label", &Buffer::label)
      .def_readonly("size", &Buffer::size)
      .def_property_readonly("address", &Buffer::begin)
      .def_property_readonly("nbytes", [](const Buffer& b) { return b.size * b.item_size; })
      .def_property_readonly("shape", [](const Buffer& b) { return py::tuple(py::cast(b.shape)); })
      .def_property_readonly("dtype", [](const Buffer& b) { return name_of(*b.dtype); })
      .def_property_readonly("state_dtype", [](const Buffer& b) { return name_of(state_dtype(*b.dtype)); })
      .def_property_readonly("order", &Buffer::order)
      .def_property_readonly("device", [](const Buffer& b) { return b.device; })
      .def_property_readonly("source", [](const Buffer& b) { return b.stream_source ? b.stream_source : b.owner; })
      .def("is_current", &is_current)
      .def("array", &as_numpy);
  m.def(
      "require_place", [](const Buffer& b, const Buffer& like) { require_place(b, b.label, like); }, py::arg("buffer"),
      py::arg("like"));
  m.def("bfloat16_bits", &bfloat16_bits, py::arg("bits").noconvert());
  m.def(
      "read_array",
      [](const py::object& object, const std::string& label) -> std::optional<std::pair<py::array, bool>> {
        std::optional<Buffer> b = read_array(object, Label{label});
        const bool unknown_to_numpy = b && !b->dtype && !py::isinstance<py::array>(b->owner);
        if (!b || unknown_to_numpy) return std::nullopt;
        b->label = label;
        return std::make_pair(as_numpy(*b), b->dtype == DType::kBFloat16);
      },
      py::arg("object"), py::arg("label"));
}

// StepHyper of python/fastadam/hyper.py, a tuple in the order of AdamHyper.
using HyperTuple = std::tuple<int64_t, double, double, double, double, double, double, double, double, double, double,
                              double, bool, bool, bool>;

struct MakeHyper : AdamHyper {
  template <class... Fields>
  explicit MakeHyper(Fields... fields) : AdamHyper{fields...} {}
};

// A writable int64 scalar array, or None.
using Counter = std::optional<py::array_t<int64_t>>;

inline int64_t* place_of(Counter& counter) { return counter ? counter->mutable_data() : nullptr; }

template <class Backend>
py::class_<Plan<Backend>> register_ops(py::module_& m) {
  register_buffer(m);
  const auto numbers = [](const HyperTuple& hyper) -> AdamHyper { return std::make_from_tuple<MakeHyper>(hyper); };
  py::class_<Slices>(m, "Slices", py::module_local())
      .def(py::init<py::object, py::object>(), py::arg("values"), py::arg("indices"))
      .def_readonly("values", &Slices::values)
      .def_readonly("indices", &Slices::indices);
  py::class_<ClosedForms, std::shared_ptr<ClosedForms>>(m, "ClosedForms", py::module_local())
      .def(py::init<>())
      .def_static("exist", &ClosedForms::exist, py::arg("beta_1"), py::arg("beta_2"), py::arg("amsgrad"));
  using BackendPlan = Plan<Backend>;
  return py::class_<BackendPlan>(m, "Plan", py::module_local())
      .def(py::init<std::vector<Buffer>, const py::dict&, const std::vector<bool>&, std::vector<int64_t>, bool,
                    const typename TensorSet<Backend>::Histories&, const py::object&>(),
           py::arg("variables"), py::arg("slots"), py::arg("decays"), py::arg("positions"), py::arg("lazy"),
           py::arg("histories"), py::arg("context") = py::none())
      .def(
          "catch_up",
          [numbers](BackendPlan& plan, const std::optional<py::object>& ids, const HyperTuple& hyper, Counter counter) {
            plan.catch_up(ids, numbers(hyper), place_of(counter));
          },
          py::arg("ids"), py::arg("hyper"), py::arg("counter").noconvert())
      .def_property_readonly("all_finite", &BackendPlan::all_finite)
      .def(
          "matches",
          [](const BackendPlan& plan, const py::list& objects, const std::vector<int64_t>& positions) {
            return plan.set().matches(objects, positions);
          },
          py::arg("objects"), py::arg("positions"))
      .def("check", &BackendPlan::check, py::arg("gradients"))
      .def(
          "check_numbers",
          [numbers](BackendPlan& plan, const HyperTuple& hyper, const std::vector<double>& grad_factors) {
            plan.check_numbers(numbers(hyper), grad_factors);
          },
          py::arg("hyper"), py::arg("grad_factors"))
      .def(
          "step",
          [numbers](BackendPlan& plan, const py::list& gradients, const HyperTuple& hyper,
                    const std::vector<double>& grad_factors,
                    Counter counter) { return plan.step(gradients, numbers(hyper), grad_factors, place_of(counter)); },
          py::arg("gradients"), py::arg("hyper"), py::arg("grad_factors"), py::arg("counter").noconvert())
      .def(
          "accumulate",
          [numbers](BackendPlan& plan, const py::list& gradients, double scale, bool require_finite, bool restart,
                    BackendPlan* update, const HyperTuple& hyper, Counter counter) {
            return plan.accumulate(gradients, scale, require_finite, restart, update, numbers(hyper),
                                   place_of(counter));
          },
          py::arg("gradients"), py::arg("scale"), py::arg("require_finite"), py::arg("restart"), py::arg("update"),
          py::arg("hyper"), py::arg("counter").noconvert());
}

}  // namespace fastadam::bind
