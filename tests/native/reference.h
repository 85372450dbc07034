// SPDX-License-Identifier: Apache-2.0
// For the native tests: inputs made from integers, the half types by their definition, and the step as a plain scalar
// loop. It is written independently of csrc/core, which it checks.
#pragma once

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <limits>
#include <new>

#include "../../csrc/core/float_mode.h"
#include "../../csrc/core/step_args.h"

namespace kernel_test {

using namespace fastadam;

struct Format {
  const char* name;
  int digits;  // fraction bits
  int least;   // the exponent of the smallest normal number
};
constexpr Format kFormats[kDTypeCount] = {
    {"float16", 10, -14}, {"bfloat16", 7, -126}, {"float32", 23, -126}, {"float64", 52, -1022}};
constexpr int64_t kSizes[] = {0, 1, 7, 8, 15, 16, 17, 31, 33, 64, 129, 4097, 100003};
constexpr int kSteps = 5;
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// 2^e as a normal double. ldexp took a quarter of the time of row_test.
inline double power_of_two(int e) { return bit_cast<double>(static_cast<uint64_t>(1023 + e) << 52); }

// Decodes a 16-bit format by its definition.
inline double decode(uint16_t bits, const Format& f) {
  const int exponent = (bits & 0x7fff) >> f.digits;
  const int fraction = bits & ((1 << f.digits) - 1);
  const double sign = (bits & 0x8000) != 0 ? -1 : 1;
  if (exponent == 0x7fff >> f.digits) return fraction != 0 ? kNan : sign * kInfinity;
  const int whole = fraction + (exponent == 0 ? 0 : 1 << f.digits);
  return sign * whole * power_of_two(std::max(exponent - 1, 0) + f.least - f.digits);
}

inline uint16_t encode(double x, const Format& f) {
  const int sign = std::signbit(x) ? 0x8000 : 0;
  const int infinity = (0x7fff >> f.digits) << f.digits;
  if (std::isnan(x) || std::isinf(x)) return static_cast<uint16_t>(sign | (std::isnan(x) ? 0x7fff : infinity));
  const int exponent = x == 0 ? f.least : std::max(f.least, std::ilogb(x));
  const int whole = static_cast<int>(std::nearbyint(std::fabs(x) * power_of_two(f.digits - exponent)));
  return static_cast<uint16_t>(sign | std::min(((exponent - f.least) << f.digits) + whole, infinity));
}

inline uint64_t canonical(double x) { return std::isnan(x) ? ~uint64_t{0} : bit_cast<uint64_t>(x); }

inline double read(const void* data, DType dtype, int64_t i) {
  if (dtype == FASTADAM_FLOAT64) return static_cast<const double*>(data)[i];
  if (dtype == FASTADAM_FLOAT32) return static_cast<double>(static_cast<const float*>(data)[i]);
  return decode(static_cast<const uint16_t*>(data)[i], kFormats[static_cast<int>(dtype)]);
}

inline void write(void* data, DType dtype, int64_t i, double x) {
  if (dtype == FASTADAM_FLOAT64) static_cast<double*>(data)[i] = x;
  if (dtype == FASTADAM_FLOAT32) static_cast<float*>(data)[i] = static_cast<float>(x);
  if (size_of(dtype) == 2) static_cast<uint16_t*>(data)[i] = encode(x, kFormats[static_cast<int>(dtype)]);
}

// An array that starts `offset` elements after a 64-byte boundary and ends where its allocation ends, so that
// AddressSanitizer detects an access behind it.
class Array {
 public:
  Array(DType dtype, int64_t size, int64_t offset = 0)
      : dtype_(dtype), size_(size), offset_(offset), raw_(::operator new(bytes(), std::align_val_t{64})) {}
  Array(const Array& other, int64_t offset) : Array(other.dtype_, other.size_, offset) {
    std::copy_n(other.at(0), size_ * size_of(dtype_), at(0));
  }
  Array(const Array& other) : Array(other, other.offset_) {}
  Array& operator=(const Array&) = delete;
  ~Array() { ::operator delete(raw_, std::align_val_t{64}); }

