// SPDX-License-Identifier: Apache-2.0
// Checks the kernels that sum gradients and their squares: every usable ISA against plain scalar loops, bit for bit,
// on several threads, and one digest for all machines. Prints a line per check. Its argument is a Scope.
#include <memory>
#include <string>
#include <vector>

#include "../../csrc/core/norm.h"
#include "../../csrc/cpu/launch.h"
#include "harness.h"
#include "row_reference.h"

namespace {

using namespace kernel_test;

// The digest of the results of check_accumulate, then check_norms, then check_row_sums; see Digests.
constexpr uint64_t kDigest = 0x9db4819215716cd9;

// `indices` is null for a dense gradient.
void expect_sum(const TensorArgs& tensor, const std::vector<int64_t>* indices, int64_t width, bool restart) {
  const DType state = state_dtype(tensor.dtype);
  in_compute_type(tensor.dtype, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t i = 0; i < tensor.size; ++i) {
      const std::vector<int64_t> positions =
          indices == nullptr ? std::vector<int64_t>{0} : positions_of(*indices, i / width);
      if (restart) write(tensor.accumulator, state, i, 0);
      if (positions.empty()) continue;
      const int64_t column = indices == nullptr ? i : i % width;
      const T sum = sum_of_values(tensor, positions, width, column, true, static_cast<T>(kInfinity));
      const T before = static_cast<T>(read(tensor.accumulator, state, i));
      write(tensor.accumulator, state, i, static_cast<double>(before + sum));
    }
  });
}

struct Sum {
  Pair pair;
  int64_t size;
  Array total;
  Array grads;

  Sum(const Pair& dtypes, int64_t count, int64_t grad_count)
      : pair(dtypes),
        size(count),
        total(slice_values(state_dtype(dtypes.dtype), count)),
        grads(slice_values(dtypes.grad_dtype, grad_count + kSteps)) {}
  Sum(const Sum& o, int64_t offset) : pair(o.pair), size(o.size), total(o.total, offset), grads(o.grads, offset) {}

  TensorArgs args(int t, const Rows* rows) const {
    TensorArgs tensor{};
    tensor.accumulator = total.at(0);
    tensor.grad = grads.at(t);
    tensor.size = size;
    tensor.next = -1;
    tensor.grad_factor = 0.37 * (t + 1);
    tensor.dtype = pair.dtype;
    tensor.grad_dtype = pair.grad_dtype;
    tensor.rows = rows;
    return tensor;
  }
};

void check_accumulate(const Pair& pair, int64_t width, bool dense, bool restart, Claims& claims, Digests& digests) {
  const Sum initial(pair, kRows * width, (dense ? kRows : kMaxIndices) * width);
  const Sum expected(initial, 0);
  for (int t = 0; t < kSteps; ++t) {
    expect_sum(expected.args(t, nullptr), dense ? nullptr : &kIndices[t], width, restart && t % 3 == 0);
  }
  for_each_isa([&](const cpu::Isa& isa) {
    for (const int64_t offset : {0, 3}) {
      for (const int64_t piece : {initial.size, width * 2 / 3 + 2}) {
        const Sum sum(initial, offset);
        for (int t = 0; t < kSteps; ++t) {
          const Occurrences sorted(kIndices[t]);
          const Rows rows = sorted.view(width);
          const TensorArgs tensor = sum.args(t, dense ? nullptr : &rows);
          const FlushDenormals flush;
          for_each_cut(sum.size, piece, [&](int64_t begin, int64_t end) {
            isa.kernels->accumulate[static_cast<int>(tensor.grad_dtype)](tensor, begin, end, restart && t % 3 == 0);
          });
        }
        const std::string what = dense ? " sums " : " sums rows of ";
        claims.note(isa.name + what + pair.name() + " with the bits of the scalar loop", sum.total == expected.total);
        if (offset == 0 && piece == initial.size) sum.total.add_to(digests.of(isa));
      }
    }
  });
}

// Adds neighbours until one value is left.
double add_neighbours(std::vector<double> values) {
  while (values.size() > 1) {
    std::vector<double> sums;
    for (size_t i = 0; i < values.size(); i += 2) {
      sums.push_back(i + 1 < values.size() ? values[i] + values[i + 1] : values[i]);
    }
    values = sums;
  }
  return values.empty() ? 0 : values[0];
}

__attribute__((noinline)) double squares(const void* grad, DType dtype, int64_t begin, int64_t size, double clip_value,
                                         bool require_finite) {
  std::vector<double> lanes(32);
  const double limit = dtype == FASTADAM_FLOAT64 ? clip_value : static_cast<double>(static_cast<float>(clip_value));
  for (int64_t i = 0; i < size; ++i) {
    const double g = read(grad, dtype, begin + i);
    if (require_finite && !std::isfinite(g)) return kNan;
    const double clipped = g > limit ? limit : g < -limit ? -limit : g;
    const double as_float = static_cast<double>(static_cast<float>(clipped));  // flushes denormals
    const double x = dtype == FASTADAM_FLOAT64 ? clipped : as_float;
    lanes[static_cast<size_t>(i % 32)] += x * x;
  }
  return add_neighbours(lanes);
}

