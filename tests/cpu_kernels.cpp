// Runs the kernels of kernels/cpu on random inputs of random shapes, and prints lines for each
// case: its name, its shape and a checksum of the bits of its outputs. test_instruction_sets.py
// compiles this file for several instruction sets and compares the lines.
//
//     cpu_kernels SEED CASES

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "attention.h"
#include "linear.h"
#include "neurons.h"
#include "pack.h"
#include "quantized_linear.h"
#include "rms_norm.h"
#include "rotation.h"

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
  const int64_t strip = strip_bytes<F>(K * bits(F) / 8, block), spans = spans_of(K);
  std::vector<uint8_t> data(N / kStrip * strip);
  for (auto& byte : data) byte = static_cast<uint8_t>(random.next() >> 32);
  for (int64_t n = 0; n < N / kStrip; n++) {
    float scales[kStrip];
    for (auto& scale : scales) scale = std::abs(random.wide());
    std::memcpy(&data[n * strip], scales, sizeof(scales));
    for (int64_t s = 0; F == kInt4Half && s < spans; s++)
      for (int64_t i = 0; i < kSpan / block * kStrip; i++) {
        const Half scale = to_type<Half>(random.wide());
        const int64_t span = sizeof(scales) + s * span_bytes<F>(block);
        std::memcpy(&data[n * strip + span + 2 * i], &scale, sizeof(scale));
      }
  }
  return data;
}

// Makes all NaN alike: their bits may differ between instruction sets.
template <class T>
std::vector<T> with_one_nan(std::vector<T> values) {
  if constexpr (!std::is_same_v<T, uint8_t>)
    for (auto& value : values)
      if (std::isnan(to_float(value))) value = to_type<T>(std::nanf(""));
  return values;
}

template <class T>
void print(const char* name, int64_t M, int64_t N, int64_t K, int64_t block,
           const std::vector<T>& outputs) {
  const auto y = with_one_nan(outputs);
  std::printf("%s bytes=%d M=%d N=%d K=%d block=%d %016llx\n", name, static_cast<int>(sizeof(T)),
              static_cast<int>(M), static_cast<int>(N), static_cast<int>(K),
              static_cast<int>(block),
              static_cast<unsigned long long>(checksum(y.data(), y.size() * sizeof(T))));
}

// Computes in one call, then row by row, and prints both. In a third of the cases an input is NaN
// or infinite.
template <Format F, class T>
void quantized_case(Random& random, const char* name) {
  const int64_t M = 1 + random.below(random.below(4) ? 9 : 260), N = kStrip * (1 + random.below(5));
  const int64_t block = F == kInt8 ? kInt8Block : kChunk << random.below(4);
  const int64_t inputs = 1 + random.below(6 * kSpan);
  const int64_t K = strip_inputs<F>((inputs * bits(F) + 7) / 8, block);
  const auto data = random_packed<F>(random, N, K, block);
  auto x = random_values<T>(random, M * inputs);
  const auto bias = random_values<T>(random, N);
  if (random.below(3) == 0)
    x[random.below(M * inputs)] = to_type<T>(random.below(2) ? std::nanf("") : -kMasked);
  const PackedWeights w{data.data(), N, K, block, strip_bytes<F>(K * bits(F) / 8, block)};
  FixedPointRows rows;
  std::vector<T> together(M * N), alone(M * N);
  const void* b = random.below(2) ? bias.data() : nullptr;
  reserve_rows<F>(M, w, rows), to_fixed_point(x.data(), inputs, w, 0, M, rows);
  multiply<F>(w, rows, 0, N / kStrip, {together.data(), b, kDtype<T>, M, N});
  for (int64_t m = 0; m < M; m++) {
    reserve_rows<F>(1, w, rows), to_fixed_point(x.data() + m * inputs, inputs, w, 0, 1, rows);
    multiply<F>(w, rows, 0, N / kStrip, {alone.data() + m * N, b, kDtype<T>, 1, N});
  }
  print(name, M, N, inputs, block, together), print(name, M, N, inputs, block, alone);
}

// Computes in one call, then row by row if the rows are few, and prints both.
template <class W>
void dense_case(Random& random, const char* name) {
  const int64_t M = 1 + random.below(random.below(2) ? kMaxFewRows : 40);
  const int64_t N = 1 + random.below(70), K = 1 + random.below(600);
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
  std::vector<W> alone = y;
  for (int64_t m = 0; m < M && M <= kMaxFewRows; m++)
    multiply_few_rows<W>(w, rows.data() + m * stride, stride, 0, N,
                         {alone.data() + m * N, out.bias, kDtype<W>, 1, N});
  print(name, M, N, K, 0, y), print(name, M, N, K, 0, alone);
}

