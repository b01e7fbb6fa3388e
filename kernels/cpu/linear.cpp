// The operator linear: rows by dense bfloat16 or float16 weights, as they lie in memory. This file
// chooses the function for the number of rows and shares the work between threads.
//
// Start at linear. Where the CPU multiplies bfloat16 (AVX-512 BF16, AMX), PyTorch's GEMM is faster
// for many bfloat16 rows, and linear_avx512.h for few.

#include "linear.h"
#include "linear_avx512.h"
#include "torch.h"

namespace {

using at::Tensor;

#ifdef __AVX512BF16__
Tensor bfloat16_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  if (x.size(0) > kMaxFewRows) return at::linear(x, weight, bias);
  Tensor out = at::empty({x.size(0), weight.size(0)}, x.options());
  const auto* b = bias ? bias->const_data_ptr<at::BFloat16>() : nullptr;
#ifdef __AMX_BF16__
  const bool fills_tiles = x.size(1) % kChunk == 0 && weight.size(0) % (2 * kStrip) == 0;
  if (fills_tiles && has_amx()) return linear_by_amx(x, weight, b, out), out;
#endif
  return linear_by_avx512(x, weight, b, out), out;
}
#endif

// Multiplies float32 rows, (M, stride), by weights of the type W, each thread by outputs of its
// own.
template <class W>
void multiply(const DenseWeights& w, const float* rows, int64_t stride, const Output& out) {
  const bool few = out.M <= kMaxFewRows;
  const int64_t width = few ? kDotOutputs : kStrip, parts = (w.N + width - 1) / width;
  at::parallel_for(0, parts, kGrain / width / w.K / out.M + 1, [&](int64_t from, int64_t to) {
    if (!few) return multiply_many_rows<W>(w, rows, stride, from, to, out);
    multiply_few_rows<W>(w, rows, stride, from * width, std::min(to * width, w.N), out);
  });
}

// Returns F.linear. x: (M, K), weight: (N, K) and bias (N), of one dtype: bfloat16 or float16.
Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const auto dtype = x.scalar_type();
  const int64_t M = x.size(0), K = weight.size(1), N = weight.size(0);
  TORCH_CHECK(dtype == at::kBFloat16 || dtype == at::kHalf, "rows of ", x.dtype());
  TORCH_CHECK(x.dim() == 2 && x.size(1) == K && weight.scalar_type() == dtype);
  TORCH_CHECK(!bias || (bias->is_contiguous() && bias->scalar_type() == dtype &&
                        bias->numel() == N));
  if (!weight.is_contiguous() || x.numel() == 0) return at::linear(x, weight, bias);
  const Tensor input = x.contiguous();
#ifdef __AVX512BF16__
  if (dtype == at::kBFloat16) return bfloat16_linear(input, weight, bias);
#endif
  // A row's padding keeps rows apart by other than a power of two.
  const int64_t stride = (K + kStrip - 1) / kStrip * kStrip + kStrip;
  const Tensor out = at::empty({M, N}, x.options());
  const Tensor rows = at::empty({M, stride}, x.options().dtype(at::kFloat));
  const Output into{out.mutable_data_ptr(), bias ? bias->const_data_ptr() : nullptr, dtype_of(x),
                    M, N};
  auto* floats = rows.mutable_data_ptr<float>();
  with_data(input, [&](const auto* data) {
    at::parallel_for(0, M, kGrain / K + 1, [&](int64_t from, int64_t to) {
      to_float_rows(data, K, stride, from, to, floats);
    });
  });
  const DenseWeights w{weight.const_data_ptr(), N, K};
  if (dtype == at::kBFloat16) multiply<BFloat16>(w, floats, stride, into);
  else multiply<Half>(w, floats, stride, into);
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(gpt_flex, CPU, library) { library.impl("linear", linear); }
