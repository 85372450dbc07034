// SPDX-License-Identifier: Apache-2.0
// The kernels for the rows of IndexedSlices and of deferred tables. A warp does one row, or a part of a warp if rows
// are narrow; lanes stride over the columns. The rules of dense_kernels.h apply.
#pragma once

#include "../core/at_rest.h"
#include "../core/closed_form.h"
#include "../core/split.h"
#include "index_kernels.h"

namespace fastadam::cuda {

constexpr int kRowThreads = 256;

// The number of threads per row, as its logarithm: a GPU divides by shifting in one instruction, else in a hundred.
FASTADAM_INLINE int row_lane_bits(int64_t width) {
  int bits = 0;
  while (int64_t{1} << bits < width && bits < 5) ++bits;
  return bits;
}

// The number of blocks of threads for this many rows.
FASTADAM_INLINE int64_t row_grid(int64_t row_count, int64_t width) {
  const int64_t rows = kRowThreads >> row_lane_bits(width);
  return (row_count + rows - 1) / rows;
}

// The row of a thread and its first column; its columns are `lanes` apart.
struct RowPlace {
  int64_t row;
  int64_t column;
  int64_t lanes;
};

FASTADAM_INLINE RowPlace row_place(int64_t block, int64_t thread, int64_t width) {
  const int bits = row_lane_bits(width);
  const int64_t lanes = int64_t{1} << bits;
  return {block * (kRowThreads >> bits) + (thread >> bits), thread & (lanes - 1), lanes};
}

// Sums one column of the k-th row in order of occurrence.
template <bool kTransform, class Grad, class T>
FASTADAM_INLINE T sum_values(const Rows& rows, const void* values, int64_t k, int64_t column, T clip_value,
                             FactorPair<T> factor) {
  const auto* grad = static_cast<const Grad*>(values) + column;
  T total = T(0);
  for (int64_t at = rows.starts[k]; at < rows.starts[k + 1]; ++at) {
    T g = load(grad[rows.order[at] * rows.width]);
    if constexpr (kTransform) g = transform_gradient(g, clip_value, factor);
    total += g;
  }
  return total;
}

// The factor of the gradient of a table. `clipped`: with norm clipping its factor, or null.
template <class T>
FASTADAM_INLINE FactorPair<T> factor_of_rows(const TensorArgs& tensor, const Factor* clipped, const StepState& state) {
  return pair_of<T>(clipped == nullptr ? make_factor(tensor.grad_factor) * make_factor(state.unscale) : *clipped);
}

// One element of a row, in registers.
template <class T>
struct Element {
  T var;
  T m;
  T v;
  T vhat;
};

// Applies the steps [from, now) of the history, in which the row had no gradient. Unlike on the CPU, where a whole part
// of a row stops, each element stops on its own; the bits are the same.
template <bool kAmsgrad, class Storage, class T>
FASTADAM_INLINE void replay_element(const StaleRows& stale, int64_t from, Element<T>& e, StepScalars<T> s) {
  const auto make_step = [&](T alpha, T keep) {
    s.row_alpha = alpha;
    adam_update_row<kAmsgrad, false>(e.var, T(0), e.m, e.v, e.vhat, keep, s);
    e.var = load(store<Storage>(e.var));
  };
  int64_t step = replay_steps<T>(stale, from, make_step, [&](T peak) {
    return is_at_rest<kAmsgrad, Storage>(e.var, e.m, e.v, e.vhat, peak, s.epsilon);
  });
  for (; step < stale.now && (e.m != T(0) || e.v != T(0)); ++step) {
    e.m *= s.beta_1;
    e.v *= s.beta_2;
  }
}

enum class RowMode {
  kTouched,  // updates the listed rows; in a deferred table first by the steps that they missed
  kCatchUp,  // applies to every row the steps that it missed
};

// Updates rows of one tensor, which are listed or wait for their steps. table_kernels.h has TF's rule, for all rows.
template <class Storage, bool kAmsgrad, bool kTransform>
struct RowStep {
  static constexpr int kThreads = kRowThreads;
  using Shared = NoShared;
  using T = Compute<Storage>;
  using Scalars = StepScalars<T>;
  const StepState* state;
  TensorArgs tensor;  // with pointers to device memory
  DeviceRows slices;
  StaleRows stale;       // `from` is not used
  int32_t* last;         // the number of steps of the history that each row has had; null if the table is not deferred
  int32_t new_last;      // the value of `last` after this step
  const Factor* factor;  // with norm clipping: the factor of the gradient; or null
  int64_t width;
  int64_t row_count;  // the number of rows that get threads: at least the number of rows to update
  RowMode mode;

  FASTADAM_INLINE int phases() const { return last == nullptr ? 1 : 2; }

