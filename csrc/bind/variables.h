// SPDX-License-Identifier: Apache-2.0
// Variables and their slots, checked once, as the kernels read them. It holds pointers only: the optimizer makes a new
// set when an array has been replaced.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "../capi/prepare.h"
#include "../core/small_state.h"
#include "../core/step_args.h"
#include "dlpack_exchange.h"
#include "read_buffer.h"
#include "write_set.h"

namespace fastadam::bind {

// What decides about rounding at random, besides seed and step.
struct Randomness {
  bool moments = false;           // bfloat16 moments are rounded at random
  bool variables = false;         // bfloat16 variables without low halves are
  std::vector<uint64_t> numbers;  // of the variables, among those of one seed; empty for 0, 1, ...
};

template <class Arrays>
class VariableSet {
 public:
  // Of which tensors is_negated() is asked, at the price of a Python call. The memory of others is taken to hold what
  // it held when it was first read. A negated view is the imaginary part of a conjugated tensor, so that it has gaps
  // unless it is of one element.
  enum class Sign { kAsk, kAskIfOne, kTrust };

  // `slots`: lists of arrays by name: m, v and, if used, those of kSlots. Scales and low halves are None for variables
  // that have none.
  // `positions[i]`: position of variable i in the caller's list, for error texts about its gradient.
  // `decays[i]`: weight decay applies to variable i.
  // `copies[i]`: the array that receives a rounded copy of variable i, or None.
  // `names`: what error texts call slots; they then name the variable that a gradient or a slot belongs to. Empty: they
  // give its position.
  VariableSet(std::vector<Buffer> variables, const py::dict& slots, const std::vector<bool>& decays,
              std::vector<int64_t> positions, const py::list& copies, const py::dict& names, const Randomness& random)
      : variables_(std::move(variables)), positions_(std::move(positions)), copies_(variables_.size()), names_(names) {
    for (const auto& [name, arrays] : slots) require_length(text(name).c_str(), py::len(arrays));
    require_length("decays", decays.size());
    if (!copies.empty()) require_length("copies", copies.size());
    amsgrad_ = !variables_.empty() && slots.contains("vhat");
    for (const Buffer& b : variables_) require_place(b, b.label, place());
    if (!random.numbers.empty()) require_length("numbers", random.numbers.size());
    for (size_t i = 0; i < variables_.size(); ++i) add_tensor(slots, i, decays[i], random);
    for (size_t i = 0; i < copies.size(); ++i) add_copy(copies[i], i);
    chain_repeats();
    refuse_overlaps();
  }

  // The gradients of (gradient, variable) pairs without the pairs whose gradient is None, if the variables are those of
  // this set at the same positions; otherwise empty. `holder`: the type that keeps its array in `_value`.
  std::optional<py::list> gradients_of(const py::list& pairs, const py::type& holder) const {
    py::list gradients;
    for (size_t at = 0; at < pairs.size(); ++at) {
      const auto pair = py::reinterpret_borrow<py::object>(pairs[at]);
      const bool is_pair = PyTuple_Check(pair.ptr()) || PyList_Check(pair.ptr());
      if (!is_pair || PySequence_Fast_GET_SIZE(pair.ptr()) != 2) return std::nullopt;
      const py::handle first = PySequence_Fast_GET_ITEM(pair.ptr(), 0);
      const py::handle second = PySequence_Fast_GET_ITEM(pair.ptr(), 1);
      if (is_holder(first, holder) && !is_holder(second, holder)) return std::nullopt;  // the pair is swapped
      const py::object gradient = held(first, holder);
      const py::object variable = held(second, holder);
      if (gradient.is_none()) continue;
      const size_t i = gradients.size();
      if (i == variables_.size() || positions_[i] != static_cast<int64_t>(at)) return std::nullopt;
      if (!is_alive(variables_[i]) || !is_same_array(variable, variables_[i], Sign::kAsk)) return std::nullopt;
      gradients.append(gradient);
    }
    if (gradients.size() != variables_.size()) return std::nullopt;
    return gradients;
  }

