/* What the libraries share: registers of 512 bits, MXFP4 looked up in them, and how threads are had. */

#pragma once
#include <immintrin.h>
#include <stdint.h>

#define AVX512 __attribute__((target("avx512f,avx512bw")))
#define AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512bf16")))
#define ALWAYS static inline __attribute__((always_inline))

enum { LANES = 16, BLOCK = 32 };

/* torch's own OpenMP, GOMP_parallel: a function, what it is given, threads, flags. */
typedef void parallel_t(void (*)(void *), void *, unsigned, unsigned);

/* Block i of blocks [count, 16] and scales [count]. The sixteen values under a scale fit one register, in
   which one instruction looks up 16 or 32 codes. values [256, 32]: of each scale its 16 values, twice. */

ALWAYS AVX512 __m512i look_up_bfloat16(const uint8_t *blocks, const uint8_t *scales, const void *values,
                                       int64_t i) {
  __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)(blocks + 16 * i)));
  /* Each byte's low code comes to lie in the low half of 32 bits, its high code in the high half. The
     look-up regards five bits of a half, of which the fifth chooses between two equal tables. */
  __m512i codes = _mm512_or_si512(bytes, _mm512_slli_epi32(bytes, 12));
  return _mm512_permutexvar_epi16(codes, _mm512_loadu_si512((const uint16_t *)values + 32 * scales[i]));
}

ALWAYS AVX512 void look_up_float32(const uint8_t *blocks, const uint8_t *scales, const void *values,
                                   int64_t i, __m512i *first, __m512i *second) {
  __m128i low = _mm_loadu_si128((const void *)(blocks + 16 * i)), high = _mm_srli_epi16(low, 4);
  __m512i table = _mm512_loadu_si512((const float *)values + 32 * scales[i]);
  /* The look-up regards four bits. */
  *first = _mm512_permutexvar_epi32(_mm512_cvtepu8_epi32(_mm_unpacklo_epi8(low, high)), table);
  *second = _mm512_permutexvar_epi32(_mm512_cvtepu8_epi32(_mm_unpackhi_epi8(low, high)), table);
}

/* Of two rows of 32 bfloat16 the first or second half, value by value in turn. */
ALWAYS AVX512 __m512i interleave(__m512i even, __m512i odd, int half) {
  static const uint16_t PLACES[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                      8,  40, 9,  41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  __m512i places = _mm512_add_epi16(_mm512_loadu_si512(PLACES), _mm512_set1_epi16(16 * half));
  return _mm512_permutex2var_epi16(even, places, odd);
}

/* Words of 32 bits are one float32 each, or two bfloat16 whose products are summed in float32. */
ALWAYS AVX512_BF16 __m512 multiply_add(int wide, __m512i left, __m512i right, __m512 sum) {
  return wide ? _mm512_fmadd_ps((__m512)left, (__m512)right, sum)
              : _mm512_dpbf16_ps(sum, (__m512bh)left, (__m512bh)right);
}
