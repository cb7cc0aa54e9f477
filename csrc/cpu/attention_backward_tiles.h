// Tile passes of the attention backward that the forward has no use for: packed operands, the step from scores to P and
// dS, and the sums of the optional gradients. Tiles are S^T as in attention_tiles.h: rows are keys, lanes are queries.
#pragma once
#include "attention_global.h"

namespace xformer_fast {
namespace XFORMER_FAST_ISA {
namespace {

// What a tensor element becomes in a packed operand, and how many of them one step of a tile product takes.
template <class T> struct OperandOf { using type = float; };
#if defined(XF_BF16_DOT)
template <> struct OperandOf<bfloat16> { using type = bfloat16; };
#endif
template <class T> using Operand = typename OperandOf<T>::type;
template <class Op> constexpr int64_t kStep = int64_t(sizeof(float) / sizeof(Op));

// Queries of a block. Long enough for the products that reduce over queries, twice as many where a step takes two.
template <class Op> constexpr int64_t kBlockQ = 64 * kStep<Op>;

constexpr int64_t kPanelVectors = 2;  // narrow tiles have many rows: fewer loads of B, and a short store at the end

// Hands out 64-byte aligned pieces of a buffer; without a buffer it only measures.
class Arena {
 public:
  explicit Arena(char* buffer) : buffer_(buffer) {}
  template <class T>
  T* take(int64_t count) {
    const size_t at = used_;
    used_ += (size_t(count) * sizeof(T) + 63) / 64 * 64;
    return buffer_ ? reinterpret_cast<T*>(buffer_ + at) : nullptr;
  }
  size_t bytes() const { return used_; }

 private:
  char* buffer_;
  size_t used_ = 0;
};

// C[rows][width] as in tile_product, cut into panels of nearly equal width. `width` counts lanes.
template <class Op>
void product(int64_t rows, int64_t width, int64_t depth, const Op* a, int64_t a_row, int64_t a_red, const Op* b,
             int64_t b_ld, float* c, int64_t c_ld, Start start) {
  int64_t vectors = width / kLanes;
  for (int64_t panels = (vectors + kPanelVectors - 1) / kPanelVectors; panels > 0; --panels) {
    const int64_t now = (vectors + panels - 1) / panels;
    tile_product(rows, int(now), depth, a, a_row, a_red, b, b_ld, c, c_ld, start);
    vectors -= now;
    b += now * kLanes * kStep<Op>;
    c += now * kLanes;
  }
}

// ---- rows in and out ----

template <class T>
XF_INLINE void convert_row(const T* in, int64_t dim, float* out, int64_t width) {
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) store(out + d, load(in + d));
  for (; d < width; d += kLanes) store(out + d, d < dim ? load(in + d, int(dim - d)) : zero());
}
#if defined(XF_BF16_DOT)
XF_INLINE void convert_row(const bfloat16* in, int64_t dim, bfloat16* out, int64_t width) {
  for (int64_t d = 0; d < width; d += 2 * kLanes) store(reinterpret_cast<float*>(out + d), load_pairs(in + d, dim - d));
}
#endif

// `rows` rows of a tensor to dense rows of `width` operands; columns past `dim`, rows from `rows` to `padded`, and rows
// whose neg_lse is -inf (no key: whatever they hold must not matter) become 0.
template <class T, class Op>
XF_NOINLINE void pack_rows(const T* in, int64_t stride, int64_t rows, int64_t padded, int64_t dim, Op* out,
                           int64_t width, const float* neg_lse = nullptr) {
  constexpr int64_t kAhead = 4;  // rows far apart are in other pages: no hardware prefetcher follows
  for (int64_t r = 0; r < padded; ++r, out += width) {
    if (r + kAhead < rows)
      for (int64_t d = 0; d < dim; d += 64 / int64_t(sizeof(T))) __builtin_prefetch(in + (r + kAhead) * stride + d);
    if (r < rows && !(neg_lse && neg_lse[r] == -kInfinity))
      convert_row(in + r * stride, dim, out, width);
    else
      __builtin_memset(static_cast<void*>(out), 0, size_t(width) * sizeof(Op));
  }
}

// out = scale * sums, rounded; 0 where there are no sums.
template <class T>
XF_INLINE void store_row(T* out, int64_t dim, const float* sums, float scale) {
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) store(out + d, sums ? load(sums + d) * scale : zero());
  if (d < dim) store(out + d, sums ? load(sums + d) * scale : zero(), int(dim - d));
}

XF_INLINE void add_row(float* sums, const float* row, int64_t width) {
  for (int64_t d = 0; d < width; d += kLanes) store(sums + d, load(sums + d) + load(row + d));
}

// ---- from scores to gradients ----

// Tiles of (keys, kBlockQ) numbers. For float32 operands p and ds are scores and grad themselves.
template <class Op>
struct GradientTile {
  float* scores;   // in: S^T
  float* grad;     // in: dP^T; out: dS^T, if asked for or if operands are float32
  float* factor;   // under a softcap, in: 1 - tanh^2; out: dS^T before it
  float* dropout;  // under dropout: 0 or 1 / (1 - p)
  Op* p;           // out: P^T as dropped
  Op* ds;          // out: dS^T
  Op* ds_pairs;    // out, bfloat16: dS^T as (keys / 2, queries, 2); a last odd key is paired with zeros

