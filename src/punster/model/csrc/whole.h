/* Products without AVX512_BF16: AVX2 has none for bf16, but one for pairs of 16-bit whole numbers, twice as fast as products in fp32.
   Weights are 12 bits, a sign and a scale a column, rows 13 bits, a sign and a scale for 64 inputs: as much as fits, as a block's sum may take
   31 bits, and less is lost than by rounding rows to bf16, which they are. */
#pragma once
#include "products.h"

#define RUN 64 /* inputs of a block */
#define MOST_OF_ROW 8191
#define MOST_OF_WEIGHT 4095

INLINE long runs_of(long in) { return (in + RUN - 1) / RUN; }
/* scales of the columns lie behind the weights */
INLINE float *scales_of(const uint32_t *w, long in, long out) { return (float *)(w + (out + PANEL - 1) / PANEL * (in / 2) * PANEL); }

void punster_pack(const bf16 *w, int out, int in, long row_stride, long column_stride, uint32_t *packed) {
  float *scale = scales_of(packed, in, out);
#pragma omp parallel for schedule(static)
  for (long panel = 0; panel < (out + PANEL - 1) / PANEL; panel++)
    for (int c = 0; c < PANEL; c++) {
      const long column = panel * PANEL + c;
      const bf16 *at = w + column * row_stride;
      float most = 0, lost = 0; /* lost: 0, or NaN where there is one, which a maximum passes over */
      for (long k = 0; k < in && column < out; k++) {
        const float v = bf16_value(at[k * column_stride]);
        most = fmaxf(most, fabsf(v)), lost += 0 * v;
      }
      scale[column] = (most > 0 ? most / MOST_OF_WEIGHT : 1) + lost;
      for (long k = 0; k < in / 2; k++) {
        int whole[2] = {0, 0};
        for (int i = 0; i < 2 && column < out && lost == 0; i++) whole[i] = lrintf(bf16_value(at[(2 * k + i) * column_stride]) / scale[column]);
        packed[(column / 16 * (in / 2) + k) * 16 + column % 16] = (uint16_t)whole[0] | (uint32_t)whole[1] << 16;
      }
    }
}

/* x (rows, in) bf16 -> whole numbers, and the size of a unit in each block */
static void whole_rows(const bf16 *x, long rows, long in, int16_t *whole, float *unit) {
#pragma omp for schedule(static)
  for (long job = 0; job < rows * runs_of(in); job++) {
    const long row = job / runs_of(in), begin = job % runs_of(in) * RUN, end = begin + RUN < in ? begin + RUN : in;
    const bf16 *v = x + row * in;
    const long even = begin + (end - begin) / 16 * 16;
    __m512 top = _mm512_set1_ps(1e-30f), none = _mm512_setzero_ps(); /* none: 0, or NaN as above */
    for (long c = begin; c < even; c += 16) {
      const __m512 t = load_bf16(v + c);
      top = _mm512_max_ps(top, _mm512_abs_ps(t));
      none = _mm512_fmadd_ps(t, _mm512_setzero_ps(), none);
    }
    float most = _mm512_reduce_max_ps(top), lost = _mm512_reduce_add_ps(none);
    for (long c = even; c < end; c++) most = fmaxf(most, fabsf(bf16_value(v[c]))), lost += 0 * bf16_value(v[c]);
    const float size = most / MOST_OF_ROW + lost, inverse = 1 / size;
    unit[job] = size;
    for (long c = begin; c < even; c += 16) {
      const __m512 t = _mm512_mul_ps(load_bf16(v + c), _mm512_set1_ps(inverse));
      const __m256i both = _mm256_packs_epi32(_mm256_cvtps_epi32(t.a), _mm256_cvtps_epi32(t.b));
      _mm256_storeu_si256((__m256i *)(whole + row * in + c), _mm256_permute4x64_epi64(both, 0xd8));
    }
    for (long c = even; c < end; c++) whole[row * in + c] = lost == 0 ? lrintf(bf16_value(v[c]) * inverse) : 0;
  }
}

/* sum += both products of a pair; as text, since GCC moves the broadcasts together and then has no register left for sums */
#define PAIRS(sum, x, w) do { \
  __m256i both; \
  __asm__ volatile("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=&x"(both) : "x"(x), "x"(w)); \
} while (0)

/* 16 columns from `first` on */
INLINE void tile(const int rows, const int16_t *x, const float *unit, const Product *p, const float *low, long first, const float *base,
                 void *y, int mode) {
  const long in = p->in, blocks = runs_of(in);
  const uint32_t *w = p->w + first * (in / 2);
  float part[TALL][16] __attribute__((aligned(32)));
  for (long b = 0; b < blocks; b++) {
    const long end = ((b + 1) * RUN < in ? (b + 1) * RUN : in) / 2;
    __m256i sum[TALL][2];
    for (int r = 0; r < rows; r++) sum[r][0] = sum[r][1] = _mm256_setzero_si256();
    for (long k = b * RUN / 2; k < end; k++, w += 16) {
      const __m256i w0 = _mm256_loadu_si256((const __m256i *)w), w1 = _mm256_loadu_si256((const __m256i *)(w + 8));
#pragma GCC unroll 6
      for (int r = 0; r < rows; r++) {
        int pair;
        memcpy(&pair, x + r * in + 2 * k, 4);
        const __m256i v = _mm256_set1_epi32(pair);
        PAIRS(sum[r][0], v, w0);
        PAIRS(sum[r][1], v, w1);
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) {
      const __m256 size = _mm256_set1_ps(unit[r * blocks + b]);
      for (int h = 0; h < 2; h++) {
        const __m256 f = _mm256_cvtepi32_ps(sum[r][h]);
        _mm256_store_ps(part[r] + 8 * h, b ? _mm256_fmadd_ps(f, size, _mm256_load_ps(part[r] + 8 * h)) : _mm256_mul_ps(f, size));
      }
    }
  }
  __m512 sum[TALL][3];
  const __m512 scale = _mm512_loadu_ps(scales_of(p->w, in, p->out) + first);
#pragma GCC unroll 6
  for (int r = 0; r < rows; r++) sum[r][0] = _mm512_mul_ps(_mm512_loadu_ps(part[r]), scale);
  finish(rows, 1, sum, p, low, first, 1, base, y, mode);
}

/* y = the product, or base (which may be y) + the product; room: rows x (in + 2 for each block) */
static void product_rows(const bf16 *x, long rows, const Product *p, int16_t *room, const float *low, const float *base, void *y, int mode) {
  const long strips = (p->out + 15) / 16, chunks = rows ? (rows + CHUNK - 1) / CHUNK : 1, in = p->in;
  const long share = ((rows + chunks - 1) / chunks + TALL - 1) / TALL * TALL; /* even chunks, in whole tiles */
  float *unit = (float *)(room + rows * in); /* `in` is even */
  whole_rows(x, rows, in, room, unit);
#pragma omp for schedule(static)
  for (long job = 0; job < chunks * strips; job++) {
    const long begin = job % chunks * share, end = begin + share < rows ? begin + share : rows, first = job / chunks * 16;
    for (long row = begin; row < end; row += TALL) {
      const int16_t *at = room + row * in;
      const float *size = unit + row * runs_of(in), *beside = low ? low + row * p->update.ranks : 0, *from = base ? base + row * p->out : 0;
      void *to = (char *)y + row * p->out * (mode == STORE_BF16 ? 2 : 4);
      switch (end - row) {
#define CASE(n) case n: tile(n, at, size, p, beside, first, from, to, mode); break;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5)
        default: tile(TALL, at, size, p, beside, first, from, to, mode);
      }
    }
  }
}