  char* at(int64_t i) const { return static_cast<char*>(raw_) + (offset_ + i) * size_of(dtype_); }
  void set(int64_t i, double x) { write(at(0), dtype_, i, x); }
  bool operator==(const Array& other) const {
    if (std::equal(at(0), at(size_), other.at(0))) return true;
    for (int64_t i = 0; i < size_; ++i) {
      const double actual = read(at(0), dtype_, i);
      const double expected = read(other.at(0), dtype_, i);
      if (canonical(actual) == canonical(expected)) continue;
      static int printed = 0;
      if (++printed <= 8) std::printf("element %" PRId64 "/%" PRId64 ": %a, not %a\n", i, size_, actual, expected);
      return false;
    }
    return true;
  }
  void add_to(uint64_t& digest) const {  // FNV-1a
    for (int64_t i = 0; i < size_; ++i) {
      const uint64_t bits = canonical(read(at(0), dtype_, i));
      for (int shift = 0; shift < 64; shift += 8) digest = (digest ^ ((bits >> shift) & 0xff)) * 0x100000001b3u;
    }
  }

 private:
  size_t bytes() const { return static_cast<size_t>((size_ + offset_) * size_of(dtype_)); }

  DType dtype_;
  int64_t size_;
  int64_t offset_;
  void* raw_;
};

struct Random {
  uint64_t state;

  uint32_t below(uint32_t limit) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state >> 32) % limit;
  }
  // One in eight is denormal or nearly so, and one in eight has a denormal square.
  double number(DType dtype) {
    const int least = kFormats[static_cast<int>(dtype)].least;
    const uint32_t kind = below(8);
    const int low = kind == 0 ? least - 24 : kind == 1 ? least / 2 - 12 : -16;
    const int exponent = low + static_cast<int>(below(20));
    return std::ldexp(static_cast<double>(below(1u << 31)) - 0x1p30, exponent - 30);
  }
};

struct Variable {
  DType dtype;
  DType grad_dtype;
  DType slot_dtype;
  int64_t size;
  Array var, m, v, vhat, grads;  // the gradient of step t starts at grads.at(t)

  Variable(DType dtype_, int64_t size_) : Variable(dtype_, size_, dtype_) {}
  Variable(DType dtype_, int64_t size_, DType grad_dtype_)
      : Variable(dtype_, size_, grad_dtype_, state_dtype(dtype_)) {}
  Variable(DType dtype_, int64_t size_, DType grad_dtype_, DType slot_dtype_)
      : dtype(dtype_),
        grad_dtype(grad_dtype_),
        slot_dtype(slot_dtype_),
        size(size_),
        var(dtype, size),
        m(slot_dtype, size),
        v(m),
        vhat(m),
        grads(grad_dtype, size + kSteps) {
    Random random{static_cast<uint64_t>(size * kDTypeCount + static_cast<int>(dtype))};
    for (int64_t i = 0; i < size; ++i) {
      var.set(i, size > 0xffff && size_of(dtype) == 2  // every bit pattern once
                     ? decode(static_cast<uint16_t>(i), kFormats[static_cast<int>(dtype)])
                     : random.number(dtype));
      m.set(i, random.number(slot_dtype));
      v.set(i, std::fabs(random.number(slot_dtype)));
      vhat.set(i, std::fabs(random.number(slot_dtype)));
    }
    for (int64_t i = 0; i < size + kSteps; ++i) {
      const double sign = i % 2 == 0 ? 1 : -1;
      const double number = random.number(grad_dtype);
      grads.set(i, i % 211 == 8 ? kNan : i % 307 == 14 ? sign * kInfinity : i % 11 == 3 ? sign * 0 : number);
    }
  }
  Variable(const Variable& o, int64_t at)
      : dtype(o.dtype),
        grad_dtype(o.grad_dtype),
        slot_dtype(o.slot_dtype),
        size(o.size),
        var(o.var, at),
        m(o.m, at),
        v(o.v, at),
        vhat(o.vhat, at),
        grads(o.grads, at) {}

