// What attention's kernels share: where a block's rows are, which keys they see, what a score is, dropout's bits.
//
// A score, in units of log2: s = cap(q·k · scale) - slope |p_i - j| + bias[j - p_i] + mask, p_i = i + shift; every exponential
// is then one exp2. Key j is visible to query i if p_i - left <= j <= p_i + right and j < key_limit; causal is right = 0.
#pragma once
#include "attention.h"
#include "mma.cuh"

namespace xformer_fast {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
#define XF_INFINITY __int_as_float(0x7f800000)

__device__ __forceinline__ int64_t clamped(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }
__host__ __device__ __forceinline__ int divide_up(int a, int b) { return (a + b - 1) / b; }

// ---- where ----

// Where the rows of one sequence are: read from device memory, held to the rows there are.
struct Sequence {
  int64_t first_q, first_k;  // rows of packed tensors
  int length_q, length_k, key_limit, shift;

  __device__ __forceinline__ Sequence(const CudaAttention& a, int batch)
      : first_q(0), first_k(0), length_q(static_cast<int>(a.seqlen_q)), length_k(static_cast<int>(a.seqlen_k)) {
    if (a.cu_seqlens_q) {
      first_q = clamped(a.cu_seqlens_q[batch], 0, a.rows_q);
      first_k = clamped(a.cu_seqlens_k[batch], 0, a.rows_k);
      length_q = static_cast<int>(clamped(a.cu_seqlens_q[batch + 1], first_q, a.rows_q) - first_q);
      length_k = static_cast<int>(clamped(a.cu_seqlens_k[batch + 1], first_k, a.rows_k) - first_k);
    }
    key_limit = a.key_lengths ? static_cast<int>(clamped(a.key_lengths[batch], 0, length_k)) : length_k;
    shift = a.top_left ? 0 : length_k - length_q;
  }
};

template <class T>
__device__ __forceinline__ Rows<T> rows_of(const View& view, int batch, int head, int64_t first, int64_t width) {
  auto* data = static_cast<T*>(view.data) + batch * view.batch + head * view.head + first * view.row;
  return Rows<T>(data, view.row, width);
}

// lse of a row, and what rounding took from it in the units that the backward counts in: log2, where it is lse * kLog2E, rounded.
__device__ __forceinline__ void store_lse(bool empty, float max, float sum, float* lse, float* error) {
  const float rounded = max * kLn2 + logf(sum), rest = (max - __fmul_rn(rounded, kLog2E)) + log2f(sum);
  *lse = empty ? -XF_INFINITY : rounded;
  *error = !empty && fabsf(rest) < XF_INFINITY ? rest : 0.f;
}

__device__ __forceinline__ float* lse_of(const CudaAttention& a, float* lse, const Sequence& s, int batch, int head) {
  return lse + batch * a.lse_batch + head * a.lse_head + s.first_q;
}

__device__ __forceinline__ int64_t statistics_offset(const CudaAttention& a, const Statistics& statistics, const Sequence& s,
                                                     int batch, int head) {
  if (!a.cu_seqlens_q) return (batch * a.heads_q + head) * statistics.head;
  return head * statistics.head + (s.first_q + 3) / 4 * 4 + batch * kStatisticsPadding;
}

// Blocks of columns that rows first..last see: [begin, end); of them [full_begin, full_end) are seen whole by every row. Row i sees
// columns i + shift - left..i + shift + right below `limit`. Which rows see a column: swap left and right, negate shift.
struct VisibleBlocks {
  int begin, end, full_begin, full_end;

  __device__ __forceinline__ VisibleBlocks(int first, int last, int shift, int limit, int left, int right, int block) {
    const int stop = min(limit, max(last + shift + right + 1, 0)), full_stop = min(limit, max(first + shift + right + 1, 0));
    begin = max(first + shift - left, 0) / block;
    end = divide_up(stop, block);
    full_begin = divide_up(max(last + shift - left, 0), block);
    full_end = full_stop / block;
  }
  __device__ __forceinline__ bool whole(int i) const { return i >= full_begin && i < full_end; }
};

// ---- scores ----

// The terms of one head's scores.
struct Scores {
  float scale;  // includes log2(e), or 1 / softcap where a cap follows
  float cap;    // in units of log2; 0: none
  float slope;
  const float* bias;  // of distance 0
  const char* mask;
  Element mask_element;
  int64_t mask_q, mask_k;
  int length_q, key_limit, shift, left, right;

