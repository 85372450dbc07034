// SPDX-License-Identifier: Apache-2.0
// Checks the C++ core without Python: the dense kernels of every usable ISA against a plain scalar loop, bit for bit,
// the half types against their definition, threads, the floating point mode, and one digest for all machines.
// Prints a line per check. Its argument is a Scope.
#include <cfenv>
#include <cmath>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/cpu/launch.h"
#include "harness.h"

namespace {

using namespace kernel_test;

// The digest of the results of check_kernels; see Digests.
constexpr uint64_t kDigest = 0xd463c860c501e513;

void run(const TensorArgs* tensors, int64_t variables, int t, bool amsgrad, int transform) {
  std::vector<int64_t> heads;
  std::vector<int64_t> offsets{0};
  for (int64_t k = 0; k < variables; ++k) {
    heads.push_back(k);
    offsets.push_back(offsets.back() + tensors[k].size);
  }
  StepArgs step = step_of(t, amsgrad, transform);
  step.chains = {tensors, heads.data(), offsets.data(), variables};
  cpu::run_step(step);
}

void check_kernels() {
  Digests digests(kDigest);
  Claims claims;
  for (int mode = 0; mode < kDensePairCount * 2 * kTransformCount; ++mode) {
    const DensePair pair = dense_pair(mode / (2 * kTransformCount));
    const bool amsgrad = mode / kTransformCount % 2 != 0;
    const int transform = mode % kTransformCount;
    const bool is_in_digest =
        transform != kAndL2 && pair.grad_dtype == pair.dtype && pair.slot_dtype == state_dtype(pair.dtype);
    for (const int64_t size : kSizes) {
      const bool is_large = size > 0xffff;
      if (is_brief() && is_large && !is_in_digest) continue;
      const Variable initial(pair.dtype, size, pair.grad_dtype, pair.slot_dtype);
      const Variable expected(initial, 0);
      for (int t = 0; t < kSteps; ++t) expect(expected.args(t, amsgrad), t, transform);
      for_each_isa([&](const cpu::Isa& isa) {
        const int64_t offsets = size <= 33 ? 16 : is_large && is_brief() ? 1 : 4;
        for (int64_t offset = 0; offset < offsets; ++offset) {
          const Variable plain(initial, offset);
          const Variable prefetching(initial, offset);
          for (int t = 0; t < kSteps; ++t) {
            const TensorArgs tensor = plain.args(t, amsgrad);
            run(&tensor, 1, t, amsgrad, transform);
            const FlushDenormals flush;
            StepArgs step = step_of(t, amsgrad, transform);
            step.prefetch = true;
            isa.kernels->dense[static_cast<int>(pair.dtype)](step, prefetching.args(t, amsgrad), 0, size);
          }
          claims.note(isa.name + (" " + pair.name()) + " has the bits of the scalar loop",
                      plain == expected && prefetching == expected);
          if (offset == 0 && is_in_digest) plain.add_to(digests.of(isa));
        }
      });
    }
  }
}

template <class Storage>
void check_conversions(const Format& f) {
  bool same_load = true;
  bool same_round_trip = true;
  bool same_store = true;
  const auto check_store = [&](uint32_t bits) {
    const float x = bit_cast<float>(bits);
    const uint16_t stored = store<Storage>(x).bits;
    if (canonical(decode(stored, f)) != canonical(decode(encode(static_cast<double>(x), f), f))) same_store = false;
  };
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto pattern = static_cast<uint16_t>(bits);
    const double value = decode(pattern, f);
    if (canonical(static_cast<double>(load(Storage{pattern}))) != canonical(value)) same_load = false;
    const FlushDenormals flush;
    const uint16_t again = store<Storage>(load(Storage{pattern})).bits;
    if (std::isnan(value) ? !std::isnan(decode(again, f)) : again != pattern) same_round_trip = false;
  }
  for (uint32_t bits = 0; bits < 0x10000;
       ++bits) {  // each value, the midpoint to the next one, and the neighbours of both
    const double value = decode(static_cast<uint16_t>(bits), f);
    double next = decode(static_cast<uint16_t>(bits + 1), f);
    if (std::isinf(next)) next = std::copysign(std::ldexp(1, 2 - f.least), next);
    const auto exact = bit_cast<uint32_t>(static_cast<float>(value));
    const auto middle = bit_cast<uint32_t>(static_cast<float>((value + next) / 2));
    for (const uint32_t delta : {~0u, 0u, 1u}) {
      check_store(exact + delta);
      check_store(middle + delta);
    }
  }
  Random random{1};
  for (int i = 0; i < (kSanitized ? 10000 : 1000000); ++i) check_store(random.below(~0u));
  const std::string name = f.name;
  report(same_load, name + " loads all 65536 patterns by the definition");
  report(same_round_trip, name + " stores what it loaded, whether denormals are flushed or not");
  report(same_store, name + " rounds to nearest even");
}

