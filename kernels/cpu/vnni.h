// Integer products by AVX-512 VNNI: a few fixed-point rows by strips of packed weights.

#pragma once

#include "fixed_point.h"
#include "packed_weights.h"

namespace {

constexpr int64_t kMaxSums = 16;     // sums that stay in registers, of which there are 32
constexpr int64_t kMaxVnniRows = 4;  // with more rows AMX is faster

struct Output {
  at::BFloat16* y;           // (M, N)
  const at::BFloat16* bias;  // (N) or nullptr
  int64_t M, N;

  // Writes the 16 outputs of strip n of row m, plus their bias.
  void store(int64_t m, int64_t n, __m512 v) const {
    if (bias) v = _mm512_add_ps(v, load_bf16(bias + n * kStrip));
    store_bf16(y + m * N + n * kStrip, v);
  }
};

// Returns y, (16,), plus scales * (sums of products - zero points * sum of the row's block).
inline __m512 add_block(__m512 y, __m512i sums, __m512 zeros, __m512 scales, float row_sum,
                        float row_scale) {
  const __m512 dot = _mm512_fnmadd_ps(zeros, _mm512_set1_ps(row_sum), _mm512_cvtepi32_ps(sums));
  return _mm512_fmadd_ps(_mm512_mul_ps(scales, _mm512_set1_ps(row_scale)), dot, y);
}

// Multiplies rows `first` to first + M - 1 by the strips n. Returns in y: (STRIPS, M, 16).
//
// The inner loops are not a function of their own: GCC 12 then compiles them to other code.
template <Format F, int M, int STRIPS>
void multiply_strips(const PackedWeights& w, const int64_t (&n)[STRIPS], const FixedPointRows& x,
                     int64_t first, __m512* y) {
  constexpr int kTiles = 8 / bits(F);  // of a register of packed weights
  const uint8_t *tiles[STRIPS], *headers[STRIPS];
  for (int t = 0; t < STRIPS; t++) tiles[t] = w.spans(n[t]);
  const int64_t header = header_bytes<F>(w.block), stride = 2 * x.stride;
  const int8_t* parts[2] = {x.high(first), x.low(first)};
  const float *row_sums = &x.sum[x.block(first, 0)], *row_scales = &x.scale[x.block(first, 0)];
  for (int i = 0; i < STRIPS * M; i++) y[i] = _mm512_setzero_ps();
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
          if (p) _mm_prefetch(from + kAhead, _MM_HINT_T0);
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
      const __m512 zero = load_zeros<F>(headers[t], w.block, in_span);
      const __m512 scale = load_scales<F>(headers[t], in_span);
      for (int m = 0; m < M; m++) {
        const int64_t i = t * M + m, at = b * kAmxRows + m;
        y[i] = add_block(y[i], sums[i], zero, scale, row_sums[at], row_scales[at]);
      }
    }
  }
  for (int i = 0; i < STRIPS * M; i++)
    y[i] = _mm512_mul_ps(y[i], _mm512_loadu_ps(w.scales(n[i / M])));
}

// Multiplies rows from m on in groups of M, and stores them. Returns the first row that is left.
template <Format F, int M, int STRIPS>
int64_t multiply_rows(const PackedWeights& w, const int64_t (&n)[STRIPS], const FixedPointRows& x,
                      int64_t m, const Output& out) {
  __m512 y[STRIPS * M];
  for (; m + M <= out.M; m += M) {
    multiply_strips<F, M, STRIPS>(w, n, x, m, y);
    for (int i = 0; i < STRIPS * M; i++) out.store(m + i % M, n[i / M], y[i]);
  }
  return m;
}

}  // namespace
