// SPDX-License-Identifier: Apache-2.0
// What the threads of each launch do, as host-device functions: a test runs them on the CPU, block by block and phase
// by phase, and compares bits with the CPU kernels. kernels.cu only launches them. Include nothing but core headers. A
// body has kThreads, a Shared memory of the block, and phase(phase, block, thread, shared) for `phases()` phases; all
// threads of a block end one before any begins the next.
#pragma once

#include "../core/adam_math.h"
#include "../core/norm.h"
#include "../core/split.h"
#include "../core/step_args.h"

namespace fastadam::cuda {

// A block of threads updates one chunk. Their table is made once for a set of buffers.
struct Chunk {
  int64_t tensor;  // the first of its chain
  int64_t begin;
};
constexpr int64_t kChunkElements = 16384;

// What changes from step to step, of one tensor.
struct Gradient {
  const void* data;
  double factor;  // multiplies it after the value clip
  DType dtype;
};

struct NoShared {};

// N elements side by side, read and written 16 bytes at a time.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount < 16 ? sizeof(T) * kCount : 16) Pack {
  T of[kCount];
};

template <int kCount, class T>
FASTADAM_INLINE Pack<T, kCount>& pack_at(T* values, int64_t at) {
  return *reinterpret_cast<Pack<T, kCount>*>(values + at);
}

template <int kCount, class T>
FASTADAM_INLINE const Pack<T, kCount>& pack_at(const T* values, int64_t at) {
  return *reinterpret_cast<const Pack<T, kCount>*>(values + at);
}

FASTADAM_INLINE bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Stores gradients in the table of a plan: kernel arguments are no more than 4 KiB.
struct SetGradients {
  static constexpr int kThreads = 128;
  static constexpr int kCount = 128;
  using Shared = NoShared;
  Gradient gradients[kCount];
  Gradient* table;  // of this and the following tensors
  int64_t count;

  FASTADAM_INLINE int phases() const { return 1; }
  FASTADAM_INLINE void phase(int, int64_t, int64_t thread, Shared&) const {
    if (thread < count) table[thread] = gradients[thread];
  }
};

// One step of the variables of one dtype: their chunks, a block each. A phase for each gradient of a variable, and one
// for the averages: elements go to other threads where an address is not aligned.
template <class Storage, bool kAmsgrad, bool kTransform>
struct DenseStep {
  static constexpr int kThreads = 256;
  using Shared = NoShared;
  using T = Compute<Storage>;
  using Scalars = StepScalars<T>;
  const TensorArgs* tensors;
  const Gradient* gradients;
  const double* factors;  // of norm clips, one for each tensor, or null
  const Chunk* chunks;
  Scalars scalars;
  bool ema_overwrite;
  int most_gradients;  // of a variable

  FASTADAM_INLINE int phases() const { return most_gradients + 1; }

  FASTADAM_INLINE void phase(int phase, int64_t block, int64_t thread, Shared&) const {
    const Chunk chunk = chunks[block];
    const int64_t size = tensors[chunk.tensor].size;
    const int64_t end = size - chunk.begin < kChunkElements ? size : chunk.begin + kChunkElements;
    if (phase == most_gradients) {
      if (tensors[chunk.tensor].average != nullptr) average(tensors[chunk.tensor], chunk.begin, end, thread);
      return;
    }
    int64_t t = chunk.tensor;
    for (int i = 0; i < phase && t >= 0; ++i) t = tensors[t].next;
    if (t < 0) return;
    if (gradients[t].dtype == tensors[t].dtype) {
      update<Storage>(t, chunk.begin, end, thread);
    } else {
      update<T>(t, chunk.begin, end, thread);
    }
  }

 private:
  static constexpr int kPack = 16 / sizeof(Storage);

