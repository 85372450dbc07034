// SPDX-License-Identifier: Apache-2.0
// Launches a step: its numbers, norms and clip factors, then dense gradients with one launch per dtype, then rows.
#include <array>
#include <cmath>

#include "chunks.h"
#include "context.h"
#include "launch.h"

namespace fastadam::cuda {
namespace {

using ChunksByDType = std::array<DeviceArray<Chunk>, kDTypeCount>;

// How the launches of a step are cut, which depends on which gradients are IndexedSlices.
struct Layout {
  struct Round {
    ChunksByDType dense;
    std::vector<int64_t> slices;
  };
  std::vector<bool> are_slices;
  std::vector<Round> rounds;
  ChunksByDType averages;

  Layout(std::vector<bool> flags, const std::vector<TensorArgs>& tensors,
         const std::vector<std::vector<int64_t>>& order, cudaStream_t stream)
      : are_slices(std::move(flags)) {
    std::vector<int64_t> with_average;
    for (const std::vector<int64_t>& positions : order) {
      rounds.emplace_back();
      std::vector<int64_t> dense;
      for (int64_t t : positions) {
        const TensorArgs& tensor = tensors[static_cast<size_t>(t)];
        (tensor.rows == nullptr ? dense : rounds.back().slices).push_back(t);
        if (&positions == &order.front() && tensor.average != nullptr) with_average.push_back(t);
      }
      cut(rounds.back().dense, tensors, dense, stream);
    }
    cut(averages, tensors, with_average, stream);
  }

  static void cut(ChunksByDType& chunks, const std::vector<TensorArgs>& tensors, const std::vector<int64_t>& positions,
                  cudaStream_t stream) {
    for (size_t i = 0; i < kDTypeCount; ++i) {
      chunks[i] = DeviceArray<Chunk>(chunks_of(tensors, positions, static_cast<DType>(i)), stream);
    }
  }
};

std::vector<bool> slices_among(const std::vector<TensorArgs>& tensors) {
  std::vector<bool> are_slices;
  for (const TensorArgs& tensor : tensors) are_slices.push_back(tensor.rows != nullptr);
  return are_slices;
}

// The memory for norms of gradients of certain sizes.
struct NormTables {
  std::vector<int64_t> host_offsets;
  DeviceArray<int64_t> offsets;
  DeviceArray<double> sums, squares;
  DeviceArray<Factor> factors;
  DeviceArray<double> rescaled;  // sums, if a gradient is float64

  void fit(const std::vector<TensorArgs>& tensors, bool has_f64, cudaStream_t stream) {
    std::vector<int64_t> new_offsets = norm_offsets(tensors);
    if (new_offsets == host_offsets) return;
    const auto count = static_cast<int64_t>(tensors.size());
    room_for(offsets, count + 1);
    room_for(sums, new_offsets.back());
    room_for(factors, count);
    room_for(squares, count);
    if (has_f64) room_for(rescaled, new_offsets.back());
    offsets.write(new_offsets.data(), count + 1, stream);
    host_offsets = std::move(new_offsets);
  }

  int64_t count() const { return static_cast<int64_t>(host_offsets.size()) - 1; }
};

bool same(const Gradient& a, const Gradient& b) {
  return a.data == b.data && a.factor == b.factor && a.size == b.size && a.dtype == b.dtype;
}

}  // namespace

struct Launch::Tables {
  std::vector<std::vector<int64_t>> rounds;
  bool has_f32 = false;  // some variable has arithmetic in float32
  bool has_f64 = false;
  DeviceArray<TensorArgs> tensors;
  DeviceArray<Gradient> gradients;
  std::unique_ptr<Layout> layout;
  std::unique_ptr<NormTables> norms = std::make_unique<NormTables>();
  std::vector<Gradient> last_gradients;  // what `gradients` contains
  std::shared_ptr<Context> owner;
  Context::Parts& context;