  // Whether these are the copies of this set, at the same addresses. Empty: none.
  bool has_copies(const py::list& copies) const {
    if (copies.empty()) return !has_copies_;
    if (copies.size() != variables_.size()) return false;
    for (size_t i = 0; i < copies.size(); ++i) {
      if (!has_copy(i, copies[i])) return false;
    }
    return true;
  }

  // Whether `copy` is at the address of the copy of variable i; or None, and variable i has no copy.
  bool has_copy(size_t i, const py::object& copy) const {
    if (copy.is_none() || !copies_[i].dtype) return copy.is_none() && !copies_[i].dtype;
    return is_alive(copies_[i]) && is_same_array(copy, copies_[i], Sign::kAskIfOne);
  }

  // The widest dtype of gradients that a step of a variable reads: that of the state, unless moments are half.
  DType gradient_dtype(size_t i) const {
    const DType dtype = *variables_[i].dtype;
    return has_half_moments(tensors_[i]) ? dtype : state_dtype(dtype);
  }

  // Whether these are the variables, slots and copies of this set, at the same addresses.
  bool holds(const py::list& variables, const py::dict& slots, const py::list& copies) const {
    if (variables.size() != variables_.size() || slots.size() * variables_.size() != state_.size()) return false;
    if (!has_copies(copies)) return false;
    for (size_t i = 0; i < variables_.size(); ++i) {
      if (!is_same_array(variables[i], variables_[i], Sign::kAskIfOne)) return false;
    }
    size_t slot = 0;
    for (const char* name : kSlots) {
      if (!slots.contains(name)) continue;
      const auto arrays = slots[name].cast<py::list>();
      if (arrays.size() != variables_.size()) return false;
      for (size_t i = 0; i < variables_.size(); ++i) {
        if (!is_same_array(arrays[i], state_[i * slots.size() + slot], Sign::kAskIfOne)) return false;
      }
      ++slot;
    }
    return true;
  }

  // Whether `object` is at the address of variable i (`column` 0) or of its slot `column - 1`, and like it.
  bool has(size_t i, size_t column, const py::object& object) const {
    if (column == 0) return is_same_array(object, variables_[i], Sign::kAskIfOne);
    const size_t slots = state_.size() / variables_.size();
    return is_same_array(object, state_[i * slots + column - 1], Sign::kTrust);
  }

  void require_length(const char* name, size_t length) const {
    if (length == variables_.size()) return;
    throw py::value_error(std::string(name) + ": " + std::to_string(length) + " arrays, expected " +
                          std::to_string(variables_.size()) + ", one for each variable");
  }

  // Raises if an array was replaced or made read-only. Comes last: reading a gradient may run Python code.
  void require_current() const {
    for (const std::vector<Buffer>* buffers : {&variables_, &state_, &copies_}) {
      for (const Buffer& b : *buffers) {
        if (!is_current(b)) throw py::value_error(b.label + ": was given other memory while the step was prepared");
        if (!is_still_writable(b)) throw py::value_error(b.label + ": was made read-only, expected a writable array");
      }
    }
  }

  Chains chains() const {
    return {tensors_.data(), heads_.data(), offsets_.data(), static_cast<int64_t>(heads_.size())};
  }

  std::vector<TensorArgs>& tensors() { return tensors_; }

  // Has later steps report what they do, or not.
  void set_telemetry(bool wanted) {
    telemetry_.assign(wanted ? tensors_.size() : 0, fastadam_telemetry{});
    for (size_t i = 0; i < tensors_.size(); ++i) {
      if (wanted && is_repeated_[i]) {
        throw py::value_error("telemetry: " + variables_[i].label + " comes twice, expected it once");
      }
      tensors_[i].telemetry = wanted ? &telemetry_[i] : nullptr;
    }
  }

  // What the last step did to each variable.
  const std::vector<fastadam_telemetry>& telemetry() const { return telemetry_; }

  size_t size() const { return variables_.size(); }
  const Buffer& operator[](size_t i) const { return variables_[i]; }

