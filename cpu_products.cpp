// Products of bfloat16 rows with int8 and int4 weights, for CPUs with AVX-512 VNNI and BF16.
//
// Start at `product`. Decoding is bound by the rate at which weights are read, so the arithmetic has
// to be cheap beside a load, and still exact. Activations are therefore written as 16-bit fixed-point
// numbers, one scale to a block of the row, and these as 256 * hi + lo: two bytes, and two of the
// byte products that vpdpbusd adds up exactly in 32 bits. What is lost is 2^-16 of a block's largest
// value, less than bfloat16 itself loses. A row's arithmetic does not depend on the other rows.
//
// Packed weights (cpu_products.py) are tiles of 16 outputs by 4 inputs, a register each: inputs of
// one output side by side, as vpdpbusd wants them. int8 is stored plus 128; of int4 two tiles share a
// register, the first in the low nibbles. Many rows are the business of a GEMM: `dense` hands it
// the weights in bfloat16.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <immintrin.h>
#include <torch/library.h>

namespace {

using at::Tensor;

constexpr int64_t kTile = 16;     // outputs of one tile
constexpr int64_t kChunk = 32;    // inputs that are unpacked together
constexpr int64_t kAhead = 4096;  // bytes; prefetched that far ahead memory is read 1.5 times as fast
constexpr int64_t kPad = 32;      // of a row of `dense`: a power of two would hit the same cache sets

struct Weights {
  int bits;
  const uint8_t* tiles;   // (N/16, K*bits/8, 16)
  const void* scale;      // int4: half, (N/16, K/block, 16); int8: float, (N)
  const uint8_t* zero;    // int4: (N/16, K/block, 8), two to a byte; int8: nullptr, all are 128
  int64_t N, K, block;    // block: inputs that share a scale, of weights (int4) and activations

  int64_t blocks() const { return K / block; }
  const uint8_t* tiles_of(int64_t n) const { return tiles + n * kTile * K * bits / 8; }
};

struct Rows {  // activations in fixed point: scale * (256 * hi + lo)
  std::vector<int8_t> hi, lo;     // (M, K)
  std::vector<float> scale, sum;  // (M, blocks); sum: of the fixed-point numbers
};

inline __m512 load_bf16(const at::BFloat16* x) {
  auto bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

inline void store_bf16(at::BFloat16* y, __m512 v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(y), (__m256i)_mm512_cvtneps_pbh(v));
}

inline __m512i low_nibbles(__m512i v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
inline __m512i high_nibbles(__m512i v) { return low_nibbles(_mm512_srli_epi16(v, 4)); }

template <int BITS>
__m512 load_zeros(const Weights& w, int64_t n, int64_t b) {  // (16,)
  if constexpr (BITS == 8) return _mm512_set1_ps(128);
  auto pairs = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(w.zero + (n * w.blocks() + b) * 8));
  auto low = _mm_set1_epi8(15);
  auto bytes = _mm_unpacklo_epi8(
      _mm_and_si128(pairs, low), _mm_and_si128(_mm_srli_epi16(pairs, 4), low));
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
}

template <int BITS>
__m512 load_scales(const Weights& w, int64_t n, int64_t b) {  // (16,)
  if constexpr (BITS == 8) return _mm512_loadu_ps(static_cast<const float*>(w.scale) + n * kTile);
  const auto* half = static_cast<const at::Half*>(w.scale) + (n * w.blocks() + b) * kTile;
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(half)));
}

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

Rows to_fixed_point(const Tensor& x, const Weights& w) {
  const int64_t M = x.size(0), K = w.K, blocks = w.blocks();
  Rows rows;
  rows.hi.resize(M * K), rows.lo.resize(M * K), rows.scale.resize(M * blocks),
      rows.sum.resize(M * blocks);
  const auto* data = x.const_data_ptr<at::BFloat16>();
  for (int64_t i = 0; i < M * blocks; i++)
    to_fixed_point(data + i * w.block, w.block, &rows.hi[i * w.block], &rows.lo[i * w.block],
                   &rows.scale[i], &rows.sum[i]);
  return rows;
}

// 32 inputs of 16 outputs, as 8 registers of unsigned bytes.
template <int BITS>
inline const uint8_t* unpack(const uint8_t* w, __m512i (&tiles)[8]) {
  constexpr int kLoads = BITS;
#pragma GCC unroll 8
  for (int i = 0; i < kLoads; i++) {
    __m512i v = _mm512_loadu_si512(w + 64 * i);
    _mm_prefetch(w + 64 * i + kAhead, _MM_HINT_T1);
    if constexpr (BITS == 4) {
      tiles[2 * i] = low_nibbles(v), tiles[2 * i + 1] = high_nibbles(v);
    } else {
      tiles[i] = v;
    }
  }
  return w + 64 * kLoads;
}

