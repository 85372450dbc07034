// SPDX-License-Identifier: Apache-2.0
// XLA's foreign function interface on the CPU: handlers of one step, on buffers that XLA owns and has aliased, each
// result with the operand it replaces. They run on XLA's threads; what they refuse becomes an error of the computation.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "../capi/fastadam.h"
#include "../capi/trusted.h"
#include "status.h"
#include "xla/ffi/api/ffi.h"

namespace fastadam::bind {

namespace ffi = xla::ffi;

// The operand `numbers`, float32 or float64: in this order, also in python/fastadam/jax/arguments.py.
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
      throw std::invalid_argument("an array that is not float16, bfloat16, float32 or float64");
  }
}

inline bool is_half(fastadam_dtype dtype) { return dtype == FASTADAM_FLOAT16 || dtype == FASTADAM_BFLOAT16; }

// One of `batch` equal parts of a buffer, which lie one after the other.
struct Part {
  ffi::AnyBuffer buffer;
  int64_t batch;
  int64_t at;

  int64_t size() const { return batch == 0 ? 0 : static_cast<int64_t>(buffer.element_count()) / batch; }
  char* data() const {
    const auto bytes = static_cast<int64_t>(ffi::ByteWidth(buffer.element_type()));
    return static_cast<char*>(buffer.untyped_data()) + at * size() * bytes;
  }
};

// Operands and results of a step. Under `vmap` each has the same leading dimensions, those of `count`: so many steps.
class Step {
 public:
  Step(ffi::RemainingArgs args, ffi::RemainingRets rets) : args_(args), rets_(rets) {}

  int64_t batch() const { return static_cast<int64_t>(arg(1).element_count()); }
  size_t batch_rank() const { return arg(1).dimensions().size(); }

  void require_args(size_t count) const {
    if (args_.size() != count) throw std::invalid_argument("a wrong number of operands");
  }

  ffi::AnyBuffer arg(size_t i) const { return value(args_.get<ffi::AnyBuffer>(i)); }

  ffi::AnyBuffer fresh_result(size_t i) const { return *value(rets_.get<ffi::AnyBuffer>(i)); }

  // The buffer of a result, in which XLA has put the operand.
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
    fastadam_hyper hyper = fastadam_defaults(integer(arg(1), at));
    hyper.learning_rate = number(at, kLearningRate);
    hyper.beta_1 = number(at, kBeta1);
    hyper.beta_2 = number(at, kBeta2);
    hyper.epsilon = number(at, kEpsilon);
    hyper.weight_decay = number(at, kWeightDecay);
    hyper.epsilon_corrected = epsilon_corrected;
    return hyper;
  }

  double grad_factor(int64_t at) const { return number(at, kGradFactor); }

  static int64_t integer(const ffi::AnyBuffer& buffer, int64_t at) {
    if (buffer.element_type() == ffi::S32) return static_cast<const int32_t*>(buffer.untyped_data())[at];
    if (buffer.element_type() == ffi::S64) return static_cast<const int64_t*>(buffer.untyped_data())[at];
    throw std::invalid_argument("an array that is not int32 or int64");
  }

 private:
  template <class T>
  static T value(ffi::ErrorOr<T> found) {
    if (!found.has_value()) throw std::invalid_argument(found.error().message());
    return *found;
  }

  double number(int64_t at, Number which) const {
    const ffi::AnyBuffer numbers = arg(0);
    const int64_t i = at * kNumberCount + which;
    if (numbers.element_type() == ffi::F64) return static_cast<const double*>(numbers.untyped_data())[i];
    return static_cast<double>(static_cast<const float*>(numbers.untyped_data())[i]);
  }

  ffi::RemainingArgs args_;
  ffi::RemainingRets rets_;
};

// No exception leaves a handler.
template <class Work>
ffi::Error guarded(Work work) {
  try {
    work();
    return ffi::Error::Success();
  } catch (const std::invalid_argument& refusal) {
    return ffi::Error::InvalidArgument(std::string("fastadam: ") + refusal.what());
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "fastadam: no memory for the work of this step");
  }
}

inline void run(const std::vector<fastadam_tensor>& tensors, const fastadam_hyper& hyper, bool lazy) {
  const fastadam_list list = {kTrustedAbi, tensors.data(), static_cast<int64_t>(tensors.size()), nullptr, nullptr, 0};
  require_ok(fastadam_step(&list, &hyper, lazy));
}

