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
  if constexpr (bits(F) == 4)
    tiles[0] = low_nibbles(v), tiles[1] = low_nibbles(_mm512_srli_epi16(v, 4));
}

// Adds to sums, (STRIPS, M), the products of the tiles of a block by either the high or the low
// bytes of M rows. row: these bytes of the first row; stride: bytes from row to row; prefetches:
// whether to prefetch later tiles.
//
// Sums stay in registers if this function is inlined and all loops over them are unrolled.
template <Format F, int M, int STRIPS>
[[gnu::always_inline]] inline void add_tile_products(const uint8_t* const (&tiles)[STRIPS],
                                                     const int8_t* row, int64_t stride,
                                                     int64_t block, bool prefetches,
                                                     NativeInt (&sums)[STRIPS * M]) {
  constexpr int kTiles = 8 / bits(F);  // of a register of packed weights
  for (int64_t at = 0; at < block / 4; at += kTiles) {
    __m512i tile[STRIPS][2];
#pragma GCC unroll 4
    for (int t = 0; t < STRIPS; t++) {
      const uint8_t* from = tiles[t] + 64 / kTiles * at;
      if (prefetches) prefetch(from + kAhead);
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
          sums[t * M + m] =
              (NativeInt)_mm512_dpbusd_epi32((__m512i)sums[t * M + m], tile[t][j], four);
      }
    }
  }
}

// Multiplies rows `first` to first + M - 1 by the strips with the numbers n. Returns in y: (STRIPS,
// M, 16). If it were inlined, there would be too few registers for its pointers.
template <Format F, int M, int STRIPS>
[[gnu::noinline]] void multiply_strips(const PackedWeights& w, const int64_t (&n)[STRIPS],
                                       const FixedPointRows& x, int64_t first, Floats* y) {
  const uint8_t *tiles[STRIPS], *headers[STRIPS] = {};
  for (int t = 0; t < STRIPS; t++) tiles[t] = w.spans(n[t]);
  const int64_t header = header_bytes<F>(w.block), stride = 2 * x.stride;
  const float *row_sums = &x.sum[x.block(first, 0)], *row_scales = &x.scale[x.block(first, 0)];
  for (int i = 0; i < STRIPS * M; i++) y[i] = splat(0.f);
  for (int64_t b = 0; b < x.blocks; b++) {
    const int64_t in_span = b & (blocks_of(kSpan, w.block) - 1), k = b * w.block;
    for (int t = 0; t < STRIPS && in_span == 0; t++) {
      headers[t] = tiles[t];
      prefetch(tiles[t] + kAhead, header);
      tiles[t] += header;
    }
    // All high bytes are multiplied, the sums shifted, and the products of the low bytes added: one
    // register serves both, and a block of 256 inputs cannot overflow it. This unpacks weights
    // twice, which makes one row no slower.
    NativeInt sums[STRIPS * M];
#pragma GCC unroll 16
    for (auto& sum : sums) sum = native_splat(0);
    add_tile_products<F, M, STRIPS>(tiles, x.high(first) + k, stride, w.block, false, sums);
#pragma GCC unroll 16
    for (auto& sum : sums) sum <<= 8;
    add_tile_products<F, M, STRIPS>(tiles, x.low(first) + k, stride, w.block, true, sums);
#pragma GCC unroll 4
    for (int t = 0; t < STRIPS; t++) {
      tiles[t] += kStrip * w.block * bits(F) / 8;
      const Floats zero = load_zeros<F>(headers[t], w.block, in_span);
      const Floats scale = load_scales<F>(headers[t], in_span);
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) {
        const int64_t i = t * M + m;
        y[i] = add_block(y[i], Ints{{sums[i]}}, zero, scale, row_sums[m], row_scales[m]);
      }
    }
    row_sums += kRowGroup, row_scales += kRowGroup;
  }
  for (int i = 0; i < STRIPS * M; i++) y[i] = y[i] * w.output_scales(n[i / M]);
}

// Multiplies rows from m on in groups of M, and stores the outputs. Returns the first row that is
// left.
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
