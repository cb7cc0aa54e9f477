// Tiles in shared memory and products of them: what every matrix kernel here is made of.
//
// Tile<T, kRows, kWidth>  rows of 16-byte chunks, a row's chunks permuted (swizzled) by its number, so that the same chunk of
//                         eight neighbouring rows lies in eight different groups of banks
// copy_tile, copy_chunk   global memory -> tile, by cp.async where rows are aligned; zeros past the rows and columns there are
// Sums<M, kColumns>       a warp's accumulators: 16 M rows, kColumns columns, float32
// add_product             sums += a bᵀ, a and b rows of tiles
// add_weighted_rows       sums += w b, w another warp's-worth of sums (weights), b rows of a tile
// add_outer_product       sums += xᵀ (weights y), x and y rows of tiles
// store_rows              sums -> a warp's rows of a tile -> global memory, 16 bytes at a time
//
// A warp's lane holds of every 16x8 block of sums, with g = lane / 4 and t = lane % 4: [g][2t], [g][2t + 1], [g + 8][2t],
// [g + 8][2t + 1]. half and bf16 are multiplied 16 deep. float32 is multiplied 8 deep as three TF32 products, each number as
// the sum of a big and a small one: small·big + big·small + big·big loses about what float32 products do. Fragments of both
// kinds are two chunks deep, so the same code loads them.
#pragma once
#include "ptx.cuh"

namespace xformer_fast {

__device__ __forceinline__ int lane_index() { return threadIdx.x % 32; }
__device__ __forceinline__ int warp_index() { return threadIdx.x / 32; }

template <class T>
constexpr int kChunk = 16 / sizeof(T);  // elements of 16 bytes
template <class T>
constexpr int kDepth = 2 * kChunk<T>;   // of a product

template <class T_, int kRows_, int kWidth_>
struct Tile {
  using T = T_;
  static constexpr int kRows = kRows_, kWidth = kWidth_, kChunks = kWidth / kChunk<T>;
  static constexpr int kBytes = kRows * kWidth * static_cast<int>(sizeof(T));
  static constexpr int kCycle = kChunks % 8 == 0 ? 8 : kChunks % 4 == 0 ? 4 : 2;  // chunks that are permuted
  static_assert(kWidth % kDepth<T> == 0, "a product is two chunks deep");

  uint32_t base;

  __device__ __forceinline__ uint32_t chunk(int row, int chunk) const {
    return base + row * (kChunks * 16) + ((chunk ^ (row / (8 / kCycle) & (kCycle - 1))) << 4);
  }
  __device__ __forceinline__ uint32_t at(int row, int column) const {
    return chunk(row, column / kChunk<T>) + column % kChunk<T> * static_cast<int>(sizeof(T));
  }
};

// Hands out shared memory from its beginning.
struct SharedMemory {
  uint32_t next = shared_address(shared_memory());

  template <class Tile>
  __device__ __forceinline__ Tile tile() {
    const Tile made{next};
    next += Tile::kBytes;
    return made;
  }
};

// Row-major rows in global memory, `width` of their columns. Aligned: every row starts at a multiple of 16 bytes.
template <class T>
struct Rows {
  T* data;
  int64_t stride;
  int width;
  bool aligned;

