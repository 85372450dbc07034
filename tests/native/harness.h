// SPDX-License-Identifier: Apache-2.0
// For the native tests: reports of checks, loops over instruction sets, and the dtypes of a step.
#pragma once

#include <algorithm>
#include <cinttypes>
#include <cstdint>
#include <cstdio>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "../../csrc/cpu/dispatch.h"
#include "reference.h"

namespace kernel_test {

// Sanitizers check which thread accesses which memory, and are slow. Cases that differ only in values or in
// combinations of options are therefore left to the plain programs.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kSanitized = true;
#else
constexpr bool kSanitized = false;
#endif

// The argument of a program. `threads` does only what needs several threads, for ThreadSanitizer. `emulated` is for a
// CPU that is a hundred times slower (.ci/avx512): only the widest instruction set, on one thread.
enum class Scope { kAll, kThreads, kEmulated };
inline Scope scope = Scope::kAll;
inline void read_scope(int argc, char** argv) {
  const std::string argument = argc > 1 ? argv[1] : "";
  if (argument == "threads") scope = Scope::kThreads;
  if (argument == "emulated") scope = Scope::kEmulated;
}

// Whether the most expensive cases are left out, or made only as far as a digest needs them.
inline bool is_brief() { return kSanitized || scope == Scope::kEmulated; }

inline int failures = 0;

inline void report(bool ok, const std::string& claim) {
  std::printf("%s %s\n", ok ? "ok  " : "FAIL", claim.c_str());
  failures += ok ? 0 : 1;
}

// The dtypes of a variable and its gradient: equal ones, then the half types with gradients in their state dtype.
struct Pair {
  DType dtype;
  DType grad_dtype;

  std::string name() const {
    const std::string variable = kFormats[static_cast<int>(dtype)].name;
    return grad_dtype == dtype ? variable : variable + " with float32 gradients";
  }
};
constexpr int kPairCount = kDTypeCount + 2;
constexpr Pair kPairs[kPairCount] = {{FASTADAM_FLOAT16, FASTADAM_FLOAT16}, {FASTADAM_BFLOAT16, FASTADAM_BFLOAT16},
                                     {FASTADAM_FLOAT32, FASTADAM_FLOAT32}, {FASTADAM_FLOAT64, FASTADAM_FLOAT64},
                                     {FASTADAM_FLOAT16, FASTADAM_FLOAT32}, {FASTADAM_BFLOAT16, FASTADAM_FLOAT32}};

// The dtypes of dense steps: the pairs above with slots in the state dtype, then the half types with half slots.
constexpr int kDensePairCount = kPairCount + 2;
struct DensePair : Pair {
  DType slot_dtype;

  std::string name() const { return Pair::name() + (slot_dtype == state_dtype(dtype) ? "" : " and half slots"); }
};
inline DensePair dense_pair(int i) {
  const Pair& pair = kPairs[i % kPairCount];
  return {pair, i < kPairCount ? state_dtype(pair.dtype) : pair.dtype};
}

inline StepArgs step_of(int t, bool amsgrad, int transform) {
  StepArgs step{};
  step.scalars_f32 = scalars<float>(t);
  step.scalars_f64 = scalars<double>(t);
  step.amsgrad = amsgrad;
  step.transform = transform;
  return step;
}

// Calls check(isa) for each usable instruction set, made current before. The last one is the default.
template <class Check>
void for_each_isa(Check check) {
  static const cpu::Isa& widest = cpu::current_isa();  // nothing has changed it before the first call
  for (const cpu::Isa& isa : cpu::isas()) {
    if (!isa.usable || (scope == Scope::kEmulated && &isa != &widest)) continue;
    cpu::set_current_isa(isa);
    check(isa);
  }
}

// Calls visit(begin, end) for pieces of `size` elements; the first piece is shorter.
template <class Visit>
void for_each_cut(int64_t total, int64_t size, Visit visit) {
  for (int64_t begin = 0; begin < total;) {
    const int64_t end = std::min(total, begin == 0 ? size / 2 + 1 : begin + size);
    visit(begin, end);
    begin = end;
  }
}

// Collects claims that are checked in many cases, and reports each once: ok if it held in all of them.
class Claims {
 public:
  Claims() = default;
  Claims(const Claims&) = delete;
  Claims& operator=(const Claims&) = delete;
  void note(const std::string& claim, bool ok) {
    const auto same = [&claim](const auto& other) { return other.first == claim; };
    const auto entry = std::find_if(claims_.begin(), claims_.end(), same);
    if (entry == claims_.end()) {
      claims_.emplace_back(claim, ok);
    } else {
      entry->second = entry->second && ok;
    }
  }
  ~Claims() {
    for (const auto& [claim, ok] : claims_) report(ok, claim);
  }

 private:
  std::vector<std::pair<std::string, bool>> claims_;
};

// A digest of everything that each instruction set computed. It is the same on every machine, because inputs are made
// from integers with exact operations only. x86 detects results to be flushed after rounding, AArch64 before, so
// results within half an ulp below the smallest normal number would differ. The inputs produce none, and new ones must
// not either.
class Digests {
 public:
  explicit Digests(uint64_t expected) : expected_(expected) {}

  uint64_t& of(const cpu::Isa& isa) { return digests_.try_emplace(isa.name, 0xcbf29ce484222325u).first->second; }
  ~Digests() {
    for (const auto& [isa, digest] : digests_) {
      report(digest == expected_, isa + " gives the digest of all machines");
      std::printf("digest %016" PRIx64 "\n", digest);
    }
  }

 private:
  uint64_t expected_;
  std::map<std::string, uint64_t> digests_;
};

}  // namespace kernel_test
