// SPDX-License-Identifier: Apache-2.0
// The gradients of a step beside its variables: dense ones, IndexedSlices, and the histories of tables that wait.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "../capi/prepare.h"
#include "../core/step_args.h"
#include "read_buffer.h"
#include "variables.h"

namespace fastadam::bind {

// What Python hands over for a gradient that is an IndexedSlices.
struct Slices {
  py::object values;
  py::object indices;
};

// A Backend (cpu_backend.h, cuda_backend.h) says how rows are sorted, where histories lie, and runs the kernels.
template <class Backend>
class TensorSet : public VariableSet {
 public:
  using Histories = std::vector<std::optional<typename Backend::Table::Arrays>>;

  // The first arguments are those of VariableSet.
  // `lazy`: IndexedSlices move only the rows that they touch.
  // `histories[i]`: of variable i, if it is a table in a deferred mode.
  // `context`: what the Backend shares between the plans of an optimizer, or None.
  TensorSet(std::vector<Buffer> variables, const py::dict& slots, const std::vector<bool>& decays,
            std::vector<int64_t> positions, bool lazy, const Histories& histories, const py::object& context)
      : VariableSet(std::move(variables), slots, decays, std::move(positions)),
        backend_(*this, tensors_, context),
        lazy_(lazy) {
    indexes_.resize(variables_.size());
    read_before_.resize(variables_.size());
    require_length("histories", histories.size());
    for (size_t i = 0; i < histories.size(); ++i) {
      tables_.push_back(histories[i] ? backend_.table_of(*histories[i], variables_[i]) : nullptr);
      has_tables_ = has_tables_ || histories[i];
    }
  }

  // Raises what is wrong with the gradients; returns those that must be converted before step().
  std::vector<size_t> check(const py::list& gradients) {
    require_length("grads", gradients.size());
    std::vector<size_t> to_convert;
    exported_.clear();
    for (size_t i = 0; i < variables_.size(); ++i) {
      if (!add_gradient(gradients[i], i)) to_convert.push_back(i);
    }
    return to_convert;
  }

  // Sorts the indices of IndexedSlices; raises if one is no row of its variable. Writes nothing else.
  void index_rows() {
    for (size_t i = 0; i < tensors_.size(); ++i) {
      if (tensors_[i].rows != nullptr && !sort(i)) {
        throw py::value_error(bad_index_text(i, indexes_[i]->bad(), indexes_[i]->bad_index()));
      }
    }
    measure();
  }

  std::string bad_index_text(size_t i, int64_t place, int64_t index) const {
    return gradient_label(i)() + ".indices[" + std::to_string(place) + "]: " + std::to_string(index) +
           " is no row of " + variables_[i].label + ", expected 0 <= index < " + std::to_string(variables_[i].shape[0]);
  }

  // Puts the sums of the rows in the place of the values of IndexedSlices, unless they are equal; `ascending`: their
  // order counts. Raises if there is no memory; writes no other.
  void sum_rows(bool ascending) {
    std::vector<void*> sums(tensors_.size());
    bool has_sums = false;
    for (size_t i = 0; i < tensors_.size(); ++i) {
      const TensorArgs& tensor = tensors_[i];
      if (tensor.rows == nullptr || indexes_[i]->is_summed(ascending)) continue;
      sums[i] = backend_.make_sums(*indexes_[i], tensor);
      has_sums = true;
    }
    if (!has_sums) return;
    {
      // Safe: only the gradients are read, which the caller and `exported_` keep alive.
      const py::gil_scoped_release unlocked;
      backend_.run_sum_rows(tensors_, sums);
    }
    for (size_t i = 0; i < tensors_.size(); ++i) {
      if (sums[i] != nullptr) use_sums(sums[i], i);
    }
  }

  // Options that a kernel of rows, or the history of a table, does not have.
  void require_options(const AdamHyper& hyper) const {
    if (hyper.l2 == 0 && !hyper.epsilon_corrected) return;
    for (size_t i = 0; i < tensors_.size(); ++i) {
      if (hyper.l2 != 0 && (tensors_[i].rows != nullptr || tables_[i] != nullptr)) {
        throw py::value_error("l2: with IndexedSlices for " + variables_[i].label +
                              ", expected a dense gradient or decoupled weight decay");
      }
      if (hyper.epsilon_corrected && tables_[i] != nullptr) {
        throw py::value_error("epsilon_corrected: of " + variables_[i].label +
                              " in a deferred mode, expected an epsilon that is the same in every step");
      }
    }
  }

  // Tables of which this step touches so much that all rows had better be up to date.
  std::vector<size_t> crowded_tables() const {
    std::vector<size_t> crowded;
    for (size_t i = 0; has_tables_ && i < tensors_.size(); ++i) {
      const Rows* rows = tensors_[i].rows;
      if (tables_[i] != nullptr && rows != nullptr && is_crowded(i)) crowded.push_back(i);
    }
    return crowded;
  }

