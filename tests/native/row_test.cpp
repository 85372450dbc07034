// SPDX-License-Identifier: Apache-2.0
// Checks the kernels for IndexedSlices and for deferred tables: every usable ISA against plain scalar loops, bit for
// bit, in pieces that begin and end within a row, on several threads, and one digest for all machines. Prints a line
// per check. Its argument is a Scope.
#include <string>
#include <vector>

#include "../../csrc/cpu/launch.h"
#include "harness.h"
#include "row_reference.h"

namespace {

using namespace kernel_test;

// The digest of the results of check_slices, then check_stale; see Digests.
constexpr uint64_t kDigest = 0x1f8c392025921785;

void run_pieces(cpu::UpdateKernel kernel, const StepArgs& step, const TensorArgs& tensor, int64_t total,
                int64_t piece) {
  const FlushDenormals flush;
  for_each_cut(total, piece, [&](int64_t begin, int64_t end) { kernel(step, tensor, begin, end); });
}

// Several steps with IndexedSlices, one for each element of kIndices.
void check_slices(const Pair& pair, int64_t width, bool amsgrad, bool transform, bool lazy, Claims& claims,
                  Digests& digests) {
  const Variable initial(pair.dtype, kRows * width);
  const Array values = slice_values(pair.grad_dtype, kMaxIndices * width + kSteps);
  const Variable expected(initial, 0);
  const auto args = [&](const Variable& table, const Array& grads, int t, const Rows& rows) {
    return with_slices(table.args(t, amsgrad), grads, pair, t, rows);
  };
  for (int t = 0; t < kSteps; ++t) {
    expect_slices(args(expected, values, t, {}), kIndices[t], width, t, transform, lazy);
  }
  for_each_isa([&](const cpu::Isa& isa) {
    const cpu::UpdateKernel* kernels = lazy ? isa.kernels->touched_rows : isa.kernels->all_rows;
    for (int variant = 0; variant < 8; ++variant) {
      const int64_t offset = variant % 2 * 3;
      const int64_t piece = variant / 2 % 2 == 0 ? initial.size : width * 2 / 3 + 2;
      const Variable table(initial, offset);
      const Array grads(values, offset);
      for (int t = 0; t < kSteps; ++t) {
        const Occurrences sorted(kIndices[t]);
        const Rows rows = sorted.view(width);
        StepArgs step = step_of(t, amsgrad, transform);
        step.prefetch = variant / 4 != 0;
        step.lazy = lazy;
        const int64_t total = lazy ? rows.count * width : table.size;
        run_pieces(kernels[static_cast<int>(pair.dtype)], step, args(table, grads, t, rows), total, piece);
      }
      const std::string rule = lazy ? ", only rows with a gradient" : ", all rows";
      claims.note(isa.name + rule + ": " + pair.name() + " has the bits of the scalar loop", table == expected);
      if (variant == 0) table.add_to(digests.of(isa));
    }
  });
}

enum class Touch { kAll, kSome, kGradient };

// Rows with every gap are brought up to date: all rows, some rows, or some rows that then get a gradient.
void check_stale(const Pair& pair, int64_t width, bool amsgrad, bool transform, bool may_stop, Touch touch, int64_t now,
                 Claims& claims, Digests& digests) {
  constexpr int t = 2;
  const Variable initial = stale_table(pair, width);
  const History history(pair.dtype, now, !may_stop);
  std::vector<int32_t> had;
  for (int64_t row = 0; row < kStaleRows; ++row) {
    had.push_back(static_cast<int32_t>(std::max<int64_t>(0, now - kGaps[row % 6])));
  }
  std::vector<int64_t> indices{5, 14};
  for (int64_t row = kStaleRows - 1; row >= 0; --row) {
    if (touch == Touch::kAll || row != kLeftRow) indices.push_back(row);
  }
  const Occurrences sorted(indices);
  const Rows rows = sorted.view(width);
  std::vector<int32_t> from;
  for (const int64_t row : sorted.rows) from.push_back(had[static_cast<size_t>(row)]);
  const StaleRows stale = history.view(from.data(), width, may_stop);
  const Array values = slice_values(pair.grad_dtype, static_cast<int64_t>(indices.size()) * width + t);
  const auto args = [&](const Variable& table, const Array& grads) {
    TensorArgs tensor = with_slices(table.args(t, amsgrad), grads, pair, t, rows);
    tensor.stale = &stale;
    if (touch != Touch::kGradient) tensor.grad = nullptr;
    if (touch == Touch::kAll) tensor.rows = nullptr;
    return tensor;
  };
  const Variable expected(initial, 0);
  const bool leave_to_digest = is_brief() && now > 9;  // the loop over 203 steps takes most of the time
  if (!leave_to_digest) {
    expect_replay(args(expected, values), history, sorted.rows, had, width, t);
    if (touch == Touch::kGradient) expect_slices(args(expected, values), indices, width, t, transform, true);
  }
  for_each_isa([&](const cpu::Isa& isa) {
    for (const int64_t offset : {0, 3}) {
      for (const int64_t piece : {initial.size, width * 2 / 3 + 2}) {
        const Variable table(initial, offset);
        const Array grads(values, offset);
        const TensorArgs tensor = args(table, grads);
        const auto kernel = isa.kernels->touched_rows[static_cast<int>(pair.dtype)];
        run_pieces(kernel, step_of(t, amsgrad, transform), tensor, rows.count * width, piece);
        const std::string rule = may_stop ? ", deferred and may stop early: " : ", deferred: ";
        claims.note(isa.name + rule + pair.name() + " has the bits of dense steps",
                    leave_to_digest || table == expected);
        if (offset == 0 && piece == initial.size) table.add_to(digests.of(isa));
      }
    }
  });
}

// The same for steps that follow the rule for dense gradients: these are accumulated, and 0 in the rows that waited.
// With averages, which move in every step, too.
void check_accumulated(DType dtype, int64_t width, bool amsgrad, bool may_stop, bool averages, int64_t now,
                       Claims& claims) {
  constexpr int t = 2;
  const DType state = state_dtype(dtype);
  const Variable initial = stale_table(Pair{dtype, dtype}, width);
  const History history(dtype, now, !may_stop);
  std::vector<int32_t> had;
  for (int64_t row = 0; row < kStaleRows; ++row) {
    had.push_back(static_cast<int32_t>(std::max<int64_t>(0, now - kGaps[row % 6])));
  }
  std::vector<int64_t> indices{5, 14};
  for (int64_t row = kStaleRows - 1; row >= 0; --row) {
    if (row != kLeftRow) indices.push_back(row);
  }
  const Occurrences sorted(indices);
  const Rows rows = sorted.view(width);
  std::vector<int32_t> from;
  for (const int64_t row : sorted.rows) from.push_back(had[static_cast<size_t>(row)]);
  StaleRows stale = history.view(from.data(), width, may_stop);
  stale.dense = true;
  const Array sums = slice_values(state, initial.size);
  Array first(state, initial.size);
  for (int64_t i = 0; i < initial.size; ++i)
    first.set(i, read(initial.var.at(0), dtype, i) * static_cast<double>(1 + i % 3));
  for (const bool has_gradient : {false, true}) {
    const auto args = [&](const Variable& table, const Array& average) {
      TensorArgs tensor = table.args(t, amsgrad);
      tensor.average = averages ? average.at(0) : nullptr;
      tensor.accumulator = sums.at(0);
      tensor.grad = has_gradient ? sums.at(0) : nullptr;
      tensor.grad_dtype = state;
      tensor.rows = &rows;
      tensor.stale = &stale;
      return tensor;
    };
    const Variable expected(initial, 0);
    const Array expected_average(first, 0);
    expect_dense_replay(args(expected, expected_average), history, sorted.rows, had, width, t);
    for_each_isa([&](const cpu::Isa& isa) {
      for (const int64_t piece : {initial.size, width * 2 / 3 + 2}) {
        const Variable table(initial, 3);
        const Array average(first, 3);
        const auto kernel = isa.kernels->touched_rows[static_cast<int>(dtype)];
        run_pieces(kernel, step_of(t, amsgrad, true), args(table, average), rows.count * width, piece);
        const std::string rule =
            std::string(isa.name) + (averages ? ", accumulated with averages: " : ", accumulated: ");
        claims.note(rule + kFormats[static_cast<int>(dtype)].name + " has the bits of dense steps",
                    table == expected && average == expected_average);
      }
    });
  }
}

void check_kernels() {
  Digests digests(kDigest);
  Claims claims;
  for (const Pair& pair : kPairs) {
    for (const int64_t width : kWidths) {
      for (int mode = 0; mode < 8; ++mode) {
        check_slices(pair, width, mode / 4 != 0, mode / 2 % 2 != 0, mode % 2 != 0, claims, digests);
      }
    }
  }
  for (const Pair& pair : kPairs) {
    for (int mode = 0; mode < 8; ++mode) {
      const bool amsgrad = mode / 4 != 0;
      const bool transform = mode / 2 % 2 != 0;
      const bool may_stop = mode % 2 != 0;
      for (const int64_t now : {0, 9, 203}) {
        check_stale(pair, 300, amsgrad, transform, may_stop, Touch::kGradient, now, claims, digests);
        check_stale(pair, 5, amsgrad, transform, may_stop, Touch::kGradient, now, claims, digests);
        check_stale(pair, 130, amsgrad, transform, may_stop, Touch::kSome, now, claims, digests);
        check_stale(pair, 1, amsgrad, transform, may_stop, Touch::kAll, now, claims, digests);
      }
    }
  }
  for (const DType dtype : {FASTADAM_FLOAT16, FASTADAM_BFLOAT16, FASTADAM_FLOAT32, FASTADAM_FLOAT64}) {
    for (int mode = 0; mode < 8; ++mode) {
      for (const int64_t now : {0, 9, 203}) {
        if (is_brief() && now > 9) continue;  // in no digest, and as long as the rest
        check_accumulated(dtype, 5, mode / 4 != 0, mode / 2 % 2 != 0, mode % 2 != 0, now, claims);
        check_accumulated(dtype, 130, mode / 4 != 0, mode / 2 % 2 != 0, mode % 2 != 0, now, claims);
      }
    }
  }
}

// `rates`: the rates of the steps that the only row of `table` has missed.
void catch_up(const Variable& table, const std::vector<float>& rates, bool may_stop) {
  const std::vector<float> keeps(rates.size(), 1);
  std::vector<float> peaks(rates.size() / kPeakSteps + 1, 0);
  for (size_t i = 0; i < rates.size(); ++i) {
    float& peak = peaks[i / kPeakSteps];
    if (std::fabs(rates[i]) > peak) peak = std::fabs(rates[i]);
  }
  const int32_t from = 0;
  const auto now = static_cast<int64_t>(rates.size());
  const StaleRows stale{rates.data(), keeps.data(), peaks.data(), &from, now, table.size, may_stop};
  TensorArgs tensor = table.args(0, false);
  tensor.grad = nullptr;
  tensor.stale = &stale;
  const auto kernel = cpu::current_isa().kernels->touched_rows[static_cast<int>(FASTADAM_FLOAT32)];
  run_pieces(kernel, step_of(0, false, false), tensor, table.size, table.size);
}

Variable row_of(double var, double m, double v) {
  Variable table(FASTADAM_FLOAT32, 3);
  for (int64_t i = 0; i < table.size; ++i) {
    table.var.set(i, var);
    table.m.set(i, m);
    table.v.set(i, v);
  }
  return table;
}

bool stops_correctly(const Variable& stopped, const std::vector<float>& rates) {
  const Variable replayed(stopped, 0);
  catch_up(stopped, rates, true);
  catch_up(replayed, rates, false);
  return stopped == replayed;
}

void check_rest() {
  for_each_isa([](const cpu::Isa& isa) {
    const std::string name = isa.name;
    // The bits do not show whether replaying stopped, so a NaN stands where no rate should be read any more.
    std::vector<float> rates(200, 0.01f);
    rates[100] = static_cast<float>(kNan);
    const Variable resting = row_of(1, 0x1p-60, 1);
    const Variable moving(resting, 0);
    catch_up(resting, rates, true);
    catch_up(moving, rates, false);
    report(read(resting.var.at(0), FASTADAM_FLOAT32, 2) == 1, name + " stops replaying a row at rest");
    report(std::isnan(read(moving.var.at(0), FASTADAM_FLOAT32, 2)), name + " replays every step if it may not stop");
    report(resting.m == moving.m && resting.v == moving.v, name + " still decays the moments of a row at rest");
    bool not_too_early = true;
    for (int i = 0; i < 256; ++i) {
      const Variable row = row_of(1, std::ldexp(256 + i, -16), 1);
      not_too_early = stops_correctly(row, std::vector<float>(300, 0.01f)) && not_too_early;
    }
    report(not_too_early, name + " does not stop before a row is at rest");
    std::vector<float> late(200, 0x1p-12f);
    late[70] = 0x1p20f;
    report(stops_correctly(row_of(1, 0x1p-30, 1), late), name + " considers the largest later rate");
    // m / sqrt(v) is flushed to zero, but the change of the variable is not.
    const bool moves = stops_correctly(row_of(0, 0x1p-110, 0x1p40), std::vector<float>(50, 0x1p20f));
    report(moves, name + " does not stop because m / sqrt(v) underflows");
    std::vector<float> back(50, 0.01f);
    back[30] = -0.01f;
    report(stops_correctly(row_of(-0.0, 0, 1), back), name + " turns -0 into +0 by a change of -0");
  });
}

// A table of each pair of dtypes; two of them are deferred. Unless the step is lazy, one also has a dense gradient.
struct Mixed {
  static constexpr int64_t kWidth = 200;
  static constexpr int64_t kCount = 130;
  bool lazy;
  const History* history;
  std::vector<int64_t> indices;
  Occurrences sorted{indices};
  Rows rows = sorted.view(kWidth);
  std::vector<int32_t> had = std::vector<int32_t>(kCount, 3);
  StaleRows stale;
  std::vector<Variable> tables;
  std::vector<Array> values;
  std::vector<TensorArgs> tensors;

