// Attention of few queries over a KV cache, in plain C++17.
//
// Start at attend_heads. Shapes: B rows of a batch, G key/value heads, S positions, E channels. The
// KV cache stores the heads of a position side by side. A thread visits four positions at a time,
// in all its heads before the next four, so it reads memory once and nearly in order. Sums are
// float32. A query's result has the same bits whatever queries are beside it, and on every
// instruction set.

#pragma once

#include <limits>
#include <vector>

#include "functions.h"

namespace {

constexpr int64_t kTogether = 4;  // positions for which a query or a sum is loaded once
constexpr float kMasked = -std::numeric_limits<float>::infinity();

// Keys or values. T is BFloat16, Half or float. Strides are in elements.
template <class T>
struct Heads {  // (B, G, S, E)
  const T* data;
  int64_t row_stride, head_stride, position_stride;
};

// Q queries of each of G heads see S positions. A head has E channels, a multiple of kStrip.
template <class T>
struct Attention {
  int64_t G, Q, S, E;
  int64_t all;  // queries of each head in memory. The first Q, from q, mask and y on, are computed
  const T* q;   // (B, G, all, E), with q_stride numbers from row to row of the batch
  int64_t q_stride;
  Heads<T> k, v;
  const T* mask;  // (B, all, S), added to the scores; -infinity hides a position from a query
  T* y;           // (B, G, all, E)
  float scale;    // of the products of queries and keys
  float softcap;  // of the scaled products, see soft_cap; 0: none
};

// The memory of one thread for heads `first` to `last` of row b, in float32. Scores and masks are
// stored in blocks of kStrip positions.
struct Scratch {
  int64_t b, first, last, queries;  // queries: those of all these heads, n
  float *q, *sums;                  // (n, E); sums: of the weighted values
  float *scores, *masks;            // (blocks, n, kStrip), (blocks, Q, kStrip)
  float* widened;                   // (kTogether, E): keys or values as float32
};

// Returns cap * tanh(score / cap): almost the score near 0, at most the cap anywhere.
inline Floats soft_cap(Floats score, float cap) {
  return splat(cap) * hyperbolic_tangent(score / splat(cap));
}

template <class T>
inline void copy_as_floats(const T* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += kStrip) store(to + i, load(from + i));
}

// Writes the products of a query and the keys of kTogether positions to y, (kTogether).
template <class T>
inline void dots(const float* query, const T* const* keys, int64_t E, float* y) {
  Floats sums[kTogether];
  for (auto& sum : sums) sum = splat(0.f);
  for (int64_t e = 0; e < E; e += kStrip) {
    const Floats x = load(query + e);
#pragma GCC unroll 4
    for (int j = 0; j < kTogether; j++) sums[j] = fma(x, load(keys[j] + e), sums[j]);
  }
  reduce_add_four(sums, y);
}

// Adds the values of COUNT positions, times their weights, to the sums of a query.
template <int COUNT, class T>
inline void add_values(const float* weights, const T* const* values, int64_t E, float* sums) {
  for (int64_t e = 0; e < E; e += kStrip) {
    Floats sum = load(sums + e);
#pragma GCC unroll 4
    for (int j = 0; j < COUNT; j++) sum = fma(splat(weights[j]), load(values[j] + e), sum);
    store(sums + e, sum);
  }
}

// Does add_values for kTogether positions, but skips those with weight 0: their values may be NaN,
// since a hidden slot may hold anything.
template <class T>
inline void add_weighted(const float* weights, const T* const* values, int64_t E, float* sums) {
  if (std::all_of(weights, weights + kTogether, [](float w) { return w != 0; }))
    return add_values<kTogether>(weights, values, E, sums);
  for (int j = 0; j < kTogether; j++)
    if (weights[j] != 0) add_values<1>(weights + j, values + j, E, sums);
}

// Returns whether any of Q queries sees any of kTogether positions. masks: (Q, kStrip), from the
// first position on.
inline bool any_seen(const float* masks, int64_t Q) {
  bool seen = false;
  for (int64_t i = 0; i < Q; i++)
    for (int j = 0; j < kTogether; j++) seen |= masks[i * kStrip + j] != kMasked;
  return seen;
}

// Calls visit(g, s, rows) for each kTogether positions, s to s + kTogether - 1, of which a query
// sees any, and each head g. rows: for each position a pointer to its E numbers in `heads`; for
// positions from S on, to those of the last position. They are of type T for one query, else
// float32. `offset` is the distance of the prefetches, about kAhead bytes.
template <class T, class Visit>
void visit_positions(const Attention<T>& a, const Scratch& w, const Heads<T>& heads, Visit visit) {
  const int64_t bytes = a.E * sizeof(T), ahead = kAhead / ((w.last - w.first) * bytes);
  const int64_t offset = std::max(ahead, kTogether) * heads.position_stride;
  const T *rows[kTogether], *row = heads.data + w.b * heads.row_stride;
  const float* widened[kTogether];
  for (int j = 0; j < kTogether; j++) widened[j] = w.widened + j * a.E;
  for (int64_t s = 0; s < a.S; s += kTogether) {
    if (!any_seen(w.masks + s / kStrip * a.Q * kStrip + s % kStrip, a.Q)) continue;
    for (int64_t g = w.first; g < w.last; g++) {
      for (int j = 0; j < kTogether; j++) {
        rows[j] = row + g * heads.head_stride + std::min(s + j, a.S - 1) * heads.position_stride;
        prefetch(rows[j] + offset, bytes);
      }
      if (a.Q == 1) {
        visit(g, s, rows);
      } else {  // the queries share one conversion
        for (int j = 0; j < kTogether; j++) copy_as_floats(rows[j], a.E, w.widened + j * a.E);
        visit(g, s, widened);
      }
    }
  }
}

