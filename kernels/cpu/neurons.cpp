// The operator neurons: a feed-forward layer with ReLU, of some of its neurons, for a few rows.
// neurons.h computes it; start at neurons.

#include "neurons.h"
#include "torch.h"

#include <numeric>

namespace {

using at::Tensor;
using Result = std::tuple<Tensor, int64_t>;

// W: the type of weights. x: contiguous.
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

// The arguments' shapes: at `neurons`.
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

// x: (N, D). records: (C, stride) bytes. entries: the records to use, none: all. ids: (C,), the
// neuron of each record. bias: (F + 1, inner), of x's dtype; its last row belongs to empty records.
// scales: the same shape. fields: the first bytes of weights, scales and zero points of each matrix
// in a record. bits: 4 or 8 of a weight, or another number for weights of x's dtype. Returns (N, D)
// in float32, and how many neurons were active for a row.
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

TORCH_LIBRARY_IMPL(gpt_flex, CPU, library) { library.impl("neurons", neurons); }