  TensorArgs args(int t, bool amsgrad) const {
    TensorArgs tensor{};
    tensor.var = var.at(0);
    tensor.grad = grads.at(t);
    tensor.m = m.at(0);
    tensor.v = v.at(0);
    tensor.vhat = amsgrad ? vhat.at(0) : nullptr;
    tensor.size = size;
    tensor.next = -1;
    tensor.grad_factor = 0.37 * (t + 1);
    tensor.dtype = dtype;
    tensor.grad_dtype = grad_dtype;
    if (slot_dtype != state_dtype(dtype)) tensor.moments = FASTADAM_MOMENTS_HALF;
    tensor.grad_size = size;
    tensor.decays = t % 2 == 1;
    return tensor;
  }
  void add_to(uint64_t& digest) const {
    for (const Array* array : {&var, &m, &v, &vhat}) array->add_to(digest);
  }
  bool operator==(const Variable& o) const { return var == o.var && m == o.m && v == o.v && vhat == o.vhat; }
};

template <class T>
inline StepScalars<T> scalars(int t) {
  StepScalars<T> s;
  s.alpha = T(0.01) * T(t + 1);
  s.row_alpha = T(0.013) * T(t + 1);
  s.beta_1 = T(0.9);
  s.beta_2 = T(0.999);
  s.one_minus_beta_1 = T(0.1);
  s.one_minus_beta_2 = T(0.001);
  s.epsilon = T(1e-7);
  s.clip_value = T(0.5);
  s.keep = T(1) - T(0.004) * T(t + 1);
  s.ema_momentum = T(0.75);
  s.l2 = T(0.07);
  return s;
}

// The rule as published, one element and one operation at a time.
template <class T>
__attribute__((noinline)) void adam(const TensorArgs& tensor, const StepScalars<T>& s, int transform) {
  const DType state = has_half_moments(tensor) ? tensor.dtype : state_dtype(tensor.dtype);
  for (int64_t i = 0; i < tensor.size; ++i) {
    T g = static_cast<T>(read(tensor.grad, tensor.grad_dtype, i));
    if (transform > 0 && g > s.clip_value) g = s.clip_value;
    if (transform > 0 && g < -s.clip_value) g = -s.clip_value;
    if (transform > 0) g = g * static_cast<T>(tensor.grad_factor);
    T var = static_cast<T>(read(tensor.var, tensor.dtype, i));
    if (transform == kAndL2) g = g + s.l2 * var;
    const T old_m = static_cast<T>(read(tensor.m, state, i));
    const T old_v = static_cast<T>(read(tensor.v, state, i));
    const T m = old_m + (g - old_m) * s.one_minus_beta_1;
    const T v = old_v + (g * g - old_v) * s.one_minus_beta_2;
    T second = v;
    if (tensor.vhat != nullptr) {
      second = static_cast<T>(read(tensor.vhat, state, i)) + T(0);  // flushed
      if (v > second) second = v;
      write(tensor.vhat, state, i, static_cast<double>(second));
    }
    const T change = m * s.alpha / (std::sqrt(second) + s.epsilon);
    write(tensor.m, state, i, static_cast<double>(m));
    write(tensor.v, state, i, static_cast<double>(v));
    if (tensor.decays) var = var * s.keep;
    write(tensor.var, tensor.dtype, i, static_cast<double>(var - change));
  }
}

inline void expect(const TensorArgs& tensor, int t, int transform) {
  const FlushDenormals flush;
  if (tensor.dtype == FASTADAM_FLOAT64) adam(tensor, scalars<double>(t), transform);
  if (tensor.dtype != FASTADAM_FLOAT64) adam(tensor, scalars<float>(t), transform);
}

}  // namespace kernel_test
