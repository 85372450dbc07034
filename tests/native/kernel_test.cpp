// SPDX-License-Identifier: Apache-2.0
// Checks the C++ core without Python: every kernel of every usable ISA against a plain scalar loop, bit for bit, the
// half types against their definition, threads, the floating point mode, and one digest for all machines.
// `kernel_test threads` does only what needs several threads, for ThreadSanitizer. Prints a line per check.
#include <algorithm>
#include <cfenv>
#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <limits>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/cpu/dispatch.h"
#include "../../csrc/cpu/flush_denormals.h"
#include "../../csrc/cpu/launch.h"

namespace {

using namespace fastadam;

// Of the results of check_kernels, on every machine: the inputs come from integers and exact operations only.
// x86 decides after rounding what is small enough to be flushed, AArch64 before: a result within half an ulp below the
// smallest normal number differs. A denormal in the caller's vhat that v does not exceed is flushed by MAXPS of x86 and
// kept by NEON (no step leaves one there). The inputs have neither; new ones must keep it so.
constexpr uint64_t kDigest = 0xcf3909b04e6750a2;

// So many fraction bits, and the exponent of the smallest normal number.
struct Format {
  const char* name;
  int digits;
  int least;
};
constexpr Format kFormats[kDTypeCount] = {
    {"float16", 10, -14}, {"bfloat16", 7, -126}, {"float32", 23, -126}, {"float64", 52, -1022}};
constexpr int64_t kSizes[] = {0, 1, 7, 8, 15, 16, 17, 31, 33, 64, 129, 4097, 100003};
constexpr int kSteps = 5;
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

int failures = 0;

void report(bool ok, const std::string& claim) {
  std::printf("%s %s\n", ok ? "ok  " : "FAIL", claim.c_str());
  failures += ok ? 0 : 1;
}

// The 16-bit formats by their definition.
double decode(uint16_t bits, const Format& f) {
  const int exponent = (bits & 0x7fff) >> f.digits;
  const int fraction = bits & ((1 << f.digits) - 1);
  const double sign = (bits & 0x8000) != 0 ? -1 : 1;
  if (exponent == 0x7fff >> f.digits) return fraction != 0 ? kNan : sign * kInfinity;
  const int whole = fraction + (exponent == 0 ? 0 : 1 << f.digits);
  return sign * std::ldexp(whole, std::max(exponent - 1, 0) + f.least - f.digits);
}

uint16_t encode(double x, const Format& f) {
  const int sign = std::signbit(x) ? 0x8000 : 0;
  const int infinity = (0x7fff >> f.digits) << f.digits;
  if (std::isnan(x) || std::isinf(x)) return static_cast<uint16_t>(sign | (std::isnan(x) ? 0x7fff : infinity));
  const int exponent = x == 0 ? f.least : std::max(f.least, std::ilogb(x));
  const int whole = static_cast<int>(std::nearbyint(std::ldexp(std::fabs(x), f.digits - exponent)));
  return static_cast<uint16_t>(sign | std::min(((exponent - f.least) << f.digits) + whole, infinity));
}

uint64_t canonical(double x) { return std::isnan(x) ? ~uint64_t{0} : bit_cast<uint64_t>(x); }

double read(const void* data, DType dtype, int64_t i) {
  if (dtype == DType::kFloat64) return static_cast<const double*>(data)[i];
  if (dtype == DType::kFloat32) return static_cast<double>(static_cast<const float*>(data)[i]);
  return decode(static_cast<const uint16_t*>(data)[i], kFormats[static_cast<int>(dtype)]);
}

void write(void* data, DType dtype, int64_t i, double x) {
  if (dtype == DType::kFloat64) static_cast<double*>(data)[i] = x;
  if (dtype == DType::kFloat32) static_cast<float*>(data)[i] = static_cast<float>(x);
  if (size_of(dtype) == 2) static_cast<uint16_t*>(data)[i] = encode(x, kFormats[static_cast<int>(dtype)]);
}

// Starts `offset` elements after a 64-byte boundary and ends with its allocation, where AddressSanitizer watches.
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
      const double got = read(at(0), dtype_, i);
      const double expected = read(other.at(0), dtype_, i);
      if (canonical(got) == canonical(expected)) continue;
      static int printed = 0;
      if (++printed <= 8) std::printf("element %" PRId64 "/%" PRId64 ": %a, not %a\n", i, size_, got, expected);
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
  // One in eight is denormal or nearly so, one in eight has a square that is.
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
  int64_t size;
  Array var, m, v, vhat, grads;  // the gradient of step t begins at grads.at(t)

