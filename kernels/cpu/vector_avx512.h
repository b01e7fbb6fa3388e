// Vectors of AVX-512 (F, BW, VL, DQ), of 512 bits. Where the CPU has BF16, it rounds to
// bfloat16, and denormals to zero. Included by vector.h, which describes the functions.

#pragma once

#include <immintrin.h>

namespace {

constexpr int kLanes = 16;
using NativeFloat = float __attribute__((vector_size(64)));
// Not __m512i, whose numbers have 64 bits: GCC 12 then copies each sum before an addition.
using NativeInt = int32_t __attribute__((vector_size(64)));

inline NativeFloat native_splat(float value) { return _mm512_set1_ps(value); }
inline NativeInt native_splat(int32_t value) {
  return (NativeInt)_mm512_set1_epi32(value);
}

inline __m256i load_sixteen_halves(const void* from) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}
inline NativeFloat native_load(const BFloat16* from) {
  const __m512i wide = _mm512_cvtepu16_epi32(load_sixteen_halves(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline NativeFloat native_load(const Half* from) {
  return _mm512_cvtph_ps(load_sixteen_halves(from));
}
inline NativeFloat native_load(const int8_t* from) {
  const auto bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
}
inline NativeInt native_load_bytes(const uint8_t* from) {
  return (NativeInt)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
inline NativeFloat native_load(const uint8_t* from) {
  return _mm512_cvtepi32_ps((__m512i)native_load_bytes(from));
}
inline float to_float(Half a) {
  return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(a.bits)));
}

inline void native_store(Half* to, NativeFloat v) {
  const auto halves = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), halves);
}
inline void native_store(BFloat16* to, NativeFloat v) {
#ifdef __AVX512BF16__
  const auto rounded = (__m256i)_mm512_cvtneps_pbh(v);
#else
  // See vector_avx2.h.
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
  const __m512i wide = _mm512_srli_epi32(_mm512_add_epi32(bits, bias), 16);
  const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  const __m256i rounded =
      _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(wide, is_nan, _mm512_set1_epi32(0x7fff)));
#endif
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), rounded);
}

inline NativeFloat native_max(NativeFloat a, NativeFloat b) { return _mm512_max_ps(a, b); }
inline NativeFloat native_fma(NativeFloat a, NativeFloat b, NativeFloat c) {
  return _mm512_fmadd_ps(a, b, c);
}
inline NativeFloat native_fnma(NativeFloat a, NativeFloat b, NativeFloat c) {
  return _mm512_fnmadd_ps(a, b, c);
}
inline NativeFloat native_to_float(NativeInt a) { return _mm512_cvtepi32_ps((__m512i)a); }
inline NativeInt native_round(NativeFloat a) { return (NativeInt)_mm512_cvtps_epi32(a); }
inline NativeFloat native_keep_above(NativeFloat a, NativeFloat limit, NativeFloat value) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, limit, _CMP_GT_OQ), value);
}

inline __m128 add_quarters(__m512 v) {
  const __m256 sum = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  return _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
}
inline void native_reduce_add_four(const NativeFloat (&v)[4], float* to) {
  const __m128 a = add_quarters(v[0]), b = add_quarters(v[1]);
  const __m128 c = add_quarters(v[2]), d = add_quarters(v[3]);
  // a0 + a2, a1 + a3, b0 + b2, b1 + b3, and the same of c and d.
  const __m128 ab = _mm_add_ps(_mm_movelh_ps(a, b), _mm_movehl_ps(b, a));
  const __m128 cd = _mm_add_ps(_mm_movelh_ps(c, d), _mm_movehl_ps(d, c));
  _mm_storeu_ps(to, _mm_add_ps(_mm_shuffle_ps(ab, cd, 0x88), _mm_shuffle_ps(ab, cd, 0xdd)));
}

template <int BITS>
inline NativeInt native_shift_right_16(NativeInt a) {
  return (NativeInt)_mm512_srli_epi16((__m512i)a, BITS);
}
inline NativeInt native_add_pair_products(NativeInt sums, NativeInt a, NativeInt b) {
  return sums + (NativeInt)_mm512_madd_epi16((__m512i)a, (__m512i)b);
}
// See vector_avx2.h.
inline void native_keep(NativeInt& sums) { asm volatile("" : "+v"(sums)); }

}  // namespace
