// SPDX-License-Identifier: Apache-2.0
// The extension module fastadam._cpu.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <vector>

#include "../core/split.h"
#include "../cpu/dispatch.h"
#include "../cpu/launch.h"
#include "register_ops.h"

namespace {

namespace py = pybind11;
namespace cpu = fastadam::cpu;

struct CpuBackend {
  static void index_rows(fastadam::IndexArgs& args) { cpu::index_rows(args); }
  static void run_step(const fastadam::StepArgs& step) { cpu::run_step(step); }
  static void run_accumulate(const fastadam::AccumulateArgs& args) { cpu::run_accumulate(args); }
  static void run_norm(const fastadam::NormArgs& args) { cpu::run_norm(args); }
  static void run_sum_rows(const fastadam::SumArgs& args) { cpu::run_sum_rows(args); }
};

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

}  // namespace

PYBIND11_MODULE(_cpu, m, py::mod_gil_not_used()) {
  m.attr("__version__") = FASTADAM_VERSION;
  m.attr("compiler") = FASTADAM_COMPILER;
  fastadam::bind::register_ops<CpuBackend>(m);
  m.def("compiled_isas", &compiled_isas);
  m.def("current_isa", [] { return std::string(cpu::current_isa().name); });
  m.def("set_isa", &set_isa, py::arg("name"));
  m.def("num_threads", &cpu::num_threads);
  m.def("requested_threads", &cpu::requested_threads);
  m.def("set_num_threads", &cpu::set_num_threads, py::arg("count"));
  m.def("split", &split, py::arg("sizes"), py::arg("addresses"), py::arg("item_sizes"), py::arg("shares"));
}
