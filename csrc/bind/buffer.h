// SPDX-License-Identifier: Apache-2.0
// Buffer: the memory of one array. It never copies the memory, and it keeps the owner alive. Also the checks and error
// texts that concern a single array.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <functional>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include "../core/dtypes.h"

namespace fastadam::bind {

namespace py = pybind11;

// The argument that an error text names: "vars[3]", "variable 'w'" or "grad of variable 'w'". The text is built only if
// there is an error.
struct Label {
  std::string text;
  int64_t position = -1;
  const std::string* owner = nullptr;  // has to outlive this
  std::string operator()() const {
    if (owner != nullptr) return text + " of " + *owner;
    return position < 0 ? text : text + "[" + std::to_string(position) + "]";
  }
};

// The additional fields of a Buffer on a GPU, which device_buffers.h sets.
struct OnGpu {
  int device = 0;                   // number of the CUDA device
  std::optional<uintptr_t> stream;  // the stream on which the owner uses the memory
  py::object source;                // the array, which is asked for its stream at each call
  py::object signature;             // everything about the array except its address and stream
  PyTypeObject* source_type = nullptr;
  bool is_torch = false;
  bool address_is_fixed = false;  // the array never reallocates
};

struct Buffer {
  // The fields that every step compares come first, so that they share few cache lines.
  void* data = nullptr;
  py::object owner;
  PyTypeObject* ndarray_type = nullptr;  // numpy.ndarray if the owner is of exactly this type, otherwise null
  py::object numpy_dtype;                // its dtype object, which NumPy shares among arrays of one dtype
  std::vector<int64_t> shape;
  int64_t size = 1;
  int64_t item_size = 0;
  std::optional<DType> dtype;  // empty if it is not a fastadam_dtype
  uint8_t type_code = 0;       // DLPack's, of numbers
  bool writable = false;
  bool native_order = true;
  bool c_contiguous = false;
  bool f_contiguous = false;
  std::optional<OnGpu> gpu;      // empty: CPU memory
  std::vector<int64_t> strides;  // bytes
  std::string label;             // the argument in error texts: "vars[3]" or "variable 'w'"
  std::string dtype_name;

  static constexpr int kHost = -1;

