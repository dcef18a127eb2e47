/* Products in 8 bits: rows are rounded on the way in, blocks of inputs each by a scale of their own, weights column by column.
   AVX512_VNNI multiplies bytes without a sign by bytes with one: rows are shifted by 128, and what that adds is taken off a block. */
#pragma once
#include "halves.h"

#define QUADS 64 /* four inputs to a register's lane: blocks of 256 inputs, as in kernels.py, which makes room for their sizes */
typedef struct { Product p; const float *scale; const int32_t *shift; } Quantised; /* shift (blocks, padded out): -128 sum of w */

INLINE long blocks_of(long in) { return (in / 4 + QUADS - 1) / QUADS; }
INLINE long padded(long out) { return (out + PANEL - 1) / PANEL * PANEL; }
#ifndef DOT /* the tests have one for other CPUs; as text, since GCC 12 copies accumulators to memory around the intrinsic */
#define DOT(sum, x, w) __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w))
#endif

INLINE void tile_of_bytes(const int rows, const uint8_t *x, const float *size, const Quantised *q, const float *low, int panel,
                          const float *base, void *y, int mode) {
  const Product *p = &q->p;
  const long in = p->in, quads = in / 4, blocks = blocks_of(in), first = (long)panel * PANEL;
  const uint32_t *w = p->w + panel * quads * PANEL;
  float part[TALL][PANEL] __attribute__((aligned(64)));
  for (long b = 0; b < blocks; b++) {
    const long end = (b + 1) * QUADS < quads ? (b + 1) * QUADS : quads;
    __m512i sum[TALL][3];
    for (int r = 0; r < rows; r++) for (int c = 0; c < 3; c++) sum[r][c] = _mm512_setzero_si512();
    for (long k = b * QUADS; k < end; k++, w += PANEL) {
      const __m512i w0 = _mm512_loadu_si512(w), w1 = _mm512_loadu_si512(w + 16), w2 = _mm512_loadu_si512(w + 32);
#pragma GCC unroll 8
      for (int r = 0; r < rows; r++) {
        int quad;
        memcpy(&quad, x + r * in + 4 * k, 4);
        const __m512i v = _mm512_set1_epi32(quad);
        DOT(sum[r][0], v, w0);
        DOT(sum[r][1], v, w1);
        DOT(sum[r][2], v, w2);
      }
    }
    __m512i shift[3];
    for (int c = 0; c < 3; c++) shift[c] = _mm512_loadu_si512(q->shift + b * padded(p->out) + first + 16 * c);
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
      const __m512 s = _mm512_set1_ps(size[r * blocks + b]);
      for (int c = 0; c < 3; c++) {
        const __m512 f = _mm512_cvtepi32_ps(_mm512_add_epi32(sum[r][c], shift[c]));
        _mm512_store_ps(part[r] + 16 * c, b ? _mm512_fmadd_ps(f, s, _mm512_load_ps(part[r] + 16 * c)) : _mm512_mul_ps(f, s));
      }
    }
  }
  __m512 sum[TALL][3];
  for (int c = 0; c < 3; c++) {
    const __m512 scale = _mm512_loadu_ps(q->scale + first + 16 * c);
    for (int r = 0; r < rows; r++) sum[r][c] = _mm512_mul_ps(_mm512_load_ps(part[r] + 16 * c), scale);
  }
  finish(rows, 3, sum, p, low, first, 1, base, y, mode);
}

/* x (rows, in) bf16 -> bytes from 1 to 255, and the size of a unit in each block */
static void quantise_rows(const bf16 *x, long rows, int in, uint8_t *bytes, float *size) {
  const long blocks = blocks_of(in);
#pragma omp for schedule(static)
  for (long row = 0; row < rows; row++)
    for (long b = 0; b < blocks; b++) {
      const long from = row * in + b * QUADS * 4, to = b + 1 < blocks ? from + QUADS * 4 : (row + 1) * in;
      __m512 most = _mm512_set1_ps(1e-30f), lost = _mm512_setzero_ps(); /* lost: a maximum passes over NaN */
      for (long c = from; c < to; c += 16) {
        const __m512 v = load_bf16(x + c);
        most = _mm512_max_ps(most, _mm512_abs_ps(v));
        lost = _mm512_fmadd_ps(v, _mm512_setzero_ps(), lost);
      }
      const float unit = _mm512_reduce_max_ps(most) / 127 + _mm512_reduce_add_ps(lost);
      const __m512 inverse = _mm512_set1_ps(1 / unit);
      size[row * blocks + b] = unit;
      for (long c = from; c < to; c += 16) {
        const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(load_bf16(x + c), inverse));
        _mm_storeu_si128((__m128i *)(bytes + c), _mm512_cvtepi32_epi8(_mm512_add_epi32(whole, _mm512_set1_epi32(128))));
      }
    }
}

static void product_of_bytes_rows(const uint8_t *x, const float *size, long rows, const Quantised *q, const float *low,
                                  const float *base, void *y, int mode) {
  const Product *p = &q->p;
  const long panels = (p->out + PANEL - 1) / PANEL, chunks = rows ? (rows + CHUNK - 1) / CHUNK : 1, blocks = blocks_of(p->in);
  const long share = ((rows + chunks - 1) / chunks + TALL - 1) / TALL * TALL;
#pragma omp for schedule(static)
  for (long job = 0; job < chunks * panels; job++) {
    const long begin = job % chunks * share, end = begin + share < rows ? begin + share : rows;
    const int panel = job / chunks;
    for (long row = begin; row < end; row += TALL) {
      const uint8_t *at = x + row * p->in;
      const float *unit = size + row * blocks, *beside = low ? low + row * p->update.ranks : 0, *from = base ? base + row * p->out : 0;
      void *to = (char *)y + row * p->out * (mode == STORE_BF16 ? 2 : 4);
      switch (end - row) {
#define ROWS(n) case n: tile_of_bytes(n, at, unit, q, beside, panel, from, to, mode); break;
        ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6) ROWS(7)
        default: tile_of_bytes(8, at, unit, q, beside, panel, from, to, mode);
      }
    }
  }
}

/* w (padded out, in) bytes -> panels, and the shifts of each block */
void punster_pack_bytes(const int8_t *w, int out, int in, uint32_t *packed, int32_t *shift) {
#pragma omp parallel for schedule(static)
  for (int panel = 0; panel < out / PANEL; panel++) {
    for (int k = 0; k < in / 4; k++)
      for (int c = 0; c < PANEL; c++)
        memcpy(packed + ((long)panel * (in / 4) + k) * PANEL + c, w + ((long)panel * PANEL + c) * in + 4L * k, 4);
    for (int b = 0; b < blocks_of(in); b++)
      for (long column = (long)panel * PANEL; column < (panel + 1L) * PANEL; column++) {
        int32_t sum = 0;
        for (int k = b * QUADS * 4; k < (b + 1) * QUADS * 4 && k < in; k++) sum += w[column * in + k];
        shift[(long)b * out + column] = -128 * sum;
      }
  }
}
void punster_product_of_bytes(const bf16 *x, long rows, const Quantised *q, uint8_t *bytes, float *size, const float *low,
                              const float *base, void *y, int mode) {
#pragma omp parallel
  {
    quantise_rows(x, rows, q->p.in, bytes, size);
    product_of_bytes_rows(bytes, size, rows, q, low, base, y, mode);
  }
}
