// The operator quantized_linear: bfloat16 rows by packed int8 or int4 weights, for CPUs with
// AVX-512 VNNI and BF16. This file shares the work between threads.
//
// Start at packed_linear. The rate at which memory is read bounds decoding, so the arithmetic must
// cost little beside a load, and it must be exact. fixed_point.h therefore converts activations to
// pairs of signed bytes, and vnni.h (vpdpbusd) or amx_int8.h (tdpbsud, eight rows at a time) adds
// up products of bytes in 32 bits without rounding. Weights are read from the first byte to the
// last, as layout.h orders them. A row's result has the same bits whatever rows are beside it,
// unless there are so many rows that gemm.h is faster.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "amx_int8.h"
#include "gemm.h"

namespace {

// Multiplies all rows by strips `from` to `to`. A thread splits its strips into STREAMS parts and
// reads the parts side by side.
template <Format F, int STREAMS>
void multiply_all_rows(const PackedWeights& w, const FixedPointRows& rows, int64_t from, int64_t to,
                       const Output& out) {
  const int64_t part = (to - from) / STREAMS;
  for (int64_t i = 0; i < part; i++) {
    int64_t n[STREAMS], m = 0;
    for (int t = 0; t < STREAMS; t++) n[t] = from + t * part + i;
    if constexpr (STREAMS == 2) m = multiply_rows_by_amx<F>(w, n, rows, out);
    if constexpr (8 * STREAMS <= kMaxSums) m = multiply_rows<F, 8, STREAMS>(w, n, rows, m, out);
    m = multiply_rows<F, 4, STREAMS>(w, n, rows, m, out);
    m = multiply_rows<F, 2, STREAMS>(w, n, rows, m, out);
    multiply_rows<F, 1, STREAMS>(w, n, rows, m, out);
  }
  for (int64_t n = from + STREAMS * part; n < to; n++) {  // the strips that are left
    int64_t m = STREAMS == 2 ? multiply_rows_by_amx<F>(w, {n, n}, rows, out) : 0;
    m = multiply_rows<F, 4, 1>(w, {n}, rows, m, out);
    multiply_rows<F, 1, 1>(w, {n}, rows, m, out);
  }
}

// Multiplies x by packed weights, each thread by strips of its own. Up to kAmxRows rows every
// thread converts all of them for itself, while its first weights arrive; of more rows each thread
// converts some, for all threads.
template <Format F>
Tensor integer_product(const Tensor& x, const PackedWeights& w, const std::optional<Tensor>& bias) {
  Tensor out = at::empty({x.size(0), w.N}, x.options());
  const auto* b = bias ? bias->const_data_ptr<at::BFloat16>() : nullptr;
  const Tensor contiguous = x.contiguous();
  const Output into{out.mutable_data_ptr<at::BFloat16>(), b, out.size(0), w.N};
  const bool together = into.M > kAmxRows;
  thread_local FixedPointRows of_caller;
  FixedPointRows& shared = of_caller;
  if (together) {
    reserve_rows(into.M, w, shared);
    at::parallel_for(0, into.M, 1, [&](int64_t from, int64_t to) {
      to_fixed_point(contiguous, w, from, to, shared);
    });
  }
  at::parallel_for(0, w.N / kStrip, 1, [&](int64_t from, int64_t to) {
    const int64_t streams = into.M <= kMaxVnniRows ? 4 : 2;
    for (int64_t i = 0; i < streams; i++)
      prefetch(w.scales(from + i * ((to - from) / streams)), kAhead);
    thread_local FixedPointRows own;
    if (!together) reserve_rows(into.M, w, own), to_fixed_point(contiguous, w, 0, into.M, own);
    const FixedPointRows& rows = together ? shared : own;
    if (streams == 4) return multiply_all_rows<F, 4>(w, rows, from, to, into);
    const AmxTiles configured;
    multiply_all_rows<F, 2>(w, rows, from, to, into);
  });
  return out;
}

// Chooses between integer products and, from `many` rows on, a GEMM of dequantized weights.
template <Format F>
Tensor packed_linear(Tensor x, const Tensor& packed, const std::optional<Tensor>& bias,
                     int64_t block) {
  TORCH_CHECK(block % kChunk == 0 && kSpan % block == 0, "a block of ", block);
  const int64_t K = (packed.size(1) - kStrip * sizeof(float)) / span_bytes<F>(block) * kSpan;
  const PackedWeights w{packed.const_data_ptr<uint8_t>(), packed.size(0) * kStrip, K, block,
                        packed.size(1)};
  TORCH_CHECK(x.dim() == 2 && x.size(1) <= K && x.scalar_type() == at::kBFloat16);
  const int64_t many = !has_amx() ? 48 : bits(F) == 8 ? 256 : 56;  // where the GEMM is faster
  if (x.size(1) < K) x = at::constant_pad_nd(x, {0, K - x.size(1)});
  return x.size(0) < many ? integer_product<F>(x, w, bias) : gemm_product<F>(x, w, bias);
}

// x: (M, at most K). packed: (N / 16, bytes of a strip). Weights and bias are padded to whole
// strips. Returns the first `out_features` outputs.
Tensor quantized_linear(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias,
                        int64_t format, int64_t block, int64_t out_features) {
  Tensor y = format == kInt8   ? packed_linear<kInt8>(x, packed, bias, block)
             : format == kInt4 ? packed_linear<kInt4>(x, packed, bias, block)
                               : packed_linear<kInt4Half>(x, packed, bias, block);
  return y.size(1) == out_features ? y : y.narrow(1, 0, out_features).contiguous();
}

}  // namespace

TORCH_LIBRARY_IMPL(gpt_flex, CPU, library) { library.impl("quantized_linear", quantized_linear); }
