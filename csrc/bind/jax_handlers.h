// SPDX-License-Identifier: Apache-2.0
// Handlers for XLA's foreign function interface. Each runs one step on buffers that XLA owns; XLA has aliased each
// result with the operand that it replaces. Handlers run on XLA's threads, and their errors become errors of the
// computation. The template parameter Place, OnHost (jax_on_host.h) or OnDevice (jax_on_device.h), says where the
// buffers are. It reads small operands and runs the steps. XLA constructs one for each call (CtxDecoding):
//   void read(void* to, const void* from, int64_t bytes);       `to` is host memory
//   void clear(void* data, int64_t bytes);
//   void step(const std::vector<fastadam_tensor>&, const fastadam_hyper&, bool lazy);
//   void step_rows(const fastadam_tensor&, const Ids&, const Shard&, const fastadam_hyper&, bool lazy);
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <new>
#include <numeric>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "../core/float_mode.h"
#include "../include/fastadam.h"
#include "xla/ffi/api/ffi.h"

namespace fastadam::bind {

namespace ffi = xla::ffi;

// The operand `numbers` contains these, in the same order as python/fastadam/jax/_arguments.py. Each is one float64, or
// the sum of three float32, times 2^n if there is a fourth float32 n: together they represent any float64.
enum Number { kLearningRate, kBeta1, kBeta2, kEpsilon, kWeightDecay, kGradFactor, kNumberCount };

inline fastadam_dtype dtype_of(const ffi::AnyBuffer& buffer) {
  switch (buffer.element_type()) {
    case ffi::F16:
      return FASTADAM_FLOAT16;
    case ffi::BF16:
      return FASTADAM_BFLOAT16;
    case ffi::F32:
      return FASTADAM_FLOAT32;
    case ffi::F64:
      return FASTADAM_FLOAT64;
    default:
      throw std::invalid_argument("an operand has an invalid dtype, expected float16, bfloat16, float32 or float64");
  }
}

inline bool is_half(fastadam_dtype dtype) { return dtype == FASTADAM_FLOAT16 || dtype == FASTADAM_BFLOAT16; }

inline bool is_long(const ffi::AnyBuffer& buffer) {
  if (buffer.element_type() == ffi::S64) return true;
  if (buffer.element_type() == ffi::S32) return false;
  throw std::invalid_argument("an operand has an invalid dtype, expected int32 or int64");
}

// One of `batch` equal, consecutive parts of a buffer.
struct Part {
  ffi::AnyBuffer buffer;
  int64_t batch;
  int64_t at;

  int64_t size() const { return batch == 0 ? 0 : static_cast<int64_t>(buffer.element_count()) / batch; }
  int64_t bytes() const { return size() * static_cast<int64_t>(ffi::ByteWidth(buffer.element_type())); }
  char* data() const { return static_cast<char*>(buffer.untyped_data()) + at * bytes(); }
};

// The rows of a table that a handler updates: `count` of `total`, starting at `first`.
struct Shard {
  int64_t first;
  int64_t count;
  int64_t total;
};

// Row ids of the whole table.
struct Ids {
  const void* data;
  bool is_long;
  int64_t count;
  int64_t width;  // the number of elements in a row
};

// Copies the elements of a buffer to the host and converts them to `To`.
template <class To, class Place>
std::vector<To> values_of(Place& place, const ffi::AnyBuffer& buffer) {
  const auto read_as = [&](auto zero) {
    std::vector<decltype(zero)> values(buffer.element_count());
    place.read(values.data(), buffer.untyped_data(), static_cast<int64_t>(buffer.size_bytes()));
    return std::vector<To>(values.begin(), values.end());
  };
  if constexpr (std::is_integral_v<To>) {
    return is_long(buffer) ? read_as(int64_t{}) : read_as(int32_t{});
  } else {
    return buffer.element_type() == ffi::F64 ? read_as(double{}) : read_as(float{});
  }
}

// The operands and results of a step. Under `vmap` all have the leading dimensions of `count`, and each of its elements
// is a step.
class Step {
 public:
  template <class Place>
  Step(ffi::RemainingArgs args, ffi::RemainingRets rets, Place& place)
      : args_(args),
        rets_(rets),
        numbers_(values_of<double>(place, arg(0))),
        counts_(values_of<int64_t>(place, arg(1))) {
    parts_ = counts_.empty() ? 0 : numbers_.size() / (counts_.size() * kNumberCount);
    if (numbers_.size() != parts_ * counts_.size() * kNumberCount) {
      throw std::invalid_argument("numbers: wrong number of elements");
    }
  }