template <class T>
void norm_case(Random& random, const char* name) {
  const int64_t D = 1 + random.below(300);
  const auto x = random_values<T>(random, D), weight = random_values<T>(random, D);
  std::vector<T> y(D);
  const T* factors = random.below(4) ? weight.data() : nullptr;
  const float offset = static_cast<float>(random.below(2));
  rms_norm(RmsNorm<T>{D, factors, 1e-6f, offset}, x.data(), y.data());
  print(name, D, 0, 0, 0, y);
  for (int64_t i = 0; i < D; i += kStrip)
    store_some(y.data() + i, D - i, gelu_tanh(load_some(x.data() + i, D - i)));
  print("gelu", D, 0, 0, 0, y);
  for (int64_t i = 0; i < D; i += kStrip)
    store_some(y.data() + i, D - i, silu(load_some(x.data() + i, D - i)));
  print("silu", D, 0, 0, 0, y);
}

template <class T>
void rotation_case(Random& random, const char* name) {
  const int64_t H = 1 + random.below(4), G = 1 + random.below(3), P = 1 + random.below(40);
  const int64_t E = 2 * P + random.below(2) * random.below(20), tokens = 1 + random.below(3);
  auto heads = random_values<T>(random, tokens * (H + 2 * G) * E);
  const auto cos = random_values<float>(random, tokens * P);
  const auto sin = random_values<float>(random, tokens * P);
  const auto norms = random_values<T>(random, 2 * E);
  const bool normed = random.below(2);
  const HeadRotation<T> rotation{H, G, E, P, cos.data(), sin.data(),
                                 normed ? norms.data() : nullptr,
                                 normed ? norms.data() + E : nullptr, 1e-6f,
                                 static_cast<float>(random.below(2))};
  for (int64_t t = 0; t < tokens; t++) rotation.rotate_token(heads.data(), t);
  print(name, tokens, H, E, P, heads);
}

// Computes all heads together, then one query of each head alone; prints both. In half of the cases
// the scores have a softcap, in a third of these a query is NaN.
template <class T>
void attention_case(Random& random, const char* name) {
  const int64_t B = 1 + random.below(2), G = 1 + random.below(4), Q = 1 + random.below(9);
  const int64_t S = 1 + random.below(200), E = kStrip * (1 + random.below(4)), row = S * G * E;
  const int exponent = static_cast<int>(random.below(24)) - 4;
  const float softcap = exponent < 8 ? std::ldexp(1.f, exponent) : 0;
  auto q = random_values<T>(random, B * G * Q * E);
  if (softcap != 0 && random.below(3) == 0)
    q[random.below(B * G * Q * E)] = to_type<T>(std::nanf(""));
  const auto k = random_values<T>(random, B * row);
  const auto v = random_values<T>(random, B * row);
  std::vector<T> y(B * G * Q * E), alone(y.size()), mask;
  for (int64_t i = 0; i < B * Q; i++) {
    const int64_t last = random.below(S);
    for (int64_t s = 0; s < S; s++) mask.push_back(to_type<T>(s > last ? kMasked : 0.f));
  }
  const Heads<T> keys{k.data(), row, E, G * E}, values{v.data(), row, E, G * E};
  Attention<T> all{G, Q, S, E, Q, q.data(), G * Q * E, keys, values, mask.data(), y.data(),
                   random.uniform(), softcap};
  attend_heads(all, 0, B * G);
  all.y = alone.data();
  for (int64_t i = 0; i < Q; i++) attend_heads(part_of_queries(all, i, Q), 0, B * G);
  print(name, B, G, Q, S, y), print(name, B, G, Q, S, alone);
}

