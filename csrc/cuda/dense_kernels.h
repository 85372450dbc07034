// SPDX-License-Identifier: Apache-2.0
// The kernels for dense gradients, as host-device functors: launch.cu launches them, and a test runs them on the CPU,
// block by block and phase by phase, and compares the bits with the CPU kernels. Include only headers of core. A kernel
// has kThreads threads per block, a struct Shared for the shared memory of a block, and a member phase(phase, block,
// thread, shared) that runs phases() times: all threads of a block finish one phase before any starts the next.
#pragma once

#include "../core/adam_math.h"
#include "../core/norm.h"
#include "../core/split.h"
#include "../core/step_args.h"
#include "step_state.h"

namespace fastadam::cuda {

// A block of threads updates one chunk of a tensor. The table of chunks is made once for a set of buffers.
struct Chunk {
  int64_t tensor;
  int64_t begin;
};
constexpr int64_t kChunkElements = 16384;

// The part of a tensor that changes from step to step.
struct Gradient {
  const void* data;
  double factor;  // multiplies the gradient after the value clip, without the factors that only the device knows
  int64_t size;   // differs from the size of the tensor for IndexedSlices
  DType dtype;
};

// The factor of a gradient without norm clipping.
FASTADAM_INLINE Factor factor_of(const Gradient& gradient, const StepState& state) {
  return make_factor(gradient.factor) * make_factor(state.unscale);
}

struct NoShared {};

// kCount consecutive elements, read and written in units of up to 16 bytes.
template <class T, size_t kCount>
struct alignas(sizeof(T) * kCount < 16 ? sizeof(T) * kCount : 16) Pack {
  T of[kCount];
};

template <size_t kCount, class T>
FASTADAM_INLINE Pack<T, kCount>& pack_at(T* values, int64_t at) {
  return *reinterpret_cast<Pack<T, kCount>*>(values + at);
}

template <size_t kCount, class T>
FASTADAM_INLINE const Pack<T, kCount>& pack_at(const T* values, int64_t at) {
  return *reinterpret_cast<const Pack<T, kCount>*>(values + at);
}

FASTADAM_INLINE bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// The end of a chunk in a tensor of this size.
FASTADAM_INLINE int64_t end_of(const Chunk& chunk, int64_t size) {
  return size - chunk.begin < kChunkElements ? size : chunk.begin + kChunkElements;
}

// Copies gradients from the kernel arguments, which are limited to 4 KiB, to the table of a plan.
struct SetGradients {
  static constexpr int kThreads = 128;
  static constexpr int kCount = 120;
  using Shared = NoShared;
  Gradient gradients[kCount];
  Gradient* table;  // points to the entry of the first of these gradients
  int64_t count;

  FASTADAM_INLINE int phases() const { return 1; }
  FASTADAM_INLINE void phase(int, int64_t, int64_t thread, Shared&) const {
    if (thread < count) table[thread] = gradients[thread];
  }
};

// One step of variables of one dtype, each with one dense gradient. Each block of threads updates one chunk.
template <class Storage, bool kAmsgrad, int kTransform>
struct DenseStep {
  static constexpr int kThreads = 256;
  using Shared = NoShared;
  using T = Compute<Storage>;
  const StepState* state;
  const TensorArgs* tensors;
  const Gradient* gradients;
  const Factor* factors;  // with norm clipping: the factor of each gradient; or null
  const Chunk* chunks;

  FASTADAM_INLINE int phases() const { return 1; }

  FASTADAM_INLINE void phase(int, int64_t block, int64_t thread, Shared&) const {
    if (state->skip) return;
    const Chunk chunk = chunks[block];
    if (gradients[chunk.tensor].dtype != tensors[chunk.tensor].dtype) {
      update<T, T>(chunk, thread);
    } else if (has_half_moments(tensors[chunk.tensor])) {
      if constexpr (sizeof(Storage) == 2) update<Storage, Storage>(chunk, thread);
    } else {
      update<Storage, T>(chunk, thread);
    }
  }

 private:
  static constexpr int kPack = 16 / sizeof(Storage);

  // Copied to registers, because the compiler cannot know that a store does not change them.
  template <class Grad, class Slot>
  struct Operands {
    Storage* var;
    const Grad* grad;
    Slot* m;
    Slot* v;
    Slot* vhat;
    T keep;
    FactorPair<T> factor;
    StepScalars<T> scalars;
  };

