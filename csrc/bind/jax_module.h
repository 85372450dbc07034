// SPDX-License-Identifier: Apache-2.0
// An extension module with the handlers of one Place, for jax.ffi.register_ffi_target. It uses Python's C API: the
// module only returns two addresses, and pybind11 would take longer to compile than the handlers.
#pragma once

#include <Python.h>

#include "jax_handlers.h"

namespace fastadam::bind {

// A Python function without arguments that returns the address of a handler in an unnamed capsule.
template <XLA_FFI_Handler* kHandler>
PyObject* handler_capsule(PyObject* /*module*/, PyObject* /*none*/) {
  return PyCapsule_New(reinterpret_cast<void*>(kHandler), nullptr, nullptr);
}

template <class Place>
XLA_FFI_Error* dense_handler(XLA_FFI_CallFrame* call) {
  static auto* handler = ffi::Ffi::Bind()
                             .Ctx<Place>()
                             .RemainingArgs()
                             .RemainingRets()
                             .template Attr<bool>("amsgrad")
                             .template Attr<bool>("epsilon_corrected")
                             .template Attr<bool>("from_zero")
                             .template Attr<ffi::Span<const int64_t>>("decays")
                             .To(dense_step<Place>)
                             .release();
  return handler->Call(call);
}

template <class Place>
XLA_FFI_Error* sparse_handler(XLA_FFI_CallFrame* call) {
  static auto* handler = ffi::Ffi::Bind()
                             .Ctx<Place>()
                             .RemainingArgs()
                             .RemainingRets()
                             .template Attr<bool>("amsgrad")
                             .template Attr<bool>("epsilon_corrected")
                             .template Attr<bool>("lazy")
                             .template Attr<int64_t>("row_count")
                             .template Attr<ffi::Span<const int64_t>>("axis_sizes")
                             .To(sparse_step<Place>)
                             .release();
  return handler->Call(call);
}

// Multi-phase initialisation of the module (PEP 489).
template <class Place>
PyObject* make_module(const char* name) {
  static PyMethodDef functions[] = {{"dense_handler", handler_capsule<dense_handler<Place>>, METH_NOARGS, nullptr},
                                    {"sparse_handler", handler_capsule<sparse_handler<Place>>, METH_NOARGS, nullptr},
                                    {nullptr, nullptr, 0, nullptr}};
  static PyModuleDef_Slot slots[] = {
#if PY_VERSION_HEX >= 0x030d0000
      {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
      {0, nullptr}};
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, name, nullptr, 0, functions, slots, nullptr, nullptr, nullptr};
  return PyModuleDef_Init(&definition);
}

}  // namespace fastadam::bind