  // What error texts call what belongs to variable i: `text` and the position, or `named` and the label of the
  // variable.
  Label label(const char* text, const char* named, size_t i) const {
    if (names_.empty()) return {text, positions_[i]};
    return {named, -1, &variables_[i].label};
  }

  // The position of variable i in the caller's list.
  int64_t position(size_t i) const { return positions_[i]; }

  // Whether variable i is given more than once.
  bool is_repeated(size_t i) const { return is_repeated_[i]; }

  // Raises if memory that a step reads as gradient i is also written by it.
  void require_apart(const void* data, int64_t nbytes, size_t i, const Label& label) {
    write_set_.require_apart(data, nbytes, i, label);
  }

  // Counts again the elements that a step moves: with rows that depends on the gradients.
  void measure(bool lazy) {
    for (size_t k = 0; k < heads_.size(); ++k) {
      offsets_[k + 1] = offsets_[k] + moved_elements(tensors_[static_cast<size_t>(heads_[k])], lazy);
    }
  }

  bool amsgrad() const { return amsgrad_; }

  // A Buffer that is where all of them are.
  const Buffer& place() const {
    static const Buffer none;
    return variables_.empty() ? none : variables_[0];
  }

 private:
  // In the order of state_.
  static constexpr const char* kSlots[] = {"m",       "v",       "vhat", "average", "gradient_accumulator",
                                           "m_scale", "v_scale", "low"};

  static bool is_holder(py::handle object, const py::type& holder) {
    return PyObject_TypeCheck(object.ptr(), reinterpret_cast<PyTypeObject*>(holder.ptr())) != 0;
  }

  static py::object held(py::handle object, const py::type& holder) {
    if (is_holder(object, holder)) return object.attr("_value");
    return py::reinterpret_borrow<py::object>(object);
  }

  // Whether `object` is the array that `known` was read from, or a view of all its memory.
  static bool is_same_array(const py::object& object, const Buffer& known, Sign sign) {
    if (known.item_size == 0) return object.is_none();  // of optional_slot()
    if (const std::optional<ArrayAddress> now = address_if_like<Arrays>(object, known)) {
      const bool is_asked = sign == Sign::kAsk || (sign == Sign::kAskIfOne && known.size == 1);
      const bool may_be_negated = now->kind == ArrayAddress::kTensor && is_asked;
      return now->data == known.data && now->writable && !(may_be_negated && is_negated(object));
    }
    try {
      const std::optional<Buffer> b = read_array<Arrays>(object, Label{known.label});
      return b && b->same_memory(known) && b->writable && b->native_order;
    } catch (const py::builtin_exception&) {
      return false;  // a new set will raise it
    }
  }

  // The memory of slot `name` of variable i; null if there is no such slot. `read(object, label)` reads the array.
  template <class Read>
  void* slot(const py::dict& slots, const char* name, size_t i, Read read) {
    if (!slots.contains(name)) return nullptr;
    const py::object array = slots[name].cast<py::list>()[i];
    const bool is_named = names_.contains(name);
    state_.push_back(read(array, label(name, is_named ? text(names_[name]).c_str() : name, i)()));
    return state_.back().data;
  }

  // The same of a slot that some variables of a set do not have: None in its place.
  template <class Read>
  void* optional_slot(const py::dict& slots, const char* name, size_t i, Read read) {
    if (!slots.contains(name)) return nullptr;
    if (!slots[name].cast<py::list>()[i].is_none()) return slot(slots, name, i, read);
    state_.emplace_back();
    return nullptr;
  }

  void* state(const py::dict& slots, const char* name, size_t i, bool is_moment = false) {
    return slot(slots, name, i, [&](const py::object& array, const std::string& label) {
      return read_state<Arrays>(array, label, variables_[i], is_moment);
    });
  }

  uint8_t* scales(const py::dict& slots, const char* name, size_t i) {
    return static_cast<uint8_t*>(optional_slot(slots, name, i, [&](const py::object& array, const std::string& label) {
      return read_scales<Arrays>(array, label, variables_[i], code_blocks(variables_[i].size));
    }));
  }