  Tables(std::shared_ptr<Context> shared, std::vector<TensorArgs> args, const Chains& chains)
      : rounds(rounds_of(chains)),
        gradients(static_cast<int64_t>(args.size())),
        owner(std::move(shared)),
        context(owner->parts()) {
    for (TensorArgs& tensor : args) {
      (tensor.dtype == FASTADAM_FLOAT64 ? has_f64 : has_f32) = true;
      tensor.rows = nullptr;  // rows and stale point to host memory and change from step to step
      tensor.stale = nullptr;
    }
    tensors = DeviceArray<TensorArgs>(args, context.stream);
  }

  StepState* state() const { return context.state.get(); }
  Report* report() const { return context.report.on_device(); }

  const Layout& layout_of(const std::vector<TensorArgs>& args, cudaStream_t stream) {
    std::vector<bool> are_slices = slices_among(args);
    if (layout != nullptr && layout->are_slices == are_slices) return *layout;
    refuse_in_capture();
    context.retire(std::move(layout));
    layout = std::make_unique<Layout>(std::move(are_slices), args, rounds, stream);
    return *layout;
  }

  const NormTables& norms_of(const std::vector<TensorArgs>& args, cudaStream_t stream) {
    if (norms->host_offsets == norm_offsets(args)) return *norms;
    refuse_in_capture();
    if (context.is_captured) {  // a graph reads the tables again in every replay
      context.retire(std::move(norms));
      norms = std::make_unique<NormTables>();
    }
    norms->fit(args, has_f64, stream);
    return *norms;
  }

  // A capture cannot allocate the memory that a new kind of step needs.
  void refuse_in_capture() const {
    if (!context.is_capturing) return;
    throw std::runtime_error("no step with gradients of these kinds was made before the capture; make one first");
  }

  bool needs_f32(const AdamHyper& hyper) const { return has_f32 && !hyper.epsilon_corrected; }
  bool needs_f64(const AdamHyper& hyper) const { return has_f64 || hyper.epsilon_corrected; }

  bool can_count(const AdamHyper& hyper) const {
    if (!context.has_powers) context.make_powers(hyper);
    return context.has_powers_for(hyper, needs_f32(hyper), needs_f64(hyper));
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
    context.require_powers(hyper, needs_f32(hyper), needs_f64(hyper));
    launch(AdvanceStep{state(), report(), call, hyper, numbers, context.is_capturing, context.powers_f32.get(),
                       context.powers_f64.get(), has_f32, has_f64},
           1, stream);
    context.is_captured = context.is_captured || context.is_capturing;
  }

  // Begins work other than a step, which does not count in t.
  void begin(const StepArgs& step, int64_t call, cudaStream_t stream) {
    launch(BeginStep{state(), report(), kSameStep, call, step.scalars_f32, step.scalars_f64, {}, HUGE_VAL, 1}, 1,
           stream);
  }

  void set_gradients(const std::vector<TensorArgs>& args, cudaStream_t stream) {
    std::vector<Gradient> current;
    for (const TensorArgs& tensor : args) current.push_back(gradient_of(tensor));
    const bool unchanged =
        std::equal(current.begin(), current.end(), last_gradients.begin(), last_gradients.end(), same);
    // A graph sets its own whenever it is replayed, which the host does not see.
    if (unchanged && !context.is_captured && !context.is_capturing) return;
    last_gradients.clear();
    for (size_t first = 0; first < current.size(); first += SetGradients::kCount) {
      SetGradients set{};
      set.table = gradients.get() + first;
      set.count = fill_gradients(set.gradients, current, first);
      launch(set, 1, stream);
    }
    last_gradients = std::move(current);
  }

  // `clip_state`: null, or the state whose value clip is used because the grad_scale is on the device.
  void sum_squares(const NormTables& norms_now, const StepState* clip_state, double clip_value, bool require_finite,
                   cudaStream_t stream) {
    sum_blocks(norms_now, clip_state, clip_value, require_finite, norms_now.sums.get(), nullptr, stream);
  }

