// What vector_avx2.h and vector_avx512.h share.

#pragma once

#include <immintrin.h>

namespace {

inline float to_float(Half a) { return _cvtsh_ss(a.bits); }

// Returns lanes 0 to 3 plus lanes 4 to 7.
inline __m128 fold_to_four(__m256 v) {
  return _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
}

// Writes the sums of the lanes of a, b, c and d. Adds lanes i and i + 2 first, as reduce_add does.
inline void reduce_add_four(__m128 a, __m128 b, __m128 c, __m128 d, float* to) {
  // a0 + a2, a1 + a3, b0 + b2, b1 + b3, and the same of c and d.
  const __m128 ab = _mm_add_ps(_mm_movelh_ps(a, b), _mm_movehl_ps(b, a));
  const __m128 cd = _mm_add_ps(_mm_movelh_ps(c, d), _mm_movehl_ps(d, c));
  _mm_storeu_ps(to, _mm_add_ps(_mm_shuffle_ps(ab, cd, 0x88), _mm_shuffle_ps(ab, cd, 0xdd)));
}

}  // namespace
