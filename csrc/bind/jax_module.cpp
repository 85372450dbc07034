// SPDX-License-Identifier: Apache-2.0
// The extension module fastadam._jax: the handlers, for jax.ffi.register_ffi_target.
#include <pybind11/pybind11.h>

#include "jax_handlers.h"

namespace {

namespace py = pybind11;
namespace ffi = xla::ffi;

XLA_FFI_DEFINE_HANDLER(dense_handler, fastadam::bind::dense_step,
                       ffi::Ffi::Bind()
                           .RemainingArgs()
                           .RemainingRets()
                           .Attr<bool>("amsgrad")
                           .Attr<bool>("epsilon_corrected")
                           .Attr<bool>("from_zero")
                           .Attr<ffi::Span<const int64_t>>("decays"));

XLA_FFI_DEFINE_HANDLER(sparse_handler, fastadam::bind::sparse_step,
                       ffi::Ffi::Bind()
                           .RemainingArgs()
                           .RemainingRets()
                           .Attr<bool>("amsgrad")
                           .Attr<bool>("epsilon_corrected")
                           .Attr<bool>("lazy")
                           .Attr<int64_t>("row_count")
                           .Attr<ffi::Span<const int64_t>>("axis_sizes"));

py::capsule capsule_of(XLA_FFI_Handler* handler) { return py::capsule(reinterpret_cast<void*>(handler)); }

}  // namespace

PYBIND11_MODULE(_jax, m, py::mod_gil_not_used()) {
  m.def("dense_handler", [] { return capsule_of(dense_handler); });
  m.def("sparse_handler", [] { return capsule_of(sparse_handler); });
}
