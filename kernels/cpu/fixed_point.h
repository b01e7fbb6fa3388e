#pragma once

#include <ATen/ATen.h>
#include <immintrin.h>

#include <vector>

#include "packed_weights.h"

namespace {

using at::Tensor;

constexpr int64_t kEight = 8;     // rows that an AMX tile takes, as 16 rows of bytes
constexpr int64_t kPad = 32;      // of an unpacked row: a power of two would hit the same cache sets

struct Rows {  // activations in fixed point: scale * (256 * hi + lo)
  int64_t stride, blocks;         // inputs and some padding; blocks of a row
  std::vector<int8_t> bytes;      // (M', 2, stride): hi and lo; M' is M in whole eights
  std::vector<float> scale, sum;  // (M'/8, blocks, 8); sum: of the fixed-point numbers

  const int8_t* high(int64_t m) const { return &bytes[2 * m * stride]; }
  const int8_t* low(int64_t m) const { return high(m) + stride; }
  int64_t block(int64_t m, int64_t b) const {
    return (m / kEight * blocks + b) * kEight + m % kEight;
  }
};

void to_fixed_point(const at::BFloat16* x, int64_t block, int8_t* hi, int8_t* lo, float* scale,
                    float* sum) {
  constexpr float kMost = 32639;  // 127 * 256 + 127: the largest that two signed bytes hold
  __m512 most = _mm512_setzero_ps();
  for (int64_t i = 0; i < block; i += 16)
    most = _mm512_max_ps(most, _mm512_abs_ps(load_bf16(x + i)));
  const float top = _mm512_reduce_max_ps(most);
  const __m512 factor = _mm512_set1_ps(top > 0 ? kMost / top : 0);
  __m512i total = _mm512_setzero_si512();
  for (int64_t i = 0; i < block; i += 16) {
    __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(load_bf16(x + i), factor));
    __m512i high = _mm512_srai_epi32(_mm512_add_epi32(q, _mm512_set1_epi32(128)), 8);
    total = _mm512_add_epi32(total, q);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(hi + i), _mm512_cvtepi32_epi8(high));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(lo + i), _mm512_cvtepi32_epi8(q));  // modulo 256
  }
  *scale = top / kMost;
  *sum = _mm512_reduce_add_epi32(total);
}

// Room for M rows; what is in it stays, as a vector that shrank would be cleared again.
void make_room(int64_t M, const Weights& w, Rows& rows) {
  const size_t whole = (M + kEight - 1) / kEight * kEight;
  auto reserve = [](auto& values, size_t size) {
    if (values.size() < size) values.resize(size);
  };
  rows.stride = w.K + 2 * kPad, rows.blocks = w.blocks();
  reserve(rows.bytes, whole * 2 * rows.stride);
  reserve(rows.scale, whole * rows.blocks), reserve(rows.sum, whole * rows.blocks);
}

// Rows `m` to `end` of x.
void to_fixed_point(const Tensor& x, const Weights& w, int64_t m, int64_t end, Rows& rows) {
  const auto* from = x.const_data_ptr<at::BFloat16>() + m * w.K;
  for (; m < end; m++) {
    int8_t *high = &rows.bytes[2 * m * rows.stride], *low = high + rows.stride;
    for (int64_t b = 0; b < rows.blocks; b++, from += w.block, high += w.block, low += w.block)
      to_fixed_point(from, w.block, high, low, &rows.scale[rows.block(m, b)],
                     &rows.sum[rows.block(m, b)]);
  }
}

}  // namespace
