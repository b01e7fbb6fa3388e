// The outputs of a product: y and its bias, in any of the dtypes of activations.

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
    if (dtype == kBFloat16) return store_as<BFloat16>(m, n, v);
    if (dtype == kFloat16) return store_as<Half>(m, n, v);
    store_as<float>(m, n, v);
  }

 private:
  template <class T>
  void store_as(int64_t m, int64_t n, const Floats& v) const {
    T* to = static_cast<T*>(y) + m * N + n * kStrip;
    if (bias) return store(to, v + load(static_cast<const T*>(bias) + n * kStrip));
    store(to, v);
  }
};

}  // namespace