// Operands: numbers, count, then the gradients, parameters, m, v and, with `amsgrad`, vhat of all tensors; results: all
// but the gradients. decays[i]: weight decay applies to tensor i. `from_zero`: there are no parameters among the
// operands, and those of the results begin at zero, which makes them the steps themselves.
inline ffi::Error dense_step(ffi::RemainingArgs args, ffi::RemainingRets rets, bool amsgrad, bool epsilon_corrected,
                             bool from_zero, ffi::Span<const int64_t> decays) {
  return guarded([&] {
    const Step step(args, rets);
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
        if (var.size() == 0) continue;  // XLA may have given it no memory
        if (from_zero) std::memset(var.data(), 0, var.buffer.size_bytes() / static_cast<size_t>(step.batch()));
        tensors.push_back(
            fastadam_dense(var.data(), grad.data(), m.data(), v.data(), var.size(), dtype_of(var.buffer)));
        fastadam_tensor& tensor = tensors.back();
        tensor.vhat = amsgrad ? moment(2, i).data() : nullptr;
        tensor.grad_dtype = dtype_of(grad.buffer);
        tensor.grad_factor = step.grad_factor(at);
        tensor.decays = decays[i] != 0;
        tensor.half_slots = is_half(dtype_of(m.buffer));
      }
      run(tensors, step.hyper(at, epsilon_corrected), false);
    }
  });
}

// The rows that indices name, of a shard that has the rows from `first` on, `count` of `total`.
class ShardRows {
 public:
  ShardRows(const Part& ids, int64_t first, int64_t count, int64_t total, int64_t width)
      : memory_(static_cast<size_t>(fastadam_sort_memory(ids.size()))) {
    const bool is_long = ids.buffer.element_type() == ffi::S64;
    if (!is_long && ids.buffer.element_type() != ffi::S32)
      throw std::invalid_argument("ids that are not int32 or int64");
    fastadam_rows all;
    require_ok(fastadam_sort_rows(ids.data(), is_long, ids.size(), total, width, memory_.data(), &all, nullptr));
    int64_t* begin = memory_.data() + (all.rows - memory_.data());
    int64_t* end = std::lower_bound(begin, begin + all.count, first + count);
    begin = std::lower_bound(begin, end, first);
    rows_ = {begin, all.starts + (begin - all.rows), all.order, end - begin, width};
    std::for_each(begin, end, [&](int64_t& row) { row -= first; });
  }
  ShardRows(const ShardRows&) = delete;
  ShardRows& operator=(const ShardRows&) = delete;

  const fastadam_rows* get() const { return &rows_; }
  int64_t index_count() const { return rows_.starts[rows_.count]; }  // of this shard and of those before it

 private:
  std::vector<int64_t> memory_;
  fastadam_rows rows_;
};

// Operands: numbers, count, ids, values, the place of this shard of the rows along each mesh axis that they are sharded
// by, of which `axis_sizes` are the lengths; then the table, m, v and, with `amsgrad`, vhat; results: the last three or
// four. `row_count`: of the whole table.
inline ffi::Error sparse_step(ffi::RemainingArgs args, ffi::RemainingRets rets, bool amsgrad, bool epsilon_corrected,
                              bool lazy, int64_t row_count, ffi::Span<const int64_t> axis_sizes) {
  return guarded([&] {
    const Step step(args, rets);
    const size_t table = 4 + axis_sizes.size();
    step.require_args(table + (amsgrad ? 4 : 3));
    int64_t shard = 0;
    for (size_t i = 0; i < axis_sizes.size(); ++i) shard = shard * axis_sizes[i] + Step::integer(step.arg(4 + i), 0);
    const int64_t batch = step.batch();
    for (int64_t at = 0; at < batch; ++at) {
      const auto part = [&](size_t kind) { return Part{step.result(kind, table + kind), batch, at}; };
      const Part ids{step.arg(2), batch, at}, values{step.arg(3), batch, at};
      const Part var = part(0), m = part(1), v = part(2);
      const int64_t rows = var.buffer.dimensions()[step.batch_rank()];
      const ShardRows touched(ids, shard * rows, rows, row_count, rows == 0 ? 0 : var.size() / rows);
      fastadam_tensor tensor = fastadam_sparse(var.data(), values.data(), touched.index_count(), touched.get(),
                                               m.data(), v.data(), var.size(), dtype_of(var.buffer));
      tensor.vhat = amsgrad ? part(3).data() : nullptr;
      tensor.grad_dtype = dtype_of(values.buffer);
      tensor.grad_factor = step.grad_factor(at);
      run({tensor}, step.hyper(at, epsilon_corrected), lazy);
    }
  });
}

}  // namespace fastadam::bind