  // All rows of table i, for a step without gradient.
  TensorArgs all_rows_of(size_t i, const AdamHyper& hyper) {
    TensorArgs tensor = tensors_[i];
    tensor.grad = nullptr;
    tensor.grad_size = 0;
    tensor.rows = nullptr;
    tensor.stale = &tables_[i]->rows(nullptr, hyper, amsgrad());
    return tensor;
  }

  void clear_history(size_t i) { tables_[i]->clear(); }

  // The histories of the tables that IndexedSlices touch; a dense gradient meets a table that is up to date.
  void read_histories(const AdamHyper& hyper) {
    if (!has_tables_) return;
    for (size_t i = 0; i < tensors_.size(); ++i) {
      TensorArgs& tensor = tensors_[i];
      tensor.stale = nullptr;
      if (tables_[i] == nullptr) continue;
      const bool waits = tensor.rows != nullptr && !(tables_[i]->is_empty() && is_crowded(i));
      if (waits) tables_[i]->require_room(variables_[i].label);
      if (waits) tensor.stale = &tables_[i]->rows(tensor.rows, hyper, amsgrad());
      if (tensor.rows == nullptr && !tables_[i]->is_empty()) {
        throw py::value_error(variables_[i].label + ": rows are not up to date, expected sync() before this gradient");
      }
    }
    measure();
  }

  // The rows that `ids` name of the only variable, or all: the next step has no gradient and brings them up to date.
  void choose_rows(const std::optional<py::object>& ids, const AdamHyper& hyper) {
    TensorArgs& tensor = tensors_.at(0);
    tensor.grad = nullptr;
    tensor.grad_size = 0;
    tensor.rows = nullptr;
    if (ids) indexes_[0] = backend_.index_of(*ids, Label{"ids"}, variables_[0]);
    if (ids) tensor.rows = &indexes_[0]->rows();
    index_rows();
    tensor.stale = &tables_.at(0)->rows(tensor.rows, hyper, amsgrad());
    measure();
  }

  // After a step, whose scalars these are, or after rows have only been brought up to date.
  void note_histories(const StepArgs* step, int64_t call) {
    for (size_t i = 0; i < tensors_.size(); ++i) {
      if (tensors_[i].stale == nullptr || tensors_[i].rows == nullptr) continue;
      tables_[i]->note(*tensors_[i].rows, step, tensors_[i].decays, call);
    }
  }

  // The work of a step, in elements.
  void measure() {
    for (size_t k = 0; k < heads_.size(); ++k)
      offsets_[k + 1] = offsets_[k] + moved_elements(tensors_[static_cast<size_t>(heads_[k])], lazy_);
  }

  bool lazy() const { return lazy_; }

  Backend& backend() { return backend_; }

  // The gradients of the last check are used; what they belong to need not be kept any more.
  void forget_gradients() {
    exported_.clear();
    for (auto& index : indexes_) backend_.drop(index);
    for (TensorArgs& tensor : tensors_) tensor.rows = nullptr;
  }

  // The accumulators are the gradients.
  void read_accumulators() {
    for (TensorArgs& t : tensors_) {
      t.rows = nullptr;
      t.grad_size = t.size;
      t.grad = t.accumulator;
      t.grad_dtype = state_dtype(t.dtype);
    }
  }

 private:
  Label gradient_label(size_t i) const { return {"grads", positions_[i]}; }

  // False if the gradient has to be converted first.
  bool add_gradient(const py::object& object, size_t i) {
    const Buffer& var = variables_[i];
    tensors_[i].rows = nullptr;
    tensors_[i].stale = nullptr;
    tensors_[i].grad_size = tensors_[i].size;
    if (is_ndarray_like(object, var)) {
      set_gradient(py::detail::array_proxy(object.ptr())->data, *var.dtype, i);
      return true;
    }
    if (py::isinstance<Slices>(object)) return add_slices(object.cast<Slices>(), i);
    if (read_again(object, i)) return true;
    if (exchange_api_of(object) != nullptr && is_negated(object)) return refuse_negated(var, i);
    if (const void* address = address_like(object, var)) {
      set_gradient(address, *var.dtype, i);
      exported_.push_back(object);
      return true;
    }
    std::optional<Buffer> g = read_array(object, gradient_label(i));
    if (!g) return false;
    if (g->shape != var.shape) {
      throw py::value_error(gradient_label(i)() + ": shape " + tuple_text(g->shape) + ", expected " +
                            tuple_text(var.shape) + " like " + var.label);
    }
    const bool readable = g->dtype == var.dtype || (!tensors_[i].half_slots && g->dtype == state_dtype(*var.dtype));
    require_place(*g, gradient_label(i)(), place());
    if (!readable || !g->native_order || !g->same_layout(var) || !g->aligned()) return refuse_on_device(*g, var, i);
    backend_.order_after(g->stream);
    set_gradient(g->data, *g->dtype, i);
    exported_.push_back(g->owner);
    if (g->device == Buffer::kHost) return true;
    g->owner = g->stream_source = py::object();  // to be freed by whoever has made it
    read_before_[i] = *std::move(g);
    return true;
  }

