// Integer products by AMX: eight fixed-point rows by two strips of packed weights at a time.

#pragma once

#include "amx.h"
#include "vnni.h"

namespace {

#ifdef __AMX_INT8__

// Does what multiply_strips does, for the eight rows from `first` on and the two strips n, with the
// same bits. Returns in y: (2, 8, 16). A tile of activations has 16 rows, each x.stride bytes after
// the one before: by turns a row's high bytes and its low bytes. While AMX multiplies block b,
// AVX-512 unpacks block b + 1 and scales block b - 1, so that neither unit waits for the other.
template <Format F, int64_t BLOCK>
void multiply_two_strips(const PackedWeights& w, const int64_t (&n)[2], const FixedPointRows& x,
                         int64_t first, Floats* y) {
  static constexpr int32_t kZeros[2 * kRowGroup * kStrip] = {};
  constexpr int64_t kBlocks = kSpan / BLOCK, kHeader = header_bytes<F>(BLOCK);  // of a span
  constexpr int64_t kBytes = kStrip * BLOCK * bits(F) / 8, kSpanBytes = kHeader + kBlocks * kBytes;
  auto header_at = [](int64_t b) { return b / kBlocks * kSpanBytes; };
  auto weights_at = [=](int64_t b) { return header_at(b) + kHeader + b % kBlocks * kBytes; };
  alignas(kLine) uint8_t unpacked[2][2][kStrip * BLOCK];  // (block % 2, strip): two blocks in turn
  alignas(kLine) int32_t sums[2][kRowGroup][2][kStrip];    // (strip, row): of high and of low bytes
  const uint8_t* spans[2] = {w.spans(n[0]), w.spans(n[1])};
  const int8_t* rows = x.high(first);
  const int64_t blocks = x.blocks, stride = x.stride;
  const float *row_sums = &x.sum[x.block(first, 0)], *row_scales = &x.scale[x.block(first, 0)];
  Floats totals[2][kRowGroup];
#pragma GCC unroll 16
  for (int i = 0; i < 2 * kRowGroup; i++) totals[i / kRowGroup][i % kRowGroup] = splat(0.f);

  for (int64_t b = -1; b <= blocks; b++) {
    if (b > 0) amx_store<kSums0>(sums[0]), amx_store<kSums1>(sums[1]);
    if (b >= 0 && b < blocks) {  // multiply
      const uint8_t* tiles[2];
      for (int t = 0; t < 2; t++)
        tiles[t] = bits(F) == 4 ? unpacked[b % 2][t] : spans[t] + weights_at(b);
      amx_load<kSums0>(kZeros, kLine), amx_load<kSums1>(kZeros, kLine);
#pragma GCC unroll 8
      for (int64_t k = 0; k < BLOCK; k += kChunk) {
        amx_load<kRows>(rows + b * BLOCK + k, stride);
        for (int t = 0; t < 2 && bits(F) == 8; t++)
          prefetch(tiles[t] + kStrip * k + kAhead, kStrip * kChunk);
        amx_load<kWeights0>(tiles[0] + kStrip * k, kLine), amx_int8_dot<kSums0, kWeights0>();
        amx_load<kWeights1>(tiles[1] + kStrip * k, kLine), amx_int8_dot<kSums1, kWeights1>();
      }
    }
    if (const int64_t next = b + 1; bits(F) == 4 && next < blocks) {  // unpack
#pragma GCC unroll 2
      for (int t = 0; t < 2; t++) {
        const uint8_t* from = spans[t] + weights_at(next);
        if (next % kBlocks == 0) prefetch(from - kHeader + kAhead, kHeader);
#pragma GCC unroll 4
        for (int64_t i = 0; i < kBytes; i += kLine) {
          __m512i tile[2];
          prefetch(from + i + kAhead);
          unpack<F>(from + i, tile);
          _mm512_store_si512(unpacked[next % 2][t] + 2 * i, tile[0]);
          _mm512_store_si512(unpacked[next % 2][t] + 2 * i + kLine, tile[1]);
        }
      }
    }
    if (const int64_t last = b - 1; last >= 0) {  // scale
#pragma GCC unroll 2
      for (int t = 0; t < 2; t++) {
        const uint8_t* header = spans[t] + header_at(last);
        const Floats zero = load_zeros<F>(header, BLOCK, last % kBlocks);
        const Floats scale = load_scales<F>(header, last % kBlocks);
#pragma GCC unroll 8
        for (int m = 0; m < kRowGroup; m++) {
          const __m512i high = _mm512_slli_epi32(_mm512_load_si512(sums[t][m][0]), 8);
          const __m512i sum = _mm512_add_epi32(high, _mm512_load_si512(sums[t][m][1]));
          totals[t][m] = add_block(totals[t][m], Ints{{(NativeInt)sum}}, zero, scale, row_sums[m],
                                   row_scales[m]);
        }
      }
      row_sums += kRowGroup, row_scales += kRowGroup;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < 2 * kRowGroup; i++)
    y[i] = totals[i / kRowGroup][i % kRowGroup] * w.output_scales(n[i / kRowGroup]);
}

// Multiplies rows in groups of eight while more than kMaxVnniRows are left, and stores the outputs.
// The last group may have fewer rows. Returns the first row that is left; 0 without AMX.
template <Format F>
int64_t multiply_rows_by_amx(const PackedWeights& w, const int64_t (&n)[2], const FixedPointRows& x,
                             const Output& out) {
  int64_t m = 0;
  Floats y[2 * kRowGroup];
  for (; has_amx() && out.M - m > kMaxVnniRows; m += kRowGroup) {
    if (w.block == 32) multiply_two_strips<F, 32>(w, n, x, m, y);
    else if (w.block == 64) multiply_two_strips<F, 64>(w, n, x, m, y);
    else if (w.block == 128) multiply_two_strips<F, 128>(w, n, x, m, y);
    else multiply_two_strips<F, 256>(w, n, x, m, y);
    for (int i = 0; i < 2 * kRowGroup; i++)
      if (m + i % kRowGroup < out.M) out.store_strip(m + i % kRowGroup, n[i / kRowGroup], y[i]);
  }
  return m;
}

#else

template <Format F>
int64_t multiply_rows_by_amx(const PackedWeights&, const int64_t (&)[2], const FixedPointRows&,
                             const Output&) {
  return 0;
}

#endif

}  // namespace
