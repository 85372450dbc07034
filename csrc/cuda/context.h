// SPDX-License-Identifier: Apache-2.0
// The parts of a Context, for the sources of this folder. Included by .cu files only.
#pragma once

#include "launch.h"
#include "runtime.h"

namespace fastadam::cuda {

// The powers of both betas in one arithmetic, on the device.
template <class T>
struct PowerTables {
  DeviceArray<T> of_1, of_2;

  void make(const AdamHyper& hyper, cudaStream_t stream);
  Powers<T> get() const { return {of_1.get(), of_2.get(), of_1.count()}; }
};

struct Context::Parts {
  DeviceArray<StepState> state{1};
  HostReport report;
  cudaEvent_t left = nullptr;     // recorded behind the work of a stream
  cudaStream_t stream = nullptr;  // that was entered last
  cudaStream_t last = nullptr;    // likewise, not to capture
  bool is_fresh = true;
  bool is_capturing = false;
  bool is_captured = false;
  PowerTables<float> singles;
  PowerTables<double> doubles;
  double beta_1 = 0;  // of the tables
  double beta_2 = 0;
  bool has_powers = false;

  // At the first step: in a capture there is no memory to be had.
  void make_powers(const AdamHyper& hyper);
  bool has_powers_for(const AdamHyper& hyper, bool singles_too, bool doubles_too) const;
  void require_powers(const AdamHyper& hyper, bool singles_too, bool doubles_too) const;

 private:
  bool have_tables(bool singles_too, bool doubles_too) const;
};

}  // namespace fastadam::cuda
