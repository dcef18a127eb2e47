/* The functions of 16 lanes that the rest is written in, for CPUs without AVX-512: two registers of AVX2 make one. Names and results
   are those of the instructions, of which only what is used here is given; a mask is turned into lanes where it is needed. */
#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

typedef struct { __m256 a, b; } Lanes;
typedef struct { __m256i a, b; } Wholes;
#define LANE static inline __attribute__((always_inline))
#define __m512 Lanes
#define __m512i Wholes

LANE __m256i lanes_of(unsigned mask) { /* 8 bits -> 8 lanes of ones or zeros */
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(mask), bit), bit);
}
LANE __m256 chosen(__m256 no, __m256 yes, unsigned mask) { return _mm256_blendv_ps(no, yes, (__m256)lanes_of(mask)); }
LANE float sum_of(__m256 x) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)), two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
LANE float most_of(__m256 x) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)), two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

LANE Lanes lanes_set1(float x) { return (Lanes){_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
LANE Lanes lanes_zero(void) { return lanes_set1(0); }
LANE Lanes lanes_loadu(const float *p) { return (Lanes){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
LANE void lanes_storeu(float *p, Lanes x) { _mm256_storeu_ps(p, x.a); _mm256_storeu_ps(p + 8, x.b); }
LANE float lanes_sum(Lanes x) { return sum_of(_mm256_add_ps(x.a, x.b)); }
LANE float lanes_most(Lanes x) { return most_of(_mm256_max_ps(x.a, x.b)); }
#define _mm512_set1_ps lanes_set1
#define _mm512_setzero_ps lanes_zero
#define _mm512_loadu_ps lanes_loadu
#define _mm512_storeu_ps lanes_storeu
#define _mm512_reduce_add_ps lanes_sum
#define _mm512_reduce_max_ps lanes_most
#define ONE(name, do) LANE Lanes lanes_##name(Lanes x) { return (Lanes){do(x.a), do(x.b)}; }
#define TWO(name, do) LANE Lanes lanes_##name(Lanes x, Lanes y) { return (Lanes){do(x.a, y.a), do(x.b, y.b)}; }
#define THREE(name, do) LANE Lanes lanes_##name(Lanes x, Lanes y, Lanes z) { return (Lanes){do(x.a, y.a, z.a), do(x.b, y.b, z.b)}; }
#define SIZE_OF(x) _mm256_andnot_ps(_mm256_set1_ps(-0.f), x)
#define NEAREST(x) _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
#define TIMES_2_TO(x, n) /* |n| <= 127 */ \
  _mm256_mul_ps(x, (__m256)_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23))
ONE(abs, SIZE_OF) ONE(nearest, NEAREST)
TWO(add, _mm256_add_ps) TWO(sub, _mm256_sub_ps) TWO(mul, _mm256_mul_ps) TWO(div, _mm256_div_ps) TWO(max, _mm256_max_ps)
TWO(min, _mm256_min_ps) TWO(scalef, TIMES_2_TO)
THREE(fmadd, _mm256_fmadd_ps) THREE(fnmadd, _mm256_fnmadd_ps)
#define _mm512_abs_ps lanes_abs
#define _mm512_roundscale_ps(x, how) lanes_nearest(x)
#define _mm512_add_ps lanes_add
#define _mm512_sub_ps lanes_sub
#define _mm512_mul_ps lanes_mul
#define _mm512_div_ps lanes_div
#define _mm512_max_ps lanes_max
#define _mm512_min_ps lanes_min
#define _mm512_scalef_ps lanes_scalef
#define _mm512_fmadd_ps lanes_fmadd
#define _mm512_fnmadd_ps lanes_fnmadd

LANE Lanes lanes_choose(Lanes no, unsigned mask, Lanes yes) {
  return (Lanes){chosen(no.a, yes.a, mask), chosen(no.b, yes.b, mask >> 8)};
}
LANE Lanes lanes_load(Lanes otherwise, unsigned mask, const float *p) { /* reads nothing outside the mask */
  if (mask == 0xffff) return _mm512_loadu_ps(p);
  const Lanes found = {_mm256_maskload_ps(p, lanes_of(mask)), _mm256_maskload_ps(p + 8, lanes_of(mask >> 8))};
  return lanes_choose(otherwise, mask, found);
}
LANE void lanes_store(float *p, unsigned mask, Lanes x) {
  if (mask == 0xffff) { _mm512_storeu_ps(p, x); return; }
  _mm256_maskstore_ps(p, lanes_of(mask), x.a);
  _mm256_maskstore_ps(p + 8, lanes_of(mask >> 8), x.b);
}
#define _mm512_maskz_mov_ps(mask, x) lanes_choose(_mm512_setzero_ps(), mask, x)
#define _mm512_mask_loadu_ps lanes_load
#define _mm512_maskz_loadu_ps(mask, p) lanes_load(_mm512_setzero_ps(), mask, p)
#define _mm512_mask_storeu_ps lanes_store
#define _mm512_mask_add_ps(otherwise, mask, x, y) lanes_choose(otherwise, mask, lanes_add(x, y))
#define _mm512_mask_max_ps(otherwise, mask, x, y) lanes_choose(otherwise, mask, lanes_max(x, y))
LANE Lanes lanes_fmadd_where(Lanes x, Lanes y, Lanes z, unsigned mask) { return lanes_choose(z, mask, lanes_fmadd(x, y, z)); }
LANE unsigned lanes_above(unsigned mask, Lanes x, Lanes y) {
  return mask & (_mm256_movemask_ps(_mm256_cmp_ps(x.a, y.a, _CMP_GT_OQ)) | _mm256_movemask_ps(_mm256_cmp_ps(x.b, y.b, _CMP_GT_OQ)) << 8);
}
#define _mm512_mask3_fmadd_ps lanes_fmadd_where
#define _mm512_mask_cmp_ps_mask(mask, x, y, gt_oq) lanes_above(mask, x, y)

LANE Wholes wholes_loadu(const void *p) {
  return (Wholes){_mm256_loadu_si256((const __m256i *)p), _mm256_loadu_si256((const __m256i *)p + 1)};
}
LANE void wholes_storeu(void *p, Wholes x) { _mm256_storeu_si256((__m256i *)p, x.a); _mm256_storeu_si256((__m256i *)p + 1, x.b); }
LANE Wholes wholes_set1(int x) { return (Wholes){_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
#define _mm512_loadu_si512 wholes_loadu
#define _mm512_storeu_si512 wholes_storeu
#define _mm512_set1_epi32 wholes_set1

/* 16 bf16 values and what they are in fp32 */
LANE Lanes widened(__m256i x) {
  return (Lanes){(__m256)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(x)), 16),
                 (__m256)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm256_extracti128_si256(x, 1)), 16)};
}
LANE __m256i half_of(__m256 x) { /* to the nearest, ties to even; NaN stays NaN */
  const __m256i u = (__m256i)x, odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i near = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, odd), _mm256_set1_epi32(0x7fff)), 16);
  return _mm256_blendv_epi8(near, _mm256_set1_epi32(0x7fc0), (__m256i)_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
}
LANE __m256i halves(Lanes x) { return _mm256_permute4x64_epi64(_mm256_packus_epi32(half_of(x.a), half_of(x.b)), 0xd8); }
LANE void store_halves(uint16_t *y, unsigned mask, __m256i x) {
  if (mask == 0xffff) { _mm256_storeu_si256((__m256i *)y, x); return; }
  uint16_t each[16];
  _mm256_storeu_si256((__m256i *)each, x);
  for (int i = 0; i < 16; i++) if (mask >> i & 1) y[i] = each[i];
}
/* pairs (low, high) of bf16 values in 16 lanes */
LANE Wholes pair_of(__m256i low, __m256i high) {
  const __m256i first = _mm256_unpacklo_epi16(low, high), second = _mm256_unpackhi_epi16(low, high);
  return (Wholes){_mm256_permute2x128_si256(first, second, 0x20), _mm256_permute2x128_si256(first, second, 0x31)};
}
/* 32 columns of two rows, pair by pair; the second row may be missing */
LANE void pairs_of(const uint16_t *one, const uint16_t *two, Wholes pairs[2]) {
  for (int i = 0; i < 2; i++)
    pairs[i] = pair_of(_mm256_loadu_si256((const __m256i *)(one + 16 * i)),
                       two ? _mm256_loadu_si256((const __m256i *)(two + 16 * i)) : _mm256_setzero_si256());
}
LANE uint32_t pair_of_two(float low, float high) {
  const __m256i both = half_of(_mm256_setr_ps(low, high, 0, 0, 0, 0, 0, 0));
  return _mm256_extract_epi32(both, 0) | (uint32_t)_mm256_extract_epi32(both, 1) << 16;
}
/* sum += both products of a pair of bf16 values */
LANE __m256 dot_of(__m256 sum, __m256i x, __m256i w) {
  const __m256i high = _mm256_set1_epi32(0xffff0000);
  sum = _mm256_fmadd_ps((__m256)_mm256_slli_epi32(x, 16), (__m256)_mm256_slli_epi32(w, 16), sum);
  return _mm256_fmadd_ps((__m256)_mm256_and_si256(x, high), (__m256)_mm256_and_si256(w, high), sum);
}
LANE Lanes dot(Lanes sum, Wholes x, Wholes w) { return (Lanes){dot_of(sum.a, x.a, w.a), dot_of(sum.b, x.b, w.b)}; }
/* the sums of the lanes of four */
LANE __m128 sums_of(Lanes a, Lanes b, Lanes c, Lanes d) {
  const __m256 ab = _mm256_hadd_ps(_mm256_add_ps(a.a, a.b), _mm256_add_ps(b.a, b.b)),
               cd = _mm256_hadd_ps(_mm256_add_ps(c.a, c.b), _mm256_add_ps(d.a, d.b)), all = _mm256_hadd_ps(ab, cd);
  return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}
