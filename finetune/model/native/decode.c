/* MXFP4 decoded in one pass: blocks [count, 16], scales [count] -> out [count, 32]. */

#include "vectors.h"

int decodes(void) { return __builtin_cpu_supports("avx512bw"); }

AVX512 void decode_bfloat16(const uint8_t *blocks, const uint8_t *scales, const void *values, uint16_t *out,
                            int64_t count) {
  for (int64_t i = 0; i < count; i++)
    _mm512_storeu_si512(out + BLOCK * i, look_up_bfloat16(blocks, scales, values, i));
}

AVX512 void decode_float32(const uint8_t *blocks, const uint8_t *scales, const void *values, float *out,
                           int64_t count) {
  for (int64_t i = 0; i < count; i++) {
    __m512i first, second;
    look_up_float32(blocks, scales, values, i, &first, &second);
    _mm512_storeu_si512(out + BLOCK * i, first);
    _mm512_storeu_si512(out + BLOCK * i + LANES, second);
  }
}
