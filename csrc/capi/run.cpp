// SPDX-License-Identifier: Apache-2.0
#include "run.h"

#include <limits>
#include <utility>
#include <vector>

#include "../cpu/launch.h"
#include "norms.h"

namespace fastadam {

GradientNorms run_norms(const TensorArgs* tensors, int64_t tensor_count, const AdamHyper& hyper) {
  return Norms(tensors, tensor_count, raw_clip_value(hyper), hyper.require_finite);
}

bool run_step(StepArgs args, int64_t tensor_count, const AdamHyper& hyper) {
  std::vector<double> factors;
  if (args.factors == nullptr && (clips_norms(hyper) || hyper.require_finite)) {
    const Norms norms(args.chains.tensors, tensor_count, raw_clip_value(hyper), hyper.require_finite);
    if (hyper.require_finite && !norms.all_finite()) return false;
    if (clips_norms(hyper)) {
      Norms::Clipping clipping = norms.clip(hyper);
      if (hyper.require_finite && !clipping.is_finite) return false;
      factors = std::move(clipping.factors);
      args.factors = factors.data();
    }
  }
  cpu::run_step(args);
  return true;
}

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
