// The operators run_layer (a decoder layer), project_heads and finish_layer (its parts before and
// after the attention), decoder_layer (see decoder_layer.h), attention (of few queries, as
// scaled_dot_product_attention), neurons (a feed-forward layer with ReLU, of some of its neurons,
// for a few rows), and those of layer_functions.h. This file checks arguments and shares the work
// between threads; headers compute.
//
// Start at run_layer, attention and neurons. PyTorch's attention takes twenty times as long for one
// query of each of 32 heads. Shapes: see decoder_layer.h; S visible slots of a cache.

#include <cstring>
#include <numeric>

#include "attention.h"
#include "decoder_layer.h"
#include "neurons.h"

namespace {

using at::Tensor;
using Result = std::tuple<Tensor, int64_t>;

// The most queries of a key/value head that attention.h computes. A verify pass of 16 tokens, with
// 8 query heads for a key/value head, has as many.
constexpr int64_t kMaxQueries = 128;

// t: (B, G, S, E), with channels side by side.
template <class T>
Heads<T> heads_of(const Tensor& t) {
  return {data_of<T>(t), t.stride(0), t.stride(1), t.stride(2)};
}

// Computes the attention of all heads of B rows.
template <class T>
void attend_rows(const Attention<T>& work, int64_t B) {
  // With twice as many threads as heads of keys and values, or more, the threads that share a head
  // divide its queries into parts, if there is work for as many.
  const int64_t heads = B * work.G, work_per_head = work.Q * work.S * work.E;
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), heads * work_per_head / kGrain);
  const int64_t parts = std::clamp<int64_t>(threads / heads, 1, work.Q);
  const int64_t grain = std::max<int64_t>(1, kGrain * parts / work_per_head);
  at::parallel_for(0, parts * heads, grain, [&](int64_t start, int64_t end) {
    for (int64_t from = start; from < end;) {  // part * heads + head
      const int64_t part = from / heads, to = std::min(end, (part + 1) * heads);
      attend_heads(part_of_queries(work, part, parts), from - part * heads, to - part * heads);
      from = to;
    }
  });
}

// Does `attention` for tensors that fit. data: that of `queries`, which are contiguous. softcap: 0
// for none.
template <class T>
Tensor attention_of(const T* data, const Tensor& queries, const Tensor& k, const Tensor& v,
                    const Tensor& mask, double scale, double softcap) {
  const int64_t G = k.size(1), Q = queries.size(2), S = k.size(2), E = k.size(3);
  const Tensor masks = mask.contiguous();
  Tensor y = at::empty(queries.sizes(), queries.options());
  const Attention<T> work{G, Q, S, E, Q, data, G * Q * E, heads_of<T>(k), heads_of<T>(v),
                          data_of<T>(masks), static_cast<T*>(y.mutable_data_ptr()),
                          static_cast<float>(scale), static_cast<float>(softcap)};
  return attend_rows(work, k.size(0)), y;
}

// Returns whether attention_of takes these tensors, which are those of `attention`.
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

// Attends by PyTorch: without a softcap by its own function, with one by the operator "capped",
// which layers/kv_cache.py defines.
Tensor attention_by_torch(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& mask,
                          double scale, std::optional<double> softcap) {
  if (!softcap)
    return at::scaled_dot_product_attention(q, k, v, mask, 0, false, scale).contiguous();
  using Capped = Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, double, double);
  static const auto capped =
      c10::Dispatcher::singleton().findSchemaOrThrow("gpt_flex::capped", "").typed<Capped>();
  return capped.call(q, k, v, mask, scale, *softcap).contiguous();
}

// q: (B, G, Q, E). k, v: (B, G, S, E), with channels side by side. mask: (B, 1, Q, S), added to the
// scores. scale: of the products, by default 1 / sqrt(E). softcap: limits the scaled products, see
// soft_cap; by default they have no limit. Returns (B, G, Q, E), contiguous. Tensors that do not
// fit, such as those of more than kMaxQueries queries, are left to PyTorch.
Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& mask,
                 std::optional<double> scale, std::optional<double> softcap) {
  const double factor = scale.value_or(1 / std::sqrt(static_cast<double>(q.size(-1))));
  if (!fits(q, k, v, mask)) return attention_by_torch(q, k, v, mask, factor, softcap);
  const Tensor queries = q.contiguous();
  return with_data(queries, [&](const auto* data) {
    return attention_of(data, queries, k, v, mask, factor, softcap.value_or(0));
  });
}

