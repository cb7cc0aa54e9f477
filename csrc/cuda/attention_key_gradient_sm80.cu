// Softmax attention, backward: gradients of the keys and values.
//
// A block owns kKeys keys of one KV head, a warp 16 M of them, and walks the query blocks that see them, over all heads of
// their group: it adds Pᵀ·dO and dSᵀ·Q. Scores are computed transposed, so that weights stay in registers. The next block's queries
// arrive in a second pair of tiles meanwhile (where shared memory has room for it). At large head dims the two sums do not fit in
// registers at once and are two launches; in float32 kParts warps share the rows on top of that: each computes all of their dS and a
// part of the columns. What padding keys gather is thrown away.
//
// NOTES
//   No GPU has run it: tests/cuda_emulation has, and it is compiled for sm_80, sm_89 and sm_90a (no spills in half precision).
#include "attention_gradients.cuh"

namespace xformer_fast {
namespace {

template <class T_, int kWidth_, int kM_, int kWarps_, int kQueries_, int kStages_, int kParts_ = 1>
struct Shape {
  using T = T_;
  static constexpr int kWidth = kWidth_, kM = kM_, kWarps = kWarps_, kQueries = kQueries_, kStages = kStages_, kParts = kParts_;
  static constexpr int kThreads = 32 * kWarps, kKeys = 16 * kM * kWarps / kParts, kColumns = kWidth / kParts;
  using QueryTile = Tile<T, kQueries, kWidth>;
  using KeyTile = Tile<T, kKeys, kWidth>;
  static constexpr int kStatisticsBytes = 3 * kQueries * 4;
  static constexpr int kSharedBytes = 2 * KeyTile::kBytes + kStages * (2 * QueryTile::kBytes + kStatisticsBytes);
};

template <class Shape, bool kKey, bool kValue, bool kOptions>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    attention_key_gradient_kernel(const __grid_constant__ CudaAttention a, const __grid_constant__ CudaAttentionGrad grad) {
  using T = typename Shape::T;
  constexpr int M = Shape::kM, kQueries = Shape::kQueries, kKeys = Shape::kKeys, kColumns = Shape::kColumns, kStages = Shape::kStages;
  const int key_blocks = divide_up(static_cast<int>(a.seqlen_k), kKeys);
  const int stream = blockIdx.x / key_blocks, start = static_cast<int>(blockIdx.x) % key_blocks * kKeys;
  const int batch = stream / static_cast<int>(a.heads_kv), kv_head = stream % static_cast<int>(a.heads_kv);
  const int group = static_cast<int>(a.heads_q / a.heads_kv);
  const Sequence sequence(a, batch);
  if (start >= sequence.length_k) return;

  SharedMemory shared;
  const auto key_tile = shared.tile<typename Shape::KeyTile>(), value_tile = shared.tile<typename Shape::KeyTile>();
  constexpr int kStageBytes = 2 * Shape::QueryTile::kBytes + Shape::kStatisticsBytes;
  const auto query_tile = [&](int stage) { return typename Shape::QueryTile{shared.next + stage * kStageBytes}; };
  const auto grad_out_tile = [&](int stage) { return typename Shape::QueryTile{query_tile(stage).base + Shape::QueryTile::kBytes}; };
  const auto statistics_at = [&](int stage) { return query_tile(stage).base + 2 * Shape::QueryTile::kBytes; };
  const auto key = rows_of<const T>(a.key, batch, kv_head, sequence.first_k, a.head_dim);
  const auto value = rows_of<const T>(a.value, batch, kv_head, sequence.first_k, a.head_dim_v);
  const int own = warp_index() / Shape::kParts * 16 * M, column = warp_index() % Shape::kParts * kColumns, first = start + own;

  const int last = min(start + kKeys, sequence.key_limit) - 1;
  const int query_limit = start < sequence.key_limit ? sequence.length_q : 0;
  const VisibleBlocks visible(start, last, -sequence.shift, query_limit, static_cast<int>(a.right), static_cast<int>(a.left), kQueries);
  const int count = max(visible.end - visible.begin, 0), steps = group * count;
  auto head_at = [&](int step) { return kv_head * group + step / count; };
  auto block_at = [&](int step) { return visible.begin + step % count; };
  auto copy_queries = [&](int step) {
    const int head = head_at(step), query0 = block_at(step) * kQueries, stage = step % kStages;
    const auto query = rows_of<const T>(a.query, batch, head, sequence.first_q, a.head_dim);
    const auto grad_out = rows_of<const T>(grad.grad_out, batch, head, sequence.first_q, a.head_dim_v);
    copy_tile<Shape::kThreads>(query_tile(stage), query, query0, sequence.length_q);
    copy_tile<Shape::kThreads>(grad_out_tile(stage), grad_out, query0, sequence.length_q);
    const int64_t offset = statistics_offset(a, grad.statistics, sequence, batch, head) + query0;
    const int i = threadIdx.x;
    const auto copy = [&](int number, const float* rows) {
      copy_16_bytes(statistics_at(stage) + 16 * i, rows + offset + 4 * i - number * kQueries, 16);
    };
    if (i < kQueries / 4) copy(0, grad.statistics.lse);
    else if (i < kQueries / 2) copy(1, grad.statistics.rest);
    else if (i < kQueries / 4 * 3) copy(2, grad.statistics.delta);
  };
  copy_tile<Shape::kThreads>(key_tile, key, start, sequence.key_limit);
  copy_tile<Shape::kThreads>(value_tile, value, start, sequence.key_limit);
  if (steps) copy_queries(0);
  commit_copies();

  Sums<M, kKey ? kColumns : 8> grad_key;
  Sums<M, kValue ? kColumns : 8> grad_value;
  grad_key.clear();
  grad_value.clear();
  for (int step = 0; step < steps; ++step) {
    const int head = head_at(step), block = block_at(step), stage = step % kStages;
    wait_for_copies<0>();
    __syncthreads();  // this block's queries are there, and nobody reads the last one's any more
    if (kStages == 2 && step + 1 < steps) copy_queries(step + 1);
    commit_copies();

    const Scores terms(a, sequence, batch, head);
    const Dropout dropout(a, batch, head);
    Sums<M, kQueries> weights, grad_scores;
    weights.clear();
    grad_scores.clear();
    add_product(weights, key_tile, own, query_tile(stage));
    if (kKey) add_product(grad_scores, value_tile, own, grad_out_tile(stage));
    const uint32_t numbers = statistics_at(stage) + lane_index() % 4 * 8;
    score_gradients<Orientation::kKeysByQueries, kOptions>(
        weights, grad_scores, terms, dropout, block * kQueries, first, visible.whole(block), true,
        [&](int, int j, int e) {
          const auto number = [&](int n) { return __uint_as_float(load_shared(numbers + 4 * kQueries * n + 32 * j + 4 * (e % 2))); };
          return RowNumbers{number(0), number(1), kKey ? number(2) : 0.f};
        },
        [](float, int) {});
    if constexpr (kValue) add_weighted_rows(grad_value, weights, grad_out_tile(stage), column);
    if constexpr (kKey) add_weighted_rows(grad_key, grad_scores, query_tile(stage), column);
    if (kStages == 1) {
      __syncthreads();
      if (step + 1 < steps) copy_queries(step + 1);
      commit_copies();
    }
  }
  wait_for_copies<0>();
  __syncthreads();  // nobody reads keys and values any more: the tiles take the results

  const Dropout dropout(a, batch, 0);
  if constexpr (kKey) {
    grad_key.for_each([&](float& x, int row, int) { x = first + row < sequence.key_limit ? x * a.scale : 0.f; });
    store_rows(grad_key, key_tile, own, column, rows_of<T>(grad.grad_key, batch, kv_head, sequence.first_k, a.head_dim), start,
               sequence.length_k);
  }
  if constexpr (kValue) {
    grad_value.for_each([&](float& x, int row, int) { x = first + row < sequence.key_limit ? x * dropout.rescale : 0.f; });
    store_rows(grad_value, value_tile, own, column, rows_of<T>(grad.grad_value, batch, kv_head, sequence.first_k, a.head_dim_v), start,
               sequence.length_k);
  }
}

bool has_options(const CudaAttention& a) {
  return a.softcap != 0.f || a.alibi_slopes || a.distance_bias || a.mask || a.dropout_p > 0. || a.element == Element::float32;
}

template <class Shape, bool kKey, bool kValue>
cudaError_t run(const CudaAttention& a, const CudaAttentionGrad& grad, void* stream) {
  const int64_t blocks = (a.seqlen_k + Shape::kKeys - 1) / Shape::kKeys * a.batch * a.heads_kv;
  if (!blocks) return cudaSuccess;
  auto kernel = attention_key_gradient_kernel<Shape, kKey, kValue, true>;
  if constexpr (sizeof(typename Shape::T) == 2)
    if (!has_options(a)) kernel = attention_key_gradient_kernel<Shape, kKey, kValue, false>;
  return launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(Shape::kThreads), Shape::kSharedBytes, stream, a, grad);
}

template <class Shape>
cudaError_t run_both(const CudaAttention& a, const CudaAttentionGrad& grad, void* stream) {
  const cudaError_t error = run<Shape, true, false>(a, grad, stream);
  return error == cudaSuccess ? run<Shape, false, true>(a, grad, stream) : error;
}

template <class T>
cudaError_t run_element(const CudaAttention& a, const CudaAttentionGrad& grad, void* stream) {
  const int64_t width = a.head_dim > a.head_dim_v ? a.head_dim : a.head_dim_v;
  if constexpr (sizeof(T) == 4) {
    if (width <= 64) return run<Shape<T, 64, 1, 4, 16, 2>, true, true>(a, grad, stream);
    if (width <= 128) return run_both<Shape<T, 128, 1, 2, 16, 2>>(a, grad, stream);
    return run_both<Shape<T, 256, 1, 4, 16, 1, 2>>(a, grad, stream);
  } else {
    if (width <= 64) return run<Shape<T, 64, 1, 8, 64, 2>, true, true>(a, grad, stream);
    if (width <= 128) return run<Shape<T, 128, 1, 8, 32, 2>, true, true>(a, grad, stream);
    return run_both<Shape<T, 256, 1, 4, 16, 2>>(a, grad, stream);
  }
}

}  // namespace

int attention_key_gradient_cuda(const CudaAttention& a, const CudaAttentionGrad& grad, void* stream) {
  switch (a.element) {
    case Element::float32: return run_element<float>(a, grad, stream);
    case Element::bfloat16: return run_element<bf16>(a, grad, stream);
    case Element::float16: return run_element<half>(a, grad, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace xformer_fast
