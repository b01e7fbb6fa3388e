// Vectors of sixteen numbers, for every instruction set: one register of AVX-512, two of AVX2, four
// of NEON, or sixteen plain numbers. The kernels are written once, in terms of these.
//
// Lanes are independent, fma and fnma round once, and the compiler fuses nothing else, so every
// instruction set gives the same bits. Exceptions: the bits of a NaN, and whether max returns one
// of its first argument; AVX-512 BF16 rounds denormals to bfloat16 as 0; the plain form computes
// fma in double and rounds twice, which changes about one result in 2^29. vector_*.h define the
// functions for one register; this file extends them to sixteen numbers. GPT_FLEX_SCALAR, a macro,
// selects the plain form, which is the reference of the others in tests/test_instruction_sets.py.
//
// NativeFloat and NativeInt are registers of kLanes numbers of 32 bits. A NativeInt may also hold
// pairs of 16-bit integers, or four bytes, in place of each number. A function native_NAME does for
// one register what NAME below does for sixteen numbers; besides there are:
//   native_load_bytes         loads kLanes bytes and widens each to 32 bits
//   native_load_bits          loads 4 * kLanes bytes as they lie
//   native_load_nibbles       loads kLanes numbers of 4 bits, from number `at` on (a multiple of
//                             kLanes), and widens each to 32 bits. Of a byte's two numbers the low
//                             one is the first
//   native_shift_right_16     shifts each half of 16 bits and fills it up with zeros
//   native_add_pair_products  adds to each sum a0 * b0 + a1 * b1 of the pairs a and b in its lane
//   native_add_byte_products  adds to each sum the products of the four bytes in its lane; exists
//                             where GPT_FLEX_BYTE_PRODUCTS is defined. Inputs are signed, and
//                             weights are signed if kSignedWeights is true
//   native_short_products     multiplies unsigned bytes of weights by signed bytes of inputs, and
//                             adds each two neighbouring products to a sum of 16 bits, which must
//                             not overflow. Exists, as native_add_shorts does, where
//                             GPT_FLEX_SHORT_SUMS is defined
//   native_add_shorts         adds integers of 16 bits
//   native_reduce_add_four    writes the sums of the lanes of four registers
//   native_keep               makes the compiler finish a sum before it computes more products

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "layout.h"

namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
inline float to_float(float a) { return a; }
inline float to_float(BFloat16 a) { return float_of(static_cast<uint32_t>(a.bits) << 16); }

}  // namespace

#if defined(GPT_FLEX_SCALAR)
#include "vector_scalar.h"
#elif defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && \
    defined(__AVX512DQ__)
#include "vector_avx512.h"
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "vector_avx2.h"
#elif defined(__ARM_NEON) && defined(__aarch64__)
#include "vector_neon.h"
#else
#include "vector_scalar.h"
#endif

