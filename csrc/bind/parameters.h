// SPDX-License-Identifier: Apache-2.0
// Parameters of PyTorch and their states, as a plan stepped them last. Whether the next step is for the same tensors is
// asked here, because in Python the question takes longer than the step.
#pragma once

#include <pybind11/pybind11.h>

#include <cmath>
#include <optional>
#include <utility>
#include <vector>

#include "variables.h"

namespace fastadam::bind {

// Whether two dicts have the same objects as keys and values, in the same order. No key is hashed: the hash of a tensor
// is a Python call.
inline bool same_items(const py::dict& a, const py::dict& b) {
  if (a.size() != b.size()) return false;
  Py_ssize_t at_a = 0;
  Py_ssize_t at_b = 0;
  PyObject *key_a, *key_b, *value_a, *value_b;
  while (PyDict_Next(a.ptr(), &at_a, &key_a, &value_a) != 0) {
    if (PyDict_Next(b.ptr(), &at_b, &key_b, &value_b) == 0) return false;
    if (key_a != key_b || value_a != value_b) return false;
  }
  return true;
}

// The step counts of some parameters, which may differ: float tensors of shape () in CPU memory, all of one dtype.
class StepCounts {
 public:
  // Returns false if it cannot be read and written here.
  bool add(const py::object& tensor) {
    if (tensors_.empty()) first_ = read_writable<HostArrays>(tensor, "step");
    const std::optional<ArrayAddress> now = address_if_like<HostArrays>(tensor, first_);
    if (!now || !first_.shape.empty() || size_of(*first_.dtype) < 4) return false;
    tensors_.push_back(tensor);
    addresses_.push_back(const_cast<void*>(now->data));
    return true;
  }

  // Whether tensor i has the memory that it had.
  bool is_current(size_t i) const {
    const std::optional<ArrayAddress> now = address_if_like<HostArrays>(tensors_[i], first_);
    return now && now->data == addresses_[i];
  }

  // The number of the next step of each parameter; empty if a count is not a whole number.
  std::optional<std::vector<int64_t>> next() const {
    constexpr double kMost = 9007199254740992.0;  // 2^53: up to here each whole number is a double
    std::vector<int64_t> steps(addresses_.size());
    for (size_t i = 0; i < steps.size(); ++i) {
      const double count = get(i);
      if (!(count >= 0 && count < kMost) || count != std::floor(count)) return std::nullopt;
      steps[i] = static_cast<int64_t>(count) + 1;
    }
    return steps;
  }

  void set(const std::vector<int64_t>& counts) const {
    for (size_t i = 0; i < addresses_.size(); ++i) {
      if (*first_.dtype == FASTADAM_FLOAT32) {
        *static_cast<float*>(addresses_[i]) = static_cast<float>(counts[i]);
      } else {
        *static_cast<double*>(addresses_[i]) = static_cast<double>(counts[i]);
      }
    }
  }

 private:
  double get(size_t i) const {
    if (*first_.dtype == FASTADAM_FLOAT32) return *static_cast<const float*>(addresses_[i]);
    return *static_cast<const double*>(addresses_[i]);
  }

  Buffer first_;  // what the others are like
  std::vector<py::object> tensors_;
  std::vector<void*> addresses_;
};

class Parameters {
 public:
  // `states[i]`: the state of variable i, a dict with a tensor for each of `keys`, the slots of the plan in its order,
  // and the "step". `masters[i]`: what is stepped in place of parameter i, which then receives the copy; or None. An
  // empty list is a list of None. The parameters themselves are not kept: their hooks may lead back to the optimizer,
  // in a cycle that the garbage collector could not see.
  Parameters(const py::list& states, const py::tuple& keys, const py::list& masters)
      : slots_per_variable_(keys.size()) {
    for (const py::handle master : masters) masters_.push_back(py::reinterpret_borrow<py::object>(master));
    masters_.resize(states.size(), py::none());
    for (const py::handle state : states) {
      const auto named = state.cast<py::dict>();
      states_.emplace_back(named, py::reinterpret_steal<py::dict>(PyDict_Copy(named.ptr())));
      for (const py::handle key : keys) slots_.push_back(named[key].cast<py::object>());
      is_usable_ = is_usable_ && counts_.add(named["step"]);
    }
  }

  // Whether the step counts can be read and written here.
  bool are_usable() const { return is_usable_ && !states_.empty(); }

  const StepCounts& counts() const { return counts_; }

  // The gradients of the variables if `params` are those that the plan follows, `followed`, and those at the positions
  // of its variables, and no others, have a gradient; otherwise empty. `computed`: for each parameter the tensor that
  // receives its copy or None; null for no such tensors.
  template <class Arrays>
  std::optional<py::list> gradients_of(const VariableSet<Arrays>& variables, const py::list& params,
                                       const py::tuple& followed, const py::list* computed) const {
    static const py::handle grad = PyUnicode_InternFromString("grad");
    if (params.size() != followed.size() || states_.size() != variables.size()) return std::nullopt;
    if (computed != nullptr && computed->size() != params.size()) return std::nullopt;
    py::list gradients;
    for (size_t at = 0; at < followed.size(); ++at) {
      const py::object param = followed[at];
      // A property of a subclass may have shortened the list.
      if (at >= params.size() || PyList_GET_ITEM(params.ptr(), static_cast<Py_ssize_t>(at)) != param.ptr()) {
        return std::nullopt;
      }
      const auto gradient = py::reinterpret_steal<py::object>(PyObject_GetAttr(param.ptr(), grad.ptr()));
      if (!gradient) throw py::error_already_set();
      const size_t i = gradients.size();
      const bool is_stepped = i < variables.size() && variables.position(i) == static_cast<int64_t>(at);
      if (gradient.is_none() == is_stepped) return std::nullopt;
      if (!is_stepped) continue;
      const bool has_master = !masters_[i].is_none();
      if (!variables.has(i, 0, has_master ? masters_[i] : param)) return std::nullopt;
      if (has_master && !variables.has_copy(i, param)) return std::nullopt;
      if (!has_master && !variables.has_copy(i, item(computed, at))) return std::nullopt;
      gradients.append(gradient);
    }
    return gradients.size() == variables.size() ? std::optional(gradients) : std::nullopt;
  }

  // Whether the states have the same tensors in the same order, with the memory that the plan knows.
  template <class Arrays>
  bool are_current(const VariableSet<Arrays>& variables) const {
    size_t slot = 0;
    for (size_t i = 0; i < states_.size(); ++i) {
      if (!same_items(states_[i].first, states_[i].second)) return false;
      for (size_t column = 1; column <= slots_per_variable_; ++column, ++slot) {
        if (!variables.has(i, column, slots_[slot])) return false;
      }
      if (!counts_.is_current(i)) return false;
    }
    return true;
  }

 private:
  // A property of a subclass may have shortened the list.
  static py::object item(const py::list* list, size_t at) {
    if (list == nullptr || at >= list->size()) return py::none();
    return (*list)[at];
  }

  size_t slots_per_variable_;
  std::vector<std::pair<py::dict, py::dict>> states_;  // and what each was
  std::vector<py::object> masters_;                    // or None
  std::vector<py::object> slots_;                      // all of variable 0, then of variable 1, ...
  StepCounts counts_;
  bool is_usable_ = true;
};

}  // namespace fastadam::bind
