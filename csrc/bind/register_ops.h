// SPDX-License-Identifier: Apache-2.0
// The m.def lines, once for every backend: python/fastadam/_cpu.pyi says what they do.
// A Backend has static functions index_rows(IndexArgs&), run_step(const StepArgs&), run_accumulate(const
// AccumulateArgs&), run_norm(const NormArgs&) and run_sum_rows(const SumArgs&).
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>
#include <memory>
#include <tuple>

#include "plan.h"

namespace fastadam::bind {

inline void register_buffer(py::module_& m) {
  py::class_<Buffer>(m, "Buffer")
      .def(py::init(&read_variable), py::arg("object"), py::arg("label"))
      .def_readonly("label", &Buffer::label)
      .def_readonly("size", &Buffer::size)
      .def_property_readonly("address", &Buffer::begin)
      .def_property_readonly("nbytes", [](const Buffer& b) { return b.size * b.item_size; })
      .def_property_readonly("shape", [](const Buffer& b) { return py::tuple(py::cast(b.shape)); })
      .def_property_readonly("dtype", [](const Buffer& b) { return name_of(*b.dtype); })
      .def_property_readonly("state_dtype", [](const Buffer& b) { return name_of(state_dtype(*b.dtype)); })
      .def_property_readonly("order", &Buffer::order)
      .def("is_current", &is_current)
      .def("array", &as_numpy);
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

// Sums of squares of arrays of the four dtypes, contiguous in any order.
template <class Backend>
std::vector<double> sums_of_squares(const py::list& objects) {
  std::vector<TensorArgs> tensors;
  std::vector<Buffer> buffers;
  for (size_t i = 0; i < objects.size(); ++i) {
    const Label label{"grads", static_cast<int64_t>(i)};
    std::optional<Buffer> b = read_array(objects[i], label);
    if (!b || !b->dtype || !b->native_order || !b->aligned() || !(b->c_contiguous || b->f_contiguous)) {
      throw py::type_error(label() + ": must be converted first");
    }
    TensorArgs tensor{};
    tensor.grad = b->data;
    tensor.grad_size = b->size;
    tensor.dtype = tensor.grad_dtype = *b->dtype;
    tensors.push_back(tensor);
    buffers.push_back(*std::move(b));
  }
  Norms norms;
  norms.resize(tensors, std::numeric_limits<double>::infinity());
  {
    // Safe: only the memory that `buffers` keeps alive is read.
    const py::gil_scoped_release unlocked;
    Backend::run_norm(norms.args());
  }
  std::vector<double> sums;
  for (size_t i = 0; i < tensors.size(); ++i) sums.push_back(norms.sum_squares(i));
  return sums;
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
void register_ops(py::module_& m) {
  register_buffer(m);
  m.def("sums_of_squares", &sums_of_squares<Backend>, py::arg("arrays"));
  const auto numbers = [](const HyperTuple& hyper) -> AdamHyper { return std::make_from_tuple<MakeHyper>(hyper); };
  py::class_<Slices>(m, "Slices")
      .def(py::init<py::object, py::object>(), py::arg("values"), py::arg("indices"))
      .def_readonly("values", &Slices::values)
      .def_readonly("indices", &Slices::indices);
  py::class_<ClosedForms, std::shared_ptr<ClosedForms>>(m, "ClosedForms")
      .def(py::init<>())
      .def_static("exist", &ClosedForms::exist, py::arg("beta_1"), py::arg("beta_2"), py::arg("amsgrad"));
  py::class_<Plan>(m, "Plan")
      .def(py::init([](std::vector<Buffer> variables, const py::dict& slots, const std::vector<bool>& decays,
                       std::vector<int64_t> positions, bool lazy, const Histories& histories) {
             return Plan(TensorSet(std::move(variables), slots, decays, std::move(positions), lazy, histories));
           }),
           py::arg("variables"), py::arg("slots"), py::arg("decays"), py::arg("positions"), py::arg("lazy"),
           py::arg("histories"))
      .def(
          "catch_up",
          [numbers](Plan& plan, const std::optional<py::array>& ids, const HyperTuple& hyper) {
            plan.catch_up<Backend>(ids, numbers(hyper));
          },
          py::arg("ids"), py::arg("hyper"))
      .def_property_readonly("all_finite", &Plan::all_finite)
      .def(
          "matches",
          [](const Plan& plan, const py::list& objects, const std::vector<int64_t>& positions) {
            return plan.set().matches(objects, positions);
          },
          py::arg("objects"), py::arg("positions"))
      .def("check", &Plan::check<Backend>, py::arg("gradients"))
      .def(
          "check_numbers",
          [numbers](Plan& plan, const HyperTuple& hyper, const std::vector<double>& grad_factors) {
            plan.check_numbers(numbers(hyper), grad_factors);
          },
          py::arg("hyper"), py::arg("grad_factors"))
      .def(
          "step",
          [numbers](Plan& plan, const py::list& gradients, const HyperTuple& hyper,
                    const std::vector<double>& grad_factors, Counter counter) {
            return plan.step<Backend>(gradients, numbers(hyper), grad_factors, place_of(counter));
          },
          py::arg("gradients"), py::arg("hyper"), py::arg("grad_factors"), py::arg("counter").noconvert())
      .def(
          "accumulate",
          [numbers](Plan& plan, const py::list& gradients, double scale, bool require_finite, bool restart,
                    Plan* update, const HyperTuple& hyper, Counter counter) {
            return plan.accumulate<Backend>(gradients, scale, require_finite, restart, update, numbers(hyper),
                                            place_of(counter));
          },
          py::arg("gradients"), py::arg("scale"), py::arg("require_finite"), py::arg("restart"), py::arg("update"),
          py::arg("hyper"), py::arg("counter").noconvert());
}

}  // namespace fastadam::bind
