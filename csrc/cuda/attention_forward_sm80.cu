// Softmax attention, forward: out = softmax(cap(Q·Kᵀ · scale) + biases + mask)·V and lse, in one pass over the keys.
//
// A block owns kQueries queries of one head, a warp 16 M of them, and walks the key blocks that they see, keeping a running maximum
// and sum (online softmax: Milakov and Gimelshein 2018; FlashAttention-2: Dao 2023). While scores are computed the
// block's values arrive, and while those are weighted the next block's keys. Key blocks outside of causal limit, window and key
// length are never read; those seen whole take no position tests. Scores and weights stay in registers. Blocks of one head are
// neighbours, so that its keys stay in L2, and those with the most keys start first. Where a warp's registers cannot hold its rows'
// results (float32, large head dims), kParts warps share the rows: each computes all of their scores and a part of the columns.
//
// NOTES
//   No GPU has run it: tests/cuda_emulation has, and it is compiled for sm_80, sm_89 and sm_90a (no spills in half precision).
//   Registers are full above 64 columns. Asking for the next keys before the weights are computed spilled 16 bytes at 128
//   columns without options (bfloat16, sm_90a), asking for them after that 24 bytes at 256 columns with options.
#include "attention_scores.cuh"

namespace xformer_fast {
namespace {

template <class T_, int kWidth_, int kM_, int kWarps_, int kKeys_, int kParts_ = 1>
struct Shape {
  using T = T_;
  static constexpr int kWidth = kWidth_, kM = kM_, kWarps = kWarps_, kKeys = kKeys_, kParts = kParts_;
  static constexpr int kThreads = 32 * kWarps, kQueries = 16 * kM * kWarps / kParts, kColumns = kWidth / kParts;
  using QueryTile = Tile<T, kQueries, kWidth>;
  using KeyTile = Tile<T, kKeys, kWidth>;
  static constexpr int kSharedBytes = QueryTile::kBytes + 2 * KeyTile::kBytes;
};

template <class Shape, bool kOptions>
__global__ void __launch_bounds__(Shape::kThreads, 1) attention_forward_kernel(const __grid_constant__ CudaAttention a) {
  using T = typename Shape::T;
  constexpr int M = Shape::kM, kQueries = Shape::kQueries, kKeys = Shape::kKeys, kColumns = Shape::kColumns;
  const int blocks = divide_up(static_cast<int>(a.seqlen_q), kQueries);
  const int stream = blockIdx.x / blocks, start = (blocks - 1 - static_cast<int>(blockIdx.x) % blocks) * kQueries;
  const int batch = stream / static_cast<int>(a.heads_q), head = stream % static_cast<int>(a.heads_q);
  const int kv_head = head / static_cast<int>(a.heads_q / a.heads_kv);
  const Sequence sequence(a, batch);
  if (start >= sequence.length_q) return;

  SharedMemory shared;
  const auto query_tile = shared.tile<typename Shape::QueryTile>();
  const auto key_tile = shared.tile<typename Shape::KeyTile>(), value_tile = shared.tile<typename Shape::KeyTile>();
  const auto query = rows_of<const T>(a.query, batch, head, sequence.first_q, a.head_dim);
  const auto key = rows_of<const T>(a.key, batch, kv_head, sequence.first_k, a.head_dim);
  const auto value = rows_of<const T>(a.value, batch, kv_head, sequence.first_k, a.head_dim_v);
  const Scores terms(a, sequence, batch, head);
  const Dropout dropout(a, batch, head);
  const int own = warp_index() / Shape::kParts * 16 * M, part = warp_index() % Shape::kParts, column = part * kColumns;
  const int first = start + own;

  const int last = min(start + kQueries, sequence.length_q) - 1;
  const VisibleBlocks visible(start, last, sequence.shift, sequence.key_limit, terms.left, terms.right, kKeys);
  copy_tile<Shape::kThreads>(query_tile, query, start, sequence.length_q);
  if (visible.begin < visible.end) copy_tile<Shape::kThreads>(key_tile, key, visible.begin * kKeys, sequence.key_limit);
  commit_copies();

  Sums<M, kColumns> out;
  out.clear();
  Softmax<M, kColumns> softmax;
  softmax.start(a.sinks ? a.sinks[head] * kLog2E : -XF_INFINITY);
  for (int block = visible.begin; block < visible.end; ++block) {
    const int key0 = block * kKeys;
    wait_for_copies<0>();
    __syncthreads();  // this block's keys are there, and nobody reads the last one's values any more
    copy_tile<Shape::kThreads>(value_tile, value, key0, sequence.key_limit);
    commit_copies();

    Sums<M, kKeys> scores;
    scores.clear();
    add_product(scores, query_tile, own, key_tile);
    wait_for_copies<0>();
    __syncthreads();  // this block's values are there, and nobody reads its keys any more
    const auto fetch_next_keys = [&] {
      if (block + 1 < visible.end) copy_tile<Shape::kThreads>(key_tile, key, key0 + kKeys, sequence.key_limit);
      commit_copies();
    };
    if (kOptions) fetch_next_keys();

    if (kOptions) {
      scores.for_each([&](float& s, int row, int column) { s = terms.full(s, first + row, key0 + column); });
    } else if (!visible.whole(block)) {
      scores.for_each([&](float& s, int row, int column) { s = terms.sees(first + row, key0 + column) ? s : -XF_INFINITY; });
    }
    softmax.weigh(scores, out, kOptions ? 1.f : terms.scale);
    if (kOptions && dropout.active) {
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int j = 0; j < kKeys / 8; ++j) {
          const uint32_t keep = dropout.keep(first + 16 * m, key0 + 8 * j);
#pragma unroll
          for (int e = 0; e < 4; ++e) scores.of[m][j][e] = keep >> e & 1 ? scores.of[m][j][e] : 0.f;
        }
    }
    if (!kOptions) fetch_next_keys();
    add_weighted_rows(out, scores, value_tile, column, kOptions && a.exact_weights);
  }
  wait_for_copies<0>();

