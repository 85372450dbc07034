// SPDX-License-Identifier: Apache-2.0
// The closed forms that the rows of one table need at one time (core/closed_form.h), by the step of the history up to
// which a row is. A cache beside the history, which it can be made of again; Python keeps both (staleness.py).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <unordered_map>
#include <vector>

#include "../core/closed_form.h"
#include "../core/step_args.h"
#include "../core/step_scalars.h"

namespace fastadam::bind {

// Not inlined: GCC 12 leaves out the rounding where it makes one vector of two of them side by side.
__attribute__((noinline)) inline double rounded_to_float(double x) { return static_cast<float>(x); }

class ClosedForms {
 public:
  // Of the rows that have had from[0], ... from[count - 1] of the steps, for StaleRows `rows` of a float32 table.
  void prepare(const int32_t* from, int64_t count, const StaleRows& rows, const AdamHyper& hyper, bool amsgrad) {
    beta_1_ = rounded_to_float(hyper.beta_1);
    beta_2_ = rounded_to_float(hyper.beta_2);
    amsgrad_ = amsgrad;
    now_ = rows.now;
    alphas_ = static_cast<const float*>(rows.alphas);
    keeps_ = static_cast<const float*>(rows.keeps);
    forms_.clear();
    from_.clear();
    places_.resize(static_cast<size_t>(now_) + 1);
    for (int64_t k = 0; k < count; ++k) add(from[k]);
    const StepMeasure none(beta_1_, beta_2_, amsgrad);
    const int64_t window = window_of(none.fall());
    make_near(none, window);
    make_far(none, window, rows);
    for (size_t i = 0; i < forms_.size(); ++i) {
      const auto steps = static_cast<double>(now_ - from_[i]);
      forms_[i].m_factor = power(beta_1_, steps);
      forms_[i].v_factor = power(beta_2_, steps);
    }
  }

  // The history begins anew.
  void clear() {
    windows_.clear();
    log_keeps_.clear();
  }

  const ClosedForm* forms() const { return forms_.data(); }
  const int32_t* places() const { return places_.data(); }

 private:
  // The first steps of a long gap, which are all that matter.
  struct Window {
    ClosedForm form;
    double sum_at_1;
  };

  static constexpr int64_t kMaxWindow = 8192;
  static constexpr size_t kMaxWindows = 1 << 16;

  // Steps after which weights have fallen to 2^-60.
  static int64_t window_of(double fall) {
    const double steps = std::ceil(-60 * std::log(2.0) / std::log(fall));
    return fall < 1 && steps < kMaxWindow ? std::max<int64_t>(1, static_cast<int64_t>(steps)) : kMaxWindow;
  }

  // Not flushed to zero: an infinite moment stays infinite.
  static double power(double beta, double steps) {
    return beta == 0 ? 0 : std::max(std::pow(beta, steps), std::numeric_limits<double>::min());
  }

  bool has(int64_t from) const {
    const auto place = static_cast<size_t>(places_[static_cast<size_t>(from)]);
    return place < from_.size() && from_[place] == from;
  }

  void add(int64_t from) {
    if (now_ - from <= kShortGap || has(from)) return;
    places_[static_cast<size_t>(from)] = static_cast<int32_t>(from_.size());
    from_.push_back(from);
    forms_.push_back({});
  }

  // Of the gaps within the window: one walk back from now.
  void make_near(const StepMeasure& none, int64_t window) {
    int64_t first = now_;
    for (int64_t from : from_) {
      if (now_ - from <= window) first = std::min(first, from);
    }
    StepMeasure measure = none;
    for (int64_t step = now_ - 1; step >= first; --step) {
      measure.prepend(alphas_[step], keeps_[step]);
      if (has(step)) forms_[static_cast<size_t>(places_[static_cast<size_t>(step)])] = measure.closed_form();
    }
  }

  // Of longer gaps: that of the window, if what comes after it is lost beside it, times the weight decay after it.
  void make_far(const StepMeasure& none, int64_t window, const StaleRows& rows) {
    const double fall = none.fall();
    double peak = -1;
    for (size_t i = 0; i < from_.size(); ++i) {
      const int64_t end = from_[i] + window;
      if (end >= now_) continue;
      if (peak < 0) peak = highest(static_cast<const float*>(rows.peaks));
      const Window& found = window_at(from_[i], window, none);
      const double rest = fall < 1 ? peak * std::pow(fall, static_cast<double>(window)) * fall / (1 - fall)
                                   : std::numeric_limits<double>::infinity();
      const double keep = std::exp(log_keep(now_) - log_keep(end));
      forms_[i] = found.form;
      forms_[i].exists = found.form.exists && rest <= 0x1p-28 * found.sum_at_1 && std::isfinite(keep);
      forms_[i].keep *= keep;
      for (float& c : forms_[i].numerator) c *= static_cast<float>(keep);
    }
  }

  double highest(const float* peaks) const {
    return *std::max_element(peaks, peaks + (now_ + kPeakSteps - 1) / kPeakSteps);
  }

  const Window& window_at(int64_t from, int64_t window, const StepMeasure& none) {
    const auto known = windows_.find(from);
    if (known != windows_.end()) return known->second;
    if (windows_.size() >= kMaxWindows) windows_.clear();
    StepMeasure measure = none;
    for (int64_t step = from + window - 1; step >= from; --step) measure.prepend(alphas_[step], keeps_[step]);
    return windows_[from] = {measure.closed_form(), measure.sum_at_1()};
  }

  // Logarithm of the weight decay of the steps before this one; NaN once a variable has changed its sign or grown.
  double log_keep(int64_t step) {
    if (log_keeps_.empty()) log_keeps_.push_back(0);
    while (static_cast<int64_t>(log_keeps_.size()) <= step) {
      const double keep = keeps_[log_keeps_.size() - 1];
      const double logarithm = keep > 0 && keep <= 1 ? std::log(keep) : std::numeric_limits<double>::quiet_NaN();
      log_keeps_.push_back(log_keeps_.back() + logarithm);
    }
    return log_keeps_[static_cast<size_t>(step)];
  }

  std::vector<ClosedForm> forms_;
  std::vector<int64_t> from_;    // of each form
  std::vector<int32_t> places_;  // of the form of each step, where from_ says so
  std::unordered_map<int64_t, Window> windows_;
  std::vector<double> log_keeps_;
  const float* alphas_ = nullptr;
  const float* keeps_ = nullptr;
  double beta_1_ = 0;
  double beta_2_ = 0;
  int64_t now_ = 0;
  bool amsgrad_ = false;
};

}  // namespace fastadam::bind
