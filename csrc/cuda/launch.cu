// SPDX-License-Identifier: Apache-2.0
// A step: its numbers, norms and factors, then all dense gradients in a launch for each dtype, then the rows.
#include <array>
#include <cmath>

#include "chunks.h"
#include "context.h"
#include "launch.h"

namespace fastadam::cuda {
namespace {

using ChunksByDType = std::array<DeviceArray<Chunk>, kDTypeCount>;

// How the launches of a step are cut: it depends on which gradients are IndexedSlices.
struct Layout {
  struct Round {
    ChunksByDType dense;
    std::vector<int64_t> slices;
  };
  std::vector<bool> are_slices;
  std::vector<Round> rounds;
  ChunksByDType averages;

  Layout(std::vector<bool> of, const std::vector<TensorArgs>& tensors, const std::vector<std::vector<int64_t>>& order,
         cudaStream_t stream)
      : are_slices(std::move(of)) {
    std::vector<int64_t> averaged;
    for (const std::vector<int64_t>& chosen : order) {
      rounds.emplace_back();
      std::vector<int64_t> dense;
      for (int64_t t : chosen) {
        const TensorArgs& tensor = tensors[static_cast<size_t>(t)];
        (tensor.rows == nullptr ? dense : rounds.back().slices).push_back(t);
        if (&chosen == &order.front() && tensor.average != nullptr) averaged.push_back(t);
      }
      cut(rounds.back().dense, tensors, dense, stream);
    }
    cut(averages, tensors, averaged, stream);
  }

  static void cut(ChunksByDType& chunks, const std::vector<TensorArgs>& tensors, const std::vector<int64_t>& chosen,
                  cudaStream_t stream) {
    for (size_t i = 0; i < kDTypeCount; ++i) {
      chunks[i] = DeviceArray<Chunk>(chunks_of(tensors, chosen, static_cast<DType>(i)), stream);
    }
  }
};

std::vector<bool> slices_among(const std::vector<TensorArgs>& tensors) {
  std::vector<bool> are_slices;
  for (const TensorArgs& tensor : tensors) are_slices.push_back(tensor.rows != nullptr);
  return are_slices;
}

// The memory of norms, for gradients of these sizes.
struct NormTables {
  std::vector<int64_t> host_offsets;
  DeviceArray<int64_t> offsets;
  DeviceArray<double> sums, factors, squares;

  void fit(const std::vector<TensorArgs>& tensors, cudaStream_t stream) {
    std::vector<int64_t> wanted = norm_offsets(tensors);
    if (wanted == host_offsets) return;
    const auto count = static_cast<int64_t>(tensors.size());
    room_for(offsets, count + 1);
    room_for(sums, wanted.back());
    room_for(factors, count);
    room_for(squares, count);
    offsets.write(wanted.data(), count + 1, stream);
    host_offsets = std::move(wanted);
  }

  int64_t count() const { return static_cast<int64_t>(host_offsets.size()) - 1; }
};

bool same(const Gradient& a, const Gradient& b) {
  return a.data == b.data && a.factor == b.factor && a.size == b.size && a.dtype == b.dtype;
}

}  // namespace

struct Launch::Tables {
  std::vector<std::vector<int64_t>> rounds;
  bool has_single = false;
  bool has_double = false;
  DeviceArray<TensorArgs> tensors;
  DeviceArray<Gradient> gradients;
  std::unique_ptr<Layout> layout;
  NormTables norms;
  std::vector<Gradient> stored;  // what `gradients` holds
  std::shared_ptr<Context> owner;
  Context::Parts& context;

  Tables(std::shared_ptr<Context> of, const std::vector<TensorArgs>& given, const Chains& chains)
      : rounds(rounds_of(chains)),
        gradients(static_cast<int64_t>(given.size())),
        owner(std::move(of)),
        context(owner->parts()) {
    std::vector<TensorArgs> lasting = given;
    for (TensorArgs& tensor : lasting) {
      (tensor.dtype == FASTADAM_FLOAT64 ? has_double : has_single) = true;
      tensor.rows = nullptr;  // of the host, and of one step
      tensor.stale = nullptr;
    }
    tensors = DeviceArray<TensorArgs>(lasting, context.stream);
  }

  StepState* state() const { return context.state.get(); }
  Report* report() const { return context.report.on_device(); }

  const Layout& layout_of(const std::vector<TensorArgs>& given, cudaStream_t stream) {
    std::vector<bool> wanted = slices_among(given);
    if (layout != nullptr && layout->are_slices == wanted) return *layout;
    require_known();
    layout = std::make_unique<Layout>(std::move(wanted), given, rounds, stream);
    return *layout;
  }

