/* Products of an expert's rows with its packed weights.

   A strip of 64 columns of the result is one task of a thread. The strip's weights are decoded, a stretch
   of the depth at a time, to a panel that stays in the core's cache, in the order in which the products read
   them; then six rows at a time are multiplied with it. Nothing of the decoded weights reaches memory.

   Depth is counted in words of 32 bits: one float32, or two bfloat16 that one instruction multiplies and
   sums in float32 (Goto & van de Geijn 2008 for the blocking; Intel's manual for VDPBF16PS). */

#include "vectors.h"

#include <cpuid.h>
#include <stdlib.h>

#define INLINE ALWAYS AVX512_BF16

enum {
  COLUMNS = 64, /* of a strip: four registers */
  VECTORS = COLUMNS / LANES,
  ROWS = 6, /* of a tile: 24 registers of sums, four of weights and one of a row leave three */
  DEPTH = 736, /* words of a panel: 188 KB, a fraction of a core's second cache, and whole blocks */
  AHEAD = 48,  /* rows of weights that are asked for before they are decoded, where they lie far apart */
};

typedef int32_t __attribute__((may_alias, aligned(2))) word_t; /* of rows and factors, whatever their dtype */

typedef struct {
  /* Of each expert its number, its first row and its rows. */
  const int64_t *numbers, *starts, *counts;
  const uint8_t *blocks, *scales; /* [E, out, in/32, 16] and [E, out, in/32] */
  const void *values;             /* of each scale the sixteen values, twice: [256, 32] */
  const void *rows, *low;         /* [n, depth], [n, rank] */
  const void *factor;             /* [E, columns, rank], or transposed [E, rank, columns] */
  const uint16_t *bias16;         /* [E, columns] in bfloat16 */
  const float *bias32;            /* or float32, or neither */
  float *out;                     /* [n, columns] */
  int64_t experts, outs, ins, rank;
  int64_t transposed; /* columns are the weights' inputs and depth their outputs */
  int64_t next;       /* task */
} product_t;

int multiplies_float32(void) { return __builtin_cpu_supports("avx512bw"); }

int multiplies_bfloat16(void) {
  unsigned a, b, c, d;
  int vectors = __builtin_cpu_supports("avx512bw") && __get_cpuid_count(7, 1, &a, &b, &c, &d) && a >> 5 & 1;
  /* With matrix units (AMX) a library's products are faster than vectors can be. */
  return vectors && __get_cpuid_count(7, 0, &a, &b, &c, &d) && !(d >> 22 & 1);
}

