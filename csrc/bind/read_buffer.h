// SPDX-License-Identifier: Apache-2.0
// Reads Python objects into Buffers: NumPy arrays, DLPack, __array_interface__. The template parameter `Arrays` handles
// arrays on a GPU: HostArrays refuses them, CudaArrays (device_buffers.h) reads them.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "buffer.h"
#include "dlpack.h"
#include "dlpack_exchange.h"

namespace fastadam::bind {

inline std::optional<DType> dtype_of(const py::dtype& dtype) {
  const char kind = dtype.kind();
  const auto size = dtype.itemsize();
  if (kind == 'f' && size == 4) return FASTADAM_FLOAT32;
  if (kind == 'f' && size == 8) return FASTADAM_FLOAT64;
  if (kind == 'f' && size == 2) return FASTADAM_FLOAT16;
  // ml_dtypes registers bfloat16 as an opaque two-byte type, which only its name identifies.
  if (kind == 'V' && size == 2 && text(dtype) == "bfloat16") return FASTADAM_BFLOAT16;
  return std::nullopt;
}

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
constexpr bool kLittleEndian = false;
#else
constexpr bool kLittleEndian = true;
#endif

inline bool is_plain_ndarray(py::handle object) {
  return std::strcmp(Py_TYPE(object.ptr())->tp_name, "numpy.ndarray") == 0;
}

inline Buffer from_ndarray(const py::array& array) {
  const py::dtype dtype = array.dtype();
  Buffer b;
  b.dtype = dtype_of(dtype);
  if (!b.dtype) b.dtype_name = text(dtype);
  b.type_code = dtype.kind() == 'u'            ? dlpack::kDLUInt
                : b.dtype == FASTADAM_BFLOAT16 ? dlpack::kDLBfloat
                : b.dtype                      ? dlpack::kDLFloat
                                               : dlpack::kDLInt;
  b.data = const_cast<void*>(array.data());
  b.shape.assign(array.shape(), array.shape() + array.ndim());
  b.strides.assign(array.strides(), array.strides() + array.ndim());
  b.item_size = dtype.itemsize();
  b.writable = array.writeable();
  // '=' and '|' are native; an explicit '<' or '>' may be too.
  b.native_order = dtype.byteorder() != (kLittleEndian ? '>' : '<');
  b.owner = array;
  if (is_plain_ndarray(array)) {
    b.ndarray_type = Py_TYPE(array.ptr());
    b.numpy_dtype = dtype;
  }
  derive_layout(b);
  return b;
}

inline void read_dltensor(Buffer& b, const dlpack::DLTensor& t) {
  b.data = static_cast<char*>(t.data) + t.byte_offset;
  b.item_size = t.dtype.bits / 8;
  b.type_code = t.dtype.code;
  const bool is_float = t.dtype.code == dlpack::kDLFloat && t.dtype.lanes == 1;
  if (is_float && t.dtype.bits == 32) b.dtype = FASTADAM_FLOAT32;
  if (is_float && t.dtype.bits == 64) b.dtype = FASTADAM_FLOAT64;
  if (is_float && t.dtype.bits == 16) b.dtype = FASTADAM_FLOAT16;
  if (t.dtype.code == dlpack::kDLBfloat && t.dtype.bits == 16 && t.dtype.lanes == 1) b.dtype = FASTADAM_BFLOAT16;
  if (!b.dtype) {
    constexpr const char* kCodes[] = {"int", "uint", "float", "handle", "bfloat", "complex", "bool"};
    b.dtype_name = (t.dtype.code < 7 ? kCodes[t.dtype.code] : "DLPack type ") + std::to_string(t.dtype.bits);
  }
  b.shape.assign(t.shape, t.shape + t.ndim);
  b.strides.resize(b.shape.size());
  int64_t packed = 1;
  for (size_t axis = b.shape.size(); axis-- > 0;) {
    b.strides[axis] = (t.strides != nullptr ? t.strides[axis] : packed) * b.item_size;
    packed *= b.shape[axis];
  }
}

// The name of the package that an object's type comes from.
inline std::string library_of(py::handle object) {
  const std::string module = text(py::type::handle_of(object).attr("__module__"));
  return module.substr(0, module.find('.'));
}

// The Buffer owns the capsule without consuming it, so the capsule's destructor releases the memory.
inline Buffer from_capsule(const py::object& capsule, const py::object& object, const Label& label) {
  Buffer b;
  b.owner = capsule;
  if (void* versioned = PyCapsule_GetPointer(capsule.ptr(), "dltensor_versioned")) {
    const auto* managed = static_cast<const dlpack::DLManagedTensorVersioned*>(versioned);
    if (managed->version.major != dlpack::kMajorVersion) {
      throw py::value_error(label() + ": DLPack version " + std::to_string(managed->version.major) + ", expected 1");
    }
    read_dltensor(b, managed->dl_tensor);
    b.writable = (managed->flags & dlpack::kReadOnlyFlag) == 0;
  } else {
    PyErr_Clear();
    void* unversioned = PyCapsule_GetPointer(capsule.ptr(), "dltensor");
    if (unversioned == nullptr) throw py::error_already_set();
    read_dltensor(b, static_cast<const dlpack::DLManagedTensor*>(unversioned)->dl_tensor);
    // Unversioned capsules have no read-only flag, and JAX exports immutable arrays in them. Tensors of torch are
    // writable.
    b.writable = library_of(object) == "torch";
  }
  derive_layout(b);
  if (b.data == nullptr && b.size > 0) throw py::value_error(label() + ": " + type_name(object) + " without memory");
  return b;
}

inline Buffer from_dlpack(const py::object& object, const Label& label, const py::dict& arguments) {
  py::object capsule;
  try {
    capsule = object.attr("__dlpack__")(py::arg("max_version") = py::make_tuple(dlpack::kMajorVersion, 0), **arguments);
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_TypeError)) throw;
    capsule = object.attr("__dlpack__")(**arguments);
  }
  return from_capsule(capsule, object, label);
}

