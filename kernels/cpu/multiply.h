// The product of a linear layer, for operators in other files than linear_operators.cpp.

#pragma once

#include "torch.h"

namespace gpt_flex {

constexpr int64_t kDense = -1;  // in place of a format: the weight is not packed

struct Linear {
  at::Tensor weight;  // packed, or (N, K) if the format is kDense
  std::optional<at::Tensor> bias;
  // Of quantized_linear: format of the packed weight, inputs that share a scale, outputs without
  // padding. If the format is kDense, the other two are not used.
  int64_t format, block, out_features;
};

// Returns the product of x, (M, K), and a linear's weight, plus its bias: (M, out_features). It is
// the result of the operator quantized_linear or linear.
at::Tensor multiply(const at::Tensor& x, const Linear& linear);

}  // namespace gpt_flex