  Variable(DType dtype_, int64_t size_)
      : dtype(dtype_),
        size(size_),
        var(dtype, size),
        m(state_dtype(dtype), size),
        v(m),
        vhat(m),
        grads(dtype, size + kSteps) {
    Random random{static_cast<uint64_t>(size * kDTypeCount + static_cast<int>(dtype))};
    for (int64_t i = 0; i < size; ++i) {
      var.set(i, size > 0xffff && size_of(dtype) == 2  // every pattern once
                     ? decode(static_cast<uint16_t>(i), kFormats[static_cast<int>(dtype)])
                     : random.number(dtype));
      const DType state = state_dtype(dtype);
      m.set(i, random.number(state));
      v.set(i, std::fabs(random.number(state)));
      const double old_vhat = std::fabs(random.number(state));
      vhat.set(i, old_vhat < std::ldexp(1, kFormats[static_cast<int>(state)].least) ? 0 : old_vhat);
    }
    for (int64_t i = 0; i < size + kSteps; ++i) {
      const double sign = i % 2 == 0 ? 1 : -1;
      const double number = random.number(dtype);
      grads.set(i, i % 211 == 8 ? kNan : i % 307 == 14 ? sign * kInfinity : i % 11 == 3 ? sign * 0 : number);
    }
  }
  Variable(const Variable& o, int64_t at)
      : dtype(o.dtype), size(o.size), var(o.var, at), m(o.m, at), v(o.v, at), vhat(o.vhat, at), grads(o.grads, at) {}

  TensorArgs args(int t, bool amsgrad) const {
    return {var.at(0), grads.at(t), m.at(0), v.at(0), amsgrad ? vhat.at(0) : nullptr, size, -1, 0.37 * (t + 1), dtype};
  }
  bool operator==(const Variable& o) const { return var == o.var && m == o.m && v == o.v && vhat == o.vhat; }
};

template <class T>
StepScalars<T> scalars(int t) {
  return {T(0.01) * T(t + 1), T(0.1), T(0.001), T(1e-7), T(0.5)};
}

// By the book, one element and one operation after the other.
template <class T>
__attribute__((noinline)) void adam(const TensorArgs& tensor, const StepScalars<T>& s, bool transform) {
  const DType state = state_dtype(tensor.dtype);
  for (int64_t i = 0; i < tensor.size; ++i) {
    T g = static_cast<T>(read(tensor.grad, tensor.dtype, i));
    if (transform && g > s.clip_value) g = s.clip_value;
    if (transform && g < -s.clip_value) g = -s.clip_value;
    if (transform) g = g * static_cast<T>(tensor.grad_factor);
    const T old_m = static_cast<T>(read(tensor.m, state, i));
    const T old_v = static_cast<T>(read(tensor.v, state, i));
    const T m = old_m + (g - old_m) * s.one_minus_beta_1;
    const T v = old_v + (g * g - old_v) * s.one_minus_beta_2;
    T second = v;
    if (tensor.vhat != nullptr) {
      second = static_cast<T>(read(tensor.vhat, state, i));
      if (v > second) write(tensor.vhat, state, i, static_cast<double>(second = v));
    }
    const T change = m * s.alpha / (std::sqrt(second) + s.epsilon);
    write(tensor.m, state, i, static_cast<double>(m));
    write(tensor.v, state, i, static_cast<double>(v));
    write(tensor.var, tensor.dtype, i, static_cast<double>(static_cast<T>(read(tensor.var, tensor.dtype, i)) - change));
  }
}

void expect(const TensorArgs& tensor, int t, bool transform) {
  const cpu::FlushDenormals flush;
  if (tensor.dtype == DType::kFloat64) adam(tensor, scalars<double>(t), transform);
  if (tensor.dtype != DType::kFloat64) adam(tensor, scalars<float>(t), transform);
}

StepArgs step_of(int t, bool amsgrad, bool transform) {
  return {nullptr, nullptr, nullptr, 0, scalars<float>(t), scalars<double>(t), amsgrad, transform, false};
}

