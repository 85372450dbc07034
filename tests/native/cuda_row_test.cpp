// SPDX-License-Identifier: Apache-2.0
// Runs the CUDA kernels for rows (csrc/cuda/row_kernels.h, table_kernels.h) on the CPU and compares them bit for bit
// with plain scalar loops or, where rows jump, with the CPU kernel. Prints a line per check.
#include <optional>
#include <string>
#include <vector>

#include "../../csrc/bind/closed_forms.h"
#include "../../csrc/cpu/launch.h"
#include "../../csrc/cuda/table_kernels.h"
#include "emulate.h"
#include "harness.h"
#include "row_reference.h"

namespace {

using namespace kernel_test;
using cuda::RowMode;

struct RowArgs {
  TensorArgs tensor;
  Rows rows;
  const StaleRows* stale;
  int32_t* last;
  int64_t width;
  std::optional<RowMode> mode;  // of a RowStep; none: TableStep
  double unscale = 1;
  bool skip = false;
};

template <class Storage, bool kAmsgrad, bool kTransform>
void run_rows(const RowArgs& args, int t) {
  using Kernel = cuda::RowStep<Storage, kAmsgrad, kTransform>;
  cuda::StepState state{};
  state.scalars_f32 = scalars<float>(t);
  state.scalars_f64 = scalars<double>(t);
  state.unscale = args.unscale;
  state.skip = args.skip;
  cuda::DeviceRows slices{};
  static_cast<Rows&>(slices) = args.rows;
  slices.unique = args.rows.rows == nullptr ? nullptr : &args.rows.count;
  if (!args.mode) {
    slices.unique = &args.rows.count;
    slices.count += 3;  // on a GPU the host knows only the number of indices, an upper bound
    const cuda::TableStep<Storage, kAmsgrad, kTransform> all{&state, args.tensor, slices, nullptr,
                                                             args.tensor.size / args.width};
    return emulate(all, all.grid());
  }
  Kernel kernel{};
  kernel.state = &state;
  kernel.tensor = args.tensor;
  kernel.slices = slices;
  if (args.stale != nullptr) kernel.stale = *args.stale;
  kernel.last = args.last;
  kernel.new_last = static_cast<int32_t>(kernel.stale.now);
  kernel.width = args.width;
  kernel.row_count = args.mode == RowMode::kTouched ? args.rows.count + 3 : args.tensor.size / args.width;
  kernel.mode = *args.mode;
  emulate(kernel, cuda::row_grid(kernel.row_count, kernel.width));
}

template <class Storage>
void run_rows(const RowArgs& args, int t, bool amsgrad, bool transform) {
  if (amsgrad) return transform ? run_rows<Storage, true, true>(args, t) : run_rows<Storage, true, false>(args, t);
  return transform ? run_rows<Storage, false, true>(args, t) : run_rows<Storage, false, false>(args, t);
}

void run_rows(const RowArgs& args, int t, bool amsgrad, bool transform) {
  switch (args.tensor.dtype) {
    case FASTADAM_FLOAT16:
      return run_rows<Float16>(args, t, amsgrad, transform);
    case FASTADAM_BFLOAT16:
      return run_rows<BFloat16>(args, t, amsgrad, transform);
    case FASTADAM_FLOAT32:
      return run_rows<float>(args, t, amsgrad, transform);
    default:
      return run_rows<double>(args, t, amsgrad, transform);
  }
}

void check_slices(const Pair& pair, int64_t width, bool amsgrad, bool transform, bool lazy, Claims& claims) {
  const Variable initial(pair.dtype, kRows * width);
  const Array values = slice_values(pair.grad_dtype, kMaxIndices * width + kSteps);
  const Variable expected(initial, 0);
  const Variable table(initial, 3);
  const double unscale = transform ? 1.0 / 3 : 1.0;  // only the device knows it
  for (int t = 0; t < kSteps; ++t) {
    const Occurrences sorted(kIndices[t]);
    const Rows rows = sorted.view(width);
    TensorArgs scaled = with_slices(expected.args(t, amsgrad), values, pair, t, rows);
    scaled.grad_factor *= unscale;
    expect_slices(scaled, kIndices[t], width, t, transform, lazy);
    const TensorArgs tensor = with_slices(table.args(t, amsgrad), values, pair, t, rows);
    RowArgs args{tensor, rows, nullptr, nullptr, width, lazy ? std::optional(RowMode::kTouched) : std::nullopt};
    args.skip = true;
    run_rows(args, t, amsgrad, transform);
    args.skip = false;
    args.unscale = unscale;
    run_rows(args, t, amsgrad, transform);
  }
  const std::string rule = lazy ? "only rows with a gradient" : "all rows";
  claims.note("row kernel, " + rule + ": " + pair.name() + " has the bits of the scalar loop", table == expected);
}

// Rows with every gap: some get a gradient, some or all are only brought up to date.
enum class Touch { kGradient, kSome, kAll };

void check_stale(const Pair& pair, int64_t width, bool amsgrad, bool may_stop, Touch touch, Claims& claims) {
  constexpr int t = 2;
  constexpr int64_t kNow = 203;
  const Variable initial = stale_table(pair, width);
  const History history(pair.dtype, kNow, !may_stop);
  std::vector<int32_t> had;
  std::vector<int64_t> indices{5, 14};
  for (int64_t row = 0; row < kStaleRows; ++row) {
    had.push_back(static_cast<int32_t>(kNow - kGaps[row % 6]));
    if (touch == Touch::kAll || row != kLeftRow) indices.push_back(row);
  }
  const Occurrences sorted(indices);
  const Rows rows = sorted.view(width);
  std::vector<int32_t> from;
  for (const int64_t row : sorted.rows) from.push_back(had[static_cast<size_t>(row)]);
  const StaleRows stale = history.view(touch == Touch::kAll ? had.data() : from.data(), width, may_stop);
  const Array values = slice_values(pair.grad_dtype, static_cast<int64_t>(indices.size()) * width + t);
  const Variable expected(initial, 0);
  const Variable table(initial, 3);
  const auto args = [&](const Variable& variable) {
    TensorArgs tensor = with_slices(variable.args(t, amsgrad), values, pair, t, rows);
    if (touch != Touch::kGradient) tensor.grad = nullptr;
    return tensor;
  };
  expect_replay(args(expected), history, sorted.rows, had, width, t);
  if (touch == Touch::kGradient) expect_slices(args(expected), indices, width, t, true, true);
  const RowMode mode = touch == Touch::kAll ? RowMode::kCatchUp : RowMode::kTouched;
  std::vector<int32_t> last = had;
  run_rows({args(table), rows, &stale, last.data(), width, mode}, t, amsgrad, true);
  for (const int64_t row : sorted.rows) had[static_cast<size_t>(row)] = static_cast<int32_t>(kNow);
  if (touch == Touch::kAll) had.assign(had.size(), static_cast<int32_t>(kNow));
  claims.note("row kernel, deferred: records the steps that each row has had", last == had);
  const std::string rule = may_stop ? " and may stop early: " : ": ";
  claims.note("row kernel, deferred" + rule + pair.name() + " has the bits of dense steps", table == expected);
}

// Rows whose gaps have closed forms jump.
void check_jumps(DType dtype, bool amsgrad, Claims& claims) {
  constexpr int64_t kWidth = 70;
  constexpr int64_t kNow = 90;
  const History history(dtype, kNow, true);
  const std::vector<int32_t> from{0, 1, 40, 86, 87, 88, 89, 90, 40};
  AdamHyper hyper{};
  hyper.beta_1 = 0.9;
  hyper.beta_2 = 0.999;
  StaleRows stale = history.view(from.data(), kWidth, true);
  bind::ClosedForms forms;
  forms.prepare(from.data(), static_cast<int64_t>(from.size()), stale, hyper, amsgrad);
  stale.forms = forms.forms();
  stale.places = forms.places();
  const Variable initial(dtype, static_cast<int64_t>(from.size()) * kWidth);
  const Variable expected(initial, 0);
  const Variable table(initial, 3);
  TensorArgs tensor = expected.args(0, amsgrad);
  tensor.grad = nullptr;
  tensor.stale = &stale;
  {
    const FlushDenormals flush;
    const auto kernel = cpu::current_isa().kernels->touched_rows[static_cast<int>(dtype)];
    kernel(step_of(0, amsgrad, false), tensor, 0, tensor.size);
  }
  tensor = table.args(0, amsgrad);
  tensor.grad = nullptr;
  std::vector<int32_t> last = from;
  run_rows({tensor, Rows{}, &stale, last.data(), kWidth, RowMode::kCatchUp}, 0, amsgrad, false);
  claims.note("row kernel, closed forms: has the bits of the CPU kernel", table == expected);
}

// The search as a kernel: stores the position of each row in the list, or -1.
struct Search {
  static constexpr int kThreads = cuda::kRowThreads;
  using Shared = cuda::RowSearch::Shared;
  Rows rows;
  int64_t most;    // an upper bound of the length of the list
  int64_t number;  // of rows of a block
  int64_t* found;