  __device__ __forceinline__ Rows(T* data, int64_t stride, int64_t width)
      : data(data), stride(stride), width(static_cast<int>(width)),
        aligned(((reinterpret_cast<uintptr_t>(data) | static_cast<uintptr_t>(stride) * sizeof(T)) & 15) == 0) {}
};

// The first `present` elements of a chunk, then zeros. Of aligned memory cp.async brings them, in the group that the caller commits;
// of other memory they are stored before this returns. A barrier is needed in either case.
template <class T>
__device__ __forceinline__ void copy_chunk(uint32_t to, const T* from, int present, bool aligned) {
  if (aligned) {
    copy_16_bytes(to, from, present * static_cast<int>(sizeof(T)));
    return;
  }
  Pack<T, kChunk<T>> pack;
#pragma unroll
  for (int e = 0; e < kChunk<T>; ++e) assign(pack.values[e], e < present ? to_float(from[e]) : 0.f);
  store_shared(to, reinterpret_cast<const uint4&>(pack));
}

// All threads of a block copy rows first, first + 1, ..., of which 0..limit - 1 are there; the others are zeros.
template <int kThreads, class Tile>
__device__ __forceinline__ void copy_tile(const Tile& tile, const Rows<const typename Tile::T>& rows, int first, int limit) {
  using T = typename Tile::T;
  const T* origin = rows.data + first * rows.stride;
#pragma unroll 1
  for (int i = threadIdx.x; i < Tile::kRows * Tile::kChunks; i += kThreads) {
    const int row = i / Tile::kChunks, column = i % Tile::kChunks * kChunk<T>;
    const bool there = first + row >= 0 && first + row < limit;
    const int present = there ? min(max(rows.width - column, 0), kChunk<T>) : 0;
    copy_chunk(tile.at(row, column), present ? origin + row * rows.stride + column : rows.data, present, rows.aligned);
  }
}

template <int M, int kColumns>
struct Sums {
  static constexpr int kM = M, kBlocks = kColumns / 8;
  float of[M][kBlocks][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int j = 0; j < kBlocks; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) of[m][j][e] = 0.f;
  }
  // f(sum, row, column), both counted from the warp's first.
  template <class F>
  __device__ __forceinline__ void for_each(F f) {
    const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int j = 0; j < kBlocks; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) f(of[m][j][e], 16 * m + g + e / 2 * 8, 8 * j + 2 * t + e % 2);
  }
};

// ---- fragments ----

template <class T>
struct Left {  // 16 rows, kDepth<T> deep
  uint32_t of[4];
};
template <>
struct Left<float> {
  uint32_t big[4], small[4];
};
template <class T>
struct Right {  // kDepth<T> deep, 16 columns: [0], [1] of the first eight
  uint32_t of[4];
};
template <>
struct Right<float> {
  uint32_t big[4], small[4];
};

template <class Fragment>
__device__ __forceinline__ void set(Fragment& f, int i, uint32_t bits) {
  f.of[i] = bits;
}
template <template <class> class Fragment>
__device__ __forceinline__ void set(Fragment<float>& f, int i, uint32_t bits) {
  const float x = __uint_as_float(bits);
  f.big[i] = to_tf32(x);
  f.small[i] = to_tf32(x - __uint_as_float(f.big[i]));
}

template <class T>
__device__ __forceinline__ void multiply(float (&sums)[4], const Left<T>& a, const Right<T>& b, int which) {
  mma_16x8x16(sums, a.of, b.of[2 * which], b.of[2 * which + 1], T{});
}
// The matrix unit adds with truncation, always downwards: over many steps that is more than float32 loses. So it adds up one step,
// and the sum over steps is ordinary arithmetic (Ootomo and Yokota, "Recovering single precision accuracy from Tensor Cores", 2022).
__device__ __forceinline__ void multiply(float (&sums)[4], const Left<float>& a, const Right<float>& b, int which) {
  float step[4] = {0.f, 0.f, 0.f, 0.f};
  mma_16x8x8(step, a.small, b.big[2 * which], b.big[2 * which + 1]);
  mma_16x8x8(step, a.big, b.small[2 * which], b.small[2 * which + 1]);
  mma_16x8x8(step, a.big, b.big[2 * which], b.big[2 * which + 1]);
#pragma unroll
  for (int e = 0; e < 4; ++e) sums[e] += step[e];
}

// Rows row..row + 15, from chunk `chunk` on.
template <class Tile>
__device__ __forceinline__ Left<typename Tile::T> load_left(const Tile& tile, int row, int chunk) {
  const int lane = lane_index();
  uint32_t m[4];
  load_matrices(m, tile.chunk(row + lane % 16, chunk + lane / 16));
  Left<typename Tile::T> left;
#pragma unroll
  for (int i = 0; i < 4; ++i) set(left, i, m[i]);
  return left;
}

