// The factors of integer products: packed weights and fixed-point rows, as registers of 32-bit
// lanes. A lane of weights holds the weights of two or four inputs of one output. The row's numbers
// of these inputs fill one lane, which is copied to all lanes of another register. Start at
// Factors, which is Bytes where the CPU adds products of four bytes (AVX-VNNI, ARM's dot products),
// else Pairs, and at RowFactors, for a single row. All give the same integers.
//
// Four bytes of packed weights hold four inputs of an output in int8, and eight in int4: one tile
// in the low nibbles, the next tile in the high nibbles. A sum of 256 products is below 2^31: at
// most 256 * 255 * 32639 in int8, less in int4.

#pragma once

#include <type_traits>

#include "fixed_point.h"

namespace {

// Pairs of 16-bit numbers, as AVX2's vpmaddwd multiplies them. Of four bytes of weights, seen as
// two halves of 16 bits, the low bytes are inputs 0 and 2, the high bytes inputs 1 and 3: a mask or
// a shift turns bytes or nibbles into pairs, without moving any of them between lanes.
template <Format F>
struct Pairs {
  static constexpr int kPlanes = 1;            // of a row: 16-bit numbers; or 2, high and low bytes
  static constexpr int kInputs = 2;            // in a lane of a row
  static constexpr int kSteps = 16 / bits(F);  // registers that a register of packed weights gives
  static constexpr int64_t kExact = kSpan;     // the most inputs whose products a sum can hold

  // Returns the weights of a step, as unsigned integers. Step 0: inputs 0 and 2 of each lane. Step
  // 1: inputs 1 and 3. In int4, steps 2 and 3 are those of the second tile.
  static NativeInt weights(NativeInt v, int step) {
    if constexpr (F == kInt8)
      return step == 0 ? native_and(v, native_splat(0x00ff00ff)) : native_shift_right_16<8>(v);
    const NativeInt nibble = native_splat(0x000f000f);
    if (step == 0) return native_and(v, nibble);
    if (step == 1) return native_and(native_shift_right_16<8>(v), nibble);
    if (step == 2) return native_and(native_shift_right_16<4>(v), nibble);
    return native_shift_right_16<12>(v);
  }
  static NativeInt add_products(NativeInt sums, NativeInt weights, NativeInt inputs) {
    return native_add_pair_products(sums, weights, inputs);
  }
  static void keep(NativeInt& sums) { native_keep(sums); }
  // Returns the sums of the products of all planes. row_sum: of the row's numbers in the block.
  [[gnu::always_inline]] static Ints total(const Ints (&sums)[kPlanes], float /*row_sum*/) {
    return sums[0];
  }
};

#ifdef GPT_FLEX_BYTE_PRODUCTS
// Bytes: the high bytes (plane 0) and the low bytes (plane 1) of a row's numbers, which need sums
// of their own. The members are those of Pairs. int8 weights are stored plus 128, and add_block
// subtracts 128 times the sum of the inputs, as for a zero point. Where the CPU multiplies signed
// bytes, weights() takes 128 off each weight, so total() adds 128 times that sum.
template <Format F>
struct Bytes {
  static constexpr int kPlanes = 2, kInputs = 4, kSteps = 8 / bits(F);
  static constexpr int64_t kExact = kSpan;

  static NativeInt weights(NativeInt v, int step) {
    if constexpr (F == kInt8)
      return kSignedWeights ? v ^ native_splat(static_cast<int32_t>(0x80808080)) : v;
    return native_and(step == 0 ? v : native_shift_right_16<4>(v), native_splat(0x0f0f0f0f));
  }
  static NativeInt add_products(NativeInt sums, NativeInt weights, NativeInt inputs) {
    return native_add_byte_products(sums, weights, inputs);
  }
  static void keep(NativeInt&) {}  // one instruction multiplies and adds
  [[gnu::always_inline]] static Ints total(const Ints (&sums)[kPlanes], float row_sum) {
    const bool shifted = F == kInt8 && kSignedWeights;
    const Ints rest = splat(shifted ? 128 * static_cast<int32_t>(row_sum) : 0);
    return sums[1] + rest + each<Ints>([](auto high) { return high << 8; }, sums[0]);
  }
};
template <Format F>
using Factors = Bytes<F>;
#else
template <Format F>
using Factors = Pairs<F>;
#endif

// Multiplies the bytes of one row by 4-bit weights. A lane has two sums of 16 bits; each adds up
// the products of 16 of 32 inputs, at most 16 * 15 * 128. A register of packed weights gives two
// registers of bytes, where Pairs needs four. For several rows this gains nothing: they share the
// unpacking, and each needs two sums. The members mean the same as those of Pairs; the functions
// exist where GPT_FLEX_SHORT_SUMS is defined.
struct ShortSums {
  static constexpr int kPlanes = 2, kInputs = 4, kSteps = 2;
  static constexpr int64_t kExact = 32;

#ifdef GPT_FLEX_SHORT_SUMS
  static NativeInt weights(NativeInt v, int step) {
    return native_and(step == 0 ? v : native_shift_right_16<4>(v), native_splat(0x0f0f0f0f));
  }
  static NativeInt add_products(NativeInt sums, NativeInt weights, NativeInt inputs) {
    return native_add_shorts(sums, native_short_products(weights, inputs));
  }
  static void keep(NativeInt& sums) { native_keep(sums); }
  [[gnu::always_inline]] static Ints total(const Ints (&sums)[kPlanes], float /*row_sum*/) {
    return each<Ints>(
        [](auto high, auto low) {
          const NativeInt highs = native_add_pair_products(native_splat(0), high,
                                                           native_splat(0x01000100));  // times 256
          return native_add_pair_products(highs, low, native_splat(0x00010001));
        },
        sums[0], sums[1]);
  }
#endif
};

// The factors of a single row.
template <Format F>
using RowFactors = std::conditional_t<short_sums<F>(1), ShortSums, Factors<F>>;

}  // namespace