  int phases() const { return cuda::RowSearch::phases(most) + 1; }
  void phase(int phase, int64_t block, int64_t thread, Shared& shared) const {
    if (phase + 1 < phases()) {
      return cuda::RowSearch{rows, block * number, number}.phase(phase, phases() - 1, thread, shared);
    }
    if (thread < number) found[block * number + thread] = shared.places[thread];
  }
};

void check_search(int64_t count, int64_t gap, int64_t number, Claims& claims) {
  const int64_t row_count = (count + 2) * gap + 3 * number;
  std::vector<int64_t> list;
  for (int64_t k = 0; k < count; ++k) list.push_back(gap + k * gap + k % gap);
  const Rows rows{list.data(), nullptr, nullptr, count, 1};
  const int64_t blocks = (row_count + number - 1) / number;
  std::vector<int64_t> expected(static_cast<size_t>(blocks * number), -1);
  for (int64_t k = 0; k < count; ++k) expected[static_cast<size_t>(list[static_cast<size_t>(k)])] = k;
  for (const int64_t most : {count, 2 * count + 1}) {
    std::vector<int64_t> found(expected.size(), -2);
    emulate(Search{rows, most, number, found.data()}, blocks);
    claims.note("row search: finds every row of a block", found == expected);
  }
}

}  // namespace

int main() {
  Claims claims;
  for (const int64_t count : {0, 1, 2, 255, 256, 257, 700, 65537}) {
    for (const int64_t gap : {1, 3}) check_search(count, gap, cuda::kRowThreads, claims);
    if (count < 1000) check_search(count, 40, 8, claims);
  }
  for (const Pair& pair : kPairs) {
    for (const bool amsgrad : {false, true}) {
      for (const bool flag : {false, true}) {
        for (const int64_t width : kWidths) {
          check_slices(pair, width, amsgrad, true, flag, claims);
          check_slices(pair, width, amsgrad, false, flag, claims);
        }
        for (const int64_t width : {int64_t{1}, int64_t{130}}) {
          check_stale(pair, width, amsgrad, flag, Touch::kGradient, claims);
          check_stale(pair, width, amsgrad, flag, Touch::kSome, claims);
          check_stale(pair, width, amsgrad, flag, Touch::kAll, claims);
        }
      }
      if (pair.dtype != FASTADAM_FLOAT64) check_jumps(pair.dtype, amsgrad, claims);
    }
  }
  return failures == 0 ? 0 : 1;
}
