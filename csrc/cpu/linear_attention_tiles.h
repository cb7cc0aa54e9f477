// What the linear-attention forward and backward share around the tile product: feature maps and their derivatives, the
// cutting of sequences into chunks and segments, decay weights, and small passes over tiles of rows.
//
// A chunk is at most kChunk adjacent positions. Buffers of rows are padded to a multiple of kPad columns with zeros, so
// that passes take whole vectors on every instruction set. A state is kv [padded head_dim][padded head_dim_v], then z.
#pragma once
#include "attention_tiles.h"
#include "linear_attention.h"

namespace xformer_fast {
namespace XFORMER_FAST_ISA {
namespace {

#if defined(XF_AVX512)
constexpr int kChunk = 64;
#else
constexpr int kChunk = 32;  // half a chunk is half the triangle: of 9 products of the backward, 1.5 are saved
#endif
constexpr int kPad = 16;           // of columns, and the side of the squares that a triangle is cut into
constexpr int kSegmentChunks = 8;  // at least, where a sequence is split for parallelism
constexpr int kFewStreams = 8;     // fewer heads than this leave cores idle: split the sequences
constexpr int kManyTasks = 32;

template <class C> constexpr int kStep = sizeof(float) / sizeof(C);  // reduction steps that one multiply-add takes

XF_INLINE int64_t padded(int64_t n) { return round_up(n, kPad); }

template <class T, class I>
T* take(I*& space, int64_t count) {  // `count` elements, 64-byte aligned
  T* mine = reinterpret_cast<T*>(space);
  space += round_up(count * sizeof(T), 64) / sizeof(I);
  return mine;
}

// C[rows][columns] = start + A B, columns a multiple of kLanes, of any number of tile widths.
template <class C>
void multiply(int64_t rows, int64_t columns, int64_t depth, const C* a, int64_t a_row, int64_t a_red, const C* b, int64_t b_ld,
              float* c, int64_t c_ld, Start start, const float* scale = nullptr, Prefetch* prefetch = nullptr) {
  const auto vectors_at = [&](int64_t v) { return int(min_of(kTileVectors, (columns - v) / kLanes)); };
  if (prefetch) {
    int64_t steps = 0;
    for (int64_t v = 0; v < columns; v += kTileVectors * kLanes) steps += tile_product_steps(rows, vectors_at(v));
    prefetch->spread(steps);
  }
  for (int64_t v = 0; v < columns; v += kTileVectors * kLanes)
    tile_product(rows, vectors_at(v), depth, a, a_row, a_red, b + v * kStep<C>, b_ld, c + v, c_ld, start, scale, prefetch);
}

// ---- feature maps ----

XF_INLINE Vec exponential(Vec x) {
  const Vec y = x * kLog2e;
  return exp2(y > 200.f ? broadcast(200.f) : y);
}

template <FeatureMap M>
XF_INLINE Vec mapped(Vec x) {
  const Vec positive = x < 0.f ? zero() : x;  // NaN stays
  switch (M) {
    case FeatureMap::elu: return x > 0.f ? x + 1.f : exponential(x);
    case FeatureMap::relu: return positive;
    case FeatureMap::square_relu: return positive * positive;
    case FeatureMap::exp: return exponential(x);
    default: return x;
  }
}
template <FeatureMap M>
XF_INLINE Vec derivative(Vec x, Vec phi) {
  switch (M) {
    case FeatureMap::elu: return x > 0.f ? broadcast(1.f) : phi;
    case FeatureMap::relu: return x > 0.f ? broadcast(1.f) : zero();
    case FeatureMap::square_relu: return x > 0.f ? x + x : zero();
    case FeatureMap::exp: return phi;
    default: return broadcast(1.f);
  }
}

template <class T, class Out>
XF_INLINE void softmax_row(const T* in, int64_t columns, Out* out) {
  const int tail = int(columns % kLanes);
  const int64_t whole = columns - tail;
  const Vec lowest = broadcast(-kInfinity);
  const IVec inside = lane_index() < broadcast_int(tail);
  Vec most = lowest;
  for (int64_t c = 0; c < whole; c += kLanes) most = maximum(load(in + c), most);
  if (tail) most = maximum(inside ? load(in + whole, tail) : lowest, most);
  const float top = reduce_max(most);
  alignas(64) float weights[kLanes];
  Vec sum = zero();
  for (int64_t c = 0; c < columns; c += kLanes)
    sum += c < whole ? exponential(load(in + c) - top) : inside ? exponential(load(in + c, tail) - top) : zero();
  const float ratio = 1.f / reduce_add(sum);
  for (int64_t c = 0; c < columns; c += kLanes) {
    store(weights, c < whole ? exponential(load(in + c) - top) : inside ? exponential(load(in + c, tail) - top) : zero());
    store(out + c, load(weights) * ratio);
  }
}

template <FeatureMap M, class T, class Out>
XF_NOINLINE void map_rows_of(const T* in, int64_t stride, int64_t rows, int64_t columns, Out* out, int64_t ld) {
  const int tail = int(columns % kLanes);
  const int64_t whole = columns - tail;
  for (int64_t r = 0; r < rows; ++r, in += stride, out += ld) {
    int64_t c = 0;
    if constexpr (M == FeatureMap::softmax) {
      softmax_row(in, columns, out);
      c = round_up(columns, kLanes);
    } else {
      for (; c < whole; c += kLanes) store(out + c, mapped<M>(load(in + c)));
      if (tail) {
        const IVec inside = lane_index() < broadcast_int(tail);
        store(out + c, inside ? mapped<M>(load(in + c, tail)) : zero());
        c += kLanes;
      }
    }
    for (; c < ld; c += kLanes) store(out + c, zero());
  }
}

// out[rows][ld] = phi(in), zeros past `columns`.
template <class T, class Out>
void map_rows(FeatureMap map, const T* in, int64_t stride, int64_t rows, int64_t columns, Out* out, int64_t ld) {
  switch (map) {
    case FeatureMap::identity: return map_rows_of<FeatureMap::identity>(in, stride, rows, columns, out, ld);
    case FeatureMap::elu: return map_rows_of<FeatureMap::elu>(in, stride, rows, columns, out, ld);
    case FeatureMap::relu: return map_rows_of<FeatureMap::relu>(in, stride, rows, columns, out, ld);
    case FeatureMap::square_relu: return map_rows_of<FeatureMap::square_relu>(in, stride, rows, columns, out, ld);
    case FeatureMap::exp: return map_rows_of<FeatureMap::exp>(in, stride, rows, columns, out, ld);
    case FeatureMap::softmax: return map_rows_of<FeatureMap::softmax>(in, stride, rows, columns, out, ld);
  }
}

template <FeatureMap M, class T>
XF_NOINLINE void pull_back_rows_of(const T* in, int64_t stride, int64_t rows, int64_t columns, const float* phi,
                                   const float* grad, int64_t ld, T* out, int64_t out_stride) {
  for (int64_t r = 0; r < rows; ++r, in += stride, phi += ld, grad += ld, out += out_stride) {
    float mean = 0.f;
    if constexpr (M == FeatureMap::softmax) {
      Vec sum = zero();
      for (int64_t c = 0; c < ld; c += kLanes) sum += load(phi + c) * load(grad + c);
      mean = reduce_add(sum);
    }
    for (int64_t c = 0; c < columns; c += kLanes) {
      const int n = int(min_of(kLanes, columns - c));
      Vec g = load(grad + c);
      if constexpr (M == FeatureMap::softmax)
        g = (g - mean) * load(phi + c);
      else if constexpr (M != FeatureMap::identity)
        g = g * derivative<M>(n == kLanes ? load(in + c) : load(in + c, n), load(phi + c));
      if (n == kLanes)
        store(out + c, g);
      else
        store(out + c, g, n);
    }
  }
}

// out = (d phi / d in)^T grad, row by row.
template <class T>
void pull_back_rows(FeatureMap map, const T* in, int64_t stride, int64_t rows, int64_t columns, const float* phi,
                    const float* grad, int64_t ld, T* out, int64_t out_stride) {
  switch (map) {
    case FeatureMap::identity: return pull_back_rows_of<FeatureMap::identity>(in, stride, rows, columns, phi, grad, ld, out, out_stride);
    case FeatureMap::elu: return pull_back_rows_of<FeatureMap::elu>(in, stride, rows, columns, phi, grad, ld, out, out_stride);
    case FeatureMap::relu: return pull_back_rows_of<FeatureMap::relu>(in, stride, rows, columns, phi, grad, ld, out, out_stride);
    case FeatureMap::square_relu: return pull_back_rows_of<FeatureMap::square_relu>(in, stride, rows, columns, phi, grad, ld, out, out_stride);
    case FeatureMap::exp: return pull_back_rows_of<FeatureMap::exp>(in, stride, rows, columns, phi, grad, ld, out, out_stride);
    case FeatureMap::softmax: return pull_back_rows_of<FeatureMap::softmax>(in, stride, rows, columns, phi, grad, ld, out, out_stride);
  }
}

// ---- passes over rows ----

// out[r] = sum over columns of x[r] y[r]; y_ld = 0: one y for all rows. columns is a multiple of kLanes.
template <class X, class Y>
XF_NOINLINE void row_dots(const X* x, int64_t x_ld, const Y* y, int64_t y_ld, int64_t rows, int64_t columns, float* out) {
  for (int64_t r0 = 0; r0 < rows; r0 += kLanes) {
    Vec part[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      part[i] = zero();
      if (r0 + i >= rows) continue;
      const X* p = x + (r0 + i) * x_ld;
      const Y* q = y + (r0 + i) * y_ld;
      for (int64_t c = 0; c < columns; c += kLanes) part[i] += load(p + c) * load(q + c);
    }
    transpose(part);
    Vec sum = part[0];
#pragma GCC unroll 16
    for (int i = 1; i < kLanes; ++i) sum += part[i];
    store(out + r0, sum);
  }
}

// sum[c] = keep * sum[c] + sum over rows of weights[r] x[r][c]  (weights nullptr: 1).
template <class X>
XF_NOINLINE void add_rows(const X* x, int64_t ld, const float* weights, int64_t rows, int64_t columns, float keep, float* sum) {
  for (int64_t c = 0; c < columns; c += kLanes) {
    Vec first = zero(), second = zero();
    int64_t r = 0;
    for (; r + 1 < rows; r += 2) {
      first += weights ? load(x + r * ld + c) * weights[r] : load(x + r * ld + c);
      second += weights ? load(x + (r + 1) * ld + c) * weights[r + 1] : load(x + (r + 1) * ld + c);
    }
    if (r < rows) first += weights ? load(x + r * ld + c) * weights[r] : load(x + r * ld + c);
    store(sum + c, load(sum + c) * keep + (first + second));
  }
}

// rows[r] += weights[r] * y  (weights nullptr: 1).
XF_NOINLINE void add_outer(const float* weights, const float* y, int64_t rows, int64_t columns, float* out, int64_t ld) {
  for (int64_t r = 0; r < rows; ++r, out += ld) {
    const float w = weights ? weights[r] : 1.f;
    for (int64_t c = 0; c < columns; c += kLanes) store(out + c, load(y + c) * w + load(out + c));
  }
}

// out[r] = weights[r] * in[r].
template <class X>
XF_NOINLINE void weigh_rows(const X* in, int64_t in_ld, const float* weights, int64_t rows, int64_t columns, X* out, int64_t ld) {
  for (int64_t r = 0; r < rows; ++r, in += in_ld, out += ld)
    for (int64_t c = 0; c < columns; c += kLanes) store(out + c, load(in + c) * weights[r]);
}

// out[r][0..columns) = factor[r] * in[r], to the element type of a tensor.
template <class T>
XF_NOINLINE void store_rows(const float* in, int64_t ld, const float* factor, int64_t rows, int64_t columns, T* out, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r, in += ld, out += stride) {
    const float f = factor ? factor[r] : 1.f;
    int64_t c = 0;
    for (; c + kLanes <= columns; c += kLanes) store(out + c, load(in + c) * f);
    if (c < columns) store(out + c, load(in + c) * f, int(columns - c));
  }
}

#if defined(XF_BF16_DOT)
// out[r / 2][column][2] = weights[r] * in[r][column]; a last odd row is paired with zeros (weights nullptr: 1).
template <class X>
XF_NOINLINE void pair_rows(const X* in, int64_t ld, const float* weights, int64_t rows, int64_t columns, bfloat16* out) {
  for (int64_t r = 0; r < rows; r += 2, in += 2 * ld, out += 2 * columns) {
    const float w0 = weights ? weights[r] : 1.f, w1 = weights && r + 1 < rows ? weights[r + 1] : 1.f;
    for (int64_t c = 0; c < columns; c += kLanes) {
      const Vec high = r + 1 < rows ? load(in + ld + c) * w1 : zero();
      __builtin_memcpy(out + 2 * c, &(const UVec&)to_bf16_pairs(load(in + c) * w0, high), sizeof(UVec));
    }
  }
}
#endif

// ---- decay ----

// Powers of one head's decay, n = 0..kChunk; all ones without decay.
struct Decay {
  bool active = false;
  alignas(64) float power[kChunk + kLanes];
  alignas(64) float down[kChunk + kLanes];  // down[j] of a chunk of n rows is power[n - 1 - j]
  alignas(64) float up[kChunk + kLanes];

