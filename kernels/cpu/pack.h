// Writes a quantised linear's weights in the order of layout.h. The calling thread packs alone, at
// about the speed of memory, while other threads may compute.
//
// Start at pack_strips, at the end. The vectors of dwords (numbers of 32 bits) are an extension of
// GCC and Clang, which translate their operators for every instruction set.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
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
  int64_t N, bytes, groups, block;  // bytes: of an output; block: inputs of a group, or kInt8Block
};

using FourDwords = uint32_t __attribute__((vector_size(16)));
using EightDwords = uint32_t __attribute__((vector_size(32)));

// 16 rows of 16 dwords: a cache line of each of 16 outputs, or the scales of 16 groups of each.
struct alignas(kLine) Square {
  uint32_t dwords[kStrip * kStrip];
};

inline FourDwords load_four(const void* from) {
  FourDwords four;
  std::memcpy(&four, from, sizeof(four));
  return four;
}

// Stores past the caches where a CPU lets us ask for it: a normal store would read the memory first
// and evict what is read soon.
inline void stream(uint8_t* to, FourDwords four) {
#ifdef __SSE2__
  _mm_stream_si128(reinterpret_cast<__m128i*>(to), (__m128i)four);
#else
  std::memcpy(to, &four, sizeof(four));
#endif
}
// Orders this thread's stores by `stream` before its later stores, so that a thread that is told of
// the packed weights sees them.
inline void wait_for_streams() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}
// Copies `bytes` bytes, a multiple of 16, by `stream`; returns the byte after them in `to`.
inline uint8_t* stream_copy(const void* from, int64_t bytes, uint8_t* to) {
  for (int64_t i = 0; i < bytes; i += sizeof(FourDwords))
    stream(to + i, load_four(static_cast<const uint8_t*>(from) + i));
  return to + bytes;
}

// Writes SIZE bytes to `to`: the first ones from `from`, at most `bytes` (none if it is negative),
// then `padding`.
template <int64_t SIZE>
inline void copy_padded(void* to, const void* from, int64_t bytes, uint8_t padding = 0) {
  if (bytes >= SIZE) {
    std::memcpy(to, from, SIZE);
    return;
  }
  std::memset(to, padding, SIZE);
  if (bytes > 0) std::memcpy(to, from, bytes);
}

// Returns four of the dwords of a (numbered 0 to 3) and b (4 to 7): those with the numbers AT.
template <int... AT>
inline FourDwords shuffle(FourDwords a, FourDwords b) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, AT...);
#else
  return __builtin_shuffle(a, b, FourDwords{AT...});
#endif
}

// Transposes a square. Calls store(i, four) with each four dwords of the result, from dword i on.
template <class Store>
inline void transpose(const Square& from, Store store) {
  for (int64_t i = 0; i < kStrip; i += 4)
    for (int64_t j = 0; j < kStrip; j += 4) {
      const uint32_t* dwords = from.dwords + j * kStrip + i;
      const FourDwords a = load_four(dwords), b = load_four(dwords + kStrip);
      const FourDwords c = load_four(dwords + 2 * kStrip), d = load_four(dwords + 3 * kStrip);
      const FourDwords ab = shuffle<0, 4, 1, 5>(a, b), cd = shuffle<0, 4, 1, 5>(c, d);
      const FourDwords ab2 = shuffle<2, 6, 3, 7>(a, b), cd2 = shuffle<2, 6, 3, 7>(c, d);
      const int64_t at = i * kStrip + j;
      store(at, shuffle<0, 1, 4, 5>(ab, cd));
      store(at + kStrip, shuffle<2, 3, 6, 7>(ab, cd));
      store(at + 2 * kStrip, shuffle<0, 1, 4, 5>(ab2, cd2));
      store(at + 3 * kStrip, shuffle<2, 3, 6, 7>(ab2, cd2));
    }
}

// Transposes 16 rows of 16 nibbles. It divides the rows into blocks of 16 by 16, then 8, 4 and 2,
// and swaps the two off-diagonal quarters of each block.
inline void transpose_nibbles(uint64_t (&rows)[kStrip]) {
  uint64_t left = 0x00000000ffffffff;  // nibbles of the quarters that go to other rows
#pragma GCC unroll 4
  for (int64_t half = kStrip / 2; half; half /= 2, left ^= left << 4 * half)
#pragma GCC unroll 16
    for (int64_t i = 0; i < kStrip; i++) {
      if (i & half) continue;
      const uint64_t change = (rows[i] >> 4 * half ^ rows[i + half]) & left;
      rows[i] ^= change << 4 * half, rows[i + half] ^= change;
    }
}

