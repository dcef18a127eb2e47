/* AVX-512 (F, VL, BW, DQ, BF16, VNNI) as far as csrc uses it, lane by lane in plain C, so that CPUs without it can test what is written
   for it: cc -include emulated.h. Each function does what Intel's Intrinsics Guide says of the intrinsic that it stands for below, but
   that dpbf16 does not flush denormal numbers to zero. Slow, and for tests alone. */
#pragma once
#ifndef ONLY_AVX2
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#define EM static inline __attribute__((always_inline))
#define EACH for (int i = 0; i < 16; i++)
#define CHOSEN EACH if (k >> i & 1)
typedef int vi16 __attribute__((vector_size(64)));
typedef unsigned vu16 __attribute__((vector_size(64)));
typedef short vs32 __attribute__((vector_size(64)));

EM void e_aligned(const void *p) { if ((uintptr_t)p % 64) __builtin_trap(); }
EM float e_wide(uint16_t x) { uint32_t u = (uint32_t)x << 16; float f; memcpy(&f, &u, 4); return f; }
EM uint16_t e_half(float f) { /* to the nearest, ties to even; denormal numbers are zero, a NaN becomes a quiet one */
  uint32_t u;
  memcpy(&u, &f, 4);
  if (f != f) return u >> 16 | 0x40;
  return u & 0x7f800000 ? (u + 0x7fff + ((u >> 16) & 1)) >> 16 : (u >> 16) & 0x8000;
}

/* fp32 */
EM __m512 e_set1(float x) { __m512 r; EACH r[i] = x; return r; }
EM __m512 e_zero(void) { return e_set1(0); }
EM __m512 e_loadu(const void *p) { __m512 r; memcpy(&r, p, 64); return r; }
EM __m512 e_load(const void *p) { e_aligned(p); return e_loadu(p); }
EM void e_storeu(void *p, __m512 x) { memcpy(p, &x, 64); }
EM void e_store(void *p, __m512 x) { e_aligned(p); e_storeu(p, x); }
EM __m512 e_mul(__m512 a, __m512 b) { return a * b; }
EM __m512 e_add(__m512 a, __m512 b) { return a + b; }
EM __m512 e_sub(__m512 a, __m512 b) { return a - b; }
EM __m512 e_div(__m512 a, __m512 b) { return a / b; }
EM __m512 e_max(__m512 a, __m512 b) { __m512 r; EACH r[i] = a[i] > b[i] ? a[i] : b[i]; return r; }
EM __m512 e_min(__m512 a, __m512 b) { __m512 r; EACH r[i] = a[i] < b[i] ? a[i] : b[i]; return r; }
EM __m512 e_fmadd(__m512 a, __m512 b, __m512 c) { __m512 r; EACH r[i] = fmaf(a[i], b[i], c[i]); return r; }
EM __m512 e_fnmadd(__m512 a, __m512 b, __m512 c) { __m512 r; EACH r[i] = fmaf(-a[i], b[i], c[i]); return r; }
EM __m512 e_abs(__m512 x) { __m512 r; EACH r[i] = fabsf(x[i]); return r; }
EM __m512 e_round(__m512 x) { __m512 r; EACH r[i] = rintf(x[i]); return r; }
EM __m512 e_scalef(__m512 x, __m512 n) { __m512 r; EACH r[i] = ldexpf(x[i], (int)floorf(n[i])); return r; }
EM float e_sum(__m512 x) { for (int s = 8; s; s /= 2) for (int i = 0; i < s; i++) x[i] += x[i + s]; return x[0]; }
EM float e_most(__m512 x) {
  for (int s = 8; s; s /= 2) for (int i = 0; i < s; i++) x[i] = x[i] > x[i + s] ? x[i] : x[i + s];
  return x[0];
}
EM __m512 e_choose(__m512 otherwise, __mmask16 k, __m512 x) { CHOSEN otherwise[i] = x[i]; return otherwise; }
EM __m512 e_mask_load(__m512 otherwise, __mmask16 k, const float *p) { CHOSEN otherwise[i] = p[i]; return otherwise; }
EM void e_mask_store(float *p, __mmask16 k, __m512 x) { CHOSEN p[i] = x[i]; }
EM __mmask16 e_above(__mmask16 k, __m512 x, __m512 y) { __mmask16 r = 0; CHOSEN r |= (x[i] > y[i]) << i; return r; }
EM __m512 e_interleave(__m512 a, __m512 b, int from) { /* the lower (from 0) or upper (2) halves of four lanes each */
  __m512 r;
  EACH r[i] = i % 2 ? b[i / 4 * 4 + from + i % 4 / 2] : a[i / 4 * 4 + from + i % 4 / 2];
  return r;
}
EM __m512d e_interleave_d(__m512d a, __m512d b, int from) {
  __m512d r;
  for (int i = 0; i < 8; i++) r[i] = i % 2 ? b[i - 1 + from] : a[i + from];
  return r;
}
EM __m256 e_part(__m512 x, int part) { __m256 r; memcpy(&r, (char *)&x + 32 * part, 32); return r; }

