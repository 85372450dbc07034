// SPDX-License-Identifier: Apache-2.0
// IndexedSlices and deferred tables: sorts indices with CUB, and updates, sums and gathers rows.
#include <algorithm>
#include <cub/cub.cuh>

#include "chunks.h"
#include "context.h"
#include "table_kernels.h"

namespace fastadam::cuda {
namespace {

int bits_of(int64_t row_count) {
  int bits = 1;
  while (bits < 63 && (row_count - 1) >> bits > 0) ++bits;
  return bits;
}

}  // namespace

struct SortedRows::Memory {
  DeviceArray<int64_t> unsorted, keys, places, order, marks, rows, starts, unique;
  DeviceArray<unsigned long long> bad;
  DeviceArray<unsigned char> scratch, sums;
  DeviceRows result{};

  void reserve(int64_t count, size_t scratch_size, Context::Parts& context) {
    context.room_for(unique, 1);
    context.room_for(scratch, static_cast<int64_t>(scratch_size));
    for (DeviceArray<int64_t>* memory : {&unsorted, &keys, &places, &order, &marks, &rows}) {
      context.room_for(*memory, count);
    }
    context.room_for(starts, count + 1);
    if (bad.count() > 0) return;
    check(cudaMemsetAsync(context.room_for(bad, 1), 0xff, sizeof(kNoPosition), context.stream));
  }
};

SortedRows::SortedRows() : memory_(std::make_unique<Memory>()) {}
SortedRows::~SortedRows() = default;

void SortedRows::sort(const void* indices, bool is_int64, int64_t count, int64_t row_count, int64_t width,
                      int64_t source, Context& context) {
  Context::Parts& parts = context.parts();
  const cudaStream_t stream = parts.stream;
  Memory& m = *memory_;
  const auto sort_keys = [&](void* memory, size_t& size) {
    check(cub::DeviceRadixSort::SortPairs(memory, size, m.unsorted.get(), m.keys.get(), m.places.get(), m.order.get(),
                                          count, 0, bits_of(row_count), stream));
  };
  const auto sum_marks = [&](void* memory, size_t& size) {
    check(cub::DeviceScan::InclusiveSum(memory, size, m.marks.get(), m.places.get(), count, stream));
  };
  size_t sort_size = 0;
  size_t sum_size = 0;
  sort_keys(nullptr, sort_size);
  sum_marks(nullptr, sum_size);
  m.reserve(count, std::max({size_t{1}, sort_size, sum_size}), parts);
  const int64_t grid = index_grid(count);
  launch(ReadIndices{indices, is_int64, count, row_count, m.unsorted.get(), m.places.get(), m.bad.get()}, grid, stream);
  if (count > 0) {
    sort_keys(m.scratch.get(), sort_size);
    launch(MarkRows{m.keys.get(), count, m.marks.get()}, grid, stream);
    sum_marks(m.scratch.get(), sum_size);
  }
  launch(ListRows{m.keys.get(), m.places.get(), count, m.rows.get(), m.starts.get(), m.unique.get(), m.unsorted.get(),
                  source, m.bad.get(), parts.state.get(), parts.report.on_device()},
         std::max<int64_t>(1, grid), stream);
  static_cast<Rows&>(m.result) = {m.rows.get(), m.starts.get(), m.order.get(), count, width};
  m.result.unique = m.unique.get();
}

const DeviceRows& SortedRows::rows() const { return memory_->result; }

void* SortedRows::sum(const void* values, DType dtype, Context& context) {
  const cudaStream_t stream = context.parts().stream;
  Memory& m = *memory_;
  const DeviceRows& rows = m.result;
  unsigned char* sums = context.parts().room_for(m.sums, rows.count * rows.width * size_of(state_dtype(dtype)));
  with_storage(dtype, [&](auto zero) {
    using Grad = decltype(zero);
    launch(RowSums<Grad>{values, rows, reinterpret_cast<Compute<Grad>*>(sums)}, row_grid(rows.count, rows.width),
           stream);
  });
  launch(NumberRows{m.unique.get(), m.starts.get(), m.order.get()}, index_grid(rows.count + 1), stream);
  return sums;
}

struct DeviceHistory::Memory {
  bool is_double;
  int64_t item_size;
  DeviceArray<double> alphas, keeps, peaks;  // large enough for float and for double
  DeviceArray<ClosedForm> forms;
  DeviceArray<int32_t> places;

  void copy(DeviceArray<double>& to, const void* from, int64_t count, cudaStream_t stream) const {
    if (count == 0) return;
    const auto size = static_cast<size_t>(count * item_size);
    check(cudaMemcpyAsync(to.get(), from, size, cudaMemcpyHostToDevice, stream));
  }