inline bool is_masked(py::handle object) { return !is_plain_ndarray(object) && py::hasattr(object, "harden_mask"); }

// A bfloat16 Buffer of bits that Python has computed.
inline Buffer bfloat16_bits(const py::array_t<uint16_t>& bits) {
  Buffer b = from_ndarray(bits);
  b.dtype = FASTADAM_BFLOAT16;
  return b;
}

// Whether the object is a plain ndarray with the dtype, byte order, layout and shape of `b`.
inline bool is_ndarray_like(py::handle object, const Buffer& b) {
  if (Py_TYPE(object.ptr()) != b.ndarray_type) return false;
  const py::detail::PyArray_Proxy& array = *py::detail::array_proxy(object.ptr());
  if (array.descr != b.numpy_dtype.ptr() || static_cast<size_t>(array.nd) != b.shape.size()) return false;
  const int layout = (b.c_contiguous ? py::array::c_style : 0) | (b.f_contiguous ? py::array::f_style : 0);
  constexpr int kAligned = py::detail::npy_api::NPY_ARRAY_ALIGNED_;
  return (array.flags & layout) != 0 && (array.flags & kAligned) != 0 &&
         std::equal(b.shape.begin(), b.shape.end(), array.dimensions);
}

inline bool is_true(const py::object& object, const char* method) {
  return py::hasattr(object, method) && py::cast<bool>(object.attr(method)());
}

// The location of an array with the dtype, shape and layout of a known Buffer.
struct ArrayAddress {
  enum Kind { kNdarray, kTensor, kOnGpu };

  const void* data;
  Kind kind;
  bool writable = true;
  int device = Buffer::kHost;
  std::optional<uintptr_t> stream = std::nullopt;  // only on a GPU
};

// The policy of the CPU module: arrays on a GPU are refused.
struct HostArrays {
  static Buffer read_on_gpu(const py::object& object, const Label& label) {
    throw py::value_error(label() + ": " + type_name(object) + " on a GPU, expected CPU memory");
  }
  static py::array copy_from_gpu(const Buffer&) { throw py::value_error("an array on a GPU, expected CPU memory"); }
  static std::optional<ArrayAddress> address_on_gpu(const py::object&, const Buffer&) { return std::nullopt; }
  static std::optional<uintptr_t> stream_of_tensor(const py::object&) { return std::nullopt; }
};

// Returns the address of an array with the properties of `reference` without reading it completely. Empty if the array
// differs or if only read_array() can tell. The caller must check a kTensor for lazy negation with is_negated().
template <class Arrays>
std::optional<ArrayAddress> address_if_like(const py::object& object, const Buffer& reference) {
  if (is_ndarray_like(object, reference)) {
    const py::detail::PyArray_Proxy& array = *py::detail::array_proxy(object.ptr());
    const bool writable = (array.flags & py::detail::npy_api::NPY_ARRAY_WRITEABLE_) != 0;
    return ArrayAddress{array.data, ArrayAddress::kNdarray, writable};
  }
  if (reference.gpu) return Arrays::address_on_gpu(object, reference);
  if (reference.item_size == 0) return std::nullopt;  // nothing has been read yet
  const void* data = tensor_address_if_like(object, reference);
  return data == nullptr ? std::nullopt : std::optional(ArrayAddress{data, ArrayAddress::kTensor});
}

