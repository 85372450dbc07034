// SPDX-License-Identifier: Apache-2.0
// The extension module fastadam._jax: steps that XLA calls on the CPU.
#include "jax_module.h"

#include "jax_on_host.h"

PyMODINIT_FUNC PyInit__jax() { return fastadam::bind::make_module<fastadam::bind::OnHost>("_jax"); }
