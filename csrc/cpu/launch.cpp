// SPDX-License-Identifier: Apache-2.0
#include "launch.h"

#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>
#include <utility>

#include "../core/float_mode.h"
#include "../core/norm.h"
#include "../core/split.h"
#include "../core/telemetry.h"
#include "../core/undo.h"
#include "dispatch.h"
#include "pool.h"

namespace fastadam::cpu {
namespace {

// With fewer elements per thread, waking another thread costs more than it saves (bench/README.md).
constexpr int64_t kMinElementsPerThread = 16384;
// A step with fewer elements ends (after 50 us) before a sleeping thread would wake up.
constexpr int64_t kMinElementsToWake = int64_t{1} << 17;
// The elements that a thread takes at a time: few enough to balance the load, enough to be worth an atomic operation.
constexpr int64_t kMinElementsPerBlock = 1024;
constexpr int64_t kMaxBlocksPerShare = 64;
// A step with more elements does not fit in cache: 16 bytes per element are 32 MiB.
constexpr int64_t kPrefetchElements = int64_t{1} << 21;

std::atomic<int> thread_setting{0};
thread_local int thread_budget = 0;

int cpus_allowed() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

// Calls visit(chain, begin, end) for each piece of one block of the elements of all variables.
template <class Visit>
void for_each_chain(const Chains& chains, int64_t block, int64_t blocks, Visit visit) {
  for_each_piece(chains.offsets, chains.count, block, blocks, visit);
}

// Whether rows are brought up to date. They may have missed many steps, so such a step is never short.
bool catches_up(const Chains& chains) {
  return std::any_of(chains.heads, chains.heads + chains.count,
                     [&](int64_t head) { return moves_rows_alone(chains.tensors[head], false); });
}

// Makes stores that went past the caches visible to other threads.
void finish_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Tasks for run_blocks(): each is cut into `blocks` equal parts, and run_block(i) does part i.
struct StepTask {
  StepArgs step;
  const Kernels* kernels;
  int64_t blocks;

  UpdateKernel kernel_for(const TensorArgs& tensor) const {
    const auto dtype = static_cast<int>(tensor.dtype);
    if (is_small(tensor)) return kernels->small[dtype];
    if (tensor.rows == nullptr && tensor.stale == nullptr) return kernels->dense[dtype];
    return moves_rows_alone(tensor, step.lazy) ? kernels->touched_rows[dtype] : kernels->all_rows[dtype];
  }

  // Whether all averages of a variable move: where only rows do, their kernel moves those of the rows.
  bool has_average(const TensorArgs& head) const {
    return head.average != nullptr && !moves_rows_alone(head, step.lazy);
  }

  void run_block(int64_t block) const {
    const FlushDenormals flush;
    for_each_chain(step.chains, block, blocks, [this](int64_t k, int64_t begin, int64_t end) {
      const TensorArgs& head = step.chains.tensors[step.chains.heads[k]];
      const bool is_followed = step.zero_gradients || has_average(head) || head.copy != nullptr;
      const bool is_recorded = step.log != nullptr || head.telemetry != nullptr;
      if (!is_followed && !is_recorded) return update(head, begin, end);
      for (int64_t at = begin; at < end; at += kTile) run_tile(k, at, std::min(at + kTile, end));
    });
    if (step.prefetch) finish_streams();
  }

  // The steps of all gradients of one variable.
  void update(const TensorArgs& head, int64_t begin, int64_t end) const {
    for (const TensorArgs* tensor = &head;; tensor = step.chains.tensors + tensor->next) {
      kernel_for (*tensor)(step, *tensor, begin, end);
      if (tensor->next < 0) return;
    }
  }

  void zero_gradients(const TensorArgs& head, int64_t begin, int64_t end) const {
    for (const TensorArgs* tensor = &head;; tensor = step.chains.tensors + tensor->next) {
      const auto item = static_cast<size_t>(size_of(tensor->grad_dtype));
      char* grad = static_cast<char*>(const_cast<void*>(tensor->grad));
      std::memset(grad + static_cast<size_t>(begin) * item, 0, static_cast<size_t>(end - begin) * item);
      if (tensor->next < 0) return;
    }
  }

  // The steps of one tile of variable k, and what is made of it while it is in cache.
  void run_tile(int64_t k, int64_t begin, int64_t end) const {
    const TensorArgs& head = step.chains.tensors[step.chains.heads[k]];
    const auto dtype = static_cast<int>(head.dtype);
    if (step.log != nullptr) {
      kernels->logged(step, head, begin, end, step.log->tile(k, begin));
    } else if (head.telemetry == nullptr) {
      update(head, begin, end);
    } else {
      const int64_t tile = step.measure_offsets[k] + begin / kTile;
      step.measures[tile] = kernels->measured[dtype](step, head, begin, end);
    }
    if (step.zero_gradients) zero_gradients(head, begin, end);
    if (has_average(head)) kernels->average[dtype](step, head, begin, end);
    if (head.copy != nullptr) kernels->copy[static_cast<int>(head.copy_dtype)](step, head, begin, end);
  }
};

// Finds the tiles whose gradients have changed since they were logged.
struct CheckTask {
  StepArgs step;
  const Kernels* kernels;
  int64_t blocks;