  // The part from key `row` on. For bfloat16 the float32 tiles are that part's alone.
  GradientTile from(int64_t row) const {
    GradientTile t = *this;
    t.p += row * kBlockQ<Op>;
    t.ds += row * kBlockQ<Op>;
    t.ds_pairs += row * kBlockQ<Op>;
    if constexpr (kStep<Op> == 1) t.scores = t.p, t.grad = t.ds;
    return t;
  }
};

XF_INLINE void store_key(const GradientTile<float>& t, int64_t at, Vec p, Vec ds) {
  store(t.p + at, p);
  store(t.ds + at, ds);
}
XF_INLINE void store_two_keys(const GradientTile<float>& t, int64_t at, int64_t ld, const Vec (&p)[2],
                              const Vec (&ds)[2]) {
  store_key(t, at, p[0], ds[0]);
  store_key(t, at + ld, p[1], ds[1]);
}
#if defined(XF_BF16_DOT)
XF_INLINE void store_half(bfloat16* out, __m512i rows, bool upper) {
  const __m256i half = upper ? _mm512_extracti64x4_epi64(rows, 1) : _mm512_castsi512_si256(rows);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), half);
}
XF_INLINE void store_two_keys(const GradientTile<bfloat16>& t, int64_t at, int64_t ld, const Vec (&p)[2],
                              const Vec (&ds)[2]) {
  const __m512i p_rows = (__m512i)_mm512_cvtne2ps_pbh(p[1], p[0]);
  const __m512i ds_rows = (__m512i)_mm512_cvtne2ps_pbh(ds[1], ds[0]);
  store_half(t.p + at, p_rows, false);
  store_half(t.p + at + ld, p_rows, true);
  store_half(t.ds + at, ds_rows, false);
  store_half(t.ds + at + ld, ds_rows, true);
  const int64_t row = at / ld, lane = at % ld;
  store(reinterpret_cast<float*>(t.ds_pairs + row * ld + 2 * lane), (Vec)to_bf16_pairs(ds[0], ds[1]));
}
XF_INLINE void store_key(const GradientTile<bfloat16>& t, int64_t at, Vec p, Vec ds) {
  const __m512i p_row = (__m512i)_mm512_cvtne2ps_pbh(zero(), p);
  const __m512i ds_row = (__m512i)_mm512_cvtne2ps_pbh(zero(), ds);
  constexpr int64_t ld = kBlockQ<bfloat16>;
  store_half(t.p + at, p_row, false);
  store_half(t.ds + at, ds_row, false);
  store(reinterpret_cast<float*>(t.ds_pairs + at / ld * ld + 2 * (at % ld)), (Vec)to_bf16_pairs(ds, zero()));
}
#endif

