// What the attention forward and backward share around the tile product: the geometry of a tile, packing, and the score
// options, each a pass of its own that runs only where it is asked for.
//
// A score tile is S^T: row r is key `key0 + r`, lane l is query `query0 + l` (indices inside the sequence), `ld` floats a
// row. Lanes past `queries` exist only to fill the last vector; passes may write anything finite or -inf there, and never
// read the mask for them. A query vector is kLanes adjacent queries; a segment is a rectangle of rows x query vectors.
//
//   mask_edges                -inf where window, causality or both cross a segment
//   apply_scale, apply_softcap, apply_alibi, apply_distance_bias, apply_mask, apply_options (all that are active, in order;
//                             apply_decomposed_bias, in attention_decomposed.h, among them)
//   DropoutKeep               the Philox keep bits of four adjacent keys x one query vector
//   pack_transposed[_pairs]   rows of a tensor -> [column][lane] (float32, or bfloat16 pairs of columns)
//   store_transposed          the inverse, with a factor a lane
//   convert_rows, pad_rows, interleave_row_pairs    a key block -> float32 / even width / [row pair][column][2]
#pragma once
#include "attention.h"
#include "attention_decomposed.h"
#include "microkernels.h"

namespace xformer_fast {
namespace XFORMER_FAST_ISA {
namespace {

XF_INLINE int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

template <class T>
XF_INLINE T* row_of(const View& view, int64_t b, int64_t h, int64_t i) {
  return static_cast<T*>(view.data) + b * view.batch + h * view.head + i * view.row;
}

// ---- geometry ----

struct ScoreTile {
  float* scores;
  int64_t ld;
  int64_t batch, head;  // head of query
  int64_t key0, query0;
  int64_t queries;
  int64_t shift;  // position of query i is i + shift
  MapPanels<const float> map_bias = {};
};

struct Segment {
  int64_t row0, row1;
  int vector0, vector1;
};

// ---- score passes ----

// Sets to -inf what no query may see of the rows that the edge of a query vector's range crosses.
XF_NOINLINE void mask_edges(const Attention& a, const ScoreTile& tile, const Segment& segment) {
  const IVec lane = lane_index();
  for (int v = segment.vector0; v < segment.vector1; ++v) {
    const int64_t p = tile.query0 + v * kLanes + tile.shift;  // position of lane 0
    const int64_t rows_above = p + kLanes - 1 - a.left - tile.key0;   // rows before it: some lanes are past their left end
    const int64_t rows_below = p + a.right + 1 - tile.key0;           // rows from it on: some lanes are before their right end
    float* scores = tile.scores + v * kLanes;
    for (int64_t r = segment.row0; r < segment.row1; ++r) {
      if (r >= rows_above && r < rows_below) {
        r = min_of(rows_below, segment.row1) - 1;
        continue;
      }
      const int64_t distance = tile.key0 + r - p;
      const int lowest = int(max_of(0, min_of(kLanes, distance - a.right)));
      const int highest = int(max_of(-1, min_of(kLanes, distance + a.left)));
      const Vec s = load(scores + r * tile.ld);
      const IVec seen = (lane >= broadcast_int(lowest)) & (lane <= broadcast_int(highest));
      store(scores + r * tile.ld, seen ? s : broadcast(-kInfinity));
    }
  }
}

template <class Score>
XF_INLINE void for_each_score(const ScoreTile& tile, const Segment& segment, Score score) {
  for (int64_t r = segment.row0; r < segment.row1; ++r)
    for (int v = segment.vector0; v < segment.vector1; ++v) {
      float* s = tile.scores + r * tile.ld + v * kLanes;
      store(s, score(load(s), r, v));
    }
}

XF_NOINLINE void apply_scale(const ScoreTile& tile, const Segment& segment, float scale) {
  for_each_score(tile, segment, [=](Vec s, int64_t, int) __attribute__((always_inline)) { return s * scale; });
}

XF_NOINLINE void apply_softcap(const ScoreTile& tile, const Segment& segment, float scale, float softcap) {
  const float inner = scale / softcap;
  for_each_score(tile, segment, [=](Vec s, int64_t, int) __attribute__((always_inline)) { return tanh(s * inner) * softcap; });
}

XF_NOINLINE void apply_alibi(const ScoreTile& tile, const Segment& segment, float scale, float slope) {
  const int32_t base = int32_t(tile.query0 + tile.shift - tile.key0);
  const IVec lane = lane_index() + base;
  for_each_score(tile, segment, [=](Vec s, int64_t r, int v) __attribute__((always_inline)) {
    return s * scale - absolute(to_float(lane + int32_t(v * kLanes - r))) * slope;
  });
}

// One mask element a lane: booleans become 0 (attend) or -inf.
struct boolean { uint8_t value; };
XF_INLINE Vec load(const boolean* p, int n) {
  float bias[kLanes];
  for (int i = 0; i < kLanes; ++i) bias[i] = i < n && !p[i].value ? -kInfinity : 0.f;
  return load(bias);
}
XF_INLINE Vec load(const boolean* p) {
  typedef uint8_t Bytes __attribute__((vector_size(kLanes), may_alias));
  const IVec attend = __builtin_convertvector(load_as<Bytes>(p), IVec);
  return attend != 0 ? zero() : broadcast(-kInfinity);
}
XF_INLINE float scalar(const float* p) { return *p; }
template <class M>
XF_INLINE float scalar(const M* p) { return load(p, 1)[0]; }

template <class M>
XF_INLINE Vec with_mask(Vec s, Vec bias) {
  return sizeof(M) == 1 ? (bias == 0.f ? s : bias) : s + bias;
}

// Sixteen queries (or as many as a vector has) whose mask rows lie apart, their keys side by side: through a transpose.
// Its parts are of constant size, or the vectors would be held on the stack.
template <class M>
XF_INLINE void apply_mask_rows(const M* mask, int64_t stride_q, int keys, int lanes, float* s, int64_t ld, float scale) {
  Vec bias[kLanes];
  if (keys == kLanes && lanes == kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) bias[i] = load(mask + i * stride_q);
  } else {
    const M* last = mask + (lanes - 1) * stride_q;
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) bias[i] = load(i < lanes ? mask + i * stride_q : last, keys);
  }
  transpose(bias);
#pragma GCC unroll 16
  for (int k = 0; k < kLanes; ++k)
    if (k < keys) store(s + k * ld, with_mask<M>(load(s + k * ld) * scale, bias[k]));
}

// Lanes past the last query may be given anything but NaN and +inf; they never read the mask.
template <class M>
XF_NOINLINE void apply_mask_of(const Attention& a, const ScoreTile& tile, const Segment& segment, float scale) {
  const M* mask = static_cast<const M*>(a.mask) + tile.batch * a.mask_batch + tile.head * a.mask_head +
                  tile.query0 * a.mask_q + tile.key0 * a.mask_k;
  if (a.mask_q == 0) {
    for (int64_t r = segment.row0; r < segment.row1; ++r) {
      const Vec bias = broadcast(scalar(mask + r * a.mask_k));
      for (int v = segment.vector0; v < segment.vector1; ++v) {
        float* s = tile.scores + r * tile.ld + v * kLanes;
        store(s, with_mask<M>(load(s) * scale, bias));
      }
    }
    return;
  }
  for (int v = segment.vector0; v < segment.vector1; ++v) {
    const int lanes = int(min_of(kLanes, tile.queries - v * kLanes));
    const M* column = mask + v * kLanes * a.mask_q;
    float* s = tile.scores + v * kLanes;
    if (a.mask_k == 1) {
      for (int64_t r = segment.row0; r < segment.row1; r += kLanes)
        apply_mask_rows(column + r, a.mask_q, int(min_of(kLanes, segment.row1 - r)), lanes, s + r * tile.ld, tile.ld, scale);
      continue;
    }
    for (int64_t r = segment.row0; r < segment.row1; ++r) {
      const M* row = column + r * a.mask_k;
      Vec bias;
      if (a.mask_q == 1) {
        bias = lanes == kLanes ? load(row) : load(row, lanes);
      } else {
        float gathered[kLanes];
        for (int i = 0; i < kLanes; ++i) gathered[i] = i < lanes ? scalar(row + i * a.mask_q) : 0.f;
        bias = load(gathered);
      }
      store(s + r * tile.ld, with_mask<M>(load(s + r * tile.ld) * scale, bias));
    }
  }
}

inline void apply_mask(const Attention& a, const ScoreTile& tile, const Segment& segment, float scale) {
  switch (a.mask_element) {
    case Element::float32: return apply_mask_of<float>(a, tile, segment, scale);
    case Element::bfloat16: return apply_mask_of<bfloat16>(a, tile, segment, scale);
    case Element::float16: return apply_mask_of<float16>(a, tile, segment, scale);
    case Element::boolean: return apply_mask_of<boolean>(a, tile, segment, scale);
  }
}

// Where a head's bias of distance begins for the tile: query lane l of row r finds its number at [l - r].
XF_INLINE int64_t lag_of(const Attention& a, const ScoreTile& tile) {
  return tile.query0 + tile.shift - tile.key0 + a.lag_offset;
}

XF_NOINLINE void apply_distance_bias(const Attention& a, const ScoreTile& tile, const Segment& segment, float scale) {
  const float* bias = a.lag_bias + tile.head * a.lag_head + lag_of(a, tile);
  for_each_score(tile, segment, [=](Vec s, int64_t r, int v) __attribute__((always_inline)) {
    return s * scale + load(bias + v * kLanes - r);
  });
}

inline bool has_score_options(const Attention& a) {
  return a.softcap != 0.f || a.alibi_slopes || a.lag_bias || a.has_map_bias() || a.mask;
}

// scores * scale, softcap, ALiBi, biases of distance and map, mask. The first pass that runs takes the scale along (1 if the scores have it already).
inline void apply_options(const Attention& a, const ScoreTile& tile, const Segment& segment, float scale) {
  if (a.softcap != 0.f) apply_softcap(tile, segment, scale, a.softcap), scale = 1.f;
  if (a.alibi_slopes) {
    apply_alibi(tile, segment, scale, a.alibi_slopes[tile.batch * a.alibi_batch + tile.head * a.alibi_head]);
    scale = 1.f;
  }
  if (a.lag_bias) apply_distance_bias(a, tile, segment, scale), scale = 1.f;
  if (a.has_map_bias()) {
    apply_decomposed_bias(tile.map_bias, tile.scores, tile.ld, tile.key0, segment.row0, segment.row1, segment.vector0,
                          segment.vector1, scale);
    scale = 1.f;
  }
  if (a.mask) apply_mask(a, tile, segment, scale), scale = 1.f;
  if (scale != 1.f) apply_scale(tile, segment, scale);
}

// ---- dropout ----

// Philox4x32-10 with counter (j / 4, i, b*Hq + h, 0): word j % 4 belongs to key j, and the key is kept iff it is >= threshold.
struct DropoutKeep {
  uint32_t key0, key1, head, threshold;
  float rescale;  // of what is kept

