// SPDX-License-Identifier: Apache-2.0
// Converts float32 moments to and from the formats of ../core/small_state.h.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>

#include "../core/float_mode.h"
#include "../core/small_state.h"
#include "gil.h"

namespace fastadam::bind {

namespace py = pybind11;

template <class T>
using Flat = py::array_t<T, py::array::c_style>;

inline void require_sizes(int64_t size, int64_t other, int64_t blocks) {
  if (other == size && blocks == code_blocks(size)) return;
  throw py::value_error("a moment: expected arrays of the same size, and a scale for each 128 elements");
}

// The words of the kCodeBlock elements of a moment from `begin`.
inline void random_words(uint64_t key, int64_t begin, uint32_t* words) {
  const uint64_t own = block_key(key, kOfMoments, begin);
  for (int64_t i = 0; i < kCodeBlock; ++i) {
    words[i] = i < kRandomLanes ? first_word(own, begin, static_cast<uint32_t>(i)) : next_word(words[i - kRandomLanes]);
  }
}

template <bool kIsM>
void encode_block(const float* values, int64_t size, const uint32_t* words, uint8_t* codes, uint8_t* scale) {
  uint32_t top = 0;
  for (int64_t i = 0; i < size; ++i) top = std::max(top, magnitude_bits(values[i] + 0.0f));  // flushes denormals
  *scale = scale_of<kIsM>(top);
  const float inverse = inverse_scale(*scale);
  for (int64_t i = 0; i < size; ++i) {
    const uint32_t code = *scale == kNoScale ? 0 : encoded<kIsM>(values[i], inverse, words[i] >> 12);
    codes[i] = static_cast<uint8_t>(code);
  }
}

// Rounds as step `step` of a parameter would.
inline void encode_moment(const Flat<float>& values, Flat<uint8_t>& codes, Flat<uint8_t>& scales, bool is_m,
                          uint64_t seed, int64_t step, uint64_t number) {
  const int64_t size = values.size();
  require_sizes(size, codes.size(), scales.size());
  const float* from = values.data();
  uint8_t* to = codes.mutable_data();
  uint8_t* scale = scales.mutable_data();
  const ReleasedGil unlocked;
  const FlushDenormals flush;
  const uint64_t key = random_key(seed, step, number);
  for (int64_t at = 0; at < size; at += kCodeBlock, ++scale) {
    uint32_t words[kCodeBlock];
    random_words(key, at, words);
    const auto encode = is_m ? encode_block<true> : encode_block<false>;
    encode(from + at, std::min(kCodeBlock, size - at), words, to + at, scale);
  }
}

inline void decode_moment(const Flat<uint8_t>& codes, const Flat<uint8_t>& scales, Flat<float>& values, bool is_m) {
  const int64_t size = codes.size();
  require_sizes(size, values.size(), scales.size());
  const uint8_t* from = codes.data();
  const uint8_t* scale = scales.data();
  float* to = values.mutable_data();
  const ReleasedGil unlocked;
  const FlushDenormals flush;
  for (int64_t i = 0; i < size; ++i) {
    const float of_block = scale_value(scale[i / kCodeBlock]);
    to[i] = is_m ? decoded<true>(from[i], of_block) : decoded<false>(from[i], of_block);
  }
}

// Rounds to bfloat16, as step `step` of a parameter would. `bits`: those of the bfloat16s.
inline void round_moment(const Flat<float>& values, Flat<uint16_t>& bits, uint64_t seed, int64_t step,
                         uint64_t number) {
  const int64_t size = values.size();
  require_sizes(size, bits.size(), code_blocks(size));
  const float* from = values.data();
  uint16_t* to = bits.mutable_data();
  const ReleasedGil unlocked;
  const FlushDenormals flush;
  const uint64_t key = random_key(seed, step, number);
  for (int64_t at = 0; at < size; at += kCodeBlock) {
    uint32_t words[kCodeBlock];
    random_words(key, at, words);
    for (int64_t i = at; i < std::min(at + kCodeBlock, size); ++i) {
      to[i] = store<BFloat16>(rounded_at_random(from[i] + 0.0f, words[i - at] >> 16)).bits;
    }
  }
}

inline void register_small_moments(py::module_& m) {
  m.attr("code_block") = kCodeBlock;
  m.def("encode_moment", &encode_moment, py::arg("values").noconvert(), py::arg("codes").noconvert(),
        py::arg("scales").noconvert(), py::arg("is_m"), py::arg("seed"), py::arg("step"), py::arg("number"));
  m.def("decode_moment", &decode_moment, py::arg("codes").noconvert(), py::arg("scales").noconvert(),
        py::arg("values").noconvert(), py::arg("is_m"));
  m.def("round_moment", &round_moment, py::arg("values").noconvert(), py::arg("bits").noconvert(), py::arg("seed"),
        py::arg("step"), py::arg("number"));
}

}  // namespace fastadam::bind
