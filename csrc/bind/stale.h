// SPDX-License-Identifier: Apache-2.0
// Views, for one plan, of the history of a deferred table, in arrays that Python owns
// (python/fastadam/_core/deferred/history.py): which steps each row has had, and the rate of every step.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <tuple>
#include <vector>

#include "../core/at_rest.h"
#include "../core/step_args.h"
#include "../core/step_scalars.h"
#include "closed_forms.h"
#include "read_buffer.h"

namespace fastadam::bind {

// Of the group of kPeakSteps steps that this one belongs to.
template <class T>
void raise_peak(T* peaks, int64_t step, T alpha) {
  T& peak = peaks[step / kPeakSteps];
  peak = std::max(step % kPeakSteps == 0 ? T(0) : peak, std::abs(alpha));
}

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
  int64_t synced() const { return counts_.data()[2]; }

  // Fills in the fields that all rows share, for the steps from `first` on.
  void read(StaleRows& args, int64_t first, const AdamHyper& hyper, bool amsgrad) {
    args.alphas = static_cast<const char*>(alphas_.data()) + first * alphas_.itemsize();
    args.keeps = static_cast<const char*>(keeps_.data()) + first * keeps_.itemsize();
    args.peaks = peaks_.data();
    args.width = width_;
    args.now = steps() - first;
    args.leaves_zeros = counts()[1] == 0;
    args.may_stop = args.leaves_zeros && comes_to_rest(hyper, amsgrad);
  }