template <class Arrays>
Buffer from_any_dlpack(py::object object, const Label& label) {
  if (is_true(object, "is_neg")) throw py::value_error(label() + ": tensor with the negative bit; resolve it first");
  // A torch tensor that requires gradients refuses to be exported; detached it is the same memory. Any other is not
  // detached: tensor_address_if_like() is twice as fast for a tensor that its own capsule holds.
  const bool is_traced = py::hasattr(object, "requires_grad") && object.attr("requires_grad").ptr() != Py_False;
  if (is_traced && py::hasattr(object, "detach")) object = object.attr("detach")();
  const auto device = object.attr("__dlpack_device__")().cast<py::tuple>();
  const auto type = device[0].cast<int32_t>();
  if (type == dlpack::kDLCPU) return from_dlpack(object, label, py::dict());
  if (type == dlpack::kDLCUDA || type == dlpack::kDLCUDAManaged) return Arrays::read_on_gpu(object, label);
  throw py::value_error(label() + ": " + type_name(object) + " on DLPack device " + text(device) +
                        ", expected memory of a CPU or of a CUDA device");
}

// Reads an array of another library; empty if the object exports no memory.
template <class Arrays>
std::optional<Buffer> read_exported(py::object object, const Label& label) {
  if (const py::object capsule = exported_on_host(object)) return from_capsule(capsule, object, label);
  if (py::hasattr(object, "is_sparse") && py::bool_(object.attr("is_sparse"))) return std::nullopt;
  if (py::hasattr(object, "__dlpack__") && py::hasattr(object, "__dlpack_device__")) {
    return from_any_dlpack<Arrays>(std::move(object), label);
  }
  if (py::hasattr(object, "__cuda_array_interface__")) return Arrays::read_on_gpu(object, label);
  if (!py::hasattr(object, "__array_interface__") && !PyObject_CheckBuffer(object.ptr())) return std::nullopt;
  const auto array = py::module_::import("numpy").attr("asarray")(object).cast<py::array>();
  // An array that owns its memory is a copy: a NumPy scalar exports a temporary.
  if (array.owndata()) return std::nullopt;
  return from_ndarray(array);
}

// Reads any array as it is stored, of any dtype and layout; empty if the object is not an array.
template <class Arrays>
std::optional<Buffer> read_array(py::object object, const Label& label) {
  if (py::isinstance<Buffer>(object)) return object.cast<Buffer>();
  if (py::isinstance<py::array>(object)) {
    if (is_masked(object)) {
      throw py::type_error(label() + ": masked array, whose mask Adam cannot honour; pass its .data");
    }
    return from_ndarray(py::reinterpret_borrow<py::array>(object));
  }
  try {
    return read_exported<Arrays>(object, label);
  } catch (py::error_already_set& error) {
    // The exporter's own refusal (sparse, conjugated or quantized tensors) does not name the argument.
    if (!error.matches(PyExc_Exception)) throw;
    throw py::value_error(label() + ": " + type_name(object) + " whose memory cannot be read (" + text(error.value()) +
                          ")");
  } catch (const py::cast_error&) {  // whose text names types of C++
    throw py::value_error(label() + ": " + type_name(object) + " with invalid metadata, expected values of the types " +
                          "that DLPack and the array interfaces have");
  }
}

template <class Arrays>
Buffer read_writable(const py::object& object, const std::string& label) {
  std::optional<Buffer> b = read_array<Arrays>(object, Label{label});
  if (!b) {
    throw py::type_error(label + ": " + type_name(object) +
                         ", expected a writable float array (NumPy, fastadam.Variable, DLPack, __array_interface__)");
  }
  b->label = label;
  require_in_place(*b);
  return *std::move(b);
}

template <class Arrays>
Buffer read_variable(const py::object& object, const std::string& label) {
  // A detached tensor keeps the memory alive but not the caller's object, whose end shows that it was replaced.
  const bool is_tensor = exchange_api_of(object) != nullptr && py::hasattr(object, "detach");
  return read_writable<Arrays>(is_tensor ? object.attr("detach")() : object, label);
}

inline bool is_integer(const Buffer& b, uint8_t type_code, int64_t bytes) {
  return !b.dtype && b.type_code == type_code && b.item_size == bytes && b.dtype_name != "bool";
}

inline bool is_codes(const Buffer& b) { return is_integer(b, dlpack::kDLUInt, 1); }

inline void require_shape(const Buffer& b, const std::vector<int64_t>& shape, const Buffer& var) {
  if (b.shape == shape) return;
  throw py::value_error(b.label + ": shape " + tuple_text(b.shape) + ", expected " + tuple_text(shape) + " like " +
                        var.label);
}

inline void require_layout(const Buffer& b, const Buffer& var) {
  if (b.same_layout(var)) return;
  throw py::value_error(b.label + ": order " + b.order() + ", expected " + var.order() + " like " + var.label);
}

