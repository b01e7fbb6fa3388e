// Activations as 16-bit fixed-point numbers: scale * (256 * high + low), with one scale for each
// block of a row. `high` and `low` are signed bytes, because vpdpbusd and AMX multiply bytes. The
// rounding error is 2^-16 of the block's largest value, less than that of bfloat16.

#pragma once

#include <ATen/ATen.h>
#include <immintrin.h>

#include <vector>

#include "packed_weights.h"

namespace {

using at::Tensor;

constexpr int64_t kAmxRows = 8;  // rows of one AMX tile: 8 high and 8 low rows of bytes
// Inputs that pad a row: a row stride of a power of two would hit the same cache sets.
constexpr int64_t kPad = 32;

// M rows, padded to M', a multiple of kAmxRows.
struct FixedPointRows {
  int64_t stride, blocks;         // stride: inputs of a row and padding; blocks: of a row
  std::vector<int8_t> bytes;      // (M', 2, stride): high and low
  std::vector<float> scale, sum;  // (M' / 8, blocks, 8); sum: of a block's fixed-point numbers

  const int8_t* high(int64_t m) const { return &bytes[2 * m * stride]; }
  const int8_t* low(int64_t m) const { return high(m) + stride; }
  // Returns the index of row m and block b in `scale` and `sum`.
  int64_t block(int64_t m, int64_t b) const {
    return (m / kAmxRows * blocks + b) * kAmxRows + m % kAmxRows;
  }
};

// Converts one block of a row.
void to_fixed_point(const at::BFloat16* x, int64_t block, int8_t* high, int8_t* low, float* scale,
                    float* sum) {
  constexpr float kMax = 32639;  // 127 * 256 + 127: the largest number of two signed bytes
  __m512 largest = _mm512_setzero_ps();
  for (int64_t i = 0; i < block; i += 16)
    largest = _mm512_max_ps(largest, _mm512_abs_ps(load_bf16(x + i)));
  const float top = _mm512_reduce_max_ps(largest);
  const __m512 factor = _mm512_set1_ps(top > 0 ? kMax / top : 0);
  __m512i total = _mm512_setzero_si512();
  for (int64_t i = 0; i < block; i += 16) {
    __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(load_bf16(x + i), factor));
    __m512i highs = _mm512_srai_epi32(_mm512_add_epi32(q, _mm512_set1_epi32(128)), 8);
    total = _mm512_add_epi32(total, q);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(high + i), _mm512_cvtepi32_epi8(highs));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(low + i), _mm512_cvtepi32_epi8(q));  // modulo 256
  }
  *scale = top / kMax;
  *sum = _mm512_reduce_add_epi32(total);
}

// Makes `rows` large enough for M rows. It never shrinks: a vector that grows again clears memory.
void reserve_rows(int64_t M, const PackedWeights& w, FixedPointRows& rows) {
  const size_t padded = (M + kAmxRows - 1) / kAmxRows * kAmxRows;
  auto reserve = [](auto& values, size_t size) {
    if (values.size() < size) values.resize(size);
  };
  rows.stride = w.K + 2 * kPad, rows.blocks = w.blocks();
  reserve(rows.bytes, padded * 2 * rows.stride);
  reserve(rows.scale, padded * rows.blocks), reserve(rows.sum, padded * rows.blocks);
}

// Converts rows m to `end` of x, (M, K).
void to_fixed_point(const Tensor& x, const PackedWeights& w, int64_t m, int64_t end,
                    FixedPointRows& rows) {
  const auto* from = x.const_data_ptr<at::BFloat16>() + m * w.K;
  for (; m < end; m++) {
    int8_t *high = &rows.bytes[2 * m * rows.stride], *low = high + rows.stride;
    for (int64_t b = 0; b < rows.blocks; b++, from += w.block, high += w.block, low += w.block)
      to_fixed_point(from, w.block, high, low, &rows.scale[rows.block(m, b)],
                     &rows.sum[rows.block(m, b)]);
  }
}

}  // namespace
