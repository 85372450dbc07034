// SPDX-License-Identifier: Apache-2.0
// The floating-point mode of the current thread: rounding, denormals and traps. A caller may have changed it
// (fesetround, feenableexcept, -ffast-math), so the library sets its own mode for its arithmetic and then restores the
// caller's mode, which therefore never influences a result.
#pragma once

#include <cstdint>

namespace fastadam {

#if defined(__x86_64__) || defined(__i386__)
// MXCSR. FTZ is bit 15, the rounding mode bits 13 and 14, DAZ bit 6; bits 7 to 12 mask the exceptions, and bits 0 to 5
// record the exceptions that have happened.
constexpr uint64_t kDefaultMode = 0x1f80;
constexpr uint64_t kFlushMode = 0x9fc0;
constexpr uint64_t kModeBits = 0xffc0;
inline uint64_t read_float_mode() { return __builtin_ia32_stmxcsr(); }
inline void write_float_mode(uint64_t mode) { __builtin_ia32_ldmxcsr(static_cast<unsigned>(mode)); }
#elif defined(__aarch64__)
constexpr uint64_t kDefaultMode = 0;                // FPCR
constexpr uint64_t kFlushMode = uint64_t{1} << 24;  // FZ
constexpr uint64_t kModeBits = ~uint64_t{0};
inline uint64_t read_float_mode() {
  uint64_t mode;
  asm volatile("mrs %0, fpcr" : "=r"(mode));
  return mode;
}
inline void write_float_mode(uint64_t mode) { asm volatile("msr fpcr, %0" : : "r"(mode) : "memory"); }
#else
#error "fastadam: flush-to-zero is not implemented for this architecture; results would differ from other machines"
#endif

// For kernels: flush-to-zero, denormals-are-zero, round to nearest and no traps, until the end of the scope. TF runs
// its kernels in this mode; without it decaying moments become denormal, which makes every step many times slower.
class FlushDenormals {
 public:
  FlushDenormals() : saved_(read_float_mode()) { write_float_mode(kFlushMode); }
  ~FlushDenormals() { write_float_mode(saved_); }
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

 private:
  uint64_t saved_;
};

// For the numbers of a step, such as scalars and clip factors, and for checks: the mode in which a program starts.
// Entry points have it around the whole call. Costs next to nothing if the caller is in this mode, as nearly all are.
class DefaultArithmetic {
 public:
  DefaultArithmetic() : saved_(read_float_mode()) {
    if (is_other()) write_float_mode(kDefaultMode);
    keep_order();
  }
  ~DefaultArithmetic() {
    keep_order();
    if (is_other()) write_float_mode(saved_);
  }
  DefaultArithmetic(const DefaultArithmetic&) = delete;
  DefaultArithmetic& operator=(const DefaultArithmetic&) = delete;

 private:
  bool is_other() const { return (saved_ & kModeBits) != kDefaultMode; }

  // Keeps the compiler from moving arithmetic with memory operands out of the scope.
  static void keep_order() { asm volatile("" : : : "memory"); }

  uint64_t saved_;
};

}  // namespace fastadam
