// SPDX-License-Identifier: Apache-2.0
// What threads do for the rows of IndexedSlices and of tables that wait: a warp for each row, a lane for every 32nd of
// its columns. As bodies.h, whose rules hold here.
#pragma once

#include "../core/closed_form.h"
#include "../core/rest.h"
#include "../core/split.h"
#include "bodies.h"

namespace fastadam::cuda {

constexpr int kRowWarps = 8;
constexpr int kRowLanes = 32;

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
  static constexpr int kThreads = kRowWarps * kRowLanes;
  using Shared = NoShared;
  using T = Compute<Storage>;
  using Scalars = StepScalars<T>;
  TensorArgs tensor;  // with pointers to the device
  Rows rows;
  StaleRows stale;
  Scalars scalars;
  const double* factor;  // of a norm clip, or null
  int64_t width;
  int64_t row_count;  // rows that get a warp
  RowMode mode;
  bool waits;

  FASTADAM_INLINE int phases() const { return 1; }

  FASTADAM_INLINE void phase(int, int64_t block, int64_t thread, Shared&) const {
    const int64_t warp = block * kRowWarps + thread / kRowLanes;
    if (warp >= row_count) return;
    int64_t k = warp;  // place among the rows that are touched
    int64_t row = warp;
    bool touched = tensor.grad != nullptr;
    if (mode == RowMode::kAll) {
      k = first_row_from(rows, row);
      touched = touched && k < rows.count && rows.rows[k] == row;
    } else if (mode == RowMode::kTouched) {
      row = rows.rows[k];
    }
    const int64_t from = waits ? stale.from[k] : 0;
    for (int64_t column = thread % kRowLanes; column < width; column += kRowLanes) {
      move(row * width + column, column, k, from, touched);
    }
  }

 private:
  FASTADAM_INLINE void move(int64_t at, int64_t column, int64_t k, int64_t from, bool touched) const {
    auto* var = static_cast<Storage*>(tensor.var);
    T* m = static_cast<T*>(tensor.m);
    T* v = static_cast<T*>(tensor.v);
    T* vhat = static_cast<T*>(tensor.vhat);
    const T keep = tensor.decays ? scalars.keep : T(1);
    Element<T> e{load(var[at]), m[at], v[at], kAmsgrad ? vhat[at] : T(0)};
    if (waits && from < stale.now) catch_up(e, from);
    if (touched) {
      e.var = load(store<Storage>(e.var));
      const T g = tensor.grad_dtype == tensor.dtype ? sum<Storage>(k, column) : sum<T>(k, column);
      adam_update_row<kAmsgrad, true>(e.var, g, e.m, e.v, e.vhat, keep, scalars);
    } else if (mode == RowMode::kAll) {
      adam_update_row<kAmsgrad, false>(e.var, T(0), e.m, e.v, e.vhat, keep, scalars);
    }
    var[at] = store<Storage>(e.var);
    m[at] = e.m;
    v[at] = e.v;
    if constexpr (kAmsgrad) vhat[at] = e.vhat;
  }

  FASTADAM_INLINE void catch_up(Element<T>& e, int64_t from) const {
    if (stale.forms != nullptr && stale.now - from > kShortGap) {
      const ClosedForm& form = stale.forms[stale.places[from]];
      if (form.exists) return adam_jump<kAmsgrad>(e.var, e.m, e.v, e.vhat, form, scalars.beta_2, scalars.epsilon);
    }
    replay_element<kAmsgrad, Storage>(stale, from, e, scalars);
  }

  // In order of occurrence.
  template <class Grad>
  FASTADAM_INLINE T sum(int64_t k, int64_t column) const {
    const auto* grad = static_cast<const Grad*>(tensor.grad) + column;
    const T scale = static_cast<T>(factor == nullptr ? tensor.grad_factor : *factor);
    T total = T(0);
    for (int64_t at = rows.starts[k]; at < rows.starts[k + 1]; ++at) {
      T g = load(grad[rows.order[at] * width]);
      if constexpr (kTransform) g = transform_gradient(g, scalars.clip_value, scale);
      total += g;
    }
    return total;
  }
};

// Blocks of threads for a RowStep.
FASTADAM_INLINE int64_t row_grid(int64_t row_count) { return (row_count + kRowWarps - 1) / kRowWarps; }

}  // namespace fastadam::cuda
