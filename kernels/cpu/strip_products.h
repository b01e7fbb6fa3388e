// Integer products of 16-bit pairs: fixed-point rows by strips of packed weights, on all CPUs
// without AVX-512 VNNI. AVX2's vpmaddwd multiplies 16 numbers of 16 bits by 16, and adds the
// products of each two neighbours.
//
// Four bytes of packed weights belong to one output. They hold four inputs in int8, and eight in
// int4: one tile in the low nibbles, the next tile in the high nibbles. Seen as two 16-bit lanes,
// the low bytes of the lanes are inputs 0 and 2, the high bytes inputs 1 and 3: a mask or a shift
// turns bytes or nibbles into pairs, without moving any of them between lanes. A sum is below
// 2^31: 128 int8 inputs give at most 128 * 255 * 32639, 256 int4 inputs less.
//
// Start at multiply_pairs. Weights are unpacked in registers, for kRowsTogether rows at a time: to
// unpack them into memory for more rows takes longer.

#pragma once

#include "fixed_point.h"
#include "output.h"
#include "row_groups.h"

namespace {

constexpr int kRowStreams = 4;  // strips that one row reads side by side
constexpr int kRowsTogether = kLanes == 16 ? 8 : 4;  // rows whose sums fit in the registers
// Strips and rows whose outputs, 8 KB, and a span of the rows, 16 KB, stay in the L1 cache.
constexpr int64_t kStripsInCache = 4, kRowsInCache = 32;

// Returns pair j of each 32-bit lane of a register of packed weights, as unsigned 16-bit integers.
// Pair 0: inputs 0 and 2. Pair 1: inputs 1 and 3. In int4, pairs 2 and 3 are those of the second
// tile.
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
constexpr int kPairsOf = 16 / bits(F);  // pairs of weights in a lane

// Multiplies row 0, the only one, by the strips n, which are read side by side. Returns in y:
// (STRIPS, 16).
template <Format F, int STRIPS>
void multiply_row(const PackedWeights& w, const int64_t (&n)[STRIPS], const FixedPointRows& x,
                  Floats* y) {
  const int64_t header = header_bytes<F>(w.block), span_blocks = kSpan / w.block;
  const uint8_t *tiles[STRIPS], *headers[STRIPS] = {};
  for (int t = 0; t < STRIPS; t++) tiles[t] = w.spans(n[t]), y[t] = splat(0.f);
  const int32_t* pairs = x.pairs(0);
  for (int64_t b = 0; b < x.blocks; b++) {
    const int64_t in_span = b % span_blocks;
    if (in_span == 0) {
      for (int t = 0; t < STRIPS; t++) {
        headers[t] = tiles[t], tiles[t] += header;
        prefetch(headers[t] + kAhead, header);
      }
    }
    Ints sums[STRIPS];
    for (int t = 0; t < STRIPS; t++) sums[t] = splat(0);
    for (int64_t k = 0; k < w.block / 2; k += kPairsOf<F>, pairs += kPairsOf<F>) {
      NativeInt inputs[kPairsOf<F>];
#pragma GCC unroll 4
      for (int j = 0; j < kPairsOf<F>; j++) inputs[j] = native_splat(pairs[j]);
#pragma GCC unroll 4
      for (int t = 0; t < STRIPS; t++) {
        prefetch(tiles[t] + kAhead);
#pragma GCC unroll 16
        for (int p = 0; p < kParts; p++) {
          const NativeInt v = native_load_bits(tiles[t] + 4 * p * kLanes);
#pragma GCC unroll 4
          for (int j = 0; j < kPairsOf<F>; j++)
            sums[t].part[p] = native_add_pair_products(sums[t].part[p], weight_pairs<F>(v, j),
                                                       inputs[j]);
          native_keep(sums[t].part[p]);
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

// A span of a strip: its packed weights, and the scales and zero points of its blocks.
struct Span {
  const uint8_t* tiles;
  int64_t number;         // its index in the strip
  int64_t block, blocks;  // block: inputs that share a scale
  Floats zeros[kSpan / kChunk], scales[kSpan / kChunk];
};

// Fills `span` from span `number`, which begins at `header`. Its scales and zero points are read
// once, for all groups of rows.
template <Format F>
inline void load_span(const PackedWeights& w, const uint8_t* header, int64_t number, Span& span) {
  span.tiles = header + header_bytes<F>(w.block), span.number = number, span.block = w.block;
  span.blocks = std::min(kSpan, w.K - number * kSpan) / w.block;
  for (int64_t b = 0; b < span.blocks; b++) {
    span.zeros[b] = load_zeros<F>(header, w.block, b);
    span.scales[b] = load_scales<F>(header, b);
  }
}

// Where R rows of a span begin: their pairs, and for each block their sums and scales.
template <int R>
struct RowPointers {
  const int32_t* pairs[R];
  const float *sums[R], *scales[R];

  RowPointers(const FixedPointRows& x, int64_t row, const Span& span) {
    for (int r = 0; r < R; r++) {
      const int64_t at = x.block(row + r, span.number * (kSpan / span.block));
      pairs[r] = x.pairs(row + r) + span.number * kSpan / 2;
      sums[r] = &x.sum[at], scales[r] = &x.scale[at];
    }
  }
};

// Returns register p of y plus the products of a block, as add_block does for a whole strip.
inline NativeFloat add_block_part(NativeFloat y, NativeInt sums, NativeFloat zeros,
                                  NativeFloat scales, float row_sum, float row_scale) {
  const NativeFloat dot = native_fnma(zeros, native_splat(row_sum), native_to_float(sums));
  return native_fma(native_multiply(scales, native_splat(row_scale)), dot, y);
}

// Adds to y, (R, 16), the products of a span by rows `row` to row + R - 1, without the outputs' own
// scales. Unpacks the weights in registers.
template <Format F, int R>
void multiply_span(const Span& span, const FixedPointRows& x, int64_t row, Floats* y) {
  const RowPointers<R> rows(x, row, span);
  const uint8_t* tiles = span.tiles;
  for (int64_t b = 0; b < span.blocks; b++) {
    NativeInt sums[R][kParts];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
      for (int p = 0; p < kParts; p++) sums[r][p] = native_splat(0);
    const int64_t begin = b * span.block / 2, end = begin + span.block / 2;
    for (int64_t k = begin; k < end; k += kPairsOf<F>, tiles += kLine) {
      NativeInt v[kParts];
#pragma GCC unroll 16
      for (int p = 0; p < kParts; p++) v[p] = native_load_bits(tiles + 4 * p * kLanes);
#pragma GCC unroll 4
      for (int j = 0; j < kPairsOf<F>; j++) {
        NativeInt weights[kParts];
#pragma GCC unroll 16
        for (int p = 0; p < kParts; p++) weights[p] = weight_pairs<F>(v[p], j);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
          const NativeInt input = native_splat(rows.pairs[r][k + j]);
#pragma GCC unroll 16
          for (int p = 0; p < kParts; p++) {
            sums[r][p] = native_add_pair_products(sums[r][p], weights[p], input);
            native_keep(sums[r][p]);
          }
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
      for (int p = 0; p < kParts; p++)
        y[r].part[p] =
            add_block_part(y[r].part[p], sums[r][p], span.zeros[b].part[p], span.scales[b].part[p],
                           rows.sums[r][b * kRowGroup], rows.scales[r][b * kRowGroup]);
  }
}

// Multiplies rows `first` to first + rows - 1 by `strips` strips from n on, and stores them. One
// span of these rows stays in the L1 cache while all the strips are multiplied by it.
template <Format F>
void multiply_strips(const PackedWeights& w, int64_t n, int64_t strips, const FixedPointRows& x,
                     int64_t first, int64_t rows, const Output& out) {
  const int64_t bytes = span_bytes<F>(w.block), spans = spans_of(w.K);
  Floats y[kStripsInCache][kRowsInCache];
  for (int64_t i = 0; i < strips; i++)
    for (int64_t r = 0; r < rows; r++) y[i][r] = splat(0.f);
  for (int64_t at = 0; at < spans * strips; at++) {
    const auto data_at = [&](int64_t at) { return w.spans(n + at % strips) + at / strips * bytes; };
    // The next span that is multiplied; after the last one, the first span of the next strips.
    prefetch(at + 1 < spans * strips ? data_at(at + 1) : w.spans(n + strips), bytes);
    Span span;
    load_span<F>(w, data_at(at), at / strips, span);
    Floats* sums = y[at % strips];
    in_groups<kRowsTogether>(rows, [&](auto count, int64_t r) {
      multiply_span<F, decltype(count)::value>(span, x, first + r, sums + r);
    });
  }
  for (int64_t i = 0; i < strips; i++)
    for (int64_t r = 0; r < rows; r++)
      out.store_strip(first + r, n + i, y[i][r] * w.output_scales(n + i));
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
  for (int64_t n = from; n < to; n += kStripsInCache)
    for (int64_t m = 0; m < out.M; m += kRowsInCache)
      multiply_strips<F>(w, n, std::min(kStripsInCache, to - n), x, m,
                         std::min(kRowsInCache, out.M - m), out);
}

}  // namespace
