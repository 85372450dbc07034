// SPDX-License-Identifier: Apache-2.0
// Reads arrays on a GPU into Buffers: __cuda_array_interface__ (CuPy, Numba and others), DLPack (PyTorch, because the
// interface cannot describe bfloat16), and our own DeviceArray. Only for the CUDA module.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "../cuda/device.h"
#include "gil.h"
#include "read_buffer.h"

namespace fastadam::bind {

// Our own array on a GPU, for slots of variables whose library cannot create arrays.
struct DeviceArray {
  std::vector<int64_t> shape;
  py::dtype dtype;
  bool is_bfloat16;  // then dtype is uint16
  bool fortran;
  int device;
  uintptr_t stream;  // on which it was created
  std::shared_ptr<void> memory;

  int64_t size() const {
    int64_t size = 1;
    for (int64_t length : shape) size *= length;
    return size;
  }
  int64_t nbytes() const { return size() * dtype.itemsize(); }

  std::vector<int64_t> strides() const {
    std::vector<int64_t> strides(shape.size());
    int64_t packed = dtype.itemsize();
    for (size_t i = 0; i < shape.size(); ++i) {
      const size_t axis = fortran ? i : shape.size() - 1 - i;
      strides[axis] = packed;
      packed *= shape[axis];
    }
    return strides;
  }
};

// An array of zeros. Waits for the device.
inline DeviceArray make_device_array(std::vector<int64_t> shape, const std::string& dtype, const std::string& order,
                                     int device, uintptr_t stream) {
  const bool is_bfloat16 = dtype == "bfloat16";
  DeviceArray array{
      std::move(shape), py::dtype(is_bfloat16 ? "uint16" : dtype), is_bfloat16, order == "F", device, stream, nullptr};
  const int64_t bytes = array.nbytes();
  const cuda::DeviceScope scope(device);
  const ReleasedGil unlocked;
  array.memory = std::shared_ptr<void>(cuda::allocate(bytes), &cuda::release);
  cuda::set_zero(array.memory.get(), bytes);
  return array;
}

inline py::dict array_interface(const DeviceArray& array) {
  py::dict interface;
  const uintptr_t address = reinterpret_cast<uintptr_t>(array.memory.get());
  interface["shape"] = py::tuple(py::cast(array.shape));
  interface["typestr"] = array.is_bfloat16 ? py::object(py::str("<V2")) : py::object(array.dtype.attr("str"));
  interface["data"] = py::make_tuple(address, false);
  interface["strides"] = py::tuple(py::cast(array.strides()));
  interface["stream"] = array.stream == 0 ? 1 : array.stream;  // 0 is not allowed
  interface["version"] = 3;
  return interface;
}

inline py::dict interface_of(const py::object& object) {
  return object.attr("__cuda_array_interface__").cast<py::dict>();
}

inline std::optional<uintptr_t> stream_in(const py::dict& interface) {
  if (!interface.contains("stream") || py::object(interface["stream"]).is_none()) return std::nullopt;
  return py::object(interface["stream"]).cast<uintptr_t>();
}

// Caches PyTorch's current stream during a step, because asking for it costs as much as reading a tensor.
struct TorchStream {
  int device = -1;
  uintptr_t stream = 0;
};
inline thread_local TorchStream torch_stream_of_step;

inline uintptr_t torch_stream(const py::object& tensor) {
  const TorchStream& cached = torch_stream_of_step;
  if (cached.device >= 0 && tensor.attr("get_device")().cast<int>() == cached.device) return cached.stream;
  const py::object stream = py::module_::import("torch").attr("cuda").attr("current_stream")(tensor.attr("device"));
  return stream.attr("cuda_stream").cast<uintptr_t>();
}

// The stream that the library of the array uses now, numbered as in both protocols.
inline std::optional<uintptr_t> stream_of(const py::object& object) {
  if (library_of(object) == "torch") return torch_stream(object);
  if (!py::hasattr(object, "__cuda_array_interface__")) return std::nullopt;
  return stream_in(interface_of(object));
}

inline Buffer from_array_interface(const py::object& object, const Label& label) {
  const py::dict interface = interface_of(object);
  if (interface.contains("mask") && !py::object(interface["mask"]).is_none()) {
    throw py::type_error(label() + ": masked array, whose mask Adam cannot honour");
  }
  const auto typestr = interface["typestr"].cast<std::string>();
  const auto data = interface["data"].cast<std::pair<uintptr_t, bool>>();
  const py::dtype dtype(typestr == "<V2" || typestr == "|V2" ? "uint16" : typestr);
  Buffer b;
  b.dtype = dtype_of(dtype);
  const bool is_bfloat16 = typestr.find("V2") == 1 && text(object.attr("dtype")).find("bfloat16") != std::string::npos;
  if (is_bfloat16) b.dtype = FASTADAM_BFLOAT16;
  if (!b.dtype) b.dtype_name = is_bfloat16 || typestr.find('V') == 1 ? typestr : text(dtype);
  b.data = reinterpret_cast<void*>(data.first);
  b.writable = !data.second;
  b.native_order = dtype.byteorder() != (kLittleEndian ? '>' : '<');
  b.item_size = dtype.itemsize();
  b.shape = interface["shape"].cast<std::vector<int64_t>>();
  if (interface.contains("strides") && !py::object(interface["strides"]).is_none()) {
    b.strides = interface["strides"].cast<std::vector<int64_t>>();
  } else {
    b.strides = DeviceArray{b.shape, dtype, false, false, 0, 0, nullptr}.strides();
  }
  derive_layout(b);
  b.owner = object;
  b.gpu.emplace().stream = stream_in(interface);
  return b;
}

// The device of an empty array, which has no address that the CUDA runtime could locate.
inline int device_named_by(const py::object& object) {
  if (py::hasattr(object, "__dlpack_device__"))
    return object.attr("__dlpack_device__")().cast<std::pair<int, int>>().second;
  if (!py::hasattr(object, "device")) return 0;
  const py::object device = object.attr("device");
  return (py::isinstance<py::int_>(device) ? device : device.attr("id")).cast<int>();
}

// Sets the device, which only the CUDA runtime knows. Raises unless the memory is ordinary device memory.
inline void locate(Buffer& b, const Label& label, const py::object& object) {
  if (b.size == 0) {
    b.gpu->device = device_named_by(object);
    return;
  }
  const cuda::Location location = cuda::location_of(b.data);
  if (location.place == cuda::Place::kDevice) {
    b.gpu->device = location.device;
    return;
  }
  const char* kind = location.place == cuda::Place::kManaged ? "managed memory" : "CPU memory";
  throw py::value_error(label() + ": " + type_name(object) + " in " + kind + ", expected memory of a CUDA device");
}

// Everything about an array except its address and stream. While it is unchanged, only these two have to be read again.
inline py::object signature_of(const py::object& object, bool is_torch, const py::dict& interface) {
  if (is_torch) {
    return py::make_tuple(object.attr("dtype"), object.attr("shape"), object.attr("stride")(), object.attr("is_neg")());
  }
  const py::object strides = interface.contains("strides") ? py::object(interface["strides"]) : py::none();
  return py::make_tuple(interface["typestr"], interface["shape"], strides, interface["data"][py::int_(1)]);
}

inline Buffer read_cuda_array(const py::object& object, const Label& label) {
  Buffer b;
  if (library_of(object) == "torch") {
    // -1: our work goes to torch's own stream, so nothing has to wait.
    b = from_dlpack(object, label, py::dict(py::arg("stream") = -1));
    b.gpu.emplace().stream = torch_stream(object);
  } else if (py::hasattr(object, "__cuda_array_interface__")) {
    b = from_array_interface(object, label);
  } else {
    b = from_dlpack(object, label, py::dict(py::arg("stream") = 1));
    b.gpu.emplace().stream = 1;
  }
  locate(b, label, object);
  const bool is_torch = library_of(object) == "torch";
  b.gpu->source = object;
  b.gpu->is_torch = is_torch;
  b.gpu->source_type = Py_TYPE(object.ptr());
  b.gpu->address_is_fixed = py::isinstance<DeviceArray>(object) || library_of(object) == "cupy";
  const bool has_interface = !is_torch && py::hasattr(object, "__cuda_array_interface__");
  const bool is_complete = is_torch || (has_interface && b.dtype != FASTADAM_BFLOAT16);  // whose typestr is only "V2"
  if (is_complete) b.gpu->signature = signature_of(object, is_torch, is_torch ? py::dict() : interface_of(object));
  return b;
}

// Returns the address of an array with the properties of the one that `b` was read from, and the stream of all but a
// kTensor, for which asking takes longer than all the rest.
inline std::optional<ArrayAddress> cuda_address_if_like(const py::object& object, const Buffer& b) {
  if (b.gpu->is_torch && exchange_api_of(object) != nullptr) {
    const void* data = tensor_address_if_like(object, b);
    return data == nullptr ? std::nullopt
                           : std::optional(ArrayAddress{data, ArrayAddress::kTensor, true, b.gpu->device});
  }
  if (b.gpu->address_is_fixed && object.is(b.gpu->source)) {
    return ArrayAddress{b.data, ArrayAddress::kOnGpu, true, b.gpu->device, b.gpu->stream};
  }
  if (!b.gpu->signature || Py_TYPE(object.ptr()) != b.gpu->source_type) return std::nullopt;
  const bool is_torch = b.gpu->is_torch;
  const py::dict interface = is_torch ? py::dict() : interface_of(object);
  if (!signature_of(object, is_torch, interface).equal(b.gpu->signature)) return std::nullopt;
  const py::object address = is_torch ? object.attr("data_ptr")() : py::object(interface["data"][py::int_(0)]);
  auto* data = reinterpret_cast<void*>(address.cast<uintptr_t>());
  const std::optional<uintptr_t> stream = is_torch ? torch_stream(object) : stream_in(interface);
  if (data == b.data) return ArrayAddress{data, ArrayAddress::kOnGpu, true, b.gpu->device, stream};
  if (b.size == 0 || reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(b.item_size) != 0) return std::nullopt;
  const cuda::Location location = cuda::location_of(data);
  if (location.place != cuda::Place::kDevice) return std::nullopt;
  return ArrayAddress{data, ArrayAddress::kOnGpu, true, location.device, stream};
}

py::array copy_to_numpy(const Buffer& b);

// The policy of the CUDA module: arrays on a GPU are read.
struct CudaArrays {
  static Buffer read_on_gpu(const py::object& object, const Label& label) { return read_cuda_array(object, label); }
  static py::array copy_from_gpu(const Buffer& b) { return copy_to_numpy(b); }
  static std::optional<ArrayAddress> address_on_gpu(const py::object& object, const Buffer& reference) {
    return cuda_address_if_like(object, reference);
  }
  static std::optional<uintptr_t> stream_of_tensor(const py::object& tensor) { return torch_stream(tensor); }
};

// Reads an array of any dtype on a device: ids, or `last` of a deferred table.
inline Buffer require_cuda_array(const py::object& object, const std::string& label) {
  std::optional<Buffer> b = read_array<CudaArrays>(object, Label{label});
  if (!b) throw py::type_error(label + ": " + type_name(object) + ", expected an array on a CUDA device");
  b->label = label;
  if (b->on_host()) throw py::value_error(label + ": in CPU memory, expected memory of a CUDA device");
  return *std::move(b);
}

// Copies an array to CPU memory; waits for the device. The bits of bfloat16 are returned as uint16.
inline py::array copy_to_numpy(const Buffer& b) {
  if (!b.c_contiguous && !b.f_contiguous) throw py::value_error(b.label + ": strided, expected a contiguous array");
  const py::dtype dtype = b.dtype == FASTADAM_BFLOAT16 ? py::dtype("uint16")
                          : b.dtype                    ? py::dtype(name_of(*b.dtype))
                                                       : py::dtype(b.dtype_name);
  py::array host(dtype, b.shape, b.strides);
  const cuda::DeviceScope scope(b.device());
  void* to = host.mutable_data();
  const ReleasedGil unlocked;
  cuda::copy_to_host(to, b.data, b.size * b.item_size);
  return host;
}

// Overwrites an array on a device with a host array of the same dtype, shape and layout.
inline void assign(const py::object& object, const py::array& values) {
  const Buffer b = require_cuda_array(object, "array");
  const Buffer from = from_ndarray(values);
  const bool same_layout = from.same_layout(b) && from.shape == b.shape && from.item_size == b.item_size;
  if (!same_layout) throw py::value_error("values: expected the shape, dtype and order of the array");
  const cuda::DeviceScope scope(b.device());
  const ReleasedGil unlocked;
  cuda::overwrite(b.data, from.data, b.size * b.item_size);
}

}  // namespace fastadam::bind
