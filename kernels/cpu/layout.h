#pragma once

#include <cstdint>

namespace {

constexpr int64_t kStrip = 16;    // outputs
constexpr int64_t kSpan = 256;    // inputs
constexpr int64_t kChunk = 32;    // inputs that are unpacked together
constexpr int64_t kLine = 64;     // bytes that memory is read by

// Bits of a weight, and bytes of a group's scale. One byte is a multiple of the output's own scale;
// int8 has no groups and no zeros but 128.
enum Format { kInt8 = 80, kInt4 = 41, kInt4Half = 42 };
constexpr int64_t bits(Format format) { return format / 10; }
constexpr int64_t scale_bytes(Format format) { return format % 10; }

// A span's header: per block the scales of 16 outputs, then per block their zeros, two to a byte.
template <Format F>
constexpr int64_t zeros_at(int64_t block, int64_t b) {
  return kSpan / block * kStrip * scale_bytes(F) + b * kStrip / 2;
}
template <Format F>
constexpr int64_t header_bytes(int64_t block) {
  return F == kInt8 ? 0 : (zeros_at<F>(block, kSpan / block) + kLine - 1) / kLine * kLine;
}
template <Format F>
constexpr int64_t span_bytes(int64_t block) {
  return header_bytes<F>(block) + kStrip * kSpan * bits(F) / 8;
}

}  // namespace