  template <class Grad>
  FASTADAM_INLINE void update(int64_t t, int64_t begin, int64_t end, int64_t thread) const {
    const TensorArgs& tensor = tensors[t];
    const void* grad = gradients[t].data;
    const bool vhat_aligned = !kAmsgrad || is_aligned(tensor.vhat);
    int64_t at = begin;
    if (is_aligned(tensor.var) && is_aligned(grad) && is_aligned(tensor.m) && is_aligned(tensor.v) && vhat_aligned) {
      const int64_t packs = (end - begin) / kPack;
      for (int64_t i = thread; i < packs; i += kThreads) update_pack<Grad, kPack>(t, begin + i * kPack);
      at = begin + packs * kPack;
    }
    for (int64_t i = at + thread; i < end; i += kThreads) update_pack<Grad, 1>(t, i);
  }

  template <class Grad, int kCount>
  FASTADAM_INLINE void update_pack(int64_t t, int64_t at) const {
    const TensorArgs& tensor = tensors[t];
    auto& vars = pack_at<kCount>(static_cast<Storage*>(tensor.var), at);
    auto& ms = pack_at<kCount>(static_cast<T*>(tensor.m), at);
    auto& vs = pack_at<kCount>(static_cast<T*>(tensor.v), at);
    auto& vhats = pack_at<kCount>(static_cast<T*>(kAmsgrad ? tensor.vhat : tensor.v), at);
    const auto grad = pack_at<kCount>(static_cast<const Grad*>(gradients[t].data), at);
    auto var = vars;
    auto m = ms;
    auto v = vs;
    auto vhat = vhats;
    const T keep = tensor.decays ? scalars.keep : T(1);
    const T factor = kTransform ? factor_of(t) : T(1);
    for (int i = 0; i < kCount; ++i) {
      T g = load(grad.of[i]);
      if constexpr (kTransform) g = transform_gradient(g, scalars.clip_value, factor);
      T value = load(var.of[i]);
      adam_update<kAmsgrad>(value, g, m.of[i], v.of[i], vhat.of[i], keep, scalars);
      var.of[i] = store<Storage>(value);
    }
    vars = var;
    ms = m;
    vs = v;
    if constexpr (kAmsgrad) vhats = vhat;
  }

  FASTADAM_INLINE T factor_of(int64_t t) const {
    return static_cast<T>(factors == nullptr ? gradients[t].factor : factors[t]);
  }

  FASTADAM_INLINE void average(const TensorArgs& tensor, int64_t begin, int64_t end, int64_t thread) const {
    auto* var = static_cast<Storage*>(tensor.var);
    T* averages = static_cast<T*>(tensor.average);
    for (int64_t i = begin + thread; i < end; i += kThreads) {
      averages[i] = moving_average(averages[i], T(load(var[i])), scalars.ema_momentum);
      if (ema_overwrite) var[i] = store<Storage>(averages[i]);
    }
  }
};

// Sums of squares of blocks of gradients (core/norm.h): a warp for each, a thread for each of its lanes.
struct SumSquares {
  static constexpr int kWarps = 8;
  static constexpr int kThreads = kWarps * static_cast<int>(kNormLanes);
  struct Shared {
    double lanes[kWarps][kNormLanes];
  };
  const TensorArgs* tensors;
  const Gradient* gradients;
  const int64_t* block_offsets;  // as in NormArgs
  int64_t tensor_count;
  double clip_value;
  bool require_finite;
  double* sums;

  FASTADAM_INLINE int phases() const { return 2; }

  FASTADAM_INLINE void phase(int phase, int64_t block, int64_t thread, Shared& shared) const {
    const int64_t warp = thread / kNormLanes;
    const int64_t lane = thread % kNormLanes;
    const int64_t i = block * kWarps + warp;
    if (i >= block_offsets[tensor_count]) return;
    if (phase == 0) {
      shared.lanes[warp][lane] = sum_lane(i, lane);
    } else if (lane == 0) {
      sums[i] = pairwise_sum(shared.lanes[warp], kNormLanes);
    }
  }

