// Softmax attention, backward, the first kernel: gradient of the queries, and what the other kernels need of each query.
//
// A block owns kQueries queries of one head, a warp 16 M of them: it leaves their lse and delta for the others, then walks the
// key blocks that they see, adding dS·K. The next block's keys and values arrive in a second pair of tiles meanwhile (where shared
// memory has room for it). Gradients of ALiBi slopes and sinks are a share a block. Where a warp's registers cannot hold its rows'
// results (float32, large head dims), kParts warps share the rows: each computes all of their dS and a part of the columns.
//
// NOTES
//   No GPU has run it: tests/cuda_emulation has, and it is compiled for sm_80, sm_89 and sm_90a (no spills in half precision).
#include "attention_gradients.cuh"

namespace xformer_fast {
namespace {

template <class T_, int kWidth_, int kM_, int kWarps_, int kKeys_, int kStages_, int kParts_ = 1>
struct Shape {
  using T = T_;
  static constexpr int kWidth = kWidth_, kM = kM_, kWarps = kWarps_, kKeys = kKeys_, kStages = kStages_, kParts = kParts_;
  static constexpr int kThreads = 32 * kWarps, kQueries = 16 * kM * kWarps / kParts, kColumns = kWidth / kParts;
  using QueryTile = Tile<T, kQueries, kWidth>;
  using KeyTile = Tile<T, kKeys, kWidth>;
  static constexpr int kSharedBytes = 2 * QueryTile::kBytes + 2 * kStages * KeyTile::kBytes + 4 * kWarps;
};

// Of a row, the products of the chunks t, t + 4, t + 8...
template <class T>
__device__ __forceinline__ float partial_dot(const Rows<const T>& x, const Rows<const T>& y, int row) {
  const T *a = x.data + row * x.stride, *b = y.data + row * y.stride;
  float sum = 0.f;
  for (int column = lane_index() % 4 * kChunk<T>; column < x.width; column += 4 * kChunk<T>) {
    if (x.aligned && y.aligned && column + kChunk<T> <= x.width) {
      const auto p = load<T, kChunk<T>>(a + column), q = load<T, kChunk<T>>(b + column);
#pragma unroll
      for (int e = 0; e < kChunk<T>; ++e) sum += to_float(p.values[e]) * to_float(q.values[e]);
    } else {
      for (int e = column; e < min(column + kChunk<T>, x.width); ++e) sum += to_float(a[e]) * to_float(b[e]);
    }
  }
  return sum;
}

template <class Shape, bool kOptions>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    attention_query_gradient_kernel(const __grid_constant__ CudaAttention a, const __grid_constant__ CudaAttentionGrad grad) {
  using T = typename Shape::T;
  constexpr int M = Shape::kM, kQueries = Shape::kQueries, kKeys = Shape::kKeys, kColumns = Shape::kColumns, kStages = Shape::kStages;
  const int blocks = divide_up(static_cast<int>(a.seqlen_q), kQueries);
  const int stream = blockIdx.x / blocks, query_block = blocks - 1 - static_cast<int>(blockIdx.x) % blocks;
  const int batch = stream / static_cast<int>(a.heads_q), head = stream % static_cast<int>(a.heads_q);
  const int kv_head = head / static_cast<int>(a.heads_q / a.heads_kv);
  const int start = query_block * kQueries;
  const Sequence sequence(a, batch);
  if (start >= sequence.length_q) return;

  SharedMemory shared;
  const auto query_tile = shared.tile<typename Shape::QueryTile>(), grad_out_tile = shared.tile<typename Shape::QueryTile>();
  const auto key_tile = [&](int stage) { return typename Shape::KeyTile{shared.next + 2 * stage * Shape::KeyTile::kBytes}; };
  const auto value_tile = [&](int stage) { return typename Shape::KeyTile{key_tile(stage).base + Shape::KeyTile::kBytes}; };
  const uint32_t scratch = key_tile(kStages).base;
  const auto query = rows_of<const T>(a.query, batch, head, sequence.first_q, a.head_dim);
  const auto grad_out = rows_of<const T>(grad.grad_out, batch, head, sequence.first_q, a.head_dim_v);
  const auto key = rows_of<const T>(a.key, batch, kv_head, sequence.first_k, a.head_dim);
  const auto value = rows_of<const T>(a.value, batch, kv_head, sequence.first_k, a.head_dim_v);
  const Scores terms(a, sequence, batch, head);
  const Dropout dropout(a, batch, head);
  const int own = warp_index() / Shape::kParts * 16 * M, part = warp_index() % Shape::kParts, column = part * kColumns;
  const int first = start + own;

  const int last = min(start + kQueries, sequence.length_q) - 1;
  const VisibleBlocks visible(start, last, sequence.shift, sequence.key_limit, terms.left, terms.right, kKeys);
  auto copy_keys = [&](int block) {
    const int stage = block % kStages;
    copy_tile<Shape::kThreads>(key_tile(stage), key, block * kKeys, sequence.key_limit);
    copy_tile<Shape::kThreads>(value_tile(stage), value, block * kKeys, sequence.key_limit);
  };
  copy_tile<Shape::kThreads>(query_tile, query, start, sequence.length_q);
  copy_tile<Shape::kThreads>(grad_out_tile, grad_out, start, sequence.length_q);
  if (visible.begin < visible.end) copy_keys(visible.begin);
  commit_copies();

  RowStatistics<M> statistics;
  float sink_share = 0.f;
  {
    const auto out = rows_of<const T>(a.out, batch, head, sequence.first_q, a.head_dim_v);
    const auto residual = rows_of<const T>(a.residual, batch, head, sequence.first_q, a.head_dim_v);
    const float* lse = lse_of(a, a.lse, sequence, batch, head);
    const float* lse_error = lse_of(a, a.lse_error, sequence, batch, head);
    const float* grad_lse = grad.grad_lse ? lse_of(a, const_cast<float*>(grad.grad_lse), sequence, batch, head) : nullptr;
    const int64_t offset = statistics_offset(a, grad.statistics, sequence, batch, head);
    const float sink = a.sinks ? a.sinks[head] * kLog2E : -XF_INFINITY;
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = first + 16 * m + lane_index() / 4 + 8 * r;
        float delta = 0.f, log_sum = XF_INFINITY, rest = 0.f;
        if (row < sequence.length_q) {
          delta = partial_dot(grad_out, out, row);
          if (a.residual.data) delta += partial_dot(grad_out, residual, row);
          if (lse[row] != -XF_INFINITY) log_sum = __fmul_rn(lse[row], kLog2E);
          rest = lse_error[row];
        }
        delta = row_sum(delta);
        if (grad_lse && row < sequence.length_q) delta -= grad_lse[row];
        statistics.lse[m][r] = log_sum;
        statistics.rest[m][r] = rest;
        statistics.delta[m][r] = delta;
        if (part == 0 && lane_index() % 4 == 0) {
          grad.statistics.lse[offset + row] = log_sum;
          grad.statistics.rest[offset + row] = rest;
          grad.statistics.delta[offset + row] = delta;
          sink_share -= exp2_fast(sink - log_sum - rest) * delta;
        }
      }
  }

