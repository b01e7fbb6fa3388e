// Rotary positions (arXiv 2104.09864) of the heads of queries and keys, with the RMS norms of heads
// that some models have. Start at rotate_token. Its reference is RotaryPositions.rotate
// (layers/positions.py): the rotation is computed in float32 and rounded once. A norm before it
// rounds, too.

#pragma once

#include "rms_norm.h"

namespace {

// The rotation of queries and keys, after their norms if the model has them.
template <class T>
struct HeadRotation {
  int64_t H, G, E, P;        // query heads, key/value heads, channels of a head, rotated pairs
  const float *cos, *sin;    // (tokens, P): cosines and sines of the angles
  const T *q_norm, *k_norm;  // weights of the norms, (E), or nullptr
  float eps, offset;         // of the norms, see RmsNorm

  // Writes one head x, (E), of a token to y, (E): rotates channel i with channel i + P for i < P,
  // and copies the channels from 2 P on.
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

  // Writes `heads` heads x, (heads, E), of a token to y, normalised and rotated. norm: the weight
  // of their norm, or nullptr; normed: memory for E numbers.
  void rotate_all(const T* x, int64_t heads, const T* norm, int64_t token, T* y,
                    T* normed) const {
    for (int64_t h = 0; h < heads; h++, x += E, y += E) {
      if (norm) rms_norm(RmsNorm<T>{E, norm, eps, offset}, x, normed);
      rotate(norm ? normed : x, token, y);
    }
  }

  // Rotates the queries and keys of a token, and copies its values. x, y: (tokens, H + 2 G, E).
  // normed: memory for E numbers.
  void rotate_token(const T* x, int64_t token, T* y, T* normed) const {
    const int64_t first = token * (H + 2 * G) * E, keys = first + H * E, values = keys + G * E;
    rotate_all(x + first, H, q_norm, token, y + first, normed);
    rotate_all(x + keys, G, k_norm, token, y + keys, normed);
    std::copy_n(x + values, G * E, y + values);
  }
};

}  // namespace
