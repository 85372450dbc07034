// SPDX-License-Identifier: Apache-2.0
// The state of the fake runtime: what is queued, recorded and logged.
#pragma once

#include <cuda_runtime.h>

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "device_memory.h"

namespace fake_cuda {

struct Work {
  unsigned devices;  // the devices whose memory it may access, one bit each
  std::function<void()> run;
};

// The numbers of pieces of work, counted from 1 in the order of issue. Those that are no longer queued have run.
using WorkIds = std::vector<uint64_t>;

struct QueuedWork {
  Work work;
  WorkIds after;  // what has to run before it
};

struct Capture {
  cudaStream_t origin;
  std::vector<Work> work;
  bool is_valid = true;
};

struct Stream {
  int device;                        // kCallersDevice for the built-in streams
  std::shared_ptr<Capture> capture;  // the capture that records this stream, if any
  WorkIds last;                      // the next work runs after these: the last work, and what was waited for since
};
constexpr int kCallersDevice = -1;

struct Event {
  int device;
  bool is_recorded = false;
  WorkIds after;                     // it has happened when these have run
  std::shared_ptr<Capture> capture;  // the capture in which it was recorded, if any
};

struct Runtime {
  std::mutex mutex;  // held by every call, so that only one thread at a time runs work
  Memory memory;
  std::map<uint64_t, QueuedWork> queue;
  uint64_t issued = 0;         // the total number of pieces of work
  std::vector<void*> dropped;  // memory of libraries that is freed when no work is queued
  std::map<cudaStream_t, Stream> streams{{nullptr, {kCallersDevice, {}, {}}},
                                         {cudaStreamPerThread, {kCallersDevice, {}, {}}}};
  std::map<cudaEvent_t, Event> events;
  std::vector<std::vector<Work>> graphs;
  int device_count = 1;
  cudaError_t device_error = cudaSuccess;
  cudaError_t fault = cudaSuccess;  // raised by work; it stays, as in CUDA
  std::map<std::string, cudaError_t> failures;
  std::string log;
  int (*is_locked)() = nullptr;  // whether the calling thread holds a lock that it must not hold while it waits

  Stream* find_stream(cudaStream_t stream);
  cudaStream_t make_stream(int device);
  uintptr_t make_handle() { return next_handle_ += 16; }

  // Adds work to the capture of the stream or to the queue. The streams that tests make are non-blocking: nothing but
  // events orders them and the legacy stream.
  cudaError_t issue(Stream& stream, Work work);
  // Runs what these need and these, in the order of issue.
  cudaError_t run_until(const WorkIds& ids);
  // Runs everything, the last issued work as early as its stream and events allow, so that work that lacks an order
  // shows it.
  cudaError_t run_queue();
  bool is_capturing() const;
  cudaError_t refuse_in_capture();  // also invalidates every capture
  bool may_allocate() const;        // or free, in the calling thread

 private:
  uintptr_t next_handle_ = 0x1000;  // never used twice; not an address
};

Runtime& runtime();
int& current_device();                  // of the calling thread
cudaError_t& last_error();              // of the calling thread
cudaStreamCaptureMode& capture_mode();  // of the calling thread
int device_of(const Stream& stream);

const auto kNoStream = reinterpret_cast<cudaStream_t>(~uintptr_t{0});

// Logs a call, and returns the failure that a test has requested for it.
cudaError_t log_call(const char* name, cudaStream_t stream, const std::string& detail);
// Logs a call, and returns a requested failure or the error that every call would return now.
cudaError_t begin_call(const char* name, cudaStream_t stream, const std::string& detail);
cudaError_t remember(cudaError_t error);

// The detail of a call that waits for the device: "locked" or nothing.
std::string wait_detail();

template <class Run>
cudaError_t call(const char* name, const std::string& detail, Run run) {
  const std::lock_guard lock(runtime().mutex);
  const cudaError_t error = begin_call(name, kNoStream, detail);
  return remember(error == cudaSuccess ? run(runtime()) : error);
}

template <class Run>
cudaError_t call(const char* name, cudaStream_t on, const std::string& detail, Run run) {
  const std::lock_guard lock(runtime().mutex);
  const cudaError_t error = begin_call(name, on, detail);
  if (error != cudaSuccess) return remember(error);
  Stream* stream = runtime().find_stream(on);
  return remember(stream == nullptr ? cudaErrorInvalidResourceHandle : run(runtime(), *stream));
}

}  // namespace fake_cuda