// Replaces the products of query i of the Scratch by softmax weights, but does not divide them by
// their sum; returns the sum, or NaN if a product that is not hidden is NaN. attend divides the
// results.
template <class T>
float exponentiate(const Attention<T>& a, const Scratch& w, int64_t i) {
  const Floats masked = splat(kMasked), scale = splat(a.scale);
  const int64_t blocks = (a.S + kStrip - 1) / kStrip, row = i % a.Q;
  Floats largest = masked, sum = splat(0.f);
  Ints largest_bits = splat(0);  // max and exponential may lose a NaN
  for (int64_t n = 0; n < blocks; n++) {
    float* scores = w.scores + (n * w.queries + i) * kStrip;
    const Floats mask = load(w.masks + (n * a.Q + row) * kStrip);
    Floats score = scale * load(scores);
    if (a.softcap != 0) score = soft_cap(score, a.softcap);
    score = keep_above(mask, masked, score) + mask;
    store(scores, score);
    largest = max(largest, score);
    largest_bits = max(largest_bits, magnitude_bits(score));
  }
  const float nan = std::numeric_limits<float>::quiet_NaN();
  if (std::isnan(float_of(static_cast<uint32_t>(reduce_max(largest_bits))))) return nan;
  const Floats top = splat(reduce_max(largest));
  for (int64_t n = 0; n < blocks; n++) {
    float* scores = w.scores + (n * w.queries + i) * kStrip;
    const Floats weight = exponential(load(scores) - top);
    store(scores, weight);
    sum = sum + weight;
  }
  return reduce_add(sum);
}

// Computes the heads of `w`, whose q and masks are set and whose sums are 0.
template <class T>
void attend(const Attention<T>& a, const Scratch& w) {
  const auto scores_of = [&](int64_t i, int64_t s) {
    return w.scores + (s / kStrip * w.queries + i) * kStrip + s % kStrip;
  };
  visit_positions(a, w, a.k, [&](int64_t g, int64_t s, auto keys) {
    for (int64_t i = (g - w.first) * a.Q, end = i + a.Q; i < end; i++)
      dots(w.q + i * a.E, keys, a.E, scores_of(i, s));
  });
  std::vector<float> totals(w.queries);
  for (int64_t i = 0; i < w.queries; i++) totals[i] = exponentiate(a, w, i);
  visit_positions(a, w, a.v, [&](int64_t g, int64_t s, auto values) {
    for (int64_t i = (g - w.first) * a.Q, end = i + a.Q; i < end; i++)
      add_weighted(scores_of(i, s), values, a.E, w.sums + i * a.E);
  });
  for (int64_t i = 0; i < w.queries; i++) {
    const int64_t g = w.first + i / a.Q;
    T* y = a.y + ((w.b * a.G + g) * a.all + i % a.Q) * a.E;
    for (int64_t e = 0; e < a.E; e += kStrip)
      store(y + e, load(w.sums + i * a.E + e) * splat(1 / totals[i]));
  }
}

// Sets up a Scratch for the heads `first` to `last` of row b, and calls attend.
template <class T>
void attend_row(const Attention<T>& a, int64_t b, int64_t first, int64_t last) {
  const int64_t queries = (last - first) * a.Q, numbers = queries * a.E;
  const int64_t positions = (a.S + kStrip - 1) / kStrip * kStrip;
  thread_local std::vector<float> buffer;
  buffer.resize(2 * numbers + (queries + a.Q) * positions + kTogether * a.E);
  Scratch w{};
  w.b = b, w.first = first, w.last = last, w.queries = queries;
  w.q = buffer.data(), w.sums = w.q + numbers, w.widened = w.sums + numbers;
  w.scores = w.widened + kTogether * a.E, w.masks = w.scores + queries * positions;
  for (int64_t g = first; g < last; g++)
    copy_as_floats(a.q + b * a.q_stride + g * a.all * a.E, a.Q * a.E,
                   w.q + (g - first) * a.Q * a.E);
  std::fill_n(w.sums, numbers, 0.f);
  const T* mask = a.mask + b * a.all * a.S;
  for (int64_t s = 0; s < positions; s++)
    for (int64_t i = 0; i < a.Q; i++)
      w.masks[(s / kStrip * a.Q + i) * kStrip + s % kStrip] =
          s < a.S ? to_float(mask[i * a.S + s]) : kMasked;
  attend(a, w);
}

// Returns the same work for only a part of the queries of every head: number `part` of `parts`.
template <class T>
Attention<T> part_of_queries(Attention<T> a, int64_t part, int64_t parts) {
  const int64_t first = a.all * part / parts;
  a.Q = a.all * (part + 1) / parts - first;
  a.q += first * a.E, a.y += first * a.E, a.mask += first * a.S;
  return a;
}

// Computes heads `start` to `end` of the B * G heads of all rows.
template <class T>
void attend_heads(const Attention<T>& a, int64_t start, int64_t end) {
  while (start < end) {  // heads of one row, then of the next
    const int64_t first = start % a.G, last = std::min(a.G, first + end - start);
    attend_row(a, start / a.G, first, last);
    start += last - first;
  }
}

}  // namespace
