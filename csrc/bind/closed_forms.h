// SPDX-License-Identifier: Apache-2.0
// Cache of closed forms (core/closed_form.h) for one table, keyed by the last step that a row has had. It can be
// computed from the history at any time; Python stores both.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <unordered_map>
#include <vector>

#include "../core/closed_form.h"
#include "../core/float_mode.h"
#include "../core/step_args.h"
#include "../core/step_scalars.h"

namespace fastadam::bind {

// Not inlined: GCC 12 drops the rounding when it vectorises two adjacent calls.
__attribute__((noinline)) inline double rounded_to_float(double x) { return static_cast<float>(x); }

class ClosedForms {
 public:
  // Computes the forms for rows of a float32 table; `from`: as in StaleRows, for `count` rows.
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
    for (int64_t k = 0; k < count; ++k) add(std::max<int64_t>(from[k] - rows.synced, 0));
    const int64_t window = window_of(fall(), amsgrad);
    make_near(window, kFewNodes);
    if (!all_near_exist(window)) make_near(window, kMaxNodes);
    make_far(window, rows);
    for (size_t i = 0; i < forms_.size(); ++i) {
      const auto steps = static_cast<double>(now_ - from_[i]);
      forms_[i].m_factor = power(beta_1_, steps);
      forms_[i].v_factor = power(beta_2_, steps);
    }
  }

  // Call this when the steps of the history count from another one.
  void clear() {
    windows_.clear();
    log_keeps_.clear();
    last_without_log_ = -1;
    constant_window_ = 0;  // the betas may have changed
  }

  // Whether the longest gaps have a form if the rate is constant.
  static bool exist(double beta_1, double beta_2, bool amsgrad) {
    const DefaultArithmetic arithmetic;
    const double single_1 = rounded_to_float(beta_1);
    const double single_2 = rounded_to_float(beta_2);
    StepMeasure measure(single_1, single_2, amsgrad);
    const int64_t window = window_of(StepMeasure::fall(single_1, single_2, amsgrad), amsgrad);
    for (int64_t step = 0; step < window; ++step) measure.prepend(1, 1);
    return measure.closed_form().exists;
  }

  const ClosedForm* forms() const { return forms_.data(); }
  int64_t count() const { return static_cast<int64_t>(forms_.size()); }
  const int32_t* places() const { return places_.data(); }

 private:
  // The first steps of a long gap; the later ones do not matter.
  struct Window {
    ClosedForm form;
    double sum_at_1;
  };

  static constexpr size_t kMaxWindows = 1 << 16;
  static constexpr int kFewNodes = 2;  // enough for the default betas

  double fall() const { return StepMeasure::fall(beta_1_, beta_2_, amsgrad_); }

  // Number of steps after which weights have fallen to 2^-60. AMSGrad may have more, because its steps cost less.
  static int64_t window_of(double fall, bool amsgrad) {
    const int64_t longest = amsgrad ? 1 << 16 : 1 << 13;
    const double steps = std::ceil(-60 * std::log(2.0) / std::log(fall));
    return fall < 1 && steps < static_cast<double>(longest) ? std::max<int64_t>(1, static_cast<int64_t>(steps))
                                                            : longest;
  }

  // Never 0 unless beta is: 0 would turn an infinite moment into NaN.
  static double power(double beta, double steps) {
    return beta == 0 ? 0 : std::max(std::pow(beta, steps), std::numeric_limits<double>::min());
  }

  bool has(int64_t from) const {
    const auto index = static_cast<size_t>(places_[static_cast<size_t>(from)]);
    return index < from_.size() && from_[index] == from;
  }

  void add(int64_t from) {
    if (now_ - from <= kShortGap || has(from)) return;
    places_[static_cast<size_t>(from)] = static_cast<int32_t>(from_.size());
    from_.push_back(from);
    forms_.push_back({});
  }

  // Computes the forms of the gaps within the window, in one pass back from now.
  void make_near(int64_t window, int most_nodes) {
    int64_t first = now_;
    for (int64_t from : from_) {
      if (now_ - from <= window) first = std::min(first, from);
    }
    StepMeasure measure(beta_1_, beta_2_, amsgrad_, most_nodes);
    for (int64_t step = now_ - 1; step >= first; --step) {
      measure.prepend(alphas_[step], keeps_[step]);
      if (has(step)) forms_[static_cast<size_t>(places_[static_cast<size_t>(step)])] = measure.closed_form();
    }
  }

