// Softmax attention, backward: gradients of a float mask and of a bias of distance, only when asked for.
//
// Mask: a block owns a tile of the mask's own elements and walks everything that read it: (batch, head) pairs, and query blocks
// where that axis is broadcast. A small mask is read by many pairs: they are split over blocks, by shape alone, into parts which the
// launcher adds.
// Distance: tiles are square, and a block owns one diagonal of tiles of one (batch, head): they all hold the same distances at the
// same places, so it adds them up as they are, and only then sums the one tile along its own diagonals. A tile of size n holds 2n - 1
// distances, half of which its neighbour holds too: those from the tile's own first distance on and those below go to two parts,
// which the launcher adds.
//
// NOTES
//   No GPU has run it: tests/cuda_emulation has, and it is compiled for sm_80, sm_89 and sm_90a (no spills in half precision).
#include "attention_gradients.cuh"

namespace xformer_fast {
namespace {

template <class T_, int kWidth_, int kWarps_, int kKeys_>
struct Shape {
  using T = T_;
  static constexpr int kWidth = kWidth_, kWarps = kWarps_, kKeys = kKeys_;
  static constexpr int kThreads = 32 * kWarps, kQueries = 16 * kWarps;
  using QueryTile = Tile<T, kQueries, kWidth>;
  using KeyTile = Tile<T, kKeys, kWidth>;
  static constexpr int kSharedBytes = 2 * QueryTile::kBytes + 2 * KeyTile::kBytes;
};

// Tiles of queries, their gradients, keys and values; and the dS of one tile of scores of one (batch, head).
template <class Shape>
struct Gradients {
  using T = typename Shape::T;
  typename Shape::QueryTile query_tile, grad_out_tile;
  typename Shape::KeyTile key_tile, value_tile;

  __device__ __forceinline__ Gradients() {
    SharedMemory shared;
    query_tile = shared.tile<typename Shape::QueryTile>();
    grad_out_tile = shared.tile<typename Shape::QueryTile>();
    key_tile = shared.tile<typename Shape::KeyTile>();
    value_tile = shared.tile<typename Shape::KeyTile>();
  }

