// Products of bfloat16 rows with int8 and int4 weights, for CPUs with AVX-512 VNNI and BF16; at the
// end, of few rows with dense weights, by AMX where there is any.
//
// Start at `product`. Decoding is bound by the rate at which weights are read, so the arithmetic has
// to be cheap beside a load, and still exact. Activations are therefore written as 16-bit fixed-point
// numbers, one scale to a block of the row, and these as 256 * hi + lo: two bytes, and two of the
// byte products that vpdpbusd adds up exactly in 32 bits, or AMX for eight rows at once. What is lost
// is 2^-16 of a block's largest value, less than bfloat16 itself loses. A row's result has the same
// bits whatever rows are beside it, up to where a GEMM takes over.
//
// Packed weights, which `pack` writes, are read from the first byte to the last. 16 outputs are a
// strip: their scales, then spans of 256 inputs, each with the scales and zeros of its groups ahead
// of its tiles. A tile of 16 outputs by 4 inputs is a register, inputs of one output side by side,
// as vpdpbusd wants them. int8 is stored plus 128; of int4 two tiles share a register, the first in
// the low nibbles. Many rows are the business of a GEMM, which is given the weights in bfloat16.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <immintrin.h>
#include <torch/library.h>

#include <cmath>
#ifdef __AMX_INT8__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

using at::Tensor;

constexpr int64_t kStrip = 16;    // outputs
constexpr int64_t kSpan = 256;    // inputs
constexpr int64_t kChunk = 32;    // inputs that are unpacked together
constexpr int64_t kLine = 64;     // bytes that memory is read by
// Bytes; prefetched that far ahead memory is read 1.5 times as fast. At 2048 one thread of two was
// now and then, for a whole step, as slow as without; a page, and more, never.
constexpr int64_t kAhead = 4096;
constexpr int64_t kSums = 16;     // registers that add up, of the 32 that there are
constexpr int64_t kEight = 8;     // rows that an AMX tile takes, as 16 rows of bytes
constexpr int64_t kFew = 4;       // rows up to which they are faster one by one
constexpr int64_t kGrain = 1 << 16;  // products that are worth another thread
constexpr int64_t kPad = 32;      // of an unpacked row: a power of two would hit the same cache sets

// Bits of a weight, and bytes of a group's scale. One byte is a multiple of the output's own scale;
// int8 has no groups and no zeros but 128.
enum Format { kInt8 = 80, kInt4 = 41, kInt4Half = 42 };
constexpr int64_t bits(Format format) { return format / 10; }
constexpr int64_t scale_bytes(Format format) { return format % 10; }

struct Weights {
  const uint8_t* data;  // (N/16, strip): float (16), then for each span its header and its tiles
  int64_t N, K, block, strip;  // block: inputs that share a scale, of weights (int4) and activations

  int64_t blocks() const { return K / block; }
  const uint8_t* scales(int64_t n) const { return data + n * strip; }
  const uint8_t* spans(int64_t n) const { return scales(n) + kStrip * sizeof(float); }
};

struct Rows {  // activations in fixed point: scale * (256 * hi + lo)
  int64_t stride, blocks;         // inputs and some padding; blocks of a row
  std::vector<int8_t> bytes;      // (M', 2, stride): hi and lo; M' is M in whole eights
  std::vector<float> scale, sum;  // (M'/8, blocks, 8); sum: of the fixed-point numbers

  const int8_t* high(int64_t m) const { return &bytes[2 * m * stride]; }
  const int8_t* low(int64_t m) const { return high(m) + stride; }
  int64_t block(int64_t m, int64_t b) const {
    return (m / kEight * blocks + b) * kEight + m % kEight;
  }
};

inline __m512 load_bf16(const at::BFloat16* x) {
  auto bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

inline void store_bf16(at::BFloat16* y, __m512 v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(y), (__m256i)_mm512_cvtneps_pbh(v));
}

inline __m512i low_nibbles(__m512i v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
inline __m512i high_nibbles(__m512i v) { return low_nibbles(_mm512_srli_epi16(v, 4)); }

inline __m128i unpack_pairs(__m128i pairs) {  // the nibbles of 8 bytes, as 16 bytes
  const __m128i low = _mm_set1_epi8(15);
  return _mm_unpacklo_epi8(
      _mm_and_si128(pairs, low), _mm_and_si128(_mm_srli_epi16(pairs, 4), low));
}

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

template <Format F>
__m512 load_zeros(const uint8_t* header, int64_t block, int64_t b) {  // (16,)
  if constexpr (F == kInt8) return _mm512_set1_ps(128);
  const uint8_t* zeros = header + zeros_at<F>(block, b);
  auto pairs = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(zeros));
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(unpack_pairs(pairs)));
}

template <Format F>
__m512 load_scales(const uint8_t* header, int64_t b) {  // (16,), of a block
  const uint8_t* scales = header + b * kStrip * scale_bytes(F);
  if constexpr (F == kInt8) return _mm512_set1_ps(1);
  if constexpr (F == kInt4Half)
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales)));
  auto bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(scales));
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
}

void to_fixed_point(const at::BFloat16* x, int64_t block, int8_t* hi, int8_t* lo, float* scale,
                    float* sum) {
  constexpr float kMost = 32639;  // 127 * 256 + 127: the largest that two signed bytes hold
  __m512 most = _mm512_setzero_ps();
  for (int64_t i = 0; i < block; i += 16)
    most = _mm512_max_ps(most, _mm512_abs_ps(load_bf16(x + i)));
  const float top = _mm512_reduce_max_ps(most);
  const __m512 factor = _mm512_set1_ps(top > 0 ? kMost / top : 0);
  __m512i total = _mm512_setzero_si512();
  for (int64_t i = 0; i < block; i += 16) {
    __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(load_bf16(x + i), factor));
    __m512i high = _mm512_srai_epi32(_mm512_add_epi32(q, _mm512_set1_epi32(128)), 8);
    total = _mm512_add_epi32(total, q);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(hi + i), _mm512_cvtepi32_epi8(high));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(lo + i), _mm512_cvtepi32_epi8(q));  // modulo 256
  }
  *scale = top / kMost;
  *sum = _mm512_reduce_add_epi32(total);
}