  void start(const LinearAttention& a, int64_t h) {
    active = a.decay != nullptr;
    base_ = active ? double(a.decay[h]) : 1.;
    initial_ = a.initial_kv != nullptr;
    double p = 1.;  // each power is rounded once: a walk of many chunks multiplies many of them
    for (int n = 0; n < kChunk + kLanes; ++n, p *= base_) power[n] = float(p);
  }
  // decay^n for any n >= 0.
  float at(int64_t n) const {
    double result = 1., square = base_;
    for (; n > 0; n >>= 1, square *= square)
      if (n & 1) result *= square;
    return float(result);
  }
  // Weights of a chunk of n rows: to its end from row j, and to row i from the state before position `first` rows away. A query
  // before that state meets the initial one, by a power that may be infinite: none if there is nothing to meet.
  void weigh(int64_t n, int64_t first) {
    for (int64_t j = 0; j < n; ++j) down[j] = power[n - 1 - j];
    for (int64_t i = 0; i < n; ++i) {
      const int64_t distance = first + i;
      up[i] = distance >= 0 ? power[distance] : initial_ ? 1.f / at(-distance) : 0.f;
    }
  }

 private:
  double base_ = 1.;
  bool initial_ = false;
};

// ---- chunks ----

// Positions [position, position + rows). Where both are there, key j of the chunk and query j stand at one position.
struct Chunk {
  int64_t position, rows;
  bool keys, queries;
  int64_t first;  // decay^(first + i) is what query i leaves of the state before the chunk
};

// The causal walk over a sequence: from min(0, shift) to the last key, cut where keys begin, queries begin, and keys end.
class Walk {
 public:
  Walk(const LinearAttention& a, int64_t b) : limit(a.key_limit(b)), shift(a.len_k(b) - a.len_q(b)) {
    const int64_t end = a.len_k(b);
    int64_t cuts[4] = {min_of(0, shift), max_of(0, shift), limit, end};
    if (shift < 0) cuts[1] = 0;
    if (cuts[1] > cuts[2]) { const int64_t t = cuts[1]; cuts[1] = cuts[2], cuts[2] = t; }
    for (int s = 0; s < 3; ++s) {
      begin_[s] = cuts[s];
      length_[s] = cuts[s + 1] - cuts[s];
      count += (length_[s] + kChunk - 1) / kChunk;
    }
  }
  Chunk operator[](int64_t k) const {
    for (int s = 0;; ++s) {
      const int64_t chunks = (length_[s] + kChunk - 1) / kChunk;
      if (k >= chunks) {
        k -= chunks;
        continue;
      }
      const int64_t p = begin_[s] + k * kChunk, rows = min_of(kChunk, begin_[s] + length_[s] - p);
      return {p, rows, p >= 0 && p < limit, p >= shift, p < 0 ? p + 1 : 1};
    }
  }
  int64_t end_position(int64_t k) const { return k >= count ? begin_[2] + length_[2] : (*this)[k].position; }

