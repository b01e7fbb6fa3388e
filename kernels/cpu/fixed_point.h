// Activations as 16-bit fixed-point numbers with one scale for each block of a row. The rounding
// error is at most about 2^-16 of the block's largest value. bfloat16's is at most 2^-8 of each
// number, which is less only for numbers below 1/256 of the largest. Products with integer weights
// are then exact integers, which every instruction set adds up to the same bits. A NaN or an
// infinity makes all outputs of its row NaN.

#pragma once

#include <limits>
#include <vector>

#include "packed_weights.h"

namespace {

constexpr int64_t kRowGroup = 8;  // rows whose scales lie side by side; AMX multiplies as many
// Half of the inputs that pad a row. Without padding, the distance of rows may be a power of two,
// and the same inputs of all rows would compete for the same few sets of the cache.
constexpr int64_t kPad = 32;

// A row's numbers are stored in one of two forms, which reserve_rows selects. Bytes, for CPUs that
// add products of four bytes (vpdpbusd, AMX, ARM's sdot) and for short_sums: a number is 256 * high
// + low, both signed, and all high bytes of a row lie before all low ones. Pairs of 16 bits
// elsewhere: inputs 0 to 3 lie in the order 0 2 1 3, because 16-bit lanes of a tile of weights hold
// the inputs 0 and 2, and 1 and 3 (factors.h).
#if defined(__AVX512VNNI__) || defined(GPT_FLEX_BYTE_PRODUCTS)
constexpr bool kBytePlanes = true;
#else
constexpr bool kBytePlanes = false;
#endif
#ifdef GPT_FLEX_SHORT_SUMS
constexpr bool kShortSums = true;
#else
constexpr bool kShortSums = false;
#endif

// Returns whether M rows are multiplied by weights of format F as bytes with sums of 16 bits, see
// ShortSums.
template <Format F>
constexpr bool short_sums(int64_t M) {
  return kShortSums && bits(F) == 4 && M == 1;
}

// M rows, padded to M', a multiple of kRowGroup.
struct FixedPointRows {
  bool bytes;                     // whether high and low bytes are apart
  int64_t stride, blocks;         // stride: inputs of a row and padding; blocks: of a row
  std::vector<int16_t> numbers;   // (M', stride)
  std::vector<float> scale, sum;  // (M' / 8, blocks, 8); sum: of a block's fixed-point numbers

  int8_t* high(int64_t m) { return reinterpret_cast<int8_t*>(&numbers[m * stride]); }
  const int8_t* high(int64_t m) const {
    return reinterpret_cast<const int8_t*>(&numbers[m * stride]);
  }
  const int8_t* low(int64_t m) const { return high(m) + stride; }
  // Returns row m as lanes of 32 bits: pairs of numbers, all in plane 0, or, if `bytes`, four high
  // bytes (plane 0) or four low bytes (plane 1).
  const int32_t* lanes(int64_t m, int plane) const {
    return reinterpret_cast<const int32_t*>(high(m) + plane * stride);
  }
  // Returns the index of row m and block b in `scale` and `sum`.
  int64_t block(int64_t m, int64_t b) const {
    return (m / kRowGroup * blocks + b) * kRowGroup + m % kRowGroup;
  }
};

// Stores sixteen numbers of row m from input k on, in the form that rows.bytes selects.
inline void store_numbers(const Ints& q, int64_t m, int64_t k, FixedPointRows& rows) {
  alignas(kLine) int32_t numbers[kStrip];
  store(numbers, q);
  if (rows.bytes) {
    int8_t *high = rows.high(m) + k, *low = high + rows.stride;
    for (int i = 0; i < kStrip; i++) high[i] = static_cast<int8_t>((numbers[i] + 128) >> 8);
    for (int i = 0; i < kStrip; i++) low[i] = static_cast<int8_t>(numbers[i]);  // modulo 256
  } else {
    int16_t* to = &rows.numbers[m * rows.stride + k];
    for (int i = 0; i < kStrip; i += 4) {
      to[i] = static_cast<int16_t>(numbers[i]), to[i + 1] = static_cast<int16_t>(numbers[i + 2]);
      to[i + 2] = static_cast<int16_t>(numbers[i + 1]);
      to[i + 3] = static_cast<int16_t>(numbers[i + 3]);
    }
  }
}

// Converts block b of row m, which has `block` inputs from x on. Writes the block's numbers, its
// scale and the sum of its numbers to `rows`.
template <class T>
void to_fixed_point(const T* x, int64_t block, int64_t m, int64_t b, FixedPointRows& rows) {
  constexpr float kMax = 32639;  // 127 * 256 + 127: the largest number of two signed bytes
  constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
  Ints largest = splat(0);
  for (int64_t i = 0; i < block; i += kStrip) largest = max(largest, magnitude_bits(load(x + i)));
  const float top = float_of(static_cast<uint32_t>(reduce_max(largest)));
  // For a smaller top, kMax / top may be infinite; the numbers are then 0.
  const Floats factor = splat(top > 0x1p-100f ? kMax / top : 0.f);
  Ints total = splat(0);
  for (int64_t i = 0; i < block; i += kStrip) {
    const Ints q = round_to_ints(load(x + i) * factor);
    total = total + q;
    store_numbers(q, m, b * block + i, rows);
  }
  rows.scale[rows.block(m, b)] = std::isfinite(top) ? top / kMax : kNaN;
  rows.sum[rows.block(m, b)] = reduce_add(to_floats(total));  // exact: below 2^24
}

// Makes `rows` large enough for M rows, and selects the form in which products by weights of format
// F read them. Its vectors never shrink: growing again would clear memory.
template <Format F>
void reserve_rows(int64_t M, const PackedWeights& w, FixedPointRows& rows) {
  const size_t padded = (M + kRowGroup - 1) / kRowGroup * kRowGroup;
  auto reserve = [](auto& values, size_t size) {
    if (values.size() < size) values.resize(size);
  };
  rows.bytes = kBytePlanes || short_sums<F>(M);
  rows.stride = w.K + 2 * kPad, rows.blocks = w.blocks();
  reserve(rows.numbers, padded * rows.stride);
  reserve(rows.scale, padded * rows.blocks), reserve(rows.sum, padded * rows.blocks);
}

// Converts rows m to `end` of x, (M, inputs), to fixed-point rows of w.K inputs; zeros follow the
// inputs that x has.
template <class T>
void to_fixed_point(const T* x, int64_t inputs, const PackedWeights& w, int64_t m, int64_t end,
                    FixedPointRows& rows) {
  for (; m < end; m++) {
    const T* row = x + m * inputs;
    int64_t b = 0;
    for (; (b + 1) * w.block <= inputs; b++)
      to_fixed_point(row + b * w.block, w.block, m, b, rows);
    for (; b < rows.blocks; b++) {
      T padded[kSpan] = {};
      std::copy(std::min(row + b * w.block, row + inputs), row + inputs, padded);
      to_fixed_point(padded, w.block, m, b, rows);
    }
  }
}

}  // namespace
