// Integer products of fixed-point rows by strips of packed weights, on all CPUs without AVX-512
// VNNI. factors.h turns both into registers that the CPU multiplies.
//
// Start at multiply_strips. Weights are unpacked in registers, for kRowsTogether rows at a time: to
// unpack them into memory for more rows takes longer.

#pragma once

#include "factors.h"
#include "output.h"
#include "row_groups.h"

namespace {

// Planes of each of several rows. A single row may have more, see RowFactors.
constexpr int kRowPlanes = Factors<kInt8>::kPlanes;
// Strips that are read in turn for one row, a few cache lines of each. They are far apart in
// memory, because memory is read faster from several places.
constexpr int kRowStreams = 4;
// Rows whose sums fit in the registers.
constexpr int kRowsTogether = (kLanes == 16 ? 8 : 4) / kRowPlanes;
// Strips and rows whose outputs, 8 KB, and a span of the rows, 16 KB, stay in the L1 cache.
constexpr int64_t kStripsInCache = 4, kRowsInCache = 32;
constexpr int64_t kFewRows = 8;

// Multiplies a register of packed weights by the row's values of each step and plane. Adds the
// products to register p of the plane's sums. Each sum is a local variable while it grows, because
// GCC 12 would store an element of `sums` in memory after each addition.
template <class Factor>
[[gnu::always_inline]] inline void add_register_products(
    NativeInt packed, const NativeInt (&values)[Factor::kSteps][Factor::kPlanes], int p,
    Ints (&sums)[Factor::kPlanes]) {
  NativeInt weights[Factor::kSteps];
#pragma GCC unroll 4
  for (int j = 0; j < Factor::kSteps; j++) weights[j] = Factor::weights(packed, j);
#pragma GCC unroll 2
  for (int h = 0; h < Factor::kPlanes; h++) {
    NativeInt sum = sums[h].part[p];
#pragma GCC unroll 4
    for (int j = 0; j < Factor::kSteps; j++) {
      sum = Factor::add_products(sum, weights[j], values[j][h]);
      Factor::keep(sum);
    }
    sums[h].part[p] = sum;
  }
}

// Multiplies a block of `inputs` inputs of a row by the tiles of STRIPS strips. Returns the sums in
// totals, (STRIPS, 16). lanes: the block's lanes of each plane of the row. row_sum: the sum of the
// row's numbers in the block. Sums are added to the totals after every `exact` cache lines, before
// they could overflow. In the loops, k + i: cache line, t: strip, p: register of its 16 outputs, j:
// step, h: plane of the row.
template <class Factor, int STRIPS>
[[gnu::always_inline]] inline void multiply_block(const uint8_t* const* tiles,
                                                  const int32_t* const* lanes, int64_t inputs,
                                                  float row_sum, Ints (&totals)[STRIPS]) {
  constexpr int kPlanes = Factor::kPlanes, kSteps = Factor::kSteps;
  constexpr int64_t kLineInputs = Factor::kInputs * kSteps;
  constexpr bool kWhole = Factor::kExact == kSpan;  // the sums hold the products of any block
  constexpr int kUnrolled = kWhole ? 1 : Factor::kExact / kLineInputs;
  const int64_t lines = inputs / kLineInputs, exact = kWhole ? lines : kUnrolled;
  for (Ints& total : totals) total = splat(0);
  for (int64_t first = 0; first < lines; first += exact) {
    Ints sums[STRIPS][kPlanes];
    for (auto& strip : sums)
      for (Ints& plane : strip) plane = splat(0);
    for (int64_t k = first; k < first + exact; k += kUnrolled) {
#pragma GCC unroll 4
      for (int i = 0; i < kUnrolled; i++) {
        NativeInt values[kSteps][kPlanes];
#pragma GCC unroll 2
        for (int h = 0; h < kPlanes; h++)
#pragma GCC unroll 4
          for (int j = 0; j < kSteps; j++)
            values[j][h] = native_splat(lanes[h][(k + i) * kSteps + j]);
#pragma GCC unroll 4
        for (int t = 0; t < STRIPS; t++) {
          const uint8_t* line = tiles[t] + (k + i) * kLine;
          prefetch(line + kAhead);
#pragma GCC unroll 16
          for (int p = 0; p < kParts; p++) {
            const NativeInt packed = native_load_bits(line + 4 * p * kLanes);
            add_register_products<Factor>(packed, values, p, sums[t]);
          }
        }
      }
    }
    for (int t = 0; t < STRIPS; t++) totals[t] = totals[t] + Factor::total(sums[t], row_sum);
  }
}

// Multiplies row 0, the only row, by the STRIPS strips numbered n: a block of all strips before the
// next block. Returns the outputs in y, (STRIPS, 16).
template <Format F, int STRIPS>
void multiply_row(const PackedWeights& w, const int64_t (&n)[STRIPS], const FixedPointRows& x,
                  Floats* y) {
  using Factor = RowFactors<F>;
  constexpr int kTogether = std::min(STRIPS, 4 / Factor::kPlanes);  // whose sums fit in registers
  constexpr bool kShort = Factor::kExact < kSpan;
  const int64_t header = header_bytes<F>(w.block), span_blocks = blocks_of(kSpan, w.block);
  const uint8_t* tiles[STRIPS];
  for (int t = 0; t < STRIPS; t++) tiles[t] = w.spans(n[t]), y[t] = splat(0.f);
  const int32_t* lanes[Factor::kPlanes];
  for (int h = 0; h < Factor::kPlanes; h++) lanes[h] = x.lanes(0, h);
  for (int64_t first = 0; first < x.blocks; first += span_blocks) {
    const uint8_t* headers[STRIPS];
    for (int t = 0; t < STRIPS; t++) {
      headers[t] = tiles[t], tiles[t] += header;
      prefetch(headers[t] + kAhead, header);
    }
    for (int64_t b = 0; b < std::min(span_blocks, x.blocks - first); b++) {
      const int64_t at = x.block(0, first + b);
#pragma GCC unroll 2
      for (int s = 0; s < STRIPS; s += kTogether) {
        Ints sums[kTogether];
        // With a constant number of inputs the totals stay in registers.
        if (kShort && w.block == Factor::kExact)
          multiply_block<Factor>(tiles + s, lanes, Factor::kExact, x.sum[at], sums);
        else
          multiply_block<Factor>(tiles + s, lanes, w.block, x.sum[at], sums);
        for (int t = 0; t < kTogether; t++)
          y[s + t] = add_block(y[s + t], sums[t], load_zeros<F>(headers[s + t], w.block, b),
                               load_scales<F>(headers[s + t], b), x.sum[at], x.scale[at]);
      }
      for (const int32_t*& plane : lanes) plane += w.block / Factor::kInputs;
      for (const uint8_t*& tile : tiles) tile += kStrip * w.block * bits(F) / 8;
    }
  }
  for (int t = 0; t < STRIPS; t++) y[t] = y[t] * w.output_scales(n[t]);
}

// A span of a strip: its packed weights, and the scales and zero points of its blocks.
struct Span {
  const uint8_t *tiles, *next;  // next: the span that is multiplied next
  int64_t number;         // its index in the strip
  int64_t block, blocks;  // block: inputs that share a scale
  Floats zeros[kSpan / kChunk], scales[kSpan / kChunk];
};

// Fills `span` from span `number` of a strip, which begins at `header`. Scales and zero points are
// thus read once, for all groups of rows.
template <Format F>
inline void load_span(const PackedWeights& w, const uint8_t* header, int64_t number, Span& span) {
  span.tiles = header + header_bytes<F>(w.block), span.number = number, span.block = w.block;
  span.blocks = blocks_of(std::min(kSpan, w.K - number * kSpan), w.block);
  for (int64_t b = 0; b < span.blocks; b++) {
    span.zeros[b] = load_zeros<F>(header, w.block, b);
    span.scales[b] = load_scales<F>(header, b);
  }
}

// Where a span begins in R rows: the lanes of each plane, and the sums and scales of its first
// block. Those of the next block lie kRowGroup numbers further.
template <int R>
struct RowPointers {
  const int32_t* lanes[R][kRowPlanes];
  const float *sums[R], *scales[R];

