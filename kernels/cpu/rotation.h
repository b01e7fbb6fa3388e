// Rotary positions (arXiv 2104.09864) of the heads of queries and keys, with the RMS norms of heads
// that some models have. Start at rotate_token. Its reference is RotaryPositions.rotate
// (layers/positions.py): the rotation is computed in float32 and rounded once. A norm before it
// rounds, too.

#pragma once

#include "rms_norm.h"

namespace {

// The rotation of queries and keys, after their norms if the model has them, in place.
template <class T>
struct HeadRotation {
  int64_t H, G, E, P;        // query heads, key/value heads, channels of a head, rotated pairs
  const float *cos, *sin;    // (tokens, P): cosines and sines of the angles
  const T *q_norm, *k_norm;  // weights of the norms, (E), or nullptr
  float eps, offset;         // of the norms, see RmsNorm

  // Rotates one head x, (E), of a token: channel i with channel i + P for i < P. The channels from
  // 2 P on stay.
  void rotate(T* x, int64_t token) const {
    for (int64_t i = 0; i < P; i += kStrip) {
      const Floats a = load_some(x + i, P - i), b = load_some(x + P + i, P - i);
      const Floats c = load_some(cos + token * P + i, P - i);
      const Floats s = load_some(sin + token * P + i, P - i);
      store_some(x + i, P - i, a * c - b * s);
      store_some(x + P + i, P - i, b * c + a * s);
    }
  }

  // Normalises `heads` heads x, (heads, E), of a token by a norm's weight, unless it is nullptr,
  // and rotates them.
  void rotate_all(T* x, int64_t heads, const T* norm, int64_t token) const {
    for (int64_t h = 0; h < heads; h++, x += E) {
      if (norm) rms_norm(RmsNorm<T>{E, norm, eps, offset}, x, x);
      rotate(x, token);
    }
  }

  // Normalises and rotates the queries and keys of a token. heads: (tokens, H + 2 G, E).
  void rotate_token(T* heads, int64_t token) const {
    T* x = heads + token * (H + 2 * G) * E;
    rotate_all(x, H, q_norm, token);
    rotate_all(x + H * E, G, k_norm, token);
  }
};

}  // namespace
