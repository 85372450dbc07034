// SPDX-License-Identifier: Apache-2.0
// Applies all the steps that a row without a gradient missed at once. Let s = sqrt(v) before these steps,
// r = 1 / sqrt(beta_2) and x_j = (r^j - 1) / (r - 1). Step j moves the variable by
//     m beta_1^j alpha_j / (sqrt(beta_2^j) s + epsilon) = m w_j / ((s + epsilon) (1 + (r - 1) x_j y)),
// where w_j is alpha_j (beta_1 r)^j times the weight decay of later steps, and 0 < y = epsilon / (s + epsilon) <= 1.
// The sum over j is an integral over the measure with weights w_j at the points x_j, which is the same for every
// element. It is computed by its N-point Gauss rule, which equals the Pade approximant [N-1/N] in y (Golub and Meurant,
// "Matrices, Moments and Quadrature").
#pragma once

#include <cmath>
#include <cstdint>

#include "adam_math.h"

namespace fastadam {

constexpr int kMaxNodes = 4;
constexpr int64_t kShortGap = 2;  // gaps up to this are replayed: it costs no more and gives the bits of dense steps

// The variable moves by m P(y) / ((s + epsilon) Q(y)), with the same P and Q for every element of a row.
struct ClosedForm {
  double keep;      // weight decay of all the steps together
  double m_factor;  // beta_1^k
  double v_factor;  // beta_2^k. All three are doubles: in float, repeated jumps of the same length would drift
  float numerator[kMaxNodes];    // coefficients of P: y^0, y^1, ...
  float denominator[kMaxNodes];  // coefficients of Q - 1: y^1, y^2, ...
  bool exists;                   // if false, the steps must be replayed
};

// Applies the form to one element. AMSGrad's denominator is constant after the first step, so its P and Q are
// constants.
template <bool kAmsgrad, class T>
FASTADAM_INLINE void adam_jump(T& var, T& m, T& v, T& vhat, const ClosedForm& form, T beta_2, T epsilon) {
  using std::sqrt;
  T second_moment = v;
  if constexpr (kAmsgrad) second_moment = raise_vhat(vhat, v * beta_2);
  const T divisor = sqrt(second_moment) + epsilon;
  const T y = epsilon / divisor;
  T p = form.numerator[kMaxNodes - 1];
  T q = form.denominator[kMaxNodes - 1];
  for (int i = kMaxNodes - 2; i >= 0; --i) {
    p = p * y + form.numerator[i];
    q = q * y + form.denominator[i];
  }
  const T change = m / (divisor * (q * y + T(1))) * p;
  var = static_cast<T>(static_cast<double>(var) * form.keep - static_cast<double>(change));
  m = static_cast<T>(static_cast<double>(m) * form.m_factor);
  v = static_cast<T>(static_cast<double>(v) * form.v_factor);
}

// The measure of a run of missed steps. It is built backwards, from the last step to the first.
class StepMeasure {
 public:
  // Fewer nodes than kMaxNodes make it faster, but then a rule exists for fewer measures.
  FASTADAM_INLINE StepMeasure(double beta_1, double beta_2, bool amsgrad, int most_nodes = kMaxNodes)
      : beta_1_(beta_1), ratio_(ratio(beta_2, amsgrad)), amsgrad_(amsgrad), most_nodes_(most_nodes) {
    double binomials[kMoments] = {1};
    for (int p = 0; p < kMoments; ++p) {
      for (int i = p; i > 0; --i) binomials[i] += binomials[i - 1];
      double power = beta_1 * ratio_;
      for (int i = 0; i <= p; ++i, power *= ratio_) shift_[p][i] = binomials[i] * power;
    }
  }

  // beta_1 r: the factor by which the weights fall from step to step.
  FASTADAM_INLINE static double fall(double beta_1, double beta_2, bool amsgrad) {
    return beta_1 * ratio(beta_2, amsgrad);
  }

  // Adds a step before all others: every x becomes r x + 1, and every weight is multiplied by beta_1 r.
  FASTADAM_INLINE void prepend(double alpha, double keep) {
    is_positive_ = is_positive_ && alpha >= 0 && keep > 0;
    const double weight = alpha * keep_;
    sum_at_1_ = beta_1_ * (sum_at_1_ + weight);
    keep_ *= keep;
    if (amsgrad_) return;
    moments_[0] += weight;
    for (int p = 2 * most_nodes_ - 1; p >= 0; --p) {
      double sum = 0;
      for (int i = 0; i <= p; ++i) sum += shift_[p][i] * moments_[i];
      moments_[p] = sum;
    }
  }

