// What windowed attention's forward and backward share: the tokens of windows, their places in the map, their scores.
//
// Token t of a group is token t % N of its window t / N. A window's tokens are neighbours, or with a grid partition a distance of
// side / window apart. The cyclic shift is addressing: place i of the shifted map is place (i + shift) % side of the map. Of a window
// that wraps around, tokens on either side of the seam do not see each other: a bit an axis, which only the last window along an
// axis sets, and no mask in memory.
#pragma once
#include "attention_scores.cuh"
#include "window_attention.h"

namespace xformer_fast {

template <class T_, int kWidth_, int kWarps_, bool kAtOnce_>
struct WindowShape {
  using T = T_;
  static constexpr int kWidth = kWidth_, kWarps = kWarps_, kThreads = 32 * kWarps, kRows = 16 * kWarps;
  static constexpr bool kAtOnce = kAtOnce_;  // dK and dV
  using Rows = Tile<T, kRows, kWidth>;
  static constexpr int kTokenBytes = kRows * 8 * 4;  // of a TokenTile
};

// Facts of the tokens of one tile, in shared memory, eight words each.
struct TokenTile {
  uint32_t base;

  enum Word { kTag, kCode, kToken, kInverse, kBatch, kAxis };  // kAxis and the next two: the place
  __device__ __forceinline__ uint32_t at(int row, int word) const { return base + 4 * (8 * row + word); }
  __device__ __forceinline__ int number(int row, int word) const { return static_cast<int>(load_shared(at(row, word))); }
  // 1 / |row|, of cosine attention.
  __device__ __forceinline__ float inverse(int row) const { return __uint_as_float(load_shared(at(row, kInverse))); }
  __device__ __forceinline__ bool there(int row) const { return number(row, kTag) >= 0; }

  // Tokens first.. of a group whose first window is `window0`. Two tokens see each other if their tags, window and side of the
  // seam, are equal. The code's difference, plus code_center(), is a row of the bias table.
  template <int kRows, int kThreads>
  __device__ __forceinline__ void fill(const CudaWindowAttention& a, int64_t window0, int first) const {
    for (int row = threadIdx.x; row < kRows; row += kThreads) {
      const int tokens = static_cast<int>(a.tokens), t = first + row, sub = t / tokens;
      int token = t - sub * tokens, tag = sub << kMaxAxes, code = 0, stride = 1;
      int64_t window = window0 + sub;
      const bool there = sub < a.together && window < a.windows;
      store_shared(at(row, kToken), static_cast<uint32_t>(token));
#pragma unroll
      for (int x = kMaxAxes - 1; x >= 0; --x) {
        const int side = static_cast<int>(a.side[x]), wide = static_cast<int>(a.window[x]), shift = static_cast<int>(a.shift[x]);
        const int count = side / wide, inside = token % wide, which = static_cast<int>(window % count);
        token /= wide;
        window /= count;
        int place = (a.grid ? inside * count + which : which * wide + inside) + shift;
        place -= place >= side ? side : 0;
        if (shift > 0 && which == count - 1 && inside >= wide - shift) tag |= 1 << x;
        code += inside * stride;
        stride *= 2 * wide - 1;
        store_shared(at(row, kAxis + x), static_cast<uint32_t>(place));
      }
      store_shared(at(row, kBatch), static_cast<uint32_t>(window));
      store_shared(at(row, kCode), static_cast<uint32_t>(code));
      store_shared(at(row, kTag), static_cast<uint32_t>(there ? tag : -1));
    }
  }
  // 1 / |x| of every row of a tile, four lanes a row.
  template <int kThreads, class Tile>
  __device__ __forceinline__ void set_inverses(const Tile& x) const {
    using T = typename Tile::T;
    constexpr int kWord = 4 / sizeof(T);
    for (int row = threadIdx.x / 4; row < Tile::kRows; row += kThreads / 4) {
      float sum = 0.f;
      for (int column = threadIdx.x % 4 * kWord; column < Tile::kWidth; column += 4 * kWord) {
        const uint32_t bits = load_shared(x.at(row, column));
        if constexpr (kWord == 1) {
          sum += __uint_as_float(bits) * __uint_as_float(bits);
        } else {
          const float2 two = unpaired(bits, T{});
          sum += two.x * two.x + two.y * two.y;
        }
      }
      sum = row_sum(sum);
      if (threadIdx.x % 4 == 0) store_shared(at(row, kInverse), __float_as_uint(1.f / fmaxf(sqrtf(sum), 1e-12f)));
    }
  }
};

__device__ __forceinline__ int code_center(const CudaWindowAttention& a) {
  int center = 0, stride = 1;
#pragma unroll
  for (int x = kMaxAxes - 1; x >= 0; --x) {
    center += static_cast<int>(a.window[x] - 1) * stride;
    stride *= static_cast<int>(2 * a.window[x] - 1);
  }
  return center;
}

// Rows of one head of a map, by token.
template <class T>
struct MapRows {
  T* data;
  const MapView& view;
  int width;
  bool aligned;