  void sum_blocks(const NormTables& norms_now, const StepState* clip_state, double clip_value, bool require_finite,
                  double* sums, const double* first_sums, cudaStream_t stream) {
    launch(SumSquares{gradients.get(), norms_now.offsets.get(), norms_now.count(), clip_state, clip_value,
                      require_finite, sums, first_sums},
           norm_grid(norms_now.host_offsets), stream);
    launch(SumBlocks{norms_now.offsets.get(), sums, most_blocks(norms_now.host_offsets)}, norms_now.count(), stream);
  }

  // `factors`: what clip() returned, or null.
  bool all_finite(const NormTables& norms_now, bool is_step, const Factor* factors, cudaStream_t stream) {
    launch(CheckFinite{state(), report(), norms_now.offsets.get(), norms_now.sums.get(), norms_now.count(), is_step,
                       factors, norms_now.squares.get()},
           1, stream);
    check(cudaStreamSynchronize(stream));
    return context.report.get()->not_finite == 0;
  }

  // Returns the factors of norm clipping, or null if norms are not clipped. Only float64 gradients may need a second
  // pass.
  const Factor* clip(const NormTables& norms_now, const StepState* clip_state, const AdamHyper& hyper,
                     cudaStream_t stream) {
    if (!std::isfinite(hyper.clip_norm) && !std::isfinite(hyper.global_clip_norm)) return nullptr;
    double* rescaled = has_f64 ? norms_now.rescaled.get() : nullptr;
    if (has_f64) {
      sum_blocks(norms_now, clip_state, raw_clip_value(hyper), false, rescaled, norms_now.sums.get(), stream);
    }
    launch(ClipFactors{state(), gradients.get(), norms_now.offsets.get(), norms_now.sums.get(), norms_now.count(),
                       hyper.clip_norm, hyper.global_clip_norm, hyper.gradient_scale, norms_now.factors.get(),
                       norms_now.squares.get(), rescaled},
           1, stream);
    return norms_now.factors.get();
  }

  template <class Storage>
  void update(const StepArgs& step, const DeviceArray<Chunk>& chunks, const Factor* factors, cudaStream_t stream) {
    with_options(step.amsgrad, step.transform, [&](auto amsgrad, auto transform) {
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

bool Launch::step(const StepArgs& args, const std::vector<TensorArgs>& tensors, const AdamHyper& hyper,
                  const DeviceNumbers& numbers, int64_t call) {
  Tables& tables = *tables_;
  StepArgs step = args;
  if (numbers.grad_scale != nullptr && step.transform == kAsItIs) step.transform = kClipAndFactor;
  const cudaStream_t stream = tables.context.stream;
  const Layout& layout = tables.layout_of(tensors, stream);
  const bool needs_norms =
      std::isfinite(hyper.clip_norm) || std::isfinite(hyper.global_clip_norm) || hyper.require_finite;
  if (needs_norms) tables.norms_of(tensors, stream);
  tables.begin(step, hyper, numbers, call, stream);
  tables.set_gradients(tensors, stream);
  const Factor* factors = nullptr;
  if (needs_norms) {
    const NormTables& norms = *tables.norms;
    const StepState* clip_state = numbers.grad_scale == nullptr ? nullptr : tables.state();
    tables.sum_squares(norms, clip_state, raw_clip_value(hyper), hyper.require_finite, stream);
    factors = tables.clip(norms, clip_state, hyper, stream);
    if (hyper.require_finite && !tables.all_finite(norms, true, factors, stream)) return false;
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
  if (require_finite) tables.sum_squares(*tables.norms, nullptr, HUGE_VAL, true, stream);
  if (require_finite && !tables.all_finite(*tables.norms, false, nullptr, stream)) return false;
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
