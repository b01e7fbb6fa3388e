// A feed-forward layer with ReLU, of some of its neurons, for a few rows, in plain C++17.
//
// Start at add_neurons. A record (neurons/records.py) holds the weights of one neuron: its row of
// the up (and gate) projection and its column of the down projection. Few neurons are active for a
// token, so most records are read no further than their first row, and reading these rows bounds
// decoding. Sums and hidden values are float32. int4 weights are unpacked as the even ones of 32,
// then the odd ones; inputs and sums are kept in that order, too.
//
// T is the type of activations and biases: BFloat16, Half or float. W is the type of weights: T,
// int8_t or Nibbles.

#pragma once

#include <type_traits>
#include <vector>

#include "vector.h"

namespace {

constexpr int64_t kSharedRows = 4;  // rows that share an unpacked weight

struct Nibbles {};  // two weights to a byte, in groups that share a scale and a zero point

struct Matrix {  // first bytes within a record; only Nibbles have scales and zero points in it
  int64_t weights, scales, zeros;
};

template <class T>
struct Layer {
  const uint8_t* records;  // (C, stride)
  const int64_t* ids;      // (C,): the neuron of each record; `empty`: no neuron
  const T* bias;           // (F + 1, inner)
  const float* scales;     // (F + 1, inner) or nullptr
  int64_t stride, inner, empty, dim, group;  // inner: 1 (up) or 2 (gate and up)
  Matrix matrices[3];
};

// Reads the weights of one neuron and one matrix, kChunk at a time. Prefetches what lies `ahead`
// bytes further.
template <class W>
struct Reader {
  const W* data;
  int64_t ahead;

  Reader(const uint8_t* record, const Matrix& matrix, int64_t, int64_t ahead)
      : data(reinterpret_cast<const W*>(record + matrix.weights)), ahead(ahead) {}

  void next(Floats (&values)[2]) {
    prefetch(reinterpret_cast<const uint8_t*>(data) + ahead, kChunk * sizeof(W));
    values[0] = load(data), values[1] = load(data + kStrip);
    data += kChunk;
  }
};

template <>
struct Reader<Nibbles> {
  const uint8_t *data, *zeros;
  const Half* scales;
  int64_t ahead, group, left = 0;  // left: weights of the group that are not read yet
  uint64_t g = 0;                  // the number of the next group
  float scale = 0, offset = 0;

  Reader(const uint8_t* record, const Matrix& matrix, int64_t group, int64_t ahead)
      : data(record + matrix.weights),
        zeros(record + matrix.zeros),
        scales(reinterpret_cast<const Half*>(record + matrix.scales)),
        ahead(ahead),
        group(group) {}

