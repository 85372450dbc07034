// SPDX-License-Identifier: Apache-2.0
// The extension module fastadam._cuda. It links no driver: without one it loads, and says so.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <utility>

#include "cuda_backend.h"
#include "register_ops.h"

namespace {

namespace py = pybind11;
namespace cuda = fastadam::cuda;
using namespace fastadam::bind;

py::array to_host(const py::object& array) { return copy_to_numpy(require_cuda_array(array, "array")); }

void register_device_array(py::module_& m) {
  py::class_<DeviceArray>(m, "DeviceArray", py::module_local())
      .def(py::init(&make_device_array), py::arg("shape"), py::arg("dtype"), py::arg("order"), py::arg("device"),
           py::arg("stream"))
      .def_property_readonly("shape", [](const DeviceArray& a) { return py::tuple(py::cast(a.shape)); })
      .def_property_readonly("size", &DeviceArray::size)
      .def_property_readonly(
          "dtype", [](const DeviceArray& a) { return a.is_bfloat16 ? std::string("bfloat16") : text(a.dtype); })
      .def_readonly("device", &DeviceArray::device)
      .def_property_readonly("__cuda_array_interface__", &array_interface)
      .def("get", &to_host)
      .def("__repr__", [](const DeviceArray& a) {
        return "<array on CUDA device " + std::to_string(a.device) + ": " +
               (a.is_bfloat16 ? "bfloat16" : text(a.dtype)) + " " + tuple_text(a.shape) + ">";
      });
  m.def("to_host", &to_host, py::arg("array"));
  m.def("assign", &assign, py::arg("array"), py::arg("values"));
}

void register_context(py::module_& m) {
  py::class_<CudaContext, std::shared_ptr<CudaContext>>(m, "Context", py::module_local())
      .def(py::init<int>(), py::arg("device"))
      .def_readonly("device", &CudaContext::device)
      .def("take_failure", &CudaContext::take_failure)
      .def("wait", &CudaContext::wait)
      .def_property_readonly("is_captured", [](const CudaContext& c) { return c.native->is_captured(); })
      .def("step", &CudaContext::step);
  py::class_<cuda::DeviceHistory, std::shared_ptr<cuda::DeviceHistory>>(m, "History", py::module_local())
      .def(py::init([](const py::array& alphas, const py::array& keeps, const py::array& peaks, int64_t steps,
                       int device, uintptr_t stream) {
             const cuda::DeviceScope scope(device);
             const bool is_double = alphas.itemsize() == 8;
             const int64_t room = alphas.size();
             const void* const rates[] = {alphas.data(), keeps.data(), peaks.data()};
             const ReleasedGil unlocked;
             auto history = std::make_shared<cuda::DeviceHistory>(is_double, room);
             history->write(rates[0], rates[1], rates[2], steps, reinterpret_cast<void*>(stream));
             return history;
           }),
           py::arg("alphas"), py::arg("keeps"), py::arg("peaks"), py::arg("steps"), py::arg("device"),
           py::arg("stream"));
}

// Rows of a table by ids, both on one device, after all earlier work of the context and before all later work.
void gather(cuda::Gather& gather, const Buffer& table, const py::object& ids, const py::object& out,
            CudaContext& context) {
  const Buffer indices = require_cuda_array(ids, "ids");
  const Buffer to = require_cuda_array(out, "out");
  for (const Buffer* b : {&indices, &to}) require_place(*b, b->label, table);
  const bool are_ids = !indices.dtype && (indices.dtype_name == "int32" || indices.dtype_name == "int64");
  if (!are_ids || !indices.c_contiguous) throw py::type_error("ids: expected a contiguous array of int32 or int64");
  if (table.shape.empty() || !table.c_contiguous) {
    throw py::value_error(table.label + ": expected rows side by side, at least one axis in order C");
  }
  std::vector<int64_t> shape = indices.shape;
  shape.insert(shape.end(), table.shape.begin() + 1, table.shape.end());
  if (to.shape != shape || to.dtype != table.dtype || !to.c_contiguous || !to.writable) {
    throw py::value_error("out: " + (to.dtype ? name_of(*to.dtype) : to.dtype_name) + " " + tuple_text(to.shape) +
                          ", expected a writable " + name_of(*table.dtype) + " " + tuple_text(shape) + " in order C");
  }
  if (to.begin() < table.end() && table.begin() < to.end()) {
    throw py::value_error("out: shares memory with " + table.label + ", expected a separate array");
  }
  const CudaBackend::Scope scope(context.device, *context.native, table);
  const int64_t width = table.shape[0] == 0 ? 0 : table.size / table.shape[0];
  for (const Buffer* b : {&indices, &to}) order_after(*context.native, b->stream());
  gather.run(table.data, table.shape[0], width, *table.dtype, indices.data, indices.item_size == 8, indices.size,
             to.data, context.native->stream());
}

void register_gather(py::module_& m) {
  py::class_<cuda::Gather>(m, "Gather", py::module_local())
      .def(py::init([](int device) {
             const cuda::DeviceScope scope(device);
             return std::make_unique<cuda::Gather>();
           }),
           py::arg("device"))
      .def("run", &gather, py::arg("table"), py::arg("ids"), py::arg("out"), py::arg("context"))
      .def("take_failure", [](cuda::Gather& g) -> std::optional<std::pair<int64_t, int64_t>> {
        const std::optional<cuda::Failure> failure = g.take_failure();
        if (!failure) return std::nullopt;
        return std::make_pair(failure->position, failure->index);
      });
}

// Whether the stream that an array's library works on is being captured; the legacy stream cannot be.
bool is_capturing(const py::object& array) {
  const uintptr_t stream = stream_of(array).value_or(0);
  return stream >= 2 && cuda::is_capturing(reinterpret_cast<void*>(stream));
}

std::pair<int, std::string> device_count() {
  std::string reason;
  const int count = cuda::device_count(reason);
  return {count, reason};
}

}  // namespace

PYBIND11_MODULE(_cuda, m, py::mod_gil_not_used()) {
  m.attr("architectures") = cuda::architectures();
  m.def("device_count", &device_count);
  m.def("stream_of", &stream_of, py::arg("array"));
  m.def("is_capturing", &is_capturing, py::arg("array"));
  register_device_array(m);
  register_context(m);
  register_gather(m);
  using CudaPlan = Plan<CudaBackend>;
  register_ops<CudaBackend>(m)
      .def(
          "set_device_numbers",
          [](CudaPlan& plan, const py::object& rate, const py::object& grad_scale, const py::object& found_inf,
             bool counts) { plan.backend().set_device_numbers(rate, grad_scale, found_inf, counts); },
          py::arg("rate"), py::arg("grad_scale") = py::none(), py::arg("found_inf") = py::none(),
          py::arg("counts") = false)
      .def(
          "can_count",
          [](CudaPlan& plan, const py::tuple& hyper) {
            const CudaBackend::Scope scope(plan.backend(), plan.variables().place());
            return plan.backend().can_count(hyper_of(hyper));
          },
          py::arg("hyper"));
}
