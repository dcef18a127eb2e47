/* Types, loads and stores, and functions of a register. */
#pragma once
#if defined(__AVX512BF16__) && defined(__AVX512VNNI__) && !defined(ONLY_AVX2)
#define WIDE 1
#include "wide.h"
#else
#define WIDE 0
#include "lanes.h"
#endif
#include <math.h>
#include <omp.h>

#define PANEL 48
#define TALL (WIDE ? 8 : 6) /* rows of a tile: 8 x 3 accumulators of 32 registers, or 6 x 2 of 16 */
#define CHUNK 256  /* rows that share a panel before the next one comes */
#define BESIDE 4   /* rows whose low-rank images are formed together: `a` is read once for all */
#define STRETCH 1024 /* pairs of inputs summed at a stretch */
#define INLINE LANE
typedef uint16_t bf16;
enum { STORE = 0, ADD = 1, STORE_BF16 = 2 };
enum { SILU = 0, GELU_TANH = 1 };

typedef struct { const float *a, *b; int32_t ranks; const int32_t *from, *to; } Update;
typedef struct { const uint32_t *w; const float *bias; int32_t in, out; Update update; } Product;
typedef struct { const float *weight, *bias; float eps; } Norm; /* with a bias: LayerNorm, without: RMSNorm */
typedef struct { Norm before, between; Product attend, output, up, down; } Layer;

/* How many rows make a block: one where blocks would leave a thread without work, or nothing is shared. */
INLINE int block_of(long rows, int ranks) { return ranks && rows >= BESIDE * omp_get_num_threads() ? BESIDE : 1; }
INLINE int rows_from(long first, long rows, int block) { return first + block < rows ? block : rows - first; }
INLINE float bf16_value(bf16 x) { uint32_t u = (uint32_t)x << 16; float f; memcpy(&f, &u, 4); return f; }
INLINE __mmask16 inside_of(long left) { return left >= 16 ? 0xffff : left > 0 ? (1u << left) - 1 : 0; }
INLINE __m512 load_bf16(const bf16 *x) { return widened(_mm256_loadu_si256((const __m256i *)x)); }
INLINE void store_bf16(bf16 *x, __m512 v) { _mm256_storeu_si256((__m256i *)x, halves(v)); }
INLINE __m512 vexp(__m512 x) { /* 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]; error about 1e-7 */
  x = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-87.f)), _mm512_set1_ps(88.f));
  __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1 / 720.f);
  const float c[] = {1 / 120.f, 1 / 24.f, 1 / 6.f, .5f, 1.f, 1.f};
  for (int i = 0; i < 6; i++) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c[i]));
  return _mm512_scalef_ps(p, n);
}
INLINE __m512 sigmoid(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.f);
  return _mm512_div_ps(one, _mm512_add_ps(one, vexp(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}
/* gelu's tanh form is x sigmoid(2 u), u = sqrt(2 / pi) (x + .044715 x^3): the same shape as silu, x sigmoid(x) */
INLINE __m512 gate_of(int kind, __m512 x, __m512 *slope) {
  if (kind == SILU) { *slope = _mm512_set1_ps(1.f); return sigmoid(x); }
  const __m512 c = _mm512_set1_ps(1.5957691216f), square = _mm512_mul_ps(x, x);
  *slope = _mm512_mul_ps(c, _mm512_fmadd_ps(_mm512_set1_ps(3 * .044715f), square, _mm512_set1_ps(1.f)));
  return sigmoid(_mm512_mul_ps(_mm512_mul_ps(c, x), _mm512_fmadd_ps(_mm512_set1_ps(.044715f), square, _mm512_set1_ps(1.f))));
}
