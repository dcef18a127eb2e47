/* What the instructions of AVX-512 take a few of: loads, stores and pairs of bf16 values, sums of lanes. lanes.h has the same for AVX2. */
#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define LANE static inline __attribute__((always_inline))
LANE __m512 widened(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
LANE __m256i halves(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }
LANE void store_halves(uint16_t *y, __mmask16 inside, __m256i x) { _mm256_mask_storeu_epi16(y, inside, x); }
/* pairs (low, high) of bf16 values in 16 lanes */
LANE __m512i pair_of(__m256i low, __m256i high) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
}
/* 32 columns of two rows, pair by pair; the second row may be missing */
LANE void pairs_of(const uint16_t *one, const uint16_t *two, __m512i pairs[2]) {
  const __m512i apart = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3,
                                         34, 2, 33, 1, 32, 0), further = _mm512_add_epi16(apart, _mm512_set1_epi16(16));
  const __m512i x = _mm512_loadu_si512(one), y = two ? _mm512_loadu_si512(two) : _mm512_setzero_si512();
  pairs[0] = _mm512_permutex2var_epi16(x, apart, y);
  pairs[1] = _mm512_permutex2var_epi16(x, further, y);
}
LANE uint32_t pair_of_two(float low, float high) {
  return _mm_cvtsi128_si32((__m128i)_mm_cvtneps_pbh(_mm_setr_ps(low, high, 0, 0)));
}
/* sum += both products of a pair of bf16 values */
LANE __m512 dot(__m512 sum, __m512i x, __m512i w) { return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)w); }
/* the sums of the lanes of four */
LANE __m128 sums_of(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd)),
                high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512 all = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}
