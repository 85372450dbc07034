// SPDX-License-Identifier: Apache-2.0
// For the native tests: IndexedSlices, deferred tables, and the steps of rows as plain scalar loops. It is written
// independently of csrc, which it checks.
#pragma once

#include <numeric>
#include <vector>

#include "reference.h"

namespace kernel_test {

// Calls visit(T) with a zero of the compute type of this dtype, while denormals are flushed.
template <class Visit>
void in_compute_type(DType dtype, Visit visit) {
  const FlushDenormals flush;
  if (dtype == FASTADAM_FLOAT64) visit(double{});
  if (dtype != FASTADAM_FLOAT64) visit(float{});
}

// Indices as Rows, by a stable sort.
struct Occurrences {
  std::vector<int64_t> rows;
  std::vector<int64_t> starts;
  std::vector<int64_t> order;

  explicit Occurrences(const std::vector<int64_t>& indices) : order(indices.size()) {
    const auto row = [&indices](int64_t position) { return indices[static_cast<size_t>(position)]; };
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [row](int64_t a, int64_t b) { return row(a) < row(b); });
    for (size_t i = 0; i < order.size(); ++i) {
      if (i > 0 && row(order[i]) == rows.back()) continue;
      rows.push_back(row(order[i]));
      starts.push_back(static_cast<int64_t>(i));
    }
    starts.push_back(static_cast<int64_t>(order.size()));
  }
  Rows view(int64_t width) const {
    return {rows.data(), starts.data(), order.data(), static_cast<int64_t>(rows.size()), width};
  }
};

// Indices of IndexedSlices for a table of kRows rows: unsorted and repeated, none, one, few, and all in descending
// order.
constexpr int64_t kRows = 11;
constexpr int64_t kMaxIndices = 12;
constexpr int64_t kWidths[] = {1, 5, 127, 128, 129, 300};
inline const std::vector<int64_t> kIndices[kSteps] = {
    {3, 0, 10, 5, 5, 0, 5}, {}, {10}, {7, 6, 7}, {10, 9, 8, 7, 6, 4, 4, 5, 3, 2, 1, 0}};

// Values of IndexedSlices, including zeros of both signs, infinities and NaNs.
inline Array slice_values(DType dtype, int64_t size, int64_t offset = 0) {
  Array values(dtype, size, offset);
  Random random{static_cast<uint64_t>(size * 31 + static_cast<int>(dtype))};
  for (int64_t i = 0; i < size; ++i) {
    const double sign = i % 2 == 0 ? 1 : -1;
    const double number = random.number(dtype);
    values.set(i, i % 211 == 8 ? kNan : i % 307 == 14 ? sign * kInfinity : i % 11 == 3 ? sign * 0 : number);
  }
  return values;
}

// The positions in `indices` of a row.
inline std::vector<int64_t> positions_of(const std::vector<int64_t>& indices, int64_t row) {
  std::vector<int64_t> positions;
  for (size_t i = 0; i < indices.size(); ++i) {
    if (indices[i] == row) positions.push_back(static_cast<int64_t>(i));
  }
  return positions;
}

template <class T>
T sum_of_values(const TensorArgs& tensor, const std::vector<int64_t>& positions, int64_t width, int64_t column,
                bool transform, T clip_value) {
  T sum = 0;
  for (const int64_t position : positions) {
    T g = static_cast<T>(read(tensor.grad, tensor.grad_dtype, position * width + column));
    if (transform && g > clip_value) g = clip_value;
    if (transform && g < -clip_value) g = -clip_value;
    if (transform) g = g * static_cast<T>(tensor.grad_factor);
    sum = sum + g;
  }
  return sum;
}

// IndexedSlices, and memory for the sums of their rows.
struct RowSums {
  std::vector<int64_t> indices;
  Occurrences sorted;
  Rows rows;
  TensorArgs tensor{};
  Array sums;

  RowSums(const std::vector<int64_t>& ids, int64_t width, const Array& values, DType dtype, int64_t offset)
      : indices(ids), sorted(ids), rows(sorted.view(width)), sums(state_dtype(dtype), rows.count * width, offset) {
    tensor.grad = values.at(0);
    tensor.grad_dtype = dtype;
    tensor.grad_size = static_cast<int64_t>(ids.size()) * width;
    tensor.grad_factor = 0.37;  // must not affect the sums
    tensor.rows = &rows;
    for (int64_t i = 0; i < rows.count * width; ++i) sums.set(i, kNan);
  }
  RowSums(const RowSums&) = delete;
  RowSums& operator=(const RowSums&) = delete;

