// SPDX-License-Identifier: Apache-2.0
// The extension module fastadam._cpu.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../core/float_mode.h"
#include "../core/split.h"
#include "../include/fastadam.h"
#include "build_info.h"
#include "cpu_backend.h"
#include "file_pages.h"
#include "gil.h"
#include "register_ops.h"
#include "small_moments.h"
#include "swapped.h"

namespace {

namespace py = pybind11;
using fastadam::bind::require_ok;

std::string quoted_names(bool usable_only) {
  std::string names;
  for (int32_t i = 0; fastadam_isa(i) != nullptr; ++i) {
    if (usable_only && !fastadam_isa_is_usable(i)) continue;
    names += (names.empty() ? "'" : ", '") + std::string(fastadam_isa(i)) + "'";
  }
  return names;
}

void set_isa(const std::string& name) {
  if (fastadam_set_isa(name.c_str()) == FASTADAM_OK) return;
  const bool exists = quoted_names(false).find("'" + name + "'") != std::string::npos;
  throw py::value_error("isa '" + name + (exists ? "': not supported by this CPU" : "': not in this build") +
                        ", expected one of " + quoted_names(true));
}

std::vector<std::pair<std::string, bool>> compiled_isas() {
  std::vector<std::pair<std::string, bool>> list;
  for (int32_t i = 0; fastadam_isa(i) != nullptr; ++i) list.emplace_back(fastadam_isa(i), fastadam_isa_is_usable(i));
  return list;
}

// The pieces of every share, as the launch walks them.
std::vector<std::vector<std::tuple<int64_t, int64_t, int64_t>>> split(const std::vector<int64_t>& sizes,
                                                                      int64_t shares) {
  std::vector<int64_t> offsets{0};
  for (int64_t size : sizes) offsets.push_back(offsets.back() + size);
  std::vector<std::vector<std::tuple<int64_t, int64_t, int64_t>>> result(static_cast<size_t>(shares));
  for (int64_t share = 0; share < shares; ++share) {
    fastadam::for_each_piece(
        offsets.data(), static_cast<int64_t>(sizes.size()), share, shares,
        [&](int64_t k, int64_t begin, int64_t end) { result[static_cast<size_t>(share)].emplace_back(k, begin, end); });
  }
  return result;
}

// Copies arrays over others of the same size, then raises the counter. No Python code, so no signal handler, runs in
// between: either everything has happened, or nothing. Raises if some pair does not fit.
void copy_all(const std::vector<std::pair<py::array, py::array>>& copies, const py::array& counter) {
  for (const auto& [to, from] : copies) {
    if (to.nbytes() != from.nbytes() || !to.writeable()) throw py::value_error("copies: arrays that do not fit");
  }
  int64_t* const count = fastadam::bind::place_of(counter);
  for (const auto& [to, from] : copies) {
    std::memcpy(const_cast<void*>(to.data()), from.data(), static_cast<size_t>(to.nbytes()));
  }
  ++*count;
}

enum class Pattern { kInOrder, kRandom };

// Tells the operating system how an array that may be of a file will be read.
void advise([[maybe_unused]] const py::array& array, [[maybe_unused]] Pattern pattern,
            [[maybe_unused]] bool small = false) {
#if defined(__linux__)
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto begin = reinterpret_cast<uintptr_t>(array.data()) / page * page;
  const uintptr_t end = reinterpret_cast<uintptr_t>(array.data()) + static_cast<uintptr_t>(array.nbytes());
  if (end == begin) return;
  madvise(reinterpret_cast<void*>(begin), end - begin, pattern == Pattern::kRandom ? MADV_RANDOM : MADV_NORMAL);
  if (small) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_NOHUGEPAGE);
#endif
}

// Sets kMoves for the rows of a table that have a moment other than +0; `moments`: m, v or vhat, C-contiguous.
void flag_moving_rows(py::array_t<uint8_t> flags, const py::array& moments) {
  const auto bytes = static_cast<size_t>(moments.nbytes());
  const size_t row = flags.size() == 0 ? 0 : bytes / static_cast<size_t>(flags.size());
  if (row == 0) return;
  const char* at = static_cast<const char*>(moments.data());
  uint8_t* flag = flags.mutable_data();
  fastadam::bind::FilePages files;
  files.add(moments.data(), bytes);
  advise(moments, Pattern::kInOrder);
  const fastadam::bind::ReleasedGil unlocked;
  const int64_t most = fastadam::bind::FilePages::rows_of_piece(static_cast<int64_t>(row));
  for (int64_t begin = 0; begin < flags.size(); begin += most) {
    const int64_t end = std::min<int64_t>(begin + most, flags.size());
    files.enter(begin, end, flags.size());
    for (int64_t i = begin; i < end; ++i, at += row) {
      // Equal to itself one byte further on, and zero there: all bytes are zero.
      if (*at != 0 || std::memcmp(at, at + 1, row - 1) != 0) flag[i] |= fastadam::kMoves;
    }
    files.leave(end, flags.size());
  }
  advise(moments, Pattern::kRandom);
}