  float *lse = lse_of(a, a.lse, sequence, batch, head), *lse_error = lse_of(a, a.lse_error, sequence, batch, head);
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = row_sum(softmax.sum[m][r]), divisor = sum == 0.f ? 1.f : sum;
      const int row = first + 16 * m + lane_index() / 4 + 8 * r;
      if (part == 0 && lane_index() % 4 == 0 && row < sequence.length_q)
        store_lse(sum == 0.f, softmax.max[m][r], divisor, lse + row, lse_error + row);
#pragma unroll
      for (int j = 0; j < kColumns / 8; ++j)
#pragma unroll
        for (int e = 2 * r; e < 2 * r + 2; ++e) out.of[m][j][e] *= dropout.rescale / divisor;
    }
  __syncthreads();  // all have their queries in registers: the tile takes the results
  const auto results = rows_of<T>(a.out, batch, head, sequence.first_q, a.head_dim_v);
  store_rows(out, query_tile, own, column, results, start, sequence.length_q);
  if (a.residual.data) {
    out.for_each([&](float& x, int, int) { x -= rounded<T>(x); });
    const auto residual = rows_of<T>(a.residual, batch, head, sequence.first_q, a.head_dim_v);
    store_rows(out, query_tile, own, column, residual, start, sequence.length_q);
  }
}

bool has_options(const CudaAttention& a) {
  return a.softcap != 0.f || a.alibi_slopes || a.distance_bias || a.mask || a.dropout_p > 0. || a.exact_weights || a.scale <= 0.f;
}

template <class Shape>
cudaError_t run(const CudaAttention& a, void* stream) {
  const int64_t blocks = (a.seqlen_q + Shape::kQueries - 1) / Shape::kQueries * a.batch * a.heads_q;
  if (!blocks) return cudaSuccess;
  auto kernel = attention_forward_kernel<Shape, true>;
  if constexpr (sizeof(typename Shape::T) == 2)
    if (!has_options(a)) kernel = attention_forward_kernel<Shape, false>;
  return launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(Shape::kThreads), Shape::kSharedBytes, stream, a);
}

// M and the number of warps and keys by element and head dim.
template <class T>
cudaError_t run_half_width(const CudaAttention& a, void* stream) {
  const int64_t width = a.head_dim > a.head_dim_v ? a.head_dim : a.head_dim_v;
  if (width <= 64) return run<Shape<T, 64, 2, 4, 64>>(a, stream);
  if (width <= 128) return run<Shape<T, 128, 2, 4, 32>>(a, stream);
  return run<Shape<T, 256, 1, 4, 32>>(a, stream);
}

cudaError_t run_float(const CudaAttention& a, void* stream) {
  const int64_t width = a.head_dim > a.head_dim_v ? a.head_dim : a.head_dim_v;
  if (width <= 64) return run<Shape<float, 64, 1, 4, 64>>(a, stream);
  if (width <= 128) return run<Shape<float, 128, 1, 4, 32>>(a, stream);
  return run<Shape<float, 256, 1, 8, 16, 2>>(a, stream);
}

}  // namespace

int attention_forward_cuda(const CudaAttention& a, void* stream) {
  switch (a.element) {
    case Element::float32: return run_float(a, stream);
    case Element::bfloat16: return run_half_width<bf16>(a, stream);
    case Element::float16: return run_half_width<half>(a, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace xformer_fast
