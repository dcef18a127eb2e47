/* Attention of one query at a time, in fp32: what decoding does, and the same numbers for whole prefix trees. */
#pragma once
#include "between.h"

typedef struct { const float *k, *v; const int64_t *path; long stride, count; } Keys; /* the i-th lies at path[i], or at i */
INLINE long key_at(const Keys *s, long i) { return (s->path ? s->path[i] : i) * s->stride; }
/* out[i] = scale x . (the i-th row of base); out has room for count + 3 */
INLINE void dots(const float *x, const float *base, const Keys *s, const int size, float scale, float *out) {
  const long last = s->count - 1;
  for (long i = 0; i < s->count; i += 4) {
    const float *row[4];
    __m512 sum[4];
    for (int t = 0; t < 4; t++) row[t] = base + key_at(s, i + t < last ? i + t : last), sum[t] = _mm512_setzero_ps();
    for (int c = 0; c < size; c += 16) {
      const __m512 v = _mm512_loadu_ps(x + c);
      for (int t = 0; t < 4; t++) sum[t] = _mm512_fmadd_ps(v, _mm512_loadu_ps(row[t] + c), sum[t]);
    }
    _mm_storeu_ps(out + i, _mm_mul_ps(sums_of(sum[0], sum[1], sum[2], sum[3]), _mm_set1_ps(scale)));
  }
}
/* out = times sum of weight[i] times the i-th row of base */
INLINE void weighted(const int blocks, const float *weight, const float *base, const Keys *s, float times, float *out) {
  __m512 sum[4];
  for (int b = 0; b < blocks; b++) sum[b] = _mm512_setzero_ps();
  for (long i = 0; i < s->count; i++) {
    const float *row = base + key_at(s, i);
    for (int b = 0; b < blocks; b++) sum[b] = _mm512_fmadd_ps(_mm512_set1_ps(weight[i]), _mm512_loadu_ps(row + 16 * b), sum[b]);
  }
  for (int b = 0; b < blocks; b++) _mm512_storeu_ps(out + 16 * b, _mm512_mul_ps(sum[b], _mm512_set1_ps(times)));
}
INLINE void weighted_sum(const float *weight, const float *base, const Keys *s, const int size, float times, float *out) {
  int i = 0;
  for (; i + 64 <= size; i += 64) weighted(4, weight, base + i, s, times, out + i);
  if (i < size) weighted(2, weight, base + i, s, times, out + i);
}
INLINE float attend_sized(const float *q, const Keys *s, const int size, float *score, float *out) {
  dots(q, s->k, s, size, 1 / sqrtf(size), score);
  const __m512 lowest = _mm512_set1_ps(-INFINITY);
  __m512 top = lowest, sum = _mm512_setzero_ps();
  for (long i = 0; i < s->count; i += 16) top = _mm512_max_ps(top, _mm512_mask_loadu_ps(lowest, inside_of(s->count - i), score + i));
  const float most = _mm512_reduce_max_ps(top);
  for (long i = 0; i < s->count; i += 16) {
    const __mmask16 inside = inside_of(s->count - i);
    const __m512 e = vexp(_mm512_sub_ps(_mm512_maskz_loadu_ps(inside, score + i), _mm512_set1_ps(most)));
    sum = _mm512_mask_add_ps(sum, inside, sum, e);
    _mm512_mask_storeu_ps(score + i, inside, e);
  }
  const float total = _mm512_reduce_add_ps(sum);
  weighted_sum(score, s->v, s, size, 1 / total, out);
  return most + logf(total);
}
/* softmax attention of one query; the log of its partition sum. score has room for count + 3 */
static float attend_one(const float *q, const Keys *s, int size, float *score, float *out) {
  return size == 64 ? attend_sized(q, s, 64, score, out) : attend_sized(q, s, size, score, out);
}

/* Nodes of a prefix tree: node n sees nodes[first[n] - position[n]] ... nodes[first[n]], itself the last. */
typedef struct {
  int32_t heads, kv_heads, size;
  int64_t count;
  const int64_t *nodes, *first, *position;
} Tree;
INLINE Keys keys_of(const Tree *t, const float *qkv, int kv, long n) {
  const float *k = qkv + (t->heads + kv) * t->size;
  return (Keys){k, k + t->kv_heads * t->size, t->nodes + t->first[n] - t->position[n], (t->heads + 2 * t->kv_heads) * t->size,
                t->position[n] + 1};
}

/* qkv (N, (H + 2K) h) -> out (N, H h); log_total (N, H) */
void punster_attend(const Tree *t, const float *qkv, float *out, float *log_total) {
  const int group = t->heads / t->kv_heads, size = t->size;
#pragma omp parallel for schedule(dynamic, 16)
  for (long n = 0; n < t->count; n++) {
    const float *q = qkv + n * (t->heads + 2 * t->kv_heads) * size;
    float score[t->position[n] + 4];
    for (int head = 0; head < t->heads; head++) {
      const Keys seen = keys_of(t, qkv, head / group, n);
      log_total[n * t->heads + head] = attend_one(q + head * size, &seen, size, score, out + (n * t->heads + head) * size);
    }
  }
}