  // How m, the slot `first`, is stored. Every moment must be stored like it.
  fastadam_moments moments_of(const TensorArgs& tensor, size_t i, size_t first, const Randomness& random) const {
    if (first == state_.size()) return FASTADAM_MOMENTS_WIDE;  // no moments: gradients are only added up
    const Buffer& m = state_[first];
    for (size_t k = first + 1; k < state_.size(); ++k) {
      if (state_[k].dtype == m.dtype && is_codes(state_[k]) == is_codes(m)) continue;
      const auto name = [](const Buffer& b) { return b.dtype ? name_of(*b.dtype) : b.dtype_name.c_str(); };
      throw py::type_error(state_[k].label + ": " + name(state_[k]) + ", expected " + name(m) + " like " + m.label);
    }
    if (is_codes(m)) return FASTADAM_MOMENTS_8BIT;
    if (m.dtype == FASTADAM_BFLOAT16 && random.moments) return FASTADAM_MOMENTS_BFLOAT16;
    if (size_of(tensor.dtype) == 2 && m.dtype == tensor.dtype) return FASTADAM_MOMENTS_HALF;
    if (m.dtype == state_dtype(tensor.dtype)) return FASTADAM_MOMENTS_WIDE;
    throw py::type_error(m.label + ": " + name_of(*m.dtype) + ", expected " + name_of(state_dtype(tensor.dtype)) +
                         " for " + name_of(tensor.dtype) + " " + variables_[i].label);
  }

  void add_tensor(const py::dict& slots, size_t i, bool decays, const Randomness& random) {
    TensorArgs t{};
    const size_t first = state_.size();
    t.dtype = t.grad_dtype = *variables_[i].dtype;
    t.var = variables_[i].data;
    t.m = state(slots, "m", i, true);
    t.v = state(slots, "v", i, true);
    t.vhat = state(slots, "vhat", i, true);
    t.moments = moments_of(t, i, first, random);
    t.average = state(slots, "average", i);
    t.accumulator = state(slots, "gradient_accumulator", i);
    t.m_scales = scales(slots, "m_scale", i);
    t.v_scales = scales(slots, "v_scale", i);
    t.low =
        static_cast<int16_t*>(optional_slot(slots, "low", i, [&](const py::object& array, const std::string& label) {
          return read_low<Arrays>(array, label, variables_[i]);
        }));
    t.decays = decays;
    t.size = variables_[i].size;
    t.next = -1;
    t.parameter = random.numbers.empty() ? i : random.numbers[i];
    t.stochastic = random.variables && t.dtype == FASTADAM_BFLOAT16 && t.low == nullptr;
    require_small(t, variables_[i].label);
    tensors_.push_back(t);
  }

  // Raises if the arrays of a variable cannot be stored as in small_state.h.
  void require_small(const TensorArgs& t, const std::string& label) const {
    const bool has_codes = t.moments == FASTADAM_MOMENTS_8BIT;
    if (has_codes != (t.m_scales != nullptr && t.v_scales != nullptr) && t.size > 0) {
      throw py::value_error(std::string("m_scale, v_scale: ") + (has_codes ? "missing, expected them" : "given") +
                            " for " + label + (has_codes ? ", whose moments are uint8" : " without uint8 moments"));
    }
    if (!is_small(t)) return;
    if (place().gpu) throw py::value_error("moments: small ones of " + label + " on a GPU, expected CPU memory");
    if (has_codes && t.vhat != nullptr)
      throw py::value_error("vhat: of " + label + " with uint8 moments, expected none");
    if (t.low != nullptr && t.average != nullptr) {
      throw py::value_error("average: of " + label + " in two halves, expected none");
    }
  }

