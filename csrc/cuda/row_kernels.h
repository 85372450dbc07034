// SPDX-License-Identifier: Apache-2.0
// What threads do for the rows of IndexedSlices and of tables that wait: a warp for each row, or a part of a warp where
// rows are narrow, a lane for every so manieth column. As dense_kernels.h, whose rules hold here.
#pragma once

#include "../core/at_rest.h"
#include "../core/closed_form.h"
#include "../core/split.h"
#include "index_kernels.h"

namespace fastadam::cuda {

constexpr int kRowThreads = 256;

// Threads of a row.
FASTADAM_INLINE int64_t row_lanes(int64_t width) {
  int64_t lanes = 1;
  while (lanes < width && lanes < 32) lanes *= 2;
  return lanes;
}

// Blocks of threads for so many rows.
FASTADAM_INLINE int64_t row_grid(int64_t row_count, int64_t width) {
  const int64_t rows = kRowThreads / row_lanes(width);
  return (row_count + rows - 1) / rows;
}

// The row of a thread, and its first column.
struct RowPlace {
  int64_t row;
  int64_t column;
  int64_t lanes;
};

FASTADAM_INLINE RowPlace row_place(int64_t block, int64_t thread, int64_t width) {
  const int64_t lanes = row_lanes(width);
  return {block * (kRowThreads / lanes) + thread / lanes, thread % lanes, lanes};
}

// Sum of the values of the k-th row that is touched, in order of occurrence.
template <bool kTransform, class Grad, class T>
FASTADAM_INLINE T sum_values(const Rows& rows, const void* values, int64_t k, int64_t column, T clip_value, T factor) {
  const auto* grad = static_cast<const Grad*>(values) + column;
  T total = T(0);
  for (int64_t at = rows.starts[k]; at < rows.starts[k + 1]; ++at) {
    T g = load(grad[rows.order[at] * rows.width]);
    if constexpr (kTransform) g = transform_gradient(g, clip_value, factor);
    total += g;
  }
  return total;
}

// One element of a row, in registers.
template <class T>
struct Element {
  T var;
  T m;
  T v;
  T vhat;
};

// The steps [from, now) of the history, in which the row had no gradient: those of replay in csrc/cpu/row_kernels.h,
// but that an element stops by itself.
template <bool kAmsgrad, class Storage, class T>
FASTADAM_INLINE void replay_element(const StaleRows& stale, int64_t from, Element<T>& e, StepScalars<T> s) {
  constexpr int64_t kCheckSteps = 8;
  const T* alphas = static_cast<const T*>(stale.alphas);
  const T* keeps = static_cast<const T*>(stale.keeps);
  const T peak = stale.may_stop ? peak_from<T>(stale, from) : T(0);
  int64_t step = from;
  while (step < stale.now) {
    const int64_t stop = stale.now - step < kCheckSteps ? stale.now : step + kCheckSteps;
    for (; step < stop; ++step) {
      s.row_alpha = alphas[step];
      adam_update_row<kAmsgrad, false>(e.var, T(0), e.m, e.v, e.vhat, keeps[step], s);
      e.var = load(store<Storage>(e.var));
    }
    if (stale.may_stop && rests<kAmsgrad, Storage>(e.var, e.m, e.v, e.vhat, peak, s.epsilon)) break;
  }
  for (; step < stale.now && (e.m != T(0) || e.v != T(0)); ++step) {
    e.m *= s.beta_1;
    e.v *= s.beta_2;
  }
}

enum class RowMode {
  kAll,      // every row moves, touched or not: TF's rule
  kTouched,  // the rows that are touched, if there is a gradient; first the steps that they missed, if they wait
  kCatchUp,  // every row gets the steps that it missed
};

// The rows of one tensor.
template <class Storage, bool kAmsgrad, bool kTransform>
struct RowStep {
  static constexpr int kThreads = kRowThreads;
  using Shared = NoShared;
  using T = Compute<Storage>;
  using Scalars = StepScalars<T>;
  const StepState* state;
  TensorArgs tensor;  // with pointers to the device
  DeviceRows slices;
  StaleRows stale;       // but for `from`
  int32_t* last;         // steps of the history that each row has had, or null if none waits
  int32_t now_had;       // what `last` of these rows becomes
  const double* factor;  // of a norm clip, or null
  int64_t width;
  int64_t row_count;  // rows that get threads, perhaps more than there are
  RowMode mode;

