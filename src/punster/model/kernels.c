/* What a step of a Llama or GPT-2 block does on CPUs with AVX512_BF16: products of bf16 rows with packed bf16 weights, their
   low-rank updates added in the same registers, and all that lies between the products in one pass each. Sums are fp32.

   Packed weights: panels of 48 output columns, each K/2 pairs of inputs long: w[panel][k/2][column][k%2].
   Low-rank updates: y += low b, low (rows, ranks) = x a^T; a (ranks, in), b (ranks, out). Rank r lives in the columns
   from[r] <= column < to[r] of the output and is zero elsewhere, as q, k and v have updates of their own.
   The functions named *_rows are worksharing: inside a parallel region every thread does its part, with a barrier behind. */
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#define PANEL 48
#define TALL 8     /* rows of a tile: 8 x 3 accumulators fill the registers */
#define CHUNK 256  /* rows that share a panel before the next one comes */
#define BLOCK 1024 /* pairs of inputs summed at a stretch */
#define INLINE static inline __attribute__((always_inline))
typedef uint16_t bf16;
enum { STORE = 0, ADD = 1, STORE_BF16 = 2 };
enum { SILU = 0, GELU_TANH = 1 };

typedef struct { const float *a, *b; int32_t ranks; const int32_t *from, *to; } Update;
typedef struct { const uint32_t *w; const float *bias; int32_t in, out; Update update; } Product;
typedef struct { const float *weight, *bias; float eps; } Norm; /* with a bias: LayerNorm, without: RMSNorm */
typedef struct { Norm before, between; Product attend, output, up, down; } Layer;

INLINE float bf16_value(bf16 x) { uint32_t u = (uint32_t)x << 16; float f; memcpy(&f, &u, 4); return f; }
INLINE __mmask16 inside_of(long left) { return left >= 16 ? 0xffff : left > 0 ? (1u << left) - 1 : 0; }
INLINE __m512 load_bf16(const bf16 *x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)x)), 16));
}
INLINE void store_bf16(bf16 *x, __m512 v) { _mm256_storeu_si256((__m256i *)x, (__m256i)_mm512_cvtneps_pbh(v)); }
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

/* ---- products ------------------------------------------------------------------------------------------------------ */
INLINE void tile(const int rows, const bf16 *x, const Product *p, const float *low, int panel, long begin, long end,
                 const float *base, void *y, int mode) {
  const long in = p->in, out = p->out;
  const Update *u = &p->update;
  const uint32_t *w = p->w + ((long)panel * (in / 2) + begin) * PANEL;
  __m512 sum[TALL][3];
  for (int r = 0; r < rows; r++) for (int c = 0; c < 3; c++) sum[r][c] = _mm512_setzero_ps();
  for (long k = begin; k < end; k++, w += PANEL) {
    const __m512bh w0 = (__m512bh)_mm512_loadu_si512(w), w1 = (__m512bh)_mm512_loadu_si512(w + 16),
                   w2 = (__m512bh)_mm512_loadu_si512(w + 32);
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
      int pair;
      memcpy(&pair, x + r * in + 2 * k, 4);
      const __m512bh v = (__m512bh)_mm512_set1_epi32(pair);
      sum[r][0] = _mm512_dpbf16_ps(sum[r][0], v, w0);
      sum[r][1] = _mm512_dpbf16_ps(sum[r][1], v, w1);
      sum[r][2] = _mm512_dpbf16_ps(sum[r][2], v, w2);
    }
  }
  __mmask16 inside[3];
  const long first = (long)panel * PANEL;
  for (int c = 0; c < 3; c++) inside[c] = inside_of(out - first - 16 * c);
  for (int r = 0; r < u->ranks && low; r++) {
    if (u->to[r] <= first || u->from[r] >= first + PANEL) continue;
    __m512 b[3];
    for (int c = 0; c < 3; c++) b[c] = _mm512_maskz_loadu_ps(inside[c], u->b + r * out + first + 16 * c);
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) {
      const __m512 v = _mm512_set1_ps(low[i * u->ranks + r]);
      for (int c = 0; c < 3; c++) sum[i][c] = _mm512_fmadd_ps(v, b[c], sum[i][c]);
    }
  }
