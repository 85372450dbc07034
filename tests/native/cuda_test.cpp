// SPDX-License-Identifier: Apache-2.0
// Runs the CUDA kernels for dense gradients and norms (csrc/cuda/dense_kernels.h, norm_kernels.h) on the CPU and
// compares them bit for bit with the CPU kernels. Only the launch itself needs a GPU. Prints a line per check.
#include <string>
#include <vector>

#include "../../csrc/capi/norms.h"
#include "../../csrc/cpu/launch.h"
#include "../../csrc/cuda/chunks.h"
#include "../../csrc/cuda/dense_kernels.h"
#include "emulate.h"
#include "harness.h"

namespace {

using namespace kernel_test;

constexpr double kClipValue = 0.5;  // as in scalars()

std::vector<cuda::Gradient> gradients_of(const std::vector<TensorArgs>& tensors) {
  std::vector<cuda::Gradient> expected;
  for (const TensorArgs& tensor : tensors) expected.push_back(cuda::gradient_of(tensor));
  std::vector<cuda::Gradient> gradients(tensors.size());
  for (size_t first = 0; first < tensors.size(); first += cuda::SetGradients::kCount) {
    cuda::SetGradients set{};
    set.table = gradients.data() + first;
    set.count = cuda::fill_gradients(set.gradients, expected, first);
    emulate(set, 1);
  }
  return gradients;
}

cuda::StepState state_of(const StepArgs& step, const cuda::DeviceNumbers& numbers = {}) {
  cuda::StepState state{};
  cuda::Report report{};
  emulate(cuda::BeginStep{&state, &report, 1, 0, step.scalars_f32, step.scalars_f64, numbers, kClipValue, 1}, 1);
  return state;
}

// Does what Launch::step in csrc/cuda/launch.cu does.
void run_step(const StepArgs& step, const std::vector<TensorArgs>& tensors, const cuda::DeviceNumbers& numbers = {}) {
  const std::vector<cuda::Gradient> gradients = gradients_of(tensors);
  const cuda::StepState state = state_of(step, numbers);
  const auto rounds = cuda::rounds_of(step.chains);
  std::vector<int64_t> with_average;
  for (const int64_t t : rounds[0]) {
    if (tensors[static_cast<size_t>(t)].average != nullptr) with_average.push_back(t);
  }
  for (int i = 0; i < kDTypeCount; ++i) {
    const auto dtype = static_cast<DType>(i);
    cuda::with_storage(dtype, [&](auto zero) {
      using Storage = decltype(zero);
      for (const std::vector<int64_t>& round : rounds) {
        const std::vector<cuda::Chunk> chunks = cuda::chunks_of(tensors, round, dtype);
        cuda::with_options(step.amsgrad, step.transform, [&](auto amsgrad, auto transform) {
          emulate(cuda::DenseStep<Storage, amsgrad.value, transform.value>{&state, tensors.data(), gradients.data(),
                                                                           nullptr, chunks.data()},
                  static_cast<int64_t>(chunks.size()));
        });
      }
      const std::vector<cuda::Chunk> chunks = cuda::chunks_of(tensors, with_average, dtype);
      emulate(cuda::AverageStep<Storage>{&state, tensors.data(), chunks.data(), step.ema_overwrite},
              static_cast<int64_t>(chunks.size()));
    });
  }
}

// A list of variables of all dtypes, at odd addresses; some have several gradients, some have averages.
struct List {
  static constexpr int64_t kListSizes[] = {1, 3, 4, 0, 16383, 16384, 16385, 40001, 33, 100};
  std::vector<Variable> variables;
  std::vector<Array> averages;
  std::vector<TensorArgs> tensors;
  std::vector<int64_t> heads;
  std::vector<int64_t> offsets{0};

