// Vectors of AVX2, FMA and F16C, of 256 bits; with AVX-VNNI pairs are multiplied and added by one
// instruction. Included by vector.h, which describes the functions.

#pragma once

#include <immintrin.h>

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
inline float to_float(Half a) { return _cvtsh_ss(a.bits); }

inline void native_store(Half* to, NativeFloat v) {
  const auto halves = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), halves);
}
// Adds 0x7fff, and one more if the lowest bit that stays is set, and cuts 16 bits off. NaN would
// overflow, and becomes 0x7fff.
inline void native_store(BFloat16* to, NativeFloat v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
  __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fff), is_nan);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(packed));
}

inline NativeFloat native_max(NativeFloat a, NativeFloat b) { return _mm256_max_ps(a, b); }
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

inline __m128 add_halves(__m256 v) {
  return _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
}
inline void native_reduce_add_four(const NativeFloat (&v)[4], float* to) {
  const __m128 a = add_halves(v[0]), b = add_halves(v[1]);
  const __m128 c = add_halves(v[2]), d = add_halves(v[3]);
  // a0 + a2, a1 + a3, b0 + b2, b1 + b3, and the same of c and d.
  const __m128 ab = _mm_add_ps(_mm_movelh_ps(a, b), _mm_movehl_ps(b, a));
  const __m128 cd = _mm_add_ps(_mm_movelh_ps(c, d), _mm_movehl_ps(d, c));
  _mm_storeu_ps(to, _mm_add_ps(_mm_shuffle_ps(ab, cd, 0x88), _mm_shuffle_ps(ab, cd, 0xdd)));
}

template <int BITS>
inline NativeInt native_shift_right_16(NativeInt a) {
  return (NativeInt)_mm256_srli_epi16((__m256i)a, BITS);
}
inline NativeInt native_add_pair_products(NativeInt sums, NativeInt a, NativeInt b) {
#ifdef __AVXVNNI__
  return (NativeInt)_mm256_dpwssd_avx_epi32((__m256i)sums, (__m256i)a, (__m256i)b);
#else
  return sums + (NativeInt)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#endif
}
// Keeps GCC from computing all products of a loop before their sums, for which it lacks registers:
// without it prefill takes 1.4 times as long.
// As a NativeInt, GCC 12 copies each sum: 59 instructions of four rows' int8 loop, not 53.
inline void native_keep(NativeInt& sums) {
  asm volatile("" : "+x"(reinterpret_cast<__m256i&>(sums)));
}

}  // namespace
