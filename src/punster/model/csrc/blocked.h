/* Attention of long rows in blocks of 64 queries x 64 keys: products of bf16 pairs, sums and softmax in fp32 (Dao 2023, with queries
   in the lanes of a register, so that maximum and sum over keys are plain operations on registers).

   A run is what one row adds to the prefix tree: queries from <= position < end of the path that starts at nodes[start]. The path is
   packed once a head of keys, in blocks: place `at` (a multiple of 64) and on, zeros behind its end. */
#pragma once
#include "attention.h"

#define SIDE 64
typedef struct {
  int32_t heads, kv_heads, size;
  int64_t runs, padded; /* padded: places of all runs together */
  const int64_t *nodes, *start, *from, *end, *at;
} Runs;
typedef struct { bf16 *rows, *turned; } Copy; /* blocks of (64, h), and of (h, 64) */

INLINE Copy copy_of(const Runs *t, bf16 *packed, int which, int kv, long at) {
  const long all = t->padded * t->size;
  bf16 *base = packed + (which * t->kv_heads + kv) * 2 * all + at * t->size;
  return (Copy){base, base + all};
}
/* 64 rows of h numbers each, in bf16; zeros where there is no row */
INLINE void gather_rows(const Runs *t, long run, long position, const float *base, long stride, float scale, bf16 *rows) {
  const __m512 times = _mm512_set1_ps(scale);
  for (int i = 0; i < SIDE; i++) {
    const float *x = position + i < t->end[run] ? base + t->nodes[t->start[run] + position + i] * stride : 0;
    for (int c = 0; c < t->size; c += 16)
      store_bf16(rows + i * t->size + c, x ? _mm512_mul_ps(times, _mm512_loadu_ps(x + c)) : _mm512_setzero_ps());
  }
}
/* (64, h) -> (h, 64) */
INLINE void turn_rows(const bf16 *rows, int size, bf16 *turned) {
  for (int c = 0; c < size; c++) for (int i = 0; i < SIDE; i++) turned[c * SIDE + i] = rows[i * size + c];
}
/* pairs of columns: (64, h) -> (h / 2, 64, 2) */
INLINE void pair_columns(const bf16 *rows, int size, uint32_t *pairs) {
  for (int i = 0; i < SIDE; i++)
    for (int c = 0; c < size / 2; c++) memcpy(pairs + c * SIDE + i, rows + i * size + 2 * c, 4);
}
/* pairs of rows: (64, h) -> (32, h, 2) */
INLINE void pair_rows(const bf16 *rows, int size, uint32_t *pairs) {
  for (int i = 0; i < SIDE / 2; i++)
    for (int c = 0; c < size; c += 16)
      _mm512_storeu_si512(pairs + i * size + c, pair_of(_mm256_loadu_si256((const __m256i *)(rows + 2 * i * size + c)),
                                                        _mm256_loadu_si256((const __m256i *)(rows + (2 * i + 1) * size + c))));
}