  __device__ __forceinline__ Scores(const CudaAttention& a, const Sequence& s, int batch, int head)
      : scale(a.softcap != 0.f ? a.scale / a.softcap : a.scale * kLog2E), cap(a.softcap * kLog2E),
        slope(a.alibi_slopes ? a.alibi_slopes[batch * a.alibi_batch + head * a.alibi_head] * kLog2E : 0.f),
        bias(a.distance_bias ? a.distance_bias + head * a.distance_head + a.distance_offset : nullptr),
        mask(static_cast<const char*>(a.mask)), mask_element(a.mask_element), mask_q(a.mask_q), mask_k(a.mask_k),
        length_q(s.length_q), key_limit(s.key_limit), shift(s.shift), left(static_cast<int>(a.left)),
        right(static_cast<int>(a.right)) {
    if (mask) mask += (batch * a.mask_batch + head * a.mask_head) * mask_bytes();
  }

  __device__ __forceinline__ int64_t mask_bytes() const {
    return mask_element == Element::float32 ? 4 : mask_element == Element::boolean ? 1 : 2;
  }
  __device__ __forceinline__ bool sees(int query, int key) const {
    const int distance = key - query - shift;
    return key < key_limit && distance <= right && distance >= -left;
  }
  // Without options.
  __device__ __forceinline__ float plain(float product, int query, int key, bool whole) const {
    return whole || sees(query, key) ? product * scale : -XF_INFINITY;
  }
  // tanh of the soft cap.
  __device__ __forceinline__ float bent(float product) const;
  // With every option; of rows and keys that are not there it is -infinity.
  __device__ __forceinline__ float full(float product, int query, int key) const;
};

// Within a few float32 roundings, near 0 as well: a Taylor polynomial there, exponentials elsewhere.
__device__ __forceinline__ float tanh_of(float x) {
  const float a = fabsf(x), x2 = x * x;
  const float near = a * (1.f + x2 * (-1.f / 3 + x2 * (2.f / 15 + x2 * (-17.f / 315 + x2 * (62.f / 2835)))));
  const float t = exp2_fast(a * (-2.f * kLog2E));
  return copysignf(a < 0.25f ? near : (1.f - t) / (1.f + t), x);
}

__device__ __forceinline__ float Scores::bent(float product) const { return tanh_of(product * scale); }

__device__ __forceinline__ float Scores::full(float product, int query, int key) const {
  if (query >= length_q || !sees(query, key)) return -XF_INFINITY;
  float s = cap != 0.f ? bent(product) * cap : product * scale;
  const int distance = key - query - shift;
  s -= slope * fabsf(static_cast<float>(distance));
  if (bias) s += bias[distance] * kLog2E;
  // The least number of a type is not -infinity: a row of nothing else weighs its keys alike. What is below -1e20 is one power of
  // two, which lse takes to the backward and back without a rounding.
  const auto added = [&](float x) { return s + (x < -1e20f ? (x == -XF_INFINITY ? x : -0x1p126f) : x * kLog2E); };
  if (mask) {
    const char* at = mask + (query * mask_q + key * mask_k) * mask_bytes();
    switch (mask_element) {
      case Element::float32: return added(*reinterpret_cast<const float*>(at));
      case Element::bfloat16: return added(to_float(*reinterpret_cast<const bf16*>(at)));
      case Element::float16: return added(to_float(*reinterpret_cast<const half*>(at)));
      case Element::boolean: return *at ? s : -XF_INFINITY;
    }
  }
  return s;
}

// ---- dropout ----

// Which weights of one head are kept: word j % 4 of Philox4x32-10 with counter (j / 4, i, b Hq + h, 0) belongs to element (i, j),
// which is kept if it is >= threshold. The same bits as csrc/cpu/attention_tiles.h's.
struct Dropout {
  uint32_t key0, key1, stream, threshold;
  float rescale;  // of what is kept
  bool active;

  __device__ __forceinline__ Dropout(const CudaAttention& a, int batch, int head) : active(a.dropout_p > 0.) {
    const uint64_t seed = active ? static_cast<uint64_t>(*a.dropout_seed) : 0;
    const bool all = a.dropout_p >= 1.;
    key0 = static_cast<uint32_t>(seed);
    key1 = static_cast<uint32_t>(seed >> 32);
    stream = static_cast<uint32_t>(batch * a.heads_q + head);
    threshold = all ? 0xffffffffu : static_cast<uint32_t>(a.dropout_p * 4294967296.);
    rescale = all ? 0.f : active ? static_cast<float>(1. / (1. - a.dropout_p)) : 1.f;
  }