/* whole numbers */
EM __m512i e_loadu_i(const void *p) { __m512i r; memcpy(&r, p, 64); return r; }
EM void e_storeu_i(void *p, __m512i x) { memcpy(p, &x, 64); }
EM __m512i e_set1_i(int x) { vi16 r; EACH r[i] = x; return (__m512i)r; }
EM __m512i e_set1_s(short x) { vs32 r; for (int i = 0; i < 32; i++) r[i] = x; return (__m512i)r; }
EM __m512i e_add_i(__m512i a, __m512i b) { return (__m512i)((vi16)a + (vi16)b); }
EM __m512i e_add_s(__m512i a, __m512i b) { return (__m512i)((vs32)a + (vs32)b); }
EM __m512i e_or(__m512i a, __m512i b) { return a | b; }
EM __m512i e_shift(__m512i a, int n) { return (__m512i)((vu16)a << n); }
EM __m512i e_int(__m512 x) { vi16 r; EACH r[i] = (int)rintf(x[i]); return (__m512i)r; }
EM __m512 e_float(__m512i x) { __m512 r; EACH r[i] = (float)((vi16)x)[i]; return r; }
EM __m128i e_bytes(__m512i x) { uint8_t v[16]; EACH v[i] = ((vi16)x)[i]; return _mm_loadu_si128((__m128i *)v); }
EM __m512i e_widen(__m256i x) { vi16 r; uint16_t v[16]; memcpy(v, &x, 32); EACH r[i] = v[i]; return (__m512i)r; }
EM __m512i e_permute(__m512i a, __m512i index, __m512i b) {
  vs32 r, k = (vs32)index;
  for (int i = 0; i < 32; i++) r[i] = k[i] & 32 ? ((vs32)b)[k[i] & 31] : ((vs32)a)[k[i] & 31];
  return (__m512i)r;
}

/* bf16 and bytes */
EM __m256i e_halves(__m512 x) { uint16_t v[16]; EACH v[i] = e_half(x[i]); return _mm256_loadu_si256((__m256i *)v); }
EM __m128i e_halves_4(__m128 x) {
  uint16_t v[8] = {0};
  for (int i = 0; i < 4; i++) v[i] = e_half(x[i]);
  return _mm_loadu_si128((__m128i *)v);
}
EM void e_mask_store_s(void *p, __mmask16 k, __m256i x) {
  uint16_t v[16];
  memcpy(v, &x, 32);
  CHOSEN memcpy((char *)p + 2 * i, v + i, 2);
}
EM __m512 e_dot(__m512 sum, __m512i x, __m512i w) {
  uint16_t a[32], b[32];
  memcpy(a, &x, 64);
  memcpy(b, &w, 64);
  EACH sum[i] = fmaf(e_wide(a[2 * i]), e_wide(b[2 * i]), fmaf(e_wide(a[2 * i + 1]), e_wide(b[2 * i + 1]), sum[i]));
  return sum;
}
EM __m512i e_dot_bytes(__m512i sum, __m512i x, __m512i w) {
  uint8_t a[64];
  int8_t b[64];
  vi16 r = (vi16)sum;
  memcpy(a, &x, 64);
  memcpy(b, &w, 64);
  EACH for (int j = 0; j < 4; j++) r[i] += a[4 * i + j] * b[4 * i + j];
  return (__m512i)r;
}