/* y (rows, 16 lanes) = or += a (rows, 2 pairs) times b (pairs, 16 lanes, 2); strides in elements */
INLINE void strip(const int rows, const int lanes, const bf16 *a, long a_stride, const uint32_t *b, long b_stride, int pairs, float *y,
                  long y_stride, int add) {
  __m512 sum[6][4];
#pragma GCC unroll 6
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
    for (int l = 0; l < lanes; l++) sum[r][l] = add ? _mm512_loadu_ps(y + r * y_stride + 16 * l) : _mm512_setzero_ps();
  for (int k = 0; k < pairs; k++) {
    __m512i w[4];
#pragma GCC unroll 4
    for (int l = 0; l < lanes; l++) w[l] = _mm512_loadu_si512(b + k * b_stride + 16 * l);
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) {
      int pair;
      memcpy(&pair, a + r * a_stride + 2 * k, 4);
#pragma GCC unroll 4
      for (int l = 0; l < lanes; l++) sum[r][l] = dot(sum[r][l], _mm512_set1_epi32(pair), w[l]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
    for (int l = 0; l < lanes; l++) _mm512_storeu_ps(y + r * y_stride + 16 * l, sum[r][l]);
}
/* the same for any even number of rows */
INLINE void strips(const int lanes, int rows, const bf16 *a, long a_stride, const uint32_t *b, long b_stride, int pairs, float *y,
                   long y_stride, int add) {
  for (int r = 0; r < rows; r += 6, a += 6 * a_stride, y += 6 * y_stride)
    if (rows - r >= 6) strip(6, lanes, a, a_stride, b, b_stride, pairs, y, y_stride, add);
    else if (rows - r == 4) strip(4, lanes, a, a_stride, b, b_stride, pairs, y, y_stride, add);
    else strip(2, lanes, a, a_stride, b, b_stride, pairs, y, y_stride, add);
}
static void times(int lanes, int rows, const bf16 *a, long a_stride, const uint32_t *b, long b_stride, int pairs, float *y, long y_stride,
                  int add) {
  if (lanes == 4) strips(4, rows, a, a_stride, b, b_stride, pairs, y, y_stride, add);
  else strips(2, rows, a, a_stride, b, b_stride, pairs, y, y_stride, add);
}
/* y (rows, h) += a (rows, 64) b, b a block of pairs of rows (32, h, 2) */
INLINE void times_wide(int rows, const bf16 *a, const uint32_t *b, int size, float *y) {
  int c = 0;
  for (; c + 64 <= size; c += 64) times(4, rows, a, SIDE, b + c, size, SIDE / 2, y + c, size, 1);
  if (c < size) times(2, rows, a, SIDE, b + c, size, SIDE / 2, y + c, size, 1);
}

enum { KEYS = 0, VALUES = 1 };
/* Keys and values of every run, packed; one of the two also turned. */
static void pack_rows(const Runs *t, const float *qkv, bf16 *packed, int turned) {
  const long wide = (t->heads + 2L * t->kv_heads) * t->size;
#pragma omp for schedule(dynamic, 1) collapse(2)
  for (long run = 0; run < t->runs; run++)
    for (int part = 0; part < 2 * t->kv_heads; part++)
      for (long p = 0; p < t->end[run]; p += SIDE) {
        const Copy copy = copy_of(t, packed, part / t->kv_heads, part % t->kv_heads, t->at[run] + p);
        gather_rows(t, run, p, qkv + (t->heads + part) * t->size, wide, 1, copy.rows);
        if (part / t->kv_heads == turned) turn_rows(copy.rows, t->size, copy.turned);
      }
}

typedef struct { float score[SIDE * SIDE]; uint32_t pairs[SIDE / 2 * SIDE]; } Square;
/* Lanes 16 l ... of 64 queries from `query` on that may look at position `key` */
INLINE __mmask16 sees(long key, long query, int l) {
  const long hidden = key - query - 16 * l; /* so many lanes come before the key */
  return hidden <= 0 ? 0xffff : hidden >= 16 ? 0 : 0xffff << hidden;
}
INLINE int keys_in(long p, long query) { const long n = query + SIDE - p; return n < SIDE ? (n + 1) / 2 * 2 : SIDE; }

/* One block of queries of one head: out and log_total at their nodes. */
static void attend_block(const Runs *t, const float *qkv, bf16 *packed, long run, int head, long query, float *out, float *log_total) {
  const int size = t->size, kv = head / (t->heads / t->kv_heads);
  const long wide = (t->heads + 2L * t->kv_heads) * size;
  Square s;
  bf16 rows[SIDE * size];
  uint32_t q[SIDE / 2 * size];
  float found[SIDE * size]; /* (h, 64) */
  gather_rows(t, run, query, qkv + head * size, wide, 1 / sqrtf(size), rows);
  pair_columns(rows, size, q);
  __m512 most[4], total[4];
  for (int l = 0; l < 4; l++) most[l] = _mm512_set1_ps(-INFINITY), total[l] = _mm512_setzero_ps();
  for (long p = 0; p < t->end[run] && p < query + SIDE; p += SIDE) {
    const Copy k = copy_of(t, packed, KEYS, kv, t->at[run] + p), v = copy_of(t, packed, VALUES, kv, t->at[run] + p);
    const int keys = keys_in(p, query);
    times(4, keys, k.rows, size, q, SIDE, size / 2, s.score, SIDE, 0);
    for (int l = 0; l < 4; l++) {
      __m512 top = most[l], sum = _mm512_setzero_ps();
      for (int j = 0; j < keys; j++)
        top = _mm512_mask_max_ps(top, sees(p + j, query, l), top, _mm512_loadu_ps(s.score + j * SIDE + 16 * l));
      for (int j = 0; j < keys; j += 2) {
        const __m512 a = _mm512_sub_ps(_mm512_loadu_ps(s.score + j * SIDE + 16 * l), top),
                     b = _mm512_sub_ps(_mm512_loadu_ps(s.score + (j + 1) * SIDE + 16 * l), top);
        const __m512 ea = _mm512_maskz_mov_ps(sees(p + j, query, l), vexp(a)), eb = _mm512_maskz_mov_ps(sees(p + j + 1, query, l), vexp(b));
        sum = _mm512_add_ps(sum, _mm512_add_ps(ea, eb));
        _mm512_storeu_si512(s.pairs + j / 2 * SIDE + 16 * l, pair_of(halves(ea), halves(eb)));
      }
      const __m512 shrink = vexp(_mm512_sub_ps(most[l], top));
      total[l] = _mm512_fmadd_ps(total[l], shrink, sum);
      for (int c = 0; p && c < size; c++)
        _mm512_storeu_ps(found + c * SIDE + 16 * l, _mm512_mul_ps(shrink, _mm512_loadu_ps(found + c * SIDE + 16 * l)));
      most[l] = top;
    }
    times(4, size, v.turned, SIDE, s.pairs, SIDE, keys / 2, found, SIDE, p > 0);
  }
  float sums[SIDE], tops[SIDE];
  for (int l = 0; l < 4; l++) _mm512_storeu_ps(sums + 16 * l, total[l]), _mm512_storeu_ps(tops + 16 * l, most[l]);
  for (int i = 0; i < SIDE && query + i < t->end[run]; i++) {
    const long node = t->nodes[t->start[run] + query + i];
    const float times = 1 / sums[i];
    for (int c = 0; c < size; c++) out[(node * t->heads + head) * size + c] = found[c * SIDE + i] * times;
    log_total[node * t->heads + head] = tops[i] + logf(sums[i]);
  }
}

/* As punster_attend. packed: room for 4 K padded h. */
void punster_attend_runs(const Runs *t, const float *qkv, bf16 *packed, float *out, float *log_total) {
#pragma omp parallel
  {
    pack_rows(t, qkv, packed, VALUES);
#pragma omp for schedule(dynamic, 1) collapse(2)
    for (long run = 0; run < t->runs; run++)
      for (int head = 0; head < t->heads; head++)
        for (long query = t->from[run]; query < t->end[run]; query += SIDE)
          attend_block(t, qkv, packed, run, head, query, out, log_total);
  }
}

/* One block of queries of one head: their dq, and what they add to dk and dv of the run (padded, h). */
static void attend_block_back(const Runs *t, const float *qkv, bf16 *packed, const bf16 *out, const float *log_total, const float *dout,
                              long run, int head, long query, float *dk, float *dv, float *dqkv) {
  const int size = t->size, kv = head / (t->heads / t->kv_heads);
  const long wide = (t->heads + 2L * t->kv_heads) * size;
  const float scale = 1 / sqrtf(size);
  Square s, d;
  bf16 rows[SIDE * size], share[SIDE * SIDE], slope[SIDE * SIDE];
  uint32_t q[SIDE / 2 * size], q_rows[SIDE / 2 * size], g[SIDE / 2 * size], g_rows[SIDE / 2 * size];
  float dq[SIDE * size], total[SIDE], along[SIDE];
  gather_rows(t, run, query, qkv + head * size, wide, scale, rows);
  pair_columns(rows, size, q);
  pair_rows(rows, size, q_rows);
  gather_rows(t, run, query, dout + head * size, (long)t->heads * size, 1, rows);
  pair_columns(rows, size, g);
  pair_rows(rows, size, g_rows);
  for (int i = 0; i < SIDE; i++) { /* sum of p dp over the keys is the product of gradient and result */
    if (query + i >= t->end[run]) { total[i] = along[i] = 0; continue; }
    const long at = t->nodes[t->start[run] + query + i] * t->heads + head;
    __m512 sum = _mm512_setzero_ps();
    for (int c = 0; c < size; c += 16) sum = _mm512_fmadd_ps(_mm512_loadu_ps(dout + at * size + c), load_bf16(out + at * size + c), sum);
    along[i] = _mm512_reduce_add_ps(sum);
    total[i] = log_total[at];
  }
  for (long p = 0; p < t->end[run] && p < query + SIDE; p += SIDE) {
    const Copy k = copy_of(t, packed, KEYS, kv, t->at[run] + p), v = copy_of(t, packed, VALUES, kv, t->at[run] + p);
    const int keys = keys_in(p, query);
    times(4, keys, k.rows, size, q, SIDE, size / 2, s.score, SIDE, 0);
    times(4, keys, v.rows, size, g, SIDE, size / 2, d.score, SIDE, 0);
    for (int l = 0; l < 4; l++) {
      const __m512 of = _mm512_loadu_ps(total + 16 * l), mean = _mm512_loadu_ps(along + 16 * l);
      for (int j = 0; j < keys; j += 2) {
        __m256i both[2];
        for (int o = 0; o < 2; o++) {
          const long at = (j + o) * SIDE + 16 * l;
          const __m512 e = _mm512_maskz_mov_ps(sees(p + j + o, query, l), vexp(_mm512_sub_ps(_mm512_loadu_ps(s.score + at), of)));
          both[o] = halves(_mm512_mul_ps(e, _mm512_sub_ps(_mm512_loadu_ps(d.score + at), mean)));
          store_bf16(share + at, e);
          _mm256_storeu_si256((__m256i *)(slope + at), both[o]);
        }
        _mm512_storeu_si512(d.pairs + j / 2 * SIDE + 16 * l, pair_of(both[0], both[1]));
      }
    }
    times(4, size, k.turned, SIDE, d.pairs, SIDE, keys / 2, dq, SIDE, p > 0);
    times_wide(keys, slope, q_rows, size, dk + p * size);
    times_wide(keys, share, g_rows, size, dv + p * size);
  }
  for (int i = 0; i < SIDE && query + i < t->end[run]; i++) {
    const long node = t->nodes[t->start[run] + query + i];
    for (int c = 0; c < size; c++) dqkv[node * wide + head * size + c] = dq[c * SIDE + i] * scale;
  }
}

/* As punster_attend_back. out (N, H h) in bf16; sums (H, 2, padded, h): what the queries of each head add to keys and values. The gradient
   of a node is the sum over the runs whose paths it lies on, in their order. */
void punster_attend_runs_back(const Runs *t, const float *qkv, bf16 *packed, const bf16 *out, const float *log_total, const float *dout,
                              float *sums, float *dqkv, long count) {
  const int size = t->size, group = t->heads / t->kv_heads;
  const long wide = (t->heads + 2L * t->kv_heads) * size, all = t->padded * size;
#pragma omp parallel
  {
    pack_rows(t, qkv, packed, KEYS);
#pragma omp for schedule(dynamic, 1) collapse(2)
    for (long run = 0; run < t->runs; run++)
      for (int head = 0; head < t->heads; head++) {
        float *dk = sums + 2 * head * all + t->at[run] * size, *dv = dk + all;
        const long padded = (t->end[run] + SIDE - 1) / SIDE * SIDE;
        memset(dk, 0, padded * size * 4);
        memset(dv, 0, padded * size * 4);
        for (long query = t->from[run]; query < t->end[run]; query += SIDE)
          attend_block_back(t, qkv, packed, out, log_total, dout, run, head, query, dk, dv, dqkv);
      }
#pragma omp for schedule(static)
    for (int part = 0; part < 2 * t->kv_heads; part++) {
      float *of_part = dqkv + (t->heads + part) * size;
      for (long n = 0; n < count; n++) memset(of_part + n * wide, 0, size * 4);
      for (long run = 0; run < t->runs; run++)
        for (long p = 0; p < t->end[run]; p++) {
          float *to = of_part + t->nodes[t->start[run] + p] * wide;
          for (int head = part % t->kv_heads * group; head < (part % t->kv_heads + 1) * group; head++) {
            const float *own = sums + (2 * head + part / t->kv_heads) * all + (t->at[run] + p) * size;
            for (int c = 0; c < size; c += 16) _mm512_storeu_ps(to + c, _mm512_add_ps(_mm512_loadu_ps(to + c), _mm512_loadu_ps(own + c)));
          }
        }
    }
  }
}
