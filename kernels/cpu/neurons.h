// A feed-forward layer with ReLU, of some of its neurons, for a few rows, in plain C++17.
//
// Start at add_neurons. A record (neurons/records.py) holds the weights of one neuron: its row of
// the up (and gate) projection and its column of the down projection. Few neurons are active for a
// token, so most records are read no further than their first row, and reading these rows bounds
// decoding. Sums and hidden values are float32. Of each 32 int4 weights, those with even numbers
// are unpacked first, then those with odd numbers; inputs and sums are kept in that order, too.
//
// Shapes: C records in memory, F neurons of the layer, N rows, D (`dim`) channels of a row. T is
// the type of activations and biases: BFloat16, Half or float. W is the type of weights: T, int8_t
// or Nibbles.

#pragma once

#include <type_traits>
#include <vector>

#include "vector.h"

namespace {

constexpr int64_t kSharedRows = 4;  // rows for which a weight is unpacked once

struct Nibbles {};  // two weights to a byte, in groups that share a scale and a zero point

// Where a matrix has its numbers in a record: the offsets, in bytes, of their first ones. Only
// Nibbles have scales and zero points in the record.
struct Matrix {
  int64_t weights, scales, zeros;
};

template <class T>
struct Layer {
  const uint8_t* records;  // (C, stride)
  const int64_t* ids;      // (C,): the neuron of each record; `empty`: no neuron
  const T* bias;           // (F + 1, inner); the last row is for `empty`
  const float* scales;     // (F + 1, inner), of int8 weights, or nullptr
  // stride: bytes from record to record; inner: matrices before down, 1 (up) or 2 (gate and up);
  // empty: F; group: int4 weights that share a scale.
  int64_t stride, inner, empty, dim, group;
  Matrix matrices[3];  // up, down; or gate, up, down
};

// Reads the weights of one neuron in one matrix, kChunk at a time. Prefetches what lies `ahead`
// bytes after the weights that it reads. The third argument of the constructor is Layer::group.
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

// Returns the index within a chunk of inputs or sums at which number i of the chunk is kept: for
// Nibbles, even numbers come before odd ones.
template <class W>
constexpr int64_t place(int64_t i) {
  return std::is_same_v<W, Nibbles> ? i % 2 * kStrip + i / 2 : i;
}

// Converts x, (N, D), to float32 `rows`, (N, D), in the order of `place`.
template <class W, class T>
void arrange_rows(const T* x, int64_t N, int64_t dim, float* rows) {
  for (int64_t k = 0; k < N * dim; k += kChunk)
    for (int64_t i = 0; i < kChunk; i++) rows[k + place<W>(i)] = to_float(x[k + i]);
}

// Adds up the sums of several parts of the neurons, (parts, N, D), and undoes the order of `place`.
// Returns in y: (N, D).
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

// Does dot for any number N of rows. Each call of dot reads the weights anew, from a copy of the
// Reader.
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

// Computes the hidden values h, (N,), of one neuron, number `id` of the layer: ReLU(up), or
// ReLU(gate) * up. Returns whether any ReLU is not 0. next: the record that is read after this one;
// while the first matrix is read, the same bytes of the next record are prefetched, since records
// are too far apart for the CPU's own prefetcher. up: memory for N numbers.
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

// Adds to the sums, (N, D), the outputs of the neurons of entries `from` to `to`. entries: the
// numbers of the records to use; nullptr: all records. Returns how many of these neurons were
// active for at least one row.
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
