// Products of many bfloat16 rows on CPUs that multiply bfloat16 (AVX-512 BF16, AMX): PyTorch's
// GEMM, by weights that each thread dequantizes to bfloat16.

#pragma once

#ifdef __AVX512BF16__

#include "fixed_point.h"
#include "torch.h"
#include "vnni.h"

namespace {

using at::Tensor;

// Writes the weights of outputs n0 to n1, multiples of 16, to `into`, (K, n1 - n0) in bfloat16 with
// any stride between inputs.
template <Format F>
void dequantize_outputs(const PackedWeights& w, int64_t n0, int64_t n1, const Tensor& into) {
  auto* data = reinterpret_cast<BFloat16*>(into.mutable_data_ptr());
  const int64_t stride = into.stride(0), header = header_bytes<F>(w.block);
  for (int64_t n = n0 / kStrip; n < n1 / kStrip; n++) {
    const Floats output_scales = w.output_scales(n);
    const uint8_t *tiles = w.spans(n), *span_header = nullptr;
    auto* out = data + n * kStrip - n0;
    for (int64_t k = 0; k < w.K; k += kChunk) {
      if (k % kSpan == 0) span_header = tiles, tiles += header;
      const int64_t b = blocks_of(k % kSpan, w.block);
      const Floats zero = load_zeros<F>(span_header, w.block, b);
      const Floats scale = load_scales<F>(span_header, b) * output_scales;
      __m512i bytes[8];
      constexpr int kTiles = 8 / bits(F);
      for (int i = 0; i < 8; i += kTiles) {
        prefetch(tiles + kAhead);
        unpack<F>(tiles, bytes + i);
        tiles += 64;
      }
      for (int i = 0; i < 32; i++) {
        const __m512i q = _mm512_srli_epi32(bytes[i / 4], 8 * (i % 4));
        const Floats v = to_floats({{(NativeInt)q & native_splat(255)}});
        store(out + (k + i) * stride, (v - zero) * scale);
      }
    }
  }
}

// Returns the product of x, (M, K), by packed weights, plus bias. The outputs are divided into
// parts of `width` strips. A thread dequantizes the weights of a part, which its L2 cache holds,
// and multiplies by them before it goes on to the next part.
template <Format F>
Tensor gemm_product(const Tensor& x, const PackedWeights& w, const std::optional<Tensor>& bias) {
  constexpr int64_t kScratch = 3 << 19;  // bytes, of the 2 MB of L2 that CPUs with AMX have
  const Tensor out = at::empty({x.size(0), w.N}, x.options());
  // parts: of each thread, so that a part has about kScratch bytes of bfloat16 weights at most.
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

#endif