// Room for M rows; what is in it stays, as a vector that shrank would be cleared again.
void make_room(int64_t M, const Weights& w, Rows& rows) {
  const size_t whole = (M + kEight - 1) / kEight * kEight;
  auto reserve = [](auto& values, size_t size) {
    if (values.size() < size) values.resize(size);
  };
  rows.stride = w.K + 2 * kPad, rows.blocks = w.blocks();
  reserve(rows.bytes, whole * 2 * rows.stride);
  reserve(rows.scale, whole * rows.blocks), reserve(rows.sum, whole * rows.blocks);
}

// Rows `m` to `end` of x.
void to_fixed_point(const Tensor& x, const Weights& w, int64_t m, int64_t end, Rows& rows) {
  const auto* from = x.const_data_ptr<at::BFloat16>() + m * w.K;
  for (; m < end; m++) {
    int8_t *high = &rows.bytes[2 * m * rows.stride], *low = high + rows.stride;
    for (int64_t b = 0; b < rows.blocks; b++, from += w.block, high += w.block, low += w.block)
      to_fixed_point(from, w.block, high, low, &rows.scale[rows.block(m, b)],
                     &rows.sum[rows.block(m, b)]);
  }
}

inline void prefetch(const uint8_t* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += kLine) _mm_prefetch(from + i, _MM_HINT_T0);
}

// A register of stored weights as tiles of unsigned bytes.
template <Format F>
inline void unpack(const uint8_t* from, __m512i* tiles) {
  const __m512i v = _mm512_loadu_si512(from);
  if constexpr (bits(F) == 8) tiles[0] = v;
  if constexpr (bits(F) == 4) tiles[0] = low_nibbles(v), tiles[1] = high_nibbles(v);
}

// y, (16,), and what a block adds to it: its sums of products, (16,), less the zeros, scaled.
inline __m512 add_block(__m512 y, __m512i sums, __m512 zeros, __m512 scales, float row_sum,
                        float row_scale) {
  const __m512 dot = _mm512_fnmadd_ps(zeros, _mm512_set1_ps(row_sum), _mm512_cvtepi32_ps(sums));
  return _mm512_fmadd_ps(_mm512_mul_ps(scales, _mm512_set1_ps(row_scale)), dot, y);
}

// 16 outputs of each of M rows, from row `first` on, by each of STRIPS strips: (STRIPS, M, 16).
template <Format F, int M, int STRIPS>
void strips_by_rows(const Weights& w, const int64_t (&n)[STRIPS], const Rows& x, int64_t first,
                    __m512* y) {
  constexpr int kTiles = 8 / bits(F);  // in a register of stored bytes
  const uint8_t *tiles[STRIPS], *headers[STRIPS];
  for (int t = 0; t < STRIPS; t++) tiles[t] = w.spans(n[t]);
  const int64_t header = header_bytes<F>(w.block), stride = 2 * x.stride;
  const int8_t* parts[2] = {x.high(first), x.low(first)};
  const float *row_sums = &x.sum[x.block(first, 0)], *row_scales = &x.scale[x.block(first, 0)];
  for (int i = 0; i < STRIPS * M; i++) y[i] = _mm512_setzero_ps();
  for (int64_t b = 0; b < x.blocks; b++) {
    const int64_t in_span = b % (kSpan / w.block);
    for (int t = 0; t < STRIPS && in_span == 0; t++) {
      headers[t] = tiles[t];
      prefetch(tiles[t] + kAhead, header);
      tiles[t] += header;
    }
    // First by all high bytes, then by all low ones: a sum for both, which a block of 256 and less
    // cannot overflow. Weights are unpacked twice for it, and one row is no slower.
    __m512i sums[STRIPS * M];
    for (int i = 0; i < STRIPS * M; i++) sums[i] = _mm512_setzero_si512();
    for (int p = 0; p < 2; p++) {
      if (p) for (int i = 0; i < STRIPS * M; i++) sums[i] = _mm512_slli_epi32(sums[i], 8);
      const int8_t* row = parts[p] + b * w.block;
      for (int64_t at = 0; at < w.block / 4; at += kTiles) {
        __m512i tile[STRIPS][2];
#pragma GCC unroll 4
        for (int t = 0; t < STRIPS; t++) {
          const uint8_t* from = tiles[t] + 64 / kTiles * at;
          if (p) _mm_prefetch(from + kAhead, _MM_HINT_T0);
          unpack<F>(from, tile[t]);
        }
#pragma GCC unroll 2
        for (int j = 0; j < kTiles; j++) {
#pragma GCC unroll 8
          for (int m = 0; m < M; m++) {
            const int8_t* inputs = row + m * stride + 4 * (at + j);
            const __m512i four = _mm512_set1_epi32(*reinterpret_cast<const int*>(inputs));
#pragma GCC unroll 4
            for (int t = 0; t < STRIPS; t++)
              sums[t * M + m] = _mm512_dpbusd_epi32(sums[t * M + m], tile[t][j], four);
          }
        }
      }
    }
    for (int t = 0; t < STRIPS; t++) {
      tiles[t] += kStrip * w.block / kTiles;
      const __m512 zero = load_zeros<F>(headers[t], w.block, in_span);
      const __m512 scale = load_scales<F>(headers[t], in_span);
      for (int m = 0; m < M; m++) {
        const int64_t i = t * M + m, at = b * kEight + m;
        y[i] = add_block(y[i], sums[i], zero, scale, row_sums[at], row_scales[at]);
      }
    }
  }
  for (int i = 0; i < STRIPS * M; i++)
    y[i] = _mm512_mul_ps(y[i], _mm512_loadu_ps(w.scales(n[i / M])));
}

