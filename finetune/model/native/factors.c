/* Products of an expert's rows with its LoRA factors: few columns, which no tile of a large product fits.

   Depth is counted in words of 32 bits: one float32, or two bfloat16 that one instruction multiplies and
   sums in float32. */

#include "vectors.h"

#define INLINE ALWAYS AVX512_BF16

enum {
  ROWS = 4, /* of a tile: with six ranks 24 registers of sums, four of rows and one of a factor */
  RANKS = 6,
  CHUNK = 32,   /* rows that a thread takes at once, against a factor that is in its cache */
  COLUMNS = 64, /* of a gradient that a thread takes at once */
  VECTORS = COLUMNS / LANES,
};

typedef struct {
  /* Of each expert its number, its first row and its rows. */
  const int64_t *numbers, *starts, *counts;
  const void *rows; /* [n, width] */
  void *low;        /* [n, rank] */
  void *factor;     /* [E, rank, width]; as a gradient in float32 */
  int64_t experts, width, rank;
  int64_t next; /* task */
} factor_t;

/* low = rows factor' */

INLINE void lower_tile(const factor_t *f, int wide, int height, int ranks, int64_t row, int64_t rank,
                       const int32_t *factor) {
  int64_t words = wide ? f->width : f->width / 2;
  const int32_t *rows = (const int32_t *)f->rows + row * words;
  __m512 sums[ROWS][RANKS];
#pragma GCC unroll 4
  for (int r = 0; r < height; r++)
#pragma GCC unroll 6
    for (int k = 0; k < ranks; k++) sums[r][k] = _mm512_setzero_ps();
  for (int64_t word = 0; word < words; word += LANES) {
    __m512i x[ROWS];
#pragma GCC unroll 4
    for (int r = 0; r < height; r++) x[r] = _mm512_loadu_si512(rows + r * words + word);
#pragma GCC unroll 6
    for (int k = 0; k < ranks; k++) {
      __m512i a = _mm512_loadu_si512(factor + (rank + k) * words + word);
#pragma GCC unroll 4
      for (int r = 0; r < height; r++) sums[r][k] = multiply_add(wide, x[r], a, sums[r][k]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < height; r++)
#pragma GCC unroll 6
    for (int k = 0; k < ranks; k++) {
      float sum = _mm512_reduce_add_ps(sums[r][k]);
      int64_t at = (row + r) * f->rank + rank + k;
      if (wide)
        ((float *)f->low)[at] = sum;
      else
        ((int16_t *)f->low)[at] =
            _mm256_extract_epi16((__m256i)_mm512_cvtneps_pbh(_mm512_set1_ps(sum)), 0);
    }
}

INLINE void lower_chunk(const factor_t *f, int wide, int64_t first, int64_t end, const int32_t *factor) {
  for (int64_t row = first; row < end; row += ROWS)
    for (int64_t rank = 0; rank < f->rank;) {
      int full = row + ROWS <= end;
      if (full && rank + RANKS <= f->rank) {
        lower_tile(f, wide, ROWS, RANKS, row, rank, factor);
        rank += RANKS;
      } else if (full && rank + 2 <= f->rank) {
        lower_tile(f, wide, ROWS, 2, row, rank, factor);
        rank += 2;
      } else {
        for (int64_t r = row; r < end && r < row + ROWS; r++) lower_tile(f, wide, 1, 1, r, rank, factor);
        rank += 1;
      }
    }
}

INLINE void lower(factor_t *f, int wide) {
  int64_t task = 0, taken = __atomic_fetch_add(&f->next, 1, __ATOMIC_RELAXED);
  for (int64_t part = 0; part < f->experts; part++)
    for (int64_t row = 0; row < f->counts[part]; row += CHUNK, task++) {
      if (task != taken) continue;
      int64_t words = f->rank * (wide ? f->width : f->width / 2);
      int64_t end = row + CHUNK < f->counts[part] ? row + CHUNK : f->counts[part];
      const int32_t *factor = (const int32_t *)f->factor + f->numbers[part] * words;
      lower_chunk(f, wide, f->starts[part] + row, f->starts[part] + end, factor);
      taken = __atomic_fetch_add(&f->next, 1, __ATOMIC_RELAXED);
    }
}

/* factor = low' rows */

/* A row's value of `low`, or two rows' values side by side; the second row may be missing. */
INLINE __m512i low_word(const factor_t *f, int wide, int64_t row, int both, int64_t rank) {
  if (wide) return _mm512_set1_epi32(((const int32_t *)f->low)[row * f->rank + rank]);
  const uint16_t *low = (const uint16_t *)f->low + row * f->rank + rank;
  return _mm512_set1_epi32((int32_t)(low[0] | (both ? (uint32_t)low[f->rank] << 16 : 0)));
}

/* Values of a row from a column on, or of two rows side by side. */
INLINE void load_columns(const factor_t *f, int wide, int64_t row, int both, int64_t column, int64_t vectors,
                         __m512i x[VECTORS]) {
#pragma GCC unroll 4
  for (int v = 0; v < VECTORS; v += 2) {
    if (v >= vectors) {
      x[v] = x[v + 1] = _mm512_setzero_si512();
    } else if (wide) {
      const float *from = (const float *)f->rows + row * f->width + column + v * LANES;
      x[v] = _mm512_loadu_si512(from);
      x[v + 1] = _mm512_loadu_si512(from + LANES);
    } else {
      const uint16_t *from = (const uint16_t *)f->rows + row * f->width + column + v * LANES;
      __m512i even = _mm512_loadu_si512(from);
      __m512i odd = both ? _mm512_loadu_si512(from + f->width) : _mm512_setzero_si512();
      x[v] = interleave(even, odd, 0);
      x[v + 1] = interleave(even, odd, 1);
    }
  }
}

INLINE void sum_tile(const factor_t *f, int wide, int ranks, int64_t part, int64_t rank, int64_t column) {
  int64_t step = wide ? 1 : 2, end = f->starts[part] + f->counts[part];
  int64_t left = (f->width - column) / LANES, vectors = left < VECTORS ? left : VECTORS;
  __m512 sums[RANKS][VECTORS];
#pragma GCC unroll 6
  for (int k = 0; k < ranks; k++)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) sums[k][v] = _mm512_setzero_ps();
  for (int64_t row = f->starts[part]; row < end; row += step) {
    int both = row + 1 < end;
    __m512i x[VECTORS];
    load_columns(f, wide, row, both, column, vectors, x);
#pragma GCC unroll 6
    for (int k = 0; k < ranks; k++) {
      __m512i low = low_word(f, wide, row, both, rank + k);
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++) sums[k][v] = multiply_add(wide, low, x[v], sums[k][v]);
    }
  }
#pragma GCC unroll 6
  for (int k = 0; k < ranks; k++)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) {
      float *out = (float *)f->factor + (f->numbers[part] * f->rank + rank + k) * f->width + column;
      if (v < vectors) _mm512_storeu_ps(out + v * LANES, sums[k][v]);
    }
}

