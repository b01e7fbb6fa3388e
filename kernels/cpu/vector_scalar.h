// Vectors of one number, in plain C++17: the reference of the other instruction sets, and the form
// of CPUs that have none of them. Included by vector.h, which describes the functions.

#pragma once

namespace {

constexpr int kLanes = 1;
using NativeFloat = float;
using NativeInt = int32_t;

inline NativeFloat native_splat(float value) { return value; }
inline NativeInt native_splat(int32_t value) { return value; }

inline NativeFloat native_load(const BFloat16* from) { return to_float(*from); }
inline NativeFloat native_load(const int8_t* from) { return *from; }
inline NativeInt native_load_bytes(const uint8_t* from) { return *from; }
inline NativeFloat native_load(const uint8_t* from) { return *from; }
inline NativeInt native_load_nibbles(const uint8_t* from, int64_t at) {
  return from[at / 2] >> at % 2 * 4 & 15;
}
// Half: a sign bit, 5 bits of exponent and 10 of fraction; float: 1, 8 and 23.
inline float to_float(Half a) {
  const uint32_t sign = (a.bits & 0x8000u) << 16, rest = a.bits & 0x7fffu;
  // The exponent is stored plus 15 in a half and plus 127 in a float: moved to the place of a
  // float's bits, a half is too small by 2^112. Infinity and NaN need the largest exponent.
  const float value = float_of(rest << 13) * 0x1p112f;
  return float_of(sign | (rest < 0x7c00u ? bits_of(value) : 0x7f800000u | rest << 13));
}
inline NativeFloat native_load(const Half* from) { return to_float(*from); }

inline void native_store(BFloat16* to, NativeFloat v) {
  const uint32_t bits = bits_of(v);
  to->bits = std::isnan(v) ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline void native_store(Half* to, NativeFloat v) {
  const uint32_t sign = bits_of(v) >> 16 & 0x8000u;
  const float size = std::abs(v);
  uint32_t bits = 0x7c00u;                      // infinity
  if (std::isnan(v)) bits = 0x7e00u | (bits_of(v) >> 13 & 0x3ffu);
  else if (size < 0x1p-14f)                     // a denormal, which is a multiple of 2^-24
    bits = static_cast<uint32_t>(std::nearbyint(size * 0x1p24f));
  else if (size < 65520.f)                      // rounds to at most 65504, the largest half
    bits = (bits_of(size) - (112u << 23) + 0xfffu + (bits_of(size) >> 13 & 1)) >> 13;
  to->bits = sign | bits;
}

inline NativeFloat native_max(NativeFloat a, NativeFloat b) { return a > b ? a : b; }
inline NativeInt native_max(NativeInt a, NativeInt b) { return a > b ? a : b; }
// Where the CPU has no such instruction, std::fma is a slow function. A double holds the product
// exactly; its sum is rounded twice, which changes about one result in 2^29.
inline NativeFloat native_fma(NativeFloat a, NativeFloat b, NativeFloat c) {
  return static_cast<float>(static_cast<double>(a) * b + c);
}
inline NativeFloat native_fnma(NativeFloat a, NativeFloat b, NativeFloat c) {
  return native_fma(-a, b, c);
}
inline NativeFloat native_to_float(NativeInt a) { return static_cast<float>(a); }
inline NativeInt native_round(NativeFloat a) { return static_cast<int32_t>(std::nearbyint(a)); }
inline NativeFloat native_keep_above(NativeFloat a, NativeFloat limit, NativeFloat value) {
  return a > limit ? value : 0.f;
}

inline void native_reduce_add_four(const NativeFloat (&v)[4], float* to) {
  std::copy(v, v + 4, to);
}

template <int BITS>
inline NativeInt native_shift_right_16(NativeInt a) {
  constexpr uint32_t kKept = (0xffffu >> BITS) * 0x10001u;
  return static_cast<int32_t>(static_cast<uint32_t>(a) >> BITS & kKept);
}
inline NativeInt native_add_pair_products(NativeInt sums, NativeInt a, NativeInt b) {
  const auto low = [](int32_t v) { return static_cast<int32_t>(static_cast<int16_t>(v)); };
  return sums + low(a) * low(b) + (a >> 16) * (b >> 16);
}
inline void native_keep(NativeInt&) {}

}  // namespace
