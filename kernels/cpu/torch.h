// PyTorch for the operators: its headers, and tensors as the plain types of the kernels. The single
// headers take half as long to compile as ATen/ATen.h.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <ATen/ops/zeros.h>
#include <c10/core/InferenceMode.h>
#include <torch/library.h>

#include "output.h"

namespace {

// Returns whether the tensor has one of the dtypes of the kernels.
inline bool is_supported(const at::Tensor& x) {
  const auto type = x.scalar_type();
  return type == at::kFloat || type == at::kBFloat16 || type == at::kHalf;
}

inline Dtype dtype_of(const at::Tensor& x) {
  TORCH_CHECK(is_supported(x), "the kernels take bfloat16, float16 and float32, not ", x.dtype());
  if (x.scalar_type() == at::kBFloat16) return kBFloat16;
  return x.scalar_type() == at::kHalf ? kFloat16 : kFloat32;
}

// Returns a tensor's data as T, which the caller knows to be the type of its numbers.
template <class T>
const T* data_of(const at::Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

// Calls `use` with the data of a contiguous tensor, as a pointer to BFloat16, Half or float;
// returns the result.
template <class Use>
auto with_data(const at::Tensor& x, Use use) {
  const Dtype dtype = dtype_of(x);
  if (dtype == kBFloat16) return use(data_of<BFloat16>(x));
  if (dtype == kFloat16) return use(data_of<Half>(x));
  return use(data_of<float>(x));
}

}  // namespace
