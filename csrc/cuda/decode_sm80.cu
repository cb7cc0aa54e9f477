// Decoding: attention of few new tokens over a long cache, split over its keys; and the writing of new tokens.
//
// The query heads of a KV head and the tokens of a call are the rows of one tile of 16, so that a key is read once for all of them:
// row m is head m / tokens of the group, token m % tokens; more rows are more blocks. A block owns one of `splits` equal ranges of a
// sequence's keys, and of every tile of them a warp takes 16 (float32, large head dims: kParts warps, each with a part of the
// columns): it keeps a softmax of its own, so that no warp waits for another's scores. Two tiles of keys and values are on their way while one is worked on. At the end the warps' results are merged in order
// and leave as (maximum, sum, unscaled output); a second kernel merges the ranges in order (Dao et al., "Flash-Decoding", 2023).
//
// A paged cache is read through its block table, whose entries are held to the pages there are. Not here: a mask, gradients, dropout.
//
// NOTES
//   No GPU has run it: tests/cuda_emulation has, and it is compiled for sm_80, sm_89 and sm_90a (no spills in half precision).
#include "attention_scores.cuh"
#include "decode.h"

namespace xformer_fast {
namespace {

constexpr int kRows = 16;

template <class T_, int kWidth_, int kWarps_, int kStages_, int kParts_ = 1>
struct Shape {
  using T = T_;
  static constexpr int kWidth = kWidth_, kWarps = kWarps_, kStages = kStages_, kParts = kParts_;
  static constexpr int kThreads = 32 * kWarps, kKeyWarps = kWarps / kParts, kKeys = 16 * kKeyWarps, kColumns = kWidth / kParts;
  using QueryTile = Tile<T, kRows, kWidth>;
  using KeyTile = Tile<T, kKeys, kWidth>;
  using WarpTile = Tile<T, 16, kWidth>;  // a warp's rows of a KeyTile
  static constexpr int kStageBytes = 2 * KeyTile::kBytes;
  static constexpr int kMergeBytes = kKeyWarps * kRows * (kWidth + 2) * 4;
  static constexpr int kTileBytes = QueryTile::kBytes + kStages * kStageBytes;
  static constexpr int kSharedBytes = kTileBytes > kMergeBytes ? kTileBytes : kMergeBytes;
};

// Where row `key` of a sequence is: in its own part of the cache, or in a page that its table names.
__device__ __forceinline__ int64_t cache_row(const Paging& paging, int64_t pages, const View& cache, int batch, int key) {
  if (!paging.block_table) return batch * cache.batch + key * cache.row;
  const int size = static_cast<int>(paging.page_size), page = key / size;
  const int64_t at = clamped(paging.block_table[batch * paging.table_row + page], 0, pages - 1);
  return at * cache.batch + (key - page * size) * cache.row;
}

// All threads of a block copy keys first.. < end of one KV head, as copy_tile does.
template <int kThreads, class Tile>
__device__ __forceinline__ void copy_keys(const Tile& tile, const CudaDecode& d, const View& cache, int batch, int kv_head,
                                          int64_t width, int first, int end) {
  using T = typename Tile::T;
  const T* head = static_cast<const T*>(cache.data) + kv_head * cache.head;
  const bool aligned = ((reinterpret_cast<uintptr_t>(head) | static_cast<uintptr_t>(cache.row | cache.batch) * sizeof(T)) & 15) == 0;
#pragma unroll 1
  for (int i = threadIdx.x; i < Tile::kRows * Tile::kChunks; i += kThreads) {
    const int row = i / Tile::kChunks, column = i % Tile::kChunks * kChunk<T>;
    const int present = first + row < end ? min(max(static_cast<int>(width) - column, 0), kChunk<T>) : 0;
    const T* from = present ? head + cache_row(d.paging, d.pages, cache, batch, first + row) + column : head;
    copy_chunk(tile.at(row, column), from, present, aligned);
  }
}

template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1) decode_split_kernel(const __grid_constant__ CudaDecode d) {
  using T = typename Shape::T;
  constexpr int kKeys = Shape::kKeys, kColumns = Shape::kColumns, kStages = Shape::kStages;
  const int split = blockIdx.x % static_cast<int>(d.splits), unit = blockIdx.x / static_cast<int>(d.splits);
  const int batch = unit / static_cast<int>(d.heads_kv), kv_head = unit % static_cast<int>(d.heads_kv);
  const int tokens = static_cast<int>(d.seqlen_q), group = static_cast<int>(d.heads_q / d.heads_kv);
  const int row0 = blockIdx.y * kRows, warp = warp_index() / Shape::kParts, part = warp_index() % Shape::kParts;
  const int g = lane_index() / 4, t = lane_index() % 4;
  const int length = static_cast<int>(clamped(d.key_lengths[batch] + d.appended, 0, d.seqlen_k));

  SharedMemory shared;
  const auto query_tile = shared.tile<typename Shape::QueryTile>();
  const auto key_tile = [&](int stage) { return typename Shape::KeyTile{shared.next + stage * Shape::kStageBytes}; };
  const auto value_tile = [&](int stage) { return typename Shape::KeyTile{key_tile(stage).base + Shape::KeyTile::kBytes}; };

  const int left = static_cast<int>(d.left), first = max(length - tokens - left, 0);
  const int share = divide_up(divide_up(length - first, kKeys), static_cast<int>(d.splits)) * kKeys;
  const int begin = first + split * share, end = min(begin + share, length), count = divide_up(max(end - begin, 0), kKeys);
  auto copy_block = [&](int block) {
    if (block < count) {
      const int stage = block % kStages, key0 = begin + block * kKeys;
      copy_keys<Shape::kThreads>(key_tile(stage), d, d.key, batch, kv_head, d.head_dim, key0, end);
      copy_keys<Shape::kThreads>(value_tile(stage), d, d.value, batch, kv_head, d.head_dim_v, key0, end);
    }
    commit_copies();
  };
  for (int i = threadIdx.x; i < kRows * Shape::QueryTile::kChunks; i += Shape::kThreads) {
    const int m = i / Shape::QueryTile::kChunks, column = i % Shape::QueryTile::kChunks * kChunk<T>, row = row0 + m;
    const bool there = row < group * tokens;
    const auto query = rows_of<const T>(d.query, batch, kv_head * group + (there ? row / tokens : 0), 0, d.head_dim);
    const int present = there ? min(max(query.width - column, 0), kChunk<T>) : 0;
    copy_chunk(query_tile.at(m, column), query.data + (present ? row % tokens * query.stride + column : 0), present, query.aligned);
  }
  copy_block(0);
#pragma unroll
  for (int i = 1; i < kStages; ++i) copy_block(i);

  // A lane's rows: g and g + 8.
  int position[2];
  float slope[2];
  const float* bias[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = row0 + g + 8 * r, head = kv_head * group + min(row / tokens, group - 1);
    position[r] = row < group * tokens ? length - tokens + row % tokens : -(1 << 30);  // sees nothing
    slope[r] = d.alibi_slopes ? d.alibi_slopes[batch * d.alibi_batch + head * d.alibi_head] * kLog2E : 0.f;
    bias[r] = d.distance_bias ? d.distance_bias + head * d.distance_head + d.distance_offset : nullptr;
  }
  const float cap = d.softcap * kLog2E, scale = d.softcap != 0.f ? d.scale / d.softcap : d.scale * kLog2E;

  Sums<1, kColumns> out;
  out.clear();
  Softmax<1, kColumns> softmax;
  softmax.start(-XF_INFINITY);
  for (int block = 0; block < count; ++block) {
    const int stage = block % kStages, key0 = begin + block * kKeys + 16 * warp;
    wait_for_copies<kStages - 1>();
    __syncthreads();
    Sums<1, 16> scores;
    scores.clear();
    add_product(scores, query_tile, 0, typename Shape::WarpTile{key_tile(stage).base + warp * Shape::WarpTile::kBytes});
    scores.for_each([&](float& s, int row, int column) {
      const int r = row / 8, key = key0 + column, distance = key - position[r];
      if (key >= end || distance > 0 || distance < -left) {
        s = -XF_INFINITY;
        return;
      }
      s = cap != 0.f ? tanh_of(s * scale) * cap : s * scale;
      s += slope[r] * static_cast<float>(distance);
      if (bias[r]) s += bias[r][distance] * kLog2E;
    });
    softmax.weigh(scores, out, 1.f);
    add_weighted_rows(out, scores, typename Shape::WarpTile{value_tile(stage).base + warp * Shape::WarpTile::kBytes}, part * kColumns);
    __syncthreads();
    copy_block(block + kStages);
  }
  wait_for_copies<0>();
  __syncthreads();  // nobody reads the tiles any more: [warp of keys][row][2 + width] numbers

  const uint32_t merge = query_tile.base;
  constexpr int kPitch = Shape::kWidth + 2;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float sum = row_sum(softmax.sum[0][r]);
    const uint32_t at = merge + 4 * (warp * kRows + g + 8 * r) * kPitch;
    if (t == 0 && part == 0) {
      store_shared(at, __float_as_uint(softmax.max[0][r]));
      store_shared(at + 4, __float_as_uint(sum));
    }
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        store_shared(at + 4 * (2 + part * kColumns + 8 * j + 2 * t + e), __float_as_uint(out.of[0][j][2 * r + e]));
  }
  __syncthreads();
  for (int m = warp_index(); m < kRows && row0 + m < group * tokens; m += Shape::kWarps) {
    auto number = [&](int w, int i) { return __uint_as_float(load_shared(merge + 4 * ((w * kRows + m) * kPitch + i))); };
    float most = -XF_INFINITY, sum = 0.f, weights[Shape::kKeyWarps];
#pragma unroll
    for (int w = 0; w < Shape::kKeyWarps; ++w) most = fmaxf(most, number(w, 0));
#pragma unroll
    for (int w = 0; w < Shape::kKeyWarps; ++w) {
      weights[w] = exp2_fast(number(w, 0) - (most == -XF_INFINITY ? 0.f : most));
      sum += number(w, 1) * weights[w];
    }
    const int row = row0 + m, head = kv_head * group + row / tokens;
    const int64_t rows = d.batch * d.heads_q * tokens;
    const int64_t place = split * rows + (static_cast<int64_t>(batch) * d.heads_q + head) * tokens + row % tokens;
    if (lane_index() == 0) {
      d.partial_max[place] = most;
      d.partial_sum[place] = sum;
    }
    for (int column = lane_index(); column < d.head_dim_v; column += 32) {
      float x = 0.f;
#pragma unroll
      for (int w = 0; w < Shape::kKeyWarps; ++w) x += number(w, 2 + column) * weights[w];
      d.partial_out[place * d.head_dim_v + column] = x;
    }
  }
}