double expect_squares(const void* grad, DType dtype, int64_t begin, int64_t size, double clip_value,
                      bool require_finite) {
  const FlushDenormals flush;
  return squares(grad, dtype, begin, size, clip_value, require_finite);
}

// Gradients of one dtype: ordinary numbers, numbers whose squares overflow in float, numbers with one infinity, which a
// clip would hide, and numbers with several elements that are not finite.
std::vector<Array> gradients(DType dtype, int64_t size, int64_t offset) {
  std::vector<Array> grads;
  Random random{static_cast<uint64_t>(size)};
  for (const int large : {0, dtype == FASTADAM_FLOAT64 ? 600 : dtype == FASTADAM_FLOAT16 ? 8 : 100}) {
    grads.emplace_back(dtype, size, offset);
    for (int64_t i = 0; i < size; ++i) grads.back().set(i, std::ldexp(random.number(dtype), large));
  }
  grads.emplace_back(grads[0], offset);
  if (size > 0) grads.back().set(size / 3, kInfinity);
  const Array values = slice_values(dtype, size);
  grads.emplace_back(values, offset);
  return grads;
}

void check_norms(DType dtype, int64_t size, Claims& claims, Digests& digests) {
  for (const int64_t offset : {0, 3}) {
    for (const Array& grad : gradients(dtype, size, offset)) {
      for (int mode = 0; mode < 4; ++mode) {
        const bool require_finite = mode % 2 != 0;
        const double clip_value = mode / 2 == 0 ? kInfinity : 0.3;
        const int64_t begin = size > 40 ? 7 : 0;
        const double expected = expect_squares(grad.at(0), dtype, begin, size - begin, clip_value, require_finite);
        for_each_isa([&](const cpu::Isa& isa) {
          const FlushDenormals flush;
          const auto kernel = isa.kernels->norm[static_cast<int>(dtype)][require_finite];
          Array sum(FASTADAM_FLOAT64, 1);
          sum.set(0, kernel(grad.at(0), begin, size - begin, clip_value));
          const std::string claim = require_finite ? ", checking that they are finite," : "";
          claims.note(isa.name + std::string(" squares ") + kFormats[static_cast<int>(dtype)].name + claim +
                          " with the bits of the scalar loop",
                      canonical(read(sum.at(0), FASTADAM_FLOAT64, 0)) == canonical(expected));
          if (offset == 0) sum.add_to(digests.of(isa));
        });
      }
    }
  }
}

void check_row_sums(DType dtype, int64_t width, Claims& claims, Digests& digests) {
  const Array values = slice_values(dtype, kMaxIndices * width);
  for (const std::vector<int64_t>& indices : kIndices) {
    RowSums expected(indices, width, values, dtype, 0);
    expected.expect();
    for_each_isa([&](const cpu::Isa& isa) {
      for (const int64_t offset : {0, 3}) {
        const Array moved(values, offset);
        for (const int64_t piece : {kRows * width, width * 2 / 3 + 2}) {
          const RowSums actual(indices, width, moved, dtype, offset);
          const FlushDenormals flush;
          for_each_cut(actual.rows.count * width, piece, [&](int64_t begin, int64_t end) {
            isa.kernels->sum_rows[static_cast<int>(dtype)](actual.tensor, begin, end, actual.sums.at(0));
          });
          const std::string claim = std::string(" sums rows of ") + kFormats[static_cast<int>(dtype)].name;
          claims.note(isa.name + claim + " with the bits of the scalar loop", actual.sums == expected.sums);
          if (offset == 0 && piece == kRows * width) actual.sums.add_to(digests.of(isa));
        }
      }
    });
  }
}

void check_kernels() {
  Digests digests(kDigest);
  Claims claims;
  for (const Pair& pair : kPairs) {
    for (const int64_t width : kWidths) {
      for (int mode = 0; mode < 4; ++mode) {
        check_accumulate(pair, width, mode / 2 != 0, mode % 2 != 0, claims, digests);
      }
    }
  }
  for (int dtype = 0; dtype < kDTypeCount; ++dtype) {
    for (const int64_t size : {0, 1, 31, 32, 33, 100, 4095, 4096}) {
      check_norms(static_cast<DType>(dtype), size, claims, digests);
    }
  }
  for (int dtype = 0; dtype < kDTypeCount; ++dtype) {
    for (const int64_t width : kWidths) check_row_sums(static_cast<DType>(dtype), width, claims, digests);
  }
  bool same = true;
  for (int64_t count = 0; count < 70; ++count) {
    std::vector<double> values;
    for (int64_t i = 0; i < count; ++i) values.push_back(1 / static_cast<double>(i + 3));
    const double expected = add_neighbours(values);
    same = same && pairwise_sum(values.data(), count) == expected;
  }
  report(same, "pairwise_sum adds neighbours");
}