 private:
  FASTADAM_INLINE double sum_lane(int64_t i, int64_t lane) const {
    const int64_t t = find_variable(block_offsets, tensor_count, i);
    const int64_t begin = (i - block_offsets[t]) * kNormBlock;
    const int64_t rest = tensors[t].size - begin;
    const int64_t size = rest < kNormBlock ? rest : kNormBlock;
    const void* grad = gradients[t].data;
    switch (gradients[t].dtype) {
      case DType::kFloat16:
        return sum<Float16>(static_cast<const Float16*>(grad) + begin, size, lane);
      case DType::kBFloat16:
        return sum<BFloat16>(static_cast<const BFloat16*>(grad) + begin, size, lane);
      case DType::kFloat32:
        return sum<float>(static_cast<const float*>(grad) + begin, size, lane);
      default:
        return sum<double>(static_cast<const double*>(grad) + begin, size, lane);
    }
  }

  template <class Storage>
  FASTADAM_INLINE double sum(const Storage* grad, int64_t size, int64_t lane) const {
    using T = Compute<Storage>;
    double total = 0;
    T not_finite = T(0);  // or NaN
    for (int64_t at = lane; at < size; at += kNormLanes) {
      const T g = load(grad[at]);
      if (require_finite) not_finite += g - g;
      const auto x = static_cast<double>(transform_gradient(g, static_cast<T>(clip_value), T(1)));
      total += x * x;
    }
    return require_finite ? total + static_cast<double>(not_finite) : total;
  }
};

// pairwise_sum of the blocks of each tensor, a block of threads for each: the same tree, its nodes left where they are.
struct SumBlocks {
  static constexpr int kThreads = 512;
  using Shared = NoShared;
  const int64_t* block_offsets;
  double* sums;         // sums[block_offsets[t]] becomes that of tensor t
  int64_t most_blocks;  // of a tensor

  FASTADAM_INLINE int phases() const {
    int levels = 0;
    for (int64_t width = 1; width < most_blocks; width *= 2) ++levels;
    return levels;
  }

  FASTADAM_INLINE void phase(int level, int64_t tensor, int64_t thread, Shared&) const {
    double* values = sums + block_offsets[tensor];
    const int64_t count = block_offsets[tensor + 1] - block_offsets[tensor];
    const int64_t step = int64_t{1} << level;
    for (int64_t i = thread * 2 * step; i + step < count; i += kThreads * 2 * step) values[i] += values[i + step];
  }
};

// The factors of norm clips, with those of the gradients in them: Norms::fold_into of csrc/bind/norms.h.
struct ClipFactors {
  static constexpr int kThreads = 256;
  using Shared = NoShared;
  const Gradient* gradients;
  const int64_t* block_offsets;
  const double* sums;
  int64_t tensor_count;
  double clip_norm;
  double global_clip_norm;
  double gradient_scale;
  double* factors;
  double* squares;  // of the clipped norms

  FASTADAM_INLINE int phases() const { return 3; }

  FASTADAM_INLINE void phase(int phase, int64_t, int64_t thread, Shared&) const {
    const bool is_global = global_clip_norm < kNone;
    if (phase == 0) {
      for (int64_t t = thread; t < tensor_count; t += kThreads) clip(t);
    } else if (phase == 1 && is_global && thread == 0) {
      squares[0] = global_factor();
    } else if (phase == 2 && is_global) {
      for (int64_t t = thread; t < tensor_count; t += kThreads) factors[t] *= squares[0];
    }
  }

 private:
  static constexpr double kNone = __builtin_huge_val();

  FASTADAM_INLINE void clip(int64_t t) const {
    const bool is_empty = block_offsets[t] == block_offsets[t + 1];
    const double norm = std::sqrt(is_empty ? 0.0 : sums[block_offsets[t]]) * gradient_scale;
    const double factor = clip_norm < kNone ? clip_factor(norm, clip_norm) : 1.0;
    factors[t] = gradients[t].factor * factor;
    squares[t] = norm * factor * norm * factor;
  }

  FASTADAM_INLINE double global_factor() const {
    double sum = 0;
    for (int64_t t = 0; t < tensor_count; ++t) sum += squares[t];
    return global_clip_factor(std::sqrt(sum), global_clip_norm);
  }
};

}  // namespace fastadam::cuda