  const NormTables& norms_of(const std::vector<TensorArgs>& given, cudaStream_t stream) {
    if (norms.host_offsets != norm_offsets(given)) require_known();
    norms.fit(given, stream);
    return norms;
  }

  // There is no memory to be had in a capture.
  void require_known() const {
    if (!context.is_capturing) return;
    throw std::runtime_error("a step with such gradients was not made before it was captured; make one first");
  }

  bool needs_singles(const AdamHyper& hyper) const { return has_single && !hyper.epsilon_corrected; }
  bool needs_doubles(const AdamHyper& hyper) const { return has_double || hyper.epsilon_corrected; }

  bool can_count(const AdamHyper& hyper) const {
    if (!context.has_powers) context.make_powers(hyper);
    return context.has_powers_for(hyper, needs_singles(hyper), needs_doubles(hyper));
  }

  void begin(const StepArgs& step, const AdamHyper& hyper, DeviceNumbers numbers, int64_t call, cudaStream_t stream) {
    if (!context.has_powers) context.make_powers(hyper);
    numbers.counts = numbers.counts || context.is_capturing;
    if (!numbers.counts && numbers.rate == nullptr) {
      launch(BeginStep{state(), report(), hyper.step, call, step.scalars_f32, step.scalars_f64, numbers,
                       hyper.clip_value, hyper.gradient_scale},
             1, stream);
      return;
    }
    context.require_powers(hyper, needs_singles(hyper), needs_doubles(hyper));
    launch(AdvanceStep{state(), report(), call, hyper, numbers, context.is_capturing, context.singles.get(),
                       context.doubles.get(), has_single, has_double},
           1, stream);
    context.is_captured = context.is_captured || context.is_capturing;
  }

  // What is no step, but before or between them.
  void begin(const StepArgs& step, int64_t call, cudaStream_t stream) {
    launch(BeginStep{state(), report(), kSameStep, call, step.scalars_f32, step.scalars_f64, {}, HUGE_VAL, 1}, 1,
           stream);
  }

  void set_gradients(const std::vector<TensorArgs>& given, cudaStream_t stream) {
    std::vector<Gradient> wanted;
    for (const TensorArgs& tensor : given) wanted.push_back(gradient_of(tensor));
    const bool known = std::equal(wanted.begin(), wanted.end(), stored.begin(), stored.end(), same);
    if (known && !context.is_capturing) return;  // a graph stores its own
    stored.clear();
    for (size_t first = 0; first < wanted.size(); first += SetGradients::kCount) {
      SetGradients set{};
      set.table = gradients.get() + first;
      set.count = fill_gradients(set.gradients, wanted, first);
      launch(set, 1, stream);
    }
    stored = std::move(wanted);
  }

  // `scaled`: by a step with a grad_scale on the device, which has the value clip.
  void sum_squares(const NormTables& norms_now, const StepState* scaled, double clip_value, bool require_finite,
                   cudaStream_t stream) {
    launch(SumSquares{gradients.get(), norms_now.offsets.get(), norms_now.count(), scaled, clip_value, require_finite,
                      norms_now.sums.get()},
           norm_grid(norms_now.host_offsets), stream);
    launch(SumBlocks{norms_now.offsets.get(), norms_now.sums.get(), most_blocks(norms_now.host_offsets)},
           norms_now.count(), stream);
  }

  bool all_finite(const NormTables& norms_now, bool is_step, cudaStream_t stream) {
    launch(JudgeFinite{state(), report(), norms_now.offsets.get(), norms_now.sums.get(), norms_now.count(), is_step}, 1,
           stream);
    check(cudaStreamSynchronize(stream));
    return context.report.get()->not_finite == 0;
  }

  // The factors of norm clips, or null.
  const double* clip(const NormTables& norms_now, const AdamHyper& hyper, cudaStream_t stream) {
    if (!std::isfinite(hyper.clip_norm) && !std::isfinite(hyper.global_clip_norm)) return nullptr;
    launch(ClipFactors{state(), gradients.get(), norms_now.offsets.get(), norms_now.sums.get(), norms_now.count(),
                       hyper.clip_norm, hyper.global_clip_norm, hyper.gradient_scale, norms_now.factors.get(),
                       norms_now.squares.get()},
           1, stream);
    return norms_now.factors.get();
  }

  template <class Storage>
  void update(const StepArgs& step, const DeviceArray<Chunk>& chunks, const double* factors, cudaStream_t stream) {
    choose(step.amsgrad, step.transform, [&](auto amsgrad, auto transform) {
      launch(DenseStep<Storage, amsgrad.value, transform.value>{state(), tensors.get(), gradients.get(), factors,
                                                                chunks.get()},
             chunks.count(), stream);
    });
  }