  int64_t batch() const { return static_cast<int64_t>(counts_.size()); }
  size_t batch_rank() const { return arg(1).dimensions().size(); }

  void require_args(size_t count) const {
    if (args_.size() != count)
      throw std::invalid_argument("wrong number of operands: " + std::to_string(args_.size()) + ", expected " +
                                  std::to_string(count));
  }

  ffi::AnyBuffer arg(size_t i) const { return value(args_.get<ffi::AnyBuffer>(i)); }

  ffi::AnyBuffer fresh_result(size_t i) const { return *value(rets_.get<ffi::AnyBuffer>(i)); }

  // The buffer of a result. XLA has aliased it with the operand.
  ffi::AnyBuffer result(size_t i, size_t operand) const {
    const ffi::AnyBuffer buffer = fresh_result(i);
    const ffi::AnyBuffer source = arg(operand);
    const bool is_same = buffer.untyped_data() == source.untyped_data() || buffer.element_count() == 0;
    if (!is_same || buffer.size_bytes() != source.size_bytes()) {
      throw std::invalid_argument("result " + std::to_string(i) + " is not aliased with its operand");
    }
    return buffer;
  }

  fastadam_hyper hyper(int64_t at, bool epsilon_corrected) const {
    fastadam_hyper hyper = fastadam_defaults(counts_[static_cast<size_t>(at)]);
    hyper.learning_rate = number(at, kLearningRate);
    hyper.beta_1 = number(at, kBeta1);
    hyper.beta_2 = number(at, kBeta2);
    hyper.epsilon = number(at, kEpsilon);
    hyper.weight_decay = number(at, kWeightDecay);
    hyper.epsilon_corrected = epsilon_corrected;
    return hyper;
  }

  double grad_factor(int64_t at) const { return number(at, kGradFactor); }

 private:
  template <class T>
  static T value(ffi::ErrorOr<T> result) {
    if (!result.has_value()) throw std::invalid_argument(result.error().message());
    return *result;
  }

  double number(int64_t at, Number which) const {
    const double* parts = numbers_.data() + static_cast<std::ptrdiff_t>(parts_) * (at * kNumberCount + which);
    const double sum = std::accumulate(parts, parts + std::min<size_t>(parts_, 3), 0.0);
    return parts_ == 4 ? std::ldexp(sum, static_cast<int>(parts[3])) : sum;
  }

  ffi::RemainingArgs args_;
  ffi::RemainingRets rets_;
  std::vector<double> numbers_;
  std::vector<int64_t> counts_;
  size_t parts_ = 0;
};

// No exception leaves a handler, and the floating-point mode of XLA's thread does not enter.
template <class Work>
ffi::Error guarded(Work work) {
  const DefaultArithmetic arithmetic;
  try {
    work();
    return ffi::Error::Success();
  } catch (const std::invalid_argument& refusal) {
    return ffi::Error::InvalidArgument(std::string("fastadam: ") + refusal.what());
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "fastadam: out of memory");
  } catch (const std::exception& error) {
    return ffi::Error(ffi::ErrorCode::kInternal, std::string("fastadam: ") + error.what());
  }
}

