/* The activation between an expert's two products, forward and backward, in one pass over its rows.

   Of y [n, 2I], gate and up in turn: h = (clamp(up) + 1) * g * sigmoid(alpha * g), g = clamp(gate). */

#include "vectors.h"

#define INLINE ALWAYS AVX512_BF16

typedef struct {
  const float *y;        /* [n, 2I] */
  const float *d_hidden; /* [n, I] */
  const float *score;    /* [n] */
  void *hidden;          /* [n, I] */
  void *d_y;             /* [n, 2I], times the score */
  float *d_score;        /* [n]: the sum of d_hidden * h */
  int64_t rows, inner;
  float alpha, limit;
  int64_t next; /* row */
} activation_t;

/* exp to the last digit or two of float32: 2^n * e^r with |r| <= ln(2) / 2, e^r by its Taylor series, whose
   first term left out is below 2^-27. Of two values min and max give the second where one is not a number. */
INLINE __m512 exponential(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-104.0f), _mm512_min_ps(_mm512_set1_ps(104.0f), x));
  __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145752f), x); /* ln(2) in two parts */
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860677e-6f), r);
  __m512 sum = _mm512_set1_ps(1.0f / 5040);
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(1.0f / 720));
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(1.0f / 120));
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(1.0f / 24));
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(1.0f / 6));
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(0.5f));
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(1.0f));
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(sum, n);
}

typedef struct {
  __m512 gate, up;                      /* as they came */
  __m512 clamped, linear, sigmoid, silu; /* min(gate, limit), clamp(up) + 1, of the gate, their product */
} gates_t;

INLINE gates_t gates_of(const activation_t *a, const float *y) {
  static const int32_t EVEN[LANES] = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
  __m512i even = _mm512_loadu_si512(EVEN), odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  __m512 first = _mm512_loadu_ps(y), second = _mm512_loadu_ps(y + LANES), one = _mm512_set1_ps(1.0f);
  __m512 limit = _mm512_set1_ps(a->limit), lowest = _mm512_set1_ps(-a->limit);
  gates_t g = {.gate = _mm512_permutex2var_ps(first, even, second),
               .up = _mm512_permutex2var_ps(first, odd, second)};
  g.clamped = _mm512_min_ps(limit, g.gate);
  g.linear = _mm512_add_ps(_mm512_max_ps(lowest, _mm512_min_ps(limit, g.up)), one);
  __m512 e = exponential(_mm512_mul_ps(_mm512_set1_ps(-a->alpha), g.clamped));
  g.sigmoid = _mm512_div_ps(one, _mm512_add_ps(one, e));
  g.silu = _mm512_mul_ps(g.clamped, g.sigmoid);
  return g;
}

INLINE __m512i narrow(__m512 values) { /* bfloat16 in the low halves of words */
  return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(values));
}

INLINE void hide_row(const activation_t *a, int wide, int64_t row) {
  for (int64_t i = 0; i < a->inner; i += LANES) {
    gates_t g = gates_of(a, a->y + 2 * (row * a->inner + i));
    __m512 hidden = _mm512_mul_ps(g.linear, g.silu);
    if (wide)
      _mm512_storeu_ps((float *)a->hidden + row * a->inner + i, hidden);
    else
      _mm256_storeu_si256((void *)((uint16_t *)a->hidden + row * a->inner + i),
                          (__m256i)_mm512_cvtneps_pbh(hidden));
  }
}

/* Where a clamp holds the gradient is zero. */
INLINE void pull_row_back(const activation_t *a, int wide, int64_t row) {
  static const int32_t TURNS[LANES] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
  __m512i turns = _mm512_loadu_si512(TURNS), later = _mm512_add_epi32(turns, _mm512_set1_epi32(8));
  __m512 score = _mm512_set1_ps(a->score[row]), one = _mm512_set1_ps(1.0f), sum = _mm512_setzero_ps();
  __m512 alpha = _mm512_set1_ps(a->alpha), limit = _mm512_set1_ps(a->limit);
  for (int64_t i = 0; i < a->inner; i += LANES) {
    int64_t at = row * a->inner + i;
    gates_t g = gates_of(a, a->y + 2 * at);
    __m512 d_hidden = _mm512_loadu_ps(a->d_hidden + at);
    sum = _mm512_fmadd_ps(d_hidden, _mm512_mul_ps(g.linear, g.silu), sum);
    d_hidden = _mm512_mul_ps(d_hidden, score);
    /* The derivative of x * sigmoid(alpha * x). */
    __m512 slope = _mm512_fmadd_ps(_mm512_mul_ps(alpha, g.silu), _mm512_sub_ps(one, g.sigmoid), g.sigmoid);
    __mmask16 gate_moves = _mm512_cmp_ps_mask(g.gate, limit, _CMP_NGT_UQ);
    __mmask16 up_moves = _mm512_cmp_ps_mask(_mm512_abs_ps(g.up), limit, _CMP_NGT_UQ);
    __m512 d_gate = _mm512_maskz_mul_ps(gate_moves, _mm512_mul_ps(d_hidden, g.linear), slope);
    __m512 d_up = _mm512_maskz_mul_ps(up_moves, d_hidden, g.silu);
    if (wide) {
      _mm512_storeu_ps((float *)a->d_y + 2 * at, _mm512_permutex2var_ps(d_gate, turns, d_up));
      _mm512_storeu_ps((float *)a->d_y + 2 * at + LANES, _mm512_permutex2var_ps(d_gate, later, d_up));
    } else {
      __m512i pairs = _mm512_or_si512(narrow(d_gate), _mm512_slli_epi32(narrow(d_up), 16));
      _mm512_storeu_si512((uint16_t *)a->d_y + 2 * at, pairs);
    }
  }
  a->d_score[row] = _mm512_reduce_add_ps(sum);
}

/* Rows that a thread takes at once. */
enum { AT_ONCE = 8 };

INLINE void take_rows(activation_t *a, int wide, int back) {
  int64_t row;
  while ((row = __atomic_fetch_add(&a->next, AT_ONCE, __ATOMIC_RELAXED)) < a->rows)
    for (int64_t end = row + AT_ONCE < a->rows ? row + AT_ONCE : a->rows; row < end; row++)
      if (back)
        pull_row_back(a, wide, row);
      else
        hide_row(a, wide, row);
}

AVX512_BF16 static void hide_bfloat16(void *a) { take_rows(a, 0, 0); }
AVX512_BF16 static void hide_float32(void *a) { take_rows(a, 1, 0); }
AVX512_BF16 static void pull_back_bfloat16(void *a) { take_rows(a, 0, 1); }
AVX512_BF16 static void pull_back_float32(void *a) { take_rows(a, 1, 1); }

void activate_bfloat16(activation_t *a, parallel_t *parallel, unsigned threads) {
  parallel(hide_bfloat16, a, threads, 0);
}
void activate_float32(activation_t *a, parallel_t *parallel, unsigned threads) {
  parallel(hide_float32, a, threads, 0);
}
void activate_back_bfloat16(activation_t *a, parallel_t *parallel, unsigned threads) {
  parallel(pull_back_bfloat16, a, threads, 0);
}
void activate_back_float32(activation_t *a, parallel_t *parallel, unsigned threads) {
  parallel(pull_back_float32, a, threads, 0);
}