// 40 variables of all types, one of them long. Two have several gradients, which must be applied in order.
struct Mixed {
  std::vector<Variable> variables;
  std::vector<TensorArgs> tensors;

  explicit Mixed(const std::vector<Variable>* from = nullptr) {
    constexpr int64_t kMixedSizes[] = {3, 20011, 0, 129, 4097, 1, 33, 9000, 65};
    for (size_t k = 0; k < 40; ++k) {
      if (from == nullptr) variables.emplace_back(static_cast<DType>(k % 4), k == 14 ? 100003 : kMixedSizes[k % 9]);
      if (from != nullptr) variables.emplace_back((*from)[k], static_cast<int64_t>(k % 5));
    }
    for (const Variable& variable : variables) tensors.push_back(variable.args(0, true));
    for (const size_t k : {size_t{14}, size_t{3}}) {
      for (int t = 1; t < 4; ++t) {
        tensors[t == 1 ? k : tensors.size() - 1].next = static_cast<int64_t>(tensors.size());
        tensors.push_back(variables[k].args(t, true));
      }
    }
  }
  void expect_all() const {
    for (size_t k = 0; k < variables.size(); ++k) {
      for (int64_t i = static_cast<int64_t>(k); i >= 0; i = tensors[static_cast<size_t>(i)].next) {
        expect(tensors[static_cast<size_t>(i)], 0, true);
      }
    }
  }
  void run_all() const { run(tensors.data(), static_cast<int64_t>(variables.size()), 0, true, true); }
};

// Without the record of exceptions that have happened.
uint64_t floating_point_mode() { return read_float_mode() & kModeBits; }

// `mode`: the floating-point mode of this thread at the start of the program.
void check_threads(uint64_t mode) {
  const Mixed initial;
  const Mixed expected(&initial.variables);
  expected.expect_all();
  bool mode_is_kept = true;
  for (const int threads : {1, 2, 3}) {
    cpu::set_num_threads(threads);
    bool same = true;
    for (int round = 0; round < 5; ++round) {
      const Mixed mixed(&initial.variables);
      mixed.run_all();
      mode_is_kept = mode_is_kept && floating_point_mode() == mode;
      same = same && mixed.variables == expected.variables;
    }
    report(same, "threads: " + std::to_string(threads) + " give the bits of the scalar loop, with gradients in order");
  }
  report(mode_is_kept, "threads: the caller's floating-point mode is unchanged");
  const Variable before(FASTADAM_FLOAT32, 40000);
  std::vector<Variable> after;
  for (const int threads : {1, 3}) {
    cpu::set_num_threads(threads);
    after.emplace_back(before, 0);
    const TensorArgs tensor = after.back().args(0, true);
    for (int step = 0; step < 40; ++step) run(&tensor, 1, 0, true, true);
  }
  report(after[0] == after[1],
         "threads: a series of short steps, the first of which wake no helper, gives the bits of one thread");
  const Mixed here(&initial.variables);
  const Mixed there(&initial.variables);
  std::thread other([&there] { there.run_all(); });
  here.run_all();
  other.join();
  const bool same = here.variables == expected.variables && there.variables == expected.variables;
  report(same, "threads: two simultaneous callers get the bits of the scalar loop");
  cpu::set_num_threads(0);
}

void check_mode() {
  float nearest = 0;
  for (const int rounding : {FE_TONEAREST, FE_UPWARD}) {
    float var = 1;
    const float grad = 0x1p-70f;  // the square is denormal
    float m = 0;
    float v = 0;
    TensorArgs tensor{};
    tensor.var = &var;
    tensor.grad = &grad;
    tensor.m = &m;
    tensor.v = &v;
    tensor.size = 1;
    tensor.next = -1;
    tensor.dtype = tensor.grad_dtype = FASTADAM_FLOAT32;
    std::fesetround(rounding);
    const uint64_t before = floating_point_mode();
    run(&tensor, 1, 0, false, false);
    const uint64_t after = floating_point_mode();
    std::fesetround(FE_TONEAREST);
    if (rounding == FE_TONEAREST) nearest = var;
    const std::string name = rounding == FE_TONEAREST ? "mode: " : "mode, rounding up: ";
    report(before == after, name + "the caller's mode is unchanged");
    report(v == 0 && m > 0, name + "a denormal result is flushed");
    report(var == nearest, name + "the result does not depend on the caller's mode");
  }
}

}  // namespace

int main(int argc, char** argv) {
  read_scope(argc, argv);
  const uint64_t mode = floating_point_mode();
  check_mode();
  if (scope != Scope::kEmulated) check_threads(mode);
  if (scope == Scope::kAll) {  // compiled for the plainest instruction set
    check_conversions<Float16>(kFormats[0]);
    check_conversions<BFloat16>(kFormats[1]);
  }
  if (scope != Scope::kThreads) check_kernels();
  return failures == 0 ? 0 : 1;
}