struct Output {
  at::BFloat16* y;  // (M, N)
  const at::BFloat16* bias;  // (N) or nullptr
  int64_t M, N;

  void put(int64_t m, int64_t n, __m512 v) const {
    if (bias) v = _mm512_add_ps(v, load_bf16(bias + n * kStrip));
    store_bf16(y + m * N + n * kStrip, v);
  }
};

// As many rows from m on as come in groups of M; the row after them.
template <Format F, int M, int STRIPS>
int64_t take_rows(const Weights& w, const int64_t (&n)[STRIPS], const Rows& x, int64_t m,
                  const Output& out) {
  __m512 y[STRIPS * M];
  for (; m + M <= out.M; m += M) {
    strips_by_rows<F, M, STRIPS>(w, n, x, m, y);
    for (int i = 0; i < STRIPS * M; i++) out.put(m + i % M, n[i / M], y[i]);
  }
  return m;
}

#ifdef __AMX_INT8__
// What AMX's tiles hold: sums of two strips, eight rows, weights of two strips. A tile is renamed:
// it may be loaded while instructions before still need what was in it. To load zeros is four times
// as fast as to let tilezero write them.
enum Amx { kSums0, kSums1, kRows, kWeights0, kWeights1 };

bool has_amx() {  // Linux lends the tiles to a process that asks
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  return granted;
}

struct alignas(kLine) AmxTiles {  // ready for this thread while the object lives
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {kLine, kLine, kLine, kLine, kLine};  // of a row
  uint8_t rows[16] = {kStrip, kStrip, kStrip, kStrip, kStrip};

  AmxTiles(uint16_t input_bytes = kChunk, uint8_t weight_rows = kChunk / 4) {
    bytes[kRows] = input_bytes, rows[kWeights0] = rows[kWeights1] = weight_rows;
    if (has_amx()) asm volatile("ldtilecfg %0" ::"m"(*this));
  }
  ~AmxTiles() { if (has_amx()) asm volatile("tilerelease"); }
};

template <Amx TILE>
void amx_load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%1,%2), %%tmm%c0" ::"i"(TILE), "r"(from), "r"(stride) : "memory");
}
template <Amx TILE>
void amx_store(void* to) {
  asm volatile("tilestored %%tmm%c0, (%1,%2)" ::"i"(TILE), "r"(to), "r"(kLine) : "memory");
}
template <Amx SUMS, Amx WEIGHTS>
void amx_dot() {
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUMS), "i"(kRows), "i"(WEIGHTS));
}

