// The operators of linear layers: pack, quantized_linear and linear. This file checks arguments and
// shares the work between threads; the headers compute, and gemm.h and linear_avx512.h also share.
// Two files of operators take half as long to compile as five, because of PyTorch's headers.
//
// Start at quantized_linear and linear. Where the CPU multiplies bfloat16 (AVX-512 BF16, AMX), both
// use PyTorch's GEMM for many bfloat16 rows, and linear uses linear_avx512.h for few.

#include <limits>

#include "gemm.h"
#include "linear.h"
#include "linear_avx512.h"
#include "multiply.h"
#include "pack.h"
#include "quantized_linear.h"
#include "torch.h"

namespace {

using at::Tensor;

// Writes all strips in format F to the beginning of `buffer`, uint8. Returns false if the scales do
// not fit this format.
template <Format F>
bool pack_as(const StoredLinear& from, const Tensor& buffer) {
  const int64_t strips = (from.N + kStrip - 1) / kStrip;
  const int64_t bytes = strips * strip_bytes<F>(from.bytes, from.block);
  TORCH_CHECK(buffer.numel() >= bytes, buffer.numel(), " bytes for ", bytes);
  auto* to = buffer.mutable_data_ptr<uint8_t>();
  TORCH_CHECK(reinterpret_cast<uintptr_t>(to) % kLine == 0,
              "the buffer begins within a cache line");
  return pack_strips<F>(from, to);
}

// Writes the argument `packed` of quantized_linear to the beginning of `buffer`, and returns its
// format. weight, scales, zeros: the tensors of Int4Linear, or, without zeros, of Int8Linear. int4
// scales take a byte each, or two if a scale is no multiple of its output's unit (load_units).
int64_t pack(const Tensor& weight, const Tensor& scales, const std::optional<Tensor>& zeros,
             const Tensor& buffer) {
  const int64_t N = weight.size(0), bytes = weight.size(1);
  TORCH_CHECK(N > 0 && scales.numel() >= N, scales.numel(), " scales of ", N, " outputs");
  const int64_t groups = scales.numel() / N;
  TORCH_CHECK(weight.is_contiguous() && scales.is_contiguous() && buffer.is_contiguous());
  StoredLinear from{static_cast<const uint8_t*>(weight.const_data_ptr())};
  from.N = N, from.bytes = bytes, from.groups = groups, from.block = 2 * bytes / groups;
  if (!zeros) {
    from.output_scales = scales.const_data_ptr<float>(), from.block = kInt8Block;
    return pack_as<kInt8>(from, buffer), kInt8;
  }
  TORCH_CHECK(zeros->is_contiguous() && zeros->numel() == N * ((groups + 1) / 2));
  const bool fits = from.block > 0 && from.block % kChunk == 0 && kSpan % from.block == 0;
  TORCH_CHECK(fits, "a block of ", from.block);
  from.scales = reinterpret_cast<const Half*>(scales.const_data_ptr<at::Half>());
  from.zeros = zeros->const_data_ptr<uint8_t>();
  if (pack_as<kInt4>(from, buffer)) return kInt4;
  return pack_as<kInt4Half>(from, buffer), kInt4Half;
}

// Returns the fields of Layout in build.py, in their order.
std::vector<int64_t> layout() { return {kStrip, kChunk, kInt8Block, kInt8, kInt4, kInt4Half}; }

// Multiplies x, (M, inputs), by packed weights. The threads divide the strips. With up to kRowGroup
// rows, each thread converts all rows into a buffer of its own while its first weights arrive. With
// more rows, the threads divide the conversion and share one buffer.
template <Format F, class T>
void integer_product(const T* x, int64_t inputs, const PackedWeights& w, const Output& out) {
  const bool together = out.M > kRowGroup;
  thread_local FixedPointRows of_caller;
  FixedPointRows& shared = of_caller;  // in a lambda, of_caller would be the running thread's own
  if (together) {
    reserve_rows<F>(out.M, w, shared);
    at::parallel_for(0, out.M, 1, [&](int64_t from, int64_t to) {
      to_fixed_point(x, inputs, w, from, to, shared);
    });
  }
  at::parallel_for(0, w.N / kStrip, 1, [&](int64_t from, int64_t to) {
    const int64_t parts = streams(out.M), part = (to - from) / parts;
    for (int64_t i = 0; i < parts; i++) prefetch(w.scales(from + i * part), kAhead);
    thread_local FixedPointRows own;
    if (!together) reserve_rows<F>(out.M, w, own), to_fixed_point(x, inputs, w, 0, out.M, own);
    multiply<F>(w, together ? shared : own, from, to, out);
  });
}

// Returns the number of rows of x from which on gemm_product is faster than integer_product.
template <Format F>
int64_t gemm_rows(const Tensor& x) {
#ifdef __AVX512BF16__
  if (x.scalar_type() == at::kBFloat16) return !has_amx() ? 48 : bits(F) == 8 ? 256 : 56;
#endif
  return std::numeric_limits<int64_t>::max();
}

// Does quantized_linear for one format, and returns all outputs, those of padding included.
template <Format F>
Tensor packed_linear(Tensor x, const Tensor& packed, const std::optional<Tensor>& bias,
                     int64_t block) {
  TORCH_CHECK(block > 0 && block % kChunk == 0 && kSpan % block == 0, "a block of ", block);
  TORCH_CHECK(packed.dim() == 2 && packed.is_contiguous(), "packed weights that are no matrix");
  const int64_t K = inputs_of_strip<F>(packed.size(1), block);
  const PackedWeights w{packed.const_data_ptr<uint8_t>(), packed.size(0) * kStrip, K, block,
                        packed.size(1)};
  TORCH_CHECK(x.dim() == 2 && x.size(1) <= K);
  TORCH_CHECK(!bias || bias->scalar_type() == x.scalar_type(), "a bias of another dtype");
  TORCH_CHECK(!bias || (bias->numel() == w.N && bias->is_contiguous()), "a bias not of ", w.N);
#ifdef __AVX512BF16__
  if (x.size(0) >= gemm_rows<F>(x)) {
    if (x.size(1) < K) x = at::constant_pad_nd(x, {0, K - x.size(1)});
    return gemm_product<F>(x, w, bias);
  }
#endif
  x = x.contiguous();
  Tensor out = at::empty({x.size(0), w.N}, x.options());
  const Output into{out.mutable_data_ptr(), bias ? bias->const_data_ptr() : nullptr,
                    dtype_of(x), out.size(0), w.N};
  with_data(x, [&](const auto* rows) { integer_product<F>(rows, x.size(1), w, into); });
  return out;
}

// x: (M, at most K), bfloat16, float16 or float32. packed: (N / 16, bytes of a strip), in the
// format numbered `format`. Weights and bias, which has the dtype of x, are padded to whole strips.
// block: inputs that share a scale. Returns the first `out_features` outputs.
Tensor quantized_linear(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias,
                        int64_t format, int64_t block, int64_t out_features) {
  TORCH_CHECK(format == kInt8 || format == kInt4 || format == kInt4Half, "no format ", format);
  Tensor y = format == kInt8   ? packed_linear<kInt8>(x, packed, bias, block)
             : format == kInt4 ? packed_linear<kInt4>(x, packed, bias, block)
                               : packed_linear<kInt4Half>(x, packed, bias, block);
  return y.size(1) == out_features ? y : y.narrow(1, 0, out_features).contiguous();
}

#ifdef __AVX512BF16__
// Does `linear` for contiguous bfloat16 rows on CPUs that multiply bfloat16.
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

// Multiplies float32 rows, (M, stride), by weights of the type W. The threads divide the outputs.
template <class W>
void multiply_dense(const DenseWeights& w, const float* rows, int64_t stride, const Output& out) {
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
  // At least 16 floats of padding: rows whose distance is a power of two would compete for the same
  // few sets of the cache.
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
  if (dtype == at::kBFloat16) multiply_dense<BFloat16>(w, floats, stride, into);
  else multiply_dense<Half>(w, floats, stride, into);
  return out;
}

}  // namespace

Tensor gpt_flex::multiply(const Tensor& x, const Linear& by) {
  if (by.format == kDense) return ::linear(x, by.weight, by.bias);
  return quantized_linear(x, by.weight, by.bias, by.format, by.block, by.out_features);
}

TORCH_LIBRARY_IMPL(gpt_flex, CPU, library) {
  library.impl("pack", pack);
  library.impl("quantized_linear", quantized_linear);
  library.impl("linear", linear);
}

// Operators without tensors have no device. They tell Python what layout.h says.
TORCH_LIBRARY_IMPL(gpt_flex, CompositeExplicitAutograd, library) {
  library.impl("layout", layout);
  library.impl("strip_bytes", strip_bytes_of);
}