  template <class Grad, class Slot>
  FASTADAM_INLINE void update(const Chunk& chunk, int64_t thread) const {
    const TensorArgs& tensor = tensors[chunk.tensor];
    const Gradient& gradient = gradients[chunk.tensor];
    const StepScalars<T> s = scalars_of<T>(*state);
    const Factor factor = factors == nullptr ? factor_of(gradient, *state) : factors[chunk.tensor];
    const Operands<Grad, Slot> operands{static_cast<Storage*>(tensor.var),
                                        static_cast<const Grad*>(gradient.data),
                                        static_cast<Slot*>(tensor.m),
                                        static_cast<Slot*>(tensor.v),
                                        static_cast<Slot*>(kAmsgrad ? tensor.vhat : tensor.v),
                                        tensor.decays ? s.keep : T(1),
                                        pair_of<T>(factor),
                                        s};
    const int64_t end = end_of(chunk, tensor.size);
    int64_t at = chunk.begin;
    if (is_aligned(operands.var) && is_aligned(operands.grad) && is_aligned(operands.m) && is_aligned(operands.v) &&
        is_aligned(operands.vhat)) {
      const int64_t packs = (end - at) / kPack;
      for (int64_t i = thread; i < packs; i += kThreads) update_pack<kPack>(operands, at + i * kPack);
      at += packs * kPack;
    }
    for (int64_t i = at + thread; i < end; i += kThreads) update_pack<1>(operands, i);
  }

  template <int kCount, class Grad, class Slot>
  FASTADAM_INLINE static void update_pack(const Operands<Grad, Slot>& s, int64_t at) {
    auto var = pack_at<kCount>(s.var, at);
    const auto grad = pack_at<kCount>(s.grad, at);
    auto m = pack_at<kCount>(s.m, at);
    auto v = pack_at<kCount>(s.v, at);
    auto vhat = pack_at<kCount>(s.vhat, at);
    for (int i = 0; i < kCount; ++i) {
      T g = load(grad.of[i]);
      T value = load(var.of[i]);
      T m_i = load(m.of[i]);
      T v_i = load(v.of[i]);
      T vhat_i = load(vhat.of[i]);
      if constexpr (kTransform != kAsItIs) g = transform_gradient(g, s.scalars.clip_value, s.factor);
      if constexpr (kTransform == kAndL2) g = add_l2(g, value, s.scalars.l2);
      adam_update<kAmsgrad>(value, g, m_i, v_i, vhat_i, s.keep, s.scalars);
      var.of[i] = store<Storage>(value);
      m.of[i] = store<Slot>(m_i);
      v.of[i] = store<Slot>(v_i);
      vhat.of[i] = store<Slot>(vhat_i);
    }
    pack_at<kCount>(s.var, at) = var;
    pack_at<kCount>(s.m, at) = m;
    pack_at<kCount>(s.v, at) = v;
    if constexpr (kAmsgrad) pack_at<kCount>(s.vhat, at) = vhat;
  }
};

// Updates the moving averages of variables of one dtype, after their step.
template <class Storage>
struct AverageStep {
  static constexpr int kThreads = 256;
  using Shared = NoShared;
  using T = Compute<Storage>;
  const StepState* state;
  const TensorArgs* tensors;
  const Chunk* chunks;
  bool overwrite;  // copies the averages to the variables

  FASTADAM_INLINE int phases() const { return 1; }

  FASTADAM_INLINE void phase(int, int64_t block, int64_t thread, Shared&) const {
    if (state->skip) return;
    const Chunk chunk = chunks[block];
    const TensorArgs tensor = tensors[chunk.tensor];
    const T momentum = scalars_of<T>(*state).ema_momentum;
    auto* var = static_cast<Storage*>(tensor.var);
    T* averages = static_cast<T*>(tensor.average);
    const int64_t end = end_of(chunk, tensor.size);
    for (int64_t i = chunk.begin + thread; i < end; i += kThreads) {
      averages[i] = moving_average(averages[i], T(load(var[i])), momentum);
      if (overwrite) var[i] = store<Storage>(averages[i]);
    }
  }
};

// Adds dense gradients times their factors to the accumulators of variables of one dtype.
template <class Storage>
struct AccumulateStep {
  static constexpr int kThreads = 256;
  using Shared = NoShared;
  using T = Compute<Storage>;
  const StepState* state;
  const TensorArgs* tensors;
  const Gradient* gradients;
  const Chunk* chunks;
  bool restart;  // the accumulators count as zero

  FASTADAM_INLINE int phases() const { return 1; }

  FASTADAM_INLINE void phase(int, int64_t block, int64_t thread, Shared&) const {
    if (state->skip) return;
    const Chunk chunk = chunks[block];
    if (gradients[chunk.tensor].dtype == tensors[chunk.tensor].dtype) {
      add<Storage>(chunk, thread);
    } else {
      add<T>(chunk, thread);
    }
  }

 private:
  template <class Grad>
  FASTADAM_INLINE void add(const Chunk& chunk, int64_t thread) const {
    T* sums = static_cast<T*>(tensors[chunk.tensor].accumulator);
    const auto* grad = static_cast<const Grad*>(gradients[chunk.tensor].data);
    const FactorPair<T> factor = pair_of<T>(make_factor(gradients[chunk.tensor].factor));
    const int64_t end = end_of(chunk, tensors[chunk.tensor].size);
    for (int64_t i = chunk.begin + thread; i < end; i += kThreads) {
      sums[i] = (restart ? T(0) : sums[i]) + multiply(load(grad[i]), factor);
    }
  }
};

}  // namespace fastadam::cuda