// The transpose of rows row..row + 15, from chunk `chunk` on.
template <class Tile>
__device__ __forceinline__ Right<typename Tile::T> load_right_transposed(const Tile& tile, int row, int chunk) {
  const int lane = lane_index();
  uint32_t m[4];
  load_matrices(m, tile.chunk(row + lane % 8 + lane / 16 * 8, chunk + lane / 8 % 2));
  Right<typename Tile::T> right;
#pragma unroll
  for (int i = 0; i < 4; ++i) set(right, i, m[i]);
  return right;
}

// Rows row..row + kDepth - 1, columns column..column + 15. float32: row 2 t is at depth t and row 2 t + 1 at depth t + 4, as
// weights_left has the columns of its weights.
template <class T, int kRows, int kWidth>
__device__ __forceinline__ Right<T> load_right(const Tile<T, kRows, kWidth>& tile, int row, int column) {
  const int lane = lane_index();
  Right<T> right;
  load_matrices_transposed(right.of, tile.chunk(row + lane % 16, column / kChunk<T> + lane / 16));
  return right;
}
template <int kRows, int kWidth>
__device__ __forceinline__ Right<float> load_right(const Tile<float, kRows, kWidth>& tile, int row, int column) {
  const int g = lane_index() / 4, t = lane_index() % 4;
  Right<float> right;
#pragma unroll
  for (int i = 0; i < 4; ++i) set(right, i, load_shared(tile.at(row + 2 * t + i % 2, column + i / 2 * 8 + g)));
  return right;
}

// Two elements of 32 bits, and back.
__device__ __forceinline__ uint32_t pair(float x, float y, half) {
  const __half2 both = __floats2half2_rn(x, y);
  return reinterpret_cast<const uint32_t&>(both);
}
__device__ __forceinline__ uint32_t pair(float x, float y, bf16) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(x, y);
  return reinterpret_cast<const uint32_t&>(both);
}

__device__ __forceinline__ float2 unpaired(uint32_t bits, half) {
  const __half2 both = reinterpret_cast<const __half2&>(bits);
  return {to_float(both.x), to_float(both.y)};
}
__device__ __forceinline__ float2 unpaired(uint32_t bits, bf16) {
  const __nv_bfloat162 both = reinterpret_cast<const __nv_bfloat162&>(bits);
  return {to_float(both.x), to_float(both.y)};
}

// A left fragment of load_left_transposed, each number times weight(its row in the tile); `rest`: what rounding takes.
template <class T, class Weight>
__device__ __forceinline__ void weigh(Left<T>& left, Left<T>& rest, int row, Weight weight) {
  const int t = lane_index() % 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 x = unpaired(left.of[i], T{});
    const int first = row + 2 * t + i / 2 * 8;
    const float low = x.x * weight(first), high = x.y * weight(first + 1);
    left.of[i] = pair(low, high, T{});
    const float2 rounded = unpaired(left.of[i], T{});
    rest.of[i] = pair(low - rounded.x, high - rounded.y, T{});
  }
}
template <class Weight>
__device__ __forceinline__ void weigh(Left<float>& left, Left<float>&, int row, Weight weight) {
  const int t = lane_index() % 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float x = __uint_as_float(left.big[i]) + __uint_as_float(left.small[i]);
    set(left, i, __float_as_uint(x * weight(row + 2 * t + i / 2)));
  }
}

// Columns depth * kDepth and on of sums as a left fragment, rounded to T.
template <class T, int M, int kColumns>
__device__ __forceinline__ Left<T> weights_left(const Sums<M, kColumns>& w, int m, int depth, T) {
  const float(&low)[4] = w.of[m][2 * depth], (&high)[4] = w.of[m][2 * depth + 1];
  return {{pair(low[0], low[1], T{}), pair(low[2], low[3], T{}), pair(high[0], high[1], T{}), pair(high[2], high[3], T{})}};
}
template <int M, int kColumns>
__device__ __forceinline__ Left<float> weights_left(const Sums<M, kColumns>& w, int m, int depth, float) {
  const float(&of)[4] = w.of[m][depth];
  Left<float> left;
  set(left, 0, __float_as_uint(of[0]));
  set(left, 1, __float_as_uint(of[2]));
  set(left, 2, __float_as_uint(of[1]));
  set(left, 3, __float_as_uint(of[3]));
  return left;
}