  void expect() {
    in_compute_type(tensor.grad_dtype, [&](auto zero) {
      for (int64_t i = 0; i < rows.count * rows.width; ++i) {
        const auto positions = positions_of(indices, sorted.rows[static_cast<size_t>(i / rows.width)]);
        sums.set(i, static_cast<double>(sum_of_values(tensor, positions, rows.width, i % rows.width, false, zero)));
      }
    });
  }
};

// Updates one element by TF's rule for IndexedSlices. `sum` is null if its row has no gradient.
template <class T>
void adam_row(const TensorArgs& tensor, int64_t i, const T* sum, T alpha, T keep, const StepScalars<T>& s) {
  const DType state = state_dtype(tensor.dtype);
  T m = static_cast<T>(read(tensor.m, state, i)) * s.beta_1;
  T v = static_cast<T>(read(tensor.v, state, i)) * s.beta_2;
  if (sum != nullptr) m = m + *sum * s.one_minus_beta_1;
  if (sum != nullptr) v = v + *sum * *sum * s.one_minus_beta_2;
  T second = v;
  if (tensor.vhat != nullptr) {
    second = static_cast<T>(read(tensor.vhat, state, i)) + T(0);  // flushed
    if (v > second) second = v;
    write(tensor.vhat, state, i, static_cast<double>(second));
  }
  write(tensor.m, state, i, static_cast<double>(m));
  write(tensor.v, state, i, static_cast<double>(v));
  const T var = static_cast<T>(read(tensor.var, tensor.dtype, i));
  const T change = m * alpha / (std::sqrt(second) + s.epsilon);
  write(tensor.var, tensor.dtype, i, static_cast<double>(var * keep - change));
}

template <class T>
__attribute__((noinline)) void adam_slices(const TensorArgs& tensor, const std::vector<int64_t>& indices, int64_t width,
                                           bool transform, bool lazy, const StepScalars<T>& s) {
  for (int64_t row = 0; row < tensor.size / width; ++row) {
    const std::vector<int64_t> positions = positions_of(indices, row);
    if (lazy && positions.empty()) continue;
    for (int64_t column = 0; column < width; ++column) {
      const T sum = sum_of_values(tensor, positions, width, column, transform, s.clip_value);
      const T keep = tensor.decays ? s.keep : T(1);
      adam_row(tensor, row * width + column, positions.empty() ? nullptr : &sum, s.row_alpha, keep, s);
    }
  }
}

// One step with IndexedSlices.
inline void expect_slices(const TensorArgs& tensor, const std::vector<int64_t>& indices, int64_t width, int t,
                          bool transform, bool lazy) {
  in_compute_type(tensor.dtype,
                  [&](auto zero) { adam_slices(tensor, indices, width, transform, lazy, scalars<decltype(zero)>(t)); });
}

// The history of a deferred table. The largest rate comes late, so that the check for a row at rest must look ahead.
struct History {
  DType dtype;
  int64_t now;
  Array alphas, keeps, peaks;

  History(DType variable, int64_t steps, bool decays)
      : dtype(state_dtype(variable)),
        now(steps),
        alphas(dtype, steps),
        keeps(dtype, steps),
        peaks(dtype, (steps + kPeakSteps - 1) / kPeakSteps) {
    double peak = 0;
    for (int64_t i = 0; i < steps; ++i) {
      const double alpha = std::ldexp(1 + static_cast<double>(i % 7), i == steps - 5 ? -1 : -12);
      alphas.set(i, alpha);
      keeps.set(i, decays ? 1 - std::ldexp(static_cast<double>(i % 3), -10) : 1);
      peak = i % kPeakSteps == 0 ? alpha : std::max(peak, alpha);
      peaks.set(i / kPeakSteps, peak);
    }
  }
  StaleRows view(const int32_t* from, int64_t width, bool may_stop) const {
    return {alphas.at(0), keeps.at(0), peaks.at(0), from, now, width, may_stop};
  }
};

template <class T>
__attribute__((noinline)) void replay(const TensorArgs& tensor, const History& history, int64_t row, int64_t from,
                                      int64_t width, const StepScalars<T>& s) {
  for (int64_t step = from; step < history.now; ++step) {
    const T alpha = static_cast<T>(read(history.alphas.at(0), history.dtype, step));
    const T keep = static_cast<T>(read(history.keeps.at(0), history.dtype, step));
    for (int64_t column = 0; column < width; ++column) {
      adam_row<T>(tensor, row * width + column, nullptr, alpha, keep, s);
    }
  }
}

