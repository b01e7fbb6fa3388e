// Reads packed weights (layout.h): where strips and spans begin, a block's scales and zero points.
// Adds the products of a block to the outputs of a row.

#pragma once

#include "vector.h"

namespace {

// N outputs, padded to whole strips, of K inputs, padded as strip_inputs says. The inputs of a
// block share a scale: of the weights in int4, of the activations in int8.
struct PackedWeights {
  const uint8_t* data;         // (N / 16, strip)
  int64_t N, K, block, strip;  // block: inputs of a block; strip: bytes of a strip

  int64_t blocks() const { return blocks_of(K, block); }
  const uint8_t* scales(int64_t n) const { return data + n * strip; }  // of strip n
  const uint8_t* spans(int64_t n) const { return scales(n) + kStrip * sizeof(float); }
  Floats output_scales(int64_t n) const {
    return load(reinterpret_cast<const float*>(scales(n)));
  }
};

// Returns the zero points, (16,), of block b of the span that begins at `header`.
template <Format F>
inline Floats load_zeros(const uint8_t* header, int64_t block, int64_t b) {
  if constexpr (F == kInt8) return splat(128.f);
  return load_sixteen_nibbles(header + zeros_offset<F>(block, b));
}

// Returns the scales, (16,), of block b of the span that begins at `header`; they are in units of
// output_scales.
template <Format F>
inline Floats load_scales(const uint8_t* header, int64_t b) {
  const uint8_t* scales = header + b * kStrip * scale_bytes(F);
  if constexpr (F == kInt8) return splat(1.f);
  if constexpr (F == kInt4Half) return load(reinterpret_cast<const Half*>(scales));
  return load(scales);
}

// Returns y, (16,), plus the outputs of a block: scales * row_scale * (sums - zeros * row_sum).
// sums: for each output the sum of the products of the row's and the weights' integers; row_sum:
// the sum of the row's integers; row_scale: their scale.
inline Floats add_block(Floats y, Ints sums, Floats zeros, Floats scales, float row_sum,
                        float row_scale) {
  const Floats dot = fnma(zeros, splat(row_sum), to_floats(sums));
  return fma(scales * splat(row_scale), dot, y);
}

}  // namespace
