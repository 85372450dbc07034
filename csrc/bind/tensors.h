// SPDX-License-Identifier: Apache-2.0
// What a Plan steps: variables, the gradients of the current call, and the histories of deferred tables.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "gradients.h"
#include "variables.h"

namespace fastadam::bind {

// A Backend (cpu_backend.h, cuda_backend.h) reads arrays, sorts rows, holds histories and runs the kernels.
template <class Backend>
class TensorSet {
 public:
  using Arrays = typename Backend::Arrays;
  using Histories = std::vector<std::optional<typename Backend::Table::Arrays>>;

  // The first arguments are those of VariableSet.
  // `lazy`: IndexedSlices move only the rows that they touch.
  // `histories[i]`: history of variable i if it is a table in a deferred mode. It cannot have a copy.
  // `context`: what the plans of one optimizer share on a device, or None.
  TensorSet(std::vector<Buffer> variables, const py::dict& slots, const std::vector<bool>& decays,
            std::vector<int64_t> positions, bool lazy, const Histories& histories, const py::object& context,
            const py::list& copies, const py::dict& names, const Randomness& random)
      : variables_(std::move(variables), slots, decays, std::move(positions), copies, names, random),
        backend_(variables_.place(), variables_.tensors(), variables_.chains(), context),
        lazy_(lazy),
        gradients_(variables_, backend_, moves_rows_alone(lazy, histories)) {
    variables_.require_length("histories", histories.size());
    for (size_t i = 0; i < histories.size(); ++i) {
      tables_.push_back(histories[i] ? backend_.table_of(*histories[i], variables_[i]) : nullptr);
      has_tables_ = has_tables_ || histories[i];
      if (!histories[i] || tensors()[i].copy == nullptr) continue;
      throw py::value_error("copies: of " + variables_[i].label + " in a deferred mode, expected None: rows wait");
    }
  }

  // The gradients of one call, ready for a step once this is made. They are forgotten when it ends, however it ends.
  class Call {
   public:
    // Raises what is wrong with the gradients. If to_convert() is not empty, nothing but that is known of them.
    Call(TensorSet& set, const py::list& gradients) : Call(set) {
      to_convert_ = set_.gradients_.read(gradients);
      if (to_convert_.empty()) finish_reading();
    }

    // The accumulators are the gradients: see Gradients::read_accumulators.
    struct Accumulated {
      const py::list& rows;
    };
    Call(TensorSet& set, const Accumulated& accumulated) : Call(set) {
      set_.gradients_.read_accumulators(accumulated.rows);
      finish_reading();
    }

    // Whether some gradient names rows.
    bool has_rows() const {
      const std::vector<TensorArgs>& tensors = set_.tensors();
      return std::any_of(tensors.begin(), tensors.end(), [](const TensorArgs& t) { return t.rows != nullptr; });
    }

    // No gradients; the rows `ids` of the only variable, a table, or all of them.
    Call(TensorSet& set, const std::optional<py::object>& ids, const AdamHyper& hyper) : Call(set) {
      set_.gradients_.read_rows(ids);
      finish_reading();
      TensorArgs& tensor = set_.tensors()[0];
      tensor.stale = &set_.tables_.at(0)->rows(tensor, hyper, set_.variables_.amsgrad());
      set_.measure();
    }

    ~Call() { set_.gradients_.forget(); }
    Call(const Call&) = delete;
    Call& operator=(const Call&) = delete;

    const std::vector<size_t>& to_convert() const { return to_convert_; }

    // Replaces the values of IndexedSlices by the sums of repeated rows: Gradients::sum_rows.
    void sum_rows(bool ascending) { set_.gradients_.sum_rows(ascending); }

    // Points the tensors of IndexedSlices to their histories, before a step. If the step moves all rows of a table, or
    // many, catch_up(tensor) first brings the whole table up to date, which changes nothing that gather or sync would
    // show. `has_gradients`: the accumulators are the gradients of all rows, whatever rows they name.
    template <class CatchUp>
    void read_histories(const AdamHyper& hyper, CatchUp catch_up, bool has_gradients = false) {
      if (!set_.has_tables_) return;
      for (size_t i = 0; i < set_.tables_.size(); ++i) {
        if (set_.tables_[i] == nullptr || set_.tensors()[i].rows == nullptr) continue;
        if (!has_gradients && !set_.moves_all(i, hyper)) continue;
        catch_up(set_.all_rows_of(i, hyper));
        set_.tables_[i]->note_pass();
        if (has_gradients) set_.gradients_.use_all_rows(i);
      }
      for (size_t i = 0; i < set_.tables_.size(); ++i) set_.read_history(i, hyper);
      set_.measure();
    }

    // Gradients are only added up: a share of the work is a part of the variables, whatever rows a step moves.
    void cover_all_rows() { set_.variables_.measure(false); }

