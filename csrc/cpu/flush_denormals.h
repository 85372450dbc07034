// SPDX-License-Identifier: Apache-2.0
// Sets flush-to-zero, denormals-are-zero, round to nearest and no traps for the current thread, and restores the
// caller's mode at the end of the scope. The caller's mode therefore never influences a result. TF runs its kernels in
// the same mode; without it decaying moments become denormal, which makes every step many times slower.
#pragma once

#include <cstdint>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace fastadam::cpu {

class FlushDenormals {
 public:
  FlushDenormals() : saved_(read()) { write(kFlush); }
  ~FlushDenormals() { write(saved_); }
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

 private:
#if defined(__x86_64__) || defined(__i386__)
  static constexpr uint64_t kFlush = 0x9fc0;  // MXCSR: FTZ is bit 15, DAZ bit 6, all exceptions masked
  static uint64_t read() { return _mm_getcsr(); }
  static void write(uint64_t mode) { _mm_setcsr(static_cast<unsigned>(mode)); }
#elif defined(__aarch64__)
  static constexpr uint64_t kFlush = uint64_t{1} << 24;  // FPCR.FZ
  static uint64_t read() {
    uint64_t mode;
    asm volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
  }
  static void write(uint64_t mode) { asm volatile("msr fpcr, %0" : : "r"(mode) : "memory"); }
#else
#error "fastadam: flush-to-zero is not implemented for this architecture; results would differ from other machines"
#endif

  uint64_t saved_;
};

}  // namespace fastadam::cpu