  DropoutKeep(const Attention& a, int64_t b, int64_t h)
      : key0(uint32_t(a.dropout_seed)), key1(uint32_t(a.dropout_seed >> 32)), head(uint32_t(b * a.heads_q + h)) {
    const bool all = a.dropout_p >= 1.f;
    threshold = all ? 0xffffffffu : uint32_t(double(a.dropout_p) * 4294967296.0);
    rescale = all ? 0.f : 1.f / (1.f - a.dropout_p);
  }

  // keep[w] is all ones where key 4*group + w of queries query0 + lane is kept.
  XF_INLINE void operator()(int64_t query0, int64_t group, IVec (&keep)[4]) const {
    UVec c0 = broadcast_bits(uint32_t(group)), c1 = (UVec)lane_index() + uint32_t(query0), c2 = broadcast_bits(head), c3{};
    uint32_t k0 = key0, k1 = key1;
    for (int round = 0; round < 10; ++round) {
      UVec high0, low0, high1, low1;
      multiply_wide(c0, 0xD2511F53u, high0, low0);
      multiply_wide(c2, 0xCD9E8D57u, high1, low1);
      c0 = high1 ^ c1 ^ k0;
      c1 = low1;
      c2 = high0 ^ c3 ^ k1;
      c3 = low0;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    const UVec limit = broadcast_bits(threshold);
    keep[0] = (IVec)(c0 >= limit);
    keep[1] = (IVec)(c1 >= limit);
    keep[2] = (IVec)(c2 >= limit);
    keep[3] = (IVec)(c3 >= limit);
  }
};

// Zeroes what is dropped of a float32 probability tile (the factor `rescale` is left to the caller).
XF_NOINLINE void apply_dropout(const DropoutKeep& dropout, const ScoreTile& tile, const Segment& segment) {
  for (int v = segment.vector0; v < segment.vector1; ++v)
    for (int64_t group = (tile.key0 + segment.row0) / 4; group * 4 < tile.key0 + segment.row1; ++group) {
      IVec keep[4];
      dropout(tile.query0 + v * kLanes, group, keep);
      for (int w = 0; w < 4; ++w) {
        const int64_t r = group * 4 + w - tile.key0;
        if (r < segment.row0 || r >= segment.row1) continue;
        float* p = tile.scores + r * tile.ld + v * kLanes;
        store(p, (Vec)((IVec)load(p) & keep[w]));
      }
    }
}

// ---- packing ----
// What is packed is often met here first: each pass asks for the memory it will reach next.

// out[column][lane] = scale * in[lane][column] for lane < rows, 0 for the lanes that fill the last vector.
template <class T>
XF_NOINLINE void pack_transposed(const T* in, int64_t stride, int64_t rows, int64_t columns, float scale,
                                               float* out, int64_t ld) {
  for (int64_t lane0 = 0; lane0 < rows; lane0 += kLanes) {
    const int lanes = int(min_of(kLanes, rows - lane0));
    for (int64_t c = 0; c < columns; c += kLanes) {
      const int n = int(min_of(kLanes, columns - c));
      const T* p = in + lane0 * stride + c;
      for (int64_t i = kLanes; i < min_of(2 * kLanes, rows - lane0); ++i) __builtin_prefetch(p + i * stride);
      Vec tile[kLanes];
      if (lanes == kLanes && n == kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) tile[i] = load(p + i * stride) * scale;
      } else {
        for (int i = 0; i < kLanes; ++i) tile[i] = i < lanes ? load(p + i * stride, n) * scale : zero();
      }
      transpose(tile);
      float* q = out + c * ld + lane0;
      if (n == kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store(q + i * ld, tile[i]);
      } else {
        for (int i = 0; i < n; ++i) store(q + i * ld, tile[i]);
      }
    }
  }
}

// What rounding took from max + rest; 0 where nothing is finite. Past 2^24 times log(sum) it is all of it, and without it the
// backward would know the weights of such a row only up to a factor.
XF_INLINE Vec lse_error(Vec max, Vec rest, Vec rounded) {
  const Vec error = (max - rounded) + rest;
  return error - error == 0.f ? error : zero();
}

// What rounding to T takes from v.
template <class T>
XF_INLINE Vec rounding_error(Vec v) {
  T rounded[kLanes];
  store(rounded, v);
  return v - load(rounded);
}

// out[lane][column] = factor[lane] * in[column][lane] for lane < rows; or what rounding takes from it.
template <class T, bool kError = false>
XF_NOINLINE void store_transposed(const float* in, int64_t ld, int64_t rows, int64_t columns,
                                                const float* factor, T* out, int64_t stride) {
  for (int64_t lane0 = 0; lane0 < rows; lane0 += kLanes) {
    const int lanes = int(min_of(kLanes, rows - lane0));
    const Vec f = load(factor + lane0);
    for (int64_t c = 0; c < columns; c += kLanes) {
      const int n = int(min_of(kLanes, columns - c));
      const float* p = in + c * ld + lane0;
      Vec tile[kLanes];
      if (n == kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) tile[i] = load(p + i * ld) * f;
      } else {
        for (int i = 0; i < kLanes; ++i) tile[i] = i < n ? load(p + i * ld) * f : zero();
      }
      transpose(tile);
      if (kError)
        for (int i = 0; i < kLanes; ++i) tile[i] = rounding_error<T>(tile[i]);
      T* q = out + lane0 * stride + c;
      if (lanes == kLanes && n == kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store(q + i * stride, tile[i]);
      } else {
        for (int i = 0; i < lanes; ++i) store(q + i * stride, tile[i], n);
      }
    }
  }
}

