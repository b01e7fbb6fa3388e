// The operator neurons: a feed-forward layer with ReLU, of some of its neurons, for a few rows, for
// CPUs with AVX-512 and BF16.
//
// Start at neurons. A record (neurons/records.py) holds the weights of one neuron: its row of the
// up (and gate) projection and its column of the down projection. Few neurons are active for a
// token, so most records are read no further than their first row, and reading these rows bounds
// decoding. Sums and hidden values are float32. int4 weights are unpacked as the even ones of 32,
// then the odd ones; inputs and sums are kept in that order, too.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "avx512.h"

namespace {

using at::Tensor;

constexpr int64_t kSharedRows = 4;  // rows that share an unpacked weight

// BITS of a weight: 16 is bfloat16, 8 is int8, 4 is int4 in groups.

struct Matrix {  // first bytes within a record; only int4 has scales and zero points in it
  int64_t weights, scales, zeros;
};

struct Layer {
  const uint8_t* records;  // (C, stride)
  const int64_t* ids;      // (C,): the neuron of each record; `empty`: no neuron
  const at::BFloat16* bias;  // (F + 1, inner)
  const float* scales;       // (F + 1, inner) or nullptr
  int64_t stride, inner, empty, dim, group;  // inner: 1 (up) or 2 (gate and up)
  Matrix matrices[3];
};

struct Weights {  // of one neuron and one matrix
  const uint8_t* data;
  const at::Half* scales;
  const uint8_t* zeros;
  int64_t group;

  Weights(const Layer& layer, const uint8_t* record, int64_t matrix)
      : data(record + layer.matrices[matrix].weights),
        scales(reinterpret_cast<const at::Half*>(record + layer.matrices[matrix].scales)),
        zeros(record + layer.matrices[matrix].zeros),
        group(layer.group) {}
};

// Loads weights k to k + 31.
template <int BITS>
inline void load(const Weights& w, int64_t k, __m512 (&values)[2]) {
  if constexpr (BITS == 4) {
    const auto pairs = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w.data + k / 2));
    const __m512i wide = _mm512_cvtepu8_epi32(pairs);
    const int64_t g = k / w.group;
    const __m512 zero = _mm512_set1_ps(w.zeros[g / 2] >> 4 * (g % 2) & 15);
    const __m512 scale = _mm512_set1_ps(static_cast<float>(w.scales[g]));
    values[0] = _mm512_cvtepi32_ps(_mm512_and_si512(wide, _mm512_set1_epi32(15)));
    values[1] = _mm512_cvtepi32_ps(_mm512_srli_epi32(wide, 4));
    for (auto& v : values) v = _mm512_mul_ps(_mm512_sub_ps(v, zero), scale);
  }
  for (int i = 0; i < 2 && BITS != 4; i++) {
    const uint8_t* from = w.data + (k + 16 * i) * BITS / 8;
    if constexpr (BITS == 8) {
      const auto bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
      values[i] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
    } else {
      values[i] = load_bf16(reinterpret_cast<const at::BFloat16*>(from));
    }
  }
}

// Returns the index at which input k of a row is kept.
template <int BITS>
inline int64_t place(int64_t k) {
  return BITS == 4 ? k / kChunk * kChunk + k % 2 * 16 + k % kChunk / 2 : k;
}

// Multiplies M rows, (M, D), by a row of weights. Returns in y: (M,).
template <int BITS, int M>
void dot(const Weights& w, const float* rows, int64_t dim, float* y) {
  __m512 sums[M][2];
  for (int m = 0; m < M; m++) sums[m][0] = sums[m][1] = _mm512_setzero_ps();
  for (int64_t k = 0; k < dim; k += kChunk) {
    __m512 values[2];
    load<BITS>(w, k, values);
#pragma GCC unroll 4
    for (int m = 0; m < M; m++)
      for (int i = 0; i < 2; i++)
        sums[m][i] =
            _mm512_fmadd_ps(values[i], _mm512_loadu_ps(rows + m * dim + k + 16 * i), sums[m][i]);
  }
  for (int m = 0; m < M; m++) y[m] = _mm512_reduce_add_ps(_mm512_add_ps(sums[m][0], sums[m][1]));
}

template <int BITS>
void dots(const Weights& w, const float* rows, int64_t N, int64_t dim, float* y) {
  int64_t m = 0;
  for (; m + kSharedRows <= N; m += kSharedRows)
    dot<BITS, kSharedRows>(w, rows + m * dim, dim, y + m);
  for (; m < N; m++) dot<BITS, 1>(w, rows + m * dim, dim, y + m);
}

// Adds h, (N,), times a column of weights to the sums, (N, D). It skips rows where h is 0.
template <int BITS>
void add(const Weights& w, const float* h, int64_t N, int64_t dim, float* sums) {
  for (int64_t k = 0; k < dim; k += kChunk) {
    __m512 values[2];
    load<BITS>(w, k, values);
    for (int64_t m = 0; m < N; m++) {
      if (h[m] == 0) continue;
      for (int i = 0; i < 2; i++) {
        float* to = sums + m * dim + k + 16 * i;
        const __m512 factor = _mm512_set1_ps(h[m]);
        _mm512_storeu_ps(to, _mm512_fmadd_ps(factor, values[i], _mm512_loadu_ps(to)));
      }
    }
  }
}

