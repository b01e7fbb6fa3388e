// Dense bfloat16 products of few rows on CPUs that multiply bfloat16: by AMX where the CPU has it,
// else by AVX-512 BF16. linear_operators.cpp calls linear_by_amx or linear_by_avx512.

#pragma once

#ifdef __AVX512BF16__

#include <immintrin.h>

#include "amx.h"
#include "torch.h"
#include "vector.h"

namespace {

using at::Tensor;

constexpr int64_t kGroup = 4;  // rows and outputs of a product by AVX-512

#ifdef __AMX_BF16__
// Multiplies up to 16 rows. Requires K % 32 == 0 and N % 32 == 0. A tile of weights holds a cache
// line, 32 inputs, of each of 16 outputs. The rows of x become the columns of the other tile, with
// two inputs side by side. Two tiles of weights, 32 outputs, share each tile of x. bias: nullptr
// for none, here and below.
void linear_by_amx(const Tensor& x, const Tensor& weight, const at::BFloat16* bias, Tensor& out) {
  const int64_t M = x.size(0), K = x.size(1), N = weight.size(0), row = 2 * K;
  const auto* pairs = reinterpret_cast<const uint32_t*>(x.const_data_ptr<at::BFloat16>());
  const auto* weights = reinterpret_cast<const uint8_t*>(weight.const_data_ptr<at::BFloat16>());
  auto* y = out.mutable_data_ptr<at::BFloat16>();
  const Tensor columns = at::zeros({K / 2, kStrip}, x.options().dtype(at::kInt));
  auto* inputs = reinterpret_cast<uint32_t*>(columns.mutable_data_ptr<int32_t>());
  for (int64_t m = 0; m < M; m++)
    for (int64_t k = 0; k < K / 2; k++) inputs[k * kStrip + m] = pairs[m * K / 2 + k];
  static constexpr float kZeros[kStrip * kStrip] = {};
  at::parallel_for(0, N / kStrip / 2, 1, [&](int64_t from, int64_t to) {
    const AmxTiles configured(kLine, kStrip);
    alignas(kLine) float totals[2 * kStrip][kStrip];  // (output, row)
    for (int64_t n = from * 2 * kStrip; n < to * 2 * kStrip; n += 2 * kStrip) {
      const uint8_t *first = weights + n * row, *second = first + kStrip * row;
      amx_load<kSums0>(kZeros, kLine), amx_load<kSums1>(kZeros, kLine);
      for (int64_t k = 0; k < K; k += kChunk) {
        amx_load<kRows>(inputs + k / 2 * kStrip, kLine);
        amx_load<kWeights0>(first + 2 * k, row), amx_bf16_dot<kSums0, kWeights0>();
        amx_load<kWeights1>(second + 2 * k, row), amx_bf16_dot<kSums1, kWeights1>();
      }
      amx_store<kSums0>(totals[0]), amx_store<kSums1>(totals[kStrip]);
      for (int64_t m = 0; m < M; m++)
        for (int64_t i = 0; i < 2 * kStrip; i++)
          y[m * N + n + i] = totals[i][m] + (bias ? static_cast<float>(bias[n + i]) : 0.f);
    }
  });
}
#endif

// Adds the products of inputs k to k + 31 to the sums of N outputs by M rows. Bit i of `mask` is
// set if input k + i exists. The order of additions does not depend on N and M.
template <int N, int M>
void add_products(const at::BFloat16* weights, const at::BFloat16* rows, int64_t K, int64_t k,
                  __mmask32 mask, __m512 (&sums)[N][M]) {
  __m512bh inputs[M];
#pragma GCC unroll 4
  for (int m = 0; m < M; m++)
    inputs[m] = (__m512bh)_mm512_maskz_loadu_epi16(mask, rows + m * K + k);
#pragma GCC unroll 4
  for (int n = 0; n < N; n++) {
    const auto weight = (__m512bh)_mm512_maskz_loadu_epi16(mask, weights + n * K + k);
#pragma GCC unroll 4
    for (int m = 0; m < M; m++) sums[n][m] = _mm512_dpbf16_ps(sums[n][m], weight, inputs[m]);
  }
}

// Computes outputs n to n + N - 1 of `rows` rows, a multiple of M, M rows at a time. y: (rows,
// outputs).
template <int N, int M>
void dot_products(const at::BFloat16* x, const at::BFloat16* weights, const at::BFloat16* bias,
                  int64_t rows, int64_t K, int64_t outputs, int64_t n, at::BFloat16* y) {
  for (int64_t m = 0; m < rows; m += M) {
    __m512 sums[N][M];
#pragma GCC unroll 16
    for (int i = 0; i < N * M; i++) sums[i / M][i % M] = _mm512_setzero_ps();
    int64_t k = 0;
    for (; k + kChunk <= K; k += kChunk)
      add_products<N, M>(weights + n * K, x + m * K, K, k, ~0u, sums);
    if (k < K) add_products<N, M>(weights + n * K, x + m * K, K, k, _bzhi_u32(~0u, K - k), sums);
#pragma GCC unroll 16
    for (int i = 0; i < N * M; i++)
      y[(m + i % M) * outputs + n + i / M] = _mm512_reduce_add_ps(sums[i / M][i % M]) +
                                             (bias ? static_cast<float>(bias[n + i / M]) : 0.f);
  }
}

// Takes any shape. For one row it reads weights from the first to the last, which is faster than
// four outputs side by side. For several rows, four outputs share each loaded input, and four rows
// (`fours`: as many rows as fill groups of four) share each loaded weight.
void linear_by_avx512(const Tensor& x, const Tensor& weight, const at::BFloat16* bias,
                      Tensor& out) {
  const int64_t M = x.size(0), K = x.size(1), N = weight.size(0), fours = M / kGroup * kGroup;
  const auto* rows = x.const_data_ptr<at::BFloat16>();
  const auto* weights = weight.const_data_ptr<at::BFloat16>();
  auto* y = out.mutable_data_ptr<at::BFloat16>();
  const int64_t groups = (N + kGroup - 1) / kGroup, grain = kGrain / kGroup / K + 1;
  at::parallel_for(0, groups, grain, [&](int64_t from, int64_t to) {
    const int64_t end = std::min(to * kGroup, N);
    int64_t n = from * kGroup;
    for (; M > 1 && n + kGroup <= end; n += kGroup) {
      dot_products<4, 4>(rows, weights, bias, fours, K, N, n, y);
      dot_products<4, 1>(rows + fours * K, weights, bias, M - fours, K, N, n, y + fours * N);
    }
    for (; n < end; n++) dot_products<1, 1>(rows, weights, bias, M, K, N, n, y);
  });
}

}  // namespace

#endif
