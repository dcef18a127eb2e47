/* Products of bf16 rows with packed weights, and their low-rank updates. */
#pragma once
#include "common.h"

/* What a tile's sums become, 16 x wide columns from `first` on: + low b + bias, then stored, or added to base. */
INLINE void finish(const int rows, const int wide, __m512 sum[TALL][3], const Product *p, const float *low, long first, int biased,
                   const float *base, void *y, int mode) {
  const long out = p->out;
  const Update *u = &p->update;
  __mmask16 inside[3];
  for (int c = 0; c < wide; c++) inside[c] = inside_of(out - first - 16 * c);
  for (int r = 0; r < u->ranks && low; r++) {
    if (u->to[r] <= first || u->from[r] >= first + 16 * wide) continue;
    __m512 b[3];
    for (int c = 0; c < wide; c++) b[c] = _mm512_maskz_loadu_ps(inside[c], u->b + r * out + first + 16 * c);
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) {
      const __m512 v = _mm512_set1_ps(low[i * u->ranks + r]);
      for (int c = 0; c < wide; c++) sum[i][c] = _mm512_fmadd_ps(v, b[c], sum[i][c]);
    }
  }
#pragma GCC unroll 3
  for (int c = 0; c < wide; c++) {
    const long column = first + 16 * c;
    const __m512 bias = p->bias && biased ? _mm512_maskz_loadu_ps(inside[c], p->bias + column) : _mm512_setzero_ps();
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
      __m512 v = _mm512_add_ps(sum[r][c], bias);
      if (mode == STORE_BF16) {
        store_halves((bf16 *)y + r * out + column, inside[c], halves(v));
        continue;
      }
      if (mode == ADD) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(inside[c], base + r * out + column));
      _mm512_mask_storeu_ps((float *)y + r * out + column, inside[c], v);
    }
  }
}

/* low[i, r] = sum of x[i, c] a[r, c] over the columns that rank r reads, in an order that does not depend on the rows beside it */
INLINE void low_tile(const int rows, const int ranks, const float *x, long columns, const float *a, int begin, int end, float *low,
                     long stride) {
  __m512 sum[BESIDE][2][2];
  for (int i = 0; i < rows; i++) for (int r = 0; r < ranks; r++) sum[i][r][0] = sum[i][r][1] = _mm512_setzero_ps();
  int c = begin;
  for (; c + 32 <= end; c += 32)
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
      const float *at = a + c + 16 * half, *from = x + c + 16 * half;
      const __m512 a0 = _mm512_loadu_ps(at), a1 = ranks > 1 ? _mm512_loadu_ps(at + columns) : a0;
#pragma GCC unroll 4
      for (int i = 0; i < rows; i++) {
        const __m512 v = _mm512_loadu_ps(from + i * columns);
        sum[i][0][half] = _mm512_fmadd_ps(v, a0, sum[i][0][half]);
        if (ranks > 1) sum[i][1][half] = _mm512_fmadd_ps(v, a1, sum[i][1][half]);
      }
    }
  for (int i = 0; i < rows; i++)
    for (int r = 0; r < ranks; r++) {
      float total = _mm512_reduce_add_ps(_mm512_add_ps(sum[i][r][0], sum[i][r][1]));
      for (int left = c; left < end; left++) total += x[i * columns + left] * a[r * columns + left];
      low[i * stride + r] = total;
    }
}
static void low_of(int rows, const float *x, const float *a, long columns, int ranks, const int32_t *from, const int32_t *to, float *low) {
  for (int r = 0, many; r < ranks; r += many) {
    const int begin = from ? from[r] : 0, end = to ? to[r] : columns;
    many = r + 1 < ranks && (!from || from[r + 1] == begin) && (!to || to[r + 1] == end) ? 2 : 1;
    switch (rows * 2 + many - 1) {
#define LOW(n) \
      case 2 * n: low_tile(n, 1, x, columns, a + r * columns, begin, end, low + r, ranks); break; \
      case 2 * n + 1: low_tile(n, 2, x, columns, a + r * columns, begin, end, low + r, ranks); break;
      LOW(1) LOW(2) LOW(3) LOW(4)
    }
  }
}