// Replays, for these rows only, the steps after the first from[row].
inline void expect_replay(const TensorArgs& tensor, const History& history, const std::vector<int64_t>& rows,
                          const std::vector<int32_t>& from, int64_t width, int t) {
  in_compute_type(tensor.dtype, [&](auto zero) {
    const auto s = scalars<decltype(zero)>(t);
    for (const int64_t row : rows) replay(tensor, history, row, from[static_cast<size_t>(row)], width, s);
  });
}

// One step of a row, whose first element is `at`, with a dense gradient in the dtype of the state; then its average.
template <class T>
void adam_row_densely(TensorArgs tensor, int64_t at, int64_t width, const void* grad, const StepScalars<T>& s,
                      int transform) {
  const DType state = state_dtype(tensor.dtype);
  tensor.var = static_cast<char*>(tensor.var) + at * size_of(tensor.dtype);
  for (void** slot : {&tensor.m, &tensor.v, &tensor.vhat, &tensor.average}) {
    if (*slot != nullptr) *slot = static_cast<char*>(*slot) + at * size_of(state);
  }
  tensor.grad = grad;
  tensor.grad_dtype = state;
  tensor.size = width;
  adam(tensor, s, transform);
  for (int64_t i = 0; tensor.average != nullptr && i < width; ++i) {
    const T average = static_cast<T>(read(tensor.average, state, i));
    const T var = static_cast<T>(read(tensor.var, tensor.dtype, i));
    const T moved = s.ema_momentum * average + (T(1) - s.ema_momentum) * var;
    write(tensor.average, state, i, static_cast<double>(moved));
  }
}

// The dense steps of these rows after the first from[row], with gradients of 0, then one step with what the accumulator
// holds if the tensor has a gradient.
inline void expect_dense_replay(const TensorArgs& tensor, const History& history, const std::vector<int64_t>& rows,
                                const std::vector<int32_t>& from, int64_t width, int t) {
  in_compute_type(tensor.dtype, [&](auto zero) {
    using T = decltype(zero);
    const Array zeros(history.dtype, width);
    std::fill_n(zeros.at(0), width * size_of(history.dtype), 0);
    for (const int64_t row : rows) {
      StepScalars<T> s = scalars<T>(t);
      TensorArgs waiting = tensor;
      waiting.decays = true;
      for (int64_t step = from[static_cast<size_t>(row)]; step < history.now; ++step) {
        s.alpha = static_cast<T>(read(history.alphas.at(0), history.dtype, step));
        s.keep = static_cast<T>(read(history.keeps.at(0), history.dtype, step));
        adam_row_densely(waiting, row * width, width, zeros.at(0), s, 0);
      }
      if (tensor.grad == nullptr) continue;
      const char* grad = static_cast<const char*>(tensor.grad) + row * width * size_of(history.dtype);
      adam_row_densely(tensor, row * width, width, grad, scalars<T>(t), 1);
    }
  });
}

// The gaps of the rows of a deferred table: row i has kGaps[i % 6].
constexpr int kGaps[] = {0, 1, 7, 8, 9, 200};
constexpr int64_t kStaleRows = 18;
constexpr int64_t kLeftRow = 4;  // never has a gradient

// For every gap: a row that comes to rest, a row that would if one element were not near zero, and a row of random
// numbers.
inline Variable stale_table(const Pair& pair, int64_t width) {
  Variable table(pair.dtype, kStaleRows * width);
  Random random{static_cast<uint64_t>(width)};
  for (int64_t i = 0; i < kStaleRows * 2 / 3 * width; ++i) {
    const bool near_zero = i / width >= kStaleRows / 3 && i % width == width / 2;
    table.var.set(i, near_zero ? 0 : 1 + std::ldexp(static_cast<double>(random.below(128)), -7));
    table.m.set(i, std::ldexp(static_cast<double>(random.below(512)) - 256, near_zero ? -40 : -20));
    table.v.set(i, std::ldexp(static_cast<double>(random.below(512)), -14));
    table.vhat.set(i, std::ldexp(static_cast<double>(random.below(512)), -14));
  }
  return table;
}

inline TensorArgs with_slices(TensorArgs tensor, const Array& values, const Pair& pair, int t, const Rows& rows) {
  tensor.grad = values.at(t);
  tensor.grad_dtype = pair.grad_dtype;
  tensor.rows = &rows;
  return tensor;
}

}  // namespace kernel_test