  FASTADAM_INLINE int phases() const { return last == nullptr ? 1 : 2; }

  FASTADAM_INLINE void phase(int phase, int64_t block, int64_t thread, Shared&) const {
    if (state->skip) return;
    const RowPlace place = row_place(block, thread, width);
    if (place.row >= row_count) return;
    const Rows rows = slices.unique == nullptr ? Rows{} : slices.counted();
    int64_t k = place.row;  // place among the rows that are touched
    int64_t row = place.row;
    bool touched = tensor.grad != nullptr;
    if (mode == RowMode::kAll) {
      k = first_row_from(rows, row);
      touched = touched && k < rows.count && rows.rows[k] == row;
    } else if (mode == RowMode::kTouched) {
      if (k >= rows.count) return;
      row = rows.rows[k];
    }
    if (phase == 1) {  // all have read it
      if (place.column == 0) last[row] = now_had;
      return;
    }
    const Scalars scalars = scalars_of<T>(*state);
    const int64_t from = last == nullptr ? stale.now : last[row];
    if (!touched && mode != RowMode::kAll && from >= stale.now) return;
    for (int64_t column = place.column; column < width; column += place.lanes) {
      T g = T(0);
      if (touched) {
        g = tensor.grad_dtype == tensor.dtype ? sum<Storage>(rows, k, column, scalars)
                                              : sum<T>(rows, k, column, scalars);
      }
      move(row * width + column, g, from, touched, scalars);
    }
  }

 private:
  template <class Grad>
  FASTADAM_INLINE T sum(const Rows& rows, int64_t k, int64_t column, const Scalars& scalars) const {
    const T scale = static_cast<T>(factor == nullptr ? tensor.grad_factor * state->unscale : *factor);
    return sum_values<kTransform, Grad>(rows, tensor.grad, k, column, scalars.clip_value, scale);
  }

  FASTADAM_INLINE void move(int64_t at, T g, int64_t from, bool touched, const Scalars& scalars) const {
    auto* var = static_cast<Storage*>(tensor.var);
    T* m = static_cast<T*>(tensor.m);
    T* v = static_cast<T*>(tensor.v);
    T* vhat = static_cast<T*>(tensor.vhat);
    const T keep = tensor.decays ? scalars.keep : T(1);
    Element<T> e{load(var[at]), m[at], v[at], kAmsgrad ? vhat[at] : T(0)};
    if (from < stale.now) catch_up(e, from, scalars);
    if (touched) {
      e.var = load(store<Storage>(e.var));
      adam_update_row<kAmsgrad, true>(e.var, g, e.m, e.v, e.vhat, keep, scalars);
    } else if (mode == RowMode::kAll) {
      adam_update_row<kAmsgrad, false>(e.var, T(0), e.m, e.v, e.vhat, keep, scalars);
    }
    var[at] = store<Storage>(e.var);
    m[at] = e.m;
    v[at] = e.v;
    if constexpr (kAmsgrad) vhat[at] = e.vhat;
  }

  FASTADAM_INLINE void catch_up(Element<T>& e, int64_t from, const Scalars& scalars) const {
    if (stale.forms != nullptr && stale.now - from > kShortGap) {
      const ClosedForm& form = stale.forms[stale.places[from]];
      if (form.exists) return adam_jump<kAmsgrad>(e.var, e.m, e.v, e.vhat, form, scalars.beta_2, scalars.epsilon);
    }
    replay_element<kAmsgrad, Storage>(stale, from, e, scalars);
  }
};

// Sums of the rows of IndexedSlices, end to end; behind them zeros, which change no norm.
template <class Grad>
struct RowSums {
  static constexpr int kThreads = kRowThreads;
  using Shared = NoShared;
  using T = Compute<Grad>;
  const void* values;
  DeviceRows slices;
  T* sums;  // slices.count * slices.width

