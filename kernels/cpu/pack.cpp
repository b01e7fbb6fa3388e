#include <ATen/ATen.h>
#include <immintrin.h>
#include <torch/library.h>

#include <cmath>
#include <vector>

#include "avx512.h"

namespace {

using at::Tensor;

// What a checkpoint stores (quantized.py). int8 has one scale, a float, for an output.
struct Stored {
  const uint8_t* weight;   // (N, bytes)
  const float* of_output;  // (N), int8
  const at::Half* scales;  // (N, groups), int4
  const uint8_t* zeros;    // (N, ceil(groups / 2)), int4
  int64_t N, bytes, groups, block;
};

// A mask of the first n; of all or of none where n is beyond what a mask holds.
inline __mmask64 first(int64_t n) { return _bzhi_u64(~0ull, std::clamp<int64_t>(n, 0, 64)); }

// 16 rows of 16 dwords -> its columns: in blocks of 2, 4, 8 and 16 what is off the diagonal swaps.
inline void transpose(__m512i (&rows)[kStrip]) {
  const __m512i at = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#pragma GCC unroll 4
  for (int half = 1; half < kStrip; half *= 2) {
    const __mmask16 right = _mm512_test_epi32_mask(at, _mm512_set1_epi32(half));
    const __m512i step = _mm512_set1_epi32(kStrip - half);  // of an index, to the other register
    const __m512i upper = _mm512_mask_add_epi32(at, right, at, step);
    const __m512i lower = _mm512_add_epi32(upper, _mm512_set1_epi32(half));
#pragma GCC unroll 16
    for (int i = 0; i < kStrip; i++) {
      if (i & half) continue;
      const __m512i a = rows[i], b = rows[i + half];
      rows[i] = _mm512_permutex2var_epi32(a, upper, b);
      rows[i + half] = _mm512_permutex2var_epi32(a, lower, b);
    }
  }
}

// What an output's scales are multiples of. kInt4: the power of two of which the largest is 128 to
// 255, see scale_units (quantized.py).
template <Format F>
float output_scale(const Stored& from, int64_t n) {
  if constexpr (F == kInt8) return from.of_output[n];
  if constexpr (F == kInt4Half) return 1;
  const at::Half* scales = from.scales + n * from.groups;
  __m512 most = _mm512_setzero_ps();
  for (int64_t g = 0; g < from.groups; g += 16) {
    const __m256i some = _mm256_maskz_loadu_epi16(first(from.groups - g), scales + g);
    most = _mm512_max_ps(most, _mm512_cvtph_ps(some));
  }
  int exponent;
  std::frexp(_mm512_reduce_max_ps(most), &exponent);
  return std::ldexp(1.f, std::max(exponent - 8, -24));
}

// Scales, float16, as the integers that are stored; `unfit` gets those that are no byte's multiple.
template <Format F>
inline __m512i stored_scales(const at::Half* from, __mmask16 there, float unit, __mmask16& unfit) {
  const __m256i scales = _mm256_maskz_loadu_epi16(there, from);
  if constexpr (F == kInt4Half) return _mm512_cvtepu16_epi32(scales);
  const __m512 multiples =
      _mm512_maskz_div_ps(there, _mm512_cvtph_ps(scales), _mm512_set1_ps(unit));
  const __m512i bytes = _mm512_cvtps_epi32(multiples);
  unfit |= _mm512_cmp_ps_mask(_mm512_cvtepi32_ps(bytes), multiples, _CMP_NEQ_UQ);
  unfit |= _mm512_cmpgt_epu32_mask(bytes, _mm512_set1_epi32(255));
  return bytes;
}

// The headers of a strip, one after another, with 16 groups at a time. False: they fit no bytes.
template <Format F>
bool pack_headers(const Stored& from, int64_t n, const float* units, uint8_t* headers) {
  const int64_t in_span = kSpan / from.block, zero_bytes = (from.groups + 1) / 2;
  const __mmask16 rows = first(from.N - n);
  __mmask16 unfit = 0;
  for (int64_t g = 0; g < from.groups; g += 16) {
    __m512i scales[kStrip], zeros[kStrip];
    const __mmask16 groups = first(from.groups - g), pairs = first(zero_bytes - g / 2);
    const at::Half* scale = from.scales + n * from.groups + g;
    const uint8_t* zero = from.zeros + n * zero_bytes + g / 2;
#pragma GCC unroll 16
    for (int64_t i = 0; i < kStrip; i++, scale += from.groups, zero += zero_bytes) {
      const bool row = rows >> i & 1;
      const __m128i unpacked = unpack_pairs(_mm_maskz_loadu_epi8(row ? pairs : 0, zero));
      scales[i] = stored_scales<F>(scale, row ? groups : 0, units[i], unfit);
      zeros[i] = _mm512_maskz_cvtepu8_epi32(groups, unpacked);
    }
    transpose(scales), transpose(zeros);
    for (int64_t i = 0; i < std::min(kStrip, from.groups - g); i++) {
      const int64_t b = (g + i) % in_span;
      uint8_t* header = headers + (g + i) / in_span * header_bytes<F>(from.block);
      const __m512i pairs = _mm512_or_si512(zeros[i], _mm512_srli_epi64(zeros[i], 32 - 4));
      _mm_storel_epi64(reinterpret_cast<__m128i*>(header + zeros_at<F>(from.block, b)),
                       _mm512_cvtepi64_epi8(pairs));
      header += b * kStrip * scale_bytes(F);
      if constexpr (F == kInt4) _mm512_mask_cvtepi32_storeu_epi8(header, ~0, scales[i]);
      if constexpr (F == kInt4Half) _mm512_mask_cvtepi32_storeu_epi16(header, ~0, scales[i]);
    }
  }
  return !unfit;
}

// Around the caches, which are for what is read soon: memory that is written is not read before.
inline uint8_t* stream(const void* from, int64_t bytes, uint8_t* to) {
  for (int64_t i = 0; i < bytes; i += kLine)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i),
                        _mm512_loadu_si512(static_cast<const uint8_t*>(from) + i));
  return to + bytes;
}