  Sums<M, kColumns> grad_query;
  grad_query.clear();
  float slope_share = 0.f;
  for (int block = visible.begin; block < visible.end; ++block) {
    const int key0 = block * kKeys, stage = block % kStages;
    wait_for_copies<0>();
    __syncthreads();  // this block's keys are there, and nobody reads the last one's any more
    if (kStages == 2 && block + 1 < visible.end) copy_keys(block + 1);
    commit_copies();

    Sums<M, kKeys> weights, grad_scores;
    weights.clear();
    grad_scores.clear();
    add_product(weights, query_tile, own, key_tile(stage));
    add_product(grad_scores, grad_out_tile, own, value_tile(stage));
    score_gradients<Orientation::kQueriesByKeys, kOptions>(
        weights, grad_scores, terms, dropout, first, key0, visible.whole(block), true,
        [&](int m, int, int e) { return statistics.of(m, e); },
        [&](float ds, int distance) { if (kOptions) slope_share -= ds * fabsf(static_cast<float>(distance)); });
    add_weighted_rows(grad_query, grad_scores, key_tile(stage), column);
    if (kStages == 1) {
      __syncthreads();
      if (block + 1 < visible.end) copy_keys(block + 1);
      commit_copies();
    }
  }
  wait_for_copies<0>();

