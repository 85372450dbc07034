// SPDX-License-Identifier: Apache-2.0
// The check that _FORTIFY_SOURCE adds takes a longjmp from one stack to another for an error.
#undef _FORTIFY_SOURCE
#include "grid.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

#include <algorithm>
#include <stdexcept>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace fake_cuda {
namespace {

constexpr unsigned kMostThreads = 1024;
constexpr unsigned kWarp = 32;
constexpr size_t kStackBytes = 131072;  // the first page, of up to 64 KiB, is a guard page

enum class State { kRuns, kAtWarpBarrier, kAtBlockBarrier, kEnded };

// Has its own stack, which is never freed, and runs one thread of a block after another on it. setjmp does not save the
// floating-point mode, so threads use the mode of the caller of run_grid.
struct Fiber {
  void* sanitized = nullptr;  // ThreadSanitizer's own, which has the calls on the stack
  jmp_buf resume_at;
  State state = State::kEnded;
  bool has_begun = false;
};

Fiber fibers[kMostThreads];
Fiber* current;
jmp_buf scheduler;
const std::function<void()>* thread_function;
bool has_thrown;

#if defined(__SANITIZE_THREAD__)
void* sanitized_scheduler;

[[gnu::no_sanitize_thread]] void tell_sanitizer_of_begin() {
  sanitized_scheduler = __tsan_get_current_fiber();
  if (current->sanitized == nullptr) current->sanitized = __tsan_create_fiber(0);
  __tsan_switch_to_fiber(current->sanitized, 0);
}
[[gnu::no_sanitize_thread]] void tell_sanitizer_of_end() { __tsan_switch_to_fiber(sanitized_scheduler, 0); }
#else
void tell_sanitizer_of_begin() {}
void tell_sanitizer_of_end() {}
#endif

[[gnu::no_sanitize_address]] void leave(State state) {
  current->state = state;
  if (_setjmp(current->resume_at) == 0) {
    tell_sanitizer_of_end();
    _longjmp(scheduler, 1);
  }
}

void run_threads() {
  for (;;) {
    try {
      (*thread_function)();
    } catch (...) {
      has_thrown = true;
    }
    leave(State::kEnded);
  }
}

[[noreturn, gnu::no_sanitize_address]] void begin(size_t fiber) {
  static char* const stacks = [] {
    void* memory = mmap(nullptr, kMostThreads * kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    return static_cast<char*>(memory);
  }();
  char* stack = stacks + fiber * kStackBytes;
  mprotect(stack, static_cast<size_t>(sysconf(_SC_PAGESIZE)), PROT_NONE);
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, run_threads, 0);
  setcontext(&context);
  throw std::runtime_error("setcontext");
}

[[gnu::no_sanitize_address]] State resume(unsigned thread) {
  threadIdx = {thread % blockDim.x, thread / blockDim.x % blockDim.y, thread / blockDim.x / blockDim.y};
  current = &fibers[thread];
  if (_setjmp(scheduler) == 0) {
    tell_sanitizer_of_begin();
    if (current->has_begun) _longjmp(current->resume_at, 1);
    current->has_begun = true;
    begin(thread);
  }
  return current->state;
}

// Runs a warp until its threads have ended or wait for the block. Returns true if any of them waits.
bool run_warp(unsigned first, unsigned end) {
  bool waits_for_warp = true;
  while (waits_for_warp) {
    waits_for_warp = false;
    for (unsigned i = end; i-- > first;) {
      const State state = fibers[i].state;
      if (state == State::kRuns || state == State::kAtWarpBarrier) waits_for_warp |= resume(i) == State::kAtWarpBarrier;
    }
  }
  bool waits_for_block = false;
  for (unsigned i = first; i < end; ++i) waits_for_block |= fibers[i].state == State::kAtBlockBarrier;
  return waits_for_block;
}

void run_block(unsigned threads) {
  for (unsigned i = 0; i < threads; ++i) fibers[i].state = State::kRuns;
  bool waits = true;
  while (waits) {
    waits = false;
    for (unsigned warp = (threads + kWarp - 1) / kWarp; warp-- > 0;) {
      waits |= run_warp(warp * kWarp, std::min(threads, (warp + 1) * kWarp));
    }
    for (unsigned i = 0; i < threads; ++i) {
      if (fibers[i].state == State::kAtBlockBarrier) fibers[i].state = State::kRuns;
    }
  }
}

}  // namespace

bool is_launchable(const dim3& grid, const dim3& block) {
  const bool has_blocks = grid.x - 1 < 0x7fffffff && grid.y - 1 < 65535 && grid.z - 1 < 65535;
  const bool has_threads = block.x - 1 < 1024 && block.y - 1 < 1024 && block.z - 1 < 64;
  return has_blocks && has_threads && block.x * block.y * block.z <= kMostThreads;
}

bool run_grid(const dim3& grid, const dim3& block, const std::function<void()>& thread) {
  gridDim = grid;
  blockDim = block;
  thread_function = &thread;
  has_thrown = false;
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z) {
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) run_block(block.x * block.y * block.z);
    }
  }
  return !has_thrown;
}

}  // namespace fake_cuda

void __syncthreads() { fake_cuda::leave(fake_cuda::State::kAtBlockBarrier); }

void __syncwarp(unsigned) { fake_cuda::leave(fake_cuda::State::kAtWarpBarrier); }
