// SPDX-License-Identifier: Apache-2.0
// For .ci/avx512, which includes it before all other code with -include. Bochs 2.7 rounds a tie in vcvtps2ph, a float
// halfway between two neighbours in float16, away from zero where it has to round to the even neighbour: -0x1.02ap0
// (0xbf815000) becomes 0xbc0b, not 0xbc0a. Here such a tie moves one unit of float towards zero first. What the
// instruction has to return stays the same, and so does what it gets in all other cases.
#pragma once

#if defined(__AVX512F__)
#include <immintrin.h>

template <int kRounding>
inline __attribute__((always_inline)) __m256i cvtps_ph_without_ties(__mmask16 mask, __m512 values) {
  const __mmask16 all = 0xffff;
  const __m256i below = _mm512_maskz_cvtps_ph(all, values, _MM_FROUND_TO_ZERO);
  const __m256i above = _mm256_add_epi16(below, _mm256_set1_epi16(1));
  const __m512 sum = _mm512_add_ps(_mm512_maskz_cvtph_ps(all, below), _mm512_maskz_cvtph_ps(all, above));
  const __mmask16 is_even = _mm256_testn_epi16_mask(below, _mm256_set1_epi16(1));
  const __mmask16 is_tie =
      _mm512_mask_cmp_ps_mask(is_even, _mm512_mul_ps(sum, _mm512_set1_ps(0.5f)), values, _CMP_EQ_OQ);
  const __m512i bits = _mm512_castps_si512(values);
  const __m512i moved = _mm512_mask_sub_epi32(bits, is_tie, bits, _mm512_set1_epi32(1));
  return _mm512_maskz_cvtps_ph(mask, _mm512_castsi512_ps(moved), kRounding);
}

#undef _mm512_maskz_cvtps_ph  // a macro in builds without optimisation
#define _mm512_maskz_cvtps_ph(mask, values, rounding) cvtps_ph_without_ties<rounding>(mask, values)
#endif
