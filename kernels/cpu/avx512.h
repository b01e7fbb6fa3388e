// AVX-512 helpers that the kernels share: prefetching, bfloat16 loads and stores, nibbles.

#pragma once

#include <ATen/ATen.h>
#include <immintrin.h>

#include "layout.h"

namespace {

// Bytes between a load and its prefetch. With 4096 memory is read 1.5 times as fast as without.
// With 2048 one of two threads sometimes ran a whole step without that gain; with 4096 none did.
constexpr int64_t kAhead = 4096;
constexpr int64_t kGrain = 1 << 16;  // multiplications from which on another thread pays

inline void prefetch(const uint8_t* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += kLine) _mm_prefetch(from + i, _MM_HINT_T0);
}

inline __m512 load_bf16(const at::BFloat16* x) {
  auto bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

inline void store_bf16(at::BFloat16* y, __m512 v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(y), (__m256i)_mm512_cvtneps_pbh(v));
}

inline __m512i low_nibbles(__m512i v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
inline __m512i high_nibbles(__m512i v) { return low_nibbles(_mm512_srli_epi16(v, 4)); }

// Returns the 16 nibbles of 8 bytes as 16 bytes.
inline __m128i unpack_pairs(__m128i pairs) {
  const __m128i low = _mm_set1_epi8(15);
  return _mm_unpacklo_epi8(
      _mm_and_si128(pairs, low), _mm_and_si128(_mm_srli_epi16(pairs, 4), low));
}

}  // namespace
