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
Heads<T> heads_of(const Tensor& t) {
  return {data_of<T>(t), t.stride(0), t.stride(1), t.stride(2)};
}

// queries: q, contiguous, whose data `data` is.
template <class T>
Tensor attention_of(const T* data, const Tensor& queries, const Tensor& k, const Tensor& v,
                    const Tensor& mask) {
  const int64_t G = k.size(1), Q = queries.size(2), S = k.size(2), E = k.size(3);
  const Tensor masks = mask.contiguous();
  Tensor y = at::empty(queries.sizes(), queries.options());
  const Attention<T> work{G, Q, S, E, data, heads_of<T>(k), heads_of<T>(v), data_of<T>(masks),
                          static_cast<T*>(y.mutable_data_ptr())};
  const int64_t grain = std::max<int64_t>(1, kGrain / (Q * S * E));
  at::parallel_for(0, k.size(0) * G, grain,
                   [&](int64_t start, int64_t end) { attend_heads(work, start, end); });
  return y;
}

// Returns whether attention_of takes these tensors.
bool fits(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& mask) {
  if (!is_supported(q) || q.dim() != 4 || k.dim() != 4 || q.numel() == 0 || k.numel() == 0)
    return false;
  for (const Tensor& t : {k, v, mask})
    if (t.scalar_type() != q.scalar_type()) return false;
  const int64_t B = q.size(0), G = q.size(1), Q = q.size(2), S = k.size(2), E = q.size(3);
  return k.sizes() == at::IntArrayRef{B, G, S, E} && v.sizes() == k.sizes() &&
         mask.sizes() == at::IntArrayRef{B, 1, Q, S} && Q <= kMaxQueries && E % kStrip == 0 &&
         k.stride(3) == 1 && v.stride(3) == 1;
}

// q: (B, G, Q, E). k, v: (B, G, S, E), with channels side by side. mask: (B, 1, Q, S), added to the
// scores. Returns (B, G, Q, E). Leaves other tensors to PyTorch.
Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& mask) {
  if (!fits(q, k, v, mask)) return at::scaled_dot_product_attention(q, k, v, mask);
  const Tensor queries = q.contiguous();
  return with_data(queries, [&](const auto* data) {
    return attention_of(data, queries, k, v, mask);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(gpt_flex, CPU, library) { library.impl("attention", attention); }