  template <class T>
  void store(const void* from_alphas, const void* from_keeps, const void* from_peaks, int64_t step,
             cudaStream_t stream) {
    const auto as = [](auto& memory) { return reinterpret_cast<T*>(memory.get()); };
    launch(StoreRate<T>{as(alphas), as(keeps), as(peaks), step, static_cast<const T*>(from_alphas)[step],
                        static_cast<const T*>(from_keeps)[step], static_cast<const T*>(from_peaks)[step / kPeakSteps]},
           1, stream);
  }
};

DeviceHistory::DeviceHistory(bool is_double, int64_t room) : memory_(std::make_unique<Memory>()) {
  memory_->is_double = is_double;
  memory_->item_size = is_double ? 8 : 4;
  memory_->alphas = DeviceArray<double>(room);
  memory_->keeps = DeviceArray<double>(room);
  memory_->peaks = DeviceArray<double>(room / kPeakSteps + 1);
}
DeviceHistory::~DeviceHistory() = default;

void DeviceHistory::write(const void* alphas, const void* keeps, const void* peaks, int64_t steps, void* on_stream) {
  const auto stream = static_cast<cudaStream_t>(on_stream);
  Memory& m = *memory_;
  m.copy(m.alphas, alphas, steps, stream);
  m.copy(m.keeps, keeps, steps, stream);
  m.copy(m.peaks, peaks, (steps + kPeakSteps - 1) / kPeakSteps, stream);
}

void DeviceHistory::append(const void* alphas, const void* keeps, const void* peaks, int64_t step, void* on_stream) {
  const auto stream = static_cast<cudaStream_t>(on_stream);
  if (memory_->is_double) return memory_->store<double>(alphas, keeps, peaks, step, stream);
  memory_->store<float>(alphas, keeps, peaks, step, stream);
}

void DeviceHistory::write_forms(const ClosedForm* forms, int64_t form_count, const int32_t* places, int64_t place_count,
                                void* on_stream) {
  const auto stream = static_cast<cudaStream_t>(on_stream);
  room_for(memory_->forms, form_count + 1);  // one more, because the pointer must not be null
  room_for(memory_->places, place_count);
  memory_->forms.write(forms, form_count, stream);
  memory_->places.write(places, place_count, stream);
}

void DeviceHistory::point(StaleRows& stale) const {
  stale.alphas = memory_->alphas.get();
  stale.keeps = memory_->keeps.get();
  stale.peaks = memory_->peaks.get();
  stale.forms = memory_->forms.get();
  stale.places = memory_->places.get();
}

struct Gather::Memory {
  HostReport report;
  DeviceArray<unsigned long long> bad{1};
  bool is_fresh = true;

  template <class Word>
  void run(GatherRows<Word> kernel, cudaStream_t stream) {
    const bool is_captured = is_capturing(stream);
    if (is_fresh || is_captured) check(cudaMemsetAsync(bad.get(), 0xff, sizeof(kNoPosition), stream));
    is_fresh = is_fresh && is_captured;  // a captured memset has not run
    kernel.bad = bad.get();
    launch(kernel, row_grid(kernel.id_count, kernel.width), stream);
    launch(ReportBadId{kernel.ids, kernel.is_int64, bad.get(), report.on_device()}, 1, stream);
  }
};

Gather::Gather() : memory_(std::make_unique<Memory>()) {}
Gather::~Gather() = default;

void Gather::run(const void* table, int64_t row_count, int64_t width, DType dtype, const void* ids, bool is_int64,
                 int64_t id_count, void* out, void* stream) {
  const auto gather = [&](auto word) {
    using Word = decltype(word);
    memory_->run(GatherRows<Word>{static_cast<const Word*>(table), ids, is_int64, id_count, row_count, width,
                                  static_cast<Word*>(out), nullptr},
                 static_cast<cudaStream_t>(stream));
  };
  if (size_of(dtype) == 2) return gather(uint16_t{});
  if (size_of(dtype) == 4) return gather(uint32_t{});
  gather(uint64_t{});
}

std::optional<Failure> Gather::take_failure() {
  volatile Report& report = *memory_->report.get();
  if (report.failed == 0) return std::nullopt;
  const Failure failure{0, 0, report.position, report.index};
  report.failed = 0;  // the device may write the next one
  return failure;
}

void step_rows(const StepArgs& step, const TensorArgs& tensor, const Factor* factor, const StepState* state,
               void* on_stream) {
  const auto stream = static_cast<cudaStream_t>(on_stream);
  const auto* slices = static_cast<const DeviceRows*>(tensor.rows);
  const auto* stale = static_cast<const DeviceStale*>(tensor.stale);
  const int64_t width = slices != nullptr ? slices->width : stale->width;
  const int64_t table_rows = width == 0 ? 0 : tensor.size / width;
  with_storage(tensor.dtype, [&](auto zero) {
    using Storage = decltype(zero);
    with_options(step.amsgrad, tensor.grad == nullptr ? kAsItIs : step.transform, [&](auto amsgrad, auto transform) {
      constexpr bool kTransforms = transform.value != kAsItIs;
      if (stale == nullptr && !step.lazy) {
        const TableStep<Storage, amsgrad.value, kTransforms> kernel{state, tensor, *slices, factor, table_rows};
        return launch(kernel, kernel.grid(), stream);
      }
      RowStep<Storage, amsgrad.value, kTransforms> kernel{};
      kernel.state = state;
      kernel.tensor = tensor;
      if (slices != nullptr) kernel.slices = *slices;
      if (stale != nullptr) {
        kernel.stale = *stale;
        kernel.last = stale->last;
        kernel.new_last = static_cast<int32_t>(stale->now + (tensor.grad != nullptr));
      }
      kernel.factor = factor;
      kernel.width = width;
      kernel.mode = slices == nullptr ? RowMode::kCatchUp : RowMode::kTouched;
      kernel.row_count = slices == nullptr ? table_rows : slices->count;
      launch(kernel, row_grid(kernel.row_count, width), stream);
    });
  });
}

void accumulate_rows(const TensorArgs& tensor, bool restart, const StepState* state, void* stream) {
  const auto& slices = *static_cast<const DeviceRows*>(tensor.rows);
  const int64_t row_count = slices.width == 0 ? 0 : tensor.size / slices.width;
  with_storage(tensor.dtype, [&](auto zero) {
    const AccumulateRows<decltype(zero)> kernel{state, tensor, slices, row_count, restart};
    launch(kernel, kernel.grid(), static_cast<cudaStream_t>(stream));
  });
}

}  // namespace fastadam::cuda
