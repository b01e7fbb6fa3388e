// Products of fixed-point rows by packed int8 or int4 weights, for one thread.
//
// Start at multiply. The rate at which memory is read bounds decoding, so the arithmetic must cost
// little beside a load. It must be exact, so that all CPUs give the same bits. fixed_point.h
// therefore converts activations to 16-bit integers, and products with weights add up in 32 bits
// without rounding: by strip_products.h, or on CPUs with AVX-512 VNNI by vnni.h (vpdpbusd) and
// amx_int8.h (tdpbsud, eight rows at a time). Weights are read from the first byte to the last, as
// layout.h orders them. A row's result has the same bits whatever rows are beside it and whatever
// instructions the CPU has.

#pragma once

#ifdef __AVX512VNNI__
#include "amx_int8.h"
#else
#include "strip_products.h"
#endif

namespace {

#ifdef __AVX512VNNI__

// Returns the number of parts of a thread's strips that M rows read side by side.
inline int64_t streams(int64_t M) { return M <= kMaxVnniRows ? 4 : 2; }

// Multiplies all rows by strips `from` to `to`. A thread splits its strips into STREAMS parts and
// reads the parts side by side.
template <Format F, int STREAMS>
void multiply_all_rows(const PackedWeights& w, const FixedPointRows& rows, int64_t from, int64_t to,
                       const Output& out) {
  const int64_t part = (to - from) / STREAMS;
  for (int64_t i = 0; i < part; i++) {
    int64_t n[STREAMS], m = 0;
    for (int t = 0; t < STREAMS; t++) n[t] = from + t * part + i;
    if constexpr (STREAMS == 2) m = multiply_rows_by_amx<F>(w, n, rows, out);
    if constexpr (8 * STREAMS <= kMaxSums) m = multiply_rows<F, 8, STREAMS>(w, n, rows, m, out);
    m = multiply_rows<F, 4, STREAMS>(w, n, rows, m, out);
    m = multiply_rows<F, 2, STREAMS>(w, n, rows, m, out);
    multiply_rows<F, 1, STREAMS>(w, n, rows, m, out);
  }
  for (int64_t n = from + STREAMS * part; n < to; n++) {  // the strips that are left
    int64_t m = STREAMS == 2 ? multiply_rows_by_amx<F>(w, {n, n}, rows, out) : 0;
    m = multiply_rows<F, 4, 1>(w, {n}, rows, m, out);
    multiply_rows<F, 1, 1>(w, {n}, rows, m, out);
  }
}

// Multiplies all rows by strips `from` to `to`, and stores the outputs in `out`.
template <Format F>
void multiply(const PackedWeights& w, const FixedPointRows& rows, int64_t from, int64_t to,
              const Output& out) {
  if (streams(out.M) == 4) return multiply_all_rows<F, 4>(w, rows, from, to, out);
  [[maybe_unused]] const AmxTiles configured;
  multiply_all_rows<F, 2>(w, rows, from, to, out);
}

#else

inline int64_t streams(int64_t M) { return M == 1 ? kRowStreams : 1; }

// As above.
template <Format F>
void multiply(const PackedWeights& w, const FixedPointRows& rows, int64_t from, int64_t to,
              const Output& out) {
  multiply_strips<F>(w, rows, from, to, out);
}

#endif

}  // namespace
