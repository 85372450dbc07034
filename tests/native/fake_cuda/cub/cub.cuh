// SPDX-License-Identifier: Apache-2.0
// The CUB algorithms that csrc/cuda calls, each as one piece of queued work. Before an input is read, garbage is written
// to the temporary memory and to outputs that must not overlap inputs.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <type_traits>
#include <vector>

namespace cub {

struct DeviceRadixSort {
  // A stable sort that compares bits [begin_bit, end_bit) of the keys.
  template <class Key, class Value, class Count>
  static cudaError_t SortPairs(void* temp, size_t& temp_bytes, const Key* keys_in, Key* keys_out,
                               const Value* values_in, Value* values_out, Count num_items, int begin_bit = 0,
                               int end_bit = sizeof(Key) * 8, cudaStream_t stream = nullptr) {
    const auto count = static_cast<size_t>(num_items);
    const size_t needed = count * (sizeof(Key) + sizeof(Value)) + 1;
    if (temp == nullptr) {
      temp_bytes = needed;
      return cudaSuccess;
    }
    constexpr int kBits = sizeof(Key) * 8;
    if (temp_bytes < needed || begin_bit < 0 || end_bit > kBits || begin_bit > end_bit) return cudaErrorInvalidValue;
    if (count == 0) return cudaSuccess;
    return fake_cuda::submit("cub::DeviceRadixSort::SortPairs", stream, static_cast<int64_t>(num_items), [=] {
      std::memset(temp, 0xcd, needed);
      std::memset(static_cast<void*>(keys_out), 0xcd, count * sizeof(Key));
      std::memset(static_cast<void*>(values_out), 0xcd, count * sizeof(Value));
      const auto bits = [=](size_t i) {
        const uint64_t sign = std::is_signed_v<Key> ? uint64_t{1} << (kBits - 1) : 0;
        const uint64_t below = end_bit == 64 ? ~uint64_t{0} : (uint64_t{1} << end_bit) - 1;
        return begin_bit == end_bit ? 0 : ((static_cast<uint64_t>(keys_in[i]) ^ sign) & below) >> begin_bit;
      };
      std::vector<size_t> order(count);
      std::iota(order.begin(), order.end(), size_t{0});
      std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return bits(a) < bits(b); });
      for (size_t i = 0; i < count; ++i) {
        keys_out[i] = keys_in[order[i]];
        values_out[i] = values_in[order[i]];
      }
    });
  }
};

struct DeviceScan {
  // Sums in the type of a sum of two inputs, even if Out is narrower. `out` may be `in`.
  template <class In, class Out, class Count>
  static cudaError_t InclusiveSum(void* temp, size_t& temp_bytes, const In* in, Out* out, Count num_items,
                                  cudaStream_t stream = nullptr) {
    const auto count = static_cast<size_t>(num_items);
    const size_t needed = count / 256 * sizeof(In) + 1;
    if (temp == nullptr) {
      temp_bytes = needed;
      return cudaSuccess;
    }
    if (temp_bytes < needed) return cudaErrorInvalidValue;
    if (count == 0) return cudaSuccess;
    return fake_cuda::submit("cub::DeviceScan::InclusiveSum", stream, static_cast<int64_t>(num_items), [=] {
      std::memset(temp, 0xcd, needed);
      decltype(In() + In()) sum{};
      for (size_t i = 0; i < count; ++i) {
        sum += in[i];
        out[i] = static_cast<Out>(sum);
      }
    });
  }
};

}  // namespace cub