// Writes the float scales, (16), of the outputs from n on. For kInt4, an output's scale is the
// power of two of which its largest block scale is 128 to 255 times, as in scale_units
// (quant/linear.py). For kInt4Half it is 1.
template <Format F>
void load_units(const StoredLinear& from, int64_t n, float* units) {
  const int64_t rows = std::min(kStrip, from.N - n);
  if constexpr (F == kInt8) std::copy_n(from.output_scales + n, rows, units);
  if constexpr (F == kInt4Half) std::fill_n(units, rows, 1.f);
  if constexpr (F != kInt4) return;
  Half largest[kStrip] = {};
  const Half* scales = from.scales + n * from.groups;
  for (int64_t i = 0; i < rows; i++, scales += from.groups) {
    int16_t bits = 0;  // as integers, the bits of positive halves have the order of the numbers
    for (int64_t g = 0; g < from.groups; g++)
      bits = std::max(bits, static_cast<int16_t>(scales[g].bits));
    largest[i].bits = bits;
  }
  store(units, load(largest));
  for (int64_t i = 0; i < rows; i++) {
    // frexp and ldexp of scale_units by bit operations, since std::frexp and std::ldexp would take
    // a tenth of the time of packing. A float's exponent is stored plus 127; that of frexp is one
    // more.
    const int exponent = units[i] ? static_cast<int>(bits_of(units[i]) >> 23) - 126 : 0;
    units[i] = float_of((std::max(exponent - 8, -24) + 127) << 23);
  }
}

// Returns in `to` what a header stores of scales, (16, 16): multiples of the outputs' units
// (kInt4), or the bits of the scales (kInt4Half). Returns false if a multiple is no integer of 0 to
// 255.
template <Format F>
inline bool scale_integers(const Half* scales, const float* inverse_units, Square& to) {
  uint32_t misfits = 0;
  if constexpr (F == kInt4Half) {
    for (int64_t i = 0; i < kStrip * kStrip; i++) to.dwords[i] = scales[i].bits;
  } else {
    float errors[kStrip * kStrip];
    for (int64_t i = 0; i < kStrip * kStrip; i += kStrip) {
      const Floats multiples = load(scales + i) * splat(inverse_units[i / kStrip]);
      const Ints integers = round_to_ints(multiples);
      store(reinterpret_cast<int32_t*>(to.dwords + i), integers);
      store(errors + i, to_floats(integers) - multiples);
    }
    // An exact multiple has the error +0, all of whose bits are 0. A loop of its own: GCC makes
    // vectors of this long loop, and makes none of a loop over 16.
    for (int64_t i = 0; i < kStrip * kStrip; i++)
      misfits |= bits_of(errors[i]) | (to.dwords[i] & ~255u);
  }
  return !misfits;
}

template <Format F>
using StoredScale = std::conditional_t<F == kInt4, uint8_t, uint16_t>;

// Writes to `to`, (16 groups, 16 outputs), the scales of the outputs from n on in the groups from g
// on, as the header stores them; 0 for outputs and groups that do not exist. Returns false if a
// scale does not fit in a byte.
template <Format F>
bool read_scales(const StoredLinear& from, int64_t n, int64_t g, const float* inverse_units,
                 StoredScale<F>* to) {
  Half scales[kStrip * kStrip];
  for (int64_t i = 0; i < kStrip; i++) {
    const Half* stored = from.scales + (n + i) * from.groups + g;
    const int64_t groups = n + i < from.N ? from.groups - g : 0;
    copy_padded<kStrip * sizeof(Half)>(scales + i * kStrip, stored, groups * sizeof(Half));
  }
  Square by_output, by_group;
  if (!scale_integers<F>(scales, inverse_units, by_output)) return false;
  transpose(by_output, [&](int64_t i, FourDwords four) {
    std::memcpy(by_group.dwords + i, &four, sizeof(four));
  });
  std::copy_n(by_group.dwords, kStrip * kStrip, to);
  return true;
}

// Writes to `to`, (16 groups) of 16 nibbles, the zero points of the outputs from n on in the groups
// from g on.
inline void read_zeros(const StoredLinear& from, int64_t n, int64_t g, uint64_t (&to)[kStrip]) {
  const int64_t row_bytes = (from.groups + 1) / 2;
  for (int64_t i = 0; i < kStrip; i++) {
    const int64_t bytes = n + i < from.N ? row_bytes - g / 2 : 0;
    copy_padded<sizeof(to[i])>(&to[i], from.zeros + (n + i) * row_bytes + g / 2, bytes);
  }
  transpose_nibbles(to);
}

