// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstddef>

#include "chunks.h"
#include "context.h"

namespace fastadam::cuda {

template <class T>
void PowerTables<T>::make(const AdamHyper& hyper, cudaStream_t stream) {
  std::vector<T> powers_1 = powers_of<T>(hyper.beta_1);
  std::vector<T> powers_2 = powers_of<T>(hyper.beta_2);
  if (powers_1.empty() || powers_2.empty()) return;
  const size_t count = std::max(powers_1.size(), powers_2.size());
  powers_1.resize(count);
  powers_2.resize(count);
  of_1 = DeviceArray<T>(powers_1, stream);
  of_2 = DeviceArray<T>(powers_2, stream);
}

void Context::Parts::make_powers(const AdamHyper& hyper) {
  if (is_capturing) throw std::runtime_error("the first step cannot be captured; make a step before the capture");
  beta_1 = hyper.beta_1;
  beta_2 = hyper.beta_2;
  powers_f32.make(hyper, stream);
  powers_f64.make(hyper, stream);
  has_powers = true;
}

bool Context::Parts::have_tables(bool needs_f32, bool needs_f64) const {
  return (!needs_f32 || powers_f32.get().count > 0) && (!needs_f64 || powers_f64.get().count > 0);
}

bool Context::Parts::has_powers_for(const AdamHyper& hyper, bool needs_f32, bool needs_f64) const {
  return have_tables(needs_f32, needs_f64) && hyper.beta_1 == beta_1 && hyper.beta_2 == beta_2;
}

void Context::Parts::require_powers(const AdamHyper& hyper, bool needs_f32, bool needs_f64) const {
  if (has_powers_for(hyper, needs_f32, needs_f64)) return;
  throw std::runtime_error(have_tables(needs_f32, needs_f64)
                               ? "a beta has changed since the first step, expected constant betas if a step is "
                                 "captured or learning_rate is on the GPU"
                               : "a beta is too close to 1 for a step that is captured or whose learning_rate is on "
                                 "the GPU");
}

Context::Context() : parts_(std::make_unique<Parts>()) {
  check(cudaEventCreateWithFlags(&parts_->left, cudaEventDisableTiming));
}

Context::~Context() { static_cast<void>(cudaEventDestroy(parts_->left)); }

void Context::enter(void* on_stream) {
  Parts& p = *parts_;
  const auto stream = static_cast<cudaStream_t>(on_stream);
  p.is_capturing = cuda::is_capturing(stream);
  if (p.is_fresh) {
    if (p.is_capturing) throw std::runtime_error("the first step cannot be captured; make a step before the capture");
    check(cudaMemsetAsync(p.state.get(), 0, sizeof(StepState), stream));
  } else if (!p.is_capturing) {
    check(cudaStreamWaitEvent(stream, p.left, 0));  // on the same stream, too: it may be a new one at an old address
  }
  p.is_fresh = false;
  p.stream = stream;
}

void Context::leave() {
  if (!parts_->is_capturing) static_cast<void>(cudaEventRecord(parts_->left, parts_->stream));
}

void* Context::stream() const { return parts_->stream; }

bool Context::is_capturing() const { return parts_->is_capturing; }

void Context::wait() { check(cudaDeviceSynchronize()); }

bool Context::has_failed() const { return parts_->report.get()->failed != 0; }

std::optional<Failure> Context::take_failure() {
  const std::lock_guard lock(parts_->taking);
  volatile Report& report = *parts_->report.get();
  if (report.failed == 0) return std::nullopt;
  const Failure failure{report.call, report.source, report.position, report.index};
  wait();  // for later steps, which do nothing
  static_assert(offsetof(StepState, is_reported) == offsetof(StepState, failed) + sizeof(bool),
                "one memset clears both");
  check(cudaMemsetAsync(&parts_->state.get()->failed, 0, 2 * sizeof(bool), nullptr));
  wait();
  report.failed = 0;
  return failure;
}

bool Context::is_captured() const { return parts_->is_captured; }

int64_t Context::step() {
  wait();  // for the whole device: graphs run on any stream
  int64_t step = 0;
  check(cudaMemcpy(&step, &parts_->state.get()->step, sizeof(step), cudaMemcpyDeviceToHost));
  return step;
}

}  // namespace fastadam::cuda
