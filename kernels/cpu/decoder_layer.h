// A decoder layer: attention and a gated feed-forward, each with a residual sum. Operators get it
// as one tensor, whose bytes are a C++ object that refers to the weights: with a list of all
// weights and settings, a call from Python takes 15 microseconds longer.
//
// Start at decoder_layer, the operator that makes the tensor.
//
// Shapes: B rows of the batch, T new tokens, D channels, F of the feed-forward, H query heads, G
// key/value heads, R = H / G, E channels of a head, P rotated pairs of channels.

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
using OptionalTensors = c10::List<std::optional<Tensor>>;

// The order of the linears and norms in the arguments of decoder_layer. kAttentionOutput and
// kFeedForwardOutput are norms of what is added to x.
enum { kWqkv, kWo, kW13, kW2, kLinears };
enum {
  kAttentionNorm, kAttentionOutput, kFeedForwardNorm, kFeedForwardOutput, kQueryNorm, kKeyNorm,
  kNorms
};

struct DecoderLayer {
  // The object's own address, by which decoder_layer_of recognises it. A copy of the tensor's bytes
  // still has that of the original.
  const DecoderLayer* self = this;
  std::array<gpt_flex::Linear, kLinears> linears;
  std::array<std::optional<Tensor>, kNorms> norms;  // weights of RMS norms, (D) or (E), or none
  int64_t H, G, E;
  double eps, offset;      // of all norms, see fast_rms_norm
  std::string activation;  // see gated_by_name

  // Returns the product of x, (M, K), and a linear's weight: (M, N).
  Tensor multiply(int linear, const Tensor& x) const {
    return gpt_flex::multiply(x, linears[linear]);
  }

  // Returns the norm of x, (M, D), or x if the layer has no such norm.
  Tensor normed(int norm, const Tensor& x) const {
    return norms[norm] ? fast_rms_norm(x, norms[norm], eps, offset) : x;
  }
};

// Returns the object in a tensor that decoder_layer returned; it lives as long as the tensor.
// Raises an error for other tensors and for copies.
const DecoderLayer& decoder_layer_of(const Tensor& layer) {
  const bool fits = layer.nbytes() == sizeof(DecoderLayer);
  const auto* object = static_cast<const DecoderLayer*>(layer.const_data_ptr());
  TORCH_CHECK(fits && object->self == object, "no tensor of decoder_layer, or a copy of one");
  return *object;
}

// Raises an error unless the tensor, if there is one, is on the CPU: kernels read its memory.
void check_on_cpu(const std::optional<Tensor>& tensor) {
  TORCH_CHECK(!tensor || tensor->device().is_cpu(), "a layer with a tensor on another device");
}

// Returns a tensor of bytes that is a DecoderLayer, and owns it. weights, biases: of the linears;
// packings: (3 * kLinears), the three numbers of each, see gpt_flex::Linear. norms: their weights,
// or none. Linears and norms are in the order of the enumerations above. eps, offset: of all norms.
// activation: of the gate, see gated_by_name. heads: H, G and E. The layer keeps the tensors: their
// places in memory must stay, their numbers may change.
Tensor decoder_layer(at::TensorList weights, const OptionalTensors& biases,
                     at::IntArrayRef packings, const OptionalTensors& norms, double eps,
                     double offset, c10::string_view activation, at::IntArrayRef heads) {
  TORCH_CHECK(weights.size() == kLinears && biases.size() == kLinears && norms.size() == kNorms &&
              packings.size() == 3 * kLinears && heads.size() == 3, "lists of other lengths");
  auto layer = std::make_unique<DecoderLayer>();
  for (int64_t i = 0; i < kLinears; i++) {
    const int64_t* packing = &packings[3 * i];
    layer->linears[i] = {weights[i], biases[i], packing[0], packing[1], packing[2]};
    check_on_cpu(weights[i]), check_on_cpu(biases[i]);
  }
  for (int64_t i = 0; i < kNorms; i++) layer->norms[i] = norms[i], check_on_cpu(norms[i]);
  const int64_t H = layer->H = heads[0], G = layer->G = heads[1], E = layer->E = heads[2];
  TORCH_CHECK(G > 0 && E > 0 && H > 0 && H % G == 0, H, " heads for ", G, " of ", E, " channels");
  layer->eps = eps, layer->offset = offset, layer->activation = std::string(activation);
  const auto free = [](void* object) { delete static_cast<DecoderLayer*>(object); };
  const auto options = at::TensorOptions(at::kByte);
  const Tensor tensor = at::from_blob(layer.get(), {sizeof(DecoderLayer)}, free, options);
  return layer.release(), tensor;
}

// Normalises, if the layer has norms of heads, and rotates the heads of queries and keys in place.
// heads: (B, T, (H + 2 G) * E), contiguous. cos, sin: (B, T, 1, P), float32.
void rotate_heads(const Tensor& heads, const DecoderLayer& layer, const Tensor& cos,
                  const Tensor& sin) {
  const int64_t H = layer.H, G = layer.G, E = layer.E, P = cos.size(-1);
  const int64_t B = heads.size(0), T = heads.size(1), width = heads.size(2);
  const auto &q_norm = layer.norms[kQueryNorm], &k_norm = layer.norms[kKeyNorm];
  TORCH_CHECK(heads.is_contiguous() && width == (H + 2 * G) * E, "heads of another width");
  const bool fits = cos.sizes() == at::IntArrayRef{B, T, 1, P} && sin.sizes() == cos.sizes();
  TORCH_CHECK(fits && 2 * P <= E, "a rotation of other tokens or more channels");
  TORCH_CHECK(cos.scalar_type() == at::kFloat && sin.scalar_type() == at::kFloat);
  for (const auto* norm : {&q_norm, &k_norm})
    TORCH_CHECK(!*norm || ((*norm)->scalar_type() == heads.scalar_type() &&
                           (*norm)->numel() == E && (*norm)->is_contiguous()),
                "a norm not of ", E, " channels");
  const Tensor c = cos.contiguous(), s = sin.contiguous();
  with_result(heads, heads, [&](const auto*, auto* data) {
    using Number = std::remove_pointer_t<decltype(data)>;
    const HeadRotation<Number> rotation{
        H, G, E, P, data_of<float>(c), data_of<float>(s),
        q_norm ? data_of<Number>(*q_norm) : nullptr, k_norm ? data_of<Number>(*k_norm) : nullptr,
        static_cast<float>(layer.eps), static_cast<float>(layer.offset)};
    at::parallel_for(0, B * T, kGrain / width + 1, [&](int64_t first, int64_t last) {
      for (int64_t token = first; token < last; token++) rotation.rotate_token(data, token);
    });
  });
}

}  // namespace