    // After a step, whose scalars these are, or after rows were only brought up to date.
    void note_histories(const StepArgs* step, int64_t counter) {
      if (!set_.has_tables_) return;
      for (size_t i = 0; i < set_.tables_.size(); ++i) {
        if (set_.tables_[i] != nullptr) set_.tables_[i]->note(set_.tensors()[i], step, counter);
      }
    }

    // After all rows of the only variable were brought up to date.
    void note_pass() { set_.tables_[0]->note_pass(); }

   private:
    // The other constructors delegate to this one, so the destructor runs even if they throw.
    explicit Call(TensorSet& set) : set_(set) {}

    void finish_reading() {
      set_.gradients_.sort_rows();
      set_.measure();
      set_.variables_.require_current();
    }

    TensorSet& set_;
    std::vector<size_t> to_convert_;
  };

  const VariableSet<Arrays>& variables() const { return variables_; }
  std::vector<TensorArgs>& tensors() { return variables_.tensors(); }
  Backend& backend() { return backend_; }
  bool lazy() const { return lazy_; }
  void set_telemetry(bool wanted) {
    if (wanted && variables_.place().gpu) throw py::value_error("telemetry: of variables on a GPU, expected False");
    variables_.set_telemetry(wanted);
    has_telemetry_ = wanted;
  }

  // Raises if a table has an option that its kernel or its history does not support.
  void require_options(const AdamHyper& hyper) {
    if (hyper.zero_gradients && variables_.place().gpu) {
      throw py::value_error("zero_grads: of gradients on a GPU, expected False");
    }
    if (hyper.zero_gradients) gradients_.require_zeroable();
    for (size_t i = 0; has_telemetry_ && i < variables_.size(); ++i) {
      if (tensors()[i].rows == nullptr) continue;
      throw py::value_error("telemetry: with IndexedSlices for " + variables_[i].label + ", expected dense gradients");
    }
    if (hyper.l2 == 0 && !hyper.epsilon_corrected) return;
    for (size_t i = 0; i < variables_.size(); ++i) {
      if (hyper.l2 != 0 && (tensors()[i].rows != nullptr || tables_[i] != nullptr)) {
        throw py::value_error("l2: with IndexedSlices for " + variables_[i].label +
                              ", expected a dense gradient or decoupled weight decay");
      }
      if (hyper.epsilon_corrected && tables_[i] != nullptr) {
        throw py::value_error("epsilon_corrected: of " + variables_[i].label +
                              " in a deferred mode, expected an epsilon that is the same in every step");
      }
    }
  }

 private:
  static std::vector<bool> moves_rows_alone(bool lazy, const Histories& histories) {
    std::vector<bool> alone;
    for (const auto& history : histories) alone.push_back(lazy || history.has_value());
    return alone;
  }

  // Whether a step moves all rows of a table: with so many rows that it is cheaper, or if averages overwrite them.
  bool moves_all(size_t i, const AdamHyper& hyper) {
    const TensorArgs& tensor = tensors()[i];
    return (hyper.ema_overwrite && tensor.average != nullptr) ||
           tables_[i]->is_crowded(*tensor.rows, gradients_.index_count(i));
  }

  TensorArgs all_rows_of(size_t i, const AdamHyper& hyper) {
    TensorArgs tensor = tensors()[i];
    tensor.grad = nullptr;
    tensor.grad_size = 0;
    tensor.rows = nullptr;
    tensor.stale = &tables_[i]->rows(tensor, hyper, variables_.amsgrad());
    return tensor;
  }

  void read_history(size_t i, const AdamHyper& hyper) {
    TensorArgs& tensor = tensors()[i];
    tensor.stale = nullptr;
    if (tables_[i] == nullptr) return;
    if (tensor.rows == nullptr && !tables_[i]->is_empty()) {
      throw py::value_error(variables_[i].label + ": rows are not up to date, expected sync() before this gradient");
    }
    tables_[i]->require_room(variables_[i].label);
    if (tensor.rows == nullptr) return;
    const bool passes = tables_[i]->is_empty() && moves_all(i, hyper);
    tensor.stale = passes ? tables_[i]->all_rows() : &tables_[i]->rows(tensor, hyper, variables_.amsgrad());
  }

  // Without rows a step always moves all elements.
  void measure() {
    if (lazy_ || has_tables_) variables_.measure(lazy_);
  }

  VariableSet<Arrays> variables_;
  Backend backend_;
  bool lazy_;
  Gradients<Backend> gradients_;
  std::vector<std::unique_ptr<typename Backend::Table>> tables_;  // of the variables in a deferred mode
  bool has_tables_ = false;
  bool has_telemetry_ = false;
};

}  // namespace fastadam::bind
