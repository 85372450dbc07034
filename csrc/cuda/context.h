// SPDX-License-Identifier: Apache-2.0
// The internals of a Context, for the .cu files of this folder only.
#pragma once

#include <algorithm>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <utility>
#include <vector>

#include "launch.h"
#include "runtime.h"

namespace fastadam::cuda {

// The powers of both betas in one type, in device memory.
template <class T>
struct PowerTables {
  DeviceArray<T> of_1, of_2;

  void make(const AdamHyper& hyper, cudaStream_t stream);
  Powers<T> get() const { return {of_1.get(), of_2.get(), of_1.count()}; }
};

struct Context::Parts {
  DeviceArray<StepState> state{1};
  HostReport report;
  cudaEvent_t left = nullptr;     // recorded after the work of each call
  cudaStream_t stream = nullptr;  // the stream of the current or last call
  bool is_fresh = true;
  bool is_capturing = false;
  bool is_captured = false;
  PowerTables<float> powers_f32;
  PowerTables<double> powers_f64;
  double beta_1 = 0;  // the betas of the tables
  double beta_2 = 0;
  bool has_powers = false;
  std::mutex taking;                           // the failure: of several threads one reports it
  std::vector<std::shared_ptr<void>> retired;  // what was replaced and a captured graph may still use

  // Returns memory for `count` elements, like the function of this name. In a capture it must be there already.
  template <class T>
  T* room_for(DeviceArray<T>& memory, int64_t count) {
    if (memory.count() >= count) return memory.get();
    if (is_capturing) {
      throw std::runtime_error(
          "a captured step needs more memory than any step before the capture; make a step with as many indices first");
    }
    auto replaced = std::make_unique<DeviceArray<T>>(std::max(count, 2 * memory.count()));
    std::swap(*replaced, memory);
    retire(std::move(replaced));
    return memory.get();
  }

  template <class T>
  void retire(std::unique_ptr<T> replaced) {
    if (is_captured && replaced != nullptr) retired.push_back(std::move(replaced));
  }

  // Called at the first step, because a capture cannot allocate memory.
  void make_powers(const AdamHyper& hyper);
  bool has_powers_for(const AdamHyper& hyper, bool needs_f32, bool needs_f64) const;
  void require_powers(const AdamHyper& hyper, bool needs_f32, bool needs_f64) const;

 private:
  bool have_tables(bool needs_f32, bool needs_f64) const;
};

}  // namespace fastadam::cuda
