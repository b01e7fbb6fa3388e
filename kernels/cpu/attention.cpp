// The operator attention: scaled_dot_product_attention for few queries, for CPUs with AVX-512.
//
// Start at attention. The KV cache stores the heads of a position side by side. A thread visits the
// positions in order, all its heads of one before the next, so it reads memory once and in order.
// PyTorch's attention takes twenty times as long for one query of each of 32 heads. Sums are
// float32. A query's result has the same bits whatever queries are beside it.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <vector>

#include "avx512.h"

namespace {

using at::Tensor;

constexpr int64_t kLanes = 16;       // float32 numbers of a register
constexpr int64_t kMaxQueries = 16;  // of a head; a decode step or a verify pass has no more
constexpr float kMasked = -std::numeric_limits<float>::infinity();

// Q queries of each of G heads see S positions. A head has E channels.
struct Sizes {
  int64_t G, Q, S, E;
};
struct Heads {  // (G, S, E)
  const at::BFloat16* data;
  int64_t head_stride, position_stride;  // in elements

  const at::BFloat16* at(int64_t g, int64_t s) const {
    return data + g * head_stride + s * position_stride;
  }
};

inline float dot(const at::BFloat16* a, const at::BFloat16* b, int64_t count) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < count; i += kLanes)
    sum = _mm512_fmadd_ps(load_bf16(a + i), load_bf16(b + i), sum);
  return _mm512_reduce_add_ps(sum);
}

// Adds factor * from to `to`.
inline void add(float factor, const at::BFloat16* from, int64_t count, float* to) {
  const __m512 factors = _mm512_set1_ps(factor);
  for (int64_t i = 0; i < count; i += kLanes)
    _mm512_storeu_ps(
        to + i, _mm512_fmadd_ps(factors, load_bf16(from + i), _mm512_loadu_ps(to + i)));
}

// Returns e^x for x <= 0, to 2^-22: a power of two times the Taylor series of the remainder.
// Returns 0 below x = -80, so also for masked positions.
inline __m512 exponential(__m512 x) {
  constexpr float kTerms[] = {1.5403530e-4f, 1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f,
                              2.4022651e-1f, 6.9314718e-1f, 1.f};
  const __mmask16 counts = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-80), _CMP_GT_OQ);
  const __m512 power = _mm512_maskz_mul_ps(counts, x, _mm512_set1_ps(1.44269504f));
  const __m512 whole = _mm512_roundscale_ps(power, _MM_FROUND_TO_NEAREST_INT);
  const __m512 rest = _mm512_sub_ps(power, whole);
  __m512 y = _mm512_set1_ps(kTerms[0]);
  for (int i = 1; i < 7; i++) y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(kTerms[i]));
  return _mm512_maskz_scalef_ps(counts, y, whole);
}

// Replaces scores, (S), by softmax weights before their division by their sum, and returns the sum.
// `scores` has space for a multiple of kLanes numbers.
float exponentiate(float* scores, int64_t S) {
  for (int64_t s = S; s % kLanes; s++) scores[s] = kMasked;
  __m512 largest = _mm512_set1_ps(kMasked), sum = _mm512_setzero_ps();
  for (int64_t s = 0; s < S; s += kLanes)
    largest = _mm512_max_ps(largest, _mm512_loadu_ps(scores + s));
  const __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(largest));
  for (int64_t s = 0; s < S; s += kLanes) {
    const __m512 weight = exponential(_mm512_sub_ps(_mm512_loadu_ps(scores + s), top));
    _mm512_storeu_ps(scores + s, weight);
    sum = _mm512_add_ps(sum, weight);
  }
  return _mm512_reduce_add_ps(sum);
}

// Computes heads `first` to `last` of one row. q, y: (G, Q, E), mask: (Q, S).
void attend(const Sizes& n, const at::BFloat16* q, const Heads& k, const Heads& v,
            const at::BFloat16* mask, int64_t first, int64_t last, at::BFloat16* y) {
  const int64_t S = (n.S + kLanes - 1) / kLanes * kLanes, queries = (last - first) * n.Q;
  const float scale = 1 / std::sqrt(static_cast<float>(n.E));
  thread_local std::vector<float> buffer;
  buffer.assign(queries * (S + n.E), 0);
  float *scores = buffer.data(), *sums = scores + queries * S;
  q += first * n.Q * n.E, y += first * n.Q * n.E;
  for (int64_t s = 0; s < n.S; s++)
    for (int64_t i = 0; i < queries; i++) {
      const float added = mask[i % n.Q * n.S + s];
      scores[i * S + s] =
          added == kMasked ? kMasked
                           : scale * dot(q + i * n.E, k.at(first + i / n.Q, s), n.E) + added;
    }
  std::vector<float> totals(queries);
  for (int64_t i = 0; i < queries; i++) totals[i] = exponentiate(scores + i * S, n.S);
  for (int64_t s = 0; s < n.S; s++)
    for (int64_t i = 0; i < queries; i++)
      if (const float weight = scores[i * S + s])
        add(weight, v.at(first + i / n.Q, s), n.E, sums + i * n.E);
  for (int64_t i = 0; i < queries; i++)
    for (int64_t e = 0; e < n.E; e++) y[i * n.E + e] = sums[i * n.E + e] / totals[i];
}

// q: (B, G, Q, E). k, v: (B, G, S, E), with channels side by side. mask: (B, 1, Q, S), added to the
// scores. Returns (B, G, Q, E).
Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& mask) {
  const int64_t B = q.size(0), Q = q.size(2), S = k.size(2), E = q.size(3);
  const bool fits = Q <= kMaxQueries && E % kLanes == 0 && k.stride(3) == 1 && v.stride(3) == 1;
  bool bfloat16 = true;
  for (const Tensor& t : {q, k, v, mask}) bfloat16 &= t.scalar_type() == at::kBFloat16;
  if (!fits || !bfloat16)
    return at::scaled_dot_product_attention(q, k, v, mask);
  const Sizes sizes{q.size(1), Q, S, E};
  const Tensor queries = q.contiguous(), masks = mask.contiguous();
  Tensor y = at::empty(queries.sizes(), queries.options());
  const auto* from = queries.const_data_ptr<at::BFloat16>();
  const auto *keys = k.const_data_ptr<at::BFloat16>(), *values = v.const_data_ptr<at::BFloat16>();
  const auto* added = masks.const_data_ptr<at::BFloat16>();
  auto* to = y.mutable_data_ptr<at::BFloat16>();
  const int64_t row = sizes.G * Q * E, grain = std::max<int64_t>(1, kGrain / (Q * S * E));
  at::parallel_for(0, B * sizes.G, grain, [&](int64_t start, int64_t end) {
    while (start < end) {  // heads of one row, then of the next
      const int64_t b = start / sizes.G, first = start % sizes.G;
      const int64_t last = std::min(sizes.G, first + end - start);
      attend(sizes, from + b * row, {keys + b * k.stride(0), k.stride(1), k.stride(2)},
             {values + b * v.stride(0), v.stride(1), v.stride(2)}, added + b * Q * S, first, last,
             to + b * row);
      start += last - first;
    }
  });
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(gpt_flex, CPU, library) { library.impl("attention", attention); }
