// SPDX-License-Identifier: Apache-2.0
// The extension module fastadam._cpu.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "../core/split.h"
#include "../cpu/dispatch.h"
#include "../cpu/launch.h"
#include "cpu_backend.h"
#include "register_ops.h"

namespace {

namespace py = pybind11;
namespace cpu = fastadam::cpu;

std::string quoted_names(bool usable_only) {
  std::string names;
  for (const cpu::Isa& isa : cpu::isas()) {
    if (usable_only && !isa.usable) continue;
    names += (names.empty() ? "'" : ", '") + std::string(isa.name) + "'";
  }
  return names;
}

void set_isa(const std::string& name) {
  for (const cpu::Isa& isa : cpu::isas()) {
    if (name != isa.name) continue;
    if (!isa.usable) {
      throw py::value_error("isa '" + name + "': not supported by this CPU, expected one of " + quoted_names(true));
    }
    cpu::set_current_isa(isa);
    return;
  }
  throw py::value_error("isa '" + name + "': not in this build, expected one of " + quoted_names(true));
}

std::vector<std::pair<std::string, bool>> compiled_isas() {
  std::vector<std::pair<std::string, bool>> list;
  for (const cpu::Isa& isa : cpu::isas()) list.emplace_back(isa.name, isa.usable);
  return list;
}

// The pieces of every share, as the launch walks them: addresses are only computed with, never read.
std::vector<std::vector<std::tuple<int64_t, int64_t, int64_t>>> split(const std::vector<int64_t>& sizes,
                                                                      const std::vector<uint64_t>& addresses,
                                                                      const std::vector<int64_t>& item_sizes,
                                                                      int64_t shares) {
  std::vector<int64_t> offsets{0};
  for (int64_t size : sizes) offsets.push_back(offsets.back() + size);
  const auto place = [&](int64_t k) {
    return std::pair<uint64_t, int64_t>(addresses[static_cast<size_t>(k)], item_sizes[static_cast<size_t>(k)]);
  };
  std::vector<std::vector<std::tuple<int64_t, int64_t, int64_t>>> result(static_cast<size_t>(shares));
  for (int64_t share = 0; share < shares; ++share) {
    fastadam::for_each_piece(
        offsets.data(), static_cast<int64_t>(sizes.size()), share, shares, place,
        [&](int64_t k, int64_t begin, int64_t end) { result[static_cast<size_t>(share)].emplace_back(k, begin, end); });
  }
  return result;
}

// Sums of squares of arrays of the four dtypes, contiguous in any order.
std::vector<double> sums_of_squares(const py::list& objects) {
  using namespace fastadam::bind;
  using fastadam::TensorArgs;
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
    cpu::run_norm(norms.args());
  }
  std::vector<double> sums;
  for (size_t i = 0; i < tensors.size(); ++i) sums.push_back(norms.sum_squares(i));
  return sums;
}

}  // namespace

PYBIND11_MODULE(_cpu, m, py::mod_gil_not_used()) {
  m.attr("__version__") = FASTADAM_VERSION;
  m.attr("compiler") = FASTADAM_COMPILER;
  fastadam::bind::register_ops<fastadam::bind::CpuBackend>(m);
  m.def("sums_of_squares", &sums_of_squares, py::arg("arrays"));
  m.def("compiled_isas", &compiled_isas);
  m.def("current_isa", [] { return std::string(cpu::current_isa().name); });
  m.def("set_isa", &set_isa, py::arg("name"));
  m.def("num_threads", &cpu::num_threads);
  m.def("requested_threads", &cpu::requested_threads);
  m.def("set_num_threads", &cpu::set_num_threads, py::arg("count"));
  m.def("split", &split, py::arg("sizes"), py::arg("addresses"), py::arg("item_sizes"), py::arg("shares"));
}
