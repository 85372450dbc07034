// SPDX-License-Identifier: Apache-2.0
// For the native tests: what a program claims and whether it holds, the instruction sets, the dtypes of a step.
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

// A sanitizer watches which memory is touched, and by which thread, and makes it slow: where only values or
// combinations are more of the same, the plain programs alone go through all of them.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kSanitized = true;
#else
constexpr bool kSanitized = false;
#endif

inline int failures = 0;

inline void report(bool ok, const std::string& claim) {
  std::printf("%s %s\n", ok ? "ok  " : "FAIL", claim.c_str());
  failures += ok ? 0 : 1;
}

// The dtypes of variable and gradient: the dtypes, then the half types with gradients of their state dtype.
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

// Those that dense gradients have, with the dtype of the slots: these, then the half types with slots of their own.
constexpr int kDensePairCount = kPairCount + 2;
struct DensePair : Pair {
  DType slot_dtype;

  std::string name() const {
    return Pair::name() + (slot_dtype == state_dtype(dtype) ? "" : ", its slots are halves too");
  }
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

// check(isa) for each that this CPU runs, and that is the current one then; the last is the default.
template <class Check>
void for_each_isa(Check check) {
  for (const cpu::Isa& isa : cpu::isas()) {
    if (!isa.usable) continue;
    cpu::set_current_isa(isa);
    check(isa);
  }
}

// visit(begin, end) for pieces of `size` elements each, the first of them shorter.
template <class Visit>
void for_each_cut(int64_t total, int64_t size, Visit visit) {
  for (int64_t begin = 0; begin < total;) {
    const int64_t end = std::min(total, begin == 0 ? size / 2 + 1 : begin + size);
    visit(begin, end);
    begin = end;
  }
}

// A claim that holds in every one of many cases, reported once.
class Claims {
 public:
  Claims() = default;
  Claims(const Claims&) = delete;
  Claims& operator=(const Claims&) = delete;
  void note(const std::string& claim, bool ok) {
    const auto same = [&claim](const auto& other) { return other.first == claim; };
    const auto found = std::find_if(claims_.begin(), claims_.end(), same);
    if (found == claims_.end()) {
      claims_.emplace_back(claim, ok);
    } else {
      found->second = found->second && ok;
    }
  }
  ~Claims() {
    for (const auto& [claim, ok] : claims_) report(ok, claim);
  }

 private:
  std::vector<std::pair<std::string, bool>> claims_;
};

// Of each instruction set: what it computed, one after the other. Every machine gets the same: the inputs come from
// integers and exact operations only. x86 decides after rounding what is small enough to be flushed, AArch64 before: a
// result within half an ulp below the smallest normal number differs. The inputs have none; new ones must keep it so.
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