  void average(const Layout& now, bool overwrite, cudaStream_t stream) {
    for (size_t i = 0; i < kDTypeCount; ++i) {
      const DeviceArray<Chunk>& chunks = now.averages[i];
      with_storage(static_cast<DType>(i), [&](auto zero) {
        launch(AverageStep<decltype(zero)>{state(), tensors.get(), chunks.get(), overwrite}, chunks.count(), stream);
      });
    }
  }
};

Launch::Launch(std::shared_ptr<Context> context, const std::vector<TensorArgs>& tensors, const Chains& chains)
    : tables_(std::make_unique<Tables>(std::move(context), tensors, chains)) {}

Launch::~Launch() = default;

bool Launch::can_count(const AdamHyper& hyper) { return tables_->can_count(hyper); }

bool Launch::step(const StepArgs& given, const std::vector<TensorArgs>& tensors, const AdamHyper& hyper,
                  const DeviceNumbers& numbers, int64_t call) {
  Tables& tables = *tables_;
  StepArgs step = given;
  if (numbers.grad_scale != nullptr && step.transform == kAsItIs) step.transform = kClipAndFactor;
  const cudaStream_t stream = tables.context.stream;
  const Layout& layout = tables.layout_of(tensors, stream);
  const bool needs_norms =
      std::isfinite(hyper.clip_norm) || std::isfinite(hyper.global_clip_norm) || hyper.require_finite;
  if (needs_norms) tables.norms_of(tensors, stream);
  tables.begin(step, hyper, numbers, call, stream);
  tables.set_gradients(tensors, stream);
  const double* factors = nullptr;
  if (needs_norms) {
    const NormTables& norms = tables.norms;
    const StepState* scaled = numbers.grad_scale == nullptr ? nullptr : tables.state();
    tables.sum_squares(norms, scaled, raw_clip_value(hyper), hyper.require_finite, stream);
    if (hyper.require_finite && !tables.all_finite(norms, true, stream)) return false;
    factors = tables.clip(norms, hyper, stream);
  }
  for (const Layout::Round& round : layout.rounds) {
    for (size_t i = 0; i < kDTypeCount; ++i) {
      with_storage(static_cast<DType>(i),
                   [&](auto zero) { tables.update<decltype(zero)>(step, round.dense[i], factors, stream); });
    }
    for (int64_t t : round.slices) {
      step_rows(step, tensors[static_cast<size_t>(t)], factors == nullptr ? nullptr : factors + t, tables.state(),
                stream);
    }
  }
  tables.average(layout, step.ema_overwrite, stream);
  return true;
}

bool Launch::accumulate(bool restart, bool require_finite, const std::vector<TensorArgs>& tensors, int64_t call) {
  Tables& tables = *tables_;
  const cudaStream_t stream = tables.context.stream;
  const Layout& layout = tables.layout_of(tensors, stream);
  if (require_finite) tables.norms_of(tensors, stream);
  tables.begin(StepArgs{}, call, stream);
  tables.set_gradients(tensors, stream);
  if (require_finite) tables.sum_squares(tables.norms, nullptr, HUGE_VAL, true, stream);
  if (require_finite && !tables.all_finite(tables.norms, false, stream)) return false;
  for (const Layout::Round& round : layout.rounds) {
    const bool is_first = &round == &layout.rounds.front();
    for (size_t i = 0; i < kDTypeCount; ++i) {
      with_storage(static_cast<DType>(i), [&](auto zero) {
        const DeviceArray<Chunk>& chunks = round.dense[i];
        launch(AccumulateStep<decltype(zero)>{tables.state(), tables.tensors.get(), tables.gradients.get(),
                                              chunks.get(), restart && is_first},
               chunks.count(), stream);
      });
    }
    for (int64_t t : round.slices) {
      accumulate_rows(tensors[static_cast<size_t>(t)], restart && is_first, tables.state(), stream);
    }
  }
  return true;
}

void Launch::sum_squares(const std::vector<TensorArgs>& tensors, double* sums) {
  Tables& tables = *tables_;
  const cudaStream_t stream = tables.context.stream;
  const NormTables& norms = tables.norms_of(tensors, stream);
  tables.set_gradients(tensors, stream);
  tables.sum_squares(norms, nullptr, HUGE_VAL, false, stream);
  launch(ListSums{norms.offsets.get(), norms.sums.get(), norms.count(), sums}, norms.count() > 0 ? 1 : 0, stream);
}

void Launch::catch_up(const StepArgs& step, const TensorArgs& tensor, int64_t call) {
  const cudaStream_t stream = tables_->context.stream;
  tables_->begin(step, call, stream);
  step_rows(step, tensor, nullptr, tables_->state(), stream);
}

}  // namespace fastadam::cuda
