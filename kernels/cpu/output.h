// The outputs of a product: y and its bias, in any of the dtypes of activations. Results are
// float32 until they are stored; the bias is added before the only rounding.

#pragma once

#include "vector.h"

namespace {

enum Dtype { kFloat32, kBFloat16, kFloat16 };

struct Output {
  void* y;           // (M, N)
  const void* bias;  // (N) or nullptr
  Dtype dtype;       // of y and bias
  int64_t M, N;

  // Writes the 16 outputs of strip n of row m, plus their bias.
  void store_strip(int64_t m, int64_t n, const Floats& v) const {
    if (dtype == kBFloat16) return store_as<BFloat16>(m, n * kStrip, v);
    if (dtype == kFloat16) return store_as<Half>(m, n * kStrip, v);
    store_as<float>(m, n * kStrip, v);
  }

  // Writes the first `count` outputs of strip n of row m, plus their bias.
  void store_outputs(int64_t m, int64_t n, int64_t count, const Floats& v) const {
    if (count == kStrip) return store_strip(m, n, v);
    alignas(kLine) float values[kStrip];
    store(values, v);
    for (int64_t i = 0; i < count; i++) store_one(m, n * kStrip + i, values[i]);
  }

  // Writes output n of row m, plus its bias.
  void store_one(int64_t m, int64_t n, float value) const {
    if (dtype == kBFloat16) return store_one_as<BFloat16>(m, n, value);
    if (dtype == kFloat16) return store_one_as<Half>(m, n, value);
    store_one_as<float>(m, n, value);
  }

 private:
  template <class T>
  void store_as(int64_t m, int64_t n, const Floats& v) const {
    T* to = static_cast<T*>(y) + m * N + n;
    if (bias) return store(to, v + load(static_cast<const T*>(bias) + n));
    store(to, v);
  }

  template <class T>
  void store_one_as(int64_t m, int64_t n, float value) const {
    const T* b = static_cast<const T*>(bias);
    static_cast<T*>(y)[m * N + n] = to_type<T>(value + (bias ? to_float(b[n]) : 0.f));
  }
};

}  // namespace