// 16 outputs of each of M rows, from row `first` on, by each of TILES tiles: y is (TILES, M, 16).
template <int BITS, int M, int TILES>
void tiles_by_rows(const Weights& w, const int64_t (&n)[TILES], const Rows& x, int64_t first,
                   __m512* y) {
  const uint8_t* tiles[TILES];
  for (int t = 0; t < TILES; t++) tiles[t] = w.tiles_of(n[t]);
  const int64_t K = w.K, blocks = w.blocks();
  const int8_t *hi = &x.hi[first * K], *lo = &x.lo[first * K];
  for (int i = 0; i < TILES * M; i++) y[i] = _mm512_setzero_ps();
  for (int64_t b = 0; b < blocks; b++) {
    __m512i high[TILES * M], low[TILES * M];  // a block of 256 and less cannot overflow them
    for (int i = 0; i < TILES * M; i++) high[i] = low[i] = _mm512_setzero_si512();
    for (int64_t k = b * w.block; k < (b + 1) * w.block; k += kChunk) {
      for (int t = 0; t < TILES; t++) {
        __m512i bytes[8];
        tiles[t] = unpack<BITS>(tiles[t], bytes);
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
          for (int m = 0; m < M; m++) {
            const int64_t at = m * K + k + 4 * i;
            auto four = [at](const int8_t* of) {
              return _mm512_set1_epi32(*reinterpret_cast<const int*>(of + at));
            };
            high[t * M + m] = _mm512_dpbusd_epi32(high[t * M + m], bytes[i], four(hi));
            low[t * M + m] = _mm512_dpbusd_epi32(low[t * M + m], bytes[i], four(lo));
          }
        }
      }
    }
    for (int t = 0; t < TILES; t++) {
      const __m512 zero = load_zeros<BITS>(w, n[t], b);
      const __m512 scale = BITS == 8 ? _mm512_set1_ps(1) : load_scales<BITS>(w, n[t], b);
      for (int m = 0; m < M; m++) {
        const int64_t i = t * M + m, at = (first + m) * blocks + b;
        __m512 dot = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high[i], 8), low[i]));
        dot = _mm512_fnmadd_ps(zero, _mm512_set1_ps(x.sum[at]), dot);
        y[i] = _mm512_fmadd_ps(_mm512_mul_ps(scale, _mm512_set1_ps(x.scale[at])), dot, y[i]);
      }
    }
  }
  if constexpr (BITS == 8) {
    for (int i = 0; i < TILES * M; i++) y[i] = _mm512_mul_ps(y[i], load_scales<8>(w, n[i / M], 0));
  }
}

struct Output {
  at::BFloat16* y;  // (M, N)
  const float* bias;  // (N) or nullptr
  int64_t M, N;

  void put(int64_t m, int64_t n, __m512 v) const {
    if (bias) v = _mm512_add_ps(v, _mm512_loadu_ps(bias + n * kTile));
    store_bf16(y + m * N + n * kTile, v);
  }
};

// As many rows from m on as come in groups of M; the row after them.
template <int BITS, int M, int TILES>
int64_t take_rows(const Weights& w, const int64_t (&n)[TILES], const Rows& x, int64_t m,
                  const Output& out) {
  __m512 y[TILES * M];
  for (; m + M <= out.M; m += M) {
    tiles_by_rows<BITS, M, TILES>(w, n, x, m, y);
    for (int i = 0; i < TILES * M; i++) out.put(m + i % M, n[i / M], y[i]);
  }
  return m;
}

template <int BITS>
Tensor product(const Tensor& x, const Weights& w, const std::optional<Tensor>& bias) {
  Tensor out = at::empty({x.size(0), w.N}, x.options());
  const Tensor added = bias ? bias->to(at::kFloat).contiguous() : Tensor();
  const float* b = bias ? added.const_data_ptr<float>() : nullptr;
  const Tensor contiguous = x.contiguous();
  const Output into{out.mutable_data_ptr<at::BFloat16>(), b, out.size(0), w.N};
  at::parallel_for(0, w.N / kTile, 1, [&](int64_t from, int64_t to) {
    // The first weights come in while every thread writes all rows in fixed point for itself.
    for (int64_t i = 0; i < kAhead; i += 64) _mm_prefetch(w.tiles_of(from) + i, _MM_HINT_T1);
    const Rows rows = to_fixed_point(contiguous, w);
    int64_t n = from;
    if (into.M == 1) {  // four streams are read 12 % faster than one
      const int64_t part = (to - from) / 4;
      for (; n < from + part; n++)
        take_rows<BITS, 1, 4>(w, {n, n + part, n + 2 * part, n + 3 * part}, rows, 0, into);
      n = from + 4 * part;
    }
    for (; n < to; n++) {
      int64_t m = take_rows<BITS, 8, 1>(w, {n}, rows, 0, into);
      m = take_rows<BITS, 4, 1>(w, {n}, rows, m, into);
      m = take_rows<BITS, 2, 1>(w, {n}, rows, m, into);
      take_rows<BITS, 1, 1>(w, {n}, rows, m, into);
    }
  });
  return out;
}

