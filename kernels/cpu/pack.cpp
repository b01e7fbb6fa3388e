// The operator pack: writes a quantised linear's weights in the order of layout.h (pack.h). The
// operators layout and strip_bytes tell Python what layout.h says.

#include "pack.h"
#include "torch.h"

namespace {

using at::Tensor;

// Writes all strips to the beginning of `buffer`. Returns false if the scales do not fit this
// format.
template <Format F>
bool pack_as(const StoredLinear& from, const Tensor& buffer) {
  const int64_t strips = (from.N + kStrip - 1) / kStrip;
  const int64_t bytes = strips * strip_bytes<F>(from.bytes, from.block);
  TORCH_CHECK(buffer.numel() >= bytes, buffer.numel(), " bytes for ", bytes);
  auto* to = buffer.mutable_data_ptr<uint8_t>();
  TORCH_CHECK(reinterpret_cast<uintptr_t>(to) % kLine == 0,
              "the buffer begins within a cache line");
  return pack_strips<F>(from, to);
}

// Writes the argument `packed` of quantized_linear to the beginning of `buffer`, and returns its
// format. int4 scales take a byte each, or two where a scale is no multiple of its output's unit.
int64_t pack(const Tensor& weight, const Tensor& scales, const std::optional<Tensor>& zeros,
             const Tensor& buffer) {
  const int64_t N = weight.size(0), bytes = weight.size(1);
  TORCH_CHECK(N > 0 && scales.numel() >= N, scales.numel(), " scales of ", N, " outputs");
  const int64_t groups = scales.numel() / N;
  TORCH_CHECK(weight.is_contiguous() && scales.is_contiguous() && buffer.is_contiguous());
  StoredLinear from{static_cast<const uint8_t*>(weight.const_data_ptr())};
  from.N = N, from.bytes = bytes, from.groups = groups, from.block = 2 * bytes / groups;
  if (!zeros) {
    from.output_scales = scales.const_data_ptr<float>();
    return pack_as<kInt8>(from, buffer), kInt8;
  }
  TORCH_CHECK(zeros->is_contiguous() && zeros->numel() == N * ((groups + 1) / 2));
  const bool fits = from.block > 0 && from.block % kChunk == 0 && kSpan % from.block == 0;
  TORCH_CHECK(fits, "a block of ", from.block);
  from.scales = reinterpret_cast<const Half*>(scales.const_data_ptr<at::Half>());
  from.zeros = zeros->const_data_ptr<uint8_t>();
  if (pack_as<kInt4>(from, buffer)) return kInt4;
  return pack_as<kInt4Half>(from, buffer), kInt4Half;
}

// Returns the fields of Layout in build.py.
std::vector<int64_t> layout() { return {kStrip, kChunk, kInt8Block, kInt8, kInt4, kInt4Half}; }

}  // namespace

TORCH_LIBRARY_IMPL(gpt_flex, CPU, library) { library.impl("pack", pack); }

// Operators without tensors have no device.
TORCH_LIBRARY_IMPL(gpt_flex, CompositeExplicitAutograd, library) {
  library.impl("layout", layout);
  library.impl("strip_bytes", strip_bytes_of);
}