// Numbers of a query: minus lse, what rounding took from that (in units of log2), and delta; of one vector of them.
struct RowNumbers { const float *neg_lse, *neg_rest, *delta; };
struct RowVectors {
  Vec neg_lse, neg_rest, delta;
  XF_INLINE RowVectors(const RowNumbers& rows, int64_t lane)
      : neg_lse(load(rows.neg_lse + lane)), neg_rest(load(rows.neg_rest + lane)), delta(load(rows.delta + lane)) {}
};

template <class Op, bool kDropout, bool kSoftcap, bool kKeepFloat>
XF_INLINE void gradient_of(const GradientTile<Op>& t, int64_t at, float scale, const RowVectors& row, Vec& p, Vec& ds) {
  const Vec difference = load(t.scores + at) * scale + row.neg_lse;  // exact if it is small, however large the score
  const Vec exponent = difference * kLog2e + row.neg_rest;
  p = kStep<Op> == 1 || kKeepFloat ? exp2(exponent) : exp2_coarse(exponent);
  Vec grad = load(t.grad + at);
  const Vec kept = kDropout ? load(t.dropout + at) : zero();
  if (kDropout) grad *= kept;
  ds = p * (grad - row.delta);
  if (kDropout) p *= kept;
  if (kSoftcap) {
    const Vec factor = load(t.factor + at);
    store(t.factor + at, ds);
    ds *= factor;
  } else if (kStep<Op> == 2 && kKeepFloat) {
    store(t.grad + at, ds);
  }
}

template <class Op, bool kDropout, bool kSoftcap, bool kKeepFloat>
XF_NOINLINE void softmax_gradient_of(const GradientTile<Op>& t, int64_t keys, int64_t lane0, int64_t lane1, float scale,
                                     const RowNumbers& rows) {
  constexpr int64_t ld = kBlockQ<Op>;
  const auto gradient = gradient_of<Op, kDropout, kSoftcap, kKeepFloat>;
  int64_t j = 0;
  for (; j + 2 <= keys; j += 2)
    for (int64_t l = lane0; l < lane1; l += kLanes) {
      const RowVectors row(rows, l);
      Vec p[2], ds[2];
      gradient(t, j * ld + l, scale, row, p[0], ds[0]);
      gradient(t, j * ld + ld + l, scale, row, p[1], ds[1]);
      store_two_keys(t, j * ld + l, ld, p, ds);
    }
  if (j < keys)
    for (int64_t l = lane0; l < lane1; l += kLanes) {
      Vec p, ds;
      gradient(t, j * ld + l, scale, RowVectors(rows, l), p, ds);
      store_key(t, j * ld + l, p, ds);
    }
}

// P = exp(scores * scale - lse) and dS = P * (dP - delta), with dropout and softcap if the tile has them. For
// bfloat16 pairs, keep_float: dS is kept in float32 for sums over many scores, which cancel, so that the coarse exponential
// would show.
template <class Op, bool kDropout, bool kSoftcap>
XF_INLINE void softmax_gradient_with(const GradientTile<Op>& t, int64_t keys, int64_t lane0, int64_t lane1, float scale,
                                     const RowNumbers& rows, bool keep_float) {
  if (keep_float && kStep<Op> == 2)
    return softmax_gradient_of<Op, kDropout, kSoftcap, true>(t, keys, lane0, lane1, scale, rows);
  softmax_gradient_of<Op, kDropout, kSoftcap, false>(t, keys, lane0, lane1, scale, rows);
}
template <class Op>
void softmax_gradient(const GradientTile<Op>& t, int64_t keys, int64_t lane0, int64_t lane1, float scale,
                      const RowNumbers& rows, bool keep_float) {
  if (t.dropout && t.factor)
    softmax_gradient_with<Op, true, true>(t, keys, lane0, lane1, scale, rows, keep_float);
  else if (t.dropout)
    softmax_gradient_with<Op, true, false>(t, keys, lane0, lane1, scale, rows, keep_float);
  else if (t.factor)
    softmax_gradient_with<Op, false, true>(t, keys, lane0, lane1, scale, rows, keep_float);
  else
    softmax_gradient_with<Op, false, false>(t, keys, lane0, lane1, scale, rows, keep_float);
}

