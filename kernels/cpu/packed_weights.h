// Reads packed weights (layout.h): where strips and spans begin, a block's scales and zero points,
// and a register of weights as tiles.

#pragma once

#include "avx512.h"
#include "layout.h"

namespace {

struct PackedWeights {
  const uint8_t* data;         // (N / 16, strip)
  int64_t N, K, block, strip;  // block: inputs that share a scale; strip: bytes of a strip

  int64_t blocks() const { return K / block; }
  const uint8_t* scales(int64_t n) const { return data + n * strip; }  // of strip n
  const uint8_t* spans(int64_t n) const { return scales(n) + kStrip * sizeof(float); }
};

// Returns the zero points, (16,), of block b of a span.
template <Format F>
__m512 load_zeros(const uint8_t* header, int64_t block, int64_t b) {
  if constexpr (F == kInt8) return _mm512_set1_ps(128);
  const uint8_t* zeros = header + zeros_offset<F>(block, b);
  auto pairs = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(zeros));
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(unpack_pairs(pairs)));
}

// Returns the scales, (16,), of block b of a span.
template <Format F>
__m512 load_scales(const uint8_t* header, int64_t b) {
  const uint8_t* scales = header + b * kStrip * scale_bytes(F);
  if constexpr (F == kInt8) return _mm512_set1_ps(1);
  if constexpr (F == kInt4Half)
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales)));
  auto bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(scales));
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
}

// Writes a register of packed weights as one tile (int8) or two tiles (int4) of unsigned bytes.
template <Format F>
inline void unpack(const uint8_t* from, __m512i* tiles) {
  const __m512i v = _mm512_loadu_si512(from);
  if constexpr (bits(F) == 8) tiles[0] = v;
  if constexpr (bits(F) == 4) tiles[0] = low_nibbles(v), tiles[1] = high_nibbles(v);
}

}  // namespace
