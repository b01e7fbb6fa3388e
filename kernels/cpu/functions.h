// Elementary functions of sixteen numbers, from polynomials with fixed coefficients: those of the C
// library differ between systems. They are inlined: a call passes vectors through memory, which
// makes an exponential take three times as long.

#pragma once

#include "vector.h"

namespace {

// Returns c[0] * x^(N-1) + c[1] * x^(N-2) + ... + c[N-1].
template <int N>
[[gnu::always_inline]] inline Floats polynomial(const float (&c)[N], Floats x) {
  Floats y = splat(c[0]);
#pragma GCC unroll 8
  for (int i = 1; i < N; i++) y = fma(y, x, splat(c[i]));
  return y;
}

// Returns e^x for x <= 0, with an error of at most 2^-22. x log2(e) is the sum of an integer and a
// rest of at most 1/2: the result is 2^integer times the Taylor series of 2^rest. Returns 0 below
// x = -80, so also for masked positions (x = -infinity), and for a NaN; their power counts as 0,
// since scale_by_power needs small exponents.
[[gnu::always_inline]] inline Floats exponential(Floats x) {
  constexpr float kTerms[] = {1.5403530e-4f, 1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f,
                              2.4022651e-1f, 6.9314718e-1f, 1.f};
  const Floats limit = splat(-80.f);
  const Floats power = keep_above(x, limit, x * splat(1.44269504f));
  const Ints whole = round_to_ints(power);
  const Floats rest = power - to_floats(whole);
  return keep_above(x, limit, scale_by_power(polynomial(kTerms, rest), whole));
}

// Returns tanh x with a relative error of 2^-21: x times a ratio of polynomials in x^2, chosen for
// the smallest relative error up to |x| = 9. Larger |x| count as 9, whose tanh is 1 - 2^-25. A NaN
// stays a NaN.
[[gnu::always_inline]] inline Floats hyperbolic_tangent(Floats x) {
  constexpr float kTop[] = {1.3354660e-8f, 2.0609080e-5f, 3.4955880e-3f, 1.3381025e-1f, 1.f};
  constexpr float kBottom[] = {7.7765577e-7f, 3.2856344e-4f, 2.5876982e-2f, 4.6714342e-1f, 1.f};
  const Floats bounded = min(splat(9.f), max(splat(-9.f), x)), square = bounded * bounded;
  return bounded * polynomial(kTop, square) / polynomial(kBottom, square);
}

// Returns 1 / (1 + e^-x), and 0 for x < -80 and for a NaN. For x > 0 it is computed as it stands,
// else as e^x / (1 + e^x). Both need only e^-|x|, which cannot overflow.
[[gnu::always_inline]] inline Floats logistic(Floats x) {
  const Floats zero = splat(0.f), one = splat(1.f);
  const Floats power = exponential(min(x, zero - x));  // e^-|x|
  const Floats numerator = keep_above(x, zero, one) + (power - keep_above(x, zero, power));
  return numerator / (one + power);
}

// Returns x / (1 + e^-x), the SiLU of x. A NaN stays a NaN, because x is a factor of the result.
[[gnu::always_inline]] inline Floats silu(Floats x) { return x * logistic(x); }

// Returns the tanh approximation of the GELU of x (arXiv 1606.08415, section 2): x (1 + tanh u) / 2
// with u = sqrt(2 / pi) (x + 0.044715 x^3). Computed as x / (1 + e^-2u), which is the same and
// subtracts no nearly equal numbers. A NaN stays a NaN, as in silu.
[[gnu::always_inline]] inline Floats gelu_tanh(Floats x) {
  const Floats cube = x * x * x;
  return x * logistic(splat(1.59576912f) * fma(splat(0.044715f), cube, x));
}

}  // namespace