  bool all_near_exist(int64_t window) const {
    for (size_t i = 0; i < from_.size(); ++i) {
      if (now_ - from_[i] <= window && !forms_[i].exists) return false;
    }
    return true;
  }

  // Computes the forms of longer gaps: the form of the window times the weight decay after it. It exists only if
  // rounding hides the steps after the window.
  void make_far(int64_t window, const StaleRows& rows) {
    const double falls = fall();
    const double after = falls < 1 ? std::pow(falls, static_cast<double>(window)) * falls / (1 - falls)
                                   : std::numeric_limits<double>::infinity();
    peaks_.clear();
    for (size_t i = 0; i < from_.size(); ++i) {
      const int64_t end = from_[i] + window;
      if (end >= now_) continue;
      if (peaks_.empty()) find_peaks(static_cast<const float*>(rows.peaks));
      const Window& start = window_at(from_[i], window);
      const double bound = peaks_[static_cast<size_t>(end / kPeakSteps)] * after;  // of the sum after the window
      const double keep = std::exp(log_keep(now_) - log_keep(end));
      forms_[i] = start.form;
      forms_[i].exists = start.form.exists && bound <= 0x1p-28 * start.sum_at_1 && last_without_log_ < end;
      forms_[i].keep *= keep;
      for (float& c : forms_[i].numerator) c *= static_cast<float>(keep);
    }
  }

  // peaks_[i]: the largest |alpha| of the i-th kPeakSteps steps and all after them.
  void find_peaks(const float* peaks) {
    peaks_.assign(peaks, peaks + (now_ + kPeakSteps - 1) / kPeakSteps);
    for (size_t i = peaks_.size() - 1; i > 0; --i) peaks_[i - 1] = std::max(peaks_[i - 1], peaks_[i]);
  }

  const Window& window_at(int64_t from, int64_t window) {
    const auto cached = windows_.find(from);
    if (cached != windows_.end()) return cached->second;
    if (windows_.size() >= kMaxWindows) windows_.clear();
    const auto all_same = [&](const float* values) {
      return std::all_of(values + from, values + from + window, [&](float x) { return x == values[from]; });
    };
    const bool is_constant = all_same(alphas_) && all_same(keeps_);
    const bool same_rate = is_constant && alphas_[from] == constant_alpha_ && keeps_[from] == constant_keep_;
    if (same_rate && window == constant_window_) return windows_[from] = constant_;
    Window result = make_window(from, window, kFewNodes);
    if (!result.form.exists) result = make_window(from, window, kMaxNodes);
    if (is_constant) {
      constant_ = result;
      constant_alpha_ = alphas_[from];
      constant_keep_ = keeps_[from];
      constant_window_ = window;
    }
    return windows_[from] = result;
  }

  Window make_window(int64_t from, int64_t window, int most_nodes) const {
    StepMeasure measure(beta_1_, beta_2_, amsgrad_, most_nodes);
    for (int64_t step = from + window - 1; step >= from; --step) measure.prepend(alphas_[step], keeps_[step]);
    return {measure.closed_form(), measure.sum_at_1()};
  }

  // Logarithm of the weight decay of all steps before this one, without steps that change the sign of a variable.
  double log_keep(int64_t step) {
    if (log_keeps_.empty()) log_keeps_.push_back(0);
    while (static_cast<int64_t>(log_keeps_.size()) <= step) {
      const auto at = static_cast<int64_t>(log_keeps_.size()) - 1;
      const double keep = keeps_[at];
      if (!(keep > 0)) last_without_log_ = at;
      log_keeps_.push_back(log_keeps_.back() + (keep > 0 ? std::log(keep) : 0));
    }
    return log_keeps_[static_cast<size_t>(step)];
  }

  std::vector<ClosedForm> forms_;
  std::vector<int64_t> from_;    // from_[i]: the steps that rows with forms_[i] have had
  std::vector<int32_t> places_;  // by step: index of its form, valid only if from_ confirms it
  std::unordered_map<int64_t, Window> windows_;
  Window constant_{};  // the last window with a constant rate and weight decay
  float constant_alpha_ = 0;
  float constant_keep_ = 0;
  int64_t constant_window_ = 0;
  std::vector<double> log_keeps_;
  int64_t last_without_log_ = -1;
  std::vector<float> peaks_;
  const float* alphas_ = nullptr;
  const float* keeps_ = nullptr;
  double beta_1_ = 0;
  double beta_2_ = 0;
  int64_t now_ = 0;
  bool amsgrad_ = false;
};

}  // namespace fastadam::bind
