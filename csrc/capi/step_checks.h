// SPDX-License-Identifier: Apache-2.0
// Checks of a step. Python turns std::invalid_argument into ValueError.
#pragma once

#include <array>
#include <cmath>
#include <initializer_list>
#include <limits>
#include <stdexcept>
#include <string>

#include "../core/small_state.h"
#include "../core/step_args.h"

namespace fastadam {

// The scalars of a step in the arithmetic T. Raises if T cannot represent a number: 1 - 1e-10 is 1 in float32.
template <class T>
StepScalars<T> usable_scalars(const AdamHyper& hyper) {
  const StepScalars<T> scalars = make_step_scalars<T>(hyper);
  const auto refuse = [](const std::string& what, const std::string& expected) {
    throw std::invalid_argument(what + (sizeof(T) == 4 ? " in float32" : " in float64") + ", expected " + expected);
  };
  if (!(scalars.one_minus_beta_1 > 0)) refuse("beta_1: " + std::to_string(hyper.beta_1) + " is 1", "less");
  if (!(scalars.one_minus_beta_2 > 0)) refuse("beta_2: " + std::to_string(hyper.beta_2) + " is 1", "less");
  const bool is_zero = hyper.epsilon_corrected && hyper.epsilon == 0;  // PyTorch permits 0
  if (!is_zero && !(scalars.epsilon >= std::numeric_limits<T>::min())) {
    refuse("epsilon: so small that it is flushed to zero", sizeof(T) == 4 ? "at least 1.2e-38" : "at least 2.3e-308");
  }
  if (!std::isfinite(scalars.epsilon)) refuse("epsilon: infinite", "a finite number");
  if (!std::isfinite(scalars.alpha) || !std::isfinite(scalars.row_alpha)) {
    refuse("learning_rate: with this decay the step size is not finite", "a finite step size");
  }
  if (!std::isfinite(scalars.l2)) refuse("l2: infinite", "a finite number");
  if (!std::isfinite(scalars.keep)) refuse("weight_decay: infinite", "a finite number");
  return scalars;
}

// Checks what Python has already checked, for C programs.
inline void check_hyper(const AdamHyper& hyper) {
  const auto refuse = [](const char* name, double value, const char* expected) {
    throw std::invalid_argument(std::string(name) + ": " + std::to_string(value) + ", expected " + expected);
  };
  if (hyper.step < 1) throw std::invalid_argument("step: " + std::to_string(hyper.step) + ", expected 1 or more");
  if (!std::isfinite(hyper.learning_rate)) refuse("learning_rate", hyper.learning_rate, "a finite number");
  if (!(hyper.beta_1 >= 0 && hyper.beta_1 < 1)) refuse("beta_1", hyper.beta_1, "0 or more and less than 1");
  if (!(hyper.beta_2 >= 0 && hyper.beta_2 < 1)) refuse("beta_2", hyper.beta_2, "0 or more and less than 1");
  if (!(hyper.epsilon >= 0)) refuse("epsilon", hyper.epsilon, "0 or more");
  if (!(hyper.weight_decay >= 0)) refuse("weight_decay", hyper.weight_decay, "0 or more");
  if (!(hyper.decay >= 0)) refuse("decay", hyper.decay, "0 or more");
  if (!(hyper.clip_value >= 0)) refuse("clip_value", hyper.clip_value, "0 or more");
  if (!(hyper.clip_norm >= 0)) refuse("clip_norm", hyper.clip_norm, "0 or more");
  if (!(hyper.global_clip_norm >= 0)) refuse("global_clip_norm", hyper.global_clip_norm, "0 or more");
  if (!(hyper.ema_momentum >= 0 && hyper.ema_momentum <= 1)) refuse("ema_momentum", hyper.ema_momentum, "0 to 1");
  if (!(hyper.l2 >= 0)) refuse("l2", hyper.l2, "0 or more");
  const bool is_scale = hyper.gradient_scale > 0 && std::isfinite(hyper.gradient_scale);
  if (!is_scale) refuse("gradient_scale", hyper.gradient_scale, "a finite number above 0");
}

// Says why gradients of a variable of this dtype cannot be multiplied by `factor`; null if they can.
inline const char* lost_factor(double factor, DType dtype) {
  if (!std::isfinite(factor)) return "expected a finite number";
  if (dtype == FASTADAM_FLOAT64) return nullptr;
  return std::isfinite(static_cast<float>(factor)) ? nullptr : "infinite in float32, expected a finite number";
}

// The limits of sizes: with them bytes, and sums of a few sizes, fit in an int64_t.
constexpr int64_t kMostElements = int64_t{1} << 59;
constexpr int64_t kMostIndices = int64_t{1} << 57;  // sorting needs four int64_t for each

// a * b, or -1 if a factor is below 0 or the product above kMostElements.
inline int64_t product(int64_t a, int64_t b) {
  if (a < 0 || b < 0) return -1;
  return b == 0 || a <= kMostElements / b ? a * b : -1;
}

// How `rows` are checked. kShape does not read their arrays, and `count` is the number of indices: it is for rows on a
// device, which checks them itself, and for rows that this library has sorted.
enum class RowChecks { kAll, kShape };

// Checks the pointers and dtypes of one tensor. Errors name its position in the list.
class TensorCheck {
 public:
  TensorCheck(const TensorArgs& tensor, int64_t place, RowChecks row_checks)
      : t_(tensor), place_(place), row_checks_(row_checks) {}

