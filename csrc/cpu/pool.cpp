// SPDX-License-Identifier: Apache-2.0
#include "pool.h"

#include <pthread.h>
#include <signal.h>

#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>

namespace fastadam::cpu {
namespace {

// Helpers spin this long before they sleep: long enough to catch the next of several small steps in a row, short enough
// not to keep a core from BLAS.
constexpr std::chrono::microseconds kSpin{40};
// After this many jobs, each within kSpin of the previous one, the caller must be in a loop of steps: one step has
// fewer jobs. From then on short jobs wake helpers too.
constexpr int kManyInARow = 8;
using Clock = std::chrono::steady_clock;

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

template <class Condition>
bool spin_until(const Condition& condition) {
  const auto deadline = Clock::now() + kSpin;
  while (Clock::now() < deadline) {
    for (int i = 0; i < 16; ++i) {
      if (condition()) return true;
      relax();
    }
  }
  return condition();
}

class Pool {
 public:
  void run(Job& job) {
    const std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn.owns_lock()) return job.work(0);
    const bool wakes = !job.is_short() || is_one_of_many();
    if (wakes) start_helpers(job.shares() - 1);
    open(job, wakes);
    job.work(0);
    close();
    ended_ = Clock::now();
  }

 private:
  void start_helpers(int count) {
    if (helpers_ >= count) return;
    // Blocks all signals in helpers: the interpreter's own threads must handle them.
    sigset_t all;
    sigset_t before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
      for (; helpers_ < count; ++helpers_) std::thread(&Pool::help, this, helpers_ + 1).detach();
    } catch (const std::exception&) {
      // The system has no more threads. The existing ones do the work.
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  bool is_one_of_many() {
    in_a_row_ = Clock::now() - ended_ < kSpin ? in_a_row_ + 1 : 0;
    return in_a_row_ >= kManyInARow;
  }

  // A helper that is awake sees the job without taking a lock. A helper that is about to sleep first increments
  // sleeping_ and then checks generation_; here the order is the opposite. So it either sees the job or is woken.
  void open(Job& job, bool wakes) {
    job_ = &job;
    ++generation_;
    if (sleeping_ == 0 || !wakes) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    opened_.notify_all();
  }

  // Lets no further helper start, and waits for those that work on the job. Each finishes at most one more block.
  void close() {
    job_ = nullptr;
    const auto empty = [this] { return inside_ == 0; };
    if (spin_until(empty)) return;
    std::unique_lock<std::mutex> lock(mutex_);
    closing_ = true;
    left_.wait(lock, empty);
    closing_ = false;
  }

  void help(int index) {
    uint64_t seen = 0;
    while (true) {
      wait_for_job(seen);
      seen = generation_;
      ++inside_;  // before job_ is read: from here on close() waits for this helper
      Job* const job = job_;
      if (job != nullptr && index < job->shares()) job->work(index);
      if (--inside_ > 0 || !closing_) continue;
      const std::lock_guard<std::mutex> lock(mutex_);
      left_.notify_one();
    }
  }

  void wait_for_job(uint64_t seen) {
    const auto changed = [this, seen] { return generation_ != seen; };
    if (spin_until(changed)) return;
    std::unique_lock<std::mutex> lock(mutex_);
    ++sleeping_;
    opened_.wait(lock, changed);
    --sleeping_;
  }

  std::mutex turn_;  // held during a whole job
  std::mutex mutex_;
  std::condition_variable opened_;
  std::condition_variable left_;
  std::atomic<Job*> job_{nullptr};
  std::atomic<uint64_t> generation_{0};
  std::atomic<int> inside_{0};
  std::atomic<int> sleeping_{0};
  std::atomic<bool> closing_{false};
  // Guarded by turn_.
  int helpers_ = 0;
  int64_t in_a_row_ = 0;
  Clock::time_point ended_;  // when the last job ended
};

// Never destroyed: helpers may still use it while the process exits.
Pool* pool = new Pool;

// A forked child has no helper threads, and another thread may have held a lock when it forked, so it gets a new pool.
[[maybe_unused]] const int fork_handler = pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });

}  // namespace

Job::Job(int shares, int64_t blocks_per_share, RunBlock run_block, const void* context, bool is_short)
    : shares_(shares),
      blocks_per_share_(blocks_per_share),
      run_block_(run_block),
      context_(context),
      is_short_(is_short),
      cursors_(new Cursor[static_cast<size_t>(shares)]) {}

void Job::work(int own_share) {
  for (int turn = 0; turn < shares_; ++turn) {
    const int share = (own_share + turn) % shares_;
    std::atomic<int64_t>& next = cursors_[static_cast<size_t>(share)].next;
    while (next.load(std::memory_order_relaxed) < blocks_per_share_) {
      const int64_t block = next.fetch_add(1, std::memory_order_relaxed);
      if (block >= blocks_per_share_) break;
      run_block_(context_, share * blocks_per_share_ + block);
    }
  }
}

void run_job(Job& job) { pool->run(job); }

}  // namespace fastadam::cpu
