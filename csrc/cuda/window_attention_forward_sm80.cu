// Windowed attention, forward: softmax(Q·Kᵀ factor + biases)·V inside each window of a map; see window_tiles.cuh.
//
// A block owns a head and a range of groups of windows, a warp 16 tokens of a tile. Few tokens a window: a tile holds several windows
// whole, which do not see each other. Many: the softmax runs over tiles of keys.
//
// NOTES
//   No GPU has run it: tests/cuda_emulation has, and it is compiled for sm_80, sm_89 and sm_90a (no spills in half precision).
#include "window_tiles.cuh"

namespace xformer_fast {
namespace {

template <class Shape>
constexpr int kForwardBytes = 3 * Shape::Rows::kBytes + 2 * Shape::kTokenBytes;

template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1) window_attention_forward_kernel(const __grid_constant__ CudaWindowAttention a) {
  using T = typename Shape::T;
  constexpr int kRows = Shape::kRows, kThreads = Shape::kThreads;
  const int shares = static_cast<int>(a.shares), head = blockIdx.x / shares, share = blockIdx.x % shares;
  const int tiles = divide_up(static_cast<int>(a.together * a.tokens), kRows), own = 16 * warp_index(), g = lane_index() / 4;

  SharedMemory shared;
  auto query_tile = shared.tile<typename Shape::Rows>(), key_tile = shared.tile<typename Shape::Rows>();
  auto value_tile = shared.tile<typename Shape::Rows>();
  const TokenTile queries{shared.next}, keys{shared.next + Shape::kTokenBytes};
  const MapRows<const T> query(a.query, head, a.head_dim), key(a.key, head, a.head_dim), value(a.value, head, a.head_dim_v);
  const MapRows<T> results(a.out, head, a.head_dim_v);
  const WindowScores terms(a, head);

  for (int64_t group = share * a.groups_of_share; group < (share + 1) * a.groups_of_share; ++group) {
    const int64_t window0 = group * a.together;
    if (window0 >= a.windows) break;
    for (int query_block = 0; query_block < tiles; ++query_block) {
      Sums<1, Shape::kWidth> out;
      out.clear();
      Softmax<1, Shape::kWidth> softmax;
      softmax.start(-XF_INFINITY);
      for (int key_block = 0; key_block < tiles; ++key_block) {
        forget(query_tile.base), forget(key_tile.base), forget(value_tile.base);
        __syncthreads();  // nobody reads the last tiles any more
        if (key_block == 0) queries.fill<kRows, kThreads>(a, window0, query_block * kRows);
        keys.fill<kRows, kThreads>(a, window0, key_block * kRows);
        __syncthreads();
        if (key_block == 0) copy_tokens<kThreads>(query_tile, query, queries);
        copy_tokens<kThreads>(key_tile, key, keys);
        copy_tokens<kThreads>(value_tile, value, keys);
        commit_copies();
        wait_for_copies<0>();
        __syncthreads();
        if (terms.cosine) {
          if (key_block == 0) queries.set_inverses<kThreads>(query_tile);
          keys.set_inverses<kThreads>(key_tile);
          __syncthreads();
        }
        Sums<1, kRows> scores;
        scores.clear();
        add_product(scores, query_tile, own, key_tile);
        const TokenFacts low(queries, own + g, terms), high(queries, own + g + 8, terms);
        scores.for_each([&](float& s, int row, int column) {
          s = window_score(s, row < 8 ? low : high, TokenFacts(keys, column, terms), terms);
        });
        softmax.weigh(scores, out, 1.f);
        add_weighted_rows(out, scores, value_tile, 0);
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float sum = row_sum(softmax.sum[0][r]), inverse = sum == 0.f ? 0.f : 1.f / sum;
#pragma unroll
        for (int j = 0; j < Shape::kWidth / 8; ++j)
#pragma unroll
          for (int e = 2 * r; e < 2 * r + 2; ++e) out.of[0][j][e] *= inverse;
      }
      store_tokens(out, results, queries, own);
    }
  }
}

}  // namespace

int64_t window_tile_rows(Element element, int64_t width) {
  return with_window_shape(element, width, [](auto shape) { return static_cast<int64_t>(shape.kRows); });
}

int window_attention_forward_cuda(const CudaWindowAttention& a, void* stream) {
  return with_window_shape(a.element, a.head_dim > a.head_dim_v ? a.head_dim : a.head_dim_v, [&](auto shape) {
    using Shape = decltype(shape);
    return launch(window_attention_forward_kernel<Shape>, dim3(static_cast<unsigned>(a.heads * a.shares)), dim3(Shape::kThreads),
                  kForwardBytes<Shape>, stream, a);
  });
}

}  // namespace xformer_fast