  // Bit w: key 4 group + w.
  __device__ __forceinline__ uint32_t four_keys(int query, int group) const {
    uint32_t c0 = group, c1 = query, c2 = stream, c3 = 0, k0 = key0, k1 = key1;
#pragma unroll
    for (int round = 0; round < 10; ++round) {
      const uint32_t high0 = __umulhi(c0, 0xD2511F53u), low0 = c0 * 0xD2511F53u;
      const uint32_t high1 = __umulhi(c2, 0xCD9E8D57u), low1 = c2 * 0xCD9E8D57u;
      c0 = high1 ^ c1 ^ k0;
      c1 = low1;
      c2 = high0 ^ c3 ^ k1;
      c3 = low0;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    return (c0 >= threshold) | (c1 >= threshold) << 1 | (c2 >= threshold) << 2 | (c3 >= threshold) << 3;
  }

  // Bits of a lane's four sums in a 16x8 block whose rows are queries and whose columns are keys; multiples of 8. Two lanes share
  // four keys of two rows: each draws for one row.
  __device__ __forceinline__ uint32_t keep(int query0, int key0) const {
    const int g = lane_index() / 4, t = lane_index() % 4, odd = t % 2;
    const uint32_t mine = four_keys(query0 + g + 8 * odd, key0 / 4 + t / 2);
    const uint32_t theirs = __shfl_xor_sync(0xffffffffu, mine, 1);
    return odd ? (theirs >> 2 & 3) | (mine >> 2 & 3) << 2 : (mine & 3) | (theirs & 3) << 2;
  }
  // The same where rows are keys and columns are queries. Four lanes share four keys, twice, of two queries: each draws one.
  __device__ __forceinline__ uint32_t keep_transposed(int key0, int query0) const {
    const int g = lane_index() / 4, t = lane_index() % 4, which = g % 4;
    uint32_t bits = four_keys(query0 + 2 * t + which % 2, key0 / 4 + g / 4 + which / 2 * 2) << 4 * which;
    bits |= __shfl_xor_sync(0xffffffffu, bits, 4);
    bits |= __shfl_xor_sync(0xffffffffu, bits, 8);
    bits >>= which;
    return (bits & 1) | (bits >> 4 & 1) << 1 | (bits >> 8 & 1) << 2 | (bits >> 12 & 1) << 3;
  }
};

// ---- sums over lanes ----

// Over the four lanes that hold a row.
__device__ __forceinline__ float row_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
__device__ __forceinline__ float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int flip = 16; flip > 0; flip /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, flip));
  return x;
}
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int flip = 16; flip > 0; flip /= 2) x += __shfl_xor_sync(0xffffffffu, x, flip);
  return x;
}

// ---- softmax ----

// A warp's rows: what of their softmax has been seen. A lane holds rows g and g + 8 of each 16.
template <int M, int kWidth>
struct Softmax {
  float max[M][2], sum[M][2];  // sum: of the lane's own columns

  __device__ __forceinline__ void start(float sink) {  // a sink counts as one key without a value
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        max[m][r] = sink;
        sum[m][r] = sink != -XF_INFINITY && lane_index() % 4 == 0 ? 1.f : 0.f;
      }
  }

  // Scores to weights, scaled by `scale` on the way; `out` is brought to the new maximum.
  template <int kKeys>
  __device__ __forceinline__ void weigh(Sums<M, kKeys>& scores, Sums<M, kWidth>& out, float scale) {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float most = -XF_INFINITY;
#pragma unroll
        for (int j = 0; j < kKeys / 8; ++j) most = fmaxf(most, fmaxf(scores.of[m][j][2 * r], scores.of[m][j][2 * r + 1]));
        const float new_max = fmaxf(max[m][r], row_max(most) * scale);
        const float finite = new_max == -XF_INFINITY ? 0.f : new_max;
        const float correction = exp2_fast(max[m][r] - finite);
        max[m][r] = new_max;
        float total = 0.f;
#pragma unroll
        for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
          for (int e = 2 * r; e < 2 * r + 2; ++e) {
            const float weight = exp2_fast(scores.of[m][j][e] * scale - finite);
            scores.of[m][j][e] = weight;
            total += weight;
          }
        sum[m][r] = sum[m][r] * correction + total;
#pragma unroll
        for (int j = 0; j < kWidth / 8; ++j) {
          out.of[m][j][2 * r] *= correction;
          out.of[m][j][2 * r + 1] *= correction;
        }
      }
  }
};

}  // namespace xformer_fast
