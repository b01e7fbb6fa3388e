// Vectors of ARM's NEON (AArch64), of 128 bits. Included by vector.h, which describes the
// functions.

#pragma once

#include <arm_neon.h>

namespace {

constexpr int kLanes = 4;
using NativeFloat = float32x4_t;
using NativeInt = int32x4_t;

inline NativeFloat native_splat(float value) { return vdupq_n_f32(value); }
inline NativeInt native_splat(int32_t value) { return vdupq_n_s32(value); }

inline NativeFloat native_load(const BFloat16* from) {
  const uint16x4_t halves = vld1_u16(reinterpret_cast<const uint16_t*>(from));
  return vreinterpretq_f32_u32(vshll_n_u16(halves, 16));
}
inline NativeFloat native_load(const Half* from) {
  const uint16x4_t halves = vld1_u16(reinterpret_cast<const uint16_t*>(from));
  return vcvt_f32_f16(vreinterpret_f16_u16(halves));
}
inline NativeFloat native_load(const int8_t* from) {
  uint32_t four;
  std::memcpy(&four, from, sizeof(four));
  const int16x8_t wide = vmovl_s8(vcreate_s8(four));
  return vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
}
inline NativeInt native_load_bytes(const uint8_t* from) {
  uint32_t four;
  std::memcpy(&four, from, sizeof(four));
  const uint16x8_t wide = vmovl_u8(vcreate_u8(four));
  return vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(wide)));
}
inline NativeFloat native_load(const uint8_t* from) {
  return vcvtq_f32_s32(native_load_bytes(from));
}
inline NativeInt native_load_nibbles(const uint8_t* from, int64_t at) {
  uint16_t four;
  std::memcpy(&four, from + at / 2, sizeof(four));
  const int32_t by[4] = {0, -4, -8, -12};  // negative: to the right
  const uint32x4_t shifted = vshlq_u32(vdupq_n_u32(four), vld1q_s32(by));
  return vreinterpretq_s32_u32(vandq_u32(shifted, vdupq_n_u32(15)));
}
inline float to_float(Half a) {
  return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(a.bits))), 0);
}

inline void native_store(Half* to, NativeFloat v) {
  vst1_u16(reinterpret_cast<uint16_t*>(to), vreinterpret_u16_f16(vcvt_f16_f32(v)));
}
// See vector_avx2.h.
inline void native_store(BFloat16* to, NativeFloat v) {
  const uint32x4_t bits = vreinterpretq_u32_f32(v);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  const uint16x4_t halves = vshrn_n_u32(rounded, 16);
  const uint16x4_t is_number = vmovn_u32(vceqq_f32(v, v));
  vst1_u16(reinterpret_cast<uint16_t*>(to), vbsl_u16(is_number, halves, vdup_n_u16(0x7fc0)));
}

inline NativeFloat native_max(NativeFloat a, NativeFloat b) { return vmaxq_f32(a, b); }
inline NativeInt native_max(NativeInt a, NativeInt b) { return vmaxq_s32(a, b); }
inline NativeFloat native_fma(NativeFloat a, NativeFloat b, NativeFloat c) {
  return vfmaq_f32(c, a, b);
}
inline NativeFloat native_fnma(NativeFloat a, NativeFloat b, NativeFloat c) {
  return vfmsq_f32(c, a, b);
}
inline NativeFloat native_to_float(NativeInt a) { return vcvtq_f32_s32(a); }
inline NativeInt native_round(NativeFloat a) { return vcvtnq_s32_f32(a); }
inline NativeFloat native_keep_above(NativeFloat a, NativeFloat limit, NativeFloat value) {
  return vreinterpretq_f32_u32(vandq_u32(vcgtq_f32(a, limit), vreinterpretq_u32_f32(value)));
}

// Returns a0 + a2, a1 + a3, b0 + b2, b1 + b3.
inline NativeFloat add_halves(NativeFloat a, NativeFloat b) {
  const float64x2_t x = vreinterpretq_f64_f32(a), y = vreinterpretq_f64_f32(b);
  return vaddq_f32(vreinterpretq_f32_f64(vzip1q_f64(x, y)),
                   vreinterpretq_f32_f64(vzip2q_f64(x, y)));
}
inline void native_reduce_add_four(const NativeFloat (&v)[4], float* to) {
  vst1q_f32(to, vpaddq_f32(add_halves(v[0], v[1]), add_halves(v[2], v[3])));
}

template <int BITS>
inline NativeInt native_shift_right_16(NativeInt a) {
  return vreinterpretq_s32_u16(vshrq_n_u16(vreinterpretq_u16_s32(a), BITS));
}
inline NativeInt native_add_pair_products(NativeInt sums, NativeInt a, NativeInt b) {
  const int16x8_t x = vreinterpretq_s16_s32(a), y = vreinterpretq_s16_s32(b);
  const int32x4_t low = vmull_s16(vget_low_s16(x), vget_low_s16(y));
  return vaddq_s32(sums, vpaddq_s32(low, vmull_high_s16(x, y)));
}
#ifdef __ARM_FEATURE_DOTPROD
#define GPT_FLEX_BYTE_PRODUCTS
constexpr bool kSignedWeights = true;
inline NativeInt native_add_byte_products(NativeInt sums, NativeInt weights, NativeInt inputs) {
  return vdotq_s32(sums, vreinterpretq_s8_s32(weights), vreinterpretq_s8_s32(inputs));
}
#endif

// See vector_avx2.h.
inline void native_keep(NativeInt& sums) { asm volatile("" : "+w"(sums)); }

}  // namespace