  __device__ __forceinline__ MapRows(const MapView& view, int head, int64_t width)
      : data(static_cast<T*>(view.data) + head * view.head), view(view), width(static_cast<int>(width)) {
    const int64_t strides = view.batch | view.axis[0] | view.axis[1] | view.axis[2];
    aligned = ((reinterpret_cast<uintptr_t>(data) | static_cast<uintptr_t>(strides) * sizeof(T)) & 15) == 0;
  }
  __device__ __forceinline__ T* row(const TokenTile& tokens, int i) const {
    int64_t offset = tokens.number(i, TokenTile::kBatch) * view.batch;
#pragma unroll
    for (int x = 0; x < kMaxAxes; ++x) offset += tokens.number(i, TokenTile::kAxis + x) * view.axis[x];
    return data + offset;
  }
};

// All threads of a block copy the rows of a tile's tokens; zeros where there is none.
template <int kThreads, class Tile>
__device__ __forceinline__ void copy_tokens(const Tile& tile, const MapRows<const typename Tile::T>& rows, const TokenTile& tokens) {
  using T = typename Tile::T;
#pragma unroll 1
  for (int i = threadIdx.x; i < Tile::kRows * Tile::kChunks; i += kThreads) {
    const int row = i / Tile::kChunks, column = i % Tile::kChunks * kChunk<T>;
    const int present = tokens.there(row) ? min(max(rows.width - column, 0), kChunk<T>) : 0;
    copy_chunk(tile.at(row, column), present ? rows.row(tokens, row) + column : rows.data, present, rows.aligned);
  }
}

// A warp's sums to its tokens' rows, from the registers.
template <class T, int kWidth>
__device__ __forceinline__ void store_tokens(const Sums<1, kWidth>& sums, const MapRows<T>& rows, const TokenTile& tokens, int own) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = own + lane_index() / 4 + 8 * r, first = 2 * (lane_index() % 4);
    if (!tokens.there(row)) continue;
    T* to = rows.row(tokens, row) + first;
#pragma unroll
    for (int j = 0; j < kWidth / 8; ++j) {
      Pack<T, 2> pack;
      assign(pack.values[0], sums.of[0][j][2 * r]);
      assign(pack.values[1], sums.of[0][j][2 * r + 1]);
      if (rows.aligned && first + 8 * j + 2 <= rows.width) {
        store(to + 8 * j, pack);
      } else {
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (first + 8 * j + e < rows.width) to[8 * j + e] = pack.values[e];
      }
    }
  }
}

// The terms of one head's scores.
struct WindowScores {
  const float *table, *bias;
  float factor;  // of products, or of cosines
  bool cosine;
  int tokens;

  __device__ __forceinline__ WindowScores(const CudaWindowAttention& a, int head) : tokens(static_cast<int>(a.tokens)) {
    table = a.table ? a.table + head * a.table_rows + code_center(a) : nullptr;
    bias = a.bias ? a.bias + static_cast<int64_t>(head) * tokens * tokens : nullptr;
    cosine = a.logit_scale != nullptr;
    factor = cosine ? a.logit_scale[head] : a.scale;
  }
};

// A token's facts in registers.
struct TokenFacts {
  int tag, code, token;
  float inverse;

  __device__ __forceinline__ TokenFacts(const TokenTile& tokens, int row, const WindowScores& terms)
      : tag(tokens.number(row, TokenTile::kTag)), code(tokens.number(row, TokenTile::kCode)),
        token(tokens.number(row, TokenTile::kToken)), inverse(terms.cosine ? tokens.inverse(row) : 1.f) {}
};

// In units of log2; -infinity between tokens that do not see each other.
__device__ __forceinline__ float window_score(float product, const TokenFacts& query, const TokenFacts& key, const WindowScores& terms) {
  if (query.tag != key.tag || key.tag < 0) return -XF_INFINITY;
  float s = product * terms.factor * query.inverse * key.inverse;
  if (terms.table) s += terms.table[query.code - key.code];
  if (terms.bias) s += terms.bias[query.token * terms.tokens + key.token];
  return s * kLog2E;
}

template <class T, class F>
auto with_window_shape_of(int64_t width, F f) {
  constexpr bool kFloat = sizeof(T) == 4;
  if (width <= 32) return f(WindowShape<T, 32, kFloat ? 2 : 4, true>{});
  if (width <= 64) return f(WindowShape<T, 64, kFloat ? 1 : 4, false>{});
  return f(WindowShape<T, 128, kFloat ? 1 : 2, false>{});
}
// What is done with the shape of a call's element and larger head dim.
template <class F>
auto with_window_shape(Element element, int64_t width, F f) {
  switch (element) {
    case Element::float32: return with_window_shape_of<float>(width, f);
    case Element::bfloat16: return with_window_shape_of<bf16>(width, f);
    default: return with_window_shape_of<half>(width, f);
  }
}

}  // namespace xformer_fast
