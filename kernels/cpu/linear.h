// Products of rows by dense bfloat16 or float16 weights, (N, K) as they lie in memory, with float32
// sums.
//
// Start at multiply_few_rows and multiply_many_rows. With few rows, reading the weights takes most
// of the time: they are multiplied as dot products along K, as they lie. For many rows, 16 outputs
// are transposed into a float32 panel that stays in the L1 cache, and kDenseRows rows share each
// load of it. In either function a row's result has the same bits whatever rows are beside it.

#pragma once

#include "output.h"
#include "row_groups.h"

namespace {

constexpr int64_t kMaxFewRows = 16;
constexpr int64_t kPanelInputs = 256;  // of a panel of 16 outputs, which takes 16 KB
constexpr int kDenseRows = 6;          // their sums and a panel's weights fit in the registers
// Outputs and rows of a dot product: with these AVX2's 16 registers hold sums and operands.
constexpr int kDotOutputs = 2, kDotRows = 3;
// Outputs of one row whose weights are read side by side. A thread reads them from four places far
// apart: 1.2 to 1.4 times as fast as from one place. reduce_add_four takes four sums.
constexpr int kOneRowStreams = 4;

struct DenseWeights {
  const void* data;  // (N, K)
  int64_t N, K;
};

// Converts rows `from` to `to` of x, (M, K), to float32 in `rows`, which has `stride` >= K floats
// from row to row; zeros fill the rest of a row.
template <class T>
void to_float_rows(const T* x, int64_t K, int64_t stride, int64_t from, int64_t to, float* rows) {
  for (int64_t m = from; m < to; m++) {
    int64_t k = 0;
    for (; k + kStrip <= K; k += kStrip) store(rows + m * stride + k, load(x + m * K + k));
    for (; k < stride; k++) rows[m * stride + k] = k < K ? to_float(x[m * K + k]) : 0.f;
  }
}

// Loads inputs k to k + 15 of a row of weights; those from K on are 0.
template <class W>
inline Floats load_weights(const W* row, int64_t k, int64_t K) {
  if (k + kStrip <= K) return load(row + k);
  W padded[kStrip] = {};
  for (int64_t i = k; i < K; i++) padded[i - k] = row[i];
  return load(padded);
}

// Writes the products of M rows by N outputs to y, (M, N). weights: of the first output; rows: the
// first row, with `stride` floats from row to row, a multiple of 16.
template <class W, int M, int N>
void dot_products(const W* weights, int64_t K, const float* rows, int64_t stride, float* y) {
  Floats sums[M][N];
#pragma GCC unroll 16
  for (int i = 0; i < M * N; i++) sums[i / N][i % N] = splat(0.f);
  const auto add = [&](int64_t k, auto load_row) {
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) {
      prefetch(weights + n * K + k + kAhead / sizeof(W));
      const Floats w = load_row(weights + n * K);
#pragma GCC unroll 4
      for (int m = 0; m < M; m++) sums[m][n] = fma(w, load(rows + m * stride + k), sums[m][n]);
    }
  };
  const int64_t whole = K / kStrip * kStrip;  // a condition in the loop would spill the sums
  for (int64_t k = 0; k < whole; k += kStrip) add(k, [&](const W* row) { return load(row + k); });
  if (whole < K) add(whole, [&](const W* row) { return load_weights(row, whole, K); });
  for (int i = 0; i < M * N; i++) y[i] = reduce_add(sums[i / N][i % N]);
}

// Computes outputs n, n + step, n + 2 * step and n + 3 * step of the only row, which is padded with
// zeros to a multiple of 16.
template <class W>
void dot_one_row(const DenseWeights& w, const float* row, int64_t n, int64_t step,
                 const Output& out) {
  const W* weights[kOneRowStreams];
  Floats sums[kOneRowStreams];
  for (int64_t t = 0; t < kOneRowStreams; t++)
    weights[t] = static_cast<const W*>(w.data) + (n + t * step) * w.K, sums[t] = splat(0.f);
  const int64_t whole = w.K / kStrip * kStrip;  // a condition in the loop would spill the sums
  for (int64_t k = 0; k < whole; k += kStrip) {
    const Floats x = load(row + k);
#pragma GCC unroll 4
    for (int t = 0; t < kOneRowStreams; t++) {
      prefetch(weights[t] + k + kAhead / sizeof(W));
      sums[t] = fma(load(weights[t] + k), x, sums[t]);
    }
  }
  for (int t = 0; whole < w.K && t < kOneRowStreams; t++)
    sums[t] = fma(load_weights(weights[t], whole, w.K), load(row + whole), sums[t]);
  float y[kOneRowStreams];
  reduce_add_four(sums, y);
  for (int64_t t = 0; t < kOneRowStreams; t++) out.store_one(0, n + t * step, y[t]);
}