/* Who looks at whom: readers of key j are reader[begin[j]] ... with j at place[...] of their paths; from[n]: entries before node n's. */
void punster_readers(const Tree *t, int64_t *from, int64_t *begin, int64_t *reader, int64_t *place) {
  memset(begin, 0, (t->count + 1) * 8);
  from[0] = 0;
  for (long n = 0; n < t->count; n++) {
    from[n + 1] = from[n] + t->position[n] + 1;
    for (long i = 0; i <= t->position[n]; i++) begin[t->nodes[t->first[n] - t->position[n] + i] + 1]++;
  }
  for (long n = 0; n < t->count; n++) begin[n + 1] += begin[n];
  for (long n = 0; n < t->count; n++)
    for (long i = 0; i <= t->position[n]; i++) {
      const long at = begin[t->nodes[t->first[n] - t->position[n] + i]]++;
      reader[at] = n;
      place[at] = i;
    }
  for (long n = t->count; n > 0; n--) begin[n] = begin[n - 1];
  begin[0] = 0;
}

/* dq of one query, the weights of its keys, and the gradient of its scores */
INLINE void of_query(const float *q, const float *g, const Keys *s, const int size, float total, int heads, float *share, float *slope,
                     float *dq) {
  float p[s->count + 3], d[s->count + 3];
  dots(q, s->k, s, size, 1 / sqrtf(size), p);
  dots(g, s->v, s, size, 1, d);
  __m512 along = _mm512_setzero_ps();
  for (long i = 0; i < s->count; i += 16) {
    const __mmask16 inside = inside_of(s->count - i);
    const __m512 e = vexp(_mm512_sub_ps(_mm512_maskz_loadu_ps(inside, p + i), _mm512_set1_ps(total)));
    _mm512_mask_storeu_ps(p + i, inside, e);
    along = _mm512_mask3_fmadd_ps(e, _mm512_maskz_loadu_ps(inside, d + i), along, inside);
  }
  const float mean = _mm512_reduce_add_ps(along), scale = 1 / sqrtf(size);
  for (long i = 0; i < s->count; i++) {
    d[i] = p[i] * (d[i] - mean) * scale;
    share[i * heads] = p[i];
    slope[i * heads] = d[i];
  }
  weighted_sum(d, s->k, s, size, 1, dq);
}
/* dk and dv of one key and 16 x blocks of its columns */
INLINE void of_readers(const int blocks, const Tree *t, const int64_t *from, const int64_t *reader, const int64_t *place, long begin,
                       long end, int kv, const float *qkv, const float *dout, const float *share, const float *slope, float *dk) {
  const int heads = t->heads, group = heads / t->kv_heads, size = t->size;
  const long wide = (heads + 2L * t->kv_heads) * size;
  __m512 of_k[4], of_v[4];
  for (int b = 0; b < blocks; b++) of_k[b] = of_v[b] = _mm512_setzero_ps();
  for (long e = begin; e < end; e++) {
    const long n = reader[e], at = (from[n] + place[e]) * heads;
    for (int head = kv * group; head < (kv + 1) * group; head++) {
      const __m512 p = _mm512_set1_ps(share[at + head]), d = _mm512_set1_ps(slope[at + head]);
      const float *q = qkv + n * wide + head * size, *g = dout + (n * heads + head) * size;
      for (int b = 0; b < blocks; b++) {
        of_k[b] = _mm512_fmadd_ps(d, _mm512_loadu_ps(q + 16 * b), of_k[b]);
        of_v[b] = _mm512_fmadd_ps(p, _mm512_loadu_ps(g + 16 * b), of_v[b]);
      }
    }
  }
  for (int b = 0; b < blocks; b++) {
    _mm512_storeu_ps(dk + 16 * b, of_k[b]);
    _mm512_storeu_ps(dk + t->kv_heads * size + 16 * b, of_v[b]);
  }
}

/* The gradient dqkv of dout. share and slope (entries x H): attention weights, and the gradient of the scores. */
void punster_attend_back(const Tree *t, const int64_t *from, const int64_t *begin, const int64_t *reader, const int64_t *place,
                         const float *qkv, const float *log_total, const float *dout, float *share, float *slope, float *dqkv) {
  const int heads = t->heads, group = heads / t->kv_heads, size = t->size;
  const long wide = (heads + 2L * t->kv_heads) * size;
#pragma omp parallel
  {
#pragma omp for schedule(dynamic, 16)
    for (long n = 0; n < t->count; n++)
      for (int head = 0; head < heads; head++) {
        const Keys s = keys_of(t, qkv, head / group, n);
        const float *q = qkv + n * wide + head * size, *g = dout + (n * heads + head) * size;
        const long at = from[n] * heads + head;
        float *dq = dqkv + n * wide + head * size;
        const float total = log_total[n * heads + head];
        if (size == 64) of_query(q, g, &s, 64, total, heads, share + at, slope + at, dq);
        else of_query(q, g, &s, size, total, heads, share + at, slope + at, dq);
      }
#pragma omp for schedule(dynamic, 1) /* what many share comes first, and is a good part of all */
    for (long j = 0; j < t->count; j++)
      for (int kv = 0; kv < t->kv_heads; kv++) {
        float *dk = dqkv + j * wide + (heads + kv) * size;
        int c = 0;
        for (; c + 64 <= size; c += 64)
          of_readers(4, t, from, reader, place, begin[j], begin[j + 1], kv, qkv + c, dout + c, share, slope, dk + c);
        if (c < size) of_readers(2, t, from, reader, place, begin[j], begin[j + 1], kv, qkv + c, dout + c, share, slope, dk + c);
      }
  }
}