// Operands: numbers, count, then the gradients, parameters, m, v and, with `amsgrad`, vhat of all tensors. Results: the
// parameters, m, v and vhat. decays[i]: weight decay applies to tensor i. `from_zero`: the operands contain no
// parameters, and the results start at zero, which makes them the updates.
template <class Place>
ffi::Error dense_step(Place place, ffi::RemainingArgs args, ffi::RemainingRets rets, bool amsgrad,
                      bool epsilon_corrected, bool from_zero, ffi::Span<const int64_t> decays) {
  return guarded([&] {
    const Step step(args, rets, place);
    const size_t n = decays.size();
    step.require_args(2 + n * (amsgrad ? 5 : 4) - (from_zero ? n : 0));
    const size_t moments = from_zero ? 2 + n : 2 + 2 * n;
    std::vector<fastadam_tensor> tensors;
    for (int64_t at = 0; at < step.batch(); ++at) {
      const auto moment = [&](size_t kind, size_t i) {
        return Part{step.result((kind + 1) * n + i, moments + kind * n + i), step.batch(), at};
      };
      tensors.clear();
      for (size_t i = 0; i < n; ++i) {
        const Part grad{step.arg(2 + i), step.batch(), at};
        const Part var{from_zero ? step.fresh_result(i) : step.result(i, 2 + n + i), step.batch(), at};
        const Part m = moment(0, i), v = moment(1, i);
        if (var.size() == 0) continue;  // XLA may not have allocated memory
        if (from_zero) place.clear(var.data(), var.bytes());
        tensors.push_back(
            fastadam_dense(var.data(), grad.data(), m.data(), v.data(), var.size(), dtype_of(var.buffer)));
        fastadam_tensor& tensor = tensors.back();
        tensor.vhat = amsgrad ? moment(2, i).data() : nullptr;
        tensor.grad_dtype = dtype_of(grad.buffer);
        tensor.grad_factor = step.grad_factor(at);
        tensor.decays = decays[i] != 0;
        if (is_half(dtype_of(m.buffer))) tensor.moments = FASTADAM_MOMENTS_HALF;
      }
      place.step(tensors, step.hyper(at, epsilon_corrected), false);
    }
  });
}

// Operands: numbers, count, ids, values; the index of this shard along each mesh axis over which the rows are sharded,
// with sizes `axis_sizes`; then the table, m, v and, with `amsgrad`, vhat. Results: the table, m, v and vhat.
// `row_count`: the number of rows of the whole table.
template <class Place>
ffi::Error sparse_step(Place place, ffi::RemainingArgs args, ffi::RemainingRets rets, bool amsgrad,
                       bool epsilon_corrected, bool lazy, int64_t row_count, ffi::Span<const int64_t> axis_sizes) {
  return guarded([&] {
    const Step step(args, rets, place);
    const size_t table = 4 + axis_sizes.size();
    step.require_args(table + (amsgrad ? 4 : 3));
    int64_t shard = 0;
    for (size_t i = 0; i < axis_sizes.size(); ++i) {
      shard = shard * axis_sizes[i] + values_of<int64_t>(place, step.arg(4 + i)).at(0);
    }
    const int64_t batch = step.batch();
    for (int64_t at = 0; at < batch; ++at) {
      const auto part = [&](size_t kind) { return Part{step.result(kind, table + kind), batch, at}; };
      const Part ids{step.arg(2), batch, at}, values{step.arg(3), batch, at};
      const Part var = part(0), m = part(1), v = part(2);
      const int64_t rows = var.buffer.dimensions()[step.batch_rank()];
      const int64_t width = rows == 0 ? 0 : var.size() / rows;
      fastadam_tensor tensor =
          fastadam_dense(var.data(), values.data(), m.data(), v.data(), var.size(), dtype_of(var.buffer));
      tensor.vhat = amsgrad ? part(3).data() : nullptr;
      tensor.grad_dtype = dtype_of(values.buffer);
      tensor.grad_factor = step.grad_factor(at);
      place.step_rows(tensor, {ids.data(), is_long(ids.buffer), ids.size(), width}, {shard * rows, rows, row_count},
                      step.hyper(at, epsilon_corrected), lazy);
    }
  });
}

}  // namespace fastadam::bind
