// The RMS norm of one row (arXiv 1910.07467): x / sqrt(mean(x^2) + eps) * (weight + offset). Start
// at rms_norm. The result is computed in float32 and rounded once.

#pragma once

#include "vector.h"

namespace {

template <class T>
struct RmsNorm {
  int64_t D;        // channels of a row
  const T* weight;  // (D), or nullptr: no factor, and the offset is not used
  float eps;
  float offset;  // added to the weight: 1 in models that store weight - 1 (Gemma), else 0
};

// Writes the norm of x, (D), to y, (D), which may be x.
template <class T>
void rms_norm(const RmsNorm<T>& norm, const T* x, T* y) {
  Floats squares = splat(0.f);
  for (int64_t i = 0; i < norm.D; i += kStrip) {
    const Floats v = load_some(x + i, norm.D - i);
    squares = fma(v, v, squares);
  }
  const float mean = reduce_add(squares) / static_cast<float>(norm.D);
  const Floats factor = splat(1 / std::sqrt(mean + norm.eps)), offset = splat(norm.offset);
  for (int64_t i = 0; i < norm.D; i += kStrip) {
    Floats v = load_some(x + i, norm.D - i) * factor;
    if (norm.weight) v = v * (load_some(norm.weight + i, norm.D - i) + offset);
    store_some(y + i, norm.D - i, v);
  }
}

}  // namespace