// out = float32(in), columns adjacent.
template <class T>
XF_NOINLINE void convert_rows(const T* in, int64_t stride, int64_t rows, int64_t columns, float* out) {
  const int tail = int(columns % kLanes);
  constexpr int kAhead = 8;
  for (int64_t r = 0; r < rows; ++r, in += stride, out += columns) {
    const T* ahead = r + kAhead < rows ? in + kAhead * stride : in;
    int64_t c = 0;
    for (; c + kLanes <= columns; c += kLanes) {
      __builtin_prefetch(ahead + c);
      store(out + c, load(in + c));
    }
    if (tail) store(out + c, load(in + c, tail), tail);
  }
}

#if defined(XF_BF16_DOT)
// The first n of 32 bfloat16, zeros after them; memory past them is not read.
XF_INLINE Vec load_pairs(const bfloat16* p, int64_t n) {
  if (n >= 2 * kLanes) return load_as<Vec>(p);
  return (Vec)_mm512_maskz_loadu_epi16(__mmask32((1u << n) - 1), p);
}

// out[column / 2][lane][2] = in[lane][column]; 0 in the lanes that fill the last vector and beside a last odd column.
XF_NOINLINE void pack_transposed_pairs(const bfloat16* in, int64_t stride, int64_t rows, int64_t columns,
                                                     bfloat16* out, int64_t ld) {
  for (int64_t lane0 = 0; lane0 < rows; lane0 += kLanes) {
    const int lanes = int(min_of(kLanes, rows - lane0));
    for (int64_t c = 0; c < columns; c += 2 * kLanes) {
      const int64_t n = min_of(2 * kLanes, columns - c);
      const bfloat16* p = in + lane0 * stride + c;
      for (int64_t i = kLanes; i < min_of(2 * kLanes, rows - lane0); ++i) __builtin_prefetch(p + i * stride);
      Vec tile[kLanes];
      if (lanes == kLanes && n == 2 * kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) tile[i] = load_as<Vec>(p + i * stride);
      } else {
        for (int i = 0; i < kLanes; ++i) tile[i] = i < lanes ? load_pairs(p + i * stride, n) : zero();
      }
      transpose(tile);
      bfloat16* q = out + c / 2 * ld + 2 * lane0;
      if (n == 2 * kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) __builtin_memcpy(q + i * ld, &tile[i], sizeof(Vec));
      } else {
        for (int i = 0; 2 * i < n; ++i) __builtin_memcpy(q + i * ld, &tile[i], sizeof(Vec));
      }
    }
  }
}