#define _mm512_set1_ps e_set1
#define _mm512_setzero_ps e_zero
#define _mm512_loadu_ps e_loadu
#define _mm512_load_ps e_load
#define _mm512_storeu_ps e_storeu
#define _mm512_store_ps e_store
#define _mm512_mul_ps e_mul
#define _mm512_add_ps e_add
#define _mm512_sub_ps e_sub
#define _mm512_div_ps e_div
#define _mm512_max_ps e_max
#define _mm512_min_ps e_min
#define _mm512_fmadd_ps e_fmadd
#define _mm512_fnmadd_ps e_fnmadd
#define _mm512_abs_ps e_abs
#define e_only(constant, wanted) ((void)sizeof(char[(constant) == (wanted) ? 1 : -1]))
#define _mm512_roundscale_ps(x, how) (e_only(how, 8), e_round(x))
#define _mm512_scalef_ps e_scalef
#define _mm512_reduce_add_ps e_sum
#define _mm512_reduce_max_ps e_most
#define _mm512_mask_loadu_ps e_mask_load
#define _mm512_maskz_loadu_ps(k, p) e_mask_load(e_zero(), k, p)
#define _mm512_mask_storeu_ps e_mask_store
#define _mm512_maskz_mov_ps(k, x) e_choose(e_zero(), k, x)
#define _mm512_mask_add_ps(otherwise, k, x, y) e_choose(otherwise, k, e_add(x, y))
#define _mm512_mask_max_ps(otherwise, k, x, y) e_choose(otherwise, k, e_max(x, y))
#define _mm512_mask3_fmadd_ps(x, y, z, k) e_choose(z, k, e_fmadd(x, y, z))
#define _mm512_mask_cmp_ps_mask(k, x, y, how) (e_only(how, _CMP_GT_OQ), e_above(k, x, y))
#define _mm512_unpacklo_ps(a, b) e_interleave(a, b, 0)
#define _mm512_unpackhi_ps(a, b) e_interleave(a, b, 2)
#define _mm512_unpacklo_pd(a, b) e_interleave_d(a, b, 0)
#define _mm512_unpackhi_pd(a, b) e_interleave_d(a, b, 1)
#define _mm512_castps_pd(x) ((__m512d)(x))
#define _mm512_castpd_ps(x) ((__m512)(x))
#define _mm512_castsi512_ps(x) ((__m512)(x))
#define _mm512_castps512_ps256(x) e_part(x, 0)
#define _mm512_extractf32x8_ps e_part
#define _mm512_loadu_si512 e_loadu_i
#define _mm512_storeu_si512 e_storeu_i
#define _mm512_setzero_si512() e_set1_i(0)
#define _mm512_set1_epi32 e_set1_i
#define _mm512_set1_epi16 e_set1_s
#define _mm512_set_epi16(a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p, q, r, s, t, u, v, w, x, y, z, A, B, C, D, E, F) \
  ((__m512i)(vs32){F, E, D, C, B, A, z, y, x, w, v, u, t, s, r, q, p, o, n, m, l, k, j, i, h, g, f, e, d, c, b, a})
#define _mm512_add_epi32 e_add_i
#define _mm512_add_epi16 e_add_s
#define _mm512_or_si512 e_or
#define _mm512_slli_epi32 e_shift
#define _mm512_cvtps_epi32 e_int
#define _mm512_cvtepi32_ps e_float
#define _mm512_cvtepi32_epi8 e_bytes
#define _mm512_cvtepu16_epi32 e_widen
#define _mm512_permutex2var_epi16 e_permute
#define _mm512_cvtneps_pbh e_halves
#define _mm_cvtneps_pbh e_halves_4
#define _mm256_mask_storeu_epi16 e_mask_store_s
#define _mm512_dpbf16_ps(sum, x, w) e_dot(sum, (__m512i)(x), (__m512i)(w))
#define DOT(sum, x, w) sum = e_dot_bytes(sum, x, w) /* of quantised.h */
#define __m512bh __m512i
#define __AVX512BF16__ 1
#define __AVX512VNNI__ 1
#endif
