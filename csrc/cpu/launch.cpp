// SPDX-License-Identifier: Apache-2.0
#include "launch.h"

#if defined(__linux__)
#include <sched.h>
#endif

#include <algorithm>
#include <atomic>
#include <thread>
#include <utility>

#include "../core/norm.h"
#include "../core/split.h"
#include "dispatch.h"
#include "flush_denormals.h"
#include "pool.h"

namespace fastadam::cpu {
namespace {

// Below this many elements per thread, waking a thread costs more than it saves (bench/README.md).
constexpr int64_t kMinElementsPerThread = 16384;
// What a thread takes at a time: small enough to level the load, large enough to be worth an atomic operation.
constexpr int64_t kMinElementsPerBlock = 4096;
constexpr int64_t kMaxBlocksPerShare = 64;
// From here on a step does not fit in cache: 16 bytes per element are 32 MiB.
constexpr int64_t kPrefetchElements = int64_t{1} << 21;

std::atomic<int> thread_setting{0};

int cpus_allowed() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

// A task is cut into `blocks` equal parts; run_block(i) does part i.
struct StepTask {
  StepArgs step;
  const Kernels* kernels;
  int64_t blocks;

  void run_block(int64_t block) const {
    const FlushDenormals flush;
    const auto place = [this](int64_t k) {
      const TensorArgs& tensor = step.tensors[step.heads[k]];
      return std::pair<uint64_t, int64_t>(reinterpret_cast<uintptr_t>(tensor.var), size_of(tensor.dtype));
    };
    const auto update = [this](int64_t k, int64_t begin, int64_t end) {
      for (int64_t t = step.heads[k]; t >= 0; t = step.tensors[t].next) {
        const TensorArgs& tensor = step.tensors[t];
        kernels->dense[static_cast<int>(tensor.dtype)][step.amsgrad][step.transform](step, tensor, begin, end);
      }
      const TensorArgs& tensor = step.tensors[step.heads[k]];
      if (tensor.average != nullptr) kernels->average[static_cast<int>(tensor.dtype)](step, tensor, begin, end);
    };
    for_each_piece(step.offsets, step.head_count, block, blocks, place, update);
  }
};

struct NormTask {
  NormArgs args;
  const Kernels* kernels;
  int64_t blocks;

  void run_block(int64_t block) const {
    const FlushDenormals flush;
    const int64_t total = args.block_offsets[args.tensor_count];
    const int64_t last = share_begin(total, block + 1, blocks);
    int64_t i = share_begin(total, block, blocks);
    for (int64_t t = find_variable(args.block_offsets, args.tensor_count, i); i < last; ++i) {
      while (args.block_offsets[t + 1] <= i) ++t;
      const TensorArgs& tensor = args.tensors[t];
      const int64_t begin = (i - args.block_offsets[t]) * kNormBlock;
      const int64_t size = std::min(kNormBlock, tensor.size - begin);
      args.sums[i] = kernels->norm[static_cast<int>(tensor.dtype)](tensor.grad, begin, size, args.clip_value);
    }
  }
};

template <class Task>
void run_task(Task& task, int64_t elements) {
  const int64_t useful_threads = elements / kMinElementsPerThread;
  // The affinity is a system call: asked for once, and only where it matters.
  const int shares = useful_threads <= 1 ? 1 : static_cast<int>(std::min<int64_t>(useful_threads, num_threads()));
  if (shares == 1) return task.run_block(0);
  const int64_t per_share =
      std::min(kMaxBlocksPerShare, std::max<int64_t>(1, elements / shares / kMinElementsPerBlock));
  task.blocks = shares * per_share;
  const auto run_block = [](const void* context, int64_t block) {
    static_cast<const Task*>(context)->run_block(block);
  };
  Job job(shares, per_share, run_block, &task);
  run_job(job);
}

}  // namespace

void set_num_threads(int count) { thread_setting = count; }

int requested_threads() { return thread_setting; }

int num_threads() {
  const int requested = thread_setting;
  return requested > 0 ? requested : cpus_allowed();
}

void run_step(const StepArgs& step) {
  const int64_t elements = step.offsets[step.head_count];
  StepTask task{step, current_isa().kernels, 1};
  task.step.prefetch = elements >= kPrefetchElements;
  run_task(task, elements);
}

void run_norm(const NormArgs& args) {
  NormTask task{args, current_isa().kernels, 1};
  run_task(task, args.block_offsets[args.tensor_count] * kNormBlock);
}

}  // namespace fastadam::cpu
