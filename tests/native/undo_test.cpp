// SPDX-License-Identifier: Apache-2.0
// Checks steps that are logged and undone: every usable ISA, on several threads, against the plain step, bit for bit,
// and that changed gradients are found. Prints a line per check. Its argument is a Scope.
#include "../../csrc/core/undo.h"

#include <string>
#include <thread>
#include <vector>

#include "../../csrc/cpu/launch.h"
#include "harness.h"

namespace {

using namespace kernel_test;

constexpr int64_t kLengths[] = {3, 20011, 1, 512, 4097, 513, 33, 100003, 511};

// Variables, and room for the log of a step.
struct Logged {
  std::vector<Variable> variables;
  std::vector<TensorArgs> tensors;
  std::vector<int64_t> heads;
  std::vector<int64_t> offsets{0};
  std::vector<int64_t> tile_offsets{0};
  std::vector<uint8_t> codes;
  std::vector<TileLog> tiles;
  std::vector<char> arena;
  int64_t used = 0;
  StepLog log{};

  explicit Logged(const Logged* from = nullptr) {
    for (const int64_t size : kLengths) {
      const size_t k = heads.size();
      if (from == nullptr) variables.emplace_back(FASTADAM_FLOAT32, size);
      if (from != nullptr) variables.emplace_back(from->variables[k], 0);
      heads.push_back(static_cast<int64_t>(k));
      offsets.push_back(offsets.back() + size);
      tile_offsets.push_back(tile_offsets.back() + tiles_of(size));
    }
    const auto count = static_cast<size_t>(tile_offsets.back());
    codes.resize(count * kTile);
    tiles.resize(count);
    arena.resize(count * kWholeBytes);
    log = {codes.data(), tiles.data(), tile_offsets.data(), arena.data(), &used};
  }

  StepArgs args(int t, bool amsgrad, int transform, bool is_logged) {
    tensors.clear();
    for (const Variable& variable : variables) tensors.push_back(variable.args(t, amsgrad));
    StepArgs step = step_of(t, amsgrad, transform);
    step.chains = {tensors.data(), heads.data(), offsets.data(), static_cast<int64_t>(heads.size())};
    used = 0;
    step.log = is_logged ? &log : nullptr;
    return step;
  }

  bool any_changed() const {
    bool found = false;
    for (const TileLog& tile : tiles) found = found || tile.is_changed;
    return found;
  }
};

// A logged step has the bits of a plain one, and undoing it gives the bits from before, payloads of NaN aside.
bool check(const Logged& initial, int t, bool amsgrad, int transform) {
  Logged plain(&initial);
  Logged logged(&initial);
  cpu::run_step(plain.args(t, amsgrad, transform, false));
  const StepArgs step = logged.args(t, amsgrad, transform, true);
  cpu::run_step(step);
  bool same = logged.variables == plain.variables;
  cpu::run_undo(step, nullptr);
  return same && logged.variables == initial.variables && !logged.any_changed();
}

void check_modes() {
  const Logged initial;
  Claims claims;
  for (int mode = 0; mode < 2 * kTransformCount; ++mode) {
    for_each_isa([&](const cpu::Isa& isa) {
      for (int t = 0; t < kSteps; ++t) {
        claims.note(isa.name + std::string(" undoes a step to the bit"), check(initial, t, mode % 2 != 0, mode / 2));
      }
    });
  }
}

void check_changes() {
  Claims claims;
  for_each_isa([&](const cpu::Isa& isa) {
    Logged logged;
    const StepArgs step = logged.args(0, true, kAsItIs, true);
    cpu::run_step(step);
    Array& gradient = logged.variables[7].grads;
    gradient.set(700, read(gradient.at(700), FASTADAM_FLOAT32, 0) + 1);
    cpu::run_undo(step, nullptr);
    int64_t changed = 0;
    for (const TileLog& tile : logged.tiles) changed += tile.is_changed ? 1 : 0;
    claims.note(isa.name + std::string(" finds the one tile whose gradient has changed"),
                changed == 1 && logged.tiles[static_cast<size_t>(logged.log.tile(7, 700))].is_changed);
  });
}

// Gradients of less than a row of lanes, with all signs changed: the lanes differ in their high bits.
void check_signs() {
  constexpr int64_t kTrials = 1 << 21;  // with a checksum of 32 bits, one in 2000 runs finds a collision
  uint32_t state = 1;
  int64_t collisions = 0;
  for (int64_t trial = 0; trial < kTrials; ++trial) {
    uint32_t lanes[2][16] = {};
    for (int lane = 0; lane < 10; ++lane) {
      state = state * 1664525u + 1013904223u;
      const float g = static_cast<float>(state >> 8) * 0x1p-24f + 0.5f;
      lanes[0][lane] = checksum_with(0, g);
      lanes[1][lane] = checksum_with(0, -g);
    }
    collisions += checksum_of(lanes[0]) == checksum_of(lanes[1]) ? 1 : 0;
  }
  report(collisions == 0, "a checksum finds changed signs");
}

void check_threads() {
  const Logged initial;
  for (const int threads : {1, 2, 3}) {
    cpu::set_num_threads(threads);
    bool same = true;
    for (int round = 0; round < 3; ++round) same = same && check(initial, round, round % 2 != 0, kClipAndFactor);
    report(same, "threads: " + std::to_string(threads) + " give the bits from before the step");
  }
  bool here = false;
  bool there = false;
  std::thread other([&] {
    cpu::set_thread_budget(1);
    there = check(initial, 1, true, kAsItIs);
  });
  here = check(initial, 2, false, kAndL2);
  other.join();
  report(here && there, "threads: two callers, one with a budget, get the bits from before their steps");
  cpu::set_num_threads(0);
}

}  // namespace

int main(int argc, char** argv) {
  read_scope(argc, argv);
  if (scope != Scope::kEmulated) check_threads();
  if (scope != Scope::kThreads) {
    check_modes();
    check_changes();
  }
  if (scope == Scope::kAll) check_signs();
  return failures == 0 ? 0 : 1;
}
