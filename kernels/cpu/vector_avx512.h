// Vectors of AVX-512 (F, BW, VL, DQ), of 512 bits. If the CPU has AVX-512 BF16, its instruction
// rounds to bfloat16; it rounds denormals to zero. Included by vector.h, which describes the
// functions.

#pragma once

#include "vector_x86.h"

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

inline NativeInt native_load_nibbles(const uint8_t* from, int64_t at) {
  const __m128i sixteen = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + at / 2));
  // The first eight numbers to lanes 0 to 7, the others to lanes 8 to 15.
  const __m512i halves = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
  const __m512i copies = _mm512_permutexvar_epi32(halves, _mm512_castsi128_si512(sixteen));
  const __m512i shifts = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28,  //
                                           0, 4, 8, 12, 16, 20, 24, 28);
  const __m512i shifted = _mm512_srlv_epi32(copies, shifts);
  return (NativeInt)_mm512_and_si512(shifted, _mm512_set1_epi32(15));
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
      _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(wide, is_nan, _mm512_set1_epi32(0x7fc0)));
#endif
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), rounded);
}

inline NativeFloat native_max(NativeFloat a, NativeFloat b) { return _mm512_max_ps(a, b); }
inline NativeInt native_max(NativeInt a, NativeInt b) {
  return (NativeInt)_mm512_max_epi32((__m512i)a, (__m512i)b);
}
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

inline __m128 fold_to_four(__m512 v) {
  return fold_to_four(_mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)));
}
inline void native_reduce_add_four(const NativeFloat (&v)[4], float* to) {
  reduce_add_four(fold_to_four(v[0]), fold_to_four(v[1]), fold_to_four(v[2]), fold_to_four(v[3]),
                  to);
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