// A plain KV cache, where new tokens are stored in it, and how attention reads it.
struct CacheUse {
  const Tensor &k, &v;  // (B, slots + 1, G, E), contiguous; see KVCache
  const Tensor& slots;  // (B, T), int64: where the new tokens are stored
  // (B, 1, R * T, S), see Transformer.mask; attention reads the first S slots. With a mask that is
  // broadcast or not contiguous, or of another dtype, PyTorch attends.
  const Tensor& mask;
  std::optional<double> scale, softcap;  // see `attention`
};

// Raises an error unless the shapes and dtypes of cache, slots and mask fit the heads, (B, T, H + 2
// G, E), of a layer. store_in_cache checks the slots' numbers.
void check_cache(const CacheUse& cache, const Tensor& heads, const DecoderLayer& layer) {
  const auto &[k, v, slots, mask, scale, softcap] = cache;
  const bool fits = k.dim() == 4 && k.size(0) == heads.size(0) && k.size(2) == layer.G &&
                    k.size(3) == layer.E && v.sizes() == k.sizes();
  TORCH_CHECK(fits, "a cache of ", k.sizes(), " and ", v.sizes(), " for heads ", heads.sizes());
  TORCH_CHECK(k.is_contiguous() && v.is_contiguous(), "a cache that is not contiguous");
  TORCH_CHECK(k.scalar_type() == heads.scalar_type() && v.scalar_type() == heads.scalar_type(),
              "a cache of another dtype");
  TORCH_CHECK(slots.sizes() == heads.sizes().slice(0, 2) && slots.scalar_type() == at::kLong,
              "slots of other tokens, or not int64");
  TORCH_CHECK(mask.dim() == 4 && mask.size(3) <= k.size(1), "a mask of more slots than the cache");
}

// Copies the keys and values of new tokens into the slots of a cache. heads: (B, T, H + 2 G, E),
// contiguous; the last 2 G are keys and values.
void store_in_cache(const Tensor& heads, const CacheUse& cache) {
  const int64_t T = heads.size(1), all = cache.k.size(1), G = cache.k.size(2);  // all: slots
  const int64_t head = heads.size(3) * heads.element_size(), token = heads.size(2) * head;  // bytes
  const Tensor slots = cache.slots.contiguous();
  const auto* slot = slots.const_data_ptr<int64_t>();
  const auto* keys = static_cast<const uint8_t*>(heads.const_data_ptr()) + token - 2 * G * head;
  auto* to_k = static_cast<uint8_t*>(cache.k.mutable_data_ptr());
  auto* to_v = static_cast<uint8_t*>(cache.v.mutable_data_ptr());
  for (int64_t i = 0; i < slots.numel(); i++)
    TORCH_CHECK(slot[i] >= 0 && slot[i] < all, "slot ", slot[i], " of ", all);
  for (int64_t i = 0; i < slots.numel(); i++, keys += token) {
    const int64_t at = (i / T * all + slot[i]) * G * head;
    std::memcpy(to_k + at, keys, G * head);
    std::memcpy(to_v + at, keys + G * head, G * head);
  }
}

// Does attend_to_cache, which tests whether it can, for one token of each row: without views of
// tensors, which take several microseconds. data: that of the heads. scale: that of the cache, or
// its default.
template <class T>
Tensor attend_one_token(const T* data, const Tensor& heads, const CacheUse& cache, double scale) {
  const int64_t B = heads.size(0), E = heads.size(3), S = cache.mask.size(3), G = cache.k.size(2);
  const int64_t H = heads.size(2) - 2 * G, row = cache.k.stride(0);
  Tensor y = at::empty({B, 1, H * E}, heads.options());
  const Attention<T> work{
      G, H / G, S, E, H / G, data, heads.stride(0), {data_of<T>(cache.k), row, E, G * E},
      {data_of<T>(cache.v), row, E, G * E}, data_of<T>(cache.mask),
      static_cast<T*>(y.mutable_data_ptr()), static_cast<float>(scale),
      static_cast<float>(cache.softcap.value_or(0))};
  return attend_rows(work, B), y;
}

