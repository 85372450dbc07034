// SPDX-License-Identifier: Apache-2.0
// Reads tensors through the C functions of their library (dlpack.h), which is faster than through the Python methods of
// DLPack. Capsules are made only of tensors in CPU memory; read_array() reads all others.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "buffer.h"
#include "dlpack.h"

namespace fastadam::bind {

constexpr const char* kExchangeApi = "__dlpack_c_exchange_api__";

inline const dlpack::ExchangeApi* find_exchange_api(PyTypeObject* type) {
  const py::object capsule = py::getattr(reinterpret_cast<PyObject*>(type), kExchangeApi, py::none());
  if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return nullptr;
  const auto* api = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  while (api != nullptr && api->version.major != dlpack::kMajorVersion) api = api->previous;
  return api != nullptr && api->tensor_from_object != nullptr ? api : nullptr;
}

// Null if the type does not support it.
inline const dlpack::ExchangeApi* exchange_api_of(py::handle object) {
  constexpr size_t kMostTypes = 16;
  static thread_local std::vector<std::pair<PyTypeObject*, const dlpack::ExchangeApi*>> cache;
  PyTypeObject* type = Py_TYPE(object.ptr());
  for (const auto& [cached_type, api] : cache) {
    if (cached_type == type) return api;
  }
  const dlpack::ExchangeApi* api = find_exchange_api(type);
  if (cache.size() < kMostTypes) {
    Py_INCREF(type);  // otherwise another type could get its address
    cache.emplace_back(type, api);
  }
  return api;
}

// Whether the memory contains the negated values (torch's lazy negation). DLPack has no flag for this.
inline bool is_negated(py::handle object) {
  static const py::handle name = py::str("is_neg").release();
  const auto negated = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(object.ptr(), name.ptr()));
  if (!negated) PyErr_Clear();  // not a torch tensor
  return negated.ptr() == Py_True;
}

// Whether the type itself has the functions: a class derived from it may have a `__dlpack__` of its own.
inline bool has_own_exchange_api(py::handle object) {
  static const py::handle name = PyUnicode_InternFromString(kExchangeApi);
  const PyTypeObject* type = Py_TYPE(object.ptr());
  return type->tp_dict != nullptr && PyDict_Contains(type->tp_dict, name.ptr()) == 1;
}

// A capsule that owns the memory of a tensor in CPU memory, as its `__dlpack__` makes it. Null for any other object,
// for a tensor that requires gradients or is negated, and where only `__dlpack__` can say what is wrong.
inline py::object exported_on_host(py::handle object) {
  static const py::handle requires_grad = PyUnicode_InternFromString("requires_grad");
  const dlpack::ExchangeApi* api = exchange_api_of(object);
  if (api == nullptr || api->managed_tensor_from_object == nullptr || !has_own_exchange_api(object)) return {};
  dlpack::DLTensor t{};
  const bool is_read = api->tensor_from_object(object.ptr(), &t) == 0;
  if (!is_read || t.device.device_type != dlpack::kDLCPU || t.dtype.code > dlpack::kDLBfloat) {
    PyErr_Clear();  // for example a sparse tensor; complex ones may be conjugated
    return {};
  }
  const auto is_traced = py::reinterpret_steal<py::object>(PyObject_GetAttr(object.ptr(), requires_grad.ptr()));
  if (!is_traced) PyErr_Clear();
  if ((is_traced && is_traced.ptr() != Py_False) || is_negated(object)) return {};
  dlpack::DLManagedTensorVersioned* managed = nullptr;
  if (api->managed_tensor_from_object(object.ptr(), &managed) != 0) {
    PyErr_Clear();
    return {};
  }
  const auto destroy = [](PyObject* capsule) {
    void* const held = PyCapsule_GetPointer(capsule, "dltensor_versioned");
    auto* const tensor = static_cast<dlpack::DLManagedTensorVersioned*>(held);
    if (tensor->deleter != nullptr) tensor->deleter(tensor);
  };
  PyObject* const capsule = PyCapsule_New(managed, "dltensor_versioned", destroy);
  if (capsule == nullptr) {
    if (managed->deleter != nullptr) managed->deleter(managed);
    throw py::error_already_set();
  }
  return py::reinterpret_steal<py::object>(capsule);
}

// Unlike the strides of a Buffer, DLPack's strides are in elements.
inline bool contiguous(const dlpack::DLTensor& t, bool fortran) {
  int64_t expected = 1;
  for (int32_t step = 0; step < t.ndim; ++step) {
    const int32_t axis = fortran ? step : t.ndim - 1 - step;
    if (t.shape[axis] != 1 && t.strides[axis] != expected) return false;
    expected *= t.shape[axis];
  }
  return true;
}

// The address of a tensor on the device of `b` and with its dtype, shape and layout. Null for any other object and for
// an empty tensor.
inline void* tensor_address_if_like(py::handle object, const Buffer& b) {
  const dlpack::ExchangeApi* api = exchange_api_of(object);
  if (api == nullptr) return nullptr;
  dlpack::DLTensor t{};
  if (api->tensor_from_object(object.ptr(), &t) != 0) {
    PyErr_Clear();  // for example a sparse tensor
    return nullptr;
  }
  const bool same_device = b.gpu ? t.device.device_type == dlpack::kDLCUDA && t.device.device_id == b.gpu->device
                                 : t.device.device_type == dlpack::kDLCPU;
  const bool same_type = t.dtype.lanes == 1 && t.dtype.code == b.type_code && t.dtype.bits == 8 * b.item_size;
  if (!same_device || !same_type || static_cast<size_t>(t.ndim) != b.shape.size()) return nullptr;
  if (!std::equal(b.shape.begin(), b.shape.end(), t.shape)) return nullptr;
  const bool same_layout = t.strides == nullptr
                               ? b.c_contiguous
                               : (b.c_contiguous && contiguous(t, false)) || (b.f_contiguous && contiguous(t, true));
  char* address = static_cast<char*>(t.data) + t.byte_offset;
  if (!same_layout || reinterpret_cast<uintptr_t>(address) % static_cast<uintptr_t>(b.item_size) != 0) return nullptr;
  return t.data == nullptr ? nullptr : address;
}

}  // namespace fastadam::bind