// Tells the operating system that the rows of this array are touched in no order: one of a file makes 4 KiB resident,
// not also what lies around it. `small_pages`: no huge pages either, where one of anonymous memory would make 2 MiB
// resident.
void expect_random_rows(const py::array& array, bool small_pages) { advise(array, Pattern::kRandom, small_pages); }

// A context manager for numbers that Python computes.
struct ArithmeticScope {
  std::optional<fastadam::DefaultArithmetic> mode;
};

// The norm of all elements of arrays of the four dtypes, contiguous in any order.
double norm(const py::list& objects) {
  using namespace fastadam::bind;
  using fastadam::TensorArgs;
  std::vector<TensorArgs> tensors;
  std::vector<Buffer> buffers;
  for (size_t i = 0; i < objects.size(); ++i) {
    const Label label{"grads", static_cast<int64_t>(i)};
    std::optional<Buffer> b = read_array<HostArrays>(objects[i], label);
    if (!b || !b->dtype || !b->native_order || !b->aligned() || !(b->c_contiguous || b->f_contiguous)) {
      throw py::type_error(label() + ": must be converted first");
    }
    TensorArgs tensor{};
    tensor.grad = b->data;
    tensor.grad_size = b->size;
    tensor.next = -1;
    tensor.dtype = tensor.grad_dtype = *b->dtype;
    tensors.push_back(tensor);
    buffers.push_back(*std::move(b));
  }
  double result = 0;
  const fastadam_list list = {FASTADAM_ABI, tensors.data(), static_cast<int64_t>(tensors.size()), nullptr, nullptr, 0};
  {
    // Safe: only the memory that `buffers` keeps alive is read.
    const ReleasedGil unlocked;
    require_ok(fastadam_norm(&list, &result));
  }
  return result;
}

}  // namespace

PYBIND11_MODULE(_cpu, m, py::mod_gil_not_used()) {
  m.attr("__version__") = fastadam_version();
  m.attr("compiler") = fastadam::bind::kCompiler;
  m.attr("cuda_build") = fastadam::bind::kCudaBuild;
  m.attr("most_threads") = FASTADAM_MOST_THREADS;
  fastadam::bind::register_ops<fastadam::bind::CpuBackend>(m);
  m.def("copy_all", &copy_all, py::arg("copies"), py::arg("counter"));
  m.def("drop_steps", &fastadam::bind::StaleTable::drop, py::arg("history"), py::arg("count"));
  m.def("flag_moving_rows", &flag_moving_rows, py::arg("flags"), py::arg("moments"));
  m.def("expect_random_rows", &expect_random_rows, py::arg("array"), py::arg("small_pages"));
  m.def("norm", &norm, py::arg("arrays"));
  fastadam::bind::register_small_moments(m);
  py::class_<ArithmeticScope>(m, "DefaultArithmetic", py::module_local())
      .def(py::init<>())
      .def("__enter__", [](ArithmeticScope& scope) { scope.mode.emplace(); })
      .def("__exit__", [](ArithmeticScope& scope, const py::args&) { scope.mode.reset(); });
  using fastadam::bind::SwappedValues;
  py::class_<SwappedValues>(m, "SwappedValues", py::module_local())
      .def(py::init<py::object, py::object, py::object, py::array>(), py::arg("owner"), py::arg("prepare"),
           py::arg("write"), py::arg("flag"))
      .def("__enter__", &SwappedValues::enter)
      .def("__exit__", [](SwappedValues& values, const py::args&) { values.exit(); });
  m.def("compiled_isas", &compiled_isas);
  m.def("current_isa", &fastadam_current_isa);
  m.def("set_isa", &set_isa, py::arg("name"));
  m.def("num_threads", &fastadam_num_threads);
  m.def("requested_threads", &fastadam_requested_threads);
  m.def("set_num_threads", [](int32_t count) { require_ok(fastadam_set_num_threads(count)); }, py::arg("count"));
  m.def("split", &split, py::arg("sizes"), py::arg("shares"));
}
