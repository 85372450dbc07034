// SPDX-License-Identifier: Apache-2.0
// The gradients of one call: dense arrays and IndexedSlices, read into the tensors of a set.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "gil.h"
#include "read_buffer.h"
#include "variables.h"

namespace fastadam::bind {

// What Python passes for a gradient that is an IndexedSlices.
struct Slices {
  py::object values;
  py::object indices;
};

// Reads gradients, checks them, and keeps them alive until forget(). A gradient that was read stays in its tensor.
template <class Backend>
class Gradients {
 public:
  using Arrays = typename Backend::Arrays;

  // `moves_rows_alone[i]`: an IndexedSlices moves only its rows of variable i, so the variable must not be given twice.
  Gradients(VariableSet<Arrays>& variables, Backend& backend, std::vector<bool> moves_rows_alone)
      : variables_(variables),
        backend_(backend),
        moves_rows_alone_(std::move(moves_rows_alone)),
        last_(variables.size()),
        is_writable_(variables.size()),
        indexes_(variables.size()) {}
  Gradients(const Gradients&) = delete;
  Gradients& operator=(const Gradients&) = delete;

  // Returns the positions of gradients that Python must convert first. Raises what is wrong with the others.
  std::vector<size_t> read(const py::list& gradients) {
    variables_.require_length("grads", gradients.size());
    std::vector<size_t> to_convert;
    for (size_t i = 0; i < variables_.size(); ++i) {
      if (!read(gradients[i], i)) to_convert.push_back(i);
    }
    return to_convert;
  }

  // The accumulators are the gradients. `rows[i]`: indices of rows outside of which that of variable i is 0, so that an
  // update of these rows alone may do; or None.
  void read_accumulators(const py::list& rows) {
    variables_.require_length("rows", rows.size());
    for (size_t i = 0; i < variables_.size(); ++i) {
      TensorArgs& t = variables_.tensors()[i];
      t.rows = nullptr;
      t.stale = nullptr;
      t.grad_size = t.size;
      t.grad = t.accumulator;
      t.grad_dtype = state_dtype(t.dtype);
      if (rows[i].is_none()) continue;
      indexes_[i] = backend_.index_of(rows[i], variables_.label("rows", "rows", i), variables_[i]);
      t.rows = &indexes_[i]->rows();
    }
  }

  // The accumulator of variable i is the gradient of all its rows.
  void use_all_rows(size_t i) { variables_.tensors()[i].rows = nullptr; }

  // No gradient; the rows `ids` of the only variable, or all of them.
  void read_rows(const std::optional<py::object>& ids) {
    TensorArgs& t = variables_.tensors().at(0);
    t.grad = nullptr;
    t.grad_size = 0;
    t.rows = nullptr;
    if (!ids) return;
    indexes_[0] = backend_.index_of(*ids, Label{"ids"}, variables_[0]);
    t.rows = &indexes_[0]->rows();
  }

  // Sorts the indices that were read. Raises if one is out of range.
  void sort_rows() {
    for (size_t i = 0; i < variables_.size(); ++i) {
      if (variables_.tensors()[i].rows == nullptr || sort(i)) continue;
      throw py::value_error(label(i)() + ".indices[" + std::to_string(indexes_[i]->bad()) +
                            "]: " + std::to_string(indexes_[i]->bad_index()) + " is not a row of " +
                            variables_[i].label + ", expected 0 <= index < " + std::to_string(variables_[i].shape[0]));
    }
  }

  // Replaces the values of IndexedSlices by the sums of repeated rows, unless the values are these sums already;
  // `ascending`: the sums are also ordered by row. Throws std::bad_alloc.
  void sum_rows(bool ascending) {
    std::vector<TensorArgs>& tensors = variables_.tensors();
    std::vector<void*> sums(tensors.size());
    bool has_sums = false;
    for (size_t i = 0; i < tensors.size(); ++i) {
      if (tensors[i].rows == nullptr || indexes_[i]->is_summed(ascending)) continue;
      sums[i] = backend_.make_sums(*indexes_[i], tensors[i]);
      has_sums = true;
    }
    if (!has_sums) return;
    {
      // Safe: only the gradients are read, which the caller and `owners_` keep alive.
      const ReleasedGil unlocked;
      backend_.run_sum_rows(tensors, sums);
    }
    for (size_t i = 0; i < tensors.size(); ++i) {
      if (sums[i] != nullptr) use_sums(sums[i], i);
    }
  }