#pragma GCC unroll 3
  for (int c = 0; c < 3; c++) {
    const long column = first + 16 * c;
    const __m512 bias = p->bias && !begin ? _mm512_maskz_loadu_ps(inside[c], p->bias + column) : _mm512_setzero_ps();
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
      __m512 v = _mm512_add_ps(sum[r][c], bias);
      if (mode == STORE_BF16) {
        _mm256_mask_storeu_epi16((bf16 *)y + r * out + column, inside[c], (__m256i)_mm512_cvtneps_pbh(v));
        continue;
      }
      if (mode == ADD) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(inside[c], base + r * out + column));
      _mm512_mask_storeu_ps((float *)y + r * out + column, inside[c], v);
    }
  }
}

/* y = the product, or base (which may be y) + the product */
static void product_rows(const bf16 *x, long rows, const Product *p, const float *low, const float *base, void *y, int mode) {
  const long panels = (p->out + PANEL - 1) / PANEL, chunks = rows ? (rows + CHUNK - 1) / CHUNK : 1;
  const long size = ((rows + chunks - 1) / chunks + TALL - 1) / TALL * TALL; /* even chunks, in whole tiles */
#pragma omp for schedule(static)
  for (long job = 0; job < chunks * panels; job++) {
    const long begin = job % chunks * size, end = begin + size < rows ? begin + size : rows;
    const int panel = job / chunks;
    /* long sums in blocks whose weights stay in the second-level cache; bf16 results are never split */
    const long pairs = p->in / 2, step = mode == STORE_BF16 ? pairs : BLOCK;
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

/* low[r] = sum of x[c] a[r, c] over the columns that rank r reads */
INLINE void low_of(const float *x, const float *a, int columns, int ranks, const int32_t *from, const int32_t *to, float *low) {
  for (int r = 0; r < ranks; r++) {
    const int begin = from ? from[r] : 0, end = to ? to[r] : columns;
    __m512 s0 = _mm512_setzero_ps(), s1 = s0;
    int c = begin;
    for (; c + 32 <= end; c += 32) {
      s0 = _mm512_fmadd_ps(_mm512_loadu_ps(x + c), _mm512_loadu_ps(a + (long)r * columns + c), s0);
      s1 = _mm512_fmadd_ps(_mm512_loadu_ps(x + c + 16), _mm512_loadu_ps(a + (long)r * columns + c + 16), s1);
    }
    float total = _mm512_reduce_add_ps(_mm512_add_ps(s0, s1));
    for (; c < end; c++) total += x[c] * a[(long)r * columns + c];
    low[r] = total;
  }
}

/* ---- between the products -------------------------------------------------------------------------------------------- */
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

/* ---- attention ---------------------------------------------------------------------------------------------------------- */
typedef struct { const float *k, *v; const int64_t *path; long stride, count; } Keys; /* the i-th lies at path[i], or at i */
INLINE long key_at(const Keys *s, long i) { return (s->path ? s->path[i] : i) * s->stride; }
INLINE __m128 sums_of(__m512 a, __m512 b, __m512 c, __m512 d) { /* of the 16 numbers in each */
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd)),
                high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512 all = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}
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

/* ---- one token for every row ------------------------------------------------------------------------------------------ */
/* What the gradients need of a layer, a row a token that was fed; without an x nothing is kept */
typedef struct {
  float *x; bf16 *normed; float *low, *stat, *qkv, *log_total; bf16 *found; float *low_found;
  float *between; bf16 *normed_between; float *low_up, *stat_between; bf16 *wide, *act; float *low_down;
} Kept;
typedef struct {
  int32_t d, heads, kv_heads, size, width, act, capacity;
  int64_t rows, length; /* keys that are there already */
  const int64_t *start; /* first real key of each row (left padding), or null */
  const float *cosine, *sine;
  float **keys, **values;
  float *x, *qkv, *out, *low;
  bf16 *narrow, *wide;
  const Kept *kept; /* of every layer, or null */
  int64_t offset;   /* rows that are kept already */
} Decode;

static Kept places(const Decode *s, const Layer *l, const Kept *k) {
  if (!k || !k->x) return (Kept){.normed = s->narrow, .low = s->low, .qkv = s->qkv, .found = s->narrow, .low_found = s->low,
                                 .normed_between = s->narrow, .low_up = s->low, .wide = s->wide, .act = s->narrow, .low_down = s->low};
  const long n = s->offset, d = s->d, inner = (long)s->heads * s->size;
  return (Kept){.x = k->x + n * d, .normed = k->normed + n * d, .low = k->low + n * l->attend.update.ranks, .stat = k->stat + 2 * n,
                .qkv = k->qkv + n * (s->heads + 2 * s->kv_heads) * s->size, .log_total = k->log_total + n * s->heads,
                .found = k->found + n * inner, .low_found = k->low_found + n * l->output.update.ranks, .between = k->between + n * d,
                .normed_between = k->normed_between + n * d, .low_up = k->low_up + n * l->up.update.ranks,
                .stat_between = k->stat_between + 2 * n, .wide = k->wide + n * l->up.out, .act = k->act + n * s->width,
                .low_down = k->low_down + n * l->down.update.ranks};
}
static void copy_rows(const float *x, long rows, int d, float *y) {
  if (!y) return;
#pragma omp for schedule(static) nowait
  for (long row = 0; row < rows; row++) memcpy(y + row * d, x + row * d, d * 4);
}