constexpr int kMergeWarps = 4;

// A warp owns one row of (batch, head, token): the splits in the order of their keys, then the sink.
template <class T>
__global__ void __launch_bounds__(32 * kMergeWarps) decode_merge_kernel(const __grid_constant__ CudaDecode d) {
  const int64_t tokens = d.seqlen_q, rows = d.batch * d.heads_q * tokens;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kMergeWarps + warp_index();
  if (row >= rows) return;
  const int64_t token = row % tokens, head = row / tokens % d.heads_q, batch = row / tokens / d.heads_q;
  const float sink = d.sinks ? d.sinks[head] * kLog2E : -XF_INFINITY;
  float most = sink;
  for (int64_t split = 0; split < d.splits; ++split) most = fmaxf(most, d.partial_max[split * rows + row]);
  const float finite = most == -XF_INFINITY ? 0.f : most;
  float sum = exp2_fast(sink - finite);
  for (int64_t split = 0; split < d.splits; ++split)
    sum += d.partial_sum[split * rows + row] * exp2_fast(d.partial_max[split * rows + row] - finite);
  const float divisor = sum == 0.f ? 1.f : sum;
  if (lane_index() == 0) d.lse[batch * d.lse_batch + head * d.lse_head + token] = sum == 0.f ? -XF_INFINITY : most * kLn2 + logf(divisor);
  T* out = static_cast<T*>(d.out.data) + batch * d.out.batch + head * d.out.head + token * d.out.row;
  for (int64_t column = lane_index(); column < d.head_dim_v; column += 32) {
    float x = 0.f;
    for (int64_t split = 0; split < d.splits; ++split)
      x += d.partial_out[(split * rows + row) * d.head_dim_v + column] * exp2_fast(d.partial_max[split * rows + row] - finite);
    assign(out[column], x / divisor);
  }
}