  // Raises unless a step can set every gradient to zero.
  void require_zeroable() const {
    for (size_t i = 0; i < variables_.size(); ++i) {
      if (variables_.tensors()[i].rows != nullptr) {
        throw py::value_error("zero_grads: with IndexedSlices for " + variables_[i].label +
                              ", expected dense gradients");
      }
      if (!is_writable_[i]) throw py::value_error(label(i)() + ": read-only, expected a writable array to set to zero");
    }
  }

  // The number of indices of an IndexedSlices.
  int64_t index_count(size_t i) const { return indexes_[i]->count(); }

  void forget() {
    owners_.clear();
    for (auto& index : indexes_) index.reset();
    for (TensorArgs& t : variables_.tensors()) t.rows = nullptr;
  }

 private:
  // What a dense gradient of variable i is probably like.
  const Buffer& known_of(size_t i) const {
    const bool is_known = variables_[i].gpu || last_[i].dtype;
    return is_known ? last_[i] : variables_[i];
  }

  Label label(size_t i) const { return variables_.label("grads", "grad", i); }

  // False if Python has to convert the gradient.
  bool read(const py::object& object, size_t i) {
    const Buffer& var = variables_[i];
    TensorArgs& tensor = variables_.tensors()[i];
    tensor.rows = nullptr;
    tensor.stale = nullptr;
    tensor.grad_size = tensor.size;
    std::optional<ArrayAddress> now = address_if_like<Arrays>(object, known_of(i));
    if (now && now->device != var.device()) now = std::nullopt;
    if (!now && py::isinstance<Slices>(object)) return read_slices(object.cast<Slices>(), i);
    const bool may_be_negated = now ? now->kind == ArrayAddress::kTensor : exchange_api_of(object) != nullptr;
    if (may_be_negated && is_negated(object)) return refuse_negated(var, i);
    if (!now) return read_whole(object, i);
    if (now->device != Buffer::kHost) {
      const bool is_tensor = now->kind == ArrayAddress::kTensor;
      backend_.order_after(is_tensor ? Arrays::stream_of_tensor(object) : now->stream);
    }
    set(now->data, *known_of(i).dtype, i);
    is_writable_[i] = now->writable;
    if (now->kind != ArrayAddress::kNdarray) owners_.push_back(object);
    return true;
  }

  bool read_whole(const py::object& object, size_t i) {
    const Buffer& var = variables_[i];
    std::optional<Buffer> g = read_array<Arrays>(object, label(i));
    if (!g) return false;
    if (g->shape != var.shape) {
      throw py::value_error(label(i)() + ": shape " + tuple_text(g->shape) + ", expected " + tuple_text(var.shape) +
                            " like " + var.label);
    }
    const bool may_be_narrow = g->on_host() && var.dtype == FASTADAM_FLOAT32;
    const bool readable = g->dtype == var.dtype || g->dtype == variables_.gradient_dtype(i) ||
                          (may_be_narrow && (g->dtype == FASTADAM_FLOAT16 || g->dtype == FASTADAM_BFLOAT16));
    require_place(*g, label(i)(), variables_.place());
    if (!readable || !g->native_order || !g->same_layout(var) || !g->aligned()) return refuse_on_gpu(*g, var, i);
    backend_.order_after(g->stream());
    set(g->data, *g->dtype, i);
    is_writable_[i] = g->writable;
    owners_.push_back(g->owner);
    g->owner = py::object();  // the caller frees it
    if (g->gpu) g->gpu->source = py::object();
    last_[i] = *std::move(g);
    return true;
  }

