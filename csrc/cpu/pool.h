// SPDX-License-Identifier: Apache-2.0
// Threads for one job at a time: the caller and helpers that sleep between steps.
//
// Why not an OpenMP region: its closing barrier waits for every thread of the team, even one that was never scheduled.
// After a NumPy matrix product the BLAS threads still spin on their cores, and such a step took 5 times as long
// (bench/README.md). Here nobody waits for a helper that has not begun: the caller takes its work, and a short job
// wakes nobody unless it is one of many in a row. The pool also survives fork(), after which a libgomp region hangs.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

namespace fastadam::cpu {

// The blocks of `shares` equal shares. A thread takes the blocks of its own share in order, then those left in others.
class Job {
 public:
  using RunBlock = void (*)(const void* context, int64_t block);

  // `is_short`: done before a helper that sleeps would be awake.
  Job(int shares, int64_t blocks_per_share, RunBlock run_block, const void* context, bool is_short);

  // What a thread does with the job; returns when no block is left to begin.
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

// Runs every block of the job and returns when all are done. Called from two threads at once, one works alone.
void run_job(Job& job);

// task.run_block(i) for each i in [0, blocks), on at most `threads` threads; see Job.
template <class Task>
void run_blocks(const Task& task, int64_t blocks, int threads, bool is_short = false) {
  struct Context {
    const Task& task;
    int64_t blocks;
  };
  const Context context{task, blocks};
  const auto run_block = [](const void* given, int64_t block) {
    const Context& c = *static_cast<const Context*>(given);
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