  void run_block(int64_t block) const {
    const FlushDenormals flush;
    for_each_chain(step.chains, block, blocks, [this](int64_t k, int64_t begin, int64_t end) {
      const TensorArgs& tensor = step.chains.tensors[step.chains.heads[k]];
      for (int64_t at = begin; at < end; at += kTile) {
        const int64_t place = step.log->tile(k, at);
        step.log->tiles[place].is_changed =
            !kernels->has_logged_gradient(step, tensor, at, std::min(at + kTile, end), place);
      }
    });
  }
};

// Undoes a logged step, and makes another in its place while a tile is in cache, if that is not null.
struct UndoTask {
  StepArgs step;
  const StepTask* instead;
  const Kernels* kernels;
  int64_t blocks;

  void run_block(int64_t block) const {
    const FlushDenormals flush;
    for_each_chain(step.chains, block, blocks, [this](int64_t k, int64_t begin, int64_t end) {
      const TensorArgs& tensor = step.chains.tensors[step.chains.heads[k]];
      for (int64_t at = begin; at < end; at += kTile) {
        const int64_t last = std::min(at + kTile, end);
        kernels->undo(step, tensor, at, last, step.log->tile(k, at));
        if (instead != nullptr) {
          instead->run_tile(k, at, last);
        } else if (tensor.copy != nullptr) {
          kernels->copy[static_cast<int>(tensor.copy_dtype)](step, tensor, at, last);
        }
      }
    });
    if (step.prefetch) finish_streams();
  }
};

struct AccumulateTask {
  AccumulateArgs args;
  const Kernels* kernels;
  int64_t blocks;

  void run_block(int64_t block) const {
    const FlushDenormals flush;
    for_each_chain(args.chains, block, blocks, [this](int64_t k, int64_t begin, int64_t end) {
      const TensorArgs* tensors = args.chains.tensors;
      const int64_t head = args.chains.heads[k];
      for (int64_t t = head; t >= 0; t = tensors[t].next) {
        const AccumulateKernel accumulate = kernels->accumulate[static_cast<int>(tensors[t].grad_dtype)];
        accumulate(tensors[t], begin, end, args.restart && t == head);
      }
    });
  }
};

struct SumTask {
  SumArgs args;
  const Kernels* kernels;
  int64_t blocks;

  void run_block(int64_t block) const {
    const FlushDenormals flush;
    for_each_piece(args.offsets, args.tensor_count, block, blocks, [this](int64_t i, int64_t begin, int64_t end) {
      const TensorArgs& tensor = args.tensors[i];
      kernels->sum_rows[static_cast<int>(tensor.grad_dtype)](tensor, begin, end, args.sums[i]);
    });
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
      const int64_t size = std::min(kNormBlock, tensor.grad_size - begin);
      const NormKernel sum_squares = kernels->norm[static_cast<int>(tensor.grad_dtype)][args.require_finite];
      args.sums[i] = args.units == nullptr
                         ? sum_squares(tensor.grad, begin, size, args.clip_value)
                         : kernels->rescaled_norm(tensor.grad, begin, size, args.clip_value, args.units[t]);
    }
  }
};

template <class Task>
void run_task(Task& task, int64_t elements, bool may_be_short = true) {
  const int64_t useful_threads = elements / kMinElementsPerThread;
  // num_threads() makes a system call for the affinity, so it is called only if more than one thread is useful.
  const int threads = useful_threads <= 1 || thread_budget == 1 ? 1 : num_threads();
  const int most = thread_budget > 0 ? std::min(threads, thread_budget) : threads;
  const int shares = static_cast<int>(std::min<int64_t>(std::max<int64_t>(useful_threads, 1), most));
  const int64_t per_share =
      std::min(kMaxBlocksPerShare, std::max<int64_t>(1, elements / shares / kMinElementsPerBlock));
  task.blocks = shares == 1 ? 1 : shares * per_share;
  run_blocks(task, task.blocks, shares, may_be_short && elements < kMinElementsToWake);
}

}  // namespace

void set_num_threads(int count) { thread_setting = count; }

int set_thread_budget(int threads) { return std::exchange(thread_budget, threads); }

int requested_threads() { return thread_setting; }

int num_threads() {
  const int requested = thread_setting;
  return requested > 0 ? requested : cpus_allowed();
}

void run_step(const StepArgs& step) {
  const int64_t elements = step.chains.offsets[step.chains.count];
  StepTask task{step, current_isa().kernels, 1};
  task.step.prefetch = elements >= kPrefetchElements;
  run_task(task, elements, !catches_up(step.chains));
}

void run_check(const StepArgs& step) {
  CheckTask task{step, current_isa().kernels, 1};
  run_task(task, step.chains.offsets[step.chains.count]);
}

void run_undo(const StepArgs& step, const StepArgs* instead) {
  const int64_t elements = step.chains.offsets[step.chains.count];
  const Kernels* kernels = current_isa().kernels;
  UndoTask task{step, nullptr, kernels, 1};
  task.step.prefetch = elements >= kPrefetchElements;
  StepTask other{step, kernels, 1};
  if (instead != nullptr) {
    other.step = *instead;  // its tiles are in cache
    task.instead = &other;
  }
  run_task(task, elements);
}

void run_accumulate(const AccumulateArgs& args) {
  AccumulateTask task{args, current_isa().kernels, 1};
  run_task(task, args.chains.offsets[args.chains.count]);
}

void run_norm(const NormArgs& args) {
  NormTask task{args, current_isa().kernels, 1};
  run_task(task, args.block_offsets[args.tensor_count] * kNormBlock);
}

void run_sum_rows(const SumArgs& args) {
  SumTask task{args, current_isa().kernels, 1};
  run_task(task, args.value_count);
}

}  // namespace fastadam::cpu
