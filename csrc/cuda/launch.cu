// SPDX-License-Identifier: Apache-2.0
// Launches the bodies of bodies.h over tables on the device.
#include <cuda_runtime.h>

#include <array>
#include <cmath>
#include <stdexcept>

#include "bodies.h"
#include "chunks.h"
#include "launch.h"

namespace fastadam::cuda {
namespace {

void check(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(status));
}

template <class Body>
__global__ void __launch_bounds__(Body::kThreads) run(const __grid_constant__ Body body) {
  __shared__ typename Body::Shared shared;
  const int phases = body.phases();
  for (int phase = 0; phase < phases; ++phase) {
    if (phase > 0) __syncthreads();
    body.phase(phase, static_cast<int64_t>(blockIdx.x), static_cast<int64_t>(threadIdx.x), shared);
  }
}

template <class Body>
void launch(const Body& body, int64_t blocks, cudaStream_t stream) {
  static_assert(sizeof(Body) <= 4096, "kernel arguments are at most 4 KiB");
  if (blocks == 0) return;
  run<Body><<<static_cast<unsigned>(blocks), Body::kThreads, 0, stream>>>(body);
  check(cudaGetLastError());
}

// An array on the device, freed in the order of its stream.
template <class T>
class DeviceArray {
 public:
  DeviceArray(size_t count, cudaStream_t stream) : stream_(stream) {
    if (count > 0) check(cudaMallocAsync(reinterpret_cast<void**>(&data_), count * sizeof(T), stream));
  }
  DeviceArray(const std::vector<T>& values, cudaStream_t stream) : DeviceArray(values.size(), stream) {
    if (values.empty()) return;
    check(cudaMemcpyAsync(data_, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice, stream));
  }
  ~DeviceArray() { static_cast<void>(cudaFreeAsync(data_, stream_)); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;

  T* get() const { return data_; }

 private:
  T* data_ = nullptr;
  cudaStream_t stream_;
};

bool same(const Gradient& a, const Gradient& b) {
  return a.data == b.data && a.factor == b.factor && a.dtype == b.dtype;
}

}  // namespace

int device_count(std::string& reason) {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaSuccess) {
    reason = count > 0 ? "" : "no CUDA device";
    return count;
  }
  static_cast<void>(cudaGetLastError());  // not to be found by the next launch
  reason = cudaGetErrorString(status);
  return 0;
}

struct Launch::Tables {
  std::array<std::vector<Chunk>, kDTypeCount> host_chunks;
  std::vector<int64_t> host_offsets;
  int gradient_count;
  DeviceArray<TensorArgs> tensors;
  DeviceArray<Gradient> gradients;
  DeviceArray<int64_t> block_offsets;
  DeviceArray<double> sums, factors, squares;
  std::array<std::unique_ptr<DeviceArray<Chunk>>, kDTypeCount> chunks;
  std::vector<Gradient> stored;  // what `gradients` holds

  Tables(const std::vector<TensorArgs>& given, const Chains& chains, cudaStream_t stream)
      : host_offsets(norm_offsets(given)),
        gradient_count(most_gradients(chains)),
        tensors(given, stream),
        gradients(given.size(), stream),
        block_offsets(host_offsets, stream),
        sums(static_cast<size_t>(host_offsets.back()) + 1, stream),
        factors(given.size(), stream),
        squares(given.size(), stream) {
    for (size_t i = 0; i < kDTypeCount; ++i) {
      host_chunks[i] = chunks_of(chains, static_cast<DType>(i));
      chunks[i] = std::make_unique<DeviceArray<Chunk>>(host_chunks[i], stream);
    }
    check(cudaStreamSynchronize(stream));  // the host tables may go
  }

  int64_t count() const { return static_cast<int64_t>(host_offsets.size()) - 1; }

  void set_gradients(const std::vector<TensorArgs>& given, cudaStream_t stream) {
    std::vector<Gradient> wanted;
    for (const TensorArgs& tensor : given) wanted.push_back({tensor.grad, tensor.grad_factor, tensor.grad_dtype});
    if (std::equal(wanted.begin(), wanted.end(), stored.begin(), stored.end(), same)) return;
    stored.clear();
    for (size_t first = 0; first < given.size(); first += SetGradients::kCount) {
      SetGradients set{};
      set.table = gradients.get() + first;
      set.count = fill_gradients(set.gradients, given, first);
      launch(set, 1, stream);
    }
    stored = std::move(wanted);
  }