// Computes N outputs, from output n on, of all rows.
template <class W, int N>
void dot_rows(const DenseWeights& w, const float* rows, int64_t stride, int64_t n,
              const Output& out) {
  const W* weights = static_cast<const W*>(w.data) + n * w.K;
  in_groups<kDotRows>(out.M, [&](auto count, int64_t m) {
    constexpr int M = decltype(count)::value;
    float y[M * N];
    dot_products<W, M, N>(weights, w.K, rows + m * stride, stride, y);
    for (int i = 0; i < M * N; i++) out.store_one(m + i / N, n + i % N, y[i]);
  });
}

// Multiplies up to kMaxFewRows float32 rows by outputs `from` to `to`.
template <class W>
void multiply_few_rows(const DenseWeights& w, const float* rows, int64_t stride, int64_t from,
                       int64_t to, const Output& out) {
  int64_t n = from;
  if (out.M == 1) {
    const int64_t step = (to - from) / kOneRowStreams;
    for (; n < from + step; n++) dot_one_row<W>(w, rows, n, step, out);
    n = from + kOneRowStreams * step;
  }
  for (; out.M > 1 && n + kDotOutputs <= to; n += kDotOutputs)
    dot_rows<W, kDotOutputs>(w, rows, stride, n, out);
  for (; n < to; n++) dot_rows<W, 1>(w, rows, stride, n, out);
}

// Weights of 16 outputs as float32, transposed: all outputs' weights of an input lie side by side.
struct alignas(kLine) DensePanel {
  float weights[kPanelInputs][kStrip];
};

// Writes to the panel the weights of strip n, outputs 16 * n to 16 * n + 15, for inputs k to
// k + count - 1. Weights of outputs from N on are 0. Prefetches the next strip's weights for the
// same inputs.
template <class W>
void fill_panel(const DenseWeights& w, int64_t n, int64_t k, int64_t count, DensePanel& panel) {
  alignas(kLine) float rows[kStrip][kStrip] = {};
  const int64_t outputs = std::min(kStrip, w.N - n * kStrip);
  const W* data = static_cast<const W*>(w.data) + n * kStrip * w.K;
  for (int64_t i = 0; i < count; i += kStrip) {
    for (int64_t j = 0; j < outputs; j++) {
      prefetch(data + (j + kStrip) * w.K + k + i);
      store(rows[j], load_weights(data + j * w.K, k + i, w.K));
    }
    for (int64_t a = 0; a < kStrip; a++)
      for (int64_t j = 0; j < kStrip; j++) panel.weights[i + a][j] = rows[j][a];
  }
}

// Adds the products of a panel, of `count` inputs, and R rows of float32 to y, (R, 16).
template <int R>
void multiply_dense_panel(const DensePanel& panel, int64_t count, const float* rows,
                          int64_t stride, Floats* y) {
  NativeFloat sums[R][kParts];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 16
    for (int p = 0; p < kParts; p++) sums[r][p] = y[r].part[p];
#pragma GCC unroll 4
  for (int64_t k = 0; k < count; k++) {
    NativeFloat weights[kParts];
#pragma GCC unroll 16
    for (int p = 0; p < kParts; p++) weights[p] = native_load(&panel.weights[k][p * kLanes]);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const NativeFloat input = native_splat(rows[r * stride + k]);
#pragma GCC unroll 16
      for (int p = 0; p < kParts; p++) sums[r][p] = native_fma(weights[p], input, sums[r][p]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 16
    for (int p = 0; p < kParts; p++) y[r].part[p] = sums[r][p];
}

// Multiplies any number of float32 rows by strips `from` to `to`, of 16 outputs each.
template <class W>
void multiply_many_rows(const DenseWeights& w, const float* rows, int64_t stride, int64_t from,
                        int64_t to, const Output& out) {
  constexpr int64_t kRows = 192;  // rows whose outputs of a strip stay in the L1 cache
  DensePanel panel;
  Floats y[kRows];
  for (int64_t n = from; n < to; n++)
    for (int64_t first = 0; first < out.M; first += kRows) {
      const int64_t M = std::min(kRows, out.M - first);
      for (int64_t m = 0; m < M; m++) y[m] = splat(0.f);
      for (int64_t k = 0; k < w.K; k += kPanelInputs) {
        const int64_t count = std::min(kPanelInputs, w.K - k);
        fill_panel<W>(w, n, k, count, panel);
        in_groups<kDenseRows>(M, [&](auto size, int64_t m) {
          multiply_dense_panel<decltype(size)::value>(panel, count, rows + (first + m) * stride + k,
                                                      stride, y + m);
        });
      }
      const int64_t outputs = std::min(kStrip, w.N - n * kStrip);
      for (int64_t m = 0; m < M; m++) out.store_outputs(first + m, n, outputs, y[m]);
    }
}

}  // namespace