// Reads any array that can be updated in place, whatever its dtype.
template <class Arrays>
Buffer read_slot(const py::object& object, const std::string& label, const Buffer& var) {
  std::optional<Buffer> b = read_array<Arrays>(object, Label{label});
  if (!b) throw py::type_error(label + ": " + type_name(object) + ", expected a writable array");
  b->label = label;
  require_place(*b, label, var);
  if (!b->dtype && b->type_code > dlpack::kDLUInt) require_dtype(*b);
  require_memory_in_place(*b);
  return *std::move(b);
}

// Reads a moment, average or accumulator of `var`. Its dtype must be the state dtype; or, of a moment, the dtype of
// `var`, bfloat16 or uint8.
template <class Arrays>
Buffer read_state(const py::object& object, const std::string& label, const Buffer& var, bool is_moment) {
  Buffer b = read_slot<Arrays>(object, label, var);
  if (!b.dtype && !(is_moment && is_codes(b))) require_dtype(b);
  require_shape(b, var.shape, var);
  const bool may_be_small = is_moment && *var.dtype != FASTADAM_FLOAT64;
  const bool is_small = may_be_small && (is_codes(b) || b.dtype == FASTADAM_BFLOAT16 || b.dtype == var.dtype);
  if (!is_small && b.dtype != state_dtype(*var.dtype)) {
    const std::string found = b.dtype ? name_of(*b.dtype) : b.dtype_name;
    const std::string own = may_be_small && size_of(*var.dtype) == 2 ? std::string(" or ") + name_of(*var.dtype) : "";
    throw py::type_error(label + ": " + found + ", expected " + name_of(state_dtype(*var.dtype)) + own + " for " +
                         name_of(*var.dtype) + " " + var.label);
  }
  require_layout(b, var);
  return b;
}

// Reads scales of 8-bit moments, one for each of `count` blocks.
template <class Arrays>
Buffer read_scales(const py::object& object, const std::string& label, const Buffer& var, int64_t count) {
  Buffer b = read_slot<Arrays>(object, label, var);
  if (!is_codes(b)) {
    throw py::type_error(label + ": " + (b.dtype ? name_of(*b.dtype) : b.dtype_name) + ", expected uint8");
  }
  require_shape(b, {count}, var);
  return b;
}

// Reads the low halves of a variable.
template <class Arrays>
Buffer read_low(const py::object& object, const std::string& label, const Buffer& var) {
  Buffer b = read_slot<Arrays>(object, label, var);
  if (!is_integer(b, dlpack::kDLInt, 2)) {
    throw py::type_error(label + ": " + (b.dtype ? name_of(*b.dtype) : b.dtype_name) + ", expected int16");
  }
  if (*var.dtype != FASTADAM_BFLOAT16) {
    throw py::type_error(label + ": of " + name_of(*var.dtype) + " " + var.label + ", expected a bfloat16 variable");
  }
  require_shape(b, var.shape, var);
  require_layout(b, var);
  return b;
}

// Raises the reason why a gradient of `var` cannot be read without a conversion.
[[noreturn]] inline void refuse_as_it_lies(const Buffer& g, const Buffer& var, const std::string& label) {
  const std::string gradient = label + ": " + (g.dtype ? name_of(*g.dtype) : g.dtype_name.c_str());
  const bool is_readable = g.dtype == var.dtype || g.dtype == state_dtype(*var.dtype);
  if (!is_readable) throw py::type_error(gradient + ", expected " + name_of(*var.dtype) + " like " + var.label);
  if (!g.native_order) throw py::value_error(gradient + ", byte-swapped, expected the byte order of this machine");
  if (!g.aligned())
    throw py::value_error(gradient + ", misaligned, expected an address that is a multiple of the item size");
  throw py::value_error(gradient + " with strides " + tuple_text(g.strides) + " for shape " + tuple_text(g.shape) +
                        ", expected a contiguous array in order " + var.order() + " like " + var.label);
}

// The array as a NumPy array, for conversions in Python; a copy if it is on a GPU. NumPy has no bfloat16, so its bits
// are returned as uint16.
template <class Arrays>
py::array as_numpy(const Buffer& b) {
  if (b.gpu) return Arrays::copy_from_gpu(b);
  if (!b.dtype && py::isinstance<py::array>(b.owner)) return py::reinterpret_borrow<py::array>(b.owner);
  if (!b.dtype) throw py::type_error(b.label + ": " + b.dtype_name + ", expected a float array");
  const py::dtype dtype(*b.dtype == FASTADAM_BFLOAT16 ? "uint16" : name_of(*b.dtype));
  const py::dtype stored = b.native_order ? dtype : dtype.attr("newbyteorder")().cast<py::dtype>();
  return py::array(stored, b.shape, b.strides, b.data, b.owner);
}

}  // namespace fastadam::bind
