// Integer products of 16-bit pairs: fixed-point rows by strips of packed weights, on CPUs that
// multiply pairs of 16-bit integers and add both products (AVX2's vpmaddwd and its kin).
//
// A packed tile holds four inputs of an output in four bytes. Seen as two 16-bit lanes, its low
// bytes are the weights of inputs 0 and 2, its high bytes those of inputs 1 and 3: a mask or a shift
// turns bytes or nibbles into pairs, without moving any of them between lanes. A sum is below 2^31:
// 128 int8 inputs give at most 128 * 255 * 32639, 256 int4 inputs less.
//
// Start at multiply_pairs. For one row, weights are unpacked in registers; for more rows, a span is
// unpacked once into a panel that stays in the L1 cache, and kPanelRows rows share each load of it.

#pragma once

#include "fixed_point.h"
#include "output.h"

namespace {

constexpr int kPanelRows = kLanes == 4 ? 5 : 6;  // their sums and a strip's weights fit in registers
constexpr int kRowStreams = 2;         // strips that one row reads side by side
constexpr int64_t kRowsInCache = 192;  // rows whose outputs of a strip stay in the L1 cache

// Returns pairs j of a register of packed weights. A register holds 16 / bits(F) pairs.
template <Format F>
inline NativeInt weight_pairs(NativeInt v, int j) {
  if constexpr (F == kInt8)
    return j == 0 ? native_and(v, native_splat(0x00ff00ff)) : native_shift_right_16<8>(v);
  const NativeInt nibble = native_splat(0x000f000f);
  if (j == 0) return native_and(v, nibble);
  if (j == 1) return native_and(native_shift_right_16<8>(v), nibble);
  if (j == 2) return native_and(native_shift_right_16<4>(v), nibble);
  return native_shift_right_16<12>(v);
}

template <Format F>
constexpr int kPairsOf = 16 / bits(F);  // pairs of inputs in a cache line of packed weights

// Multiplies one row by the strips n, which are read side by side. Returns in y: (STRIPS, 16).
template <Format F, int STRIPS>
void multiply_row(const PackedWeights& w, const int64_t (&n)[STRIPS], const FixedPointRows& x,
                  Floats* y) {
  const int64_t header = header_bytes<F>(w.block), span_blocks = kSpan / w.block;
  const uint8_t *tiles[STRIPS], *headers[STRIPS] = {};
  for (int t = 0; t < STRIPS; t++) tiles[t] = w.spans(n[t]), y[t] = splat(0.f);
  const int32_t* pairs = x.pairs(0);
  for (int64_t b = 0; b < x.blocks; b++) {
    const int64_t in_span = b % span_blocks;
    for (int t = 0; t < STRIPS && in_span == 0; t++) {
      headers[t] = tiles[t];
      prefetch(tiles[t] + kAhead, header);
      tiles[t] += header;
    }
    Ints sums[STRIPS];
    for (int t = 0; t < STRIPS; t++) sums[t] = splat(0);
    for (int64_t k = 0; k < w.block / 2; k += kPairsOf<F>, pairs += kPairsOf<F>) {
#pragma GCC unroll 4
      for (int t = 0; t < STRIPS; t++) {
        prefetch(tiles[t] + kAhead);
#pragma GCC unroll 16
        for (int p = 0; p < kParts; p++) {
          const NativeInt v = native_load_bits(tiles[t] + 4 * p * kLanes);
#pragma GCC unroll 4
          for (int j = 0; j < kPairsOf<F>; j++)
            sums[t].part[p] = native_add_pair_products(sums[t].part[p], weight_pairs<F>(v, j),
                                                       native_splat(pairs[j]));
        }
        tiles[t] += kLine;
      }
    }
    const int64_t at = x.block(0, b);
    for (int t = 0; t < STRIPS; t++)
      y[t] = add_block(y[t], sums[t], load_zeros<F>(headers[t], w.block, in_span),
                       load_scales<F>(headers[t], in_span), x.sum[at], x.scale[at]);
  }
  for (int t = 0; t < STRIPS; t++) y[t] = y[t] * w.output_scales(n[t]);
}

// The weights of a strip and a span as pairs of 16-bit integers.
struct alignas(kLine) Panel {
  int32_t pairs[kSpan / 2][kStrip];
};

template <Format F>
void unpack_panel(const uint8_t* tiles, Panel& panel) {
  for (int64_t k = 0; k < kSpan / 2; k += kPairsOf<F>, tiles += kLine) {
    prefetch(tiles + kAhead);
#pragma GCC unroll 16
    for (int p = 0; p < kParts; p++) {
      const NativeInt v = native_load_bits(tiles + 4 * p * kLanes);
#pragma GCC unroll 4
      for (int j = 0; j < kPairsOf<F>; j++)
        native_store(&panel.pairs[k + j][p * kLanes], weight_pairs<F>(v, j));
    }
  }
}

// Adds the products of a span's panel and R rows from `row` on to y, (R, 16).
template <Format F, int R>
void multiply_panel(const Panel& panel, const uint8_t* header, int64_t block, int64_t span,
                    const FixedPointRows& x, int64_t row, Floats* y) {
  const int32_t* pairs[R];
  const float *row_sums[R], *row_scales[R];
  for (int r = 0; r < R; r++) {
    const int64_t at = x.block(row + r, span * (kSpan / block));
    pairs[r] = x.pairs(row + r) + span * kSpan / 2;
    row_sums[r] = &x.sum[at], row_scales[r] = &x.scale[at];
  }
  for (int64_t b = 0; b < kSpan / block; b++) {
    NativeInt sums[R][kParts];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
      for (int p = 0; p < kParts; p++) sums[r][p] = native_splat(0);
#pragma GCC unroll 4
    for (int64_t k = b * block / 2; k < (b + 1) * block / 2; k++) {
      NativeInt weights[kParts];
#pragma GCC unroll 16
      for (int p = 0; p < kParts; p++)
        weights[p] = native_load_bits(
            reinterpret_cast<const uint8_t*>(&panel.pairs[k][p * kLanes]));
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        const NativeInt input = native_splat(pairs[r][k]);
#pragma GCC unroll 16
        for (int p = 0; p < kParts; p++)
          sums[r][p] = native_add_pair_products(sums[r][p], weights[p], input);
        for (int p = 0; p < kParts; p++) native_keep(sums[r][p]);
      }
    }
    const Floats zeros = load_zeros<F>(header, block, b), scales = load_scales<F>(header, b);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      Ints total;
#pragma GCC unroll 16
      for (int p = 0; p < kParts; p++) total.part[p] = sums[r][p];
      y[r] = add_block(y[r], total, zeros, scales, row_sums[r][b * kRowGroup],
                       row_scales[r][b * kRowGroup]);
    }
  }
}

