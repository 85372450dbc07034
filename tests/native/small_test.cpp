// SPDX-License-Identifier: Apache-2.0
// Checks steps of variables that are stored as in csrc/core/small_state.h: every usable ISA and number of threads gives
// one digest for every combination of formats, and NaN stays NaN. tests/test_small_states.py compares the bits with a
// reference in NumPy. Prints a line per check. Its argument is a Scope.
#include <cstring>
#include <string>
#include <vector>

#include "../../csrc/core/small_state.h"
#include "../../csrc/cpu/launch.h"
#include "harness.h"

namespace {

using namespace kernel_test;

// The digest of the results of check_isas; see Digests.
constexpr uint64_t kDigest = 0x816a54bd769e4fb9;

constexpr int64_t kLengths[] = {1, 127, 128, 129, 512, 641, 20011};

enum class Storage { kFloat, kSplit, kStochastic, kNearest };
struct Format {
  Storage variable;
  fastadam_moments moments;
  DType gradient;
  bool amsgrad;
  int transform;
};

std::vector<Format> formats() {
  std::vector<Format> all;
  for (const Storage variable : {Storage::kFloat, Storage::kSplit, Storage::kStochastic, Storage::kNearest}) {
    for (const fastadam_moments moments : {FASTADAM_MOMENTS_WIDE, FASTADAM_MOMENTS_BFLOAT16, FASTADAM_MOMENTS_8BIT}) {
      const bool is_small =
          moments != FASTADAM_MOMENTS_WIDE || variable == Storage::kSplit || variable == Storage::kStochastic;
      for (const DType gradient : {FASTADAM_FLOAT32, FASTADAM_BFLOAT16}) {
        for (int mode = 0; mode < 2 * kTransformCount && is_small; ++mode) {
          const bool amsgrad = mode % 2 != 0;
          if (amsgrad && moments == FASTADAM_MOMENTS_8BIT) continue;
          all.push_back({variable, moments, gradient, amsgrad, mode / 2});
        }
      }
    }
  }
  return all;
}

// All arrays of a variable, one after another, each with its own memory so that a sanitizer sees its end.
struct Small {
  Format format;
  int64_t size;
  std::vector<std::vector<char>> arrays;  // var, low, m, v, vhat, m_scales, v_scales
  std::vector<char> gradient;

  Small(const Format& f, int64_t n, uint32_t seed) : format(f), size(n), arrays(7) {
    const int64_t var_size = f.variable == Storage::kFloat ? 4 : 2;
    const int64_t moment_size = f.moments == FASTADAM_MOMENTS_8BIT ? 1 : f.moments == FASTADAM_MOMENTS_BFLOAT16 ? 2 : 4;
    arrays[0].resize(bytes(var_size));
    if (f.variable == Storage::kSplit) arrays[1].resize(bytes(2));
    for (size_t k : {size_t{2}, size_t{3}}) arrays[k].resize(bytes(moment_size));
    if (f.amsgrad) arrays[4].resize(bytes(moment_size));
    if (f.moments == FASTADAM_MOMENTS_8BIT) {
      for (size_t k : {size_t{5}, size_t{6}}) arrays[k].resize(static_cast<size_t>(code_blocks(n)));
    }
    gradient.resize(bytes(f.gradient == FASTADAM_FLOAT32 ? 4 : 2));
    for (int64_t i = 0; i < n; ++i) put(arrays[0], i, number(seed, i), var_size);
  }

  size_t bytes(int64_t item_size) const { return static_cast<size_t>(size * item_size); }

  static float number(uint32_t seed, int64_t i) {
    const uint32_t word = next_word(first_word<uint32_t>(seed, 0, static_cast<uint32_t>(i)));
    return static_cast<float>(static_cast<int32_t>(word >> 8) - (1 << 23)) * 0x1p-24f;
  }

  static void put(std::vector<char>& array, int64_t i, float x, int64_t item_size) {
    const BFloat16 half = store<BFloat16>(x);
    if (item_size == 4) std::memcpy(array.data() + 4 * i, &x, 4);
    if (item_size == 2) std::memcpy(array.data() + 2 * i, &half, 2);
  }

  void set_gradient(int t) {
    for (int64_t i = 0; i < size; ++i) {
      const float scale = i % 3 == 0 ? 0x1p-12f : i % 7 == 1 ? 0.0f : 1.0f;
      put(gradient, i, number(static_cast<uint32_t>(t + 1), i) * scale, format.gradient == FASTADAM_FLOAT32 ? 4 : 2);
    }
  }

