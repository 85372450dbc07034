// SPDX-License-Identifier: Apache-2.0
// Entry points of the CUDA backend. Arguments have been checked by the binding; errors of the CUDA runtime are thrown
// as std::runtime_error. Free of CUDA headers: a stream is a cudaStream_t.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "../core/step_args.h"

namespace fastadam::cuda {

// How many devices can be used, and in `reason` why there is none.
int device_count(std::string& reason);

// What norms a step clips, and whether it needs them to be finite (AdamHyper).
struct ClipArgs {
  double clip_norm;
  double global_clip_norm;
  double gradient_scale;
  double raw_clip_value;
  bool require_finite;
};

// The launches of one set of buffers on the current device, whose tables are made once. Everything runs on the stream
// that is given; nothing waits, but for the constructor, and for a step that has to find its gradients finite.
class Launch {
 public:
  // `chains` without IndexedSlices.
  Launch(const std::vector<TensorArgs>& tensors, const Chains& chains, void* stream);
  ~Launch();
  Launch(const Launch&) = delete;
  Launch& operator=(const Launch&) = delete;

  // False, and nothing done, if the gradients had to be finite and are not. `tensors`: those of the constructor with
  // the gradients of this step.
  bool step(const StepArgs& step, const std::vector<TensorArgs>& tensors, const ClipArgs& clip, void* stream);

 private:
  struct Tables;
  std::unique_ptr<Tables> tables_;
};

}  // namespace fastadam::cuda
