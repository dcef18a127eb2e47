/* Products of bf16 rows with bf16 weights, sums in fp32: what AVX512_BF16 has an instruction for. */
#pragma once
#include "products.h"

INLINE void tile(const int rows, const bf16 *x, const Product *p, const float *low, int panel, long begin, long end,
                 const float *base, void *y, int mode) {
  const long in = p->in;
  const uint32_t *w = p->w + ((long)panel * (in / 2) + begin) * PANEL;
  __m512 sum[TALL][3];
  for (int r = 0; r < rows; r++) for (int c = 0; c < 3; c++) sum[r][c] = _mm512_setzero_ps();
  for (long k = begin; k < end; k++, w += PANEL) {
    const __m512i w0 = _mm512_loadu_si512(w), w1 = _mm512_loadu_si512(w + 16), w2 = _mm512_loadu_si512(w + 32);
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
      int pair;
      memcpy(&pair, x + r * in + 2 * k, 4);
      const __m512i v = _mm512_set1_epi32(pair);
      sum[r][0] = dot(sum[r][0], v, w0);
      sum[r][1] = dot(sum[r][1], v, w1);
      sum[r][2] = dot(sum[r][2], v, w2);
    }
  }
  finish(rows, 3, sum, p, low, (long)panel * PANEL, !begin, base, y, mode);
}

/* y = the product, or base (which may be y) + the product; no room is needed (whole.h) */
static void product_rows(const bf16 *x, long rows, const Product *p, int16_t *room, const float *low, const float *base, void *y, int mode) {
  const long panels = (p->out + PANEL - 1) / PANEL, chunks = rows ? (rows + CHUNK - 1) / CHUNK : 1;
  const long size = ((rows + chunks - 1) / chunks + TALL - 1) / TALL * TALL; /* even chunks, in whole tiles */
#pragma omp for schedule(static)
  for (long job = 0; job < chunks * panels; job++) {
    const long begin = job % chunks * size, end = begin + size < rows ? begin + size : rows;
    const int panel = job / chunks;
    /* long sums in blocks whose weights stay in the second-level cache; bf16 results are never split */
    const long pairs = p->in / 2, step = mode == STORE_BF16 ? pairs : STRETCH;
    for (long k = 0; k < pairs; k += step) {
      const long stop = k + step < pairs ? k + step : pairs;
      const int how = k ? ADD : mode;
      for (long row = begin; row < end; row += TALL) {
        const bf16 *at = x + row * p->in;
        const float *beside = low && !k ? low + row * p->update.ranks : 0;
        void *to = (char *)y + row * p->out * (mode == STORE_BF16 ? 2 : 4);
        const float *from = k ? to : base ? base + row * p->out : 0;
        switch (end - row) {
#define CASE(n) case n: tile(n, at, p, beside, panel, k, stop, from, to, how); break;
          CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7)
          default: tile(8, at, p, beside, panel, k, stop, from, to, how);
        }
      }
    }
  }
}

void punster_pack(const bf16 *w, int out, int in, long row_stride, long column_stride, uint32_t *packed) {
#pragma omp parallel for schedule(static)
  for (int panel = 0; panel < (out + PANEL - 1) / PANEL; panel++)
    for (int k = 0; k < in / 2; k++)
      for (int c = 0; c < PANEL; c++) {
        const long column = (long)panel * PANEL + c;
        const bf16 *at = w + column * row_stride + 2L * k * column_stride;
        packed[((long)panel * (in / 2) + k) * PANEL + c] = column < out ? at[0] | (uint32_t)at[column_stride] << 16 : 0;
      }
}