// A warp owns one new token of one KV head; a token past the capacity is not written.
template <class T>
__global__ void __launch_bounds__(32 * kMergeWarps) kv_cache_append_kernel(const __grid_constant__ CudaCacheAppend a) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kMergeWarps + warp_index();
  if (row >= a.batch * a.heads * a.tokens) return;
  const int64_t token = row % a.tokens, head = row / a.tokens % a.heads, batch = row / a.tokens / a.heads;
  const int64_t place = a.lengths[batch] + token;
  if (place < 0 || place >= a.capacity) return;
  auto copy = [&](const View& cache, const View& fresh, int64_t width) {
    const T* from = static_cast<const T*>(fresh.data) + batch * fresh.batch + head * fresh.head + token * fresh.row;
    T* to = static_cast<T*>(cache.data) + head * cache.head +
            cache_row(a.paging, a.pages, cache, static_cast<int>(batch), static_cast<int>(place));
    for (int64_t i = lane_index(); i < width; i += 32) to[i] = from[i];
  };
  copy(a.key_cache, a.new_key, a.head_dim);
  copy(a.value_cache, a.new_value, a.head_dim_v);
}

template <class Shape>
cudaError_t run(const CudaDecode& d, void* stream) {
  const int64_t rows = d.batch * d.heads_q * d.seqlen_q;
  const dim3 grid(static_cast<unsigned>(d.splits * d.batch * d.heads_kv), static_cast<unsigned>(decode_row_blocks(d)));
  const cudaError_t error = launch(decode_split_kernel<Shape>, grid, dim3(Shape::kThreads), Shape::kSharedBytes, stream, d);
  if (error != cudaSuccess) return error;
  const dim3 merge_grid(static_cast<unsigned>((rows + kMergeWarps - 1) / kMergeWarps));
  return launch(decode_merge_kernel<typename Shape::T>, merge_grid, dim3(32 * kMergeWarps), 0, stream, d);
}