  static std::vector<int64_t> some_indices() {
    Random random{7};
    std::vector<int64_t> some;
    for (int i = 0; i < 200; ++i) some.push_back(random.below(kCount));
    return some;
  }
  Mixed(bool is_lazy, const History& steps)
      : lazy(is_lazy), history(&steps), indices(some_indices()), stale(steps.view(had.data(), kWidth, false)) {
    for (const Pair& pair : kPairs) {
      tables.emplace_back(pair.dtype, kCount * kWidth);
      values.push_back(slice_values(pair.grad_dtype, 200 * kWidth));
    }
    for (size_t k = 0; k < tables.size(); ++k) {
      tensors.push_back(with_slices(tables[k].args(0, true), values[k], kPairs[k], 0, rows));
      if (is_deferred(k)) tensors[k].stale = &stale;
    }
    if (lazy) return;
    tensors[0].next = static_cast<int64_t>(tensors.size());
    tensors.push_back(tables[0].args(1, true));
  }
  Mixed(const Mixed&) = delete;
  Mixed& operator=(const Mixed&) = delete;

  static bool is_deferred(size_t k) { return k == 2 || k == 5; }
  void expect_all() const {
    for (size_t k = 0; k < tables.size(); ++k) {
      if (is_deferred(k)) expect_replay(tensors[k], *history, sorted.rows, had, kWidth, 0);
      expect_slices(tensors[k], indices, kWidth, 0, true, lazy || is_deferred(k));
    }
    if (!lazy) expect(tensors.back(), 0, true);
  }
  void run_all() const {
    std::vector<int64_t> heads;
    std::vector<int64_t> offsets{0};
    for (size_t k = 0; k < tables.size(); ++k) {
      heads.push_back(static_cast<int64_t>(k));
      offsets.push_back(offsets.back() + (lazy || is_deferred(k) ? rows.count * kWidth : tables[k].size));
    }
    StepArgs step = step_of(0, true, true);
    step.lazy = lazy;
    step.chains = {tensors.data(), heads.data(), offsets.data(), static_cast<int64_t>(heads.size())};
    cpu::run_step(step);
  }
};

void check_threads() {
  const History history(FASTADAM_FLOAT32, 20, true);
  for (const bool lazy : {false, true}) {
    const Mixed expected(lazy, history);
    expected.expect_all();
    for (const int threads : {1, 2, 3}) {
      cpu::set_num_threads(threads);
      const Mixed mixed(lazy, history);
      mixed.run_all();
      const std::string rule = lazy ? " give the bits of the scalar loop, only rows with a gradient"
                                    : " give the bits of the scalar loop, all rows";
      report(mixed.tables == expected.tables, "threads: " + std::to_string(threads) + rule);
    }
  }
  cpu::set_num_threads(0);
}

}  // namespace

int main(int argc, char** argv) {
  read_scope(argc, argv);
  if (scope != Scope::kEmulated) check_threads();
  if (scope != Scope::kThreads) {
    check_rest();
    check_kernels();
  }
  return failures == 0 ? 0 : 1;
}