// As strips_by_rows, eight rows and two strips, with the same bits: (2, 8, 16). While AMX multiplies
// by a block, the next is unpacked and the one before is scaled, so that none waits for another.
template <Format F, int64_t BLOCK>
void two_strips_by_eight_rows(const Weights& w, const int64_t (&n)[2], const Rows& x, int64_t first,
                              __m512* y) {
  static constexpr int32_t kZeros[2 * kEight * kStrip] = {};
  constexpr int64_t kBlocks = kSpan / BLOCK, kHeader = header_bytes<F>(BLOCK);  // of a span
  constexpr int64_t kBytes = kStrip * BLOCK * bits(F) / 8, kSpanBytes = kHeader + kBlocks * kBytes;
  auto header_at = [](int64_t b) { return b / kBlocks * kSpanBytes; };
  auto weights_at = [=](int64_t b) { return header_at(b) + kHeader + b % kBlocks * kBytes; };
  alignas(kLine) uint8_t unpacked[2][2][kStrip * BLOCK];  // of two blocks, by turns
  alignas(kLine) int32_t sums[2][kEight][2][kStrip];      // of the bytes hi, and of lo
  const uint8_t* spans[2] = {w.spans(n[0]), w.spans(n[1])};
  const int8_t* rows = x.high(first);
  const int64_t blocks = x.blocks, stride = x.stride;
  const float *row_sums = &x.sum[x.block(first, 0)], *row_scales = &x.scale[x.block(first, 0)];
  __m512 totals[2][kEight];
#pragma GCC unroll 16
  for (int i = 0; i < 2 * kEight; i++) totals[i / kEight][i % kEight] = _mm512_setzero_ps();

  for (int64_t b = -1; b <= blocks; b++) {
    if (b > 0) amx_store<kSums0>(sums[0]), amx_store<kSums1>(sums[1]);
    if (b >= 0 && b < blocks) {
      const uint8_t* tiles[2];
      for (int t = 0; t < 2; t++)
        tiles[t] = bits(F) == 4 ? unpacked[b % 2][t] : spans[t] + weights_at(b);
      amx_load<kSums0>(kZeros, kLine), amx_load<kSums1>(kZeros, kLine);
#pragma GCC unroll 8
      for (int64_t k = 0; k < BLOCK; k += kChunk) {
        amx_load<kRows>(rows + b * BLOCK + k, stride);
        for (int t = 0; t < 2 && bits(F) == 8; t++)
          prefetch(tiles[t] + kStrip * k + kAhead, kStrip * kChunk);
        amx_load<kWeights0>(tiles[0] + kStrip * k, kLine), amx_dot<kSums0, kWeights0>();
        amx_load<kWeights1>(tiles[1] + kStrip * k, kLine), amx_dot<kSums1, kWeights1>();
      }
    }
    if (const int64_t next = b + 1; bits(F) == 4 && next < blocks) {
#pragma GCC unroll 2
      for (int t = 0; t < 2; t++) {
        const uint8_t* from = spans[t] + weights_at(next);
        if (next % kBlocks == 0) prefetch(from - kHeader + kAhead, kHeader);
#pragma GCC unroll 4
        for (int64_t i = 0; i < kBytes; i += kLine) {
          __m512i tile[2];
          _mm_prefetch(from + i + kAhead, _MM_HINT_T0);
          unpack<F>(from + i, tile);
          _mm512_store_si512(unpacked[next % 2][t] + 2 * i, tile[0]);
          _mm512_store_si512(unpacked[next % 2][t] + 2 * i + kLine, tile[1]);
        }
      }
    }
    if (const int64_t last = b - 1; last >= 0) {
#pragma GCC unroll 2
      for (int t = 0; t < 2; t++) {
        const uint8_t* header = spans[t] + header_at(last);
        const __m512 zero = load_zeros<F>(header, BLOCK, last % kBlocks);
        const __m512 scale = load_scales<F>(header, last % kBlocks);
#pragma GCC unroll 8
        for (int m = 0; m < kEight; m++) {
          const __m512i high = _mm512_slli_epi32(_mm512_load_si512(sums[t][m][0]), 8);
          const __m512i sum = _mm512_add_epi32(high, _mm512_load_si512(sums[t][m][1]));
          totals[t][m] = add_block(totals[t][m], sum, zero, scale, row_sums[m], row_scales[m]);
        }
      }
      row_sums += kEight, row_scales += kEight;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < 2 * kEight; i++)
    y[i] = _mm512_mul_ps(totals[i / kEight][i % kEight], _mm512_loadu_ps(w.scales(n[i / kEight])));
}

// Rows in eights as long as more than a few are left; the row after them.
template <Format F>
int64_t take_eights(const Weights& w, const int64_t (&n)[2], const Rows& x, const Output& out) {
  int64_t m = 0;
  __m512 y[2 * kEight];
  for (; has_amx() && out.M - m > kFew; m += kEight) {
    if (w.block == 32) two_strips_by_eight_rows<F, 32>(w, n, x, m, y);
    else if (w.block == 64) two_strips_by_eight_rows<F, 64>(w, n, x, m, y);
    else if (w.block == 128) two_strips_by_eight_rows<F, 128>(w, n, x, m, y);
    else two_strips_by_eight_rows<F, 256>(w, n, x, m, y);
    for (int i = 0; i < 2 * kEight; i++)
      if (m + i % kEight < out.M) out.put(m + i % kEight, n[i / kEight], y[i]);
  }
  return m;
}
#else
bool has_amx() { return false; }
struct AmxTiles {};
template <Format F>
int64_t take_eights(const Weights&, const int64_t (&)[2], const Rows&, const Output&) { return 0; }
#endif

// Strips `from` to `to` of the weights as STREAMS stretches that are read side by side.
template <Format F, int STREAMS>
void strips_by_all_rows(const Weights& w, const Rows& rows, int64_t from, int64_t to,
                        const Output& out) {
  const int64_t part = (to - from) / STREAMS;
  for (int64_t i = 0; i < part; i++) {
    int64_t n[STREAMS], m = 0;
    for (int t = 0; t < STREAMS; t++) n[t] = from + t * part + i;
    if constexpr (STREAMS == 2) m = take_eights<F>(w, n, rows, out);
    if constexpr (8 * STREAMS <= kSums) m = take_rows<F, 8, STREAMS>(w, n, rows, m, out);
    m = take_rows<F, 4, STREAMS>(w, n, rows, m, out);
    m = take_rows<F, 2, STREAMS>(w, n, rows, m, out);
    take_rows<F, 1, STREAMS>(w, n, rows, m, out);
  }
  for (int64_t n = from + STREAMS * part; n < to; n++) {  // what makes up no set of stretches
    int64_t m = STREAMS == 2 ? take_eights<F>(w, {n, n}, rows, out) : 0;
    m = take_rows<F, 4, 1>(w, {n}, rows, m, out);
    take_rows<F, 1, 1>(w, {n}, rows, m, out);
  }
}

template <Format F>
Tensor product(const Tensor& x, const Weights& w, const std::optional<Tensor>& bias) {
  Tensor out = at::empty({x.size(0), w.N}, x.options());
  const auto* b = bias ? bias->const_data_ptr<at::BFloat16>() : nullptr;
  const Tensor contiguous = x.contiguous();
  const Output into{out.mutable_data_ptr<at::BFloat16>(), b, out.size(0), w.N};
  // Few rows are written in fixed point by every thread for itself, while the first weights come in;
  // of many each thread writes some, for all.
  const bool together = into.M > kEight;
  thread_local Rows of_caller;
  Rows& shared = of_caller;
  if (together) {
    make_room(into.M, w, shared);
    at::parallel_for(0, into.M, 1, [&](int64_t from, int64_t to) {
      to_fixed_point(contiguous, w, from, to, shared);
    });
  }
  at::parallel_for(0, w.N / kStrip, 1, [&](int64_t from, int64_t to) {
    const int64_t streams = into.M <= kFew ? 4 : 2;
    for (int64_t i = 0; i < streams; i++)
      prefetch(w.scales(from + i * ((to - from) / streams)), kAhead);
    thread_local Rows own;
    if (!together) make_room(into.M, w, own), to_fixed_point(contiguous, w, 0, into.M, own);
    const Rows& rows = together ? shared : own;
    if (streams == 4) return strips_by_all_rows<F, 4>(w, rows, from, to, into);
    const AmxTiles ready;
    strips_by_all_rows<F, 2>(w, rows, from, to, into);
  });
  return out;
}

// Writes outputs n0 to n1 of the weights to `into`, (K, n1 - n0) in bfloat16.
template <Format F>
void unpack_outputs(const Weights& w, int64_t n0, int64_t n1, const Tensor& into) {
  auto* data = into.mutable_data_ptr<at::BFloat16>();
  const int64_t stride = into.stride(0), header = header_bytes<F>(w.block);
  for (int64_t n = n0 / kStrip; n < n1 / kStrip; n++) {
    const __m512 scale_of_all = _mm512_loadu_ps(w.scales(n));
    const uint8_t *tiles = w.spans(n), *of_span = nullptr;
    auto* out = data + n * kStrip - n0;
    for (int64_t k = 0; k < w.K; k += kChunk) {
      if (k % kSpan == 0) of_span = tiles, tiles += header;
      const int64_t b = k % kSpan / w.block;
      const __m512 zero = load_zeros<F>(of_span, w.block, b);
      const __m512 scale = _mm512_mul_ps(load_scales<F>(of_span, b), scale_of_all);
      __m512i bytes[8];
      constexpr int kTiles = 8 / bits(F);
      for (int i = 0; i < 8; i += kTiles) {
        _mm_prefetch(tiles + kAhead, _MM_HINT_T0);
        unpack<F>(tiles, bytes + i);
        tiles += 64;
      }
      for (int i = 0; i < 32; i++) {
        __m512i q = _mm512_srli_epi32(bytes[i / 4], 8 * (i % 4));
        __m512 v = _mm512_cvtepi32_ps(_mm512_and_si512(q, _mm512_set1_epi32(255)));
        store_bf16(out + (k + i) * stride, _mm512_mul_ps(_mm512_sub_ps(v, zero), scale));
      }
    }
  }
}

// Every thread by itself unpacks as many outputs as its L2 cache holds, and multiplies by them.
template <Format F>
Tensor product_of_many(const Tensor& x, const Weights& w, const std::optional<Tensor>& bias) {
  constexpr int64_t kScratch = 3 << 19;  // bytes, of the 2 MB of L2 that CPUs with AMX have
  const Tensor out = at::empty({x.size(0), w.N}, x.options());
  const int64_t threads = at::get_num_threads(), parts = 2 * w.K * w.N / kScratch / threads + 1;
  const int64_t strips = w.N / kStrip, width = (strips - 1) / (parts * threads) + 1;
  at::parallel_for(0, (strips - 1) / width + 1, 1, [&](int64_t from, int64_t to) {
    const at::InferenceMode guard;  // which a thread does not inherit
    const Tensor scratch = at::empty({w.K, width * kStrip + kPad}, x.options());
    for (int64_t i = from; i < to; i++) {
      const int64_t n = i * width * kStrip, size = std::min(width * kStrip, w.N - n);
      unpack_outputs<F>(w, n, n + size, scratch);
      const Tensor weights = scratch.narrow(1, 0, size);
      out.narrow(1, n, size)
          .copy_(bias ? at::addmm(bias->narrow(0, n, size), x, weights) : at::mm(x, weights));
    }
  });
  return out;
}

template <Format F>
Tensor packed_linear(Tensor x, const Tensor& packed, const std::optional<Tensor>& bias,
                     int64_t block) {
  TORCH_CHECK(block % kChunk == 0 && kSpan % block == 0, "a block of ", block);
  const int64_t K = (packed.size(1) - kStrip * sizeof(float)) / span_bytes<F>(block) * kSpan;
  const Weights w{packed.const_data_ptr<uint8_t>(), packed.size(0) * kStrip, K, block,
                  packed.size(1)};
  TORCH_CHECK(x.dim() == 2 && x.size(1) <= K && x.scalar_type() == at::kBFloat16);
  // Rows from which on unpacking for a GEMM is faster.
  const int64_t many = !has_amx() ? 48 : bits(F) == 8 ? 256 : 56;
  if (x.size(1) < K) x = at::constant_pad_nd(x, {0, K - x.size(1)});
  return x.size(0) < many ? product<F>(x, w, bias) : product_of_many<F>(x, w, bias);
}

#ifdef __AMX_BF16__
template <Amx SUMS, Amx WEIGHTS>
void amx_dense_dot() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUMS), "i"(WEIGHTS), "i"(kRows));
}