// factor = 1 - (s / softcap)^2 of capped scores.
XF_NOINLINE void softcap_factor(const ScoreTile& tile, const Segment& segment, float softcap, float* factor) {
  const float inverse = 1.f / softcap;
  for (int64_t r = segment.row0; r < segment.row1; ++r)
    for (int v = segment.vector0; v < segment.vector1; ++v) {
      const Vec t = load(tile.scores + r * tile.ld + v * kLanes) * inverse;
      store(factor + r * tile.ld + v * kLanes, 1.f - t * t);
    }
}

// What dropout multiplies each probability by. Keys of a tile are those of a list, or start at a multiple of four.
XF_NOINLINE void dropout_factor(const DropoutKeep& dropout, const ScoreTile& tile, const Segment& segment,
                                const int64_t* keys, float* factor) {
  if (keys) {
    for (int64_t r = segment.row0; r < segment.row1; ++r)
      for (int v = segment.vector0; v < segment.vector1; ++v) {
        const IVec keep = dropout_keep(dropout, tile, v, keys[r]);
        store(factor + r * tile.ld + v * kLanes, keep ? broadcast(dropout.rescale) : zero());
      }
    return;
  }
  for (int64_t r = segment.row0; r < segment.row1; r += 4)
    for (int v = segment.vector0; v < segment.vector1; ++v) {
      IVec keep[4];
      dropout(tile.query0 + v * kLanes, (tile.key0 + r) / 4, keep);
      for (int64_t w = 0; w < min_of(4, segment.row1 - r); ++w)
        store(factor + (r + w) * tile.ld + v * kLanes, keep[w] ? broadcast(dropout.rescale) : zero());
    }
}

// ---- optional gradients ----

// sum over the segment of ds * |p_i - j|.
XF_NOINLINE float distance_sum(const float* ds, const ScoreTile& tile, const Segment& segment) {
  const IVec base = lane_index() + int32_t(tile.query0 + tile.shift - tile.key0);
  Vec sum = zero();
  for (int64_t r = segment.row0; r < segment.row1; ++r)
    for (int v = segment.vector0; v < segment.vector1; ++v)
      sum += absolute(to_float(base + int32_t(v * kLanes - r))) * load(ds + r * tile.ld + v * kLanes);
  return reduce_add(sum);
}

// {low's last lane, all of `into` but its last}.
XF_INLINE Vec shift_in(Vec low, Vec into) {
#if defined(XF_AVX512)
  return (Vec)_mm512_alignr_epi32((__m512i)into, (__m512i)low, kLanes - 1);
#else
  return __builtin_shuffle(low, into, lane_index() + (kLanes - 1));
#endif
}

XF_INLINE void add_to(float* sums, Vec v) { store(sums, load(sums) + v); }

// sums[p_i - j] += ds[j][i]. From key to key the diagonals move by one lane: `open` is the sums of those that the next
// keys still add to, `done` those that have left it at the top.
XF_NOINLINE void add_distance_gradient(const float* ds, const ScoreTile& tile, const Segment& segment, float* sums) {
  for (int v = segment.vector0; v < segment.vector1; ++v) {
    float* at = sums + tile.query0 + tile.shift - tile.key0 + v * kLanes - segment.row0;
    Vec open = zero(), done = zero();
    for (int64_t r = segment.row0, n = 1; r < segment.row1; ++r, ++n, --at) {
      open += load(ds + r * tile.ld + v * kLanes);
      done = shift_in(open, done);
      open = shift_in(zero(), open);
      if (n == kLanes || r + 1 == segment.row1) {  // lanes of `done` past n are 0
        add_to(at + kLanes - 1, done);
        done = zero();
        n = 0;
      }
    }
    add_to(at, open);
  }
}

