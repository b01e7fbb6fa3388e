// The operator quantized_linear: rows by packed int8 or int4 weights. This file shares the work
// between threads, each of which calls `multiply` of quantized_linear.h.
//
// Start at packed_linear.

#include <limits>

#include "gemm.h"
#include "quantized_linear.h"
#include "torch.h"

namespace {

using at::Tensor;

// Multiplies x by packed weights, each thread by strips of its own. Up to kRowGroup rows every
// thread converts all of them for itself, while its first weights arrive; of more rows each thread
// converts some, for all threads.
template <Format F, class T>
void integer_product(const T* x, const PackedWeights& w, const Output& out) {
  const bool together = out.M > kRowGroup;
  thread_local FixedPointRows of_caller;
  FixedPointRows& shared = of_caller;
  if (together) {
    reserve_rows(out.M, w, shared);
    at::parallel_for(0, out.M, 1, [&](int64_t from, int64_t to) {
      to_fixed_point(x, w, from, to, shared);
    });
  }
  at::parallel_for(0, w.N / kStrip, 1, [&](int64_t from, int64_t to) {
    const int64_t parts = streams(out.M), part = (to - from) / parts;
    for (int64_t i = 0; i < parts; i++) prefetch(w.scales(from + i * part), kAhead);
    thread_local FixedPointRows own;
    if (!together) reserve_rows(out.M, w, own), to_fixed_point(x, w, 0, out.M, own);
    multiply<F>(w, together ? shared : own, from, to, out);
  });
}

// Returns the number of rows from which a GEMM of dequantized weights is faster.
template <Format F>
int64_t gemm_rows(const Tensor& x) {
#ifdef __AVX512BF16__
  if (x.scalar_type() == at::kBFloat16) return !has_amx() ? 48 : bits(F) == 8 ? 256 : 56;
#endif
  return std::numeric_limits<int64_t>::max();
}

template <Format F>
Tensor packed_linear(Tensor x, const Tensor& packed, const std::optional<Tensor>& bias,
                     int64_t block) {
  TORCH_CHECK(block > 0 && block % kChunk == 0 && kSpan % block == 0, "a block of ", block);
  TORCH_CHECK(packed.dim() == 2 && packed.is_contiguous(), "packed weights that are no matrix");
  const int64_t K = (packed.size(1) - kStrip * sizeof(float)) / span_bytes<F>(block) * kSpan;
  const PackedWeights w{packed.const_data_ptr<uint8_t>(), packed.size(0) * kStrip, K, block,
                        packed.size(1)};
  TORCH_CHECK(x.dim() == 2 && x.size(1) <= K);
  TORCH_CHECK(!bias || bias->scalar_type() == x.scalar_type(), "a bias of another dtype");
  TORCH_CHECK(!bias || (bias->numel() == w.N && bias->is_contiguous()), "a bias not of ", w.N);
  x = x.size(1) < K ? at::constant_pad_nd(x, {0, K - x.size(1)}) : x.contiguous();
#ifdef __AVX512BF16__
  if (x.size(0) >= gemm_rows<F>(x)) return gemm_product<F>(x, w, bias);
#endif
  Tensor out = at::empty({x.size(0), w.N}, x.options());
  const Output into{out.mutable_data_ptr(), bias ? bias->const_data_ptr() : nullptr,
                    dtype_of(x), out.size(0), w.N};
  with_data(x, [&](const auto* rows) { integer_product<F>(rows, w, into); });
  return out;
}

// x: (M, at most K), bfloat16, float16 or float32. packed: (N / 16, bytes of a strip). Weights and
// bias, which has the dtype of x, are padded to whole strips. Returns the first `out_features`
// outputs.
Tensor quantized_linear(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias,
                        int64_t format, int64_t block, int64_t out_features) {
  Tensor y = format == kInt8   ? packed_linear<kInt8>(x, packed, bias, block)
             : format == kInt4 ? packed_linear<kInt4>(x, packed, bias, block)
                               : packed_linear<kInt4Half>(x, packed, bias, block);
  return y.size(1) == out_features ? y : y.narrow(1, 0, out_features).contiguous();
}

}  // namespace

TORCH_LIBRARY_IMPL(gpt_flex, CPU, library) { library.impl("quantized_linear", quantized_linear); }
