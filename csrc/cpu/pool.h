// SPDX-License-Identifier: Apache-2.0
// A thread pool that runs one job at a time, on the caller's thread and on helpers that sleep between steps.
//
// It is used instead of OpenMP because the barrier at the end of an OpenMP region waits for every thread of the team,
// even for one that was never scheduled. After a NumPy matrix product the BLAS threads still spin on their cores, and a
// step took 5 times as long (bench/README.md). Here nobody waits for a helper that has not started: the caller does its
// share, and a short job wakes no helper unless it is one of many in a row. The pool also survives fork(), after which
// a libgomp region hangs.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

namespace fastadam::cpu {

// The blocks of work of one call, in `shares` equal shares. A thread takes the blocks of its own share in order, then
// the blocks that are left in other shares.
class Job {
 public:
  using RunBlock = void (*)(const void* context, int64_t block);

  // `is_short`: the job ends before a sleeping helper would wake up.
  Job(int shares, int64_t blocks_per_share, RunBlock run_block, const void* context, bool is_short);

  // Takes and runs blocks until none is left. Called by every thread that works on the job.
  void work(int own_share);

  int shares() const { return shares_; }
  bool is_short() const { return is_short_; }

 private:
  struct alignas(64) Cursor {
    std::atomic<int64_t> next{0};
  };

  const int shares_;
  const int64_t blocks_per_share_;
  const RunBlock run_block_;
  const void* const context_;
  const bool is_short_;
  const std::unique_ptr<Cursor[]> cursors_;
};

// Runs every block of the job and returns when all are done. If two threads call at once, one of them gets no helpers.
void run_job(Job& job);

// Calls task.run_block(i) for each i in [0, blocks), on at most `threads` threads.
template <class Task>
void run_blocks(const Task& task, int64_t blocks, int threads, bool is_short = false) {
  struct Context {
    const Task& task;
    int64_t blocks;
  };
  const Context context{task, blocks};
  const auto run_block = [](const void* data, int64_t block) {
    const Context& c = *static_cast<const Context*>(data);
    if (block < c.blocks) c.task.run_block(block);
  };
  if (threads == 1 || blocks == 1) {
    for (int64_t block = 0; block < blocks; ++block) task.run_block(block);
    return;
  }
  Job job(threads, (blocks + threads - 1) / threads, run_block, &context, is_short);
  run_job(job);
}

}  // namespace fastadam::cpu
