// Writes a quantised linear's weights in the order of layout.h. The calling thread packs alone, at
// about the speed of memory, while other threads may compute.
//
// Start at pack_strips, at the end. Vectors of four dwords come from the compiler, which translates
// them for each instruction set.

#pragma once

#include <type_traits>
#include <vector>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include "vector.h"

namespace {

// The tensors of Int8Linear or Int4Linear (quant/linear.py). int8 has one float scale for each
// output.
struct StoredLinear {
  const uint8_t* weight;       // (N, bytes)
  const float* output_scales;  // (N), int8
  const Half* scales;          // (N, groups), int4
  const uint8_t* zeros;        // (N, ceil(groups / 2)), int4
  int64_t N, bytes, groups, block;
};

// A cache line of each of 16 rows.
struct alignas(kLine) Square {
  uint32_t dwords[kStrip * kStrip];
};

typedef uint32_t Quad __attribute__((vector_size(16)));

inline Quad load_quad(const void* from) {
  Quad quad;
  std::memcpy(&quad, from, sizeof(quad));
  return quad;
}

// Stores past the caches, where the compiler offers it: a normal store would read the memory first
// and evict what is read soon.
inline void stream(uint8_t* to, Quad quad) {
#ifdef __SSE2__
  _mm_stream_si128(reinterpret_cast<__m128i*>(to), (__m128i)quad);
#else
  std::memcpy(to, &quad, sizeof(quad));
#endif
}
inline void wait_for_streams() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}
inline uint8_t* stream_copy(const void* from, int64_t bytes, uint8_t* to) {
  for (int64_t i = 0; i < bytes; i += sizeof(Quad))
    stream(to + i, load_quad(static_cast<const uint8_t*>(from) + i));
  return to + bytes;
}

inline void transpose(const Square& from, Square& to) {
  for (int64_t i = 0; i < kStrip; i++)
    for (int64_t j = 0; j < kStrip; j++) 
      to.dwords[i * kStrip + j] = from.dwords[j * kStrip + i];
}

// Copies `bytes` bytes, clamped to 0 to SIZE, and fills SIZE bytes up with `padding`.
template <int64_t SIZE>
inline void copy_padded(void* to, const void* from, int64_t bytes, uint8_t padding = 0) {
  if (bytes >= SIZE) {
    std::memcpy(to, from, SIZE);
    return;
  }
  std::memset(to, padding, SIZE);
  if (bytes > 0) std::memcpy(to, from, bytes);
}

// Returns the float scales, (16), of the outputs from n on. For kInt4 one is the power of two of
// which the output's largest block scale is 128 to 255 multiples, as in scale_units
// (quant/linear.py).
template <Format F>
void load_units(const StoredLinear& from, int64_t n, float* units) {
  const int64_t rows = std::min(kStrip, from.N - n);
  if constexpr (F == kInt8) std::copy_n(from.output_scales + n, rows, units);
  if constexpr (F == kInt4Half) std::fill_n(units, rows, 1.f);
  if constexpr (F != kInt4) return;
  Half largest[kStrip] = {};
  const Half* scales = from.scales + n * from.groups;
  for (int64_t i = 0; i < rows; i++, scales += from.groups) {
    int16_t bits = 0;  // orders as the positive halves do
    for (int64_t g = 0; g < from.groups; g++)
      bits = std::max(bits, static_cast<int16_t>(scales[g].bits));
    largest[i].bits = bits;
  }
  store(units, load(largest));
  for (int64_t i = 0; i < rows; i++) {
    int exponent;
    std::frexp(units[i], &exponent);
    units[i] = std::ldexp(1.f, std::max(exponent - 8, -24));
  }
}

// Loads 16 block scales of each of 16 outputs, from group g and output n on; beyond the last ones
// zeros.
inline void load_scales(const StoredLinear& from, int64_t n, int64_t g, Half* scales) {
  for (int64_t i = 0; i < kStrip; i++, scales += kStrip) {
    const int64_t row = n + i, groups = row < from.N ? from.groups - g : 0;
    copy_padded<kStrip * sizeof(Half)>(scales, from.scales + row * from.groups + g,
                                       groups * sizeof(Half));
  }
}

// Returns the zero points, two to a byte, of 16 groups for 16 outputs each.
inline void transpose_zeros(const StoredLinear& from, int64_t n, int64_t g, uint64_t (&zeros)[kStrip]) {
  const int64_t zero_bytes = (from.groups + 1) / 2;
  for (int64_t i = 0; i < kStrip; i++) {
    const int64_t row = n + i, bytes = row < from.N ? zero_bytes - g / 2 : 0;
    copy_padded<sizeof(uint64_t)>(&zeros[i], from.zeros + row * zero_bytes + g / 2, bytes);
  }
  uint64_t mask = 0xffffffff;
#pragma GCC unroll 4
  for (int64_t half = kStrip / 2; half; half /= 2, mask ^= mask << 4 * half)
#pragma GCC unroll 16
    for (int64_t i = 0; i < kStrip; i++) {
      if (i & half) continue;
      const uint64_t change = (zeros[i] >> 4 * half ^ zeros[i + half]) & mask;
      zeros[i] ^= change << 4 * half, zeros[i + half] ^= change;
    }
}