// Does multiply_panel for `count` rows, a number from 1 to R.
template <Format F, int R = kPanelRows>
void multiply_panel_rows(int64_t count, const Panel& panel, const uint8_t* header, int64_t block,
                         int64_t span, const FixedPointRows& x, int64_t row, Floats* y) {
  if (count == R) return multiply_panel<F, R>(panel, header, block, span, x, row, y);
  if constexpr (R > 1)
    multiply_panel_rows<F, R - 1>(count, panel, header, block, span, x, row, y);
}

// Multiplies all rows by strip n, and stores them.
template <Format F>
void multiply_strip(const PackedWeights& w, int64_t n, const FixedPointRows& x,
                    const Output& out) {
  Panel panel;
  Floats y[kRowsInCache];
  const int64_t header = header_bytes<F>(w.block), span_bytes_of = span_bytes<F>(w.block);
  for (int64_t first = 0; first < out.M; first += kRowsInCache) {
    const int64_t rows = std::min(kRowsInCache, out.M - first);
    for (int64_t r = 0; r < rows; r++) y[r] = splat(0.f);
    for (int64_t s = 0; s < w.K / kSpan; s++) {
      const uint8_t* span = w.spans(n) + s * span_bytes_of;
      unpack_panel<F>(span + header, panel);
      // As many groups as are needed, of sizes that differ by at most one.
      const int64_t groups = (rows + kPanelRows - 1) / kPanelRows;
      for (int64_t g = 0; g < groups; g++) {
        const int64_t r = rows * g / groups, count = rows * (g + 1) / groups - r;
        multiply_panel_rows<F>(count, panel, span, w.block, s, x, first + r, y + r);
      }
    }
    for (int64_t r = 0; r < rows; r++)
      out.store_strip(first + r, n, y[r] * w.output_scales(n));
  }
}

// Multiplies the one row by strips `from` to `to`, of which it reads STRIPS side by side.
template <Format F, int STRIPS>
void multiply_one_row(const PackedWeights& w, const FixedPointRows& x, int64_t from, int64_t to,
                      const Output& out) {
  const int64_t part = (to - from) / STRIPS;
  Floats y[STRIPS];
  for (int64_t i = 0; i < part; i++) {
    int64_t n[STRIPS];
    for (int t = 0; t < STRIPS; t++) n[t] = from + t * part + i;
    multiply_row<F, STRIPS>(w, n, x, y);
    for (int t = 0; t < STRIPS; t++) out.store_strip(0, n[t], y[t]);
  }
  for (int64_t n = from + STRIPS * part; n < to; n++) {
    multiply_row<F, 1>(w, {n}, x, y);
    out.store_strip(0, n, y[0]);
  }
}

// Multiplies all rows by strips `from` to `to`, and stores them in `out`.
template <Format F>
void multiply_pairs(const PackedWeights& w, const FixedPointRows& x, int64_t from, int64_t to,
                    const Output& out) {
  if (out.M == 1) return multiply_one_row<F, kRowStreams>(w, x, from, to, out);
  for (int64_t n = from; n < to; n++) multiply_strip<F>(w, n, x, out);
}

}  // namespace
