// Products of bfloat16 rows with int8 and int4 weights, for CPUs with AVX-512 VNNI and BF16; at the
// end, of few rows with dense weights, by AMX where there is any.
//
// Start at `product`. Decoding is bound by the rate at which weights are read, so the arithmetic has
// to be cheap beside a load, and still exact. Activations are therefore written as 16-bit fixed-point
// numbers, one scale to a block of the row, and these as 256 * hi + lo: two bytes, and two of the
// byte products that vpdpbusd adds up exactly in 32 bits, or AMX for eight rows at once. What is lost
// is 2^-16 of a block's largest value, less than bfloat16 itself loses. A row's result has the same
// bits whatever rows are beside it, up to where a GEMM takes over.
//
// Packed weights, which `pack` writes, are read from the first byte to the last. 16 outputs are a
// strip: their scales, then spans of 256 inputs, each with the scales and zeros of its groups ahead
// of its tiles. A tile of 16 outputs by 4 inputs is a register, inputs of one output side by side,
// as vpdpbusd wants them. int8 is stored plus 128; of int4 two tiles share a register, the first in
// the low nibbles. Many rows are the business of a GEMM, which is given the weights in bfloat16.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "amx_int8.h"
#include "unpacked_gemm.h"

namespace {

// Strips `from` to `to` of the weights as STREAMS stretches that are read side by side.
template <Format F, int STREAMS>
void strips_by_all_rows(const Weights& w, const Rows& rows, int64_t from, int64_t to,
                        const Output& out) {
  const int64_t part = (to - from) / STREAMS;
  for (int64_t i = 0; i < part; i++) {
    int64_t n[STREAMS], m = 0;
    for (int t = 0; t < STREAMS; t++) n[t] = from + t * part + i;
    if constexpr (STREAMS == 2) m = take_eights<F>(w, n, rows, out);
    if constexpr (8 * STREAMS <= kSums) m = take_rows<F, 8, STREAMS>(w, n, rows, m, out);
    m = take_rows<F, 4, STREAMS>(w, n, rows, m, out);
    m = take_rows<F, 2, STREAMS>(w, n, rows, m, out);
    take_rows<F, 1, STREAMS>(w, n, rows, m, out);
  }
  for (int64_t n = from + STREAMS * part; n < to; n++) {  // what makes up no set of stretches
    int64_t m = STREAMS == 2 ? take_eights<F>(w, {n, n}, rows, out) : 0;
    m = take_rows<F, 4, 1>(w, {n}, rows, m, out);
    take_rows<F, 1, 1>(w, {n}, rows, m, out);
  }
}

template <Format F>
Tensor product(const Tensor& x, const Weights& w, const std::optional<Tensor>& bias) {
  Tensor out = at::empty({x.size(0), w.N}, x.options());
  const auto* b = bias ? bias->const_data_ptr<at::BFloat16>() : nullptr;
  const Tensor contiguous = x.contiguous();
  const Output into{out.mutable_data_ptr<at::BFloat16>(), b, out.size(0), w.N};
  // Few rows are written in fixed point by every thread for itself, while the first weights come in;
  // of many each thread writes some, for all.
  const bool together = into.M > kEight;
  thread_local Rows of_caller;
  Rows& shared = of_caller;
  if (together) {
    make_room(into.M, w, shared);
    at::parallel_for(0, into.M, 1, [&](int64_t from, int64_t to) {
      to_fixed_point(contiguous, w, from, to, shared);
    });
  }
  at::parallel_for(0, w.N / kStrip, 1, [&](int64_t from, int64_t to) {
    const int64_t streams = into.M <= kFew ? 4 : 2;
    for (int64_t i = 0; i < streams; i++)
      prefetch(w.scales(from + i * ((to - from) / streams)), kAhead);
    thread_local Rows own;
    if (!together) make_room(into.M, w, own), to_fixed_point(contiguous, w, 0, into.M, own);
    const Rows& rows = together ? shared : own;
    if (streams == 4) return strips_by_all_rows<F, 4>(w, rows, from, to, into);
    const AmxTiles ready;
    strips_by_all_rows<F, 2>(w, rows, from, to, into);
  });
  return out;
}

template <Format F>
Tensor packed_linear(Tensor x, const Tensor& packed, const std::optional<Tensor>& bias,
                     int64_t block) {
  TORCH_CHECK(block % kChunk == 0 && kSpan % block == 0, "a block of ", block);
  const int64_t K = (packed.size(1) - kStrip * sizeof(float)) / span_bytes<F>(block) * kSpan;
  const Weights w{packed.const_data_ptr<uint8_t>(), packed.size(0) * kStrip, K, block,
                  packed.size(1)};
  TORCH_CHECK(x.dim() == 2 && x.size(1) <= K && x.scalar_type() == at::kBFloat16);
  // Rows from which on unpacking for a GEMM is faster.
  const int64_t many = !has_amx() ? 48 : bits(F) == 8 ? 256 : 56;
  if (x.size(1) < K) x = at::constant_pad_nd(x, {0, K - x.size(1)});
  return x.size(0) < many ? product<F>(x, w, bias) : product_of_many<F>(x, w, bias);
}

// x: (M, at most K). packed: (N/16, bytes of a strip). Weights and bias are padded to whole strips,
// of which the first `out_features` outputs count.
Tensor quantized_linear(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias,
                        int64_t format, int64_t block, int64_t out_features) {
  Tensor y = format == kInt8   ? packed_linear<kInt8>(x, packed, bias, block)
             : format == kInt4 ? packed_linear<kInt4>(x, packed, bias, block)
                               : packed_linear<kInt4Half>(x, packed, bias, block);
  return y.size(1) == out_features ? y : y.narrow(1, 0, out_features).contiguous();
}

}  // namespace

TORCH_LIBRARY_IMPL(gpt_flex, CPU, library) { library.impl("quantized_linear", quantized_linear); }
