// SPDX-License-Identifier: Apache-2.0
// The history of a table in a deferred mode, in arrays that Python owns (python/fastadam/_core/deferred/history.py):
// which steps each row has had, and the rate of every step. Native views of it for one plan.
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
#include "closed_forms.h"
#include "read_buffer.h"

namespace fastadam::bind {

// The part of a table that every backend has: arrays in CPU memory.
class History {
 public:
  History(py::array alphas, py::array keeps, py::array peaks, py::array_t<int64_t> counts,
          std::shared_ptr<ClosedForms> forms, double crossover, const Buffer& variable)
      : alphas_(std::move(alphas)),
        keeps_(std::move(keeps)),
        peaks_(std::move(peaks)),
        counts_(std::move(counts)),
        forms_(std::move(forms)),
        crossover_(crossover),
        row_count_(variable.shape[0]),
        width_(row_count_ == 0 ? 0 : variable.size / row_count_),
        is_double_(*variable.dtype == FASTADAM_FLOAT64) {}

  // Whether so many rows are touched that one pass over the table is cheaper than replaying each row separately. With
  // closed forms a pass changes last bits, so the answer must be the same on a GPU: it depends on the number of
  // indices, which a GPU knows without waiting.
  bool is_crowded(const Rows& rows, int64_t index_count) const {
    const int64_t touched = forms_ == nullptr ? rows.count : index_count;
    return static_cast<double>(touched) * crossover_ >= static_cast<double>(row_count_);
  }

  // Raises if the history has no room for another step.
  void require_room(const std::string& label) const {
    if (counts_.data()[0] < alphas_.size()) return;
    throw py::value_error(label + ": the history of its steps is full");
  }

 protected:
  int64_t* counts() { return counts_.mutable_data(); }
  int64_t steps() const { return counts_.data()[0]; }

  // Fills in the fields that all rows share.
  void read(StaleRows& args, const AdamHyper& hyper, bool amsgrad) {
    args.alphas = alphas_.data();
    args.keeps = keeps_.data();
    args.peaks = peaks_.data();
    args.width = width_;
    args.now = steps();
    args.may_stop = counts()[1] == 0 && comes_to_rest(hyper, amsgrad);
  }

  // Call require_room() first.
  void append(const StepArgs& step, bool decays) {
    if (is_double_) {
      append(step.scalars_f64, decays);
    } else {
      append(step.scalars_f32, decays);
    }
  }

  py::array alphas_;
  py::array keeps_;
  py::array peaks_;
  py::array_t<int64_t> counts_;
  std::shared_ptr<ClosedForms> forms_;
  double crossover_;
  int64_t row_count_;
  int64_t width_;
  bool is_double_;

 private:
  // A row may be left at rest if |m| / (sqrt(v) + epsilon) can only fall from step to step: m falls faster than
  // sqrt(v), by more than their roundings, and a v that is flushed to zero changes nothing beside epsilon. vhat does
  // not fall.
  static bool comes_to_rest(const AdamHyper& hyper, bool amsgrad) {
    return hyper.epsilon >= 0x1p-40 && (amsgrad || hyper.beta_1 < std::sqrt(hyper.beta_2) * (1 - 1e-4));
  }

  template <class T>
  void append(const StepScalars<T>& s, bool decays) {
    const int64_t step = counts()[0]++;
    const T keep = decays ? s.keep : T(1);
    static_cast<T*>(alphas_.mutable_data())[step] = s.row_alpha;
    static_cast<T*>(keeps_.mutable_data())[step] = keep;
    T& peak = static_cast<T*>(peaks_.mutable_data())[step / kPeakSteps];
    peak = std::max(step % kPeakSteps == 0 ? T(0) : peak, std::abs(s.row_alpha));
    if (keep != T(1)) ++counts()[1];
  }
};

// A table in CPU memory.
class StaleTable : public History {
 public:
  // last, alphas, keeps, peaks, counts = {steps in the history, those of them with weight decay}; the closed forms of a
  // float32 table whose rows need not have the bits of dense steps; the crossover of is_crowded.
  using Arrays = std::tuple<py::array_t<int32_t>, py::array, py::array, py::array, py::array_t<int64_t>,
                            std::shared_ptr<ClosedForms>, double>;

  StaleTable(const Arrays& arrays, const Buffer& variable)
      : History(std::get<1>(arrays), std::get<2>(arrays), std::get<3>(arrays), std::get<4>(arrays), std::get<5>(arrays),
                std::get<6>(arrays), variable),
        last_(std::get<0>(arrays)) {}

  // What the kernels read for these rows, or for all rows if null. The steps that each row has seen are copied, because
  // several threads may work on one row.
  const StaleRows& rows(const Rows* rows, const AdamHyper& hyper, bool amsgrad) {
    const int32_t* last = last_.data();
    from_.clear();
    for (int64_t k = 0; rows != nullptr && k < rows->count; ++k) from_.push_back(last[rows->rows[k]]);
    read(args_, hyper, amsgrad);
    args_.from = rows == nullptr ? last : from_.data();
    if (forms_ != nullptr) {
      forms_->prepare(args_.from, rows == nullptr ? row_count_ : rows->count, args_, hyper, amsgrad);
      args_.forms = forms_->forms();
      args_.places = forms_->places();
    }
    return args_;
  }

  // The rows have now seen all steps of the history, and this step too if it is not null.
  void note(const Rows& rows, const StepArgs* step, bool decays, int64_t /*call*/) {
    if (step != nullptr) append(*step, decays);
    int32_t* last = last_.mutable_data();
    const auto now = static_cast<int32_t>(steps());
    for (int64_t k = 0; k < rows.count; ++k) last[rows.rows[k]] = now;
  }

  // All rows have seen all steps.
  void clear() {
    std::fill_n(last_.mutable_data(), last_.size(), 0);
    std::fill_n(counts(), 2, int64_t{0});
    if (forms_ != nullptr) forms_->clear();
  }

  // Whether all rows are up to date.
  bool is_empty() const { return steps() == 0; }

 private:
  py::array_t<int32_t> last_;
  StaleRows args_{};
  std::vector<int32_t> from_;
};

}  // namespace fastadam::bind
