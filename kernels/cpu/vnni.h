// Integer products by AVX-512 VNNI: a few fixed-point rows by strips of packed weights.

#pragma once

#ifdef __AVX512VNNI__

#include "fixed_point.h"
#include "output.h"

namespace {

constexpr int64_t kMaxSums = 16;     // sums that stay in registers, of which there are 32
constexpr int64_t kMaxVnniRows = 4;  // with more rows AMX is faster

inline __m512i low_nibbles(__m512i v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }

// Writes a register of packed weights as one tile (int8) or two tiles (int4) of unsigned bytes.
template <Format F>
inline void unpack(const uint8_t* from, __m512i* tiles) {
  const __m512i v = _mm512_loadu_si512(from);
  if constexpr (bits(F) == 8) tiles[0] = v;
  if constexpr (bits(F) == 4) tiles[0] = low_nibbles(v), tiles[1] = low_nibbles(_mm512_srli_epi16(v, 4));
}

// Multiplies rows `first` to first + M - 1 by the strips n. Returns in y: (STRIPS, M, 16).
//
// The inner loops are not a function of their own: GCC 12 then compiles them to other code.
template <Format F, int M, int STRIPS>
void multiply_strips(const PackedWeights& w, const int64_t (&n)[STRIPS], const FixedPointRows& x,
                     int64_t first, Floats* y) {
  constexpr int kTiles = 8 / bits(F);  // of a register of packed weights
  const uint8_t *tiles[STRIPS], *headers[STRIPS];
  for (int t = 0; t < STRIPS; t++) tiles[t] = w.spans(n[t]);
  const int64_t header = header_bytes<F>(w.block), stride = 2 * x.stride;
  const int8_t* parts[2] = {x.high(first), x.low(first)};
  const float *row_sums = &x.sum[x.block(first, 0)], *row_scales = &x.scale[x.block(first, 0)];
  for (int i = 0; i < STRIPS * M; i++) y[i] = splat(0.f);
  for (int64_t b = 0; b < x.blocks; b++) {
    const int64_t in_span = b % (kSpan / w.block);
    for (int t = 0; t < STRIPS && in_span == 0; t++) {
      headers[t] = tiles[t];
      prefetch(tiles[t] + kAhead, header);
      tiles[t] += header;
    }
    // The loop multiplies all high bytes, shifts the sums, and adds the products of the low bytes:
    // one register serves both, and a block of 256 inputs cannot overflow it. This unpacks weights
    // twice, which makes one row no slower.
    __m512i sums[STRIPS * M];
    for (int i = 0; i < STRIPS * M; i++) sums[i] = _mm512_setzero_si512();
    for (int p = 0; p < 2; p++) {
      if (p) for (int i = 0; i < STRIPS * M; i++) sums[i] = _mm512_slli_epi32(sums[i], 8);
      const int8_t* row = parts[p] + b * w.block;
      for (int64_t at = 0; at < w.block / 4; at += kTiles) {
        __m512i tile[STRIPS][2];
#pragma GCC unroll 4
        for (int t = 0; t < STRIPS; t++) {
          const uint8_t* from = tiles[t] + 64 / kTiles * at;
          if (p) prefetch(from + kAhead);
          unpack<F>(from, tile[t]);
        }
#pragma GCC unroll 2
        for (int j = 0; j < kTiles; j++) {
#pragma GCC unroll 8
          for (int m = 0; m < M; m++) {
            const int8_t* inputs = row + m * stride + 4 * (at + j);
            const __m512i four = _mm512_set1_epi32(*reinterpret_cast<const int*>(inputs));
#pragma GCC unroll 4
            for (int t = 0; t < STRIPS; t++)
              sums[t * M + m] = _mm512_dpbusd_epi32(sums[t * M + m], tile[t][j], four);
          }
        }
      }
    }
    for (int t = 0; t < STRIPS; t++) {
      tiles[t] += kStrip * w.block / kTiles;
      const Floats zero = load_zeros<F>(headers[t], w.block, in_span);
      const Floats scale = load_scales<F>(headers[t], in_span);
      for (int m = 0; m < M; m++) {
        const int64_t i = t * M + m, at = b * kRowGroup + m;
        y[i] = add_block(y[i], Ints{{sums[i]}}, zero, scale, row_sums[at], row_scales[at]);
      }
    }
  }
  for (int i = 0; i < STRIPS * M; i++)
    y[i] = y[i] * w.output_scales(n[i / M]);
}

// Multiplies rows from m on in groups of M, and stores them. Returns the first row that is left.
template <Format F, int M, int STRIPS>
int64_t multiply_rows(const PackedWeights& w, const int64_t (&n)[STRIPS], const FixedPointRows& x,
                      int64_t m, const Output& out) {
  Floats y[STRIPS * M];
  for (; m + M <= out.M; m += M) {
    multiply_strips<F, M, STRIPS>(w, n, x, m, y);
    for (int i = 0; i < STRIPS * M; i++) out.store_strip(m + i % M, n[i / M], y[i]);
  }
  return m;
}

}  // namespace

#endif
