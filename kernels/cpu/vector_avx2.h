// Vectors of AVX2, FMA and F16C, of 256 bits; with AVX-VNNI one instruction adds products of four
// bytes. Included by vector.h, which describes the functions.

#pragma once

#include "vector_x86.h"

namespace {

constexpr int kLanes = 8;
using NativeFloat = float __attribute__((vector_size(32)));
using NativeInt = int32_t __attribute__((vector_size(32)));

inline NativeFloat native_splat(float value) { return _mm256_set1_ps(value); }
inline NativeInt native_splat(int32_t value) { return (NativeInt)_mm256_set1_epi32(value); }

inline __m128i load_eight_halves(const void* from) {
  return _mm_loadu_si128(static_cast<const __m128i*>(from));
}
inline NativeFloat native_load(const BFloat16* from) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_eight_halves(from)), 16));
}
inline NativeFloat native_load(const Half* from) {
  return _mm256_cvtph_ps(load_eight_halves(from));
}
inline NativeFloat native_load(const int8_t* from) {
  const auto bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
}
inline NativeInt native_load_bytes(const uint8_t* from) {
  const auto bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  return (NativeInt)_mm256_cvtepu8_epi32(bytes);
}
inline NativeFloat native_load(const uint8_t* from) {
  return _mm256_cvtepi32_ps((__m256i)native_load_bytes(from));
}

inline NativeInt native_load_nibbles(const uint8_t* from, int64_t at) {
  int32_t eight;
  std::memcpy(&eight, from + at / 2, sizeof(eight));
  const __m256i shifts = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
  const __m256i shifted = _mm256_srlv_epi32(_mm256_set1_epi32(eight), shifts);
  return (NativeInt)_mm256_and_si256(shifted, _mm256_set1_epi32(15));
}

inline void native_store(Half* to, NativeFloat v) {
  const auto halves = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), halves);
}
// Rounds to nearest, ties to even: adds 0x7fff, and one more if the lowest bit that stays is set,
// and cuts 16 bits off. A NaN might overflow; it becomes 0x7fc0, PyTorch's NaN.
inline void native_store(BFloat16* to, NativeFloat v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
  __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), is_nan);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(packed));
}

inline NativeFloat native_max(NativeFloat a, NativeFloat b) { return _mm256_max_ps(a, b); }
inline NativeInt native_max(NativeInt a, NativeInt b) {
  return (NativeInt)_mm256_max_epi32((__m256i)a, (__m256i)b);
}
inline NativeFloat native_fma(NativeFloat a, NativeFloat b, NativeFloat c) {
  return _mm256_fmadd_ps(a, b, c);
}
inline NativeFloat native_fnma(NativeFloat a, NativeFloat b, NativeFloat c) {
  return _mm256_fnmadd_ps(a, b, c);
}
inline NativeFloat native_to_float(NativeInt a) { return _mm256_cvtepi32_ps((__m256i)a); }
inline NativeInt native_round(NativeFloat a) { return (NativeInt)_mm256_cvtps_epi32(a); }
inline NativeFloat native_keep_above(NativeFloat a, NativeFloat limit, NativeFloat value) {
  return _mm256_and_ps(_mm256_cmp_ps(a, limit, _CMP_GT_OQ), value);
}

inline void native_reduce_add_four(const NativeFloat (&v)[4], float* to) {
  reduce_add_four(fold_to_four(v[0]), fold_to_four(v[1]), fold_to_four(v[2]), fold_to_four(v[3]),
                  to);
}

template <int BITS>
inline NativeInt native_shift_right_16(NativeInt a) {
  return (NativeInt)_mm256_srli_epi16((__m256i)a, BITS);
}
inline NativeInt native_add_pair_products(NativeInt sums, NativeInt a, NativeInt b) {
  return sums + (NativeInt)_mm256_madd_epi16((__m256i)a, (__m256i)b);
}
#ifdef __AVXVNNI__
#define GPT_FLEX_BYTE_PRODUCTS
constexpr bool kSignedWeights = false;
inline NativeInt native_add_byte_products(NativeInt sums, NativeInt weights, NativeInt inputs) {
  return (NativeInt)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)weights, (__m256i)inputs);
}
#else
#define GPT_FLEX_SHORT_SUMS
inline NativeInt native_short_products(NativeInt weights, NativeInt inputs) {
  return (NativeInt)_mm256_maddubs_epi16((__m256i)weights, (__m256i)inputs);
}
inline NativeInt native_add_shorts(NativeInt a, NativeInt b) {
  return (NativeInt)_mm256_add_epi16((__m256i)a, (__m256i)b);
}
#endif

// Empty assembly that seems to change `sums`. It keeps GCC from computing all products of a loop
// before their sums, for which there are too few registers: without it prefill takes 1.4 times as
// long. The cast: of a NativeInt GCC 12 copies each sum, which makes 59 instructions of the int8
// loop of four rows, not 53.
inline void native_keep(NativeInt& sums) {
  asm volatile("" : "+x"(reinterpret_cast<__m256i&>(sums)));
}

}  // namespace
