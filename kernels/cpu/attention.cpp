// Attention of few queries, for CPUs with AVX-512: what scaled_dot_product_attention says.
//
// Start at `attention`. Keys and values of a token lie side by side, head after head; a thread goes
// through the tokens, all its heads of one before the next, and reads memory once and in order. torch's
// own, for one query of each of 32 heads, takes twenty times as long. Sums are of 32 bits, and a
// query's bits are those that it has alone.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <immintrin.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <vector>

namespace {

using at::Tensor;

constexpr int64_t kLanes = 16;
constexpr int64_t kFew = 16;  // queries of a head; a step's, and a sweep's that verifies guesses
constexpr float kHidden = -std::numeric_limits<float>::infinity();
constexpr int64_t kGrain = 1 << 16;  // products that are worth another thread

// S tokens that Q queries of each of G heads see, E channels of a head. Strides are of numbers.
struct Sizes {
  int64_t G, Q, S, E;
};
struct Heads {  // (G, S, E)
  const at::BFloat16* data;
  int64_t head, token;

  const at::BFloat16* at(int64_t g, int64_t s) const { return data + g * head + s * token; }
};

inline __m512 load(const at::BFloat16* from) {
  const auto halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

inline float dot(const at::BFloat16* a, const at::BFloat16* b, int64_t count) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < count; i += kLanes) sum = _mm512_fmadd_ps(load(a + i), load(b + i), sum);
  return _mm512_reduce_add_ps(sum);
}

inline void add(float factor, const at::BFloat16* from, int64_t count, float* to) {
  const __m512 factors = _mm512_set1_ps(factor);
  for (int64_t i = 0; i < count; i += kLanes)
    _mm512_storeu_ps(to + i, _mm512_fmadd_ps(factors, load(from + i), _mm512_loadu_ps(to + i)));
}

// e^x for x up to 0: a power of two, and the Taylor series of the rest, to 2^-22. 0 where it is next
// to nothing, as for what is hidden.
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

// Scores, (S), become weights that have yet to be divided by their sum, which is returned. There is
// room for whole lanes.
float weigh(float* scores, int64_t S) {
  for (int64_t s = S; s % kLanes; s++) scores[s] = kHidden;
  __m512 most = _mm512_set1_ps(kHidden), sum = _mm512_setzero_ps();
  for (int64_t s = 0; s < S; s += kLanes) most = _mm512_max_ps(most, _mm512_loadu_ps(scores + s));
  const __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(most));
  for (int64_t s = 0; s < S; s += kLanes) {
    const __m512 weight = exponential(_mm512_sub_ps(_mm512_loadu_ps(scores + s), top));
    _mm512_storeu_ps(scores + s, weight);
    sum = _mm512_add_ps(sum, weight);
  }
  return _mm512_reduce_add_ps(sum);
}

// Heads `first` to `last` of one row: q and y are (G, Q, E), the mask is (Q, S).
void attend(const Sizes& n, const at::BFloat16* q, const Heads& k, const Heads& v,
            const at::BFloat16* mask, int64_t first, int64_t last, at::BFloat16* y) {
  const int64_t S = (n.S + kLanes - 1) / kLanes * kLanes, queries = (last - first) * n.Q;
  const float scale = 1 / std::sqrt(static_cast<float>(n.E));
  thread_local std::vector<float> room;
  room.assign(queries * (S + n.E), 0);
  float *scores = room.data(), *sums = scores + queries * S;
  q += first * n.Q * n.E, y += first * n.Q * n.E;
  for (int64_t s = 0; s < n.S; s++)
    for (int64_t i = 0; i < queries; i++) {
      const float added = mask[i % n.Q * n.S + s];
      scores[i * S + s] =
          added == kHidden ? kHidden
                           : scale * dot(q + i * n.E, k.at(first + i / n.Q, s), n.E) + added;
    }
  std::vector<float> totals(queries);
  for (int64_t i = 0; i < queries; i++) totals[i] = weigh(scores + i * S, n.S);
  for (int64_t s = 0; s < n.S; s++)
    for (int64_t i = 0; i < queries; i++)
      if (const float weight = scores[i * S + s])
        add(weight, v.at(first + i / n.Q, s), n.E, sums + i * n.E);
  for (int64_t i = 0; i < queries; i++)
    for (int64_t e = 0; e < n.E; e++) y[i * n.E + e] = sums[i * n.E + e] / totals[i];
}

// q: (B, G, Q, E). k, v: (B, G, S, E), of any strides but of channels. mask: (B, 1, Q, S), is added.
// Returns (B, G, Q, E).
Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& mask) {
  const int64_t B = q.size(0), Q = q.size(2), S = k.size(2), E = q.size(3);
  const bool fits = Q <= kFew && E % kLanes == 0 && k.stride(3) == 1 && v.stride(3) == 1;
  bool bfloat16 = true;
  for (const Tensor& t : {q, k, v, mask}) bfloat16 &= t.scalar_type() == at::kBFloat16;
  if (!fits || !bfloat16)
    return at::scaled_dot_product_attention(q, k, v, mask);
  const Sizes sizes{q.size(1), Q, S, E};
  const Tensor queries = q.contiguous(), seen = mask.contiguous();
  Tensor y = at::empty(queries.sizes(), queries.options());
  const auto* from = queries.const_data_ptr<at::BFloat16>();
  const auto *keys = k.const_data_ptr<at::BFloat16>(), *values = v.const_data_ptr<at::BFloat16>();
  const auto* hidden = seen.const_data_ptr<at::BFloat16>();
  auto* to = y.mutable_data_ptr<at::BFloat16>();
  const int64_t row = sizes.G * Q * E, grain = std::max<int64_t>(1, kGrain / (Q * S * E));
  at::parallel_for(0, B * sizes.G, grain, [&](int64_t start, int64_t end) {
    while (start < end) {  // heads of one row, then of the next
      const int64_t b = start / sizes.G, first = start % sizes.G;
      const int64_t last = std::min(sizes.G, first + end - start);
      attend(sizes, from + b * row, {keys + b * k.stride(0), k.stride(1), k.stride(2)},
             {values + b * v.stride(0), v.stride(1), v.stride(2)}, hidden + b * Q * S, first, last,
             to + b * row);
      start += last - first;
    }
  });
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(gpt_flex, CPU, library) { library.impl("attention", attention); }
