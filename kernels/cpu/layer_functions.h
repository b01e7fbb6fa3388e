// Norms, activations, gates and sums of tensors. fast_rms_norm, fast_gelu_tanh and fast_silu are
// operators; project_heads and finish_layer call fast_rms_norm, gated_by_name and add_to. PyTorch's
// norm of one row takes twenty times as long, its GELU of one row three to four times.

#pragma once

#include "functions.h"
#include "rms_norm.h"
#include "torch.h"

namespace {

using at::Tensor;

// x: (..., D). weight: (D) of x's dtype, or none. Returns the RMS norm of x over D, times weight +
// offset, in the shape and dtype of x.
Tensor fast_rms_norm(const Tensor& x, const std::optional<Tensor>& weight, double eps,
                     double offset) {
  const int64_t D = x.size(-1), rows = D ? x.numel() / D : 0;
  TORCH_CHECK(!weight || (weight->is_contiguous() && weight->numel() == D &&
                          weight->scalar_type() == x.scalar_type()), "a weight not of ", D);
  const Tensor from = x.contiguous();
  Tensor y = at::empty(x.sizes(), x.options());
  with_data(from, [&](const auto* data) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(data)>>;
    const RmsNorm<T> norm{D, weight ? data_of<T>(*weight) : nullptr, static_cast<float>(eps),
                          static_cast<float>(offset)};
    T* to = static_cast<T*>(y.mutable_data_ptr());
    at::parallel_for(0, rows, kGrain / std::max<int64_t>(D, 1) + 1,
                     [&](int64_t first, int64_t last) {
                       for (int64_t row = first; row < last; row++)
                         rms_norm(norm, data + row * D, to + row * D);
                     });
  });
  return y;
}

// The activations as types. They are inlined: a call takes about three times as long, see
// functions.h.
struct Silu {
  [[gnu::always_inline]] Floats operator()(Floats x) const { return silu(x); }
};
struct GeluTanh {
  [[gnu::always_inline]] Floats operator()(Floats x) const { return gelu_tanh(x); }
};

// Strips of activations for which one more thread pays; a strip takes about 10 ns.
constexpr int64_t kActivationGrain = 1024;

// Calls use(data, result) with the data of x and y, two contiguous tensors of one dtype.
template <class Use>
void with_result(const Tensor& x, const Tensor& y, Use use) {
  with_data(x, [&](const auto* data) {
    use(data, static_cast<std::remove_const_t<std::remove_pointer_t<decltype(data)>>*>(
                  y.mutable_data_ptr()));
  });
}

// Returns activation(x).
template <class Activation>
Tensor activated(const Tensor& x, Activation activation) {
  const Tensor from = x.contiguous(), y = at::empty(x.sizes(), x.options());
  with_result(from, y, [&](const auto* data, auto* to) {
    const int64_t count = x.numel(), strips = (count + kStrip - 1) / kStrip;
    at::parallel_for(0, strips, kActivationGrain, [&](int64_t first, int64_t last) {
      for (int64_t i = first * kStrip; i < std::min(count, last * kStrip); i += kStrip)
        store_some(to + i, count - i, activation(load_some(data + i, count - i)));
    });
  });
  return y;
}
Tensor fast_gelu_tanh(const Tensor& x) { return activated(x, GeluTanh()); }
Tensor fast_silu(const Tensor& x) { return activated(x, Silu()); }

// Returns v rounded to T.
template <class T>
inline Floats rounded(const Floats& v) {
  T numbers[kStrip];
  store(numbers, v);
  return load(numbers);
}

// Returns activation(first half) * second half of each row of x, (M, 2 K) -> (M, K). Rounds the
// activation to the dtype first, so that the bits are those of separate operators.
template <class Activation>
Tensor gated_by(const Tensor& x, Activation activation) {
  const int64_t M = x.size(0), K = x.size(1) / 2, strips = (K + kStrip - 1) / kStrip;
  TORCH_CHECK(x.size(1) == 2 * K, "halves of ", x.size(1), " numbers");
  const Tensor from = x.contiguous(), y = at::empty({M, K}, x.options());
  with_result(from, y, [&](const auto* data, auto* to) {
    using T = std::remove_pointer_t<decltype(to)>;
    at::parallel_for(0, M * strips, kActivationGrain, [&](int64_t first, int64_t last) {
      for (int64_t strip = first; strip < last;) {
        const int64_t m = strip / strips, end = std::min(last, (m + 1) * strips);
        const T *gate = data + m * 2 * K, *up = gate + K;
        for (; strip < end; strip++) {
          const int64_t k = (strip - m * strips) * kStrip;
          const Floats active = rounded<T>(activation(load_some(gate + k, K - k)));
          store_some(to + m * K + k, K - k, active * load_some(up + k, K - k));
        }
      }
    });
  });
  return y;
}

// Calls gated_by with the activation of this name, "silu" or "gelu_tanh".
Tensor gated_by_name(const Tensor& x, c10::string_view activation) {
  if (activation == "silu") return gated_by(x, Silu());
  TORCH_CHECK(activation == "gelu_tanh", "no gate by ", activation);
  return gated_by(x, GeluTanh());
}

// Adds other, (..., N), to y, (M, N), number by number. Both have the same dtype and number of
// rows; y is contiguous.
void add_to(const Tensor& y, const Tensor& other) {
  TORCH_CHECK(other.numel() == y.numel() && other.size(-1) == y.size(-1) &&
              other.scalar_type() == y.scalar_type(), "a sum of unlike tensors");
  const Tensor from = other.contiguous();
  with_result(from, y, [&](const auto* data, auto* to) {
    at::parallel_for(0, y.numel(), kGrain, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; i += kStrip)
        store_some(to + i, last - i, load_some(to + i, last - i) + load_some(data + i, last - i));
    });
  });
}

}  // namespace