  // sum += dS of queries query0.. and keys key0.., zero where there are none.
  __device__ __forceinline__ void add(Sums<1, Shape::kKeys>& sum, const CudaAttention& a, const CudaAttentionGrad& grad,
                                      const Sequence& sequence, int batch, int head, int query0, int key0) const {
    const int kv_head = head / static_cast<int>(a.heads_q / a.heads_kv);
    const auto query = rows_of<const T>(a.query, batch, head, sequence.first_q, a.head_dim);
    const auto grad_out = rows_of<const T>(grad.grad_out, batch, head, sequence.first_q, a.head_dim_v);
    const auto key = rows_of<const T>(a.key, batch, kv_head, sequence.first_k, a.head_dim);
    const auto value = rows_of<const T>(a.value, batch, kv_head, sequence.first_k, a.head_dim_v);
    __syncthreads();  // nobody reads the last tiles any more
    copy_tile<Shape::kThreads>(query_tile, query, query0, sequence.length_q);
    copy_tile<Shape::kThreads>(grad_out_tile, grad_out, query0, sequence.length_q);
    copy_tile<Shape::kThreads>(key_tile, key, key0, sequence.key_limit);
    copy_tile<Shape::kThreads>(value_tile, value, key0, sequence.key_limit);
    commit_copies();
    const int own = 16 * warp_index();
    const int64_t offset = statistics_offset(a, grad.statistics, sequence, batch, head);
    RowStatistics<1> statistics;
    statistics.load(grad.statistics, offset + query0 + own);
    wait_for_copies<0>();
    __syncthreads();
    Sums<1, Shape::kKeys> weights, grad_scores;
    weights.clear();
    grad_scores.clear();
    add_product(weights, query_tile, own, key_tile);
    add_product(grad_scores, grad_out_tile, own, value_tile);
    score_gradients<Orientation::kQueriesByKeys, true>(
        weights, grad_scores, Scores(a, sequence, batch, head), Dropout(a, batch, head), query0 + own, key0, false, false,
        [&](int m, int, int e) { return statistics.of(m, e); },
        [](float, int) {});
#pragma unroll
    for (int j = 0; j < Shape::kKeys / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) sum.of[0][j][e] += grad_scores.of[0][j][e];
  }
};

template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    attention_mask_gradient_kernel(const __grid_constant__ CudaAttention a, const __grid_constant__ CudaAttentionGrad grad) {
  constexpr int kQueries = Shape::kQueries, kKeys = Shape::kKeys;
  const Gradients<Shape> gradients;
  const int batches = static_cast<int>(grad.mask_sizes[0]), heads = static_cast<int>(grad.mask_sizes[1]);
  const int rows = static_cast<int>(grad.mask_sizes[2]), columns = static_cast<int>(grad.mask_sizes[3]);
  const int tiles_m = divide_up(rows, kQueries), tiles_n = divide_up(columns, kKeys);
  int rest = blockIdx.x;
  const int tile_n = rest % tiles_n;
  rest /= tiles_n;
  const int tile_m = rest % tiles_m;
  rest /= tiles_m;
  const int plane = rest % (batches * heads), part = rest / (batches * heads);
  const int pair_heads = static_cast<int>(a.heads_q) / heads, pair_batches = static_cast<int>(a.batch) / batches;
  const int pairs = pair_heads * pair_batches, share = divide_up(pairs, static_cast<int>(grad.mask_splits));
  const bool one_row = rows < a.seqlen_q;
  const int key0 = tile_n * kKeys;

  Sums<1, kKeys> sum;
  sum.clear();
  for (int pair = part * share; pair < min((part + 1) * share, pairs); ++pair) {
    const int batch = plane / heads + pair / pair_heads, head = plane % heads + pair % pair_heads;
    const Sequence sequence(a, batch);
    for (int query0 = tile_m * kQueries; query0 < (one_row ? sequence.length_q : tile_m * kQueries + 1); query0 += kQueries) {
      const int last = min(query0 + kQueries, sequence.length_q) - 1;
      const VisibleBlocks visible(query0, last, sequence.shift, sequence.key_limit, static_cast<int>(a.left),
                                  static_cast<int>(a.right), kKeys);
      if (tile_n >= visible.begin && tile_n < visible.end) gradients.add(sum, a, grad, sequence, batch, head, query0, key0);
    }
  }

  float* out = grad.grad_mask + (static_cast<int64_t>(part) * batches * heads + plane) * rows * columns;
  if (!one_row) {
    const int first = tile_m * kQueries + 16 * warp_index();
    sum.for_each([&](float& x, int row, int column) {
      if (first + row < rows && key0 + column < columns) out[static_cast<int64_t>(first + row) * columns + key0 + column] = x;
    });
    return;
  }
  // Rows of the tile: over the lanes of a warp, then over the warps.
  const uint32_t scratch = gradients.query_tile.base;
  __syncthreads();
#pragma unroll
  for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float x = sum.of[0][j][e] + sum.of[0][j][e + 2];
#pragma unroll
      for (int flip = 4; flip < 32; flip *= 2) x += __shfl_xor_sync(0xffffffffu, x, flip);
      if (lane_index() < 4) store_shared(scratch + 4 * (warp_index() * kKeys + 8 * j + 2 * lane_index() + e), __float_as_uint(x));
    }
  __syncthreads();
  for (int column = threadIdx.x; column < min(kKeys, columns - key0); column += Shape::kThreads) {
    float x = 0.f;
    for (int w = 0; w < Shape::kWarps; ++w) x += __uint_as_float(load_shared(scratch + 4 * (w * kKeys + column)));
    out[key0 + column] = x;
  }
}

template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    attention_distance_gradient_kernel(const __grid_constant__ CudaAttention a, const __grid_constant__ CudaAttentionGrad grad) {
  constexpr int kSide = Shape::kKeys;
  static_assert(Shape::kQueries == kSide);
  const Gradients<Shape> gradients;
  const int query_tiles = divide_up(static_cast<int>(a.seqlen_q), kSide), key_tiles = divide_up(static_cast<int>(a.seqlen_k), kSide);
  const int diagonals = query_tiles + key_tiles - 1, stream = blockIdx.x / diagonals;
  const int diagonal = static_cast<int>(blockIdx.x) % diagonals - query_tiles + 1;  // key tile minus query tile
  const int batch = stream / static_cast<int>(a.heads_q), head = stream % static_cast<int>(a.heads_q);
  const Sequence sequence(a, batch);
  const int distance = diagonal * kSide - sequence.shift;  // of a tile's first query and first key

  const int begin = max(0, -diagonal);
  int end = min(divide_up(sequence.length_q, kSide), divide_up(sequence.key_limit, kSide) - diagonal);
  if (distance + kSide <= -a.left || distance - kSide >= a.right) end = begin;
  Sums<1, kSide> sum;
  sum.clear();
  for (int tile = begin; tile < end; ++tile)
    gradients.add(sum, a, grad, sequence, batch, head, tile * kSide, (tile + diagonal) * kSide);

  const uint32_t scratch = gradients.query_tile.base;  // [kSide][kSide + 1]
  static_assert(kSide * (kSide + 1) * 4 <= Shape::kSharedBytes);
  __syncthreads();
  const int own = 16 * warp_index();
  sum.for_each([&](float& x, int row, int column) {
    store_shared(scratch + 4 * ((own + row) * (kSide + 1) + column), __float_as_uint(x));
  });
  __syncthreads();
  const int64_t count = a.distance_count, streams = a.batch * a.heads_q;
  for (int i = threadIdx.x; i < 2 * kSide - 1; i += Shape::kThreads) {
    const int d = i - (kSide - 1);  // column minus row
    float x = 0.f;
    for (int row = max(0, -d); row < min(kSide, kSide - d); ++row)
      x += __uint_as_float(load_shared(scratch + 4 * (row * (kSide + 1) + row + d)));
    const int64_t place = distance + d + a.distance_offset;
    if (place >= 0 && place < count) grad.distance_parts[((d < 0) * streams + stream) * count + place] = x;
  }
}

template <class T, class F>
cudaError_t with_shape_of(const CudaAttention& a, F f) {
  const int64_t width = a.head_dim > a.head_dim_v ? a.head_dim : a.head_dim_v;
  if constexpr (sizeof(T) == 4) {
    if (width <= 64) return f(Shape<T, 64, 2, 32>{});
    if (width <= 128) return f(Shape<T, 128, 2, 32>{});
    return f(Shape<T, 256, 1, 16>{});
  } else {
    if (width <= 64) return f(Shape<T, 64, 4, 64>{});
    if (width <= 128) return f(Shape<T, 128, 4, 64>{});
    return f(Shape<T, 256, 2, 32>{});
  }
}
template <class F>
cudaError_t with_shape(const CudaAttention& a, F f) {
  switch (a.element) {
    case Element::float32: return with_shape_of<float>(a, f);
    case Element::bfloat16: return with_shape_of<bf16>(a, f);
    case Element::float16: return with_shape_of<half>(a, f);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace

int attention_mask_gradient_cuda(const CudaAttention& a, const CudaAttentionGrad& grad, void* stream) {
  return with_shape(a, [&](auto shape) {
    using Shape = decltype(shape);
    const int64_t *sizes = grad.mask_sizes, tiles_m = (sizes[2] + Shape::kQueries - 1) / Shape::kQueries;
    const int64_t blocks = grad.mask_splits * sizes[0] * sizes[1] * tiles_m * ((sizes[3] + Shape::kKeys - 1) / Shape::kKeys);
    if (!blocks) return cudaSuccess;
    return launch(attention_mask_gradient_kernel<Shape>, dim3(static_cast<unsigned>(blocks)), dim3(Shape::kThreads),
                  Shape::kSharedBytes, stream, a, grad);
  });
}

int attention_distance_gradient_cuda(const CudaAttention& a, const CudaAttentionGrad& grad, void* stream) {
  return with_shape(a, [&](auto shape) {
    using Shape = decltype(shape);
    const int64_t query_tiles = (a.seqlen_q + Shape::kKeys - 1) / Shape::kKeys, key_tiles = (a.seqlen_k + Shape::kKeys - 1) / Shape::kKeys;
    const int64_t blocks = (query_tiles + key_tiles - 1) * a.batch * a.heads_q;
    if (!a.seqlen_q || !a.seqlen_k || !blocks) return cudaSuccess;
    return launch(attention_distance_gradient_kernel<Shape>, dim3(static_cast<unsigned>(blocks)), dim3(Shape::kThreads),
                  Shape::kSharedBytes, stream, a, grad);
  });
}

}  // namespace xformer_fast
