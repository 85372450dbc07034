// SPDX-License-Identifier: Apache-2.0
// The functions of an extension module with the handlers of one place.
#pragma once

#include <pybind11/pybind11.h>

#include "jax_handlers.h"

namespace fastadam::bind {

template <class Place>
void define_handlers(pybind11::module_& m) {
  XLA_FFI_DEFINE_HANDLER(dense_handler, dense_step<Place>,
                         ffi::Ffi::Bind()
                             .Ctx<Place>()
                             .RemainingArgs()
                             .RemainingRets()
                             .template Attr<bool>("amsgrad")
                             .template Attr<bool>("epsilon_corrected")
                             .template Attr<bool>("from_zero")
                             .template Attr<ffi::Span<const int64_t>>("decays"));
  XLA_FFI_DEFINE_HANDLER(sparse_handler, sparse_step<Place>,
                         ffi::Ffi::Bind()
                             .Ctx<Place>()
                             .RemainingArgs()
                             .RemainingRets()
                             .template Attr<bool>("amsgrad")
                             .template Attr<bool>("epsilon_corrected")
                             .template Attr<bool>("lazy")
                             .template Attr<int64_t>("row_count")
                             .template Attr<ffi::Span<const int64_t>>("axis_sizes"));
  // For jax.ffi.register_ffi_target.
  m.def("dense_handler", [] { return pybind11::capsule(reinterpret_cast<void*>(dense_handler)); });
  m.def("sparse_handler", [] { return pybind11::capsule(reinterpret_cast<void*>(sparse_handler)); });
}

}  // namespace fastadam::bind
