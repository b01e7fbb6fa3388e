// Products of many rows: PyTorch's GEMM, by weights that each thread dequantizes to bfloat16.

#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include "fixed_point.h"

namespace {

// Writes outputs n0 to n1 of the weights to `into`, (K, n1 - n0) in bfloat16.
template <Format F>
void dequantize_outputs(const PackedWeights& w, int64_t n0, int64_t n1, const Tensor& into) {
  auto* data = into.mutable_data_ptr<at::BFloat16>();
  const int64_t stride = into.stride(0), header = header_bytes<F>(w.block);
  for (int64_t n = n0 / kStrip; n < n1 / kStrip; n++) {
    const __m512 output_scales = _mm512_loadu_ps(w.scales(n));
    const uint8_t *tiles = w.spans(n), *span_header = nullptr;
    auto* out = data + n * kStrip - n0;
    for (int64_t k = 0; k < w.K; k += kChunk) {
      if (k % kSpan == 0) span_header = tiles, tiles += header;
      const int64_t b = k % kSpan / w.block;
      const __m512 zero = load_zeros<F>(span_header, w.block, b);
      const __m512 scale = _mm512_mul_ps(load_scales<F>(span_header, b), output_scales);
      __m512i bytes[8];
      constexpr int kTiles = 8 / bits(F);
      for (int i = 0; i < 8; i += kTiles) {
        _mm_prefetch(tiles + kAhead, _MM_HINT_T0);
        unpack<F>(tiles, bytes + i);
        tiles += 64;
      }
      for (int i = 0; i < 32; i++) {
        __m512i q = _mm512_srli_epi32(bytes[i / 4], 8 * (i % 4));
        __m512 v = _mm512_cvtepi32_ps(_mm512_and_si512(q, _mm512_set1_epi32(255)));
        store_bf16(out + (k + i) * stride, _mm512_mul_ps(_mm512_sub_ps(v, zero), scale));
      }
    }
  }
}

// Returns x by packed weights. Each thread dequantizes as many outputs as its L2 cache holds, and
// multiplies by them before it goes on.
template <Format F>
Tensor gemm_product(const Tensor& x, const PackedWeights& w, const std::optional<Tensor>& bias) {
  constexpr int64_t kScratch = 3 << 19;  // bytes, of the 2 MB of L2 that CPUs with AMX have
  const Tensor out = at::empty({x.size(0), w.N}, x.options());
  const int64_t threads = at::get_num_threads(), parts = 2 * w.K * w.N / kScratch / threads + 1;
  const int64_t strips = w.N / kStrip, width = (strips - 1) / (parts * threads) + 1;
  at::parallel_for(0, (strips - 1) / width + 1, 1, [&](int64_t from, int64_t to) {
    const at::InferenceMode guard;  // a thread does not inherit the caller's mode
    const Tensor scratch = at::empty({w.K, width * kStrip + kPad}, x.options());
    for (int64_t i = from; i < to; i++) {
      const int64_t n = i * width * kStrip, size = std::min(width * kStrip, w.N - n);
      dequantize_outputs<F>(w, n, n + size, scratch);
      const Tensor weights = scratch.narrow(1, 0, size);
      out.narrow(1, n, size)
          .copy_(bias ? at::addmm(bias->narrow(0, n, size), x, weights) : at::mm(x, weights));
    }
  });
  return out;
}

}  // namespace