// Attends with the queries of heads, (B, T, H + 2 G, E), to a cache -> (B, T, H * E).
Tensor attend_to_cache(const Tensor& heads, const CacheUse& cache) {
  const int64_t B = heads.size(0), T = heads.size(1), E = heads.size(3), S = cache.mask.size(3);
  const int64_t G = cache.k.size(2), H = heads.size(2) - 2 * G, R = H / G;
  const Tensor& mask = cache.mask;
  const bool reads_mask = mask.is_contiguous() && mask.scalar_type() == heads.scalar_type() &&
                          mask.sizes() == at::IntArrayRef{B, 1, R * T, S};
  if (T == 1 && reads_mask && R <= kMaxQueries && E % kStrip == 0 && mask.numel() > 0)
    return with_data(heads, [&](const auto* data) {
      const double scale = cache.scale.value_or(1 / std::sqrt(static_cast<double>(E)));
      return attend_one_token(data, heads, cache, scale);
    });
  // The queries of the R heads that share a key/value head are R * T queries of one head.
  const Tensor q = heads.narrow(2, 0, H).unflatten(2, {G, R}).permute({0, 2, 3, 1, 4});
  const Tensor k = cache.k.narrow(1, 0, S).transpose(1, 2);  // (B, G, S, E)
  const Tensor v = cache.v.narrow(1, 0, S).transpose(1, 2);
  const Tensor y = attention(q.flatten(2, 3), k, v, mask, cache.scale, cache.softcap);
  return y.unflatten(2, {R, T}).permute({0, 3, 1, 2, 4}).reshape({B, T, H * E});
}

// Returns the heads of queries, keys and values, (B, T, (H + 2 G) * E), of the tokens x, (B, T, D).
// With cos and sin, (B, T, 1, P), the heads of queries and keys are normed, if the layer has such
// norms, and rotated. layer: from decoder_layer. width: (H + 2 G) * E, for tracing, which cannot
// read the layer.
Tensor project_heads(const Tensor& layer, const Tensor& x, const std::optional<Tensor>& cos,
                     const std::optional<Tensor>& sin, int64_t width) {
  const DecoderLayer& block = decoder_layer_of(layer);
  TORCH_CHECK(x.dim() == 3, "tokens of ", x.dim(), " dimensions");
  TORCH_CHECK(cos.has_value() == sin.has_value(), "a cosine without a sine");
  const Tensor rows = block.normed(kAttentionNorm, x.reshape({-1, x.size(2)}));  // (B * T, D)
  const Tensor heads = block.multiply(kWqkv, rows).view({x.size(0), x.size(1), width});
  if (cos) rotate_heads(heads, block, *cos, *sin);
  return heads;
}

// Returns the layer's output, (B, T, D), from its input x, (B, T, D), and the output of its
// attention, (B, T, H * E): computes wo and the feed-forward, with their norms and residual sums.
// layer: from decoder_layer.
Tensor finish_layer(const Tensor& layer, const Tensor& x, const Tensor& attended) {
  const DecoderLayer& block = decoder_layer_of(layer);
  const Tensor y = block.multiply(kWo, attended.reshape({-1, attended.size(-1)}));
  const Tensor middle = block.normed(kAttentionOutput, y);  // (B * T, D)
  add_to(middle, x);
  const Tensor hidden = block.multiply(kW13, block.normed(kFeedForwardNorm, middle));
  const Tensor gated = gated_by_name(hidden, block.activation);  // (B * T, 2 F) -> (B * T, F)
  const Tensor out = block.normed(kFeedForwardOutput, block.multiply(kW2, gated));
  add_to(out, middle);
  return out.view(x.sizes());
}

// Computes a layer: project_heads, a store of keys and values in the cache, attention to it and
// finish_layer. As separate calls from Python these take 25 microseconds more for each layer. k to
// softcap: see CacheUse. The other arguments and the result are those of project_heads and
// finish_layer.
Tensor run_layer(const Tensor& layer, const Tensor& x, const Tensor& cos, const Tensor& sin,
                 const Tensor& k, const Tensor& v, const Tensor& slots, const Tensor& mask,
                 std::optional<double> scale, std::optional<double> softcap) {
  const DecoderLayer& block = decoder_layer_of(layer);
  const int64_t count = block.H + 2 * block.G;
  const CacheUse cache{k, v, slots, mask, scale, softcap};
  const Tensor heads = project_heads(layer, x, cos, sin, count * block.E)
                           .view({x.size(0), x.size(1), count, block.E});
  check_cache(cache, heads, block);
  store_in_cache(heads, cache);
  return finish_layer(layer, x, attend_to_cache(heads, cache));
}

