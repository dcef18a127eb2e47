/* Over the vocabulary: log-probs, comparison of two models, choice of a token. */
#pragma once
#include "common.h"

typedef struct { float most, total, log_total; } Partition; /* of exp(scale logits) */
static Partition partition_of(const float *logits, int size, float scale) {
  const __m512 s = _mm512_set1_ps(scale), lowest = _mm512_set1_ps(-INFINITY);
  __m512 most = lowest, total = _mm512_setzero_ps();
  for (int c = 0; c < size; c += 16)
    most = _mm512_max_ps(most, _mm512_mul_ps(s, _mm512_mask_loadu_ps(lowest, inside_of(size - c), logits + c)));
  Partition p = {.most = _mm512_reduce_max_ps(most)};
  for (int c = 0; c < size; c += 16) {
    const __mmask16 inside = inside_of(size - c);
    const __m512 x = _mm512_sub_ps(_mm512_mul_ps(s, _mm512_maskz_loadu_ps(inside, logits + c)), _mm512_set1_ps(p.most));
    total = _mm512_mask_add_ps(total, inside, total, vexp(x));
  }
  p.total = _mm512_reduce_add_ps(total);
  p.log_total = p.most + logf(p.total);
  return p;
}

/* log-prob of each row's target, and where they are wanted the probabilities in bf16, 0 at the target: its slope is 1 - p, which a
   rounded p would lose */
void punster_log_probs(const float *logits, long rows, int size, float scale, const int64_t *targets, float *log_prob, bf16 *probs,
                       int stride) {
#pragma omp parallel for schedule(static)
  for (long row = 0; row < rows; row++) {
    const float *x = logits + row * size;
    const Partition p = partition_of(x, size, scale);
    log_prob[row] = x[targets[row]] * scale - p.log_total;
    for (int c = size; probs && c < stride; c++) probs[row * stride + c] = 0;
    for (int c = 0; probs && c < size; c += 16) {
      const __mmask16 inside = inside_of(size - c);
      const __m512 e = _mm512_sub_ps(_mm512_mul_ps(_mm512_set1_ps(scale), _mm512_maskz_loadu_ps(inside, x + c)), _mm512_set1_ps(p.most));
      const __m512 v = _mm512_mul_ps(vexp(e), _mm512_set1_ps(1 / p.total));
      store_halves(probs + row * stride + c, inside, halves(v));
    }
    if (probs) probs[row * stride + targets[row]] = 0;
  }
}

/* out (4, rows): log-probs of the targets under both, entropy of the first, exact KL(first || second); without a second two rows */
void punster_compare(const float *first, const float *second, long rows, int size, float scale, const int64_t *targets, float *out) {
#pragma omp parallel for schedule(static)
  for (long row = 0; row < rows; row++) {
    const float *x = first + row * size, *y = second ? second + row * size : x;
    const Partition p = partition_of(x, size, scale), q = second ? partition_of(y, size, scale) : p;
    __m512 own = _mm512_setzero_ps(), gap = own;
    for (int c = 0; c < size; c += 16) {
      const __mmask16 inside = inside_of(size - c);
      const __m512 a = _mm512_sub_ps(_mm512_mul_ps(_mm512_set1_ps(scale), _mm512_maskz_loadu_ps(inside, x + c)), _mm512_set1_ps(p.log_total));
      const __m512 b = _mm512_sub_ps(_mm512_mul_ps(_mm512_set1_ps(scale), _mm512_maskz_loadu_ps(inside, y + c)), _mm512_set1_ps(q.log_total));
      const __m512 e = vexp(a);
      own = _mm512_mask3_fmadd_ps(e, a, own, inside);
      gap = _mm512_mask3_fmadd_ps(e, _mm512_sub_ps(a, b), gap, inside);
    }
    out[row] = x[targets[row]] * scale - p.log_total;
    out[rows + row] = -_mm512_reduce_add_ps(own);
    if (!second) continue;
    out[2 * rows + row] = y[targets[row]] * scale - q.log_total;
    out[3 * rows + row] = _mm512_reduce_add_ps(gap);
  }
}

/* One token a row by inverse CDF: the smallest whose cumulative probability exceeds u, never one of probability 0; its log-prob */
void punster_choose(const float *logits, long rows, int size, float scale, const float *uniform, int64_t *token, float *log_prob) {
#pragma omp parallel for schedule(static)
  for (long row = 0; row < rows; row++) {
    const float *x = logits + row * size;
    const Partition p = partition_of(x, size, scale);
    const __m512 s = _mm512_set1_ps(scale), most = _mm512_set1_ps(p.most), lowest = _mm512_set1_ps(-87.f);
    const double target = (double)uniform[row] * p.total;
    double before = 0;
    long last = 0, found = -1; /* the last token with mass serves where rounding leaves the target out of reach */
    for (int c = 0; c < size && found < 0; c += 16) {
      const __m512 e = _mm512_sub_ps(_mm512_mul_ps(s, _mm512_maskz_loadu_ps(inside_of(size - c), x + c)), most);
      const __mmask16 alive = _mm512_mask_cmp_ps_mask(inside_of(size - c), e, lowest, _CMP_GT_OQ);
      if (!alive) continue;
      const __m512 mass = _mm512_maskz_mov_ps(alive, vexp(e));
      last = c + 31 - __builtin_clz((unsigned)alive);
      const double here = _mm512_reduce_add_ps(mass);
      if (before + here > target) {
        float each[16];
        _mm512_storeu_ps(each, mass);
        double sum = before;
        for (int i = 0; i < 16 && found < 0; i++)
          if (each[i] > 0 && (sum += each[i]) > target) found = c + i;
      }
      before += here;
    }
    token[row] = found < 0 ? last : found;
    log_prob[row] = x[token[row]] * scale - p.log_total;
  }
}