  // Quickly, a gradient on a GPU like that of the last step; false if it has to be read as a whole.
  bool read_again(const py::object& object, size_t i) {
    const Buffer& last = read_before_[i];
    if (last.device == Buffer::kHost) return false;
    const std::optional<Whereabouts> now = reread_device_array(object, last);
    if (!now || now->device != variables_[i].device) return false;
    backend_.order_after(now->stream);
    set_gradient(now->data, *last.dtype, i);
    exported_.push_back(object);
    return true;
  }

  bool add_slices(const Slices& slices, size_t i) {
    const Buffer& var = variables_[i];
    require_rows(i);
    const Label label{gradient_label(i)() + ".values"};
    std::optional<Buffer> values = read_array(slices.values, label);
    if (!values || !backend_.takes_indices(slices.indices)) return false;
    require_place(*values, label(), place());
    indexes_[i] = backend_.index_of(slices.indices, Label{gradient_label(i)() + ".indices"}, var);
    if (indexes_[i]->rank() != 1) throw py::value_error(gradient_label(i)() + ".indices: expected one axis");
    std::vector<int64_t> shape = var.shape;
    shape[0] = indexes_[i]->count();
    if (values->shape != shape) {
      throw py::value_error(label() + ": shape " + tuple_text(values->shape) + ", expected " + tuple_text(shape) +
                            ", a row of " + var.label + " for each index");
    }
    const bool readable = values->dtype == var.dtype || values->dtype == state_dtype(*var.dtype);
    const bool as_it_lies = readable && values->native_order && values->c_contiguous && values->aligned();
    if (!as_it_lies) return refuse_on_device(*values, var, i);
    backend_.order_after(values->stream);
    tensors_[i].grad_size = values->size;
    set_gradient(values->data, *values->dtype, i);
    tensors_[i].rows = &indexes_[i]->rows();
    exported_.push_back(std::move(values->owner));
    exported_.push_back(slices.indices);
    return true;
  }

  // False: Python converts a gradient of the CPU; on a GPU nothing is converted.
  bool refuse_on_device(const Buffer& g, const Buffer& var, size_t i) const {
    if (g.device != Buffer::kHost) refuse_as_it_lies(g, var, gradient_label(i)());
    return false;
  }

  bool refuse_negated(const Buffer& var, size_t i) const {
    if (var.device == Buffer::kHost) return false;
    throw py::value_error(gradient_label(i)() + ": tensor with the negative bit; resolve it first");
  }

  bool is_crowded(size_t i) const { return tables_[i]->is_crowded(*tensors_[i].rows, indexes_[i]->count()); }

  // What a variable needs for IndexedSlices.
  void require_rows(size_t i) const {
    const Buffer& var = variables_[i];
    const std::string found = gradient_label(i)() + ": IndexedSlices for " + var.label;
    if (var.shape.empty()) throw py::value_error(found + " of shape (), expected at least one axis");
    if (tensors_[i].half_slots) {
      throw py::type_error(found + " whose m is " + name_of(*var.dtype) + ", expected float32 moments");
    }
    if (!var.c_contiguous) throw py::value_error(found + " in order F, expected order C, rows side by side");
    if ((lazy_ || tables_[i] != nullptr) && is_repeated_[i]) {
      throw py::value_error(found + ", which comes twice, expected it once unless sparse_update is 'dense'");
    }
  }

  bool sort(size_t i) {
    const py::gil_scoped_release unlocked;
    return backend_.sort(*indexes_[i], static_cast<int64_t>(i));
  }

  void set_gradient(const void* data, DType dtype, size_t i) {
    TensorArgs& tensor = tensors_[i];
    written_.require_apart(data, tensor.grad_size * size_of(dtype), i, gradient_label(i));
    tensor.grad = data;
    tensor.grad_dtype = dtype;
  }

  void use_sums(const void* sums, size_t i) {
    TensorArgs& tensor = tensors_[i];
    indexes_[i]->use_sums();
    tensor.grad = sums;
    tensor.grad_dtype = state_dtype(tensor.grad_dtype);
    tensor.grad_size = tensor.rows->count * tensor.rows->width;
  }

  Backend backend_;
  std::vector<Buffer> read_before_;   // dense gradients of the last step, of a GPU, which often come again
  std::vector<py::object> exported_;  // keep gradients that are not ndarrays alive during a step
  std::vector<std::unique_ptr<typename Backend::Index>> indexes_;  // of the gradients that are IndexedSlices
  std::vector<std::unique_ptr<typename Backend::Table>> tables_;   // of the variables in a deferred mode
  bool has_tables_ = false;
  bool lazy_;
};

}  // namespace fastadam::bind