void run(const TensorArgs* tensors, int64_t variables, int t, bool amsgrad, bool transform) {
  std::vector<int64_t> heads;
  std::vector<int64_t> offsets{0};
  for (int64_t k = 0; k < variables; ++k) {
    heads.push_back(k);
    offsets.push_back(offsets.back() + tensors[k].size);
  }
  StepArgs step = step_of(t, amsgrad, transform);
  step.tensors = tensors;
  step.heads = heads.data();
  step.offsets = offsets.data();
  step.head_count = variables;
  cpu::run_step(step);
}

// Returns the digest of the default ISA, the last usable one.
uint64_t check_kernels() {
  const std::vector<cpu::Isa>& isas = cpu::isas();
  std::vector<uint64_t> digests(isas.size(), 0xcbf29ce484222325u);
  std::vector<bool> good(isas.size() * kDTypeCount, true);
  for (int mode = 0; mode < kDTypeCount * 4; ++mode) {
    const auto dtype = static_cast<DType>(mode / 4);
    const bool amsgrad = mode / 2 % 2 != 0;
    const bool transform = mode % 2 != 0;
    for (const int64_t size : kSizes) {
      const Variable initial(dtype, size);
      const Variable expected(initial, 0);
      for (int t = 0; t < kSteps; ++t) expect(expected.args(t, amsgrad), t, transform);
      for (size_t k = 0; k < isas.size(); ++k) {
        if (!isas[k].usable) continue;
        cpu::set_current_isa(isas[k]);
        for (int64_t offset = 0; offset < (size <= 33 ? 16 : 4); ++offset) {
          const Variable plain(initial, offset);
          const Variable prefetching(initial, offset);
          for (int t = 0; t < kSteps; ++t) {
            const TensorArgs tensor = plain.args(t, amsgrad);
            run(&tensor, 1, t, amsgrad, transform);
            const cpu::FlushDenormals flush;
            StepArgs step = step_of(t, amsgrad, transform);
            step.prefetch = true;
            isas[k].kernels->dense[mode / 4][amsgrad][transform](step, prefetching.args(t, amsgrad), 0, size);
          }
          const bool same = plain == expected && prefetching == expected;
          if (!same) good[k * kDTypeCount + static_cast<size_t>(mode / 4)] = false;
          if (offset > 0) continue;
          for (const Array* array : {&plain.var, &plain.m, &plain.v, &plain.vhat}) array->add_to(digests[k]);
        }
      }
    }
  }
  uint64_t digest = 0;
  for (size_t k = 0; k < isas.size(); ++k) {
    if (!isas[k].usable) continue;
    const std::string name = isas[k].name;
    for (size_t d = 0; d < kDTypeCount; ++d) {
      report(good[k * kDTypeCount + d], name + " " + kFormats[d].name + " gives the bits of the scalar loop");
    }
    report(digests[k] == kDigest, name + " gives the digest of all machines");
    digest = digests[k];
  }
  cpu::set_current_isa(*std::find_if(isas.rbegin(), isas.rend(), [](const cpu::Isa& isa) { return isa.usable; }));
  return digest;
}

template <class Storage>
void check_conversions(const Format& f) {
  bool same_load = true;
  bool same_round_trip = true;
  bool same_store = true;
  const auto check_store = [&](uint32_t bits) {
    const float x = bit_cast<float>(bits);
    const uint16_t stored = store<Storage>(x).bits;
    if (canonical(decode(stored, f)) != canonical(decode(encode(static_cast<double>(x), f), f))) same_store = false;
  };
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto pattern = static_cast<uint16_t>(bits);
    const double value = decode(pattern, f);
    if (canonical(static_cast<double>(load(Storage{pattern}))) != canonical(value)) same_load = false;
    const cpu::FlushDenormals flush;
    const uint16_t again = store<Storage>(load(Storage{pattern})).bits;
    if (std::isnan(value) ? !std::isnan(decode(again, f)) : again != pattern) same_round_trip = false;
  }
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {  // the value, halfway to the next, and their neighbours
    const double value = decode(static_cast<uint16_t>(bits), f);
    double next = decode(static_cast<uint16_t>(bits + 1), f);
    if (std::isinf(next)) next = std::copysign(std::ldexp(1, 2 - f.least), next);
    const auto exact = bit_cast<uint32_t>(static_cast<float>(value));
    const auto middle = bit_cast<uint32_t>(static_cast<float>((value + next) / 2));
    for (const uint32_t delta : {~0u, 0u, 1u}) {
      check_store(exact + delta);
      check_store(middle + delta);
    }
  }
  Random random{1};
  for (int i = 0; i < 1000000; ++i) check_store(random.below(~0u));
  const std::string name = f.name;
  report(same_load, name + " loads all 65536 patterns as defined");
  report(same_round_trip, name + " stores what it loaded, denormals flushed or not");
  report(same_store, name + " rounds to nearest even");
}

