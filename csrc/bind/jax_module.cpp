// SPDX-License-Identifier: Apache-2.0
// The extension module fastadam._jax: steps that XLA calls on the CPU.
#include "jax_module.h"

#include "jax_on_host.h"

PYBIND11_MODULE(_jax, m, pybind11::mod_gil_not_used()) { fastadam::bind::define_handlers<fastadam::bind::OnHost>(m); }