  void check_variable() const {
    if (t_.dtype < FASTADAM_FLOAT16 || t_.dtype > FASTADAM_FLOAT64) refuse_dtype("dtype", t_.dtype);
    require(t_.var, t_.dtype, t_.size, "var");
  }

  void check_step(const AdamHyper& hyper, bool amsgrad) const {
    check_variable();
    if (t_.moments < FASTADAM_MOMENTS_WIDE || t_.moments > FASTADAM_MOMENTS_8BIT) {
      refuse("moments", (std::to_string(static_cast<int>(t_.moments)) + ", expected a fastadam_moments").c_str());
    }
    const int64_t slot = moment_size();
    require(t_.m, slot, t_.size, "m");
    require(t_.v, slot, t_.size, "v");
    if (t_.vhat != nullptr) require(t_.vhat, slot, t_.size, "vhat");
    if (t_.average != nullptr) require(t_.average, state_dtype(t_.dtype), t_.size, "average");
    const bool needs_vhat = amsgrad && t_.size > 0;  // the memory of an empty array may be null
    if (needs_vhat && t_.vhat == nullptr) refuse("vhat", "null, expected in all tensors or in none");
    if (t_.stale != nullptr) refuse("stale", "not null, expected null");
    check_gradient();
    if (is_accumulated(t_)) {  // only the Python package knows the rows of an accumulator
      refuse("accumulator", "the same as grad, which has rows, expected null or another array");
    }
    if (has_half_moments(t_) && (size_of(t_.dtype) != 2 || t_.rows != nullptr || t_.grad_dtype != t_.dtype)) {
      refuse(
          "moments",
          "FASTADAM_MOMENTS_HALF, expected only for a float16 or bfloat16 variable with a dense gradient of its dtype");
    }
    if (!has_codes() && (t_.m_scales != nullptr || t_.v_scales != nullptr)) {
      refuse("m_scales, v_scales", "not null, expected null unless moments is FASTADAM_MOMENTS_8BIT");
    }
    if (is_small(t_)) check_small();
    if (hyper.l2 != 0 && t_.rows != nullptr)
      refuse("l2", (std::to_string(hyper.l2) + ", expected 0 with a sparse gradient; use weight_decay").c_str());
    if (t_.copy != nullptr) check_copy();
    if (t_.telemetry != nullptr && t_.rows != nullptr) {
      refuse("telemetry", "not null, expected null with a sparse gradient");
    }
    if (t_.telemetry != nullptr) require(t_.telemetry, alignof(fastadam_telemetry), 1, "telemetry");
    if (hyper.zero_gradients && t_.rows != nullptr) {
      refuse("rows", "not null, expected null with zero_gradients");
    }
    const DType wide = state_dtype(t_.dtype);
    check_apart({{"var", t_.var, t_.size * size_of(t_.dtype)},
                 {"m", t_.m, t_.size * slot},
                 {"v", t_.v, t_.size * slot},
                 {"vhat", t_.vhat, t_.size * slot},
                 {"m_scales", t_.m_scales, has_codes() ? code_blocks(t_.size) : 0},
                 {"v_scales", t_.v_scales, has_codes() ? code_blocks(t_.size) : 0},
                 {"low", t_.low, t_.size * 2},
                 {"average", t_.average, t_.size * size_of(wide)},
                 {"copy", t_.copy, t_.size * size_of(t_.copy_dtype)},
                 {"telemetry", t_.telemetry, static_cast<int64_t>(sizeof(fastadam_telemetry))}});
  }

  void check_accumulate() const {
    check_variable();
    check_gradient();
    require(t_.accumulator, state_dtype(t_.dtype), t_.size, "accumulator");
    check_apart({{"accumulator", t_.accumulator, t_.size * size_of(state_dtype(t_.dtype))}});
  }

  void check_gradient_alone() const {
    if (t_.grad_dtype < FASTADAM_FLOAT16 || t_.grad_dtype > FASTADAM_FLOAT64) refuse_dtype("grad_dtype", t_.grad_dtype);
    require(t_.grad, t_.grad_dtype, t_.grad_size, "grad");
  }

