// SPDX-License-Identifier: Apache-2.0
// The extension module fastadam._jax_cuda: steps that XLA calls on CUDA devices.
#include "jax_module.h"
#include "jax_on_device.h"

PYBIND11_MODULE(_jax_cuda, m, pybind11::mod_gil_not_used()) {
  fastadam::bind::define_handlers<fastadam::bind::OnDevice>(m);
}
