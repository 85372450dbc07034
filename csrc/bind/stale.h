// SPDX-License-Identifier: Apache-2.0
// The history of a table in a deferred mode, in arrays that Python owns (python/fastadam/staleness.py): which steps
// each row has had, and the rate of every step. A native view of it for one plan.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <tuple>
#include <vector>

#include "../core/step_args.h"
#include "../core/step_scalars.h"
#include "buffers.h"
#include "closed_forms.h"

namespace fastadam::bind {

class StaleTable {
 public:
  // last, alphas, keeps, peaks, counts = {steps in the history, those of them with weight decay}; the closed forms of a
  // float32 table whose rows need not have the bits of dense steps; the crossover of is_crowded.
  using Arrays = std::tuple<py::array_t<int32_t>, py::array, py::array, py::array, py::array_t<int64_t>,
                            std::shared_ptr<ClosedForms>, double>;

  StaleTable(Arrays arrays, const Buffer& variable) : arrays_(std::move(arrays)) {
    args_.alphas = std::get<1>(arrays_).mutable_data();
    args_.keeps = std::get<2>(arrays_).mutable_data();
    args_.peaks = std::get<3>(arrays_).mutable_data();
    args_.width = variable.shape[0] == 0 ? 0 : variable.size / variable.shape[0];
    is_double_ = *variable.dtype == DType::kFloat64;
  }

  // What the kernels read: of these rows, or of all if null. Notes what each row has had, for threads share rows.
  const StaleRows& rows(const Rows* rows, const AdamHyper& hyper, bool amsgrad) {
    const int32_t* last = std::get<0>(arrays_).data();
    from_.clear();
    for (int64_t k = 0; rows != nullptr && k < rows->count; ++k) from_.push_back(last[rows->rows[k]]);
    args_.from = rows == nullptr ? last : from_.data();
    args_.now = counts()[0];
    args_.may_stop = counts()[1] == 0 && comes_to_rest(hyper, amsgrad);
    if (forms() != nullptr) {
      const auto all_rows = static_cast<int64_t>(std::get<0>(arrays_).size());
      forms()->prepare(args_.from, rows == nullptr ? all_rows : rows->count, args_, hyper, amsgrad);
      args_.forms = forms()->forms();
      args_.places = forms()->places();
    }
    return args_;
  }

  // The rows have had all steps of the history, and one more of which this is the rate, if there was one.
  void note(const Rows& rows, const StepScalars<float>* single, const StepScalars<double>* twice, bool decays) {
    if (single != nullptr && !is_double_) append<float>(*single, decays);
    if (twice != nullptr && is_double_) append<double>(*twice, decays);
    int32_t* last = std::get<0>(arrays_).mutable_data();
    const auto now = static_cast<int32_t>(counts()[0]);
    for (int64_t k = 0; k < rows.count; ++k) last[rows.rows[k]] = now;
  }

  // All rows have had all steps.
  void clear() {
    auto& last = std::get<0>(arrays_);
    std::fill_n(last.mutable_data(), last.size(), 0);
    std::fill_n(counts(), 2, int64_t{0});
    if (forms() != nullptr) forms()->clear();
  }

  // Whether so many rows are touched that one pass over the table is cheaper than going from row to row, each with the
  // steps it missed.
  bool is_crowded(const Rows& rows) const {
    const double crossover = std::get<6>(arrays_);
    return static_cast<double>(rows.count) * crossover >= static_cast<double>(std::get<0>(arrays_).size());
  }

  // Before a step that will be noted.
  void require_room(const std::string& label) const {
    if (std::get<4>(arrays_).data()[0] < std::get<1>(arrays_).size()) return;
    throw py::value_error(label + ": the history of its steps is full");
  }

  bool is_empty() const { return std::get<4>(arrays_).data()[0] == 0; }

 private:
  ClosedForms* forms() { return std::get<5>(arrays_).get(); }
  int64_t* counts() { return std::get<4>(arrays_).mutable_data(); }

  // A row may be left at rest if |m| / (sqrt(v) + epsilon) can only fall from step to step: m falls faster than
  // sqrt(v), by more than their roundings, and a v that is flushed to zero changes nothing beside epsilon. vhat does
  // not fall.
  static bool comes_to_rest(const AdamHyper& hyper, bool amsgrad) {
    return hyper.epsilon >= 0x1p-40 && (amsgrad || hyper.beta_1 < std::sqrt(hyper.beta_2) * (1 - 1e-4));
  }

  // There is room: require_room() has been asked.
  template <class T>
  void append(const StepScalars<T>& s, bool decays) {
    const int64_t step = counts()[0]++;
    const T keep = decays ? s.keep : T(1);
    static_cast<T*>(std::get<1>(arrays_).mutable_data())[step] = s.row_alpha;
    static_cast<T*>(std::get<2>(arrays_).mutable_data())[step] = keep;
    T& peak = static_cast<T*>(std::get<3>(arrays_).mutable_data())[step / kPeakSteps];
    peak = std::max(step % kPeakSteps == 0 ? T(0) : peak, std::abs(s.row_alpha));
    if (keep != T(1)) ++counts()[1];
  }

  Arrays arrays_;
  StaleRows args_{};
  std::vector<int32_t> from_;
  bool is_double_;
};

}  // namespace fastadam::bind