static void attend_rows(const Decode *s, const Kept *kept, float *keys, float *values, const Update *u) {
  const int group = s->heads / s->kv_heads, size = s->size, half = size / 2;
  const long now = s->length + 1, all = s->heads + 2 * s->kv_heads;
#pragma omp for schedule(static)
  for (long row = 0; row < s->rows; row++) {
    float *q = kept->qkv + row * all * size, *out = s->out + row * s->heads * size;
    for (int head = 0; s->cosine && head < s->heads + s->kv_heads; head++)
      rotate(q + head * size, half, s->cosine + row * half, s->sine + row * half, 1);
    const long begin = s->start ? s->start[row] : 0;
    float score[now - begin + 3];
    for (int kv = 0; kv < s->kv_heads; kv++) {
      float *k = keys + (row * s->kv_heads + kv) * s->capacity * size, *v = values + (row * s->kv_heads + kv) * s->capacity * size;
      memcpy(k + s->length * size, q + (s->heads + kv) * size, size * 4);
      memcpy(v + s->length * size, q + (s->heads + s->kv_heads + kv) * size, size * 4);
      const Keys seen = {k + begin * size, v + begin * size, 0, size, now - begin};
      for (int head = kv * group; head < (kv + 1) * group; head++) {
        const float total = attend_one(q + head * size, &seen, size, score, out + head * size);
        if (kept->log_total) kept->log_total[row * s->heads + head] = total;
      }
    }
    for (int c = 0; c < s->heads * size; c += 16) store_bf16(kept->found + row * s->heads * size + c, _mm512_loadu_ps(out + c));
    if (u->ranks) low_of(out, u->a, s->heads * size, u->ranks, 0, 0, kept->low_found + row * u->ranks);
  }
}

void punster_decode(const Decode *s, const Layer *layers, int first, int last) {
#pragma omp parallel
  for (int l = first; l < last; l++) {
    const Layer *at = layers + l;
    const Kept k = places(s, at, s->kept ? s->kept + l : 0);
    copy_rows(s->x, s->rows, s->d, k.x); /* of the rows that this thread norms next */
    norm_rows(s->x, s->rows, s->d, &at->before, &at->attend.update, k.normed, k.low, k.stat);
    product_rows(k.normed, s->rows, &at->attend, k.low, 0, k.qkv, STORE);
    attend_rows(s, &k, s->keys[l], s->values[l], &at->output.update);
    product_rows(k.found, s->rows, &at->output, k.low_found, s->x, s->x, ADD);
    copy_rows(s->x, s->rows, s->d, k.between);
    norm_rows(s->x, s->rows, s->d, &at->between, &at->up.update, k.normed_between, k.low_up, k.stat_between);
    product_rows(k.normed_between, s->rows, &at->up, k.low_up, 0, k.wide, STORE_BF16);
    act_rows(k.wide, s->rows, s->width, s->act, &at->down.update, k.act, k.low_down);
    product_rows(k.act, s->rows, &at->down, k.low_down, s->x, s->x, ADD);
  }
}

/* ---- over the vocabulary ------------------------------------------------------------------------------------------------ */
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
      _mm256_mask_storeu_epi16(probs + row * stride + c, inside, (__m256i)_mm512_cvtneps_pbh(v));
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

/* ---- the same, a call each, for whole sequences and their gradients ----------------------------------------------------- */
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
void punster_product(const bf16 *x, long rows, const Product *p, const float *low, const float *base, void *y, int mode) {
#pragma omp parallel
  product_rows(x, rows, p, low, base, y, mode);
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
void punster_outer(const float *low, const bf16 *x, long rows, int columns, int ranks, const int32_t *from, const int32_t *to, float *y) {
#pragma omp parallel
  outer_rows(low, x, rows, columns, ranks, from, to, y);
}
void punster_rope(float *x, long rows, int heads, int turned, int size, const float *cosine, const float *sine, float sign) {
#pragma omp parallel
  rope_rows(x, rows, heads, turned, size, cosine, sine, sign);
}
