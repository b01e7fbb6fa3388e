// The layout of packed weights: what `pack` writes and `quantized_linear` reads, byte by byte. This
// file is plain C++17, so that a test compiles it on any CPU.
//
// A packed matrix consists of strips. A strip holds 16 outputs: 16 float scales, then one span for
// each 256 inputs. A span consists of a header and tiles; the last one may have fewer inputs, and
// fewer tiles. An int4 header holds, for each block of inputs, the scales of the 16 outputs, then
// for each block their zero points, two to a byte; zeros pad it to a cache line. An int8 span has
// no header. A tile holds 16 outputs by 4 inputs: the four inputs of an output lie side by side, as
// the instruction vpdpbusd reads them. int8 weights are stored plus 128, one tile to a register.
// Two int4 tiles share a register: the first one is in the low nibbles, the second one in the high
// nibbles.

#pragma once

#include <cstdint>

namespace {

constexpr int64_t kStrip = 16;       // outputs of a strip
constexpr int64_t kSpan = 256;       // inputs of a span, but for the last one of a strip
constexpr int64_t kUnit = 128;       // zeros pad a strip's inputs to a multiple, see strip_inputs
constexpr int64_t kChunk = 32;       // inputs that are unpacked together
constexpr int64_t kLine = 64;        // bytes of a cache line
constexpr int64_t kInt8Block = 128;  // inputs of an int8 product that share an activation scale

// The first digit is the bits of a weight, the second one the bytes of a block's scale. A scale of
// one byte is a multiple of the output's float scale; a scale of two bytes is a float16. int8 has
// no block scales, and its zero point is 128.
enum Format { kInt8 = 80, kInt4 = 41, kInt4Half = 42 };
constexpr int64_t bits(Format format) { return format / 10; }
constexpr int64_t scale_bytes(Format format) { return format % 10; }

// The format is a template parameter: as an argument it made GCC 12 compile the kernels to other
// code.

// block: inputs that share a scale, here and below; a power of two that divides kSpan. Returns the
// number of whole blocks in `inputs` inputs. It shifts in place of dividing: a division takes 10 to
// 90 cycles, and the compiler does not move it out of a loop, because dividing by zero traps.
constexpr int64_t blocks_of(int64_t inputs, int64_t block) {
  return inputs >> __builtin_ctzll(static_cast<uint64_t>(block));
}
// Returns the byte of a span's header at which the zero points of block b of the span begin.
template <Format F>
constexpr int64_t zeros_offset(int64_t block, int64_t b) {
  return blocks_of(kSpan, block) * kStrip * scale_bytes(F) + b * kStrip / 2;
}
// Returns the bytes of a span's header. Every header has room for a whole span's blocks.
template <Format F>
constexpr int64_t header_bytes(int64_t block) {
  const int64_t bytes = zeros_offset<F>(block, blocks_of(kSpan, block));
  return F == kInt8 ? 0 : (bytes + kLine - 1) / kLine * kLine;
}
// Returns the bytes of a whole span: its header and its weights.
template <Format F>
constexpr int64_t span_bytes(int64_t block) {
  return header_bytes<F>(block) + kStrip * kSpan * bits(F) / 8;
}

// Returns the spans that K inputs take.
constexpr int64_t spans_of(int64_t K) { return (K + kSpan - 1) / kSpan; }

// Returns the number of inputs, K, of a strip whose rows have `row_bytes` bytes of weights in a
// checkpoint: rounded up to whole blocks and to whole kUnit, one of which divides the other.
template <Format F>
constexpr int64_t strip_inputs(int64_t row_bytes, int64_t block) {
  const int64_t unit = block > kUnit ? block : kUnit;
  return (row_bytes * 8 / bits(F) + unit - 1) / unit * unit;
}
// Returns the bytes of a strip; row_bytes as in strip_inputs.
template <Format F>
constexpr int64_t strip_bytes(int64_t row_bytes, int64_t block) {
  const int64_t scales = kStrip * static_cast<int64_t>(sizeof(float));
  const int64_t K = strip_inputs<F>(row_bytes, block);
  return scales + spans_of(K) * header_bytes<F>(block) + kStrip * K * bits(F) / 8;
}
// The inverse of strip_bytes: returns the inputs, K, of a strip of `bytes` bytes. The last span may
// have fewer weights; its header is whole.
template <Format F>
constexpr int64_t inputs_of_strip(int64_t bytes, int64_t block) {
  const int64_t in_spans = bytes - kStrip * static_cast<int64_t>(sizeof(float));
  const int64_t whole = in_spans / span_bytes<F>(block), rest = in_spans % span_bytes<F>(block);
  const int64_t weight_bytes = rest ? rest - header_bytes<F>(block) : 0;
  return whole * kSpan + weight_bytes * 8 / bits(F) / kStrip;
}
// Returns strip_bytes for a format given at run time, as Python gives it.
inline int64_t strip_bytes_of(int64_t format, int64_t row_bytes, int64_t block) {
  return format == kInt8   ? strip_bytes<kInt8>(row_bytes, block)
         : format == kInt4 ? strip_bytes<kInt4>(row_bytes, block)
                           : strip_bytes<kInt4Half>(row_bytes, block);
}

}  // namespace
