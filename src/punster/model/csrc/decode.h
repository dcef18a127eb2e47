/* One token for every row. */
#pragma once
#include "attention.h"
#if WIDE
#include "halves.h"
#else
#include "whole.h"
#endif

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
  int16_t *room; /* see whole.h */
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
    if (u->ranks) low_of(1, out, u->a, s->heads * size, u->ranks, 0, 0, kept->low_found + row * u->ranks);
  }
}

void punster_decode(const Decode *s, const Layer *layers, int first, int last) {
#pragma omp parallel
  for (int l = first; l < last; l++) {
    const Layer *at = layers + l;
    const Kept k = places(s, at, s->kept ? s->kept + l : 0);
    copy_rows(s->x, s->rows, s->d, k.x); /* nobody writes s->x before two more barriers */
    norm_rows(s->x, s->rows, s->d, &at->before, &at->attend.update, k.normed, k.low, k.stat);
    product_rows(k.normed, s->rows, &at->attend, s->room, k.low, 0, k.qkv, STORE);
    attend_rows(s, &k, s->keys[l], s->values[l], &at->output.update);
    product_rows(k.found, s->rows, &at->output, s->room, k.low_found, s->x, s->x, ADD);
    copy_rows(s->x, s->rows, s->d, k.between);
    norm_rows(s->x, s->rows, s->d, &at->between, &at->up.update, k.normed_between, k.low_up, k.stat_between);
    product_rows(k.normed_between, s->rows, &at->up, s->room, k.low_up, 0, k.wide, STORE_BF16);
    act_rows(k.wide, s->rows, s->width, s->act, &at->down.update, k.act, k.low_down);
    product_rows(k.act, s->rows, &at->down, s->room, k.low_down, s->x, s->x, ADD);
  }
}
