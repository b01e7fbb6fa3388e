// What feed-forward neurons behind a ReLU give to a few rows, for CPUs with AVX-512 and BF16.
//
// Start at `neurons`. A neuron's weights lie side by side in a record (neurons.py): its row of the
// up (and gate) projection, its column of the down projection. Few are active for a token, so that of
// most records only the first row is read: the time that takes is what decoding takes. Sums are of
// 32 bits, as are the hidden values between the two products. int4 weights are unpacked as the even
// ones of 32, then the odd ones; rows and sums are therefore kept in that order, too.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <immintrin.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

namespace {

using at::Tensor;

constexpr int64_t kChunk = 32;       // weights that are unpacked together
constexpr int64_t kLine = 64;        // bytes that memory is read by
constexpr int64_t kFew = 4;          // rows that share an unpacked weight
constexpr int64_t kGrain = 1 << 16;  // weights that are worth another thread

enum Kind { kDense = 16, kInt8 = 8, kInt4 = 4 };  // bits of a weight

struct Matrix {  // where it begins within a record, in bytes; int8 and dense have no groups
  int64_t weights, scales, zeros;
};

struct Layer {
  const uint8_t* records;  // (C, stride)
  const int64_t* ids;      // (C,): which neurons they are; `empty`: none
  const at::BFloat16* bias;  // (F + 1, inner)
  const float* scales;       // (F + 1, inner) or nullptr
  int64_t stride, inner, empty, dim, group;
  Matrix matrices[3];
};

struct Weights {  // one neuron's, of one matrix
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

// Weights k to k + 31.
template <Kind K>
inline void load(const Weights& w, int64_t k, __m512 (&values)[2]) {
  if constexpr (K == kInt4) {
    const auto pairs = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w.data + k / 2));
    const __m512i wide = _mm512_cvtepu8_epi32(pairs);
    const int64_t g = k / w.group;
    const __m512 zero = _mm512_set1_ps(w.zeros[g / 2] >> 4 * (g % 2) & 15);
    const __m512 scale = _mm512_set1_ps(static_cast<float>(w.scales[g]));
    values[0] = _mm512_cvtepi32_ps(_mm512_and_si512(wide, _mm512_set1_epi32(15)));
    values[1] = _mm512_cvtepi32_ps(_mm512_srli_epi32(wide, 4));
    for (auto& v : values) v = _mm512_mul_ps(_mm512_sub_ps(v, zero), scale);
  }
  for (int i = 0; i < 2 && K != kInt4; i++) {
    const uint8_t* from = w.data + (k + 16 * i) * K / 8;
    if constexpr (K == kInt8) {
      const auto bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
      values[i] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
    } else {
      const auto halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
      values[i] = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
    }
  }
}

// Where input k of a row is kept.
template <Kind K>
inline int64_t place(int64_t k) {
  return K == kInt4 ? k / kChunk * kChunk + k % 2 * 16 + k % kChunk / 2 : k;
}

// The products of M rows, (M, D), by a row of weights: (M,).
template <Kind K, int M>
void dot(const Weights& w, const float* rows, int64_t dim, float* y) {
  __m512 sums[M][2];
  for (int m = 0; m < M; m++) sums[m][0] = sums[m][1] = _mm512_setzero_ps();
  for (int64_t k = 0; k < dim; k += kChunk) {
    __m512 values[2];
    load<K>(w, k, values);
#pragma GCC unroll 4
    for (int m = 0; m < M; m++)
      for (int i = 0; i < 2; i++)
        sums[m][i] =
            _mm512_fmadd_ps(values[i], _mm512_loadu_ps(rows + m * dim + k + 16 * i), sums[m][i]);
  }
  for (int m = 0; m < M; m++) y[m] = _mm512_reduce_add_ps(_mm512_add_ps(sums[m][0], sums[m][1]));
}

template <Kind K>
void dots(const Weights& w, const float* rows, int64_t N, int64_t dim, float* y) {
  int64_t m = 0;
  for (; m + kFew <= N; m += kFew) dot<K, kFew>(w, rows + m * dim, dim, y + m);
  for (; m < N; m++) dot<K, 1>(w, rows + m * dim, dim, y + m);
}

