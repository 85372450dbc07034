// SPDX-License-Identifier: Apache-2.0
// The extension module fastadam._jax_cuda: steps that XLA calls on CUDA devices.
#include "jax_module.h"
#include "jax_on_device.h"

PyMODINIT_FUNC PyInit__jax_cuda() { return fastadam::bind::make_module<fastadam::bind::OnDevice>("_jax_cuda"); }