// Returns in `to` what headers store of the scales: multiples of the units (kInt4), or the bits of
// the scales (kInt4Half). Returns false if a multiple is no integer of 0 to 255.
template <Format F>
bool scale_integers(const Half* scales, const float* inverse_units, Square& to) {
  if constexpr (F == kInt4Half) {
    for (int64_t i = 0; i < kStrip * kStrip; i++) to.dwords[i] = scales[i].bits;
    return true;
  }
  float errors[kStrip * kStrip];
  for (int64_t i = 0; i < kStrip; i++) {
    const Floats multiples = load(scales + i * kStrip) * splat(inverse_units[i]);
    const Ints integers = round_to_ints(multiples);
    store_bits(to.dwords + i * kStrip, integers);
    store(errors + i * kStrip, to_floats(integers) - multiples);
  }
  uint32_t misfits = 0;
  for (int64_t i = 0; i < kStrip * kStrip; i++)
    misfits |= bits_of(errors[i]) | (to.dwords[i] & ~255u);
  return !misfits;
}

// Writes the headers of a strip, one after another. Returns false if a scale does not fit in a
// byte.
template <Format F>
bool pack_headers(const StoredLinear& from, int64_t n, const float* units, uint8_t* headers) {
  using Scale = std::conditional_t<F == kInt4, uint8_t, uint16_t>;
  float inverse_units[kStrip];
  for (int64_t i = 0; i < kStrip; i++) inverse_units[i] = units[i] ? 1 / units[i] : 0;
  int64_t b = 0;
  for (int64_t first = 0; first < from.groups; first += kStrip) {
    Half stored[kStrip * kStrip];
    Square rows, groups;
    load_scales(from, n, first, stored);
    if (!scale_integers<F>(stored, inverse_units, rows)) return false;
    transpose(rows, groups);
    Scale scales[kStrip * kStrip];
    for (int64_t i = 0; i < kStrip * kStrip; i++) scales[i] = groups.dwords[i];
    uint64_t zeros[kStrip];
    transpose_zeros(from, n, first, zeros);
    for (int64_t i = 0; i < std::min(kStrip, from.groups - first); i++) {
      std::memcpy(headers + b * kStrip * sizeof(Scale), scales + i * kStrip, kStrip * sizeof(Scale));
      std::memcpy(headers + zeros_offset<F>(from.block, b), zeros + i, kStrip / 2);
      if (++b == kSpan / from.block) b = 0, headers += header_bytes<F>(from.block);
    }
  }
  return true;
}

// Returns int8 weights plus 128, or nibbles 0 to 7 of each dword of int4 weights as 0 4 1 5 2 6 3 7:
// low nibbles then belong to the first tile, high nibbles to the second one.
template <Format F>
inline NativeInt reorder(NativeInt weights) {
  if constexpr (F == kInt8) return weights ^ native_splat(static_cast<int32_t>(0x80808080));
  NativeInt change = (weights ^ weights >> 8) & native_splat(0x0000ff00);
  weights ^= change | change << 8;  // 0 1 4 5 2 3 6 7
  change = (weights ^ weights >> 4) & native_splat(0x00f000f0);
  return weights ^ (change | change << 4);
}

// Packs a cache line of each of 16 outputs, from byte `at` on. It prefetches the same lines of the
// next strip: rows are too short for the CPU's prefetcher, and without this packing takes 1.6 times
// as long. Returns the byte after the tiles.
template <Format F>
uint8_t* pack_tiles(const StoredLinear& from, int64_t n, int64_t at, uint8_t* to) {
  Square lines, tiles;
  const uint8_t* line = from.weight + n * from.bytes + at;
  for (int64_t i = 0; i < kStrip; i++, line += from.bytes) {
    __builtin_prefetch(line + kStrip * from.bytes, 0, 2);
    const int64_t bytes = n + i < from.N ? from.bytes - at : 0;
    uint8_t padded[kLine];
    if (bytes < kLine) copy_padded<kLine>(padded, line, bytes, F == kInt8 ? 0x80 : 0);  // becomes 0
    const Ints weights = load_bits(bytes < kLine ? padded : line);
    store_bits(lines.dwords + i * kStrip, each<Ints>(reorder<F>, weights));
  }
  transpose(lines, tiles);
  return stream_copy(&tiles, sizeof(tiles), to);
}

// Writes all strips. Returns false if the scales do not fit this format; what was written then has
// no meaning. to: the beginning of a cache line.
template <Format F>
bool pack_strips(const StoredLinear& from, uint8_t* to) {
  const int64_t row = kSpan * bits(F) / 8, spans = spans_of_row<F>(from.bytes);
  const int64_t header = header_bytes<F>(from.block);
  std::vector<uint8_t> headers(spans * header);
  for (int64_t n = 0; n < from.N; n += kStrip) {
    float units[kStrip] = {};
    load_units<F>(from, n, units);
    if (F != kInt8 && !pack_headers<F>(from, n, units, headers.data())) return false;
    to = stream_copy(units, sizeof(units), to);
    for (int64_t s = 0; s < spans; s++) {
      to = stream_copy(headers.data() + s * header, header, to);
      for (int64_t at = s * row; at < (s + 1) * row; at += kLine)
        to = pack_tiles<F>(from, n, at, to);
    }
  }
  wait_for_streams();
  return true;
}

}  // namespace