// Computes the hidden values h, (N,), of one neuron: ReLU(up), or ReLU(gate) * up. Returns whether
// any of them is not 0.
template <int BITS>
bool hidden(const Layer& layer, const uint8_t* record, int64_t id, const float* rows, int64_t N,
            float* h, float* up) {
  auto scaled = [&](int64_t matrix, float* y) {
    dots<BITS>(Weights(layer, record, matrix), rows, N, layer.dim, y);
    const int64_t at = id * layer.inner + matrix;
    const float scale = layer.scales ? layer.scales[at] : 1, bias = layer.bias[at];
    for (int64_t m = 0; m < N; m++) y[m] = y[m] * scale + bias;
  };
  bool active = false;
  scaled(0, h);
  for (int64_t m = 0; m < N; m++) active |= (h[m] = std::max(h[m], 0.f)) != 0;
  if (active && layer.inner == 2) {
    scaled(1, up);
    for (int64_t m = 0; m < N; m++) h[m] *= up[m];
  }
  return active;
}

// Adds the outputs of neurons `from` to `to` of the entries to the sums, (N, D). Returns how many
// were active for a row.
template <int BITS>
int64_t add_neurons(const Layer& layer, const int64_t* entries, int64_t from, int64_t to,
                    const float* rows, int64_t N, float* sums) {
  std::vector<float> buffer(2 * N);
  float *h = buffer.data(), *up = h + N;
  const int64_t line = layer.dim * BITS / 8;
  auto record_of = [&](int64_t n) {
    return layer.records + (entries ? entries[n] : n) * layer.stride;
  };
  int64_t active = 0;
  for (int64_t n = from; n < to; n++) {
    // Records are too far apart for the CPU's prefetcher.
    const uint8_t* next = record_of(std::min(n + 1, to - 1)) + layer.matrices[0].weights;
    for (int64_t i = 0; i < line; i += kLine) _mm_prefetch(next + i, _MM_HINT_T0);
    const uint8_t* record = record_of(n);
    const int64_t id = layer.ids[entries ? entries[n] : n];
    if (id == layer.empty || !hidden<BITS>(layer, record, id, rows, N, h, up)) continue;
    active++;
    add<BITS>(Weights(layer, record, layer.inner), h, N, layer.dim, sums);
  }
  return active;
}

template <int BITS>
int64_t neurons_of(const Layer& layer, const int64_t* entries, int64_t count, const Tensor& x,
                   Tensor& y) {
  const int64_t N = x.size(0), dim = layer.dim;
  const auto* given = x.const_data_ptr<at::BFloat16>();
  std::vector<float> rows(N * dim);
  for (int64_t m = 0; m < N; m++)
    for (int64_t k = 0; k < dim; k++) rows[m * dim + place<BITS>(k)] = given[m * dim + k];
  // Each part has sums of its own. The number of parts depends on sizes and the number of threads
  // only, so repeated calls give the same bits.
  const int64_t parts = std::clamp<int64_t>(count * dim / kGrain, 1, at::get_num_threads());
  std::vector<float> sums(parts * N * dim);
  std::vector<int64_t> active(parts);
  at::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; p++)
      active[p] = add_neurons<BITS>(layer, entries, count * p / parts, count * (p + 1) / parts,
                                 rows.data(), N, &sums[p * N * dim]);
  });
  auto* out = y.mutable_data_ptr<float>();
  for (int64_t m = 0; m < N; m++)
    for (int64_t k = 0; k < dim; k++) {
      float sum = 0;
      for (int64_t p = 0; p < parts; p++) sum += sums[(p * N + m) * dim + place<BITS>(k)];
      out[m * dim + k] = sum;
    }
  int64_t total = 0;
  for (const int64_t some : active) total += some;
  return total;
}

// x: (N, D). records: (C, stride) bytes. entries: the records to use, none: all. ids: (C,), the
// neuron of each record. bias: (F + 1, inner); its last row belongs to empty records. scales: the
// same shape. fields: the first bytes of weights, scales and zero points of each matrix in a
// record. Returns (N, D) in float32, and how many neurons were active for a row.
std::tuple<Tensor, int64_t> neurons(const Tensor& x, const Tensor& records,
                                    const std::optional<Tensor>& entries, const Tensor& ids,
                                    const Tensor& bias, const std::optional<Tensor>& scales,
                                    at::IntArrayRef fields, int64_t bits, int64_t group) {
  const int64_t dim = x.size(1), inner = bias.size(1);
  TORCH_CHECK(dim % kChunk == 0 && group % kChunk == 0, dim, " inputs in groups of ", group);
  TORCH_CHECK(records.stride(1) == 1 && ids.is_contiguous() && bias.is_contiguous());
  TORCH_CHECK(static_cast<int64_t>(fields.size()) == 3 * (inner + 1) && inner <= 2);
  Layer layer{records.const_data_ptr<uint8_t>(), ids.const_data_ptr<int64_t>(),
              bias.const_data_ptr<at::BFloat16>(),
              scales ? scales->const_data_ptr<float>() : nullptr};
  layer.stride = records.stride(0), layer.inner = inner, layer.empty = bias.size(0) - 1;
  layer.dim = dim, layer.group = group;
  for (int64_t i = 0; i <= inner; i++)
    layer.matrices[i] = {fields[3 * i], fields[3 * i + 1], fields[3 * i + 2]};
  const int64_t* some = entries ? entries->const_data_ptr<int64_t>() : nullptr;
  const int64_t count = entries ? entries->numel() : records.size(0);
  Tensor y = at::empty({x.size(0), dim}, x.options().dtype(at::kFloat));
  const Tensor rows = x.contiguous();
  const int64_t active = bits == 16 ? neurons_of<16>(layer, some, count, rows, y)
                         : bits == 8  ? neurons_of<8>(layer, some, count, rows, y)
                                         : neurons_of<4>(layer, some, count, rows, y);
  return {y, active};
}

}  // namespace

TORCH_LIBRARY_IMPL(gpt_flex, CPU, library) { library.impl("neurons", neurons); }