// Large enough for three threads: dense and sparse gradients, one variable with two gradients, and norms.
void check_threads() {
  constexpr int64_t kWidth = 3000;
  const Occurrences sorted(kIndices[0]);
  const Rows rows = sorted.view(kWidth);
  std::vector<Sum> initial;
  for (const Pair& pair : kPairs) initial.emplace_back(pair, kRows * kWidth, kRows * kWidth);
  const auto tensors_of = [&](const std::vector<Sum>& sums) {
    std::vector<TensorArgs> tensors;
    for (size_t k = 0; k < sums.size(); ++k) {
      tensors.push_back(sums[k].args(0, k % 2 == 0 ? nullptr : &rows));
      tensors[k].var = sums[k].total.at(0);
      tensors[k].grad_size = sums[k].size - static_cast<int64_t>(k);
    }
    tensors[3].next = static_cast<int64_t>(tensors.size());
    tensors.push_back(sums[3].args(1, nullptr));
    return tensors;
  };
  const std::vector<Sum> expected(initial);
  for (size_t k = 0; k < expected.size(); ++k) {
    expect_sum(tensors_of(expected)[k], k % 2 == 0 ? nullptr : &kIndices[0], kWidth, true);
  }
  expect_sum(tensors_of(expected).back(), nullptr, kWidth, false);
  std::vector<int64_t> heads;
  std::vector<int64_t> offsets{0};
  std::vector<int64_t> blocks{0};
  std::vector<double> expected_squares;
  const std::vector<TensorArgs> reads = tensors_of(initial);
  for (size_t k = 0; k < initial.size(); ++k) {
    heads.push_back(static_cast<int64_t>(k));
    offsets.push_back(offsets.back() + initial[k].size);
    for (int64_t begin = 0; begin < reads[k].grad_size; begin += 4096) {
      const int64_t size = std::min<int64_t>(4096, reads[k].grad_size - begin);
      expected_squares.push_back(expect_squares(reads[k].grad, reads[k].grad_dtype, begin, size, 0.3, false));
    }
    blocks.push_back(static_cast<int64_t>(expected_squares.size()));
  }
  const auto count = static_cast<int64_t>(heads.size());
  for (const int threads : {1, 2, 3}) {
    cpu::set_num_threads(threads);
    const std::vector<Sum> sums(initial);
    const std::vector<TensorArgs> tensors = tensors_of(sums);
    cpu::run_accumulate({{tensors.data(), heads.data(), offsets.data(), count}, true});
    std::vector<double> actual_squares(expected_squares.size());
    cpu::run_norm({reads.data(), blocks.data(), count, 0.3, false, actual_squares.data(), nullptr});
    bool same = true;
    for (size_t k = 0; k < sums.size(); ++k) same = same && sums[k].total == expected[k].total;
    for (size_t i = 0; i < actual_squares.size(); ++i)
      same = same && canonical(actual_squares[i]) == canonical(expected_squares[i]);
    report(same, "threads: " + std::to_string(threads) + " give the bits of the scalar loop");
  }
  cpu::set_num_threads(0);
}

// Gradients of every dtype in one call; one of them is left out.
void check_row_sum_threads() {
  constexpr int64_t kWidth = 9000;  // large enough for three threads
  for (const int threads : {1, 2, 3}) {
    cpu::set_num_threads(threads);
    std::vector<TensorArgs> tensors;
    std::vector<void*> sums;
    std::vector<int64_t> offsets{0};
    std::vector<std::unique_ptr<RowSums>> expected;
    std::vector<std::unique_ptr<RowSums>> actual;
    std::vector<Array> values;
    for (int dtype = 0; dtype < kDTypeCount; ++dtype)
      values.push_back(slice_values(static_cast<DType>(dtype), kMaxIndices * kWidth));
    int64_t value_count = 0;
    for (int k = 0; k < kDTypeCount; ++k) {
      const auto dtype = static_cast<DType>(k);
      for (auto* list : {&expected, &actual}) {
        list->push_back(std::make_unique<RowSums>(kIndices[k], kWidth, values[static_cast<size_t>(k)], dtype, k));
      }
      const bool left_out = k == 2;
      if (!left_out) expected.back()->expect();
      tensors.push_back(actual.back()->tensor);
      sums.push_back(left_out ? nullptr : actual.back()->sums.at(0));
      offsets.push_back(offsets.back() + (left_out ? 0 : actual.back()->rows.count * kWidth));
      value_count += left_out ? 0 : tensors.back().grad_size;
    }
    cpu::run_sum_rows({tensors.data(), offsets.data(), kDTypeCount, value_count, sums.data()});
    bool same = true;
    for (size_t k = 0; k < actual.size(); ++k) same = same && actual[k]->sums == expected[k]->sums;
    report(same, "threads: " + std::to_string(threads) + " give the row sums of the scalar loop");
  }
  cpu::set_num_threads(0);
}

}  // namespace

int main(int argc, char** argv) {
  read_scope(argc, argv);
  if (scope != Scope::kEmulated) check_threads();
  if (scope != Scope::kEmulated) check_row_sum_threads();
  if (scope != Scope::kThreads) check_kernels();
  return failures == 0 ? 0 : 1;
}
