// Rotary positions (arXiv 2104.09864) of the heads of queries and keys, with the RMS norms of heads
// that some models have. Start at rotate_token. Its reference is RotaryPositions.rotate
// (layers/positions.py): computed in float32 and rounded once.

#pragma once

#include "rms_norm.h"

namespace {

// The rotation of queries and keys, after their norms if the model has them.
template <class T>
struct HeadRotation {
  int64_t H, G, E, P;        // query heads, key/value heads, channels of a head, rotated pairs
  const float *cos, *sin;    // of the angles of each token, (P) each
  const T *q_norm, *k_norm;  // weights of the norms, (E), or nullptr
  float eps, offset;         // of the norms, see RmsNorm

  // Rotates the first 2 P channels of x, (E): channel i pairs with channel i + P. Rounds once.
  void rotate(const T* x, int64_t token, T* y) const {
    for (int64_t i = 0; i < P; i += kStrip) {
      const Floats a = load_some(x + i, P - i), b = load_some(x + P + i, P - i);
      const Floats c = load_some(cos + token * P + i, P - i);
      const Floats s = load_some(sin + token * P + i, P - i);
      store_some(y + i, P - i, a * c - b * s);
      store_some(y + P + i, P - i, b * c + a * s);
    }
    std::copy(x + 2 * P, x + E, y + 2 * P);
  }

  // Rotates `heads` heads of a token from x on, (heads, E). normed: memory for E numbers.
  void rotate_heads(const T* x, int64_t heads, const T* norm, int64_t token, T* y,
                    T* normed) const {
    for (int64_t h = 0; h < heads; h++, x += E, y += E) {
      if (norm) rms_norm(RmsNorm<T>{E, norm, eps, offset}, x, normed);
      rotate(norm ? normed : x, token, y);
    }
  }

  // Rotates the queries and keys of token t, and copies its values. x, y: (tokens, H + 2 G, E).
  void rotate_token(const T* x, int64_t t, T* y, T* normed) const {
    const int64_t first = t * (H + 2 * G) * E, keys = first + H * E, values = keys + G * E;
    rotate_heads(x + first, H, q_norm, t, y + first, normed);
    rotate_heads(x + keys, G, k_norm, t, y + keys, normed);
    std::copy_n(x + values, G * E, y + values);
  }
};

}  // namespace
