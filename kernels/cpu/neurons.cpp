// The operator neurons: a feed-forward layer with ReLU, of some of its neurons, for a few rows.
// neurons.h computes it; start at neurons.

#include "neurons.h"
#include "torch.h"

#include <numeric>

namespace {

using at::Tensor;
using Result = std::tuple<Tensor, int64_t>;

template <class T>
const T* data_of(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

// W: the type of weights.
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
                                 rows.data(), N, &sums[p * N * dim]);
  });
  Tensor y = at::empty({N, dim}, x.options().dtype(at::kFloat));
  add_parts<W>(sums.data(), parts, N, dim, y.mutable_data_ptr<float>());
  return {y, std::accumulate(active.begin(), active.end(), int64_t{0})};
}

template <class T>
Result neurons_as(const Tensor& x, const Tensor& records, const std::optional<Tensor>& entries,
                  const Tensor& ids, const Tensor& bias, const std::optional<Tensor>& scales,
                  at::IntArrayRef fields, int64_t bits, int64_t group) {
  Layer<T> layer{};
  layer.records = data_of<uint8_t>(records), layer.stride = records.stride(0);
  layer.ids = ids.const_data_ptr<int64_t>(), layer.empty = bias.size(0) - 1;
  layer.bias = data_of<T>(bias), layer.inner = bias.size(1);
  layer.scales = scales ? scales->const_data_ptr<float>() : nullptr;
  layer.dim = x.size(1), layer.group = group;
  for (int64_t i = 0; i <= layer.inner; i++)
    layer.matrices[i] = {fields[3 * i], fields[3 * i + 1], fields[3 * i + 2]};
  const int64_t* some = entries ? entries->const_data_ptr<int64_t>() : nullptr;
  const int64_t count = entries ? entries->numel() : records.size(0);
  if (bits == 8) return neurons_of<int8_t>(layer, some, count, x);
  if (bits == 4) return neurons_of<Nibbles>(layer, some, count, x);
  return neurons_of<T>(layer, some, count, x);
}

// x: (N, D). records: (C, stride) bytes. entries: the records to use, none: all. ids: (C,), the
// neuron of each record. bias: (F + 1, inner), of x's dtype; its last row belongs to empty records.
// scales: the same shape. fields: the first bytes of weights, scales and zero points of each matrix
// in a record. bits: 4 or 8 of a weight, or another number for weights of x's dtype. Returns (N, D)
// in float32, and how many neurons were active for a row.
Result neurons(const Tensor& x, const Tensor& records, const std::optional<Tensor>& entries,
               const Tensor& ids, const Tensor& bias, const std::optional<Tensor>& scales,
               at::IntArrayRef fields, int64_t bits, int64_t group) {
  const int64_t dim = x.size(1), inner = bias.size(1);
  TORCH_CHECK(dim % kChunk == 0 && group % kChunk == 0, dim, " inputs in groups of ", group);
  TORCH_CHECK(records.stride(1) == 1 && ids.is_contiguous() && bias.is_contiguous());
  TORCH_CHECK(static_cast<int64_t>(fields.size()) == 3 * (inner + 1) && inner <= 2);
  TORCH_CHECK(bias.scalar_type() == x.scalar_type(), "biases of another dtype than the rows");
  const auto dtype = x.scalar_type();
  const bool known = dtype == at::kBFloat16 || dtype == at::kHalf || dtype == at::kFloat;
  TORCH_CHECK(known, "rows of ", dtype);
  const auto compute = dtype == at::kBFloat16 ? neurons_as<BFloat16>
                       : dtype == at::kHalf   ? neurons_as<Half>
                                              : neurons_as<float>;
  return compute(x.contiguous(), records, entries, ids, bias, scales, fields, bits, group);
}

}  // namespace

TORCH_LIBRARY_IMPL(gpt_flex, CPU, library) { library.impl("neurons", neurons); }