// grad[i * stride_q + j * stride_k] += ds[j][i]. A stride of 0 sums over that axis: within the segment first, so that no
// long chain of additions loses digits.
XF_NOINLINE void add_mask_gradient(const float* ds, const ScoreTile& tile, const Segment& segment, float* grad,
                                   int64_t stride_q, int64_t stride_k) {
  if (stride_q == 0) {
    float all = 0.f;
    for (int64_t r = segment.row0; r < segment.row1; ++r) {
      Vec sum = zero();
      for (int v = segment.vector0; v < segment.vector1; ++v) sum += load(ds + r * tile.ld + v * kLanes);
      const float of_key = reduce_add(sum);
      if (stride_k != 0) grad[r * stride_k] += of_key;
      all += of_key;
    }
    if (stride_k == 0) grad[0] += all;
    return;
  }
  for (int v = segment.vector0; v < segment.vector1; ++v) {
    const int lanes = int(min_of(kLanes, tile.queries - v * kLanes));
    if (stride_k == 0) {
      Vec sum = zero();
      for (int64_t r = segment.row0; r < segment.row1; ++r) sum += load(ds + r * tile.ld + v * kLanes);
      for (int i = 0; i < lanes; ++i) grad[(v * kLanes + i) * stride_q] += sum[i];
      continue;
    }
    for (int64_t r = segment.row0; r < segment.row1; r += kLanes) {
      const int keys = int(min_of(kLanes, segment.row1 - r));
      const float* in = ds + r * tile.ld + v * kLanes;
      float* out = grad + v * kLanes * stride_q + r * stride_k;
      if (stride_k == 1) {
        Vec rows[kLanes];
#pragma GCC unroll 16
        for (int k = 0; k < kLanes; ++k) rows[k] = load(in + min_of(k, keys - 1) * tile.ld);
        transpose(rows);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i)
          if (i < lanes) store(out + i * stride_q, load(out + i * stride_q, keys) + rows[i], keys);
      } else {
        for (int k = 0; k < keys; ++k)
          for (int i = 0; i < lanes; ++i) out[i * stride_q + k * stride_k] += in[k * tile.ld + i];
      }
    }
  }
}

// Sums [row or column of the map][query], `block` queries each, as a tensor (rows, width); 0 where there are no sums.
XF_NOINLINE void store_map_gradient(const float* sums, int64_t block, int64_t rows, int64_t width, float* out) {
  alignas(64) float ones[kLanes];
  store(ones, broadcast(1.f));
  if (!sums) __builtin_memset(out, 0, size_t(rows * width) * sizeof(float));
  for (int64_t i = 0; sums && i < rows; i += kLanes)
    store_transposed(sums + i, block, min_of(kLanes, rows - i), width, ones, out + i * width, width);
}

// -sum_i exp(sink - lse_i) * delta_i; the sink takes part in lse, so that the exponent is never above 0.
XF_NOINLINE float sink_gradient(float sink, const RowNumbers& numbers, int64_t rows) {
  double sum = 0.;
  for (int64_t i = 0; i < rows; i += kLanes) {
    const int n = int(min_of(kLanes, rows - i));
    const Vec difference = minimum(load(numbers.neg_lse + i, n) + sink, zero());
    const Vec p = exp2(difference * kLog2e + load(numbers.neg_rest + i, n));
    sum += double(reduce_add(p * load(numbers.delta + i, n)));
  }
  return float(-sum);
}

}  // namespace
}  // namespace XFORMER_FAST_ISA
}  // namespace xformer_fast