// What rounding takes of the numbers of weights_left.
template <class T, int M, int kColumns>
__device__ __forceinline__ Left<T> weights_rest(const Sums<M, kColumns>& w, int m, int depth, const Left<T>& left) {
  Left<T> rest;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float* of = w.of[m][2 * depth + i / 2] + i % 2 * 2;
    const float2 rounded = unpaired(left.of[i], T{});
    rest.of[i] = pair(of[0] - rounded.x, of[1] - rounded.y, T{});
  }
  return rest;
}

// The transpose of rows row..row + kDepth - 1, columns column..column + 15: their columns are the fragment's rows. float32: in the
// order of load_right.
template <class T, int kRows, int kWidth>
__device__ __forceinline__ Left<T> load_left_transposed(const Tile<T, kRows, kWidth>& tile, int row, int column) {
  const int lane = lane_index();
  Left<T> left;
  load_matrices_transposed(left.of, tile.chunk(row + lane % 8 + lane / 16 * 8, column / kChunk<T> + lane / 8 % 2));
  return left;
}
template <int kRows, int kWidth>
__device__ __forceinline__ Left<float> load_left_transposed(const Tile<float, kRows, kWidth>& tile, int row, int column) {
  const int g = lane_index() / 4, t = lane_index() % 4;
  Left<float> left;
#pragma unroll
  for (int i = 0; i < 4; ++i) set(left, i, load_shared(tile.at(row + 2 * t + i / 2, column + g + i % 2 * 8)));
  return left;
}

// ---- products of a warp ----

// sums += a bᵀ: rows row.. of a, all rows of b.
template <int M, int kColumns, class TileA, class TileB>
__device__ __forceinline__ void add_product(Sums<M, kColumns>& sums, const TileA& a, int row, const TileB& b) {
  using T = typename TileA::T;
  static_assert(TileB::kRows == kColumns && TileA::kWidth == TileB::kWidth);
#pragma unroll 8
  for (int chunk = 0; chunk < TileA::kChunks; chunk += 2) {
    Left<T> left[M];
#pragma unroll
    for (int m = 0; m < M; ++m) left[m] = load_left(a, row + 16 * m, chunk);
#pragma unroll
    for (int j = 0; j < kColumns / 16; ++j) {
      const Right<T> right = load_right_transposed(b, 16 * j, chunk);
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int which = 0; which < 2; ++which) multiply(sums.of[m][2 * j + which], left[m], right, which);
    }
  }
}

// sums += left b, rows row..row + kDepth - 1 and columns column.. of b.
template <int M, int kWidth, class Tile>
__device__ __forceinline__ void add_rows(Sums<M, kWidth>& sums, const Left<typename Tile::T> (&left)[M], const Tile& b, int row,
                                         int column) {
#pragma unroll
  for (int j = 0; j < kWidth / 16; ++j) {
    const Right<typename Tile::T> right = load_right(b, row, column + 16 * j);
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int which = 0; which < 2; ++which) multiply(sums.of[m][2 * j + which], left[m], right, which);
  }
}