template <class W, class T>
void neurons_case(Random& random, const char* name) {
  constexpr bool kNibbles = std::is_same_v<W, Nibbles>, kIntegers = std::is_same_v<W, int8_t>;
  const int64_t F = 1 + random.below(40), inner = 1 + random.below(2), N = 1 + random.below(6);
  const int64_t group = kChunk << random.below(3), groups = 1 + random.below(7);
  const int64_t dim = group * groups;
  Layer<T> layer{};
  int64_t end = 0;  // of a record's bytes so far
  for (int64_t i = 0; i <= inner; i++) {
    layer.matrices[i].scales = end, end += kNibbles ? 2 * groups : 0;
    layer.matrices[i].weights = end, end += dim * bits_of_weight<W> / 8;
    layer.matrices[i].zeros = end, end += kNibbles ? 2 * groups : 0;
  }
  const int64_t stride = (end + kLine - 1) / kLine * kLine;
  std::vector<uint8_t> records(F * stride);
  for (auto& byte : records) byte = static_cast<uint8_t>(random.next() >> 32);
  for (int64_t f = 0; f < F; f++)
    for (int64_t i = 0; i <= inner; i++) {
      uint8_t* record = &records[f * stride];
      for (int64_t g = 0; kNibbles && g < groups; g++) {
        const Half scale = to_type<Half>(random.uniform());
        std::memcpy(record + layer.matrices[i].scales + 2 * g, &scale, sizeof(scale));
      }
      for (int64_t d = 0; !kNibbles && !kIntegers && d < dim; d++) {
        const T weight = to_type<T>(random.uniform());
        std::memcpy(record + layer.matrices[i].weights + d * sizeof(T), &weight, sizeof(weight));
      }
    }
  std::vector<int64_t> ids(F);
  for (int64_t f = 0; f < F; f++) ids[f] = random.below(7) ? f : F;
  const auto bias = random_values<T>(random, (F + 1) * inner);
  const auto scales = random_values<float>(random, (F + 1) * inner);
  const auto inputs = random_values<T>(random, N * dim);
  layer.records = records.data(), layer.ids = ids.data(), layer.bias = bias.data();
  layer.scales = kIntegers ? scales.data() : nullptr, layer.stride = stride;
  layer.inner = inner, layer.empty = F, layer.dim = dim, layer.group = group;
  std::vector<float> rows(N * dim), sums(N * dim), y(N * dim);
  arrange_rows<W>(inputs.data(), N, dim, rows.data());
  add_neurons<W>(layer, nullptr, 0, F, rows.data(), N, sums.data());
  add_parts<W>(sums.data(), 1, N, dim, y.data());
  print(name, N, F, dim, inner, y);
}

template <Format F>
void pack_case(Random& random, const char* name) {
  const int64_t N = 1 + random.below(70);
  const int64_t block = F == kInt8 ? kInt8Block : kChunk << random.below(4);
  const int64_t groups = 1 + random.below(9);
  const int64_t bytes = F == kInt8 ? 1 + random.below(900) : groups * block / 2;
  std::vector<uint8_t> weight(N * bytes), zeros(N * ((groups + 1) / 2));
  for (auto& byte : weight) byte = static_cast<uint8_t>(random.next() >> 32);
  for (auto& byte : zeros) byte = static_cast<uint8_t>(random.next() >> 32);
  const auto output_scales = random_values<float>(random, N);
  auto scales = random_values<Half>(random, N * groups);
  // Multiples that a byte holds, in half of the cases.
  if (random.below(2))
    for (auto& scale : scales) scale = to_type<Half>(static_cast<float>(1 + random.below(255)));
  const StoredLinear from{weight.data(), output_scales.data(), scales.data(), zeros.data(),
                          N, bytes, groups, block};
  const int64_t strip = strip_bytes<F>(bytes, block), strips = (N + kStrip - 1) / kStrip;
  std::vector<uint8_t> memory(strips * strip + kLine);
  uint8_t* to = memory.data() + kLine - reinterpret_cast<uintptr_t>(memory.data()) % kLine;
  const bool fits = pack_strips<F>(from, to);
  std::vector<uint8_t> packed(to, to + (fits ? strips * strip : 0));
  print(name, N, bytes, groups, block, packed);
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
    attention_case<BFloat16>(random, "attention"), attention_case<Half>(random, "attention");
    attention_case<float>(random, "attention");
    norm_case<BFloat16>(random, "norm"), norm_case<Half>(random, "norm");
    norm_case<float>(random, "norm");
    rotation_case<BFloat16>(random, "rotation"), rotation_case<Half>(random, "rotation");
    rotation_case<float>(random, "rotation");
    neurons_case<BFloat16, BFloat16>(random, "neurons");
    neurons_case<Half, Half>(random, "neurons");
    neurons_case<int8_t, BFloat16>(random, "neurons_int8");
    neurons_case<Nibbles, float>(random, "neurons_int4");
    pack_case<kInt8>(random, "pack_int8"), pack_case<kInt4>(random, "pack_int4");
    pack_case<kInt4Half>(random, "pack_int4_half");
  }
}