// Up to 16 rows by dense weights as they lie in memory, (N, K): what takes time is to read them. A
// tile holds a line, 32 inputs, of each of 16 outputs; the rows are columns of the other factor,
// with two inputs side by side. A row's result has the same bits whatever rows are beside it.
void dense_product(const Tensor& x, const Tensor& weight, const at::BFloat16* bias, Tensor& out) {
  const int64_t M = x.size(0), K = x.size(1), N = weight.size(0), row = 2 * K;
  const auto* pairs = reinterpret_cast<const uint32_t*>(x.const_data_ptr<at::BFloat16>());
  const auto* weights = reinterpret_cast<const uint8_t*>(weight.const_data_ptr<at::BFloat16>());
  auto* y = out.mutable_data_ptr<at::BFloat16>();
  const Tensor columns = at::zeros({K / 2, kStrip}, x.options().dtype(at::kInt));
  auto* inputs = reinterpret_cast<uint32_t*>(columns.mutable_data_ptr<int32_t>());
  for (int64_t m = 0; m < M; m++)
    for (int64_t k = 0; k < K / 2; k++) inputs[k * kStrip + m] = pairs[m * K / 2 + k];
  static constexpr float kZeros[kStrip * kStrip] = {};
  at::parallel_for(0, N / kStrip / 2, 1, [&](int64_t from, int64_t to) {
    const AmxTiles ready(kLine, kStrip);
    alignas(kLine) float totals[2 * kStrip][kStrip];  // of outputs, of rows
    for (int64_t n = from * 2 * kStrip; n < to * 2 * kStrip; n += 2 * kStrip) {
      const uint8_t *first = weights + n * row, *second = first + kStrip * row;
      amx_load<kSums0>(kZeros, kLine), amx_load<kSums1>(kZeros, kLine);
      for (int64_t k = 0; k < K; k += kChunk) {
        amx_load<kRows>(inputs + k / 2 * kStrip, kLine);
        amx_load<kWeights0>(first + 2 * k, row), amx_dense_dot<kSums0, kWeights0>();
        amx_load<kWeights1>(second + 2 * k, row), amx_dense_dot<kSums1, kWeights1>();
      }
      amx_store<kSums0>(totals[0]), amx_store<kSums1>(totals[kStrip]);
      for (int64_t m = 0; m < M; m++)
        for (int64_t i = 0; i < 2 * kStrip; i++)
          y[m * N + n + i] = totals[i][m] + (bias ? static_cast<float>(bias[n + i]) : 0.f);
    }
  });
}
#endif