// Adds h times a column of weights to the sums, (N, D), of rows for which h, (N,), is not 0.
template <Kind K>
void add(const Weights& w, const float* h, int64_t N, int64_t dim, float* sums) {
  for (int64_t k = 0; k < dim; k += kChunk) {
    __m512 values[2];
    load<K>(w, k, values);
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

// h, (N,), of one neuron: the ReLU of gate or up, by up where there is a gate. False: all are 0.
template <Kind K>
bool hidden(const Layer& layer, const uint8_t* record, int64_t id, const float* rows, int64_t N,
            float* h, float* up) {
  auto scaled = [&](int64_t matrix, float* y) {
    dots<K>(Weights(layer, record, matrix), rows, N, layer.dim, y);
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

// Neurons `from` to `to` of the slots: adds to the sums, (N, D), and returns how many were active.
template <Kind K>
int64_t add_neurons(const Layer& layer, const int64_t* slots, int64_t from, int64_t to,
                    const float* rows, int64_t N, float* sums) {
  std::vector<float> room(2 * N);
  float *h = room.data(), *up = h + N;
  const int64_t line = layer.dim * K / 8;
  auto record_of = [&](int64_t n) { return layer.records + (slots ? slots[n] : n) * layer.stride; };
  int64_t active = 0;
  for (int64_t n = from; n < to; n++) {
    // Records are too far apart for the CPU to foresee the next.
    const uint8_t* next = record_of(std::min(n + 1, to - 1)) + layer.matrices[0].weights;
    for (int64_t i = 0; i < line; i += kLine) _mm_prefetch(next + i, _MM_HINT_T0);
    const uint8_t* record = record_of(n);
    const int64_t id = layer.ids[slots ? slots[n] : n];
    if (id == layer.empty || !hidden<K>(layer, record, id, rows, N, h, up)) continue;
    active++;
    add<K>(Weights(layer, record, layer.inner), h, N, layer.dim, sums);
  }
  return active;
}

template <Kind K>
int64_t neurons_of(const Layer& layer, const int64_t* slots, int64_t count, const Tensor& x,
                   Tensor& y) {
  const int64_t N = x.size(0), dim = layer.dim;
  const auto* given = x.const_data_ptr<at::BFloat16>();
  std::vector<float> rows(N * dim);
  for (int64_t m = 0; m < N; m++)
    for (int64_t k = 0; k < dim; k++) rows[m * dim + place<K>(k)] = given[m * dim + k];
  // Each thread has sums of its own; how many there are depends on sizes alone, as do the bits.
  const int64_t parts = std::clamp<int64_t>(count * dim / kGrain, 1, at::get_num_threads());
  std::vector<float> sums(parts * N * dim);
  std::vector<int64_t> active(parts);
  at::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; p++)
      active[p] = add_neurons<K>(layer, slots, count * p / parts, count * (p + 1) / parts,
                                 rows.data(), N, &sums[p * N * dim]);
  });
  auto* out = y.mutable_data_ptr<float>();
  for (int64_t m = 0; m < N; m++)
    for (int64_t k = 0; k < dim; k++) {
      float sum = 0;
      for (int64_t p = 0; p < parts; p++) sum += sums[(p * N + m) * dim + place<K>(k)];
      out[m * dim + k] = sum;
    }
  int64_t total = 0;
  for (const int64_t some : active) total += some;
  return total;
}

// x: (N, D). records: (C, stride) bytes. slots: which of them, none: all. ids: (C,), the neuron that
// is in each. bias: (F + 1, inner), of which the last stands for no neuron; scales: the same shape.
// fields: the first bytes of weights, scales and zeros of each matrix. Returns (N, D) in float32,
// and how many neurons gave something.
std::tuple<Tensor, int64_t> neurons(const Tensor& x, const Tensor& records,
                                    const std::optional<Tensor>& slots, const Tensor& ids,
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
  const int64_t* some = slots ? slots->const_data_ptr<int64_t>() : nullptr;
  const int64_t count = slots ? slots->numel() : records.size(0);
  Tensor y = at::empty({x.size(0), dim}, x.options().dtype(at::kFloat));
  const Tensor rows = x.contiguous();
  const int64_t active = bits == kDense  ? neurons_of<kDense>(layer, some, count, rows, y)
                         : bits == kInt8 ? neurons_of<kInt8>(layer, some, count, rows, y)
                                         : neurons_of<kInt4>(layer, some, count, rows, y);
  return {y, active};
}

}  // namespace

TORCH_LIBRARY_IMPL(gpt_flex, CPU, library) { library.impl("neurons", neurons); }
