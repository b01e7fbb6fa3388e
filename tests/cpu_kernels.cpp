// Runs the kernels of kernels/cpu on random inputs of random shapes, and prints one line for each
// case: its name, its shape and a checksum of the bits of its outputs. test_instruction_sets.py
// compiles this file for several instruction sets and compares the lines.
//
//     cpu_kernels SEED CASES

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "linear.h"
#include "quantized_linear.h"

namespace {

struct Random {  // xorshift64*: the same numbers on every machine
  uint64_t state;

  uint64_t next() {
    state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
    return state * 0x2545f4914f6cdd1dull;
  }
  int64_t below(int64_t n) { return static_cast<int64_t>(next() >> 33) % n; }
  float uniform() { return static_cast<float>(static_cast<int64_t>(next() >> 40)) * 0x1p-23f - 1; }
  // Returns numbers whose sizes differ by up to 2^16, with some zeros.
  float wide() {
    return below(16) ? uniform() * std::ldexp(1.f, static_cast<int>(below(16)) - 8) : 0;
  }
};

uint64_t checksum(const void* data, size_t bytes) {  // FNV-1a
  uint64_t sum = 0xcbf29ce484222325ull;
  for (size_t i = 0; i < bytes; i++)
    sum = (sum ^ static_cast<const uint8_t*>(data)[i]) * 0x100000001b3ull;
  return sum;
}

template <class T>
constexpr Dtype kDtype = kFloat32;
template <>
constexpr Dtype kDtype<BFloat16> = kBFloat16;
template <>
constexpr Dtype kDtype<Half> = kFloat16;

template <class T>
std::vector<T> random_values(Random& random, int64_t count) {
  std::vector<T> values(count);
  for (auto& value : values) value = to_type<T>(random.wide());
  return values;
}

// Random bytes are valid packed weights, but scales must be finite.
template <Format F>
std::vector<uint8_t> random_packed(Random& random, int64_t N, int64_t K, int64_t block) {
  const int64_t strip = strip_bytes<F>(K * bits(F) / 8, block), spans = K / kSpan;
  std::vector<uint8_t> data(N / kStrip * strip);
  for (auto& byte : data) byte = static_cast<uint8_t>(random.next() >> 32);
  for (int64_t n = 0; n < N / kStrip; n++) {
    float scales[kStrip];
    for (auto& scale : scales) scale = std::abs(random.wide());
    std::memcpy(&data[n * strip], scales, sizeof(scales));
    for (int64_t s = 0; F == kInt4Half && s < spans; s++)
      for (int64_t i = 0; i < kSpan / block * kStrip; i++) {
        const Half scale = to_type<Half>(random.wide());
        std::memcpy(&data[n * strip + sizeof(scales) + s * span_bytes<F>(block) + 2 * i], &scale, 2);
      }
  }
  return data;
}

template <class T>
void print(const char* name, int64_t M, int64_t N, int64_t K, int64_t block,
           const std::vector<T>& y) {
  std::printf("%s bytes=%d M=%d N=%d K=%d block=%d %016llx\n", name, static_cast<int>(sizeof(T)),
              static_cast<int>(M), static_cast<int>(N), static_cast<int>(K),
              static_cast<int>(block),
              static_cast<unsigned long long>(checksum(y.data(), y.size() * sizeof(T))));
}

// Computes in one call, then row by row, and prints both.
template <Format F, class T>
void quantized_case(Random& random, const char* name) {
  const int64_t M = 1 + random.below(random.below(4) ? 9 : 260), N = kStrip * (1 + random.below(5));
  const int64_t K = kSpan * (1 + random.below(6));
  const int64_t block = F == kInt8 ? kInt8Block : kChunk << random.below(4);
  const auto data = random_packed<F>(random, N, K, block);
  const auto x = random_values<T>(random, M * K), bias = random_values<T>(random, N);
  const PackedWeights w{data.data(), N, K, block, strip_bytes<F>(K * bits(F) / 8, block)};
  FixedPointRows rows;
  std::vector<T> together(M * N), alone(M * N);
  const void* b = random.below(2) ? bias.data() : nullptr;
  reserve_rows(M, w, rows), to_fixed_point(x.data(), w, 0, M, rows);
  multiply<F>(w, rows, 0, N / kStrip, {together.data(), b, kDtype<T>, M, N});
  for (int64_t m = 0; m < M; m++) {
    reserve_rows(1, w, rows), to_fixed_point(x.data() + m * K, w, 0, 1, rows);
    multiply<F>(w, rows, 0, N / kStrip, {alone.data() + m * N, b, kDtype<T>, 1, N});
  }
  print(name, M, N, K, block, together), print(name, M, N, K, block, alone);
}

template <class W>
void dense_case(Random& random, const char* name) {
  const int64_t M = 1 + random.below(40), N = 1 + random.below(70), K = 1 + random.below(600);
  const int64_t stride = (K + kStrip - 1) / kStrip * kStrip;
  const auto weights = random_values<W>(random, N * K), x = random_values<W>(random, M * K);
  const auto bias = random_values<W>(random, N);
  std::vector<float> rows(M * stride);
  to_float_rows(x.data(), K, stride, 0, M, rows.data());
  std::vector<W> y(M * N);
  const Output out{y.data(), random.below(2) ? bias.data() : nullptr, kDtype<W>, M, N};
  const DenseWeights w{weights.data(), N, K};
  if (M <= kMaxFewRows) multiply_few_rows<W>(w, rows.data(), stride, 0, N, out);
  else multiply_many_rows<W>(w, rows.data(), stride, 0, (N + kStrip - 1) / kStrip, out);
  print(name, M, N, K, 0, y);
}

}  // namespace

int main(int, char** arguments) {
  Random random{std::strtoull(arguments[1], nullptr, 10) * 2 + 1};
  for (int i = 0; i < 8; i++) random.next();
  for (int64_t left = std::atoll(arguments[2]); left > 0; left--) {
    quantized_case<kInt8, BFloat16>(random, "int8"), quantized_case<kInt8, Half>(random, "int8");
    quantized_case<kInt4, float>(random, "int4"), quantized_case<kInt4, BFloat16>(random, "int4");
    quantized_case<kInt4Half, float>(random, "int4_half");
    quantized_case<kInt4Half, Half>(random, "int4_half");
    dense_case<BFloat16>(random, "dense_bfloat16"), dense_case<Half>(random, "dense_float16");
  }
}
