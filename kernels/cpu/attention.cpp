// The operator attention: scaled_dot_product_attention for few queries. attention.h computes it;
// start at attention. PyTorch's attention takes twenty times as long for one query of each of 32
// heads.

#include "attention.h"
#include "torch.h"

namespace {

using at::Tensor;

// Queries of a key/value head. A verify pass of 16 tokens, with 8 heads that share it, has no more.
constexpr int64_t kMaxQueries = 128;

template <class T>
const T* data_of(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <class T>
Heads<T> heads_of(const Tensor& t) {
  return {data_of<T>(t), t.stride(0), t.stride(1), t.stride(2)};
}

template <class T>
Tensor attention_of(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& mask) {
  const int64_t G = q.size(1), Q = q.size(2), S = k.size(2), E = q.size(3);
  const Tensor queries = q.contiguous(), masks = mask.contiguous();
  Tensor y = at::empty(queries.sizes(), queries.options());
  const Attention<T> work{G, Q, S, E, data_of<T>(queries), heads_of<T>(k), heads_of<T>(v),
                          data_of<T>(masks), static_cast<T*>(y.mutable_data_ptr())};
  const int64_t grain = std::max<int64_t>(1, kGrain / (Q * S * E));
  at::parallel_for(0, q.size(0) * G, grain,
                   [&](int64_t start, int64_t end) { attend_heads(work, start, end); });
  return y;
}

// q: (B, G, Q, E). k, v: (B, G, S, E), with channels side by side. mask: (B, 1, Q, S), added to the
// scores. Returns (B, G, Q, E).
Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& mask) {
  const auto dtype = q.scalar_type();
  bool fits = q.size(2) <= kMaxQueries && q.size(3) % kStrip == 0 && k.stride(3) == 1 &&
              v.stride(3) == 1 && mask.size(1) == 1;
  for (const Tensor& t : {k, v, mask}) fits &= t.scalar_type() == dtype;
  if (fits && dtype == at::kBFloat16) return attention_of<BFloat16>(q, k, v, mask);
  if (fits && dtype == at::kHalf) return attention_of<Half>(q, k, v, mask);
  if (fits && dtype == at::kFloat) return attention_of<float>(q, k, v, mask);
  return at::scaled_dot_product_attention(q, k, v, mask);
}

}  // namespace

TORCH_LIBRARY_IMPL(gpt_flex, CPU, library) { library.impl("attention", attention); }