  // The sum at y = 1, its smallest value.
  FASTADAM_INLINE double sum_at_1() const { return sum_at_1_; }

  // Uses the smallest number of nodes with a relative error of at most 2^-26. The error grows with y, since all weights
  // are positive, so it is measured at y = 1, where the exact sum is known. The caller sets m_factor and v_factor.
  FASTADAM_INLINE ClosedForm closed_form() const {
    ClosedForm form{};
    form.keep = keep_;
    if (!is_positive_) return form;
    if (amsgrad_ || sum_at_1_ == 0) {
      form.numerator[0] = static_cast<float>(sum_at_1_);
      form.exists = true;
      return form;
    }
    find_rule(form);
    return form;
  }

 private:
  static constexpr int kMoments = 2 * kMaxNodes;
  static constexpr double kTolerance = 0x1p-26;

  FASTADAM_INLINE static double ratio(double beta_2, bool amsgrad) { return amsgrad ? 1.0 : 1.0 / std::sqrt(beta_2); }

  struct Polynomial {
    double of[kMaxNodes + 1] = {};  // coefficients: y^0, y^1, ...
    FASTADAM_INLINE double at_1() const {
      double sum = 0;
      for (double c : of) sum += c;
      return sum;
    }
  };

  // (1 + h alpha y) now - h^2 beta y^2 before: the three-term recurrence of orthogonal polynomials, in y = -1 / (h x).
  FASTADAM_INLINE static Polynomial next(const Polynomial& now, const Polynomial& before, double h_alpha,
                                         double hh_beta) {
    Polynomial result = now;
    for (int i = 1; i <= kMaxNodes; ++i) result.of[i] += h_alpha * now.of[i - 1];
    for (int i = 2; i <= kMaxNodes; ++i) result.of[i] -= hh_beta * before.of[i - 2];
    return result;
  }

  // Chebyshev's algorithm: computes the recurrence from the moments, node by node, and the convergents of the continued
  // fraction.
  FASTADAM_INLINE void find_rule(ClosedForm& form) const {
    const double h = ratio_ - 1;
    double before[kMoments] = {};
    double now[kMoments];
    for (int i = 0; i < kMoments; ++i) now[i] = moments_[i];
    double alpha = moments_[1] / moments_[0];
    double beta = 0;
    Polynomial p_before, p, q_before, q;
    q.of[0] = 1;
    for (int nodes = 1; nodes <= most_nodes_; ++nodes) {
      const Polynomial p_next = next(p, p_before, h * alpha, h * h * beta);
      const Polynomial q_next = next(q, q_before, h * alpha, h * h * beta);
      p_before = p;
      q_before = q;
      p = p_next;
      q = q_next;
      if (nodes == 1) p.of[0] = moments_[0];
      if (std::abs(p.at_1() / q.at_1() - sum_at_1_) <= kTolerance * sum_at_1_) return set(form, p, q);
      double after[kMoments] = {};
      for (int i = nodes; i < kMoments - nodes; ++i) after[i] = now[i + 1] - alpha * now[i] - beta * before[i];
      beta = after[nodes] / now[nodes - 1];
      alpha = after[nodes + 1] / after[nodes] - now[nodes] / now[nodes - 1];
      for (int i = 0; i < kMoments; ++i) before[i] = now[i];
      for (int i = 0; i < kMoments; ++i) now[i] = after[i];
    }
  }

  FASTADAM_INLINE static void set(ClosedForm& form, const Polynomial& p, const Polynomial& q) {
    form.exists = true;
    for (int i = 0; i < kMaxNodes; ++i) {
      form.numerator[i] = static_cast<float>(p.of[i]);
      form.denominator[i] = static_cast<float>(q.of[i + 1]);
      form.exists = form.exists && std::isfinite(form.numerator[i]) && std::isfinite(form.denominator[i]);
    }
  }

  double beta_1_;
  double ratio_;  // r
  bool amsgrad_;
  int most_nodes_;
  double shift_[kMoments][kMoments] = {};
  double moments_[kMoments] = {};  // sum of w_j x_j^p
  double sum_at_1_ = 0;
  double keep_ = 1;
  bool is_positive_ = true;
};

}  // namespace fastadam