  void check_rows() const {
    const Rows& rows = *t_.rows;
    if (rows.count < 0) refuse("rows", ("count " + std::to_string(rows.count) + ", expected 0 or more").c_str());
    if (rows.width < 0 || (rows.width == 0 ? t_.size != 0 : t_.size % rows.width != 0)) {
      refuse(
          "rows",
          ("width " + std::to_string(rows.width) + ", expected a divisor of size " + std::to_string(t_.size)).c_str());
    }
    if (row_checks_ == RowChecks::kShape) return check_values(rows.count, rows.width);
    if (rows.count == 0 || rows.width == 0) return check_values(0, 0);
    check_sorted(rows);
    if (rows.rows[0] < 0 || rows.rows[rows.count - 1] >= t_.size / rows.width) {
      refuse("rows", "a row out of range, expected rows of the variable");
    }
    check_values(rows.starts[rows.count], rows.width);
  }

  // Where fastadam_sum_rows stores the sums of this tensor.
  void check_sums(const void* sums) const {
    const DType dtype = state_dtype(t_.grad_dtype);
    if (reinterpret_cast<uintptr_t>(sums) % static_cast<uintptr_t>(size_of(dtype)) != 0) {
      throw std::invalid_argument("sums[" + std::to_string(place_) + "]: misaligned, expected an array of " +
                                  (dtype == FASTADAM_FLOAT64 ? "float64" : "float32"));
    }
    const Array written{"", sums, t_.rows->count * t_.rows->width * size_of(dtype)};
    for (const Array& read : arrays_read()) {
      if (!written.overlaps(read)) continue;
      throw std::invalid_argument("sums[" + std::to_string(place_) + "]: shares memory with " + read.name +
                                  ", expected its own");
    }
  }

  [[noreturn]] void refuse_dtype(const char* name, DType dtype) const {
    refuse(name, (std::to_string(static_cast<int>(dtype)) + ", expected a fastadam_dtype").c_str());
  }

  [[noreturn]] void refuse(const char* name, const char* why) const {
    throw std::invalid_argument("tensors[" + std::to_string(place_) + "]." + name + ": " + why);
  }

 private:
  struct Array {
    const char* name = "";
    const void* data = nullptr;
    int64_t bytes = 0;

    bool overlaps(const Array& other) const {
      const auto begin = reinterpret_cast<uintptr_t>(data);
      const auto other_begin = reinterpret_cast<uintptr_t>(other.data);
      if (data == nullptr || other.data == nullptr || bytes == 0 || other.bytes == 0) return false;
      return begin < other_begin ? other_begin - begin < static_cast<uintptr_t>(bytes)
                                 : begin - other_begin < static_cast<uintptr_t>(other.bytes);
    }
  };

  // The gradient and, if their arrays may be read, its rows.
  std::array<Array, 4> arrays_read() const {
    std::array<Array, 4> arrays{{{"grad", t_.grad, t_.grad_size * size_of(t_.grad_dtype)}}};
    if (t_.rows == nullptr || row_checks_ == RowChecks::kShape || t_.rows->count == 0 || t_.rows->width == 0) {
      return arrays;
    }
    const Rows& rows = *t_.rows;
    const int64_t item = sizeof(int64_t);
    arrays[1] = {"rows->rows", rows.rows, rows.count * item};
    arrays[2] = {"rows->starts", rows.starts, (rows.count + 1) * item};
    arrays[3] = {"rows->order", rows.order, rows.starts[rows.count] * item};
    return arrays;
  }

  // Raises if arrays that are written share memory with each other or with what is read.
  void check_apart(std::initializer_list<Array> written) const {
    const std::array<Array, 4> read = arrays_read();
    for (const Array* array = written.begin(); array != written.end(); ++array) {
      for (const Array* before = written.begin(); before != array; ++before) refuse_overlap(*array, *before);
      for (const Array& each : read) refuse_overlap(each, *array);
    }
  }

  void refuse_overlap(const Array& array, const Array& written) const {
    if (!array.overlaps(written)) return;
    refuse(array.name, (std::string("shares memory with ") + written.name + ", expected its own").c_str());
  }

  bool has_codes() const { return t_.moments == FASTADAM_MOMENTS_8BIT; }

  int64_t moment_size() const {
    if (has_codes()) return 1;
    if (t_.moments == FASTADAM_MOMENTS_BFLOAT16) return 2;
    return size_of(has_half_moments(t_) ? t_.dtype : state_dtype(t_.dtype));
  }