// Writes the headers of a strip, one after another. Returns false if a scale does not fit in a
// byte.
template <Format F>
bool pack_headers(const StoredLinear& from, int64_t n, const float* units, uint8_t* headers) {
  const int64_t span_blocks = blocks_of(kSpan, from.block);
  const int64_t zeros_at = zeros_offset<F>(from.block, 0), bytes = header_bytes<F>(from.block);
  float inverse_units[kStrip];
  for (int64_t i = 0; i < kStrip; i++) inverse_units[i] = units[i] ? 1 / units[i] : 0;
  for (int64_t g = 0; g < from.groups; g += kStrip) {
    StoredScale<F> scales[kStrip * kStrip];
    uint64_t zeros[kStrip];
    if (!read_scales<F>(from, n, g, inverse_units, scales)) return false;
    read_zeros(from, n, g, zeros);
    const int64_t groups = std::min(kStrip, from.groups - g);
    for (int64_t i = 0; i < groups; i += span_blocks, headers += bytes) {
      const int64_t blocks = std::min(span_blocks, groups - i);
      std::memcpy(headers, scales + i * kStrip, blocks * kStrip * scale_bytes(F));
      std::memcpy(headers + zeros_at, zeros + i, blocks * kStrip / 2);
    }
  }
  return true;
}

// Copies a cache line. Adds 128 to int8 weights. Reorders nibbles 0 to 7 of each dword of int4
// weights as 0 4 1 5 2 6 3 7: low nibbles then belong to the first tile, high nibbles to the second
// one.
template <Format F>
inline void reorder(const uint8_t* from, uint32_t* to) {
  for (int64_t i = 0; i < kLine; i += sizeof(EightDwords), to += 8) {
    EightDwords v;
    std::memcpy(&v, from + i, sizeof(v));
    if constexpr (F == kInt8) {
      v ^= 0x80808080;
    } else {
      EightDwords change = (v ^ v >> 8) & 0x0000ff00;
      v ^= change | change << 8;  // 0 1 4 5 2 3 6 7
      change = (v ^ v >> 4) & 0x00f000f0;
      v ^= change | change << 4;
    }
    std::memcpy(to, &v, sizeof(v));
  }
}

// Packs a cache line, from byte `at` on, of each of the 16 outputs from n on. It prefetches the
// same lines of the next strip: an output's weights are too short for the CPU's own prefetcher, and
// without this packing takes up to 1.6 times as long (Xeon; int4 on Zen 3: 1.2 times). Returns the
// byte after the tiles.
template <Format F>
uint8_t* pack_tiles(const StoredLinear& from, int64_t n, int64_t at, uint8_t* to) {
  Square lines;
  const uint8_t* line = from.weight + n * from.bytes + at;
  for (int64_t i = 0; i < kStrip; i++, line += from.bytes) {
    __builtin_prefetch(line + kStrip * from.bytes, 0, 2);  // to the second cache
    const int64_t bytes = n + i < from.N ? from.bytes - at : 0;
    uint8_t padded[kLine];
    if (bytes < kLine)  // with what `reorder` makes 0
      copy_padded<kLine>(padded, line, bytes, F == kInt8 ? 0x80 : 0);
    reorder<F>(bytes < kLine ? padded : line, lines.dwords + i * kStrip);
  }
  transpose(lines, [to](int64_t i, FourDwords four) { stream(to + 4 * i, four); });
  return to + sizeof(lines);
}

// Writes all strips to `to`, the beginning of a cache line. Returns false if the scales do not fit
// this format; what was written then has no meaning.
template <Format F>
bool pack_strips(const StoredLinear& from, uint8_t* to) {
  const int64_t K = strip_inputs<F>(from.bytes, from.block), spans = spans_of(K);
  const int64_t row = K * bits(F) / 8, span = kSpan * bits(F) / 8;  // bytes of an output
  const int64_t header = header_bytes<F>(from.block);
  std::vector<uint8_t> headers(spans * header);
  for (int64_t n = 0; n < from.N; n += kStrip) {
    float units[kStrip] = {};
    load_units<F>(from, n, units);
    if (F != kInt8 && !pack_headers<F>(from, n, units, headers.data())) return false;
    to = stream_copy(units, sizeof(units), to);
    for (int64_t s = 0; s < spans; s++) {
      to = stream_copy(headers.data() + s * header, header, to);
      for (int64_t at = s * span; at < std::min(row, (s + 1) * span); at += kLine)
        to = pack_tiles<F>(from, n, at, to);
    }
  }
  wait_for_streams();
  return true;
}

}  // namespace