  FASTADAM_INLINE int phases() const { return 1; }
  FASTADAM_INLINE void phase(int, int64_t block, int64_t thread, Shared&) const {
    const RowPlace place = row_place(block, thread, slices.width);
    if (place.row >= slices.count) return;
    const bool exists = place.row < *slices.unique;
    for (int64_t column = place.column; column < slices.width; column += place.lanes) {
      sums[place.row * slices.width + column] =
          exists ? sum_values<false, Grad>(slices, values, place.row, column, T(0), T(1)) : T(0);
    }
  }
};

// Adds IndexedSlices, times their factor, to the accumulator of a table.
template <class Storage>
struct AccumulateRows {
  static constexpr int kThreads = kRowThreads;
  using Shared = NoShared;
  using T = Compute<Storage>;
  const StepState* state;
  TensorArgs tensor;
  DeviceRows slices;
  int64_t row_count;  // of the table
  bool restart;       // the accumulator counts as zero

  FASTADAM_INLINE int phases() const { return 1; }
  FASTADAM_INLINE void phase(int, int64_t block, int64_t thread, Shared&) const {
    if (state->skip) return;
    const RowPlace place = row_place(block, thread, slices.width);
    if (place.row >= row_count) return;
    const Rows rows = slices.counted();
    const int64_t k = first_row_from(rows, place.row);
    const bool touched = k < rows.count && rows.rows[k] == place.row;
    T* accumulator = static_cast<T*>(tensor.accumulator) + place.row * slices.width;
    for (int64_t column = place.column; column < slices.width; column += place.lanes) {
      if (restart) accumulator[column] = T(0);
      if (touched)
        accumulator[column] +=
            tensor.grad_dtype == tensor.dtype ? sum<Storage>(rows, k, column) : sum<T>(rows, k, column);
    }
  }

 private:
  template <class Grad>
  FASTADAM_INLINE T sum(const Rows& rows, int64_t k, int64_t column) const {
    constexpr T kNone = static_cast<T>(__builtin_huge_val());
    return sum_values<true, Grad>(rows, tensor.grad, k, column, kNone, static_cast<T>(tensor.grad_factor));
  }
};

// Rows of a table, one for each id; zeros, and a report, for an id that is not a row. Items of the size of Word.
template <class Word>
struct GatherRows {
  static constexpr int kThreads = kRowThreads;
  using Shared = NoShared;
  const Word* table;
  const void* ids;
  bool is_int64;  // else int32
  int64_t id_count;
  int64_t row_count;
  int64_t width;
  Word* out;
  Report* report;

  FASTADAM_INLINE int phases() const { return 1; }
  FASTADAM_INLINE void phase(int, int64_t block, int64_t thread, Shared&) const {
    const RowPlace place = row_place(block, thread, width);
    const int64_t i = place.row;
    if (i >= id_count) return;
    const int64_t row = is_int64 ? static_cast<const int64_t*>(ids)[i] : static_cast<const int32_t*>(ids)[i];
    const bool exists = row >= 0 && row < row_count;
    if (!exists && place.column == 0) {
      report->position = i;
      report->index = row;
      fence_for_host();
      report->failed = 1;
    }
    for (int64_t column = place.column; column < width; column += place.lanes) {
      out[i * width + column] = exists ? table[row * width + column] : Word{};
    }
  }
};

// What one step adds to the history of a table.
template <class T>
struct StoreRate {
  static constexpr int kThreads = 1;
  using Shared = NoShared;
  T* alphas;
  T* keeps;
  T* peaks;
  int64_t step;
  T alpha;
  T keep;
  T peak;

  FASTADAM_INLINE int phases() const { return 1; }
  FASTADAM_INLINE void phase(int, int64_t, int64_t, Shared&) const {
    alphas[step] = alpha;
    keeps[step] = keep;
    peaks[step / kPeakSteps] = peak;
  }
};

}  // namespace fastadam::cuda