  bool read_slices(const Slices& slices, size_t i) {
    const Buffer& var = variables_[i];
    require_rows(i);
    const Label values_label{label(i)() + ".values"};
    std::optional<Buffer> values = read_array<Arrays>(slices.values, values_label);
    if (!values || !backend_.takes_indices(slices.indices)) return false;
    require_place(*values, values_label(), variables_.place());
    indexes_[i] = backend_.index_of(slices.indices, Label{label(i)() + ".indices"}, var);
    if (indexes_[i]->rank() != 1) throw py::value_error(label(i)() + ".indices: expected one axis");
    std::vector<int64_t> shape = var.shape;
    shape[0] = indexes_[i]->count();
    if (values->shape != shape) {
      throw py::value_error(values_label() + ": shape " + tuple_text(values->shape) + ", expected " +
                            tuple_text(shape) + ", a row of " + var.label + " for each index");
    }
    const bool readable = values->dtype == var.dtype || values->dtype == state_dtype(*var.dtype);
    const bool as_stored = readable && values->native_order && values->c_contiguous && values->aligned();
    if (!as_stored) return refuse_on_gpu(*values, var, i);
    backend_.order_after(values->stream());
    TensorArgs& tensor = variables_.tensors()[i];
    tensor.grad_size = values->size;
    set(values->data, *values->dtype, i);
    tensor.rows = &indexes_[i]->rows();
    owners_.push_back(std::move(values->owner));
    owners_.push_back(slices.indices);
    return true;
  }

  // False: Python converts a gradient in CPU memory. On a GPU nothing is converted.
  bool refuse_on_gpu(const Buffer& g, const Buffer& var, size_t i) const {
    if (g.gpu) refuse_as_it_lies(g, var, label(i)());
    return false;
  }

  bool refuse_negated(const Buffer& var, size_t i) const {
    if (var.on_host()) return false;
    throw py::value_error(label(i)() + ": tensor with the negative bit; resolve it first");
  }

  // Raises if variable i cannot have an IndexedSlices as gradient.
  void require_rows(size_t i) const {
    const Buffer& var = variables_[i];
    const std::string start = label(i)() + ": IndexedSlices for " + var.label;
    if (var.shape.empty()) throw py::value_error(start + " of shape (), expected at least one axis");
    if (is_small(variables_.tensors()[i])) {
      throw py::value_error(start + " with small moments, low halves or stochastic rounding, expected float32 state");
    }
    if (has_half_moments(variables_.tensors()[i])) {
      throw py::type_error(start + " whose m is " + name_of(*var.dtype) + ", expected float32 moments");
    }
    if (!var.c_contiguous) throw py::value_error(start + " in order F, expected order C, rows side by side");
    if (moves_rows_alone_[i] && variables_.is_repeated(i)) {
      throw py::value_error(start +
                            ", which comes twice, expected it once (fastadam.Adam adds them up with "
                            "sum_repeated=True) or sparse_update='dense'");
    }
  }

  bool sort(size_t i) {
    const ReleasedGil unlocked;
    return backend_.sort(*indexes_[i], static_cast<int64_t>(i));
  }

  void set(const void* data, DType dtype, size_t i) {
    TensorArgs& tensor = variables_.tensors()[i];
    variables_.require_apart(data, tensor.grad_size * size_of(dtype), i, label(i));
    tensor.grad = data;
    tensor.grad_dtype = dtype;
  }

  void use_sums(const void* sums, size_t i) {
    TensorArgs& tensor = variables_.tensors()[i];
    indexes_[i]->use_sums();
    tensor.grad = sums;
    tensor.grad_dtype = state_dtype(tensor.grad_dtype);
    tensor.grad_size = tensor.rows->count * tensor.rows->width;
  }

  VariableSet<Arrays>& variables_;
  Backend& backend_;
  std::vector<bool> moves_rows_alone_;
  std::vector<Buffer> last_;  // dense gradients read last: arrays like these often come again
  std::vector<bool> is_writable_;
  std::vector<py::object> owners_;                                 // of gradients that are not ndarrays
  std::vector<std::unique_ptr<typename Backend::Index>> indexes_;  // of the gradients that are IndexedSlices
};

}  // namespace fastadam::bind