  TensorArgs args(int t) {
    const auto at = [this](size_t k) { return arrays[k].empty() ? nullptr : static_cast<void*>(arrays[k].data()); };
    TensorArgs tensor{};
    tensor.var = at(0);
    tensor.grad = gradient.data();
    tensor.low = static_cast<int16_t*>(at(1));
    tensor.m = at(2);
    tensor.v = at(3);
    tensor.vhat = at(4);
    tensor.m_scales = static_cast<uint8_t*>(at(5));
    tensor.v_scales = static_cast<uint8_t*>(at(6));
    tensor.size = tensor.grad_size = size;
    tensor.next = -1;
    tensor.grad_factor = 0.37 * (t + 1);
    tensor.dtype = format.variable == Storage::kFloat ? FASTADAM_FLOAT32 : FASTADAM_BFLOAT16;
    tensor.grad_dtype = format.gradient;
    tensor.moments = format.moments;
    tensor.stochastic = format.variable == Storage::kStochastic;
    tensor.parameter = 7;
    tensor.decays = t % 2 == 1;
    return tensor;
  }

  void step(int t) {
    const TensorArgs tensor = args(t);
    const int64_t head = 0;
    const int64_t offsets[] = {0, size};
    StepArgs step = step_of(t, format.amsgrad, format.transform);
    step.chains = {&tensor, &head, offsets, 1};
    step.seed = 11;
    step.number = t + 1;
    cpu::run_step(step);
  }

  void add_to(uint64_t& digest) const {
    for (const std::vector<char>& array : arrays) {
      for (const char byte : array) digest = (digest ^ static_cast<uint8_t>(byte)) * 0x100000001b3u;
    }
  }
};

uint64_t digest_of(const Format& format) {
  uint64_t digest = 0xcbf29ce484222325u;
  for (const int64_t size : kLengths) {
    if (kSanitized && size > 1000) continue;
    Small variable(format, size, static_cast<uint32_t>(size));
    for (int t = 0; t < 3; ++t) {
      variable.set_gradient(t);
      variable.step(t);
    }
    variable.add_to(digest);
  }
  return digest;
}

void check_isas() {
  Claims claims;
  const std::vector<Format> all = formats();
  std::vector<uint64_t> first;
  Digests digests(kDigest);
  for_each_isa([&](const cpu::Isa& isa) {
    for (size_t k = 0; k < all.size(); ++k) {
      const uint64_t digest = digest_of(all[k]);
      if (first.size() == k) first.push_back(digest);
      if (!kSanitized) digests.of(isa) = (digests.of(isa) ^ digest) * 0x100000001b3u;
      claims.note(isa.name + std::string(" gives the bits of the other instruction sets"), digest == first[k]);
    }
  });
}

void check_nan() {
  Claims claims;
  for_each_isa([&](const cpu::Isa& isa) {
    for (const Format& format : formats()) {
      Small variable(format, 700, 1);
      variable.set_gradient(0);
      const float nan = bit_cast<float>(0x7fffffffu);
      Small::put(variable.gradient, 300, nan, format.gradient == FASTADAM_FLOAT32 ? 4 : 2);
      variable.step(0);
      const bool is_wide = format.variable == Storage::kFloat;
      float found = 0;
      BFloat16 half{};
      std::memcpy(&found, variable.arrays[0].data() + 1200, is_wide ? 4 : 0);
      std::memcpy(&half, variable.arrays[0].data() + 600, is_wide ? 0 : 2);
      if (!is_wide) found = load(half);
      claims.note(isa.name + std::string(" keeps NaN in the variable"), found != found);
      if (format.moments != FASTADAM_MOMENTS_8BIT) continue;
      claims.note(isa.name + std::string(" marks the block of NaN and no other"),
                  variable.arrays[6][2] == static_cast<char>(kNoScale) && variable.arrays[6][1] > 0 &&
                      variable.arrays[6][3] > 0);
    }
  });
}

void check_threads() {
  Claims claims;
  for (const Format& format : formats()) {
    if (kSanitized && format.transform != kClipAndFactor) continue;
    uint64_t first = 0;
    for (const int threads : {1, 2, 3}) {
      cpu::set_num_threads(threads);
      uint64_t digest = 0xcbf29ce484222325u;
      Small variable(format, 50021, 3);
      variable.set_gradient(0);
      variable.step(0);
      variable.add_to(digest);
      if (threads == 1) first = digest;
      claims.note("threads: " + std::to_string(threads) + " give the bits of one", digest == first);
    }
  }
  cpu::set_num_threads(0);
}

}  // namespace

int main(int argc, char** argv) {
  read_scope(argc, argv);
  if (scope != Scope::kEmulated) check_threads();
  if (scope != Scope::kThreads) {
    check_isas();
    check_nan();
  }
  return failures == 0 ? 0 : 1;
}