  RowPointers(const FixedPointRows& x, int64_t row, const Span& span) {
    for (int r = 0; r < R; r++) {
      const int64_t at = x.block(row + r, span.number * blocks_of(kSpan, span.block));
      for (int h = 0; h < kRowPlanes; h++)
        lanes[r][h] = x.lanes(row + r, h) + span.number * kSpan / Factors<kInt8>::kInputs;
      sums[r] = &x.sum[at], scales[r] = &x.scale[at];
    }
  }
};

// Does for one register of a strip's outputs what add_block does for the whole strip.
inline NativeFloat add_block_part(NativeFloat y, NativeInt sums, NativeFloat zeros,
                                  NativeFloat scales, float row_sum, float row_scale) {
  const NativeFloat dot = native_fnma(zeros, native_splat(row_sum), native_to_float(sums));
  return native_fma(native_multiply(scales, native_splat(row_scale)), dot, y);
}

// Adds to y, (R, 16), the products of a span by rows `row` to row + R - 1. Unpacks the weights in
// registers. Does not multiply by output_scales: multiply_rows_by_strips does, after all spans.
// FETCHES: whether to prefetch the next span, a line of it for each line of this one.
template <Format F, int R, bool FETCHES>
void multiply_span(const Span& span, const FixedPointRows& x, int64_t row, Floats* y) {
  using Factor = Factors<F>;
  constexpr int kPlanes = Factor::kPlanes, kSteps = Factor::kSteps;
  const RowPointers<R> rows(x, row, span);
  const uint8_t* tiles = span.tiles;
  int64_t lane = 0;
  for (int64_t b = 0; b < span.blocks; b++) {
    Ints sums[R][kPlanes];
#pragma GCC unroll 8
    for (int i = 0; i < R * kPlanes; i++) sums[i / kPlanes][i % kPlanes] = splat(0);
    const int64_t end = lane + span.block / Factor::kInputs;
    for (; lane < end; lane += kSteps, tiles += kLine) {
      if constexpr (FETCHES) prefetch(span.next + (tiles - span.tiles));
      NativeInt v[kParts];
#pragma GCC unroll 16
      for (int p = 0; p < kParts; p++) v[p] = native_load_bits(tiles + 4 * p * kLanes);
#pragma GCC unroll 4
      for (int j = 0; j < kSteps; j++) {
        NativeInt weights[kParts];
#pragma GCC unroll 16
        for (int p = 0; p < kParts; p++) weights[p] = Factor::weights(v[p], j);
#pragma GCC unroll 16
        for (int i = 0; i < R * kPlanes; i++) {
          const int r = i / kPlanes, h = i % kPlanes;
          const NativeInt input = native_splat(rows.lanes[r][h][lane + j]);
#pragma GCC unroll 16
          for (int p = 0; p < kParts; p++) {
            NativeInt& sum = sums[r][h].part[p];
            sum = Factor::add_products(sum, weights[p], input);
            Factor::keep(sum);
          }
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const float sum = rows.sums[r][b * kRowGroup], scale = rows.scales[r][b * kRowGroup];
      const Ints total = Factor::total(sums[r], sum);
#pragma GCC unroll 16
      for (int p = 0; p < kParts; p++)
        y[r].part[p] = add_block_part(y[r].part[p], total.part[p], span.zeros[b].part[p],
                                      span.scales[b].part[p], sum, scale);
    }
  }
}

// Multiplies rows `first` to first + rows - 1 by `strips` strips from n on, and stores the outputs.
// One span of these rows stays in the L1 cache while all the strips are multiplied by it. FEW:
// whether there are at most kFewRows. Then the next span is prefetched line by line, which is 1.0
// to 1.3 times as fast as all at once. For more rows that would be 2 to 8 % slower.
template <Format F, bool FEW>
void multiply_rows_by_strips(const PackedWeights& w, int64_t n, int64_t strips,
                             const FixedPointRows& x, int64_t first, int64_t rows,
                             const Output& out) {
  const int64_t bytes = span_bytes<F>(w.block), spans = spans_of(w.K);
  Floats y[kStripsInCache][kRowsInCache];
  for (int64_t i = 0; i < strips; i++)
    for (int64_t r = 0; r < rows; r++) y[i][r] = splat(0.f);
  for (int64_t at = 0; at < spans * strips; at++) {
    const auto data_at = [&](int64_t at) { return w.spans(n + at % strips) + at / strips * bytes; };
    Span span;
    // After the last span follows the first span of the next strips.
    span.next = at + 1 < spans * strips ? data_at(at + 1) : w.spans(n + strips);
    if (!FEW) prefetch(span.next, bytes);
    load_span<F>(w, data_at(at), at / strips, span);
    Floats* sums = y[at % strips];
    in_groups<kRowsTogether>(rows, [&](auto count, int64_t r) {
      multiply_span<F, decltype(count)::value, FEW>(span, x, first + r, sums + r);
    });
  }
  for (int64_t i = 0; i < strips; i++)
    for (int64_t r = 0; r < rows; r++)
      out.store_strip(first + r, n + i, y[i][r] * w.output_scales(n + i));
}

// Multiplies the only row by strips `from` to `to`: divides them into STRIPS parts, which it reads
// in turn.
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

// Multiplies all rows by strips `from` to `to`, and stores the outputs in `out`.
template <Format F>
void multiply_strips(const PackedWeights& w, const FixedPointRows& x, int64_t from, int64_t to,
                     const Output& out) {
  if (out.M == 1) return multiply_one_row<F, kRowStreams>(w, x, from, to, out);
  for (int64_t n = from; n < to; n += kStripsInCache) {
    const int64_t strips = std::min(kStripsInCache, to - n);
    if (out.M <= kFewRows)
      multiply_rows_by_strips<F, true>(w, n, strips, x, 0, out.M, out);
    else
      for (int64_t m = 0; m < out.M; m += kRowsInCache)
        multiply_rows_by_strips<F, false>(w, n, strips, x, m, std::min(kRowsInCache, out.M - m),
                                          out);
  }
}

}  // namespace
