// SPDX-License-Identifier: Apache-2.0
#include "run.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "../core/split.h"
#include "../core/telemetry.h"
#include "../cpu/launch.h"
#include "norms.h"

namespace fastadam {

namespace {

// Room for what a step reports; writes it to the variables' telemetry at the end.
class Telemetry {
 public:
  explicit Telemetry(const Chains& chains) : chains_(chains) {
    offsets_.push_back(0);
    for (int64_t k = 0; k < chains.count; ++k) {
      const int64_t tiles = head(k).telemetry == nullptr ? 0 : tiles_of(head(k).size);
      offsets_.push_back(offsets_.back() + tiles);
    }
    measures_.resize(static_cast<size_t>(offsets_.back()));
  }

  void add_to(StepArgs& args, double unit) {
    args.telemetry_unit = unit_ = unit;
    args.measures = measures_.data();
    args.measure_offsets = offsets_.data();
  }

  void report(double gradient_scale) {
    for (int64_t k = 0; k < chains_.count; ++k) {
      if (head(k).telemetry == nullptr) continue;
      const int64_t first = offsets_[static_cast<size_t>(k)];
      const int64_t tiles = offsets_[static_cast<size_t>(k) + 1] - first;
      *head(k).telemetry = summed(measures_.data() + first, tiles, head(k).size, gradient_scale, unit_);
    }
  }

 private:
  const TensorArgs& head(int64_t k) const { return chains_.tensors[chains_.heads[k]]; }

  Chains chains_;
  double unit_ = 1;
  std::vector<int64_t> offsets_;
  std::vector<TileMeasure> measures_;
};

template <class Storage>
int64_t count_not_finite(const void* grad, int64_t size) {
  const Storage* elements = static_cast<const Storage*>(grad);
  int64_t count = 0;
  for (int64_t i = 0; i < size; ++i) {
    const Compute<Storage> x = load(elements[i]);
    count += x - x == 0 ? 0 : 1;
  }
  return count;
}

int64_t count_not_finite(const TensorArgs& tensor) {
  constexpr int64_t (*kCounts[kDTypeCount])(const void*, int64_t) = {
      count_not_finite<Float16>, count_not_finite<BFloat16>, count_not_finite<float>, count_not_finite<double>};
  return kCounts[static_cast<int>(tensor.grad_dtype)](tensor.grad, tensor.grad_size);
}

bool has_telemetry(const Chains& chains) {
  return std::any_of(chains.heads, chains.heads + chains.count,
                     [&](int64_t head) { return chains.tensors[head].telemetry != nullptr; });
}

// Reports a step that is not made. Returns false.
bool skip(const Chains& chains, const AdamHyper& hyper) {
  report_skip(chains, hyper);
  return false;
}

}  // namespace

void report_skip(const Chains& chains, const AdamHyper& hyper) {
  for (int64_t k = 0; k < chains.count; ++k) {
    const TensorArgs& tensor = chains.tensors[chains.heads[k]];
    if (tensor.telemetry == nullptr) continue;
    const Norms gradient(&tensor, 1, std::numeric_limits<double>::infinity(), false);
    TensorArgs variable = tensor;
    variable.grad = tensor.var;
    variable.grad_dtype = tensor.dtype;
    const Norms parameter(&variable, 1, std::numeric_limits<double>::infinity(), false);
    fastadam_telemetry& report = *tensor.telemetry;
    report = {};
    report.gradient_norm = gradient.joint() * hyper.gradient_scale;
    if (tensor.size > 0) report.parameter_rms = parameter.joint() / std::sqrt(static_cast<double>(tensor.size));
    report.unchanged = report.size = tensor.size;
    report.not_finite = count_not_finite(tensor);
  }
}

GradientNorms run_norms(const TensorArgs* tensors, int64_t tensor_count, const AdamHyper& hyper) {
  return Norms(tensors, tensor_count, raw_clip_value(hyper), hyper.require_finite);
}

bool run_step(StepArgs args, int64_t tensor_count, const AdamHyper& hyper) {
  std::vector<Factor> factors;
  if (args.factors == nullptr && (clips_norms(hyper) || hyper.require_finite)) {
    const Norms norms(args.chains.tensors, tensor_count, raw_clip_value(hyper), hyper.require_finite);
    if (hyper.require_finite && !norms.all_finite()) return skip(args.chains, hyper);
    if (clips_norms(hyper)) {
      Norms::Clipping clipping = norms.clip(hyper);
      if (hyper.require_finite && !clipping.is_finite) return skip(args.chains, hyper);
      factors = std::move(clipping.factors);
      args.factors = factors.data();
    }
  }
  if (!has_telemetry(args.chains)) {
    cpu::run_step(args);
    return true;
  }
  Telemetry telemetry(args.chains);
  telemetry.add_to(args, telemetry_unit(hyper.learning_rate));
  cpu::run_step(args);
  telemetry.report(hyper.gradient_scale);
  return true;
}

void run_check(const StepArgs& args) { cpu::run_check(args); }

void run_undo(const StepArgs& args, const StepArgs* instead) { cpu::run_undo(args, instead); }

int set_thread_budget(int threads) { return cpu::set_thread_budget(threads); }

void run_catch_up(const StepArgs& args) { cpu::run_step(args); }

bool run_accumulate(const AccumulateArgs& args, int64_t tensor_count, bool require_finite) {
  if (require_finite) {
    const Norms norms(args.chains.tensors, tensor_count, std::numeric_limits<double>::infinity(), true);
    if (!norms.all_finite()) return false;
  }
  cpu::run_accumulate(args);
  return true;
}

void run_sum_rows(const TensorArgs* tensors, int64_t tensor_count, void* const* sums) {
  std::vector<int64_t> offsets{0};
  int64_t value_count = 0;
  for (int64_t i = 0; i < tensor_count; ++i) {
    offsets.push_back(offsets.back());
    if (sums[i] == nullptr) continue;
    offsets.back() += tensors[i].rows->count * tensors[i].rows->width;
    value_count += tensors[i].grad_size;
  }
  cpu::run_sum_rows({tensors, offsets.data(), tensor_count, value_count, sums});
}

}  // namespace fastadam