// Rows of an odd width copied to an even one, the last element 0.
XF_NOINLINE void pad_rows(const bfloat16* in, int64_t stride, int64_t rows, int64_t columns, bfloat16* out) {
  const int64_t width = columns + columns % 2;
  for (int64_t r = 0; r < rows; ++r, in += stride, out += width) {
    __builtin_memcpy(out, in, size_t(columns) * sizeof *out);
    out[width - 1].bits = columns % 2 ? 0 : out[width - 1].bits;
  }
}

// out[row / 2][column][2] = in[row][column], width 2 * columns; a last odd row is paired with zeros.
XF_NOINLINE void interleave_row_pairs(const bfloat16* in, int64_t stride, int64_t rows, int64_t columns,
                                                    bfloat16* out) {
  constexpr int kAhead = 8;
  for (int64_t r = 0; r < rows; r += 2, in += 2 * stride, out += 2 * columns) {
    const bool paired = r + 1 < rows;
    const bfloat16* ahead = r + kAhead + 1 < rows ? in + kAhead * stride : in;
    for (int64_t c = 0; c < columns; c += kLanes) {
      __builtin_prefetch(ahead + c);
      __builtin_prefetch(ahead + paired * stride + c);
      const int n = int(min_of(kLanes, columns - c));
      const UVec low = __builtin_convertvector(n == kLanes ? load_as<HVec>(in + c) : load_half_lanes(in + c, n), UVec);
      UVec high{};
      if (paired) {
        const bfloat16* next = in + stride + c;
        high = __builtin_convertvector(n == kLanes ? load_as<HVec>(next) : load_half_lanes(next, n), UVec);
      }
      store(reinterpret_cast<float*>(out + 2 * c), (Vec)(low | (high << 16)), n);
    }
  }
}
#endif

}  // namespace
}  // namespace XFORMER_FAST_ISA
}  // namespace xformer_fast