INLINE void sum_up(factor_t *f, int wide) {
  int64_t strips = (f->width + COLUMNS - 1) / COLUMNS, task;
  while ((task = __atomic_fetch_add(&f->next, 1, __ATOMIC_RELAXED)) < f->experts * strips) {
    int64_t part = task / strips, column = task % strips * COLUMNS, rank = 0;
    for (; rank + RANKS <= f->rank; rank += RANKS) sum_tile(f, wide, RANKS, part, rank, column);
    for (; rank + 2 <= f->rank; rank += 2) sum_tile(f, wide, 2, part, rank, column);
    for (; rank < f->rank; rank++) sum_tile(f, wide, 1, part, rank, column);
  }
}

AVX512_BF16 static void lower_16(void *f) { lower(f, 0); }
AVX512_BF16 static void lower_32(void *f) { lower(f, 1); }
AVX512_BF16 static void sum_up_16(void *f) { sum_up(f, 0); }
AVX512_BF16 static void sum_up_32(void *f) { sum_up(f, 1); }

void lower_bfloat16(factor_t *f, parallel_t *parallel, unsigned threads) {
  parallel(lower_16, f, threads, 0);
}
void lower_float32(factor_t *f, parallel_t *parallel, unsigned threads) {
  parallel(lower_32, f, threads, 0);
}
void sum_up_bfloat16(factor_t *f, parallel_t *parallel, unsigned threads) {
  parallel(sum_up_16, f, threads, 0);
}
void sum_up_float32(factor_t *f, parallel_t *parallel, unsigned threads) {
  parallel(sum_up_32, f, threads, 0);
}