  int64_t count = 0;
  int64_t limit, shift;

 private:
  int64_t begin_[3], length_[3];
};

// How many segments a sequence is cut into, by shape alone.
inline int64_t segments_of(int64_t streams, int64_t length, bool free) {
  const int64_t most = max_of(1, length / (kSegmentChunks * kChunk));
  if (streams == 0 || (!free && streams >= kFewStreams)) return 1;
  return min_of(most, (kManyTasks + streams - 1) / streams);
}

// ---- causal tiles ----

// tile[j][i] for j <= i of a chunk of n: times decay^(i - j), 0 where j > i; sum[i] += the column's sum (or sum nullptr).
// With bias: (tile + bias[i]) first.
XF_NOINLINE void finish_causal_tile(float* tile, int64_t n, const Decay& decay, const float* bias, float* sum) {
  alignas(64) float table[2 * kChunk + 2 * kLanes];  // table[kChunk + d] = decay^d, 0 for d < 0
  if (decay.active) {
    for (int d = -kChunk; d < 0; ++d) table[kChunk + d] = 0.f;
    for (int d = 0; d < kChunk + kLanes; ++d) table[kChunk + d] = decay.power[d];
  }
  for (int64_t i0 = 0; i0 < n; i0 += kLanes) {
    const int64_t last = min_of(n, (i0 / kPad + 1) * kPad);  // squares of the triangle are whole
    const IVec lane = lane_index() + int32_t(i0);
    const Vec b = bias ? load(bias + i0) : zero();
    Vec total = zero();
    for (int64_t j = 0; j < last; ++j) {
      Vec x = load(tile + j * kChunk + i0) + b;
      if (decay.active) x *= load(table + kChunk + i0 - j);
      if (j > i0) x = lane >= int32_t(j) ? x : zero();
      total += x;
      store(tile + j * kChunk + i0, x);
    }
    if (sum) store(sum + i0, load(sum + i0) + total);
  }
}

// tile[j][i] = A_j . B_i for the squares with j <= i: a rows of A, b packed [depth][kChunk].
template <class C>
void causal_products(int64_t n, int64_t depth, const C* a, int64_t a_ld, const C* b, float* tile) {
  const int64_t lanes = round_up(n, kLanes);
  for (int64_t j = 0; j < n; j += kPad)
    multiply(min_of(kPad, n - j), lanes - j, depth, a + j * a_ld, a_ld, kStep<C>, b + j * kStep<C>, kChunk * kStep<C>,
             tile + j * kChunk + j, kChunk, Start::overwrite);
}

}  // namespace
}  // namespace XFORMER_FAST_ISA
}  // namespace xformer_fast