// Sums of N outputs by M rows, one after the other over the inputs: the bits of a row's result are
// those it has alone.
template <int N, int M>
void add_pairs(const at::BFloat16* weights, const at::BFloat16* rows, int64_t K, int64_t k,
               __mmask32 there, __m512 (&sums)[N][M]) {
  __m512bh inputs[M];
#pragma GCC unroll 4
  for (int m = 0; m < M; m++)
    inputs[m] = (__m512bh)_mm512_maskz_loadu_epi16(there, rows + m * K + k);
#pragma GCC unroll 4
  for (int n = 0; n < N; n++) {
    const auto some = (__m512bh)_mm512_maskz_loadu_epi16(there, weights + n * K + k);
#pragma GCC unroll 4
    for (int m = 0; m < M; m++) sums[n][m] = _mm512_dpbf16_ps(sums[n][m], some, inputs[m]);
  }
}

// N outputs, from output n on, of rows in groups of M; `outputs` there are.
template <int N, int M>
void some_outputs(const at::BFloat16* x, const at::BFloat16* weights, const at::BFloat16* bias,
                  int64_t rows, int64_t K, int64_t outputs, int64_t n, at::BFloat16* y) {
  for (int64_t m = 0; m < rows; m += M) {
    __m512 sums[N][M];
#pragma GCC unroll 16
    for (int i = 0; i < N * M; i++) sums[i / M][i % M] = _mm512_setzero_ps();
    int64_t k = 0;
    for (; k + kChunk <= K; k += kChunk)
      add_pairs<N, M>(weights + n * K, x + m * K, K, k, ~0u, sums);
    if (k < K) add_pairs<N, M>(weights + n * K, x + m * K, K, k, _bzhi_u32(~0u, K - k), sums);
#pragma GCC unroll 16
    for (int i = 0; i < N * M; i++)
      y[(m + i % M) * outputs + n + i / M] = _mm512_reduce_add_ps(sums[i / M][i % M]) +
                                             (bias ? static_cast<float>(bias[n + i / M]) : 0.f);
  }
}

// Without AMX, or for shapes that fill no tiles. By one row, weights are read from the first to the
// last, which is faster than outputs side by side; of several rows, four outputs share each input.
void dense_product_of_pairs(const Tensor& x, const Tensor& weight, const at::BFloat16* bias,
                            Tensor& out) {
  const int64_t M = x.size(0), K = x.size(1), N = weight.size(0), fours = M / kFew * kFew;
  const auto* rows = x.const_data_ptr<at::BFloat16>();
  const auto* weights = weight.const_data_ptr<at::BFloat16>();
  auto* y = out.mutable_data_ptr<at::BFloat16>();
  at::parallel_for(0, (N + kFew - 1) / kFew, kGrain / kFew / K + 1, [&](int64_t from, int64_t to) {
    const int64_t end = std::min(to * kFew, N);
    int64_t n = from * kFew;
    for (; M > 1 && n + kFew <= end; n += kFew) {
      some_outputs<4, 4>(rows, weights, bias, fours, K, N, n, y);
      some_outputs<4, 1>(rows + fours * K, weights, bias, M - fours, K, N, n, y + fours * N);
    }
    for (; n < end; n++) some_outputs<1, 1>(rows, weights, bias, M, K, N, n, y);
  });
}

// F.linear, in bfloat16: x, (M, K), by weight, (N, K).
Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  if (x.size(0) > kStrip || !weight.is_contiguous()) return at::linear(x, weight, bias);
  Tensor out = at::empty({x.size(0), weight.size(0)}, x.options());
  const auto* b = bias ? bias->const_data_ptr<at::BFloat16>() : nullptr;
#ifdef __AMX_BF16__
  const bool whole = x.size(1) % kChunk == 0 && weight.size(0) % (2 * kStrip) == 0;
  if (whole && has_amx()) return dense_product(x.contiguous(), weight, b, out), out;
#endif
  return dense_product_of_pairs(x.contiguous(), weight, b, out), out;
}