namespace {

// GCC and Clang compile + - * and & of registers for every instruction set.

// Returns the bytes at `from` as a register.
template <class Register>
inline Register register_at(const void* from) {
  Register result;
  std::memcpy(&result, from, sizeof(result));
  return result;
}
inline NativeFloat native_load(const float* from) { return register_at<NativeFloat>(from); }
inline NativeInt native_load_bits(const uint8_t* from) { return register_at<NativeInt>(from); }
inline void native_store(float* to, NativeFloat v) { std::memcpy(to, &v, sizeof(v)); }
inline void native_store(int32_t* to, NativeInt v) { std::memcpy(to, &v, sizeof(v)); }

inline NativeFloat native_multiply(NativeFloat a, NativeFloat b) { return a * b; }
inline NativeInt native_and(NativeInt a, NativeInt b) { return a & b; }
inline NativeInt native_magnitude_bits(NativeFloat a) {
  return register_at<NativeInt>(&a) & native_splat(0x7fffffff);
}
// Adds to the exponent of each float, which begins at bit 23.
inline NativeFloat native_scale_by_power(NativeFloat a, NativeInt exponent) {
  const NativeInt bits = register_at<NativeInt>(&a) + (exponent << 23);
  return register_at<NativeFloat>(&bits);
}

constexpr int kParts = kStrip / kLanes;  // registers of sixteen numbers

struct Floats {
  NativeFloat part[kParts];
};
struct Ints {
  NativeInt part[kParts];
};

// Applies `op` to each register of the arguments.
template <class Result, class Op, class... Vectors>
inline Result each(Op op, const Vectors&... vectors) {
  Result result;
#pragma GCC unroll 16
  for (int p = 0; p < kParts; p++) result.part[p] = op(vectors.part[p]...);
  return result;
}

inline Floats splat(float value) {
  Floats result;
  for (auto& part : result.part) part = native_splat(value);
  return result;
}
inline Ints splat(int32_t value) {
  Ints result;
  for (auto& part : result.part) part = native_splat(value);
  return result;
}

// Loads sixteen numbers as floats. T: float, BFloat16, Half, int8_t or uint8_t.
template <class T>
inline Floats load(const T* from) {
  Floats result;
#pragma GCC unroll 16
  for (int p = 0; p < kParts; p++) result.part[p] = native_load(from + p * kLanes);
  return result;
}

// Loads sixteen bytes of two 4-bit numbers each: the low halves and the high halves.
inline void load_nibbles(const uint8_t* from, Floats& low, Floats& high) {
#pragma GCC unroll 16
  for (int p = 0; p < kParts; p++) {
    const NativeInt bytes = native_load_bytes(from + p * kLanes);
    low.part[p] = native_to_float(bytes & native_splat(15));
    high.part[p] = native_to_float(native_shift_right_16<4>(bytes));
  }
}

// Loads sixteen 4-bit numbers, two to a byte; the low one is the first.
inline Floats load_sixteen_nibbles(const uint8_t* from) {
  Floats result;
#pragma GCC unroll 16
  for (int p = 0; p < kParts; p++)
    result.part[p] = native_to_float(native_load_nibbles(from, p * kLanes));
  return result;
}

// Stores sixteen floats; rounds to nearest, ties to even. T: float, BFloat16 or Half.
template <class T>
inline void store(T* to, const Floats& values) {
#pragma GCC unroll 16
  for (int p = 0; p < kParts; p++) native_store(to + p * kLanes, values.part[p]);
}
inline void store(int32_t* to, const Ints& values) {
#pragma GCC unroll 16
  for (int p = 0; p < kParts; p++) native_store(to + p * kLanes, values.part[p]);
}

// Loads up to sixteen numbers; the others are 0.
template <class T>
inline Floats load_some(const T* from, int64_t count) {
  if (count >= kStrip) return load(from);
  T numbers[kStrip] = {};
  std::copy_n(from, count, numbers);
  return load(numbers);
}

// Stores the first `count` of sixteen numbers, or all.
template <class T>
inline void store_some(T* to, int64_t count, const Floats& values) {
  if (count >= kStrip) return store(to, values);
  T numbers[kStrip];
  store(numbers, values);
  std::copy_n(numbers, count, to);
}

// Rounds one number to T, as store does.
template <class T>
inline T to_type(float value) {
  T lanes[kLanes];
  native_store(lanes, native_splat(value));
  return lanes[0];
}

// The inputs are called a, b, c in the order of the formulas.
inline Floats operator+(Floats a, Floats b) {
  return each<Floats>([](auto x, auto y) { return x + y; }, a, b);
}
inline Ints operator+(Ints a, Ints b) {
  return each<Ints>([](auto x, auto y) { return x + y; }, a, b);
}
inline Floats operator-(Floats a, Floats b) {
  return each<Floats>([](auto x, auto y) { return x - y; }, a, b);
}
inline Floats operator*(Floats a, Floats b) {
  return each<Floats>([](auto x, auto y) { return x * y; }, a, b);
}
inline Floats operator/(Floats a, Floats b) {
  return each<Floats>([](auto x, auto y) { return x / y; }, a, b);
}
// If b is NaN, max and min return NaN.
inline Floats max(Floats a, Floats b) {
  return each<Floats>([](auto x, auto y) { return native_max(x, y); }, a, b);
}
inline Floats min(Floats a, Floats b) {
  return each<Floats>([](auto x, auto y) { return -native_max(-x, -y); }, a, b);
}
inline Ints max(Ints a, Ints b) {
  return each<Ints>([](auto x, auto y) { return native_max(x, y); }, a, b);
}
// Returns the bits of |a|. As integers they have the order of the sizes; NaN is above infinity.
inline Ints magnitude_bits(Floats a) {
  return each<Ints>([](auto x) { return native_magnitude_bits(x); }, a);
}
// Returns a * b + c, rounded once.
inline Floats fma(Floats a, Floats b, Floats c) {
  return each<Floats>([](auto x, auto y, auto z) { return native_fma(x, y, z); }, a, b, c);
}
// Returns c - a * b, rounded once.
inline Floats fnma(Floats a, Floats b, Floats c) {
  return each<Floats>([](auto x, auto y, auto z) { return native_fnma(x, y, z); }, a, b, c);
}
inline Floats to_floats(Ints a) {
  return each<Floats>([](auto x) { return native_to_float(x); }, a);
}
// Rounds to nearest, ties to even.
inline Ints round_to_ints(Floats a) {
  return each<Ints>([](auto x) { return native_round(x); }, a);
}
// Returns `value` where a > limit, elsewhere 0.
inline Floats keep_above(Floats a, Floats limit, Floats value) {
  return each<Floats>([](auto x, auto y, auto z) { return native_keep_above(x, y, z); }, a, limit,
                      value);
}
// Returns a * 2^exponent, for results that are no denormals.
inline Floats scale_by_power(Floats a, Ints exponent) {
  return each<Floats>([](auto x, auto y) { return native_scale_by_power(x, y); }, a, exponent);
}

// Combines `count` values, a power of two, to one: i and i + count / 2, then i and i + count / 4,
// and so on. Overwrites them.
template <class T, class Op>
inline T fold(T* values, int count, Op op) {
#pragma GCC unroll 4
  for (int half = count / 2; half; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; i++) values[i] = op(values[i], values[i + half]);
  return values[0];
}
// Combines the sixteen numbers in a fixed order: lanes i and i + 8, then i + 4, i + 2, i + 1.
inline float reduce_add(Floats values) {
  const auto add = [](auto a, auto b) { return a + b; };
  float lanes[kLanes];
  native_store(lanes, fold(values.part, kParts, add));
  return fold(lanes, kLanes, add);
}
// Returns the largest of the sixteen numbers.
template <class Number, class Vector>
inline Number reduce_max_to(Vector values) {
  Number lanes[kLanes];
  native_store(lanes, fold(values.part, kParts, [](auto a, auto b) { return native_max(a, b); }));
  return fold(lanes, kLanes, [](Number a, Number b) { return std::max(a, b); });
}
inline float reduce_max(const Floats& values) { return reduce_max_to<float>(values); }
inline int32_t reduce_max(const Ints& values) { return reduce_max_to<int32_t>(values); }
// Writes the sums of four vectors, with the same bits as by reduce_add, in fewer instructions.
inline void reduce_add_four(const Floats (&values)[4], float* to) {
  NativeFloat sums[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    Floats v = values[i];
    sums[i] = fold(v.part, kParts, [](auto a, auto b) { return a + b; });
  }
  native_reduce_add_four(sums, to);
}

// Bytes between a load and the place that is prefetched meanwhile. With 4096, memory is read 1.5
// times as fast as without prefetches (Xeon with AVX-512). With 2048 one of two threads sometimes
// ran a whole step without that gain; with 4096 none did.
constexpr int64_t kAhead = 4096;
constexpr int64_t kGrain = 1 << 16;  // multiplications for which one more thread pays

// Asks the CPU to load these bytes into its caches. It never faults, so `from` may lie beyond the
// end of a buffer.
inline void prefetch(const void* from, int64_t bytes = 1) {
  for (int64_t i = 0; i < bytes; i += kLine)
    __builtin_prefetch(static_cast<const uint8_t*>(from) + i);
}

}  // namespace