// Outputs n0 to n1 of the weights, (K, n1 - n0) in bfloat16.
template <int BITS>
Tensor dense(const Weights& w, int64_t n0, int64_t n1) {
  Tensor padded = at::empty({w.K, n1 - n0 + kPad}, at::kBFloat16);
  auto* data = padded.mutable_data_ptr<at::BFloat16>();
  const int64_t stride = padded.size(1);
  at::parallel_for(n0 / kTile, n1 / kTile, 1, [&](int64_t from, int64_t to) {
    for (int64_t n = from; n < to; n++) {
      const uint8_t* tiles = w.tiles_of(n);
      auto* out = data + n * kTile - n0;
      for (int64_t k = 0; k < w.K; k += kChunk) {
        const __m512 zero = load_zeros<BITS>(w, n, k / w.block);
        const __m512 scale = load_scales<BITS>(w, n, k / w.block);
        __m512i bytes[8];
        tiles = unpack<BITS>(tiles, bytes);
        for (int i = 0; i < 32; i++) {
          __m512i q = _mm512_srli_epi32(bytes[i / 4], 8 * (i % 4));
          __m512 v = _mm512_cvtepi32_ps(_mm512_and_si512(q, _mm512_set1_epi32(255)));
          store_bf16(out + (k + i) * stride, _mm512_mul_ps(_mm512_sub_ps(v, zero), scale));
        }
      }
    }
  });
  return padded.narrow(1, 0, n1 - n0);
}

template <int BITS>
Tensor product_of_many(const Tensor& x, const Weights& w, const std::optional<Tensor>& bias) {
  constexpr int64_t kWidth = 8192;  // outputs in bfloat16 at a time
  std::vector<Tensor> parts;
  for (int64_t n = 0; n < w.N; n += kWidth) {
    const int64_t end = std::min(n + kWidth, w.N);
    const Tensor weights = dense<BITS>(w, n, end);
    parts.push_back(bias ? at::addmm(bias->to(x.dtype()).narrow(0, n, end - n), x, weights)
                         : at::mm(x, weights));
  }
  return parts.size() == 1 ? parts[0] : at::cat(parts, 1);
}

// x: (M, at most K); weights and bias are padded to whole tiles, of which `out_features` count.
template <int BITS>
Tensor linear(Tensor x, const Weights& w, const std::optional<Tensor>& bias, int64_t out_features) {
  TORCH_CHECK(x.dim() == 2 && x.size(1) <= w.K && x.scalar_type() == at::kBFloat16);
  TORCH_CHECK(w.N % kTile == 0 && w.block % kChunk == 0 && w.block <= 256);
  constexpr int64_t kMany = 48;  // rows from which on unpacking for a GEMM is faster
  if (x.size(1) < w.K) x = at::constant_pad_nd(x, {0, w.K - x.size(1)});
  Tensor y = x.size(0) < kMany ? product<BITS>(x, w, bias) : product_of_many<BITS>(x, w, bias);
  return w.N == out_features ? y : y.narrow(1, 0, out_features).contiguous();
}

Tensor int8_linear(const Tensor& x, const Tensor& tiles, const Tensor& scale,
                   const std::optional<Tensor>& bias, int64_t block, int64_t out_features) {
  Weights w{8, tiles.const_data_ptr<uint8_t>(), scale.const_data_ptr(), nullptr, scale.numel(),
            tiles.numel() / scale.numel(), block};
  return linear<8>(x, w, bias, out_features);
}

Tensor int4_linear(const Tensor& x, const Tensor& tiles, const Tensor& scale, const Tensor& zero,
                   const std::optional<Tensor>& bias, int64_t block, int64_t out_features) {
  Weights w{4, tiles.const_data_ptr<uint8_t>(), scale.const_data_ptr(),
            zero.const_data_ptr<uint8_t>(), scale.size(0) * kTile, scale.size(1) * block, block};
  return linear<4>(x, w, bias, out_features);
}

}  // namespace

TORCH_LIBRARY_IMPL(gpt_flex, CPU, library) {
  library.impl("int8_linear", int8_linear);
  library.impl("int4_linear", int4_linear);
}
