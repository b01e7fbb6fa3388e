// AVX-512 on CPUs without it: each instruction that the kernels use becomes a function of SIMDe
// (Debian: libsimde-dev) or, where SIMDe 0.7 has none, one below. test_instruction_sets.py includes
// this file before the kernels; the macros of the instruction sets, which the compiler would
// define, are defined last, so that SIMDe does not use the instructions themselves.

#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

#include <cstdint>
#include <cstring>

// SIMDe 0.7.4 gives this alias the four parameters of the masked function.
#undef _mm512_madd_epi16
#define _mm512_madd_epi16(a, b) simde_mm512_madd_epi16(a, b)

// Returns element i of a register whose elements have type T.
template <class T, class Register>
inline T number_of(const Register& v, int i) {
  T number;
  std::memcpy(&number, reinterpret_cast<const char*>(&v) + i * sizeof(T), sizeof(T));
  return number;
}

// Returns the register of 16 numbers of type T that are f(0), f(1) and so on.
template <class Register, class T, class F>
inline Register sixteen(F f) {
  T numbers[16];
  for (int i = 0; i < 16; i++) numbers[i] = f(i);
  Register result;
  std::memcpy(&result, numbers, sizeof(result));
  return result;
}

inline simde__m512 emulated_cvtepi32_ps(simde__m512i a) {
  return sixteen<simde__m512, float>([&](int i) { return number_of<int32_t>(a, i); });
}
inline simde__m512i emulated_cvtps_epi32(simde__m512 a) {
  return sixteen<simde__m512i, int32_t>(
      [&](int i) { return _mm_cvtss_si32(_mm_set_ss(number_of<float>(a, i))); });
}
inline simde__m512i emulated_cvtepi8_epi32(__m128i a) {
  return sixteen<simde__m512i, int32_t>([&](int i) { return number_of<int8_t>(a, i); });
}
inline simde__m512i emulated_cvtepu8_epi32(__m128i a) {
  return sixteen<simde__m512i, int32_t>([&](int i) { return number_of<uint8_t>(a, i); });
}
inline simde__m512i emulated_cvtepu16_epi32(__m256i a) {
  return sixteen<simde__m512i, int32_t>([&](int i) { return number_of<uint16_t>(a, i); });
}
inline __m256i emulated_cvtepi32_epi16(simde__m512i a) {
  return sixteen<__m256i, int16_t>(
      [&](int i) { return static_cast<int16_t>(number_of<int32_t>(a, i)); });
}
inline simde__m512 emulated_cvtph_ps(__m256i a) {
  return sixteen<simde__m512, float>([&](int i) { return _cvtsh_ss(number_of<uint16_t>(a, i)); });
}
inline __m256i emulated_cvtps_ph(simde__m512 a, int) {
  return sixteen<__m256i, uint16_t>([&](int i) { return _cvtss_sh(number_of<float>(a, i), 0); });
}
inline __m256 emulated_extractf32x8_ps(simde__m512 a, int half) {
  __m256 result;
  std::memcpy(&result, reinterpret_cast<const char*>(&a) + half * sizeof(result), sizeof(result));
  return result;
}
#define _mm512_cvtepi32_ps emulated_cvtepi32_ps
#define _mm512_cvtps_epi32 emulated_cvtps_epi32
#define _mm512_cvtepi8_epi32 emulated_cvtepi8_epi32
#define _mm512_cvtepu8_epi32 emulated_cvtepu8_epi32
#define _mm512_cvtepu16_epi32 emulated_cvtepu16_epi32
#define _mm512_cvtepi32_epi16 emulated_cvtepi32_epi16
#define _mm512_cvtph_ps emulated_cvtph_ps
#define _mm512_cvtps_ph emulated_cvtps_ph
#define _mm512_extractf32x8_ps emulated_extractf32x8_ps

#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512VL__ 1
#define __AVX512DQ__ 1
#ifdef EMULATED_VNNI
#define __AVX512VNNI__ 1
#endif