  bool on_host() const { return !gpu; }
  int device() const { return gpu ? gpu->device : kHost; }
  std::optional<uintptr_t> stream() const { return gpu ? gpu->stream : std::nullopt; }
  uintptr_t begin() const { return reinterpret_cast<uintptr_t>(data); }
  uintptr_t end() const { return begin() + static_cast<uintptr_t>(size * item_size); }
  bool aligned() const { return begin() % static_cast<uintptr_t>(item_size) == 0; }
  const char* order() const { return c_contiguous ? "C" : f_contiguous ? "F" : "K"; }
  bool same_layout(const Buffer& other) const {
    return (c_contiguous && other.c_contiguous) || (f_contiguous && other.f_contiguous);
  }
  bool same_memory(const Buffer& other) const {
    return data == other.data && dtype == other.dtype && shape == other.shape && same_layout(other);
  }
};

inline std::string text(py::handle object) { return py::cast<std::string>(py::str(object)); }

inline std::string type_name(py::handle object) { return text(py::type::handle_of(object).attr("__name__")); }

inline std::string tuple_text(const std::vector<int64_t>& values) { return text(py::tuple(py::cast(values))); }

inline const char* name_of(DType dtype) {
  constexpr const char* kNames[kDTypeCount] = {"float16", "bfloat16", "float32", "float64"};
  return kNames[static_cast<int>(dtype)];
}

inline bool contiguous(const Buffer& b, bool fortran) {
  int64_t expected = b.item_size;
  const auto rank = static_cast<int64_t>(b.shape.size());
  for (int64_t step = 0; step < rank; ++step) {
    const auto axis = static_cast<size_t>(fortran ? step : rank - 1 - step);
    if (b.shape[axis] != 1 && b.strides[axis] != expected) return false;
    expected *= b.shape[axis];
  }
  return true;
}

inline void derive_layout(Buffer& b) {
  for (int64_t length : b.shape) b.size *= length;
  b.c_contiguous = b.size == 0 || contiguous(b, false);
  b.f_contiguous = b.size == 0 || contiguous(b, true);
}

// False if the array has got new memory since it was read (ndarray.resize with refcheck=False). Only an array that owns
// its memory can.
inline bool is_current(const Buffer& b) {
  if (b.ndarray_type == nullptr) return true;
  const py::detail::PyArray_Proxy& array = *py::detail::array_proxy(b.owner.ptr());
  if (array.data != b.data) return false;
  if ((array.flags & py::detail::npy_api::NPY_ARRAY_OWNDATA_) == 0) return true;
  return std::accumulate(array.dimensions, array.dimensions + array.nd, int64_t{1}, std::multiplies<>()) == b.size;
}

// Whether the memory of a view still belongs to the object at the end of its chain of bases: an array that was not
// resized, a buffer that was not released, or an object whose __array_interface__ has the address of the last view.
inline bool is_held_by_base(const Buffer& b) {
  const py::detail::PyArray_Proxy* view = py::detail::array_proxy(b.owner.ptr());
  while (view->base != nullptr && py::isinstance<py::array>(view->base)) {
    const auto base = py::reinterpret_borrow<py::array>(view->base);
    if (base.owndata()) {
      const auto first = reinterpret_cast<uintptr_t>(base.data());
      return first <= b.begin() && b.end() <= first + static_cast<uintptr_t>(base.nbytes());
    }
    view = py::detail::array_proxy(base.ptr());
  }
  const py::handle base = view->base;
  if (!base || base.is_none()) return true;
  if (PyObject_CheckBuffer(base.ptr()) != 0) {
    Py_buffer buffer;
    if (PyObject_GetBuffer(base.ptr(), &buffer, PyBUF_FULL_RO) != 0) {
      PyErr_Clear();  // a memoryview that was released, as SharedMemory.close() does
      return false;
    }
    const auto first = reinterpret_cast<uintptr_t>(buffer.buf);
    const bool is_inside = first <= b.begin() && b.end() <= first + static_cast<uintptr_t>(buffer.len);
    const bool holds = is_inside || PyBuffer_IsContiguous(&buffer, 'A') == 0;
    PyBuffer_Release(&buffer);
    return holds;
  }
  // A property of its type that raises AttributeError says that the object has no memory any more.
  const bool exports =
      py::hasattr(base, "__array_interface__") || py::hasattr(py::type::handle_of(base), "__array_interface__");
  if (!exports) return true;
  try {
    const auto data = base.attr("__array_interface__").cast<py::dict>()["data"].cast<py::tuple>();
    return data[0].cast<uintptr_t>() == reinterpret_cast<uintptr_t>(view->data);
  } catch (const std::exception&) {
    return false;
  }
}

// False if the memory that was read may belong to something else by now. Dearer than is_current() for views.
inline bool is_alive(const Buffer& b) {
  if (!is_current(b)) return false;
  if (!b.on_host() || b.size == 0 || !py::isinstance<py::array>(b.owner)) return true;
  const bool owns = (py::detail::array_proxy(b.owner.ptr())->flags & py::detail::npy_api::NPY_ARRAY_OWNDATA_) != 0;
  return owns || is_held_by_base(b);
}

// False if the array has been made read-only since it was read.
inline bool is_still_writable(const Buffer& b) {
  if (b.ndarray_type == nullptr) return true;
  return (py::detail::array_proxy(b.owner.ptr())->flags & py::detail::npy_api::NPY_ARRAY_WRITEABLE_) != 0;
}

inline void require_dtype(const Buffer& b) {
  if (b.dtype) return;
  throw py::type_error(b.label + ": dtype " + b.dtype_name + ", expected float16, bfloat16, float32 or float64");
}

// Raises if the memory cannot be written in place; it is never copied instead.
inline void require_memory_in_place(const Buffer& b) {
  if (!b.native_order) throw py::value_error(b.label + ": byte-swapped, expected the byte order of this machine");
  if (!b.writable) throw py::value_error(b.label + ": read-only, expected a writable array to update in place");
  if (!b.c_contiguous && !b.f_contiguous) {
    throw py::value_error(b.label + ": strides " + tuple_text(b.strides) + " for shape " + tuple_text(b.shape) +
                          ", expected a contiguous array to update in place");
  }
  if (!b.aligned())
    throw py::value_error(b.label + ": misaligned, expected an address that is a multiple of the item size");
}

inline void require_in_place(const Buffer& b) {
  require_dtype(b);
  require_memory_in_place(b);
}

inline std::string place_text(const Buffer& b) {
  return b.on_host() ? "CPU memory" : "CUDA device " + std::to_string(b.device());
}

// Raises unless `b`, which the error calls `label`, is on the device of `like`.
inline void require_place(const Buffer& b, const std::string& label, const Buffer& like) {
  if (b.device() == like.device()) return;
  throw py::value_error(label + ": in " + place_text(b) + ", expected " + place_text(like) + " like " + like.label);
}

}  // namespace fastadam::bind