// x: (M, at most K). packed: (N/16, bytes of a strip). Weights and bias are padded to whole strips,
// of which the first `out_features` outputs count.
Tensor quantized_linear(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias,
                        int64_t format, int64_t block, int64_t out_features) {
  Tensor y = format == kInt8   ? packed_linear<kInt8>(x, packed, bias, block)
             : format == kInt4 ? packed_linear<kInt4>(x, packed, bias, block)
                               : packed_linear<kInt4Half>(x, packed, bias, block);
  return y.size(1) == out_features ? y : y.narrow(1, 0, out_features).contiguous();
}

// What a checkpoint stores (quantized.py). int8 has one scale, a float, for an output.
struct Stored {
  const uint8_t* weight;   // (N, bytes)
  const float* of_output;  // (N), int8
  const at::Half* scales;  // (N, groups), int4
  const uint8_t* zeros;    // (N, ceil(groups / 2)), int4
  int64_t N, bytes, groups, block;
};

// A mask of the first n; of all or of none where n is beyond what a mask holds.
inline __mmask64 first(int64_t n) { return _bzhi_u64(~0ull, std::clamp<int64_t>(n, 0, 64)); }

// 16 rows of 16 dwords -> its columns: in blocks of 2, 4, 8 and 16 what is off the diagonal swaps.
inline void transpose(__m512i (&rows)[kStrip]) {
  const __m512i at = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#pragma GCC unroll 4
  for (int half = 1; half < kStrip; half *= 2) {
    const __mmask16 right = _mm512_test_epi32_mask(at, _mm512_set1_epi32(half));
    const __m512i step = _mm512_set1_epi32(kStrip - half);  // of an index, to the other register
    const __m512i upper = _mm512_mask_add_epi32(at, right, at, step);
    const __m512i lower = _mm512_add_epi32(upper, _mm512_set1_epi32(half));
#pragma GCC unroll 16
    for (int i = 0; i < kStrip; i++) {
      if (i & half) continue;
      const __m512i a = rows[i], b = rows[i + half];
      rows[i] = _mm512_permutex2var_epi32(a, upper, b);
      rows[i + half] = _mm512_permutex2var_epi32(a, lower, b);
    }
  }
}

// What an output's scales are multiples of. kInt4: the power of two of which the largest is 128 to
// 255, see scale_units (quantized.py).
template <Format F>
float output_scale(const Stored& from, int64_t n) {
  if constexpr (F == kInt8) return from.of_output[n];
  if constexpr (F == kInt4Half) return 1;
  const at::Half* scales = from.scales + n * from.groups;
  __m512 most = _mm512_setzero_ps();
  for (int64_t g = 0; g < from.groups; g += 16) {
    const __m256i some = _mm256_maskz_loadu_epi16(first(from.groups - g), scales + g);
    most = _mm512_max_ps(most, _mm512_cvtph_ps(some));
  }
  int exponent;
  std::frexp(_mm512_reduce_max_ps(most), &exponent);
  return std::ldexp(1.f, std::max(exponent - 8, -24));
}

// Scales, float16, as the integers that are stored; `unfit` gets those that are no byte's multiple.
template <Format F>
inline __m512i stored_scales(const at::Half* from, __mmask16 there, float unit, __mmask16& unfit) {
  const __m256i scales = _mm256_maskz_loadu_epi16(there, from);
  if constexpr (F == kInt4Half) return _mm512_cvtepu16_epi32(scales);
  const __m512 multiples =
      _mm512_maskz_div_ps(there, _mm512_cvtph_ps(scales), _mm512_set1_ps(unit));
  const __m512i bytes = _mm512_cvtps_epi32(multiples);
  unfit |= _mm512_cmp_ps_mask(_mm512_cvtepi32_ps(bytes), multiples, _CMP_NEQ_UQ);
  unfit |= _mm512_cmpgt_epu32_mask(bytes, _mm512_set1_epi32(255));
  return bytes;
}

// The headers of a strip, one after another, with 16 groups at a time. False: they fit no bytes.
template <Format F>
bool pack_headers(const Stored& from, int64_t n, const float* units, uint8_t* headers) {
  const int64_t in_span = kSpan / from.block, zero_bytes = (from.groups + 1) / 2;
  const __mmask16 rows = first(from.N - n);
  __mmask16 unfit = 0;
  for (int64_t g = 0; g < from.groups; g += 16) {
    __m512i scales[kStrip], zeros[kStrip];
    const __mmask16 groups = first(from.groups - g), pairs = first(zero_bytes - g / 2);
    const at::Half* scale = from.scales + n * from.groups + g;
    const uint8_t* zero = from.zeros + n * zero_bytes + g / 2;
#pragma GCC unroll 16
    for (int64_t i = 0; i < kStrip; i++, scale += from.groups, zero += zero_bytes) {
      const bool row = rows >> i & 1;
      const __m128i unpacked = unpack_pairs(_mm_maskz_loadu_epi8(row ? pairs : 0, zero));
      scales[i] = stored_scales<F>(scale, row ? groups : 0, units[i], unfit);
      zeros[i] = _mm512_maskz_cvtepu8_epi32(groups, unpacked);
    }
    transpose(scales), transpose(zeros);
    for (int64_t i = 0; i < std::min(kStrip, from.groups - g); i++) {
      const int64_t b = (g + i) % in_span;
      uint8_t* header = headers + (g + i) / in_span * header_bytes<F>(from.block);
      const __m512i pairs = _mm512_or_si512(zeros[i], _mm512_srli_epi64(zeros[i], 32 - 4));
      _mm_storel_epi64(reinterpret_cast<__m128i*>(header + zeros_at<F>(from.block, b)),
                       _mm512_cvtepi64_epi8(pairs));
      header += b * kStrip * scale_bytes(F);
      if constexpr (F == kInt4) _mm512_mask_cvtepi32_storeu_epi8(header, ~0, scales[i]);
      if constexpr (F == kInt4Half) _mm512_mask_cvtepi32_storeu_epi16(header, ~0, scales[i]);
    }
  }
  return !unfit;
}