  // Call require_room() first. The peaks are those of the steps from `first` on.
  void append(const StepArgs& step, bool decays, int64_t first) {
    if (is_double_) {
      append(step.scalars_f64, decays, first);
    } else {
      append(step.scalars_f32, decays, first);
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
  bool dense_ = false;  // steps follow the rule for dense gradients

 private:
  // A row may be left at rest if |m| / (sqrt(v) + epsilon) can only fall from step to step: m falls faster than
  // sqrt(v), by more than their roundings, and a v that is flushed to zero changes nothing beside epsilon. vhat does
  // not fall.
  static bool comes_to_rest(const AdamHyper& hyper, bool amsgrad) {
    return hyper.epsilon >= 0x1p-40 && (amsgrad || hyper.beta_1 < std::sqrt(hyper.beta_2) * (1 - 1e-4));
  }

  template <class T>
  void append(const StepScalars<T>& s, bool decays, int64_t first) {
    const int64_t step = counts()[0]++;
    const T keep = decays ? s.keep : T(1);
    const T alpha = dense_ ? s.alpha : s.row_alpha;
    static_cast<T*>(alphas_.mutable_data())[step] = alpha;
    static_cast<T*>(keeps_.mutable_data())[step] = keep;
    raise_peak(static_cast<T*>(peaks_.mutable_data()), step - first, alpha);
    if (!leaves_zeros(alpha, keep)) ++counts()[1];
  }
};

// A table in CPU memory. What is said of a history counts from its last full pass.
class StaleTable : public History {
 public:
  // last, alphas, keeps, peaks, counts: see below; the closed forms of a float32 table whose rows need not have the
  // bits of dense steps; the crossover of is_crowded; flags; whether steps follow the rule for dense gradients.
  // counts = {steps in the history; those since the last pass that do not leave zeros (see leaves_zeros); steps that
  // every row has had; not 0 if rows without kMoves may have moments; steps dropped before the first}.
  using Arrays = std::tuple<py::array_t<int32_t>, py::array, py::array, py::array, py::array_t<int64_t>,
                            std::shared_ptr<ClosedForms>, double, py::array_t<uint8_t>, bool>;

  StaleTable(const Arrays& arrays, const Buffer& variable)
      : History(std::get<1>(arrays), std::get<2>(arrays), std::get<3>(arrays), std::get<4>(arrays), std::get<5>(arrays),
                std::get<6>(arrays), variable),
        last_(std::get<0>(arrays)),
        flags_(std::get<7>(arrays)) {
    dense_ = std::get<8>(arrays);
  }

  // What the kernels read for the rows of the gradient, or for all rows without. The steps that each row has seen are
  // copied, because several threads may work on one row. Averages move in every step, so with them no row is left.
  const StaleRows& rows(const TensorArgs& tensor, const AdamHyper& hyper, bool amsgrad) {
    const Rows* rows = tensor.rows;
    const int32_t* last = last_.data();
    from_.clear();
    for (int64_t k = 0; rows != nullptr && k < rows->count; ++k) from_.push_back(last[rows->rows[k]]);
    read(args_, synced(), hyper, amsgrad);
    args_.from = rows == nullptr ? last : from_.data();
    args_.synced = synced();
    args_.flags = args_.leaves_zeros && tensor.average == nullptr ? trusted_flags() : nullptr;
    args_.dense = dense_;
    args_.moves_all = false;
    if (forms_ != nullptr) {
      forms_->prepare(args_.from, rows == nullptr ? row_count_ : rows->count, args_, hyper, amsgrad);
      args_.forms = forms_->forms();
      args_.places = forms_->places();
    }
    return args_;
  }

  // What the kernels read for a step that moves all rows, none of which is behind.
  const StaleRows* all_rows() {
    args_ = {};
    args_.width = width_;
    args_.flags = trusted_flags();
    args_.moves_all = true;
    return &args_;
  }

  // After a step with this gradient, or after its rows were only brought up to date if that is null.
  void note(const TensorArgs& tensor, const StepArgs* step, int64_t /*call*/) {
    const bool moves_all = step != nullptr && !moves_rows_alone(tensor, false);
    // After a pass all rows are up to date, even if several dense gradients of one step find no room for their rates.
    if (step != nullptr && !(moves_all && steps() == alphas_.size())) append(*step, tensor.decays, synced());
    const bool trusts = trusted_flags() != nullptr && tensor.average == nullptr;
    const bool leaves = step == nullptr && counts()[1] == 0 && trusts;
    if (moves_all) note_pass();
    uint8_t* flags = flags_.mutable_data();
    int32_t* last = last_.mutable_data();
    const auto now = static_cast<int32_t>(steps());
    if (tensor.rows == nullptr) return void(std::fill_n(flags, flags_.size(), uint8_t{kMoves | kChanged}));
    for (int64_t k = 0; k < tensor.rows->count; ++k) {
      const int64_t row = tensor.rows->rows[k];
      if (step != nullptr) flags[row] |= kMoves | kChanged;
      const bool is_left = leaves && (flags[row] & kMoves) == 0;  // the page of last[row] may not be there yet
      if (!is_left && !moves_all) last[row] = now;
    }
  }

  // All rows have had all steps.
  void note_pass() {
    counts()[1] = 0;
    counts()[2] = steps();
    if (forms_ != nullptr) forms_->clear();
  }

  // Whether all rows are up to date.
  bool is_empty() const { return steps() == synced(); }

  // Drops the oldest steps, which every row has had that is not left as it is, and finds out anew what is kept of the
  // others beside their rates. Nothing is interrupted in between.
  static void drop(const Arrays& arrays, int64_t count) {
    auto [last, alphas, keeps, peaks, counts, forms, crossover, flags, dense] = arrays;
    int64_t* c = counts.mutable_data();
    if (count < 0 || count > c[0]) throw py::value_error("count: more steps than there are");
    for (int32_t* at = last.mutable_data(); at != last.mutable_data() + last.size(); ++at) {
      if (*at != 0) *at = *at > count ? *at - static_cast<int32_t>(count) : 0;  // pages of zeros are not written
    }
    c[0] -= count;
    const bool begins_anew = count > c[2];
    c[2] = begins_anew ? 0 : c[2] - count;
    c[4] += count;
    if (alphas.itemsize() == sizeof(double)) {
      shift<double>(alphas, keeps, peaks, c, count);
    } else {
      shift<float>(alphas, keeps, peaks, c, count);
    }
    if (begins_anew && forms != nullptr) forms->clear();
  }

 private:
  template <class T>
  static void shift(py::array& alphas, py::array& keeps, py::array& peaks, int64_t* counts, int64_t count) {
    auto* alpha = static_cast<T*>(alphas.mutable_data());
    auto* keep = static_cast<T*>(keeps.mutable_data());
    std::copy(alpha + count, alpha + count + counts[0], alpha);
    std::copy(keep + count, keep + count + counts[0], keep);
    counts[1] = 0;
    for (int64_t i = counts[2]; i < counts[0]; ++i) {
      raise_peak(static_cast<T*>(peaks.mutable_data()), i - counts[2], alpha[i]);
      if (!leaves_zeros(alpha[i], keep[i])) ++counts[1];
    }
  }

  const uint8_t* trusted_flags() { return counts()[3] == 0 ? flags_.data() : nullptr; }

  py::array_t<int32_t> last_;
  py::array_t<uint8_t> flags_;
  StaleRows args_{};
  std::vector<int32_t> from_;
};

}  // namespace fastadam::bind
