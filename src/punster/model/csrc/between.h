/* What lies between the products: norms, rounding, activations, gradients of the low-rank factors, rotary embedding. */
#pragma once
#include "products.h"

static void norm_rows(const float *x, long rows, int d, const Norm *n, const Update *u, bf16 *y, float *low, float *stat) {
#pragma omp for schedule(static)
  for (long row = 0; row < rows; row++) {
    const float *v = x + row * d;
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
    float exact[d];
    for (int c = 0; c < d; c += 16) {
      __m512 t = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(v + c), _mm512_set1_ps(mean)), _mm512_set1_ps(scale));
      t = _mm512_mul_ps(t, _mm512_loadu_ps(n->weight + c));
      if (n->bias) t = _mm512_add_ps(t, _mm512_loadu_ps(n->bias + c));
      _mm512_storeu_ps(exact + c, t);
      store_bf16(y + row * d + c, t);
    }
    if (u->ranks) low_of(exact, u->a, d, u->ranks, 0, 0, low + row * u->ranks);
    if (stat) { stat[2 * row] = mean; stat[2 * row + 1] = scale; }
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
#pragma omp for schedule(static)
  for (long row = 0; row < rows; row++) {
    for (int c = 0; c < columns; c += 16) store_bf16(y + row * columns + c, _mm512_loadu_ps(x + row * columns + c));
    if (u->ranks) low_of(x + row * columns, u->a, columns, u->ranks, from, to, low + row * u->ranks);
  }
}

/* SwiGLU of (rows, 2 width) with silu, or gelu of (rows, width) */
static void act_rows(const bf16 *y, long rows, int width, int kind, const Update *u, bf16 *h, float *low) {
#pragma omp for schedule(static)
  for (long row = 0; row < rows; row++) {
    const bf16 *v = y + row * width * (kind == SILU ? 2 : 1);
    float exact[width];
    for (int c = 0; c < width; c += 16) {
      const __m512 x = load_bf16(v + c);
      __m512 slope, t = _mm512_mul_ps(x, gate_of(kind, x, &slope));
      if (kind == SILU) t = _mm512_mul_ps(t, load_bf16(v + width + c));
      _mm512_storeu_ps(exact + c, t);
      store_bf16(h + row * width + c, t);
    }
    if (u->ranks) low_of(exact, u->a, width, u->ranks, 0, 0, low + row * u->ranks);
  }
}

/* dh (rows, width) -> dy (rows, 2 width or width) bf16 and its low-rank image under the scaled b of `up` */
static void act_back_rows(const float *dh, const bf16 *y, long rows, int width, int kind, const Update *u, bf16 *dy, float *pulled) {
  const int wide = width * (kind == SILU ? 2 : 1);
#pragma omp for schedule(static)
  for (long row = 0; row < rows; row++) {
    const bf16 *v = y + row * wide;
    float exact[wide];
    for (int c = 0; c < width; c += 16) {
      const __m512 x = load_bf16(v + c), g = _mm512_loadu_ps(dh + row * width + c), one = _mm512_set1_ps(1.f);
      __m512 slope, s = gate_of(kind, x, &slope);
      /* d(x s)/dx = s (1 + x (1 - s) slope) */
      __m512 d = _mm512_mul_ps(s, _mm512_fmadd_ps(_mm512_mul_ps(x, _mm512_sub_ps(one, s)), slope, one));
      if (kind == SILU) {
        const __m512 up = load_bf16(v + width + c);
        _mm512_storeu_ps(exact + width + c, _mm512_mul_ps(g, _mm512_mul_ps(x, s)));
        d = _mm512_mul_ps(d, up);
      }
      _mm512_storeu_ps(exact + c, _mm512_mul_ps(g, d));
    }
    for (int c = 0; c < wide; c += 16) store_bf16(dy + row * wide + c, _mm512_loadu_ps(exact + c));
    if (u->ranks) low_of(exact, u->b, wide, u->ranks, u->from, u->to, pulled + row * u->ranks);
  }
}

/* y (ranks, columns) = low^T x, rank r in its own columns */
static void outer_rows(const float *low, const bf16 *x, long rows, int columns, int ranks, const int32_t *from, const int32_t *to,
                       float *y) {
#pragma omp for schedule(static)
  for (int c = 0; c < columns; c += 32) {
    for (int first = 0; first < ranks; first += 8) {
      const int many = ranks - first < 8 ? ranks - first : 8;
      int any = 0;
      for (int r = first; r < first + many; r++) any |= from[r] < c + 32 && to[r] > c;
      if (!any) continue;
      __m512 sum[8][2];
      for (int r = 0; r < 8; r++) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
      for (long row = 0; row < rows; row++) {
        const __m512 x0 = load_bf16(x + row * columns + c), x1 = load_bf16(x + row * columns + c + 16);
        const float *l = low + row * ranks + first;
        if (many == 8) {
#pragma GCC unroll 8
          for (int r = 0; r < 8; r++) {
            const __m512 v = _mm512_set1_ps(l[r]);
            sum[r][0] = _mm512_fmadd_ps(v, x0, sum[r][0]);
            sum[r][1] = _mm512_fmadd_ps(v, x1, sum[r][1]);
          }
        } else {
          for (int r = 0; r < many; r++) {
            const __m512 v = _mm512_set1_ps(l[r]);
            sum[r][0] = _mm512_fmadd_ps(v, x0, sum[r][0]);
            sum[r][1] = _mm512_fmadd_ps(v, x1, sum[r][1]);
          }
        }
      }
      for (int r = 0; r < many; r++) {
        _mm512_storeu_ps(y + (long)(first + r) * columns + c, sum[r][0]);
        _mm512_storeu_ps(y + (long)(first + r) * columns + c + 16, sum[r][1]);
      }
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
