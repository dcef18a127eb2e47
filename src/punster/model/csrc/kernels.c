/* What a step of a Llama or GPT-2 block does on CPUs with AVX512_BF16 or AVX2: products of bf16 rows with packed weights, their
   low-rank updates added in the same registers, and all that lies between the products in one pass each. Sums are fp32 (whole.h: of exact sums).

   Packed weights: panels of 48 output columns, each K/2 pairs of inputs long: w[panel][k/2][column][k%2]; of 16
   columns, in whole numbers and with their scales behind them, in whole.h.
   Low-rank updates: y += low b, low (rows, ranks) = x a^T; a (ranks, in), b (ranks, out). Rank r lives in the columns
   from[r] <= column < to[r] of the output and is zero elsewhere, as q, k and v have updates of their own.
   The functions named *_rows are worksharing: inside a parallel region every thread does its part, with a barrier behind. */
#include "blocked.h"
#include "decode.h"
#include "vocabulary.h"
#if WIDE
#include "quantised.h"
#endif
int punster_in_halves(void) { return WIDE; }

/* What follows is a call each, for whole sequences and their gradients. */
void punster_product(const bf16 *x, long rows, const Product *p, int16_t *room, const float *low, const float *base, void *y, int mode) {
#pragma omp parallel
  product_rows(x, rows, p, room, low, base, y, mode);
}
void punster_norm(const float *x, long rows, int d, const Norm *n, const Update *u, bf16 *y, float *low, float *stat) {
#pragma omp parallel
  norm_rows(x, rows, d, n, u, y, low, stat);
}
void punster_norm_back(const float *dy, const float *x, const float *stat, long rows, int d, const Norm *n, const float *base,
                       float *dx) {
#pragma omp parallel
  norm_back_rows(dy, x, stat, rows, d, n, base, dx);
}
void punster_round(const float *x, long rows, int columns, const Update *u, const int32_t *from, const int32_t *to, bf16 *y, float *low) {
#pragma omp parallel
  round_rows(x, rows, columns, u, from, to, y, low);
}
void punster_act(const bf16 *y, long rows, int width, int kind, const Update *u, bf16 *h, float *low) {
#pragma omp parallel
  act_rows(y, rows, width, kind, u, h, low);
}
void punster_act_back(const float *dh, const bf16 *y, long rows, int width, int kind, const Update *u, bf16 *dy, float *pulled) {
#pragma omp parallel
  act_back_rows(dh, y, rows, width, kind, u, dy, pulled);
}
void punster_outer(const float *low, const bf16 *x, long rows, int columns, int ranks, const int32_t *from, const int32_t *to,
                   uint32_t *pairs, float *y) {
#pragma omp parallel
  {
    beside_rows(low, rows, ranks, pairs);
    outer_rows(pairs, x, rows, columns, ranks, from, to, y);
  }
}
void punster_rope(float *x, long rows, int heads, int turned, int size, const float *cosine, const float *sine, float sign) {
#pragma omp parallel
  rope_rows(x, rows, heads, turned, size, cosine, sine, sign);
}
