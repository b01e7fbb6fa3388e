// A decoder layer: attention and a gated feed-forward, each with a residual sum. Its weights and
// settings are in one tensor: an operator with a list of them all takes 15 microseconds longer to
// call from Python.
//
// Start at decoder_layer, the operator that makes the tensor.

#pragma once

#include <ATen/ops/from_blob.h>

#include <array>
#include <memory>
#include <string>

#include "layer_functions.h"
#include "multiply.h"
#include "rotation.h"

namespace {

using at::Tensor;
using Tensors = c10::List<std::optional<Tensor>>;

// The order of the linears and norms in the arguments of decoder_layer.
enum { kWqkv, kWo, kW13, kW2, kLinears };
enum { kInputNorm, kAttentionOutput, kFeedForwardNorm, kOutput, kQueryNorm, kKeyNorm, kNorms };

struct DecoderLayer {
  const DecoderLayer* self = this;  // differs in a copy of the tensor's bytes
  std::array<gpt_flex::Linear, kLinears> linears;
  std::array<std::optional<Tensor>, kNorms> norms;  // weights of RMS norms, (D) or (E), or none
  int64_t H, G, E;                                  // query heads, key/value heads, channels
  double eps, offset;                               // of all norms, see fast_rms_norm
  std::string activation;                           // see gated_by_name

  // Returns the product of x, (M, K), and a linear's weight: (M, N).
  Tensor multiply(int linear, const Tensor& x) const {
    return gpt_flex::multiply(x, linears[linear]);
  }

  // Returns the norm of x, (M, D), or x if the layer has no such norm.
  Tensor normed(int norm, const Tensor& x) const {
    return norms[norm] ? fast_rms_norm(x, norms[norm], eps, offset) : x;
  }
};

// Returns the layer's object in a tensor that decoder_layer returned.
const DecoderLayer& decoder_layer_of(const Tensor& layer) {
  const bool fits = layer.nbytes() == sizeof(DecoderLayer);
  const auto* object = static_cast<const DecoderLayer*>(layer.const_data_ptr());
  TORCH_CHECK(fits && object->self == object, "no tensor of decoder_layer, or a copy of one");
  return *object;
}

// Returns a tensor of bytes that is a DecoderLayer, and owns it. weights, biases: of the linears;
// packings: the three numbers of each, see gpt_flex::Linear. norms: their weights, or none. Linears
// and norms are in the order of the enumerations above. eps, offset: of all norms. activation: of
// the gate, see gated_by_name. heads: H, G and E.
Tensor decoder_layer(at::TensorList weights, const Tensors& biases, at::IntArrayRef packings,
                     const Tensors& norms, double eps, double offset, c10::string_view activation,
                     at::IntArrayRef heads) {
  TORCH_CHECK(weights.size() == kLinears && biases.size() == kLinears && norms.size() == kNorms &&
              packings.size() == 3 * kLinears && heads.size() == 3, "lists of other lengths");
  auto layer = std::make_unique<DecoderLayer>();
  for (int64_t i = 0; i < kLinears; i++)
    layer->linears[i] = {weights[i], biases[i], packings[3 * i], packings[3 * i + 1],
                         packings[3 * i + 2]};
  for (int64_t i = 0; i < kNorms; i++) layer->norms[i] = norms[i];
  layer->H = heads[0], layer->G = heads[1], layer->E = heads[2];
  layer->eps = eps, layer->offset = offset, layer->activation = std::string(activation);
  DecoderLayer* object = layer.release();
  const auto free = [](void* bytes) { delete static_cast<DecoderLayer*>(bytes); };
  return at::from_blob(object, {sizeof(DecoderLayer)}, free, at::TensorOptions(at::kByte));
}

// Normalises, if the layer has norms of heads, and rotates the heads of queries and keys in place.
// qkv: (tokens, (H + 2 G) * E), contiguous. cos, sin: (B, T, 1, P), float32.
void rotate_heads(const Tensor& qkv, const DecoderLayer& layer, const Tensor& cos,
                  const Tensor& sin) {
  const int64_t H = layer.H, G = layer.G, E = layer.E;
  const auto &q_norm = layer.norms[kQueryNorm], &k_norm = layer.norms[kKeyNorm];
  const int64_t tokens = qkv.size(0), P = cos.size(-1);
  TORCH_CHECK(qkv.is_contiguous() && qkv.size(1) == (H + 2 * G) * E, "heads of another width");
  TORCH_CHECK(cos.numel() == tokens * P && sin.sizes() == cos.sizes() && 2 * P <= E && H > 0);
  TORCH_CHECK(cos.scalar_type() == at::kFloat && sin.scalar_type() == at::kFloat);
  for (const auto* norm : {&q_norm, &k_norm})
    TORCH_CHECK(!*norm || ((*norm)->scalar_type() == qkv.scalar_type() && (*norm)->numel() == E &&
                           (*norm)->is_contiguous()), "a norm not of ", E, " channels");
  const Tensor c = cos.contiguous(), s = sin.contiguous();
  with_result(qkv, qkv, [&](const auto*, auto* data) {
    using T = std::remove_pointer_t<decltype(data)>;
    const HeadRotation<T> rotation{
        H, G, E, P, data_of<float>(c), data_of<float>(s), q_norm ? data_of<T>(*q_norm) : nullptr,
        k_norm ? data_of<T>(*k_norm) : nullptr, static_cast<float>(layer.eps),
        static_cast<float>(layer.offset)};
    at::parallel_for(0, tokens, kGrain / qkv.size(1) + 1, [&](int64_t first, int64_t last) {
      for (int64_t token = first; token < last; token++) rotation.rotate_token(data, token);
    });
  });
}

}  // namespace
