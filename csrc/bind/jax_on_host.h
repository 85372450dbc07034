// SPDX-License-Identifier: Apache-2.0
// The Place of jax_handlers.h for buffers in CPU memory.
#pragma once

#include <algorithm>
#include <cstring>
#include <optional>

#include "../capi/prepare.h"
#include "../capi/run.h"
#include "jax_handlers.h"
#include "status.h"

namespace fastadam::bind {

// The rows of `ids` that are in one shard, numbered from its first row.
class ShardRows {
 public:
  ShardRows(const Ids& ids, const Shard& shard) : memory_(static_cast<size_t>(fastadam_sort_memory(ids.count))) {
    fastadam_rows all;
    require_ok(
        fastadam_sort_rows(ids.data, ids.is_long, ids.count, shard.total, ids.width, memory_.data(), &all, nullptr));
    int64_t* begin = memory_.data() + (all.rows - memory_.data());
    int64_t* end = std::lower_bound(begin, begin + all.count, shard.first + shard.count);
    begin = std::lower_bound(begin, end, shard.first);
    rows_ = {begin, all.starts + (begin - all.rows), all.order, end - begin, ids.width};
    std::for_each(begin, end, [&](int64_t& row) { row -= shard.first; });
  }
  ShardRows(const ShardRows&) = delete;
  ShardRows& operator=(const ShardRows&) = delete;

  const fastadam_rows* get() const { return &rows_; }

 private:
  std::vector<int64_t> memory_;
  fastadam_rows rows_;
};

class OnHost {
 public:
  void read(void* to, const void* from, int64_t bytes) const {
    if (bytes > 0) std::memcpy(to, from, static_cast<size_t>(bytes));
  }

  void clear(void* data, int64_t bytes) const { std::memset(data, 0, static_cast<size_t>(bytes)); }

  void step(const std::vector<fastadam_tensor>& tensors, const fastadam_hyper& hyper, bool lazy) const {
    const auto count = static_cast<int64_t>(tensors.size());
    const fastadam_list list = {FASTADAM_ABI, tensors.data(), count, nullptr, nullptr, 0};
    require_ok(fastadam_step(&list, &hyper, lazy));
  }

  void step_rows(fastadam_tensor tensor, const Ids& ids, const Shard& shard, const fastadam_hyper& hyper,
                 bool lazy) const {
    const ShardRows rows(ids, shard);
    const fastadam_rows all{nullptr, nullptr, nullptr, ids.count, ids.width};
    tensor.rows = &all;
    tensor.grad_size = ids.count * ids.width;
    check_hyper(hyper);
    TensorCheck(tensor, 0, RowChecks::kShape).check_step(hyper, tensor.vhat != nullptr);
    tensor.rows = rows.get();
    StepArgs args = prepare_step(&tensor, 1, hyper, lazy);
    const int64_t head = 0;
    const int64_t offsets[] = {0, moved_elements(tensor, lazy)};
    args.chains = {&tensor, &head, offsets, 1};
    run_step(args, 1, hyper);
  }
};

}  // namespace fastadam::bind

template <>
struct xla::ffi::CtxDecoding<fastadam::bind::OnHost> {
  using Type = fastadam::bind::OnHost;
  static std::optional<Type> Decode(const XLA_FFI_Api*, XLA_FFI_ExecutionContext*, DiagnosticEngine&) { return Type(); }
};
