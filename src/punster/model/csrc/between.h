/* What lies between the products: norms, rounding, activations, gradients of the low-rank factors, rotary embedding. */
#pragma once
#include "products.h"

INLINE void norm_row(const float *v, int d, const Norm *n, bf16 *y, float *exact, float *stat) {
  __m512 square = _mm512_setzero_ps(), sum = square;
  for (int c = 0; c < d; c += 16) {
    const __m512 t = _mm512_loadu_ps(v + c);
    square = _mm512_fmadd_ps(t, t, square);
    sum = _mm512_add_ps(sum, t);
  }
  float mean = 0, power = _mm512_reduce_add_ps(square) / d;
  if (n->bias) {
    mean = _mm512_reduce_add_ps(sum) / d;
    square = _mm512_setzero_ps();
    for (int c = 0; c < d; c += 16) {
      const __m512 t = _mm512_sub_ps(_mm512_loadu_ps(v + c), _mm512_set1_ps(mean));
      square = _mm512_fmadd_ps(t, t, square);
    }
    power = _mm512_reduce_add_ps(square) / d;
  }
  const float scale = 1 / sqrtf(power + n->eps);
  for (int c = 0; c < d; c += 16) {
    __m512 t = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(v + c), _mm512_set1_ps(mean)), _mm512_set1_ps(scale));
    t = _mm512_mul_ps(t, _mm512_loadu_ps(n->weight + c));
    if (n->bias) t = _mm512_add_ps(t, _mm512_loadu_ps(n->bias + c));
    _mm512_storeu_ps(exact + c, t);
    store_bf16(y + c, t);
  }
  if (stat) { stat[0] = mean; stat[1] = scale; }
}
static void norm_rows(const float *x, long rows, int d, const Norm *n, const Update *u, bf16 *y, float *low, float *stat) {
  const int block = block_of(rows, u->ranks);
#pragma omp for schedule(static)
  for (long first = 0; first < rows; first += block) {
    const int many = rows_from(first, rows, block);
    float exact[BESIDE * d];
    for (long i = 0, row = first; i < many; i++, row++)
      norm_row(x + row * d, d, n, y + row * d, exact + i * d, stat ? stat + 2 * row : 0);
    if (u->ranks) low_of(many, exact, u->a, d, u->ranks, 0, 0, low + first * u->ranks);
  }
}

/* dx = base + gradient of the norm's input */
static void norm_back_rows(const float *dy, const float *x, const float *stat, long rows, int d, const Norm *n, const float *base,
                           float *dx) {
#pragma omp for schedule(static)
  for (long row = 0; row < rows; row++) {
    const __m512 mean = _mm512_set1_ps(stat[2 * row]), scale = _mm512_set1_ps(stat[2 * row + 1]);
    __m512 along = _mm512_setzero_ps(), sum = along;
    for (int c = 0; c < d; c += 16) {
      const __m512 g = _mm512_mul_ps(_mm512_loadu_ps(dy + row * d + c), _mm512_loadu_ps(n->weight + c));
      along = _mm512_fmadd_ps(g, _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(x + row * d + c), mean), scale), along);
      sum = _mm512_add_ps(sum, g);
    }
    const __m512 part = _mm512_set1_ps(_mm512_reduce_add_ps(along) / d),
                 shift = _mm512_set1_ps(n->bias ? _mm512_reduce_add_ps(sum) / d : 0);
    for (int c = 0; c < d; c += 16) {
      const __m512 hat = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(x + row * d + c), mean), scale);
      __m512 g = _mm512_mul_ps(_mm512_loadu_ps(dy + row * d + c), _mm512_loadu_ps(n->weight + c));
      g = _mm512_sub_ps(_mm512_fnmadd_ps(hat, part, g), shift);
      _mm512_storeu_ps(dx + row * d + c, _mm512_fmadd_ps(g, scale, _mm512_loadu_ps(base + row * d + c)));
    }
  }
}

/* x (rows, columns) fp32 -> y bf16, and low */
static void round_rows(const float *x, long rows, int columns, const Update *u, const int32_t *from, const int32_t *to, bf16 *y,
                       float *low) {
  const int block = block_of(rows, u->ranks);
#pragma omp for schedule(static)
  for (long first = 0; first < rows; first += block) {
    const int many = rows_from(first, rows, block);
    for (long c = first * columns; c < (first + many) * columns; c += 16) store_bf16(y + c, _mm512_loadu_ps(x + c));
    if (u->ranks) low_of(many, x + first * columns, u->a, columns, u->ranks, from, to, low + first * u->ranks);
  }
}

INLINE void act_row(const bf16 *v, int width, int kind, bf16 *h, float *exact) {
  for (int c = 0; c < width; c += 16) {
    const __m512 x = load_bf16(v + c);
    __m512 slope, t = _mm512_mul_ps(x, gate_of(kind, x, &slope));
    if (kind == SILU) t = _mm512_mul_ps(t, load_bf16(v + width + c));
    _mm512_storeu_ps(exact + c, t);
    store_bf16(h + c, t);
  }
}
/* SwiGLU of (rows, 2 width) with silu, or gelu of (rows, width) */
static void act_rows(const bf16 *y, long rows, int width, int kind, const Update *u, bf16 *h, float *low) {
  const int wide = width * (kind == SILU ? 2 : 1);
  const int block = block_of(rows, u->ranks);
#pragma omp for schedule(static)
  for (long first = 0; first < rows; first += block) {
    const int many = rows_from(first, rows, block);
    float exact[BESIDE * width];
    for (long i = 0, row = first; i < many; i++, row++) act_row(y + row * wide, width, kind, h + row * width, exact + i * width);
    if (u->ranks) low_of(many, exact, u->a, width, u->ranks, 0, 0, low + first * u->ranks);
  }
}