  void add_copy(const py::object& array, size_t i) {
    if (array.is_none()) return;
    const Buffer& var = variables_[i];
    Buffer b = read_writable<Arrays>(array, label("copies", "copy", i)());
    if (!b.on_host() || !var.on_host())
      throw py::value_error(b.label + ": of " + var.label + " on a GPU, expected None");
    if (b.shape != var.shape) {
      throw py::value_error(b.label + ": shape " + tuple_text(b.shape) + ", expected " + tuple_text(var.shape) +
                            " like " + var.label);
    }
    if (*var.dtype != FASTADAM_FLOAT32) {
      throw py::type_error(b.label + ": of " + name_of(*var.dtype) + " " + var.label + ", expected a float32 variable");
    }
    if (*b.dtype == FASTADAM_FLOAT64) {
      throw py::type_error(b.label + ": float64, expected bfloat16, float16 or float32");
    }
    if (!b.same_layout(var)) {
      throw py::value_error(b.label + ": order " + b.order() + ", expected " + var.order() + " like " + var.label);
    }
    tensors_[i].copy = b.data;
    tensors_[i].copy_dtype = *b.dtype;
    copies_[i] = std::move(b);
    has_copies_ = true;
  }

  bool is_repeat(size_t earlier, size_t later) const {
    const TensorArgs& a = tensors_[earlier];
    const TensorArgs& b = tensors_[later];
    return variables_[earlier].same_memory(variables_[later]) && a.m == b.m && a.v == b.v && a.vhat == b.vhat;
  }

  // A variable given twice is updated twice, in order, with the same step count, as TF does.
  void chain_repeats() {
    std::vector<size_t> order;
    for (size_t i = 0; i < tensors_.size(); ++i) {
      if (variables_[i].size > 0) order.push_back(i);  // an empty one may share the address of any other
    }
    std::stable_sort(order.begin(), order.end(),
                     [this](size_t a, size_t b) { return variables_[a].begin() < variables_[b].begin(); });
    std::vector<bool> is_head(tensors_.size(), true);
    for (size_t k = 1; k < order.size(); ++k) {
      if (!is_repeat(order[k - 1], order[k])) continue;
      tensors_[order[k - 1]].next = static_cast<int64_t>(order[k]);
      is_head[order[k]] = false;
    }
    offsets_.push_back(0);
    for (size_t i = 0; i < tensors_.size(); ++i) {
      if (!is_head[i]) continue;
      heads_.push_back(static_cast<int64_t>(i));
      offsets_.push_back(offsets_.back() + tensors_[i].size);
    }
    for (size_t i = 0; i < tensors_.size(); ++i) {
      if (is_head[i] || tensors_[i].copy == nullptr) continue;
      throw py::value_error(copies_[i].label + ": of " + variables_[i].label +
                            ", which comes twice, expected a copy only where it comes first");
    }
    is_repeated_.resize(tensors_.size());
    for (size_t i = 0; i < tensors_.size(); ++i) is_repeated_[i] = tensors_[i].next >= 0 || !is_head[i];
  }

  void refuse_overlaps() {
    const size_t per_variable = variables_.empty() ? 0 : state_.size() / variables_.size();
    for (int64_t head : heads_) {
      const auto i = static_cast<size_t>(head);
      if (variables_[i].size == 0) continue;
      write_set_.add(variables_[i]);
      for (size_t k = 0; k < per_variable; ++k) write_set_.add(state_[i * per_variable + k]);
      if (copies_[i].dtype) write_set_.add(copies_[i]);
    }
    write_set_.refuse_overlaps(variables_.size());
  }

  std::vector<Buffer> variables_;
  std::vector<Buffer> state_;  // all slots of variable 0, then of variable 1, ...
  std::vector<int64_t> positions_;
  std::vector<Buffer> copies_;  // without a dtype where there is none
  py::dict names_;              // of slots, in error texts
  bool has_copies_ = false;
  std::vector<TensorArgs> tensors_;
  std::vector<fastadam_telemetry> telemetry_;  // of each variable; empty if none is wanted
  std::vector<int64_t> heads_;
  std::vector<int64_t> offsets_;
  std::vector<bool> is_repeated_;
  WriteSet write_set_;
  bool amsgrad_ = false;
};

}  // namespace fastadam::bind