// 40 variables of all types, one of them long; two with more gradients, which are applied in order.
struct Mixed {
  std::vector<Variable> variables;
  std::vector<TensorArgs> tensors;

  explicit Mixed(const std::vector<Variable>* from = nullptr) {
    constexpr int64_t kMixedSizes[] = {3, 20011, 0, 129, 4097, 1, 33, 9000, 65};
    for (size_t k = 0; k < 40; ++k) {
      if (from == nullptr) variables.emplace_back(static_cast<DType>(k % 4), k == 14 ? 100003 : kMixedSizes[k % 9]);
      if (from != nullptr) variables.emplace_back((*from)[k], static_cast<int64_t>(k % 5));
    }
    for (const Variable& variable : variables) tensors.push_back(variable.args(0, true));
    for (const size_t k : {size_t{14}, size_t{3}}) {
      for (int t = 1; t < 4; ++t) {
        tensors[t == 1 ? k : tensors.size() - 1].next = static_cast<int64_t>(tensors.size());
        tensors.push_back(variables[k].args(t, true));
      }
    }
  }
  void expect_all() const {
    for (size_t k = 0; k < variables.size(); ++k) {
      for (int64_t i = static_cast<int64_t>(k); i >= 0; i = tensors[static_cast<size_t>(i)].next) {
        expect(tensors[static_cast<size_t>(i)], 0, true);
      }
    }
  }
  void run_all() const { run(tensors.data(), static_cast<int64_t>(variables.size()), 0, true, true); }
};

uint64_t floating_point_mode() {
#if defined(__aarch64__)
  uint64_t mode;
  asm volatile("mrs %0, fpcr" : "=r"(mode));
  return mode;
#else
  return _mm_getcsr();
#endif
}

void check_threads() {
  const Mixed initial;
  const Mixed expected(&initial.variables);
  expected.expect_all();
  bool kept = true;
  for (const int threads : {1, 2, 3}) {
    cpu::set_num_threads(threads);
    bool same = true;
    for (int round = 0; round < 5; ++round) {
      const Mixed mixed(&initial.variables);
      const uint64_t mode = floating_point_mode();
      mixed.run_all();
      kept = kept && floating_point_mode() == mode;
      same = same && mixed.variables == expected.variables;
    }
    report(same, "threads: " + std::to_string(threads) + " give the bits of the scalar loop, gradients in order");
  }
  report(kept, "threads: the caller's floating point mode is unchanged");
  const Mixed here(&initial.variables);
  const Mixed there(&initial.variables);
  std::thread other([&there] { there.run_all(); });
  here.run_all();
  other.join();
  const bool same = here.variables == expected.variables && there.variables == expected.variables;
  report(same, "threads: two callers at once get the bits of the scalar loop");
  cpu::set_num_threads(0);
}

void check_mode() {
  for (const int rounding : {FE_TONEAREST, FE_UPWARD}) {
    float var = 1;
    const float grad = 0x1p-70f;  // the square is denormal
    float m = 0;
    float v = 0;
    const TensorArgs tensor{&var, &grad, &m, &v, nullptr, 1, -1, 1, DType::kFloat32};
    std::fesetround(rounding);
    const uint64_t before = floating_point_mode();
    run(&tensor, 1, 0, false, false);
    const uint64_t after = floating_point_mode();
    std::fesetround(FE_TONEAREST);
    const std::string name = rounding == FE_TONEAREST ? "mode: " : "mode, rounding up: ";
    report(before == after, name + "the caller's is unchanged");
    report(v == 0 && m > 0, name + "a denormal result is flushed");
  }
}

}  // namespace

int main(int argc, char** argv) {
  check_threads();
  if (argc < 2 || std::string(argv[1]) != "threads") {
    check_conversions<Float16>(kFormats[0]);
    check_conversions<BFloat16>(kFormats[1]);
    check_mode();
    std::printf("digest %016" PRIx64 "\n", check_kernels());
  }
  return failures == 0 ? 0 : 1;
}