  void sum_squares(const ClipArgs& clip, cudaStream_t stream) {
    launch(SumSquares{tensors.get(), gradients.get(), block_offsets.get(), count(), clip.raw_clip_value,
                      clip.require_finite, sums.get()},
           norm_grid(host_offsets), stream);
    launch(SumBlocks{block_offsets.get(), sums.get(), most_blocks(host_offsets)}, count(), stream);
  }

  // Waits for the device: whoever asks has to know.
  bool all_finite(cudaStream_t stream) {
    std::vector<double> found(static_cast<size_t>(host_offsets.back()));
    const size_t size = found.size() * sizeof(double);
    if (size > 0) check(cudaMemcpyAsync(found.data(), sums.get(), size, cudaMemcpyDeviceToHost, stream));
    check(cudaStreamSynchronize(stream));
    for (size_t t = 0; t + 1 < host_offsets.size(); ++t) {
      if (host_offsets[t] < host_offsets[t + 1] && std::isnan(found[static_cast<size_t>(host_offsets[t])]))
        return false;
    }
    return true;
  }

  template <class Storage>
  void update(const StepArgs& step, const double* clip_factors, cudaStream_t stream) {
    constexpr auto kIndex = static_cast<size_t>(dtype_of_storage<Storage>());
    const auto blocks = static_cast<int64_t>(host_chunks[kIndex].size());
    choose(step.amsgrad, step.transform, [&](auto amsgrad, auto transforms) {
      using Body = DenseStep<Storage, amsgrad.value, transforms.value>;
      launch(Body{tensors.get(), gradients.get(), clip_factors, chunks[kIndex]->get(),
                  scalars_for<typename Body::Scalars>(step), step.ema_overwrite, gradient_count},
             blocks, stream);
    });
  }

  template <class Storage>
  static constexpr DType dtype_of_storage() {
    if (std::is_same_v<Storage, Float16>) return DType::kFloat16;
    if (std::is_same_v<Storage, BFloat16>) return DType::kBFloat16;
    return std::is_same_v<Storage, float> ? DType::kFloat32 : DType::kFloat64;
  }

  template <class Scalars>
  static const Scalars& scalars_for(const StepArgs& step) {
    if constexpr (std::is_same_v<Scalars, StepScalars<double>>) {
      return step.scalars_f64;
    } else {
      return step.scalars_f32;
    }
  }
};

Launch::Launch(const std::vector<TensorArgs>& tensors, const Chains& chains, void* stream)
    : tables_(std::make_unique<Tables>(tensors, chains, static_cast<cudaStream_t>(stream))) {}

Launch::~Launch() = default;

bool Launch::step(const StepArgs& step, const std::vector<TensorArgs>& tensors, const ClipArgs& clip, void* on_stream) {
  const auto stream = static_cast<cudaStream_t>(on_stream);
  Tables& tables = *tables_;
  tables.set_gradients(tensors, stream);
  const bool clips = std::isfinite(clip.clip_norm) || std::isfinite(clip.global_clip_norm);
  if (clips || clip.require_finite) tables.sum_squares(clip, stream);
  if (clip.require_finite && !tables.all_finite(stream)) return false;
  const double* factors = nullptr;
  if (clips) {
    factors = tables.factors.get();
    launch(ClipFactors{tables.gradients.get(), tables.block_offsets.get(), tables.sums.get(), tables.count(),
                       clip.clip_norm, clip.global_clip_norm, clip.gradient_scale, tables.factors.get(),
                       tables.squares.get()},
           1, stream);
  }
  tables.update<Float16>(step, factors, stream);
  tables.update<BFloat16>(step, factors, stream);
  tables.update<float>(step, factors, stream);
  tables.update<double>(step, factors, stream);
  return true;
}

}  // namespace fastadam::cuda