INLINE void transpose(__m512i v[LANES]) {
  __m512i t[LANES];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    v[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    v[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    v[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    v[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(v[i], v[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(v[i], v[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(v[8 + i], v[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(v[8 + i], v[12 + i], 0xdd);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    v[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    v[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
  }
}

/* Panels are [words, 64]. Columns past the strip's width hold anything: their sums are not stored. */

INLINE void store_transposed(__m512i v[LANES], int32_t *panel) {
  transpose(v);
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i++) _mm512_storeu_si512(panel + i * COLUMNS, v[i]);
}

/* Columns are outputs, depth is inputs: of 16 outputs a block each. */
INLINE void pack_outputs(const product_t *p, int wide, int64_t expert, int64_t column, int64_t width,
                         int64_t begin, int64_t end, int32_t *panel) {
  int64_t across = p->ins / BLOCK, words = wide ? BLOCK : BLOCK / 2;
  for (int64_t lane = 0; lane < width; lane += LANES)
    for (int64_t word = begin; word < end; word += words) {
      int64_t block = (expert * p->outs + column + lane) * across + word / words;
      int32_t *to = panel + (word - begin) * COLUMNS + lane;
      __m512i first[LANES], second[LANES];
#pragma GCC unroll 16
      for (int i = 0; i < LANES; i++)
        if (wide)
          look_up_float32(p->blocks, p->scales, p->values, block + i * across, first + i, second + i);
        else
          first[i] = look_up_bfloat16(p->blocks, p->scales, p->values, block + i * across);
      store_transposed(first, to);
      if (wide) store_transposed(second, to + LANES * COLUMNS);
    }
}

/* Columns are inputs, depth is outputs: of one or two outputs the blocks of the strip. */
INLINE void pack_inputs(const product_t *p, int wide, int64_t expert, int64_t column, int64_t width,
                        int64_t begin, int64_t end, int32_t *panel) {
  int64_t across = p->ins / BLOCK, outs = wide ? 1 : 2;
  for (int64_t word = begin; word < end; word++) {
    int64_t row = (expert * p->outs + outs * word) * across + column / BLOCK;
    for (int64_t out = 0; out < outs; out++) {
      int64_t ahead = row + (AHEAD + out) * across;
      _mm_prefetch((const void *)(p->blocks + 16 * ahead), _MM_HINT_T0);
      _mm_prefetch((const void *)(p->scales + ahead), _MM_HINT_T0);
    }
    for (int64_t block = 0; block < width / BLOCK; block++) {
      int32_t *to = panel + (word - begin) * COLUMNS + block * BLOCK;
      __m512i first, second;
      if (wide) {
        look_up_float32(p->blocks, p->scales, p->values, row + block, &first, &second);
      } else {
        __m512i even = look_up_bfloat16(p->blocks, p->scales, p->values, row + block);
        __m512i odd = look_up_bfloat16(p->blocks, p->scales, p->values, row + across + block);
        first = interleave(even, odd, 0), second = interleave(even, odd, 1);
      }
      _mm512_storeu_si512(to, first);
      _mm512_storeu_si512(to + LANES, second);
    }
  }
}

/* LoRA's factor makes the depth longer by its rank. */
INLINE void pack_factor(const product_t *p, int wide, int64_t expert, int64_t columns, int64_t column,
                        int64_t width, int32_t *panel) {
  int64_t words = wide ? p->rank : p->rank / 2;
  for (int64_t word = 0; word < words; word++)
    for (int64_t i = 0; i < width; i++) {
      int64_t at = expert * p->rank * columns;
      int32_t *to = panel + word * COLUMNS + i;
      if (!p->transposed) {
        *to = ((const word_t *)p->factor)[at / (wide ? 1 : 2) + (column + i) * words + word];
      } else if (wide) {
        *to = ((const word_t *)p->factor)[at + word * columns + column + i];
      } else {
        const uint16_t *even = (const uint16_t *)p->factor + at + 2 * word * columns + column + i;
        *to = (int32_t)(even[0] | (uint32_t)even[columns] << 16);
      }
    }
}

INLINE void add_products(int wide, int height, const word_t *rows, int64_t stride, int64_t words,
                         const int32_t *panel, __m512 sums[ROWS][VECTORS]) {
  for (int64_t word = 0; word < words; word++) {
    __m512i weights[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) weights[v] = _mm512_loadu_si512(panel + word * COLUMNS + v * LANES);
#pragma GCC unroll 6
    for (int r = 0; r < height; r++) {
      __m512i x = _mm512_set1_epi32(rows[r * stride + word]);
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++) sums[r][v] = multiply_add(wide, x, weights[v], sums[r][v]);
    }
  }
}

INLINE __m512 first_sums(const product_t *p, int64_t at) {
  if (p->bias32) return _mm512_loadu_ps(p->bias32 + at);
  if (!p->bias16) return _mm512_setzero_ps();
  __m512i bias = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)(p->bias16 + at)));
  return (__m512)_mm512_slli_epi32(bias, 16);
}

/* Where a strip is in the result, and what of its depth the panel holds. */
typedef struct {
  int64_t expert, columns, column, width, depth, begin, end;
} place_t;

INLINE void multiply_tile(const product_t *p, const place_t *at, int wide, int height, int64_t row,
                          const int32_t *panel) {
  __m512 sums[ROWS][VECTORS];
  float *out = p->out + row * at->columns + at->column;
#pragma GCC unroll 6
  for (int r = 0; r < height; r++)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++)
      if (v * LANES >= at->width)
        sums[r][v] = _mm512_setzero_ps();
      else if (at->begin)
        sums[r][v] = _mm512_loadu_ps(out + r * at->columns + v * LANES);
      else
        sums[r][v] = first_sums(p, at->expert * at->columns + at->column + v * LANES);
  const word_t *rows = (const word_t *)p->rows + row * at->depth + at->begin;
  add_products(wide, height, rows, at->depth, at->end - at->begin, panel, sums);
  if (p->rank && at->end == at->depth) {
    int64_t words = wide ? p->rank : p->rank / 2;
    const int32_t *factor = panel + (at->end - at->begin) * COLUMNS;
    add_products(wide, height, (const word_t *)p->low + row * words, words, words, factor, sums);
  }
#pragma GCC unroll 6
  for (int r = 0; r < height; r++)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++)
      if (v * LANES < at->width) _mm512_storeu_ps(out + r * at->columns + v * LANES, sums[r][v]);
}

INLINE void multiply_rows(const product_t *p, const place_t *at, int wide, int64_t first, int64_t count,
                          const int32_t *panel) {
  int64_t row = first;
  for (; row + ROWS <= first + count; row += ROWS) multiply_tile(p, at, wide, ROWS, row, panel);
  switch (first + count - row) {
    case 1: multiply_tile(p, at, wide, 1, row, panel); break;
    case 2: multiply_tile(p, at, wide, 2, row, panel); break;
    case 3: multiply_tile(p, at, wide, 3, row, panel); break;
    case 4: multiply_tile(p, at, wide, 4, row, panel); break;
    case 5: multiply_tile(p, at, wide, 5, row, panel); break;
  }
}

INLINE void multiply_strip(const product_t *p, int wide, int64_t task, int64_t strips, int32_t *panel) {
  int64_t columns = p->transposed ? p->ins : p->outs, depth = p->transposed ? p->outs : p->ins;
  int64_t part = task / strips, column = task % strips * COLUMNS, first = p->starts[part];
  place_t at = {.expert = p->numbers[part], .columns = columns, .column = column};
  at.width = columns - column < COLUMNS ? columns - column : COLUMNS;
  at.depth = wide ? depth : depth / 2;
  for (at.begin = 0; at.begin < at.depth; at.begin = at.end) {
    at.end = at.begin + DEPTH < at.depth ? at.begin + DEPTH : at.depth;
    if (p->transposed)
      pack_inputs(p, wide, at.expert, column, at.width, at.begin, at.end, panel);
    else
      pack_outputs(p, wide, at.expert, column, at.width, at.begin, at.end, panel);
    if (at.end == at.depth)
      pack_factor(p, wide, at.expert, columns, column, at.width, panel + (at.end - at.begin) * COLUMNS);
    multiply_rows(p, &at, wide, first, p->counts[part], panel);
  }
}

INLINE void take_strips(product_t *p, int wide) {
  /* Kept by each thread: fresh memory would cost more than the decoding. */
  static _Thread_local int32_t *panel;
  static _Thread_local int64_t size;
  int64_t columns = p->transposed ? p->ins : p->outs, strips = (columns + COLUMNS - 1) / COLUMNS, task;
  int64_t needed = (DEPTH + p->rank) * COLUMNS * (int64_t)sizeof(int32_t);
  if (size < needed) {
    free(panel);
    panel = aligned_alloc(64, needed);
    size = needed;
  }
  if (!panel) abort();
  while ((task = __atomic_fetch_add(&p->next, 1, __ATOMIC_RELAXED)) < p->experts * strips)
    multiply_strip(p, wide, task, strips, panel);
}

AVX512_BF16 static void take_bfloat16(void *p) { take_strips(p, 0); }
AVX512_BF16 static void take_float32(void *p) { take_strips(p, 1); }

void multiply_bfloat16(product_t *p, parallel_t *parallel, unsigned threads) {
  parallel(take_bfloat16, p, threads, 0);
}
void multiply_float32(product_t *p, parallel_t *parallel, unsigned threads) {
  parallel(take_float32, p, threads, 0);
}