INLINE void act_back_row(const float *dh, const bf16 *v, int width, int kind, bf16 *dy, float *exact) {
  for (int c = 0; c < width; c += 16) {
    const __m512 x = load_bf16(v + c), g = _mm512_loadu_ps(dh + c), one = _mm512_set1_ps(1.f);
    __m512 slope, s = gate_of(kind, x, &slope);
    /* d(x s)/dx = s (1 + x (1 - s) slope) */
    __m512 d = _mm512_mul_ps(s, _mm512_fmadd_ps(_mm512_mul_ps(x, _mm512_sub_ps(one, s)), slope, one));
    if (kind == SILU) {
      const __m512 up = load_bf16(v + width + c), of_up = _mm512_mul_ps(g, _mm512_mul_ps(x, s));
      _mm512_storeu_ps(exact + width + c, of_up);
      store_bf16(dy + width + c, of_up);
      d = _mm512_mul_ps(d, up);
    }
    _mm512_storeu_ps(exact + c, _mm512_mul_ps(g, d));
    store_bf16(dy + c, _mm512_mul_ps(g, d));
  }
}
/* dh (rows, width) -> dy (rows, 2 width or width) bf16 and its low-rank image under the scaled b of `up` */
static void act_back_rows(const float *dh, const bf16 *y, long rows, int width, int kind, const Update *u, bf16 *dy, float *pulled) {
  const int wide = width * (kind == SILU ? 2 : 1);
  const int block = block_of(rows, u->ranks);
#pragma omp for schedule(static)
  for (long first = 0; first < rows; first += block) {
    const int many = rows_from(first, rows, block);
    float exact[BESIDE * wide];
    for (long i = 0, row = first; i < many; i++, row++)
      act_back_row(dh + row * width, y + row * wide, width, kind, dy + row * wide, exact + i * wide);
    if (u->ranks) low_of(many, exact, u->b, wide, u->ranks, u->from, u->to, pulled + first * u->ranks);
  }
}

/* Two rows' values side by side as products of bf16 take them; the second row of the last pair may be missing. */
static void beside_rows(const float *low, long rows, int ranks, uint32_t *pairs) {
#pragma omp for schedule(static)
  for (long row = 0; row < rows; row += 2)
    for (int r = 0; r < ranks; r++)
      pairs[row / 2 * ranks + r] = pair_of_two(low[row * ranks + r], row + 1 < rows ? low[(row + 1) * ranks + r] : 0);
}
INLINE void outer_tile(const int many, const uint32_t *pairs, const bf16 *x, long rows, int columns, int ranks, float *y) {
  __m512 sum[8][2];
  for (int r = 0; r < many; r++) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
  for (long row = 0; row < rows; row += 2) {
    __m512i both[2];
    pairs_of(x + row * columns, row + 1 < rows ? x + (row + 1) * columns : 0, both);
#pragma GCC unroll 8
    for (int r = 0; r < many; r++) {
      const __m512i v = _mm512_set1_epi32(pairs[row / 2 * ranks + r]);
      sum[r][0] = dot(sum[r][0], v, both[0]);
      sum[r][1] = dot(sum[r][1], v, both[1]);
    }
  }
  for (int r = 0; r < many; r++) {
    _mm512_storeu_ps(y + (long)r * columns, sum[r][0]);
    _mm512_storeu_ps(y + (long)r * columns + 16, sum[r][1]);
  }
}
/* y (ranks, columns) = low^T x with low in bf16, rank r in its own columns */
static void outer_rows(const uint32_t *pairs, const bf16 *x, long rows, int columns, int ranks, const int32_t *from, const int32_t *to,
                       float *y) {
#pragma omp for schedule(static)
  for (int c = 0; c < columns; c += 32)
    for (int first = 0; first < ranks; first += 8) {
      const int many = ranks - first < 8 ? ranks - first : 8;
      int any = 0;
      for (int r = first; r < first + many; r++) any |= from[r] < c + 32 && to[r] > c;
      if (!any) continue;
      float *into = y + (long)first * columns + c;
      switch (many) {
#define OUTER(n) case n: outer_tile(n, pairs + first, x + c, rows, columns, ranks, into); break;
        OUTER(1) OUTER(2) OUTER(3) OUTER(4) OUTER(5) OUTER(6) OUTER(7) OUTER(8)
      }
    }
}

INLINE void rotate(float *head, int half, const float *cosine, const float *sine, float sign) {
  for (int i = 0; i < half; i++) {
    const float c = cosine[i], s = sign * sine[i], a = head[i], b = head[half + i];
    head[i] = a * c - b * s;
    head[half + i] = b * c + a * s;
  }
}
/* rotary embedding in place (Su et al. 2021) of the first `turned` of `heads` heads; sign -1 turns back */
static void rope_rows(float *x, long rows, int heads, int turned, int size, const float *cosine, const float *sine, float sign) {
  const int half = size / 2;
#pragma omp for schedule(static)
  for (long row = 0; row < rows; row++)
    for (int head = 0; head < turned; head++)
      rotate(x + (row * heads + head) * size, half, cosine + row * half, sine + row * half, sign);
}
