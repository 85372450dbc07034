// SPDX-License-Identifier: Apache-2.0
// The memory of a step log (../core/undo.h), kept from step to step.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "../core/step_args.h"
#include "../core/undo.h"

namespace fastadam::bind {

// Memory that is not touched before it is written, so the room for the worst case costs nothing.
class LazyMemory {
 public:
  char* get() const { return data_.get(); }

  void resize(int64_t bytes) {
    if (bytes == bytes_) return;
    data_.reset();
    data_.reset(static_cast<char*>(std::malloc(static_cast<size_t>(bytes))));
    bytes_ = data_ == nullptr ? 0 : bytes;
    if (data_ == nullptr && bytes > 0) throw std::bad_alloc();
  }

  // Gives memory back that was written.
  void renew() {
    const int64_t bytes = bytes_;
    bytes_ = -1;
    resize(bytes);
  }

 private:
  struct Free {
    void operator()(char* data) const { std::free(data); }
  };
  std::unique_ptr<char, Free> data_;
  int64_t bytes_ = 0;
};

class LogMemory {
 public:
  LogMemory() = default;
  LogMemory(const LogMemory&) = delete;
  LogMemory& operator=(const LogMemory&) = delete;

  // An empty log for a step of these variables. Throws std::bad_alloc.
  const StepLog& open(const Chains& chains) {
    offsets_.assign(1, 0);
    for (int64_t k = 0; k < chains.count; ++k) {
      offsets_.push_back(offsets_.back() + tiles_of(chains.offsets[k + 1] - chains.offsets[k]));
    }
    const int64_t tiles = offsets_.back();
    codes_.resize(tiles * kTile);
    tiles_.resize(static_cast<size_t>(tiles));
    arena_.resize(tiles * kWholeBytes);
    most_ = used_ > most_ ? used_ : most_;
    const int64_t room = most_ - used_;  // what earlier steps have filled
    steps_with_room_ = room > tiles * kTile / 64 ? steps_with_room_ + 1 : 0;
    if (steps_with_room_ == kStepsWithRoom || room > tiles * kTile / 8) {
      arena_.renew();
      most_ = steps_with_room_ = 0;
    }
    used_ = 0;
    log_ = {reinterpret_cast<uint8_t*>(codes_.get()), tiles_.data(), offsets_.data(), arena_.get(), &used_};
    is_open_ = true;
    return log_;
  }

  // The log of the last step; null if it was undone.
  const StepLog* log() const { return is_open_ ? &log_ : nullptr; }
  void close() { is_open_ = false; }

  // The variables whose gradients had changed when that was last found out.
  std::vector<size_t> changed() const {
    std::vector<size_t> found;
    for (size_t k = 0; k + 1 < offsets_.size(); ++k) {
      const auto first = tiles_.begin() + static_cast<std::ptrdiff_t>(offsets_[k]);
      const auto last = tiles_.begin() + static_cast<std::ptrdiff_t>(offsets_[k + 1]);
      if (std::any_of(first, last, [](const TileLog& tile) { return tile.is_changed; })) found.push_back(k);
    }
    return found;
  }

  // Bytes that the log of the last step takes.
  int64_t size() {
    most_ = used_ > most_ ? used_ : most_;
    return static_cast<int64_t>(tiles_.size()) * (kTile + static_cast<int64_t>(sizeof(TileLog))) + most_;
  }

 private:
  static constexpr int64_t kStepsWithRoom = 16;  // in a row, for little room: new memory costs page faults

  LazyMemory codes_;
  LazyMemory arena_;
  std::vector<TileLog> tiles_;
  std::vector<int64_t> offsets_;
  int64_t used_ = 0;
  int64_t most_ = 0;  // of `used_`, since the arena is new
  int64_t steps_with_room_ = 0;
  bool is_open_ = false;
  StepLog log_{};
};

}  // namespace fastadam::bind