  grad_query.for_each([&](float& x, int, int) { x *= a.scale; });
  __syncthreads();  // nobody reads the queries any more: the tile takes the results
  store_rows(grad_query, query_tile, own, column, rows_of<T>(grad.grad_query, batch, head, sequence.first_q, a.head_dim), start,
             sequence.length_q);
  const int64_t share = (static_cast<int64_t>(batch) * a.heads_q + head) * blocks + query_block;
  if (kOptions && grad.slope_shares) {
    const float sum = block_sum<Shape::kWarps>(part == 0 ? slope_share : 0.f, scratch);
    if (threadIdx.x == 0) grad.slope_shares[share] = sum;
  }
  if (grad.sink_shares) {
    const float sum = block_sum<Shape::kWarps>(sink_share, scratch);
    if (threadIdx.x == 0) grad.sink_shares[share] = sum;
  }
}

// What is done with the shape of a call's element and head dim.
template <class T, class F>
auto with_shape_of(const CudaAttention& a, F f) {
  const int64_t width = a.head_dim > a.head_dim_v ? a.head_dim : a.head_dim_v;
  if constexpr (sizeof(T) == 4) {
    if (width <= 64) return f(Shape<T, 64, 1, 4, 32, 2>{});
    if (width <= 128) return f(Shape<T, 128, 1, 2, 16, 2>{});
    return f(Shape<T, 256, 1, 4, 16, 1, 2>{});
  } else {
    if (width <= 64) return f(Shape<T, 64, 2, 4, 32, 2>{});
    if (width <= 128) return f(Shape<T, 128, 1, 4, 32, 2>{});
    return f(Shape<T, 256, 1, 4, 16, 2>{});
  }
}
template <class F>
auto with_shape(const CudaAttention& a, F f) {
  switch (a.element) {
    case Element::float32: return with_shape_of<float>(a, f);
    case Element::bfloat16: return with_shape_of<bf16>(a, f);
    default: return with_shape_of<half>(a, f);
  }
}

bool has_options(const CudaAttention& a) {
  return a.softcap != 0.f || a.alibi_slopes || a.distance_bias || a.mask || a.dropout_p > 0. || a.element == Element::float32;
}

}  // namespace

int64_t attention_query_blocks(const CudaAttention& a) {
  return with_shape(a, [&](auto shape) { return (a.seqlen_q + shape.kQueries - 1) / shape.kQueries; });
}

int attention_query_gradient_cuda(const CudaAttention& a, const CudaAttentionGrad& grad, void* stream) {
  return with_shape(a, [&](auto shape) {
    using Shape = decltype(shape);
    const int64_t blocks = (a.seqlen_q + Shape::kQueries - 1) / Shape::kQueries * a.batch * a.heads_q;
    if (!blocks) return cudaSuccess;
    auto kernel = attention_query_gradient_kernel<Shape, true>;
    if constexpr (sizeof(typename Shape::T) == 2)
      if (!has_options(a)) kernel = attention_query_gradient_kernel<Shape, false>;
    return launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(Shape::kThreads), Shape::kSharedBytes, stream, a, grad);
  });
}

}  // namespace xformer_fast