template <class T>
cudaError_t run_element(const CudaDecode& d, void* stream) {
  const int64_t width = d.head_dim > d.head_dim_v ? d.head_dim : d.head_dim_v;
  if constexpr (sizeof(T) == 4) {
    if (width <= 64) return run<Shape<T, 64, 4, 2>>(d, stream);
    if (width <= 128) return run<Shape<T, 128, 2, 2>>(d, stream);
    return run<Shape<T, 256, 4, 1, 2>>(d, stream);
  } else {
    if (width <= 64) return run<Shape<T, 64, 4, 3>>(d, stream);
    if (width <= 128) return run<Shape<T, 128, 4, 2>>(d, stream);
    return run<Shape<T, 256, 2, 2>>(d, stream);
  }
}

}  // namespace

int64_t decode_row_blocks(const CudaDecode& d) { return (d.heads_q / d.heads_kv * d.seqlen_q + kRows - 1) / kRows; }

int decode_attention_cuda(const CudaDecode& d, void* stream) {
  switch (d.element) {
    case Element::float32: return run_element<float>(d, stream);
    case Element::bfloat16: return run_element<bf16>(d, stream);
    case Element::float16: return run_element<half>(d, stream);
    default: return cudaErrorInvalidValue;
  }
}

int kv_cache_append_cuda(const CudaCacheAppend& a, void* stream) {
  const int64_t rows = a.batch * a.heads * a.tokens;
  if (!rows) return cudaSuccess;
  const auto kernel = a.element_bytes == 4 ? kv_cache_append_kernel<uint32_t> : kv_cache_append_kernel<uint16_t>;
  return launch(kernel, dim3(static_cast<unsigned>((rows + kMergeWarps - 1) / kMergeWarps)), dim3(32 * kMergeWarps), 0, stream, a);
}

}  // namespace xformer_fast
