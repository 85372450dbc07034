// SPDX-License-Identifier: Apache-2.0
// Checks closed forms of missed steps (core/closed_form.h) against the plain sum in long double, the cache of forms
// (bind/closed_forms.h) against the same sum, and the kernels of every usable instruction set against a scalar loop.
// Prints a line per check. Its argument is a Scope.
#include <string>
#include <vector>

#include "../../csrc/bind/closed_forms.h"
#include "../../csrc/core/closed_form.h"
#include "harness.h"
#include "row_reference.h"

namespace {

using namespace kernel_test;

struct Steps {
  std::vector<float> alphas, keeps, peaks;

  void add(float alpha, float keep) {
    if (alphas.size() % kPeakSteps == 0) peaks.push_back(0);
    peaks.back() = std::max(peaks.back(), std::fabs(alpha));
    alphas.push_back(alpha);
    keeps.push_back(keep);
  }
  int64_t count() const { return static_cast<int64_t>(alphas.size()); }
  StaleRows view() const { return {alphas.data(), keeps.data(), peaks.data(), nullptr, count(), 1, false}; }
};

enum class Rates { kConstant, kWarmUp, kRestart, kZeros };

Steps steps_of(Rates rates, int64_t count, bool decays) {
  Steps steps;
  for (int64_t i = 0; i < count; ++i) {
    float alpha = 0.001f;
    if (rates == Rates::kWarmUp) alpha = static_cast<float>(i) * 1e-5f;
    if (rates == Rates::kRestart) alpha = i % 50 < 45 ? 1e-6f : 0.01f;
    if (rates == Rates::kZeros) alpha = i % 3 == 0 ? 0.f : 0.01f;
    steps.add(alpha, decays ? 1 - alpha : 1.f);
  }
  return steps;
}

// The sum of the steps [from, now) for s + epsilon = 1, epsilon = y and a first moment of 1.
long double plain_sum(const Steps& steps, int64_t from, double beta_1, double beta_2, double y, bool amsgrad) {
  long double sum = 0;
  long double m = 1;
  long double root = 1 - static_cast<long double>(y);
  for (int64_t step = from; step < steps.count(); ++step) {
    m *= beta_1;
    if (!amsgrad) root *= std::sqrt(static_cast<long double>(beta_2));
    sum = sum * steps.keeps[static_cast<size_t>(step)] + steps.alphas[static_cast<size_t>(step)] * m / (root + y);
  }
  return sum;
}

double value_of(const ClosedForm& form, double y) {
  double p = 0;
  double q = 0;
  for (int i = kMaxNodes - 1; i >= 0; --i) {
    p = p * y + static_cast<double>(form.numerator[i]);
    q = (q + static_cast<double>(form.denominator[i])) * y;
  }
  return p / (1 + q);
}

// The largest error relative to the sum: the rule's 2^-26 and the rounding of its coefficients to float.
double error_of(const ClosedForm& form, const Steps& steps, int64_t from, double beta_1, double beta_2, bool amsgrad) {
  double worst = 0;
  for (int i = 0; i <= 16; ++i) {
    const double y = std::pow(i / 16.0, 4);
    const long double sum = plain_sum(steps, from, beta_1, beta_2, y, amsgrad);
    const auto error = static_cast<double>(std::fabs(value_of(form, y) - sum));
    worst = std::max(worst, error == 0 ? 0 : error / static_cast<double>(sum));
  }
  return worst;
}
constexpr double kErrorLimit = 0x1p-26 + 0x1p-23;

ClosedForm form_of(const Steps& steps, int64_t from, double beta_1, double beta_2, bool amsgrad) {
  StepMeasure measure(beta_1, beta_2, amsgrad);
  for (int64_t step = steps.count() - 1; step >= from; --step) {
    measure.prepend(steps.alphas[static_cast<size_t>(step)], steps.keeps[static_cast<size_t>(step)]);
  }
  return measure.closed_form();
}

int nodes_of(const ClosedForm& form) {
  int nodes = 0;
  for (int i = 0; i < kMaxNodes; ++i) nodes = form.denominator[i] != 0 ? i + 1 : nodes;
  return nodes;
}

void check_rules() {
  Claims claims;
  for (const double beta_1 : {0.0, 0.5, 0.9, 0.95, 0.99}) {
    for (const double beta_2 : {0.5, 0.95, 0.99, 0.999, 0.9999}) {
      for (const Rates rates : {Rates::kConstant, Rates::kWarmUp, Rates::kRestart, Rates::kZeros}) {
        for (const int64_t gap : {1, 2, 3, 4, 5, 8, 30, 100, 400, 3000}) {
          for (const bool decays : {false, true}) {
            const Steps steps = steps_of(rates, gap, decays);
            for (const bool amsgrad : {false, true}) {
              const ClosedForm form = form_of(steps, 0, beta_1, beta_2, amsgrad);
              const double error = form.exists ? error_of(form, steps, 0, beta_1, beta_2, amsgrad) : 0;
              claims.note("a rule that exists has an error of at most 2^-26 for every epsilon", error <= kErrorLimit);
              claims.note("AMSGrad always has a rule", form.exists || !amsgrad);
              claims.note("a gap of up to four steps always has a rule", form.exists || gap > kMaxNodes);
              claims.note("beta_1 up to 0.95 with beta_2 from 0.999 always has a rule",
                          form.exists || beta_1 > 0.95 || beta_2 < 0.999);
            }
          }
        }
      }
    }
  }
  const Steps steps = steps_of(Rates::kConstant, 1000, false);
  report(nodes_of(form_of(steps, 0, 0.9, 0.9999, false)) == 2, "0.9 and 0.9999 need two nodes");
  report(nodes_of(form_of(steps, 0, 0.9, 0.999, false)) == 2, "0.9 and 0.999 need two nodes");
  report(nodes_of(form_of(steps, 0, 0.95, 0.999, false)) == 3, "0.95 and 0.999 need three nodes");
  report(!form_of(steps, 0, 0.9, 0.95, false).exists, "0.9 and 0.95 have no rule for long gaps");
  const auto reaches = [](double beta_2, int64_t gap) {
    return form_of(steps_of(Rates::kConstant, gap, false), 0, 0.9, beta_2, false).exists;
  };
  report(reaches(0.99, 120) && !reaches(0.99, 130),
         "0.9 and 0.99 have a rule for gaps up to 120, and not much further");
  report(reaches(0.95, 16) && !reaches(0.95, 18), "0.9 and 0.95 have a rule for gaps up to 16");
  Steps negative = steps_of(Rates::kConstant, 30, false);
  negative.add(-0.001f, 1);
  negative.add(0.001f, 1);
  report(!form_of(negative, 0, 0.9, 0.999, false).exists, "a gap with a negative rate has no rule");
  report(form_of(negative, 31, 0.9, 0.999, false).exists, "the steps after a negative rate have a rule");
}

// Uses the cache at many times of one history, for gaps of all lengths.
void check_cache(double beta_1, double beta_2, bool amsgrad, bool decays, Claims& claims) {
  bind::ClosedForms cache;
  AdamHyper hyper{};
  hyper.beta_1 = beta_1;
  hyper.beta_2 = beta_2;
  const auto single_1 = static_cast<float>(beta_1);
  const auto single_2 = static_cast<float>(beta_2);
  const Steps all = steps_of(Rates::kRestart, 3000, decays);
  Random random{3};
  Steps steps;
  for (int64_t now = 0; now < all.count(); ++now) {
    steps.add(all.alphas[static_cast<size_t>(now)], all.keeps[static_cast<size_t>(now)]);
    if (now % 371 != 0) continue;
    std::vector<int32_t> from{0, 0, static_cast<int32_t>(now)};
    for (int i = 0; i < 40; ++i) from.push_back(static_cast<int32_t>(random.below(static_cast<uint32_t>(now + 1))));
    cache.prepare(from.data(), static_cast<int64_t>(from.size()), steps.view(), hyper, amsgrad);
    for (const int32_t first : from) {
      const int64_t gap = steps.count() - first;
      if (gap <= kShortGap) continue;
      const ClosedForm& form = cache.forms()[cache.places()[first]];
      const double error = form.exists ? error_of(form, steps, first, single_1, single_2, amsgrad) : 0;
      claims.note("cache: forms have an error of at most 2^-26 for every epsilon", error <= kErrorLimit + 0x1p-24);
      claims.note("cache: every gap has a form", form.exists);
      const auto power = [gap](float beta) { return std::pow(static_cast<double>(beta), static_cast<double>(gap)); };
      const bool moments = form.m_factor == power(single_1) && form.v_factor == power(single_2);
      claims.note("cache: moments decay by the power of the float32 beta", moments);
      double keep = 1;
      for (int64_t step = first; step < steps.count(); ++step) keep *= steps.keeps[static_cast<size_t>(step)];
      claims.note("cache: keep is the weight decay of all steps", std::fabs(form.keep / keep - 1) < 0x1p-40);
    }
  }
  cache.clear();
  const Steps other = steps_of(Rates::kConstant, 2000, false);
  const int32_t first = 0;
  cache.prepare(&first, 1, other.view(), hyper, amsgrad);
  const double error = error_of(cache.forms()[cache.places()[0]], other, 0, single_1, single_2, amsgrad);
  claims.note("cache: clear() forgets the earlier history", error <= kErrorLimit + 0x1p-24);
}

void check_odd_steps() {
  bind::ClosedForms cache;
  AdamHyper hyper{};
  hyper.beta_1 = 0.9;
  hyper.beta_2 = 0.999;
  Steps steps;
  for (int i = 0; i < 900; ++i) steps.add(1e-30f, 1);
  const int32_t first = 0;
  cache.prepare(&first, 1, steps.view(), hyper, false);
  report(cache.forms()[cache.places()[0]].exists, "a long gap has a form");
  steps.add(1, 1);
  cache.prepare(&first, 1, steps.view(), hyper, false);
  report(!cache.forms()[cache.places()[0]].exists, "a long gap has no form if a later rate outweighs its first steps");
  bind::ClosedForms other;
  Steps odd;
  odd.add(0.001f, -0.5f);
  for (int i = 0; i < 900; ++i) odd.add(0.001f, 0.999f);
  const int32_t both[] = {0, 1};
  other.prepare(both, 2, odd.view(), hyper, false);
  report(!other.forms()[other.places()[0]].exists, "a long gap has no form if a variable changes its sign");
  report(other.forms()[other.places()[1]].exists, "a gap that starts after the change of sign has a form");
}

template <class T>
__attribute__((noinline)) void jump(const TensorArgs& tensor, const ClosedForm& form, const StepScalars<T>& s) {
  const DType state = state_dtype(tensor.dtype);
  for (int64_t i = 0; i < tensor.size; ++i) {
    const T m = static_cast<T>(read(tensor.m, state, i));
    const T v = static_cast<T>(read(tensor.v, state, i));
    T second = v;
    if (tensor.vhat != nullptr) {
      second = static_cast<T>(read(tensor.vhat, state, i)) + T(0);
      if (v * s.beta_2 > second) second = v * s.beta_2;
      write(tensor.vhat, state, i, static_cast<double>(second));
    }
    const T divisor = std::sqrt(second) + s.epsilon;
    const T y = s.epsilon / divisor;
    const float* a = form.numerator;
    const float* b = form.denominator;
    const T p = ((a[3] * y + a[2]) * y + a[1]) * y + a[0];
    const T q = (((b[3] * y + b[2]) * y + b[1]) * y + b[0]) * y + T(1);
    const T var = static_cast<T>(read(tensor.var, tensor.dtype, i));
    const T change = m / (divisor * q) * p;
    const auto moved = static_cast<T>(static_cast<double>(var) * form.keep - static_cast<double>(change));
    write(tensor.var, tensor.dtype, i, static_cast<double>(moved));
    write(tensor.m, state, i, static_cast<double>(static_cast<T>(static_cast<double>(m) * form.m_factor)));
    write(tensor.v, state, i, static_cast<double>(static_cast<T>(static_cast<double>(v) * form.v_factor)));
  }
}

// One row whose gap has a form, for the three dtypes with float32 moments.
void check_kernels() {
  Claims claims;
  const Steps steps = steps_of(Rates::kWarmUp, 90, true);
  const int32_t from = 0;
  const int32_t place = 0;
  for (const DType dtype : {FASTADAM_FLOAT16, FASTADAM_BFLOAT16, FASTADAM_FLOAT32}) {
    for (const bool amsgrad : {false, true}) {
      ClosedForm form = form_of(steps, 0, 0.95, 0.999, amsgrad);
      form.m_factor = 0.1;
      form.v_factor = 0.9;
      StaleRows stale = steps.view();
      const Variable initial(dtype, 777);
      stale.width = initial.size;
      stale.from = &from;
      stale.forms = &form;
      stale.places = &place;
      const Variable expected(initial, 0);
      in_compute_type(FASTADAM_FLOAT32, [&](auto zero) {
        if constexpr (sizeof(zero) == 4) jump(expected.args(0, amsgrad), form, scalars<float>(0));
      });
      for_each_isa([&](const cpu::Isa& isa) {
        const Variable table(initial, 3);
        TensorArgs tensor = table.args(0, amsgrad);
        tensor.grad = nullptr;
        tensor.stale = &stale;
        const FlushDenormals flush;
        isa.kernels->touched_rows[static_cast<int>(dtype)](step_of(0, amsgrad, false), tensor, 0, table.size);
        claims.note(isa.name + std::string(": a row jumps as in the scalar loop"), table == expected);
      });
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  read_scope(argc, argv);
  if (scope != Scope::kEmulated) {  // these checks run no kernels
    check_rules();
    check_odd_steps();
    Claims claims;
    for (const bool decays : {false, true}) {
      check_cache(0.9, 0.999, false, decays, claims);
      check_cache(0.9, 0.999, true, decays, claims);
      check_cache(0.0, 0.999, false, decays, claims);
    }
  }
  check_kernels();
  return failures == 0 ? 0 : 1;
}
