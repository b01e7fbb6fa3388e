// The operator quantized_linear: rows by packed int8 or int4 weights. This file shares the work
// between threads.
//
// Start at packed_linear. The rate at which memory is read bounds decoding, so the arithmetic must
// cost little beside a load, and it must be exact. fixed_point.h therefore converts activations to
// 16-bit integers, and products with weights add up in 32 bits without rounding: by pairs.h, or on
// CPUs with AVX-512 VNNI as bytes by vnni.h (vpdpbusd) and amx_int8.h (tdpbsud, eight rows at a
// time). Weights are read from the first byte to the last, as layout.h orders them. A row's result
// has the same bits whatever rows are beside it and whatever instructions the CPU has, unless there
// are so many rows that gemm.h is faster.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "dtypes.h"

#ifdef __AVX512VNNI__
#include "amx_int8.h"
#include "gemm.h"
#else
#include "pairs.h"
#endif

namespace {

using at::Tensor;

#ifdef __AVX512VNNI__

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

template <Format F>
void multiply(const PackedWeights& w, const FixedPointRows& rows, int64_t from, int64_t to,
              const Output& out) {
  const int64_t streams = out.M <= kMaxVnniRows ? 4 : 2;
  if (streams == 4) return multiply_all_rows<F, 4>(w, rows, from, to, out);
  const AmxTiles configured;
  multiply_all_rows<F, 2>(w, rows, from, to, out);
}

#else

template <Format F>
void multiply(const PackedWeights& w, const FixedPointRows& rows, int64_t from, int64_t to,
              const Output& out) {
  multiply_pairs<F>(w, rows, from, to, out);
}

#endif

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
    for (int64_t i = 0; i < 2; i++) prefetch(w.scales(from + i * ((to - from) / 2)), kAhead);
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
  TORCH_CHECK(block % kChunk == 0 && kSpan % block == 0, "a block of ", block);
  const int64_t K = (packed.size(1) - kStrip * sizeof(float)) / span_bytes<F>(block) * kSpan;
  const PackedWeights w{packed.const_data_ptr<uint8_t>(), packed.size(0) * kStrip, K, block,
                        packed.size(1)};
  TORCH_CHECK(x.dim() == 2 && x.size(1) <= K);
  TORCH_CHECK(!bias || bias->scalar_type() == x.scalar_type(), "a bias of another dtype");
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