  FASTADAM_INLINE void phase(int phase, int64_t block, int64_t thread, Shared&) const {
    if (state->skip) return;
    const RowPlace place = row_place(block, thread, width);
    if (place.row >= row_count) return;
    const Rows rows = slices.unique == nullptr ? Rows{} : slices.counted();
    const int64_t k = place.row;  // position in rows.rows
    int64_t row = place.row;
    const bool has_gradient = tensor.grad != nullptr;
    if (mode == RowMode::kTouched) {
      if (k >= rows.count) return;
      row = rows.rows[k];
    }
    if (phase == 1) {  // all threads have read `last`
      if (place.column == 0) last[row] = new_last;
      return;
    }
    const Scalars scalars = scalars_of<T>(*state);
    const int64_t from = last == nullptr ? stale.now : last[row];
    if (!has_gradient && from >= stale.now) return;
    for (int64_t column = place.column; column < width; column += place.lanes) {
      T g = T(0);
      if (has_gradient) {
        g = tensor.grad_dtype == tensor.dtype ? sum<Storage>(rows, k, column, scalars)
                                              : sum<T>(rows, k, column, scalars);
      }
      update(row * width + column, g, from, has_gradient, scalars);
    }
  }

 private:
  template <class Grad>
  FASTADAM_INLINE T sum(const Rows& rows, int64_t k, int64_t column, const Scalars& scalars) const {
    const FactorPair<T> pair = factor_of_rows<T>(tensor, factor, *state);
    return sum_values<kTransform, Grad>(rows, tensor.grad, k, column, scalars.clip_value, pair);
  }

  FASTADAM_INLINE void update(int64_t at, T g, int64_t from, bool has_gradient, const Scalars& scalars) const {
    auto* var = static_cast<Storage*>(tensor.var);
    T* m = static_cast<T*>(tensor.m);
    T* v = static_cast<T*>(tensor.v);
    T* vhat = static_cast<T*>(tensor.vhat);
    const T keep = tensor.decays ? scalars.keep : T(1);
    Element<T> e{load(var[at]), m[at], v[at], kAmsgrad ? vhat[at] : T(0)};
    if (from < stale.now) catch_up(e, from, scalars);
    if (has_gradient) {
      e.var = load(store<Storage>(e.var));
      adam_update_row<kAmsgrad, true>(e.var, g, e.m, e.v, e.vhat, keep, scalars);
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

// Stores the sum of each row of IndexedSlices, row after row. Zeros, which change no norm, fill the rest of `sums`.
template <class Grad>
struct RowSums {
  static constexpr int kThreads = kRowThreads;
  using Shared = NoShared;
  using T = Compute<Grad>;
  const void* values;
  DeviceRows slices;
  T* sums;  // has slices.count * slices.width elements

  FASTADAM_INLINE int phases() const { return 1; }
  FASTADAM_INLINE void phase(int, int64_t block, int64_t thread, Shared&) const {
    const RowPlace place = row_place(block, thread, slices.width);
    if (place.row >= slices.count) return;
    const bool exists = place.row < *slices.unique;
    for (int64_t column = place.column; column < slices.width; column += place.lanes) {
      sums[place.row * slices.width + column] =
          exists ? sum_values<false, Grad>(slices, values, place.row, column, T(0), FactorPair<T>{}) : T(0);
    }
  }
};

// Copies one row of a table for each id, as items of type Word. An invalid id gives zeros.
template <class Word>
struct GatherRows {
  static constexpr int kThreads = kRowThreads;
  using Shared = NoShared;
  const Word* table;
  const void* ids;
  bool is_int64;  // otherwise int32
  int64_t id_count;
  int64_t row_count;
  int64_t width;
  Word* out;
  unsigned long long* bad;  // must hold kNoPosition; receives the position of the first invalid id

  FASTADAM_INLINE int phases() const { return 1; }
  FASTADAM_INLINE void phase(int, int64_t block, int64_t thread, Shared&) const {
    const RowPlace place = row_place(block, thread, width);
    const int64_t i = place.row;
    if (i >= id_count) return;
    const int64_t row = index_at(ids, is_int64, i);
    const bool exists = row >= 0 && row < row_count;
    if (!exists && place.column == 0) keep_lowest(bad, static_cast<unsigned long long>(i));
    for (int64_t column = place.column; column < width; column += place.lanes) {
      out[i * width + column] = exists ? table[row * width + column] : Word{};
    }
  }
};

// Reports the first invalid id after a GatherRows. One thread writes all of the report, and not before the host has
// taken the last one.
struct ReportBadId {
  static constexpr int kThreads = 1;
  using Shared = NoShared;
  const void* ids;
  bool is_int64;
  unsigned long long* bad;
  volatile Report* report;

  FASTADAM_INLINE int phases() const { return 1; }
  FASTADAM_INLINE void phase(int, int64_t, int64_t, Shared&) const {
    if (*bad == kNoPosition) return;
    if (report->failed == 0) {
      report->position = static_cast<int64_t>(*bad);
      report->index = index_at(ids, is_int64, static_cast<int64_t>(*bad));
      fence_for_host();
      report->failed = 1;
    }
    *bad = kNoPosition;
  }
};

// Appends one step to the history of a table.
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