  // What is stored as in small_state.h.
  void check_small() const {
    const bool is_bfloat16 = t_.dtype == FASTADAM_BFLOAT16;
    if (t_.dtype == FASTADAM_FLOAT64) refuse("moments", "small ones of a float64 variable, expected a smaller dtype");
    if (t_.rows != nullptr) refuse("rows", "not null, expected null with small moments, low or stochastic");
    if (t_.low != nullptr && !is_bfloat16) refuse("low", "not null, expected null unless dtype is FASTADAM_BFLOAT16");
    if (t_.stochastic && (!is_bfloat16 || t_.low != nullptr)) {
      refuse("stochastic", "true, expected only for a bfloat16 variable without low");
    }
    if (t_.low != nullptr) require(t_.low, 2, t_.size, "low");
    if (t_.low != nullptr && t_.average != nullptr) refuse("average", "not null, expected null with low");
    if (!has_codes()) return;
    require(t_.m_scales, 1, code_blocks(t_.size), "m_scales");
    require(t_.v_scales, 1, code_blocks(t_.size), "v_scales");
    if (t_.vhat != nullptr) refuse("vhat", "not null, expected null with FASTADAM_MOMENTS_8BIT");
  }

  void check_copy() const {
    if (t_.copy_dtype < FASTADAM_FLOAT16 || t_.copy_dtype > FASTADAM_FLOAT32) {
      refuse("copy_dtype", (std::to_string(static_cast<int>(t_.copy_dtype)) +
                            ", expected FASTADAM_FLOAT16, FASTADAM_BFLOAT16 or FASTADAM_FLOAT32")
                               .c_str());
    }
    if (t_.dtype != FASTADAM_FLOAT32) refuse("copy", "not null, expected null unless dtype is FASTADAM_FLOAT32");
    require(t_.copy, t_.copy_dtype, t_.size, "copy");
  }

  // Raises unless the gradient has a row of values for each index.
  void check_values(int64_t index_count, int64_t width) const {
    if (product(index_count, width) == t_.grad_size) return;
    refuse("grad_size", (std::to_string(t_.grad_size) + ", expected rows->width times the number of indices").c_str());
  }

  // Raises unless fastadam_sort_rows could have made the rows.
  void check_sorted(const Rows& rows) const {
    if (rows.rows == nullptr || rows.starts == nullptr || rows.order == nullptr)
      refuse("rows", "a null array, expected the arrays of fastadam_sort_rows");
    if (rows.starts[0] != 0) refuse("rows", "expected starts[0] to be 0");
    for (int64_t k = 0; k < rows.count; ++k) {
      if (k > 0 && rows.rows[k] <= rows.rows[k - 1]) refuse("rows", "expected unique rows in ascending order");
      if (rows.starts[k + 1] <= rows.starts[k]) refuse("rows", "expected starts in ascending order");
    }
    const int64_t values = t_.grad_size / rows.width;
    for (int64_t at = 0; at < rows.starts[rows.count] && at < values; ++at) {
      if (rows.order[at] < 0 || rows.order[at] >= values)
        refuse("rows", "order out of range, expected positions of values");
    }
  }

  void check_gradient() const {
    if (const char* why = lost_factor(t_.grad_factor, t_.dtype)) refuse("grad_factor", why);
    const bool is_wide = size_of(t_.dtype) == 2 && t_.grad_dtype == FASTADAM_FLOAT32;
    const bool is_half = t_.grad_dtype == FASTADAM_FLOAT16 || t_.grad_dtype == FASTADAM_BFLOAT16;
    const bool is_narrow = t_.dtype == FASTADAM_FLOAT32 && is_half && t_.rows == nullptr;
    if (t_.grad_dtype != t_.dtype && !is_wide && !is_narrow) {
      refuse("grad_dtype",
             (std::to_string(static_cast<int>(t_.grad_dtype)) + " for dtype " +
              std::to_string(static_cast<int>(t_.dtype)) +
              ", expected the same, float32 for a half variable, or a half type for a dense gradient of float32")
                 .c_str());
    }
    require(t_.grad, t_.grad_dtype, t_.grad_size, "grad");
    if (t_.rows != nullptr) return check_rows();
    if (t_.grad_size != t_.size) {
      refuse(
          "grad_size",
          (std::to_string(t_.grad_size) + ", expected " + std::to_string(t_.size) + " for a dense gradient").c_str());
    }
  }

  void require(const void* data, DType dtype, int64_t size, const char* name) const {
    require(data, size_of(dtype), size, name);
  }

  void require(const void* data, int64_t item_size, int64_t size, const char* name) const {
    if (size < 0 || size > kMostElements) {
      refuse(name, (std::to_string(size) + " elements, expected 0 to 2^59").c_str());
    }
    if (size == 0) return;
    if (data == nullptr) refuse(name, "null");
    if (reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(item_size) != 0) {
      refuse(name, "misaligned, expected an address that is a multiple of the item size");
    }
  }

  const TensorArgs& t_;
  int64_t place_;
  RowChecks row_checks_;
};

}  // namespace fastadam
