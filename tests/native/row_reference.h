// SPDX-License-Identifier: Apache-2.0
// For the native tests: IndexedSlices, tables that wait, and the steps of rows as plain scalar loops. Written apart
// from csrc, which it is the judge of.
#pragma once

#include <numeric>
#include <vector>

#include "reference.h"

namespace kernel_test {

// visit(T) with a zero of the type in which a variable of this dtype is computed, denormals flushed.
template <class Visit>
void in_compute_type(DType dtype, Visit visit) {
  const cpu::FlushDenormals flush;
  if (dtype == FASTADAM_FLOAT64) visit(double{});
  if (dtype != FASTADAM_FLOAT64) visit(float{});
}

// Indices as Rows: by the book a stable sort.
struct Occurrences {
  std::vector<int64_t> rows;
  std::vector<int64_t> starts;
  std::vector<int64_t> order;

  explicit Occurrences(const std::vector<int64_t>& indices) : order(indices.size()) {
    const auto row = [&indices](int64_t place) { return indices[static_cast<size_t>(place)]; };
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

// Of IndexedSlices for a table of kRows rows: every other way to touch it.
constexpr int64_t kRows = 11;
constexpr int64_t kMaxIndices = 12;
constexpr int64_t kWidths[] = {1, 5, 127, 128, 129, 300};
inline const std::vector<int64_t> kIndices[kSteps] = {
    {3, 0, 10, 5, 5, 0, 5}, {}, {10}, {7, 6, 7}, {10, 9, 8, 7, 6, 4, 4, 5, 3, 2, 1, 0}};

// Values of IndexedSlices: numbers, and among them zeros of both signs, infinities and NaNs.
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

// The places at which `indices` name the row.
inline std::vector<int64_t> places_of(const std::vector<int64_t>& indices, int64_t row) {
  std::vector<int64_t> places;
  for (size_t i = 0; i < indices.size(); ++i) {
    if (indices[i] == row) places.push_back(static_cast<int64_t>(i));
  }
  return places;
}

template <class T>
T sum_of_values(const TensorArgs& tensor, const std::vector<int64_t>& places, int64_t width, int64_t column,
                bool transform, T clip_value) {
  T sum = 0;
  for (const int64_t place : places) {
    T g = static_cast<T>(read(tensor.grad, tensor.grad_dtype, place * width + column));
    if (transform && g > clip_value) g = clip_value;
    if (transform && g < -clip_value) g = -clip_value;
    if (transform) g = g * static_cast<T>(tensor.grad_factor);
    sum = sum + g;
  }
  return sum;
}

// IndexedSlices, and room for the sums of their rows.
struct RowSums {
  std::vector<int64_t> indices;
  Occurrences sorted;
  Rows rows;
  TensorArgs tensor{};
  Array sums;

  RowSums(const std::vector<int64_t>& named, int64_t width, const Array& values, DType dtype, int64_t offset)
      : indices(named), sorted(named), rows(sorted.view(width)), sums(state_dtype(dtype), rows.count * width, offset) {
    tensor.grad = values.at(0);
    tensor.grad_dtype = dtype;
    tensor.grad_size = static_cast<int64_t>(named.size()) * width;
    tensor.grad_factor = 0.37;  // not for the sums
    tensor.rows = &rows;
    for (int64_t i = 0; i < rows.count * width; ++i) sums.set(i, kNan);
  }
  RowSums(const RowSums&) = delete;
  RowSums& operator=(const RowSums&) = delete;

  void expect() {
    in_compute_type(tensor.grad_dtype, [&](auto zero) {
      for (int64_t i = 0; i < rows.count * rows.width; ++i) {
        const auto places = places_of(indices, sorted.rows[static_cast<size_t>(i / rows.width)]);
        sums.set(i, static_cast<double>(sum_of_values(tensor, places, rows.width, i % rows.width, false, zero)));
      }
    });
  }
};

// One element by TF's rule for IndexedSlices; `sum` is null if its row has no gradient.
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
    const std::vector<int64_t> places = places_of(indices, row);
    if (lazy && places.empty()) continue;
    for (int64_t column = 0; column < width; ++column) {
      const T sum = sum_of_values(tensor, places, width, column, transform, s.clip_value);
      const T keep = tensor.decays ? s.keep : T(1);
      adam_row(tensor, row * width + column, places.empty() ? nullptr : &sum, s.row_alpha, keep, s);
    }
  }
}

// One step with IndexedSlices.
inline void expect_slices(const TensorArgs& tensor, const std::vector<int64_t>& indices, int64_t width, int t,
                          bool transform, bool lazy) {
  in_compute_type(tensor.dtype,
                  [&](auto zero) { adam_slices(tensor, indices, width, transform, lazy, scalars<decltype(zero)>(t)); });
}

// The steps of a table whose rows wait: rates that are largest late, so that a row that rests has to look ahead.
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

// Rows that have had `from[row]` steps have all of them: the dense oracle, of these rows alone.
inline void expect_replay(const TensorArgs& tensor, const History& history, const std::vector<int64_t>& rows,
                          const std::vector<int32_t>& from, int64_t width, int t) {
  in_compute_type(tensor.dtype, [&](auto zero) {
    const auto s = scalars<decltype(zero)>(t);
    for (const int64_t row : rows) replay(tensor, history, row, from[static_cast<size_t>(row)], width, s);
  });
}

// Gaps of the rows of a stale table, in turns.
constexpr int kGaps[] = {0, 1, 7, 8, 9, 200};
constexpr int64_t kStaleRows = 18;
constexpr int64_t kLeftRow = 4;  // touched by nothing

// Of every gap: a row that comes to rest, one that does but for an element near zero, and one of random numbers.
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