// Does `neurons` for `count` entries with weights of the type W. entries: nullptr for all. x:
// contiguous.
template <class W, class T>
Result neurons_of(const Layer<T>& layer, const int64_t* entries, int64_t count, const Tensor& x) {
  const int64_t N = x.size(0), dim = layer.dim;
  std::vector<float> rows(N * dim);
  arrange_rows<W>(data_of<T>(x), N, dim, rows.data());
  // Each part has sums of its own. The number of parts depends on sizes and the number of threads
  // only, so repeated calls give the same bits.
  const int64_t parts = std::clamp<int64_t>(count * dim / kGrain, 1, at::get_num_threads());
  std::vector<float> sums(parts * N * dim);
  std::vector<int64_t> active(parts);
  at::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; p++)
      active[p] = add_neurons<W>(layer, entries, count * p / parts, count * (p + 1) / parts,
                                 rows.data(), N, sums.data() + p * N * dim);
  });
  Tensor y = at::empty({N, dim}, x.options().dtype(at::kFloat));
  add_parts<W>(sums.data(), parts, N, dim, y.mutable_data_ptr<float>());
  return {y, std::accumulate(active.begin(), active.end(), int64_t{0})};
}

// Returns the Layer of these arguments, whose shapes `neurons` gives; the caller sets empty, dim
// and group.
template <class T>
Layer<T> layer_of(const T* bias, const Tensor& records, const Tensor& ids,
                  const std::optional<Tensor>& scales, at::IntArrayRef fields) {
  Layer<T> layer{};
  layer.records = data_of<uint8_t>(records), layer.stride = records.stride(0);
  layer.ids = ids.const_data_ptr<int64_t>(), layer.bias = bias;
  layer.scales = scales ? scales->const_data_ptr<float>() : nullptr;
  layer.inner = static_cast<int64_t>(fields.size()) / 3 - 1;
  for (int64_t i = 0; i <= layer.inner; i++)
    layer.matrices[i] = {fields[3 * i], fields[3 * i + 1], fields[3 * i + 2]};
  return layer;
}

// x: (N, D). records: (C, stride) bytes. entries: the numbers of the records to use; none: all.
// ids: (C,), the neuron of each record; F: the record is empty. bias: (F + 1, inner), of x's dtype;
// its last row belongs to empty records. scales: of int8 weights, of the same shape, else none.
// fields: for each matrix (see Layer) the first bytes of weights, scales and zero points in a
// record. bits: of a weight, 4 or 8, or another number for weights of x's dtype. group: int4
// weights that share a scale. Returns (N, D) in float32, and how many neurons were active for at
// least one row.
Result neurons(const Tensor& x, const Tensor& records, const std::optional<Tensor>& entries,
               const Tensor& ids, const Tensor& bias, const std::optional<Tensor>& scales,
               at::IntArrayRef fields, int64_t bits, int64_t group) {
  const int64_t dim = x.size(1), inner = bias.size(1);
  TORCH_CHECK(group > 0 && dim % kChunk == 0 && group % kChunk == 0, dim, " in groups of ", group);
  TORCH_CHECK(records.stride(1) == 1 && ids.is_contiguous() && bias.is_contiguous());
  TORCH_CHECK(!entries || entries->is_contiguous(), "entries that are not contiguous");
  TORCH_CHECK(!scales || scales->is_contiguous(), "scales that are not contiguous");
  TORCH_CHECK(inner == 1 || inner == 2, inner, " inner matrices");
  TORCH_CHECK(static_cast<int64_t>(fields.size()) == 3 * (inner + 1), fields.size(), " fields");
  TORCH_CHECK(bias.scalar_type() == x.scalar_type(), "biases of another dtype than the rows");
  const Tensor rows = x.contiguous();
  const int64_t* some = entries ? entries->const_data_ptr<int64_t>() : nullptr;
  const int64_t count = entries ? entries->numel() : records.size(0);
  return with_data(bias, [&](const auto* biases) {
    auto layer = layer_of(biases, records, ids, scales, fields);
    layer.empty = bias.size(0) - 1, layer.dim = dim, layer.group = group;
    if (bits == 8) return neurons_of<int8_t>(layer, some, count, rows);
    if (bits == 4) return neurons_of<Nibbles>(layer, some, count, rows);
    using T = std::remove_const_t<std::remove_pointer_t<decltype(biases)>>;
    return neurons_of<T>(layer, some, count, rows);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(gpt_flex, CPU, library) {
  library.impl("attention", attention);
  library.impl("finish_layer", finish_layer);
  library.impl("project_heads", project_heads);
  library.impl("run_layer", run_layer);
  library.impl("fast_gelu_tanh", fast_gelu_tanh);
  library.impl("fast_rms_norm", fast_rms_norm);
  library.impl("fast_silu", fast_silu);
  library.impl("neurons", neurons);
}

// It has no device: its lists of tensors may be empty.
TORCH_LIBRARY_IMPL(gpt_flex, CompositeExplicitAutograd, library) {
  library.impl("decoder_layer", decoder_layer);
}
