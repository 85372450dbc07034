// SPDX-License-Identifier: Apache-2.0
// A context manager that holds other values in arrays for the length of a block.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <cstring>
#include <exception>
#include <optional>
#include <utility>
#include <vector>

namespace fastadam::bind {

namespace py = pybind11;

// `with` calls its two methods without running Python code in between, where CPython could run a signal handler: the
// values are in the arrays exactly while the block runs. A context manager written in Python can be cut off by Ctrl-C
// before the first line of its __exit__.
class SwappedValues {
 public:
  using Copies = std::vector<std::pair<py::array, py::array>>;
  using Elsewhere = std::pair<py::object, py::object>;  // what is and what comes into memory of other devices; or None

  // `owner.lock`, another one after a fork, is held while values move. `prepare()` returns Copies and Elsewhere, and
  // raises what is wrong; `write` takes an item of Elsewhere, and may be called again if it raises. `flag` is 1 inside
  // of the block.
  SwappedValues(py::object owner, py::object prepare, py::object write, py::array flag)
      : owner_(std::move(owner)), prepare_(std::move(prepare)), write_(std::move(write)), flag_(std::move(flag)) {}

  SwappedValues(const SwappedValues&) = delete;
  SwappedValues& operator=(const SwappedValues&) = delete;

  ~SwappedValues() {  // entered and never left, as a signal handler can have it in an ExitStack
    if (!is_in_) return;
    try {
      put_back();
    } catch (py::error_already_set& error) {
      error.discard_as_unraisable("averages");
    }
  }

  void enter() {
    const Locked locked(owner_.attr("lock"));
    const auto [copies, elsewhere] = prepare_().cast<std::pair<Copies, std::optional<Elsewhere>>>();
    for (const auto& [to, from] : copies) {
      if (to.nbytes() != from.nbytes() || !to.writeable()) throw py::value_error("copies: arrays that do not fit");
    }
    std::vector<py::bytes> before;
    for (const auto& [to, from] : copies) {
      before.emplace_back(static_cast<const char*>(to.data()), static_cast<size_t>(to.nbytes()));
    }
    elsewhere_ = elsewhere ? elsewhere->first : py::none();
    if (elsewhere) {
      try {
        write_(elsewhere->second);
      } catch (py::error_already_set&) {
        write_(elsewhere_);
        throw;
      }
    }
    for (const auto& [to, from] : copies) copy(to, from.data());
    arrays_.clear();
    for (const auto& [to, from] : copies) arrays_.push_back(to);
    before_ = std::move(before);
    mark(1);
  }

  void exit() {
    if (is_in_) put_back();
  }

 private:
  class Locked {
   public:
    explicit Locked(py::object lock) : lock_(std::move(lock)) { lock_.attr("acquire")(); }
    ~Locked() {
      const py::error_scope kept;
      lock_.attr("release")();
    }
    Locked(const Locked&) = delete;
    Locked& operator=(const Locked&) = delete;

   private:
    py::object lock_;
  };

  static void copy(const py::array& to, const void* from) {
    std::memcpy(const_cast<void*>(to.data()), from, static_cast<size_t>(to.nbytes()));
  }

  void mark(int64_t value) {
    is_in_ = value != 0;
    *static_cast<int64_t*>(const_cast<void*>(flag_.data())) = value;
  }

  // An exception of a signal handler, which can run while this waits for the lock or in `write`, is raised afterwards.
  void put_back() {
    std::exception_ptr raised;
    const auto insist = [&](const auto& action) {
      for (int attempt = 0; attempt < kAttempts; ++attempt) {
        try {
          action();
          return;
        } catch (py::error_already_set&) {
          raised = std::current_exception();
        }
      }
    };
    const py::object lock = owner_.attr("lock");
    bool is_locked = false;
    insist([&] {
      lock.attr("acquire")();
      is_locked = true;
    });
    for (size_t i = 0; i < arrays_.size(); ++i) copy(arrays_[i], PyBytes_AS_STRING(before_[i].ptr()));
    if (!elsewhere_.is_none()) insist([&] { write_(elsewhere_); });
    arrays_.clear();
    before_.clear();
    elsewhere_ = py::none();
    mark(0);
    if (is_locked) lock.attr("release")();
    if (raised) std::rethrow_exception(raised);
  }

  static constexpr int kAttempts = 100;  // Ctrl-C again and again

  py::object owner_, prepare_, write_;
  py::array flag_;
  std::vector<py::array> arrays_;
  std::vector<py::bytes> before_;
  py::object elsewhere_ = py::none();
  bool is_in_ = false;
};

}  // namespace fastadam::bind
