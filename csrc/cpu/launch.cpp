// SPDX-License-Identifier: Apache-2.0
#include "launch.h"

#if defined(_OPENMP)
#include <omp.h>
#endif
#include <pthread.h>
#if defined(__linux__)
#include <sched.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "../core/split.h"
#include "dispatch.h"
#include "flush_denormals.h"

namespace fastadam::cpu {
namespace {

// Below this many elements per thread, waking a thread costs more than it saves (bench/README.md).
constexpr int64_t kMinElementsPerThread = 16384;

// From here on a step does not fit in cache: 16 bytes per element are 32 MiB.
constexpr int64_t kPrefetchElements = int64_t{1} << 21;

std::atomic<int> thread_setting{0};

// libgomp's pool does not survive fork(): a parallel region in the child would wait for threads that are not there.
std::atomic<bool> forked{false};
[[maybe_unused]] const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked = true; });

int cpus_allowed() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

int default_threads() {
#if defined(_OPENMP)
  if (std::getenv("OMP_NUM_THREADS") != nullptr) return std::max(1, omp_get_max_threads());
  return std::min(std::max(1, omp_get_max_threads()), cpus_allowed());
#else
  return cpus_allowed();
#endif
}

template <class Share>
void run_on_std_threads(int shares, const Share& share) {
  std::vector<std::thread> helpers;
  helpers.reserve(static_cast<size_t>(shares - 1));
  int started = 1;
  try {
    for (; started < shares; ++started) helpers.emplace_back([&share, started] { share(started); });
  } catch (const std::system_error&) {
    // No more threads to be had: the shares that are left run here.
  }
  share(0);
  for (int rest = started; rest < shares; ++rest) share(rest);
  for (std::thread& helper : helpers) helper.join();
}

template <class Share>
void run_shares(int shares, const Share& share) {
#if defined(_OPENMP)
  if (!forked) {
// The runtime may give fewer threads than asked for; each then takes several shares.
#pragma omp parallel num_threads(shares)
    for (int index = omp_get_thread_num(); index < shares; index += omp_get_num_threads()) share(index);
    return;
  }
#endif
  run_on_std_threads(shares, share);
}

}  // namespace

void set_num_threads(int count) { thread_setting = count; }

int requested_threads() { return thread_setting; }

int num_threads() {
  const int requested = thread_setting;
  return requested > 0 ? requested : default_threads();
}

void run_step(StepArgs step) {
  const Kernels& kernels = *current_isa().kernels;
  const int64_t total = step.offsets[step.head_count];
  step.prefetch = total >= kPrefetchElements;
  const int64_t useful = total / kMinElementsPerThread;
  const int shares = useful <= 1 ? 1 : static_cast<int>(std::min<int64_t>(useful, num_threads()));

  const auto place = [&step](int64_t k) {
    const TensorArgs& tensor = step.tensors[step.heads[k]];
    return std::pair<uint64_t, int64_t>(reinterpret_cast<uintptr_t>(tensor.var), size_of(tensor.dtype));
  };
  const auto update = [&step, &kernels](int64_t k, int64_t begin, int64_t end) {
    for (int64_t t = step.heads[k]; t >= 0; t = step.tensors[t].next) {
      const TensorArgs& tensor = step.tensors[t];
      kernels.dense[static_cast<int>(tensor.dtype)][step.amsgrad][step.transform](step, tensor, begin, end);
    }
  };
  const auto share = [&](int index) {
    const FlushDenormals flush;
    for_each_piece(step.offsets, step.head_count, index, shares, place, update);
  };
  if (shares == 1) {
    share(0);
  } else {
    run_shares(shares, share);
  }
}

}  // namespace fastadam::cpu