// Around the caches, which are for what is read soon: memory that is written is not read before.
inline uint8_t* stream(const void* from, int64_t bytes, uint8_t* to) {
  for (int64_t i = 0; i < bytes; i += kLine)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i),
                        _mm512_loadu_si512(static_cast<const uint8_t*>(from) + i));
  return to + bytes;
}

// Nibbles 0 to 7 of each dword -> 0 4 1 5 2 6 3 7: the low ones of its bytes are of one tile now.
inline __m512i pair_tiles(__m512i v) {
  const __m512i bytes = _mm512_set4_epi32(0x0f0d0e0c, 0x0b090a08, 0x07050604, 0x03010200);
  v = _mm512_shuffle_epi8(v, bytes);  // 0 1 4 5 2 3 6 7
  const __m512i change = _mm512_and_si512(
      _mm512_xor_si512(v, _mm512_srli_epi16(v, 4)), _mm512_set1_epi16(0x00f0));
  return _mm512_xor_si512(v, _mm512_xor_si512(change, _mm512_slli_epi16(change, 4)));
}

// A line of each of 16 outputs, from byte `at` on, as 16 lines of tiles. The next strip's is asked
// for: rows are too short for the CPU to foresee it, which would make it 1.6 times as slow.
template <Format F>
uint8_t* pack_tiles(const Stored& from, int64_t n, int64_t at, uint8_t* to) {
  __m512i lines[kStrip];
  const __mmask64 bytes = first(from.bytes - at), rows = first(from.N - n);
  const uint8_t* line = from.weight + n * from.bytes + at;
#pragma GCC unroll 16
  for (int64_t i = 0; i < kStrip; i++, line += from.bytes) {
    _mm_prefetch(line + kStrip * from.bytes, _MM_HINT_T1);
    const __mmask64 there = rows >> i & 1 ? bytes : 0;
    const __m512i v = _mm512_maskz_loadu_epi8(there, line);
    lines[i] = F == kInt8 ? _mm512_maskz_add_epi8(there, v, _mm512_set1_epi8(-128)) : pair_tiles(v);
  }
  transpose(lines);
#pragma GCC unroll 16
  for (int64_t i = 0; i < kStrip; i++)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i * kLine), lines[i]);
  return to + kStrip * kLine;
}

// False: the scales do not fit this format, and what is in `room` is worth nothing.
template <Format F>
bool pack_strips(const Stored& from, const Tensor& room) {
  const int64_t row = kSpan * bits(F) / 8, spans = (from.bytes + row - 1) / row;
  const int64_t header = header_bytes<F>(from.block), strips = (from.N + kStrip - 1) / kStrip;
  const int64_t strip = kStrip * sizeof(float) + spans * span_bytes<F>(from.block);
  TORCH_CHECK(room.numel() >= strips * strip, room.numel(), " bytes for ", strips * strip);
  auto* to = room.mutable_data_ptr<uint8_t>();
  TORCH_CHECK(reinterpret_cast<uintptr_t>(to) % kLine == 0, "room that begins within a line");
  std::vector<uint8_t> headers(spans * header);
  for (int64_t n = 0; n < from.N; n += kStrip) {
    float units[kStrip] = {};
    for (int64_t i = 0; i < std::min(kStrip, from.N - n); i++)
      units[i] = output_scale<F>(from, n + i);
    if (F != kInt8 && !pack_headers<F>(from, n, units, headers.data())) return false;
    to = stream(units, sizeof(units), to);
    for (int64_t s = 0; s < spans; s++) {
      to = stream(headers.data() + s * header, header, to);
      for (int64_t at = s * row; at < (s + 1) * row; at += kLine)
        to = pack_tiles<F>(from, n, at, to);
    }
  }
  _mm_sfence();
  return true;
}

// Writes what quantized_linear takes as `packed` to the beginning of `room`, and says in what
// format: int4 scales take a byte each, or two where they are no multiples of one. The thread that
// calls does it alone, at the speed of memory, so that it may run beside the products of others.
int64_t pack(const Tensor& weight, const Tensor& scales, const std::optional<Tensor>& zeros,
             const Tensor& room) {
  const int64_t N = weight.size(0), bytes = weight.size(1), groups = scales.numel() / N;
  TORCH_CHECK(weight.is_contiguous() && scales.is_contiguous() && room.is_contiguous());
  Stored from{static_cast<const uint8_t*>(weight.const_data_ptr())};
  from.N = N, from.bytes = bytes, from.groups = groups, from.block = 2 * bytes / groups;
  if (!zeros) {
    from.of_output = scales.const_data_ptr<float>();
    return pack_strips<kInt8>(from, room), kInt8;
  }
  TORCH_CHECK(zeros->is_contiguous() && zeros->numel() == N * ((groups + 1) / 2));
  TORCH_CHECK(from.block % kChunk == 0 && kSpan % from.block == 0, "a block of ", from.block);
  from.scales = scales.const_data_ptr<at::Half>(), from.zeros = zeros->const_data_ptr<uint8_t>();
  if (pack_strips<kInt4>(from, room)) return kInt4;
  return pack_strips<kInt4Half>(from, room), kInt4Half;
}

}  // namespace

TORCH_LIBRARY_IMPL(gpt_flex, CPU, library) {
  library.impl("pack", pack);
  library.impl("quantized_linear", quantized_linear);
  library.impl("linear", linear);
}