// Nibbles 0 to 7 of each dword -> 0 4 1 5 2 6 3 7: the low ones of its bytes are of one tile now.
inline __m512i pair_tiles(__m512i v) {
  const __m512i bytes = _mm512_set4_epi32(0x0f0d0e0c, 0x0b090a08, 0x07050604, 0x03010200);
  v = _mm512_shuffle_epi8(v, bytes);  // 0 1 4 5 2 3 6 7
  const __m512i change = _mm512_and_si512(
      _mm512_xor_si512(v, _mm512_srli_epi16(v, 4)), _mm512_set1_epi16(0x00f0));
  return _mm512_xor_si512(v, _mm512_xor_si512(change, _mm512_slli_epi16(change, 4)));
}

// A line of each of 16 outputs, from byte `at` on, as 16 lines of tiles. The next strip's is asked
// for: rows are too short for the CPU to foresee it, which would make it 1.6 times as slow.
template <Format F>
uint8_t* pack_tiles(const Stored& from, int64_t n, int64_t at, uint8_t* to) {
  __m512i lines[kStrip];
  const __mmask64 bytes = first(from.bytes - at), rows = first(from.N - n);
  const uint8_t* line = from.weight + n * from.bytes + at;
#pragma GCC unroll 16
  for (int64_t i = 0; i < kStrip; i++, line += from.bytes) {
    _mm_prefetch(line + kStrip * from.bytes, _MM_HINT_T1);
    const __mmask64 there = rows >> i & 1 ? bytes : 0;
    const __m512i v = _mm512_maskz_loadu_epi8(there, line);
    lines[i] = F == kInt8 ? _mm512_maskz_add_epi8(there, v, _mm512_set1_epi8(-128)) : pair_tiles(v);
  }
  transpose(lines);
#pragma GCC unroll 16
  for (int64_t i = 0; i < kStrip; i++)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i * kLine), lines[i]);
  return to + kStrip * kLine;
}

// False: the scales do not fit this format, and what is in `room` is worth nothing.
template <Format F>
bool pack_strips(const Stored& from, const Tensor& room) {
  const int64_t row = kSpan * bits(F) / 8, spans = (from.bytes + row - 1) / row;
  const int64_t header = header_bytes<F>(from.block), strips = (from.N + kStrip - 1) / kStrip;
  const int64_t strip = kStrip * sizeof(float) + spans * span_bytes<F>(from.block);
  TORCH_CHECK(room.numel() >= strips * strip, room.numel(), " bytes for ", strips * strip);
  auto* to = room.mutable_data_ptr<uint8_t>();
  TORCH_CHECK(reinterpret_cast<uintptr_t>(to) % kLine == 0, "room that begins within a line");
  std::vector<uint8_t> headers(spans * header);
  for (int64_t n = 0; n < from.N; n += kStrip) {
    float units[kStrip] = {};
    for (int64_t i = 0; i < std::min(kStrip, from.N - n); i++)
      units[i] = output_scale<F>(from, n + i);
    if (F != kInt8 && !pack_headers<F>(from, n, units, headers.data())) return false;
    to = stream(units, sizeof(units), to);
    for (int64_t s = 0; s < spans; s++) {
      to = stream(headers.data() + s * header, header, to);
      for (int64_t at = s * row; at < (s + 1) * row; at += kLine)
        to = pack_tiles<F>(from, n, at, to);
    }
  }
  _mm_sfence();
  return true;
}

// Writes what quantized_linear takes as `packed` to the beginning of `room`, and says in what
// format: int4 scales take a byte each, or two where they are no multiples of one. The thread that
// calls does it alone, at the speed of memory, so that it may run beside the products of others.
int64_t pack(const Tensor& weight, const Tensor& scales, const std::optional<Tensor>& zeros,
             const Tensor& room) {
  const int64_t N = weight.size(0), bytes = weight.size(1), groups = scales.numel() / N;
  TORCH_CHECK(weight.is_contiguous() && scales.is_contiguous() && room.is_contiguous());
  Stored from{static_cast<const uint8_t*>(weight.const_data_ptr())};
  from.N = N, from.bytes = bytes, from.groups = groups, from.block = 2 * bytes / groups;
  if (!zeros) {
    from.of_output = scales.const_data_ptr<float>();
    return pack_strips<kInt8>(from, room), kInt8;
  }
  TORCH_CHECK(zeros->is_contiguous() && zeros->numel() == N * ((groups + 1) / 2));
  TORCH_CHECK(from.block % kChunk == 0 && kSpan % from.block == 0, "a block of ", from.block);
  from.scales = scales.const_data_ptr<at::Half>(), from.zeros = zeros->const_data_ptr<uint8_t>();
  if (pack_strips<kInt4>(from, room)) return kInt4;
  return pack_strips<kInt4Half>(from, room), kInt4Half;
}

}  // namespace

TORCH_LIBRARY_IMPL(gpt_flex, CPU, library) { library.impl("pack", pack); }