  // (weight - zero) * scale is a float32 number, and so is each product here: nothing is rounded.
  void next(Floats (&values)[2]) {
    if (left == 0) {
      const int zero = zeros[g / 2] >> 4 * (g % 2) & 15;
      scale = to_float(scales[g]), offset = -scale * zero;
      prefetch(reinterpret_cast<const uint8_t*>(scales + g) + ahead);
      prefetch(zeros + g / 2 + ahead);
      g++, left = group;
    }
    prefetch(data + ahead);
    load_nibbles(data, values[0], values[1]);
    for (Floats& v : values) v = fma(v, splat(scale), splat(offset));
    data += kChunk / 2, left -= kChunk;
  }
};

template <class W>
constexpr int64_t bits_of_weight = std::is_same_v<W, Nibbles> ? 4 : 8 * sizeof(W);

// Returns the place within a chunk of inputs and sums at which number i of it is kept.
template <class W>
constexpr int64_t place(int64_t i) {
  return std::is_same_v<W, Nibbles> ? i % 2 * kStrip + i / 2 : i;
}

// Converts x, (N, D), to rows for the functions below, (N, D).
template <class W, class T>
void arrange_rows(const T* x, int64_t N, int64_t dim, float* rows) {
  for (int64_t k = 0; k < N * dim; k += kChunk)
    for (int64_t i = 0; i < kChunk; i++) rows[k + place<W>(i)] = to_float(x[k + i]);
}

// Adds sums of several parts of the neurons, (parts, N, D). Returns them in y: (N, D).
template <class W>
void add_parts(const float* sums, int64_t parts, int64_t N, int64_t dim, float* y) {
  for (int64_t k = 0; k < N * dim; k += kChunk)
    for (int64_t i = 0; i < kChunk; i++) {
      y[k + i] = 0;
      for (int64_t p = 0; p < parts; p++) y[k + i] += sums[p * N * dim + k + place<W>(i)];
    }
}

// Multiplies M rows, (M, D), by a row of weights. Returns in y: (M,).
template <int M, class W>
void dot(Reader<W> weights, const float* rows, int64_t dim, float* y) {
  Floats sums[M][2], values[2];
  for (auto& sum : sums) sum[0] = sum[1] = splat(0.f);
  for (int64_t k = 0; k < dim; k += kChunk) {
    weights.next(values);
#pragma GCC unroll 4
    for (int m = 0; m < M; m++)
#pragma GCC unroll 2
      for (int i = 0; i < 2; i++)
        sums[m][i] = fma(values[i], load(rows + m * dim + k + kStrip * i), sums[m][i]);
  }
  for (int m = 0; m < M; m++) y[m] = reduce_add(sums[m][0] + sums[m][1]);
}

template <class W>
void dots(const Reader<W>& weights, const float* rows, int64_t N, int64_t dim, float* y) {
  int64_t m = 0;
  for (; m + kSharedRows <= N; m += kSharedRows)
    dot<kSharedRows>(weights, rows + m * dim, dim, y + m);
  for (; m < N; m++) dot<1>(weights, rows + m * dim, dim, y + m);
}

// Adds h, (N,), times a column of weights to the sums, (N, D). It skips rows where h is 0.
template <class W>
void add(Reader<W> weights, const float* h, int64_t N, int64_t dim, float* sums) {
  for (int64_t k = 0; k < dim; k += kChunk) {
    Floats values[2];
    weights.next(values);
    for (int64_t m = 0; m < N; m++) {
      if (h[m] == 0) continue;
      float* to = sums + m * dim + k;
      for (int i = 0; i < 2; i++, to += kStrip) store(to, fma(splat(h[m]), values[i], load(to)));
    }
  }
}

// Computes the hidden values h, (N,), of one neuron: ReLU(up), or ReLU(gate) * up. Returns whether
// any of them is not 0. next: the record that is read after this one. Records are too far apart for
// the CPU's prefetcher.
template <class W, class T>
bool hidden(const Layer<T>& layer, const uint8_t* record, const uint8_t* next, int64_t id,
            const float* rows, int64_t N, float* h, float* up) {
  auto scaled = [&](int64_t matrix, float* y) {
    const int64_t ahead = matrix ? kAhead : next - record;
    dots(Reader<W>(record, layer.matrices[matrix], layer.group, ahead), rows, N, layer.dim, y);
    const int64_t at = id * layer.inner + matrix;
    const float scale = layer.scales ? layer.scales[at] : 1, bias = to_float(layer.bias[at]);
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

// Adds the outputs of neurons `from` to `to` of the entries to the sums, (N, D). entries: the
// records to use, nullptr: all. Returns how many neurons were active for a row.
template <class W, class T>
int64_t add_neurons(const Layer<T>& layer, const int64_t* entries, int64_t from, int64_t to,
                    const float* rows, int64_t N, float* sums) {
  std::vector<float> buffer(2 * N);
  float *h = buffer.data(), *up = h + N;
  auto record_of = [&](int64_t n) {
    return layer.records + (entries ? entries[n] : n) * layer.stride;
  };
  int64_t active = 0;
  for (int64_t n = from; n < to; n++) {
    const uint8_t *record = record_of(n), *next = record_of(std::min(n + 1, to - 1));
    const int64_t id = layer.ids[entries ? entries[n] : n];
    if (id == layer.empty || !hidden<W>(layer, record, next, id, rows, N, h, up)) continue;
    active++;
    add(Reader<W>(record, layer.matrices[layer.inner], layer.group, kAhead), h, N, layer.dim, sums);
  }
  return active;
}

}  // namespace