  explicit List(int64_t offset, bool amsgrad) {
    for (size_t k = 0; k < 60; ++k) {
      const DensePair pair = dense_pair(static_cast<int>(k % kDensePairCount));
      const Variable initial(pair.dtype, kListSizes[k / 6], pair.grad_dtype, pair.slot_dtype);
      variables.emplace_back(initial, k % 7 == 0 ? offset : 0);
      averages.emplace_back(state_dtype(pair.dtype), initial.size);
      for (int64_t i = 0; i < initial.size; ++i) averages.back().set(i, 0.5);
    }
    for (size_t k = 0; k < variables.size(); ++k) {
      heads.push_back(static_cast<int64_t>(k));
      offsets.push_back(offsets.back() + variables[k].size);
      tensors.push_back(variables[k].args(static_cast<int>(k % 3), amsgrad));
      if (k % 5 == 0) tensors.back().average = averages[k].at(0);
    }
    for (const size_t k : {size_t{4}, size_t{26}, size_t{44}}) {
      tensors[k].next = static_cast<int64_t>(tensors.size());
      tensors.push_back(variables[k].args(1, amsgrad));  // at an address with another alignment
    }
  }
  List(const List&) = delete;
  List& operator=(const List&) = delete;

  StepArgs step(bool amsgrad, int transform, bool overwrite) const {
    StepArgs args = step_of(1, amsgrad, transform);
    args.chains = {tensors.data(), heads.data(), offsets.data(), static_cast<int64_t>(heads.size())};
    args.ema_overwrite = overwrite;
    return args;
  }
  bool operator==(const List& o) const { return variables == o.variables && averages == o.averages; }
};

void check_steps() {
  Claims claims;
  for (int mode = 0; mode < 8 * kTransformCount; ++mode) {
    const bool amsgrad = mode % 2 != 0;
    const bool overwrite = mode / 2 % 2 != 0;
    const int64_t offset = mode / 4 % 2 * 3;
    const int transform = mode / 8;
    const List expected(offset, amsgrad);
    const List list(offset, amsgrad);
    cpu::run_step(expected.step(amsgrad, transform, overwrite));
    run_step(list.step(amsgrad, transform, overwrite), list.tensors);
    claims.note("dense kernel: has the bits of the CPU kernels", list == expected);
  }
}

// Factors that are smaller than every normal number, of gradients that are as large.
void check_tiny_factors() {
  Claims claims;
  const auto make_tiny = [](List& list) {
    for (TensorArgs& tensor : list.tensors) {
      const bool is_double = tensor.dtype == FASTADAM_FLOAT64;
      tensor.grad_factor *= is_double ? 0x1p-1027 : 0x1p-131;
      if (size_of(tensor.grad_dtype) == 2) continue;  // their numbers are too small to matter
      auto* grad = static_cast<char*>(const_cast<void*>(tensor.grad));
      for (int64_t i = 0; i < tensor.size; ++i) {
        write(grad, tensor.grad_dtype, i, std::ldexp(read(grad, tensor.grad_dtype, i), is_double ? 1000 : 110));
      }
    }
  };
  for (int mode = 0; mode < 4; ++mode) {
    const bool amsgrad = mode % 2 != 0;
    const int transform = 1 + mode / 2;
    List expected(0, amsgrad);
    List list(0, amsgrad);
    make_tiny(expected);
    make_tiny(list);
    StepArgs step = expected.step(amsgrad, transform, true);
    StepArgs emulated = list.step(amsgrad, transform, true);
    for (StepArgs* args : {&step, &emulated}) {
      args->scalars_f32.clip_value = HUGE_VALF;
      args->scalars_f64.clip_value = HUGE_VAL;
    }
    cpu::run_step(step);
    run_step(emulated, list.tensors);
    claims.note("dense kernel: tiny factors give the bits of the CPU kernels", list == expected);
  }
}

// Only the device knows the loss scale and whether the step is skipped.
void check_scaled_steps() {
  Claims claims;
  const float scale = 3;
  const float zero = 0;
  const float one = 1;
  for (int mode = 0; mode < 2 * (kTransformCount - 1); ++mode) {
    const bool amsgrad = mode % 2 != 0;
    const int transform = 1 + mode / 2;
    const List expected(0, amsgrad);
    const List list(0, amsgrad);
    const List untouched(0, amsgrad);
    StepArgs scaled = expected.step(amsgrad, transform, true);
    std::vector<TensorArgs> tensors = expected.tensors;
    for (TensorArgs& tensor : tensors) tensor.grad_factor *= 1.0 / static_cast<double>(scale);
    scaled.chains.tensors = tensors.data();
    scaled.scalars_f64.clip_value = kClipValue / (1.0 / static_cast<double>(scale));
    scaled.scalars_f32.clip_value = static_cast<float>(scaled.scalars_f64.clip_value);
    cpu::run_step(scaled);
    cuda::DeviceNumbers numbers{};
    numbers.grad_scale = &scale;
    numbers.found_inf = &one;
    run_step(list.step(amsgrad, transform, true), list.tensors, numbers);
    claims.note("dense kernel: a skipped step changes no bit", list == untouched);
    numbers.found_inf = &zero;
    run_step(list.step(amsgrad, transform, true), list.tensors, numbers);
    claims.note("dense kernel: a scale on the device gives the bits of a scale that the host passed", list == expected);
  }
}

template <class T>
bool same(const StepScalars<T>& a, const StepScalars<T>& b) {
  return a.alpha == b.alpha && a.row_alpha == b.row_alpha && a.beta_1 == b.beta_1 && a.beta_2 == b.beta_2 &&
         a.one_minus_beta_1 == b.one_minus_beta_1 && a.one_minus_beta_2 == b.one_minus_beta_2 &&
         a.epsilon == b.epsilon && a.clip_value == b.clip_value && a.keep == b.keep &&
         a.ema_momentum == b.ema_momentum && a.l2 == b.l2;
}

// Begins several steps, skips some of them, and compares their numbers with numbers computed on the host.
void check_counting(bool epsilon_corrected, bool is_captured, Claims& claims) {
  AdamHyper hyper{};
  hyper.learning_rate = 0.01;
  hyper.beta_1 = 0.9;
  hyper.beta_2 = 0.98;
  hyper.epsilon = 1e-7;
  hyper.decay = 0.1;
  hyper.weight_decay = 0.01;
  hyper.clip_value = 0.7;
  hyper.epsilon_corrected = epsilon_corrected;
  const std::vector<float> singles_1 = cuda::powers_of<float>(hyper.beta_1);
  const std::vector<float> singles_2 = cuda::powers_of<float>(hyper.beta_2);
  const std::vector<double> doubles_1 = cuda::powers_of<double>(hyper.beta_1);
  const std::vector<double> doubles_2 = cuda::powers_of<double>(hyper.beta_2);
  const auto single_count =
      static_cast<int64_t>(singles_1.size());  // beta_1 has the shorter table; t stays below its length
  const auto double_count = static_cast<int64_t>(doubles_1.size());
  cuda::StepState state{};
  cuda::Report report{};
  constexpr int64_t kStart = 6;
  int64_t steps = kStart;
  for (int i = 0; i < 12; ++i) {
    const float scale = 0.1F + static_cast<float>(i * i);
    const float found_inf = i % 3 == 1 || i == 5 ? 1.0F : 0.0F;
    AdamHyper scaled = hyper;
    scaled.step = steps + 1;
    scaled.gradient_scale = 1.0 / static_cast<double>(scale);
    const auto expected_f32 = make_step_scalars<float>(scaled);
    const auto expected_f64 = make_step_scalars<double>(scaled);
    AdamHyper unscaled = hyper;
    unscaled.gradient_scale = 1;
    cuda::DeviceNumbers numbers{};
    numbers.grad_scale = &scale;
    numbers.found_inf = &found_inf;
    if (i % 4 == 0) {  // the host knows t
      unscaled.step = steps + 1;
      emulate(cuda::BeginStep{&state, &report, unscaled.step, i, make_step_scalars<float>(unscaled),
                              make_step_scalars<double>(unscaled), numbers, unscaled.clip_value, 1},
              1);
    } else {
      unscaled.step = 1;
      numbers.counts = true;
      emulate(cuda::AdvanceStep{&state,
                                &report,
                                i,
                                unscaled,
                                numbers,
                                is_captured,
                                {singles_1.data(), singles_2.data(), single_count},
                                {doubles_1.data(), doubles_2.data(), double_count},
                                true,
                                true},
              1);
    }
    if (found_inf == 0) ++steps;
    claims.note("a skipped step does not count in t", state.step == steps && state.skip == (found_inf != 0));
    claims.note("numbers of a step that the device counts and scales equal the numbers of the host",
                same(state.scalars_f32, expected_f32) && same(state.scalars_f64, expected_f64) &&
                    state.unscale == scaled.gradient_scale);
  }
}

// After an invalid index t stays at the last good step, whatever steps follow.
void check_failure() {
  cuda::StepState state{};
  cuda::Report failure{};
  const StepArgs step = step_of(1, false, kAsItIs);
  const auto begin = [&](int64_t t) {
    emulate(cuda::BeginStep{&state, &failure, t, 100 + t, step.scalars_f32, step.scalars_f64, {}, kClipValue, 1}, 1);
  };
  begin(7);
  state.failed = true;
  for (int64_t t = 8; t < 11; ++t) begin(t);
  report(state.step == 7 && state.skip && failure.failed == 1 && failure.call == 108, "t stays at the last good step");
}

// Includes gradients with no blocks and with a number of blocks that is not a power of two, and float64 gradients whose
// squares overflow or underflow.
void check_norms() {
  Claims claims;
  enum Gradients { kUsual, kNotFinite, kHuge, kTiny };
  for (const Gradients kind : {kUsual, kNotFinite, kHuge, kTiny}) {
    const bool finite = kind != kNotFinite;
    std::vector<Variable> variables;
    for (const int64_t size :
         {int64_t{5 * kNormBlock + 17}, int64_t{0}, int64_t{1}, int64_t{kNormBlock}, int64_t{37 * kNormBlock}}) {
      for (const Pair& pair : kPairs) {
        variables.emplace_back(pair.dtype, size, pair.grad_dtype);
        const Array& grads = variables.back().grads;
        for (int64_t i = 0; finite && i < size; ++i) {
          const double g = read(grads.at(0), pair.grad_dtype, i);
          if (!std::isfinite(g)) variables.back().grads.set(i, 0.25);
          if (std::isfinite(g) && kind >= kHuge && pair.grad_dtype == FASTADAM_FLOAT64) {
            variables.back().grads.set(i, std::ldexp(g, kind == kHuge ? 700 : -700));
          }
        }
      }
    }
    std::vector<TensorArgs> tensors;
    for (const Variable& variable : variables) tensors.push_back(variable.args(0, false));
    const std::vector<cuda::Gradient> gradients = gradients_of(tensors);
    const auto count = static_cast<int64_t>(tensors.size());
    const std::vector<int64_t> offsets = cuda::norm_offsets(tensors);
    for (const double clip_value : {0.5, HUGE_VAL}) {
      const Norms norms(tensors.data(), count, clip_value, true);
      claims.note("norm kernels: find gradients that are not finite", norms.all_finite() == finite);
      std::vector<double> block_sums(static_cast<size_t>(offsets.back()));
      cpu::run_norm({tensors.data(), offsets.data(), count, clip_value, true, block_sums.data(), nullptr});
      std::vector<double> sums(static_cast<size_t>(offsets.back()));
      emulate(
          cuda::SumSquares{gradients.data(), offsets.data(), count, nullptr, clip_value, true, sums.data(), nullptr},
          cuda::norm_grid(offsets));
      bool same = true;
      for (size_t i = 0; i < sums.size(); ++i) {
        const double other = block_sums[i];
        same = same && (std::isnan(other) ? std::isnan(sums[i]) : sums[i] == other);
      }
      claims.note("norm kernels: give the sums of the CPU kernels", same);
      emulate(cuda::SumBlocks{offsets.data(), sums.data(), cuda::most_blocks(offsets)}, count);
      std::vector<double> rescaled(sums.size());
      emulate(cuda::SumSquares{gradients.data(), offsets.data(), count, nullptr, clip_value, false, rescaled.data(),
                               sums.data()},
              cuda::norm_grid(offsets));
      emulate(cuda::SumBlocks{offsets.data(), rescaled.data(), cuda::most_blocks(offsets)}, count);
      for (int which = 1; which < 7; ++which) {
        AdamHyper hyper{};
        const double unit = which < 4 ? 1 : 1e-250;  // the factors are then no float64
        hyper.clip_norm = which % 2 != 0 ? 0.75 * unit : HUGE_VAL;
        hyper.global_clip_norm = which / 2 % 2 != 0 || which == 4 ? 0.25 * unit : HUGE_VAL;
        hyper.gradient_scale = 0.125;
        const Norms::Clipping expected = norms.clip(hyper);
        std::vector<Factor> factors(tensors.size());
        std::vector<double> squares(tensors.size());
        const cuda::StepState state = state_of(StepArgs{});
        emulate(cuda::ClipFactors{&state, gradients.data(), offsets.data(), sums.data(), count, hyper.clip_norm,
                                  hyper.global_clip_norm, hyper.gradient_scale, factors.data(), squares.data(),
                                  rescaled.data()},
                1);
        bool equal = true;
        for (size_t t = 0; t < factors.size(); ++t) {
          const Factor other = expected.factors[t];
          equal = equal &&
                  (std::isnan(other.value) ? std::isnan(factors[t].value)
                                           : factors[t].value == other.value && factors[t].exponent == other.exponent);
        }
        claims.note("norm kernels: give the clip factors of the host", equal);
        cuda::StepState checked{};
        cuda::Report found{};
        emulate(cuda::CheckFinite{&checked, &found, offsets.data(), sums.data(), count, true, factors.data(),
                                  squares.data()},
                1);
        claims.note("norm kernels: find norms that are not finite", (found.not_finite == 0) == expected.is_finite);
      }
    }
  }
}

// Pure index arithmetic, tested with sizes that could not be allocated.
void check_chunks() {
  constexpr int64_t kHuge = (int64_t{1} << 33) + 5;
  std::vector<TensorArgs> tensors(3);
  tensors[0].size = 7;
  tensors[1].size = kHuge;
  tensors[2].size = cuda::kChunkElements;
  for (TensorArgs& tensor : tensors) {
    tensor.dtype = FASTADAM_FLOAT32;
    tensor.next = -1;
  }
  const int64_t heads[] = {0, 1, 2};
  const int64_t offsets[] = {0, 7, 7 + kHuge, 7 + kHuge + cuda::kChunkElements};
  const std::vector<cuda::Chunk> chunks =
      cuda::chunks_of(tensors, cuda::rounds_of({tensors.data(), heads, offsets, 3})[0], FASTADAM_FLOAT32);
  int64_t next = 0;
  bool covers = chunks.front().tensor == 0 && chunks.back().tensor == 2;
  for (const cuda::Chunk& chunk : chunks) {
    if (chunk.tensor == 1) covers = covers && chunk.begin == next;
    if (chunk.tensor == 1) next += cuda::kChunkElements;
  }
  report(covers && next >= kHuge && next - cuda::kChunkElements < kHuge,
         "chunks cover 2^33 elements exactly once, in order");
  report(cuda::chunks_of(tensors, {0, 1, 2}, FASTADAM_FLOAT64).empty(), "chunks contain tensors of one dtype only");
}

}  // namespace

int main() {
  check_steps();
  check_scaled_steps();
  check_tiny_factors();
  {
    Claims claims;
    for (const bool epsilon_corrected : {false, true}) {
      for (const bool is_captured : {false, true}) check_counting(epsilon_corrected, is_captured, claims);
    }
  }
  check_failure();
  check_norms();
  check_chunks();
  return failures == 0 ? 0 : 1;
}