// sums += w b, w rounded to the tile's type; columns column.. of b. exact: what rounding takes of w is a product of its own.
template <int M, int kWidth, int kColumns, class Tile>
__device__ __forceinline__ void add_weighted_rows(Sums<M, kWidth>& sums, const Sums<M, kColumns>& w, const Tile& b, int column,
                                                  bool exact = false) {
  using T = typename Tile::T;
  static_assert(Tile::kRows == kColumns && Tile::kWidth >= kWidth);
#pragma unroll
  for (int depth = 0; depth < kColumns / kDepth<T>; ++depth) {
    Left<T> left[M];
#pragma unroll
    for (int m = 0; m < M; ++m) left[m] = weights_left(w, m, depth, T{});
    add_rows(sums, left, b, depth * kDepth<T>, column);
    if constexpr (sizeof(T) == 2)
      if (exact) {
#pragma unroll
        for (int m = 0; m < M; ++m) left[m] = weights_rest(w, m, depth, left[m]);
        add_rows(sums, left, b, depth * kDepth<T>, column);
      }
  }
}

// sums += xᵀ (weights y): rows column_x.. of the result are columns of x, its columns are columns column_y.. of y. weight(row) is
// applied to x, without loss: what rounding its weighted numbers takes is a product of its own.
template <int M, int kColumns, class TileX, class TileY, class Weight>
__device__ __forceinline__ void add_outer_product(Sums<M, kColumns>& sums, const TileX& x, int column_x, const TileY& y, int column_y,
                                                  bool weighted, Weight weight) {
  using T = typename TileX::T;
  static_assert(TileX::kRows == TileY::kRows);
#pragma unroll 1
  for (int row = 0; row < TileX::kRows; row += kDepth<T>) {
    Left<T> left[M], rest[M];
#pragma unroll
    for (int m = 0; m < M; ++m) {
      left[m] = load_left_transposed(x, row, column_x + 16 * m);
      if (weighted) weigh(left[m], rest[m], row, weight);
    }
#pragma unroll
    for (int j = 0; j < kColumns / 16; ++j) {
      const Right<T> right = load_right(y, row, column_y + 16 * j);
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int which = 0; which < 2; ++which) {
          multiply(sums.of[m][2 * j + which], left[m], right, which);
          if (weighted && sizeof(T) == 2) multiply(sums.of[m][2 * j + which], rest[m], right, which);
        }
    }
  }
}

// ---- results ----

__device__ __forceinline__ void store_two(uint32_t to, float x, float y, float) {
  store_shared(to, __float_as_uint(x));
  store_shared(to + 4, __float_as_uint(y));
}
template <class T>
__device__ __forceinline__ void store_two(uint32_t to, float x, float y, T) {
  store_shared(to, pair(x, y, T{}));
}

// Rounds a warp's sums into rows row.. and columns column.. of `tile`, which it alone uses, and from there writes them to rows
// first + row.., of which 0..limit - 1 are there.
template <int M, int kWidth, class Tile>
__device__ __forceinline__ void store_rows(const Sums<M, kWidth>& sums, const Tile& tile, int row, int column,
                                           const Rows<typename Tile::T>& rows, int first, int limit) {
  using T = typename Tile::T;
  constexpr int kChunks = kWidth / kChunk<T>;
  const int lane = lane_index(), g = lane / 4, t = lane % 4;
  __syncwarp();
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int j = 0; j < kWidth / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; e += 2)
        store_two(tile.at(row + 16 * m + g + e / 2 * 8, column + 8 * j + 2 * t), sums.of[m][j][e], sums.of[m][j][e + 1], T{});
  __syncwarp();
#pragma unroll 1
  for (int i = lane; i < 16 * M * kChunks; i += 32) {
    const int r = row + i / kChunks, c = column + i % kChunks * kChunk<T>;
    if (first + r < 0 || first + r >= limit || c >= rows.width) continue;
    const uint4 bits = load_shared_16(tile.chunk(r, c / kChunk<T>));
    const auto& pack = reinterpret_cast<const Pack<T, kChunk<T>>&>(bits);
    T* to = rows.data + (first + r) * rows.stride + c;
    if (rows.aligned && c + kChunk<T> <= rows.width) {
      store(to, pack);
    } else {
#pragma unroll
      for (int e = 0; e < kChunk<T>; ++e)
        if (c + e < rows.width) to[e] = pack.values[e];
    }
  }
}

}  // namespace xformer_fast
