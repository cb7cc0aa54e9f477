// Windowed attention, backward: the weights are computed again from queries and keys; see window_tiles.cuh.
//
//   delta_i = Σ_j P_ij (dO_i·v_j),   dS = P (dO·Vᵀ - delta),   dV = Pᵀ·dO,   dQ = factor dS·K,   dK = factor dSᵀ·Q,   dbias = Σ dS
//   cosine attention: with q̂ = q / |q| the gradient of q is (h - (h·q̂) q̂) / |q|, h = factor Σ_j dS_ij k̂_j, and h·q̂ = Σ_j dS_ij s_ij
//
// A block owns a head and a range of groups of windows, a warp 16 tokens of a tile. Of each group it first walks tiles of queries:
// once over the keys for the softmax's sum and delta, once more for dS. Then it walks tiles of keys, scores transposed, for dK and dV
// (one after the other where registers do not hold both). A group of one tile, the usual case, is read once. Σ dS over its windows is
// a part of the gradient of the biases, in memory of its own: window_pairs_kernel adds the parts in order, and sums the table's
// gradient from them. No atomics.
//
// NOTES
//   No GPU has run it: tests/cuda_emulation has, and it is compiled for sm_80, sm_89 and sm_90a (no spills in half precision).
#include "attention_gradients.cuh"
#include "window_tiles.cuh"

namespace xformer_fast {
namespace {

template <class Shape>
constexpr int kBackwardBytes = 4 * Shape::Rows::kBytes + 2 * Shape::kTokenBytes + 4 * Shape::kWarps;

// The tiles of one block, and what is in them.
template <class Shape>
struct WindowGradients {
  using T = typename Shape::T;
  static constexpr int kRows = Shape::kRows, kThreads = Shape::kThreads;
  using Scores = Sums<1, kRows>;
  using Channels = Sums<1, Shape::kWidth>;

  const CudaWindowAttention& a;
  const CudaWindowAttentionGrad& grad;
  typename Shape::Rows query_tile, grad_out_tile, key_tile, value_tile;
  TokenTile queries, keys;
  uint32_t numbers;  // lse and delta of every query of a group, and a float a warp
  MapRows<const T> query, key, value, grad_out;
  WindowScores terms;
  int head, share, own, tiles;

  __device__ __forceinline__ WindowGradients(const CudaWindowAttention& a, const CudaWindowAttentionGrad& grad, int head, int share)
      : a(a), grad(grad), query(a.query, head, a.head_dim), key(a.key, head, a.head_dim), value(a.value, head, a.head_dim_v),
        grad_out(grad.grad_out, head, a.head_dim_v), terms(a, head), head(head), share(share), own(16 * warp_index()),
        tiles(divide_up(static_cast<int>(a.together * a.tokens), kRows)) {
    SharedMemory shared;
    query_tile = shared.tile<typename Shape::Rows>(), grad_out_tile = shared.tile<typename Shape::Rows>();
    key_tile = shared.tile<typename Shape::Rows>(), value_tile = shared.tile<typename Shape::Rows>();
    queries = {shared.next}, keys = {shared.next + Shape::kTokenBytes};
    numbers = shared.next + 2 * Shape::kTokenBytes;
  }
  __device__ __forceinline__ uint32_t lse_at(int query) const { return numbers + 4 * (Shape::kWarps + query); }
  __device__ __forceinline__ uint32_t delta_at(int query) const { return lse_at(query) + 4 * tiles * kRows; }

  // Brings a tile of queries, of keys, or both (-1: keep what is there).
  __device__ __forceinline__ void copy(int64_t window0, int query_block, int key_block) const {
    __syncthreads();  // nobody reads the last tiles any more
    if (query_block >= 0) queries.fill<kRows, kThreads>(a, window0, query_block * kRows);
    if (key_block >= 0) keys.fill<kRows, kThreads>(a, window0, key_block * kRows);
    __syncthreads();
    if (query_block >= 0) {
      copy_tokens<kThreads>(query_tile, query, queries);
      copy_tokens<kThreads>(grad_out_tile, grad_out, queries);
    }
    if (key_block >= 0) {
      copy_tokens<kThreads>(key_tile, key, keys);
      copy_tokens<kThreads>(value_tile, value, keys);
    }
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();
    if (!terms.cosine) return;
    if (query_block >= 0) queries.set_inverses<kThreads>(query_tile);
    if (key_block >= 0) keys.set_inverses<kThreads>(key_tile);
    __syncthreads();
  }

  // Scores in units of log2 and dO·v, rows of queries and columns of keys, or the other way round.
  __device__ __forceinline__ void products(Scores& scores, Scores& grads) const {
    scores.clear();
    grads.clear();
    add_product(scores, query_tile, own, key_tile);
    add_product(grads, grad_out_tile, own, value_tile);
    const TokenFacts low = row_facts(queries, 0), high = row_facts(queries, 8);
    scores.for_each([&](float& s, int row, int column) {
      s = window_score(s, row < 8 ? low : high, TokenFacts(keys, column, terms), terms);
    });
  }
  template <bool kGrads>
  __device__ __forceinline__ void products_transposed(Scores& scores, Scores& grads) const {
    scores.clear();
    grads.clear();
    add_product(scores, key_tile, own, query_tile);
    if (kGrads) add_product(grads, value_tile, own, grad_out_tile);
    const TokenFacts low = row_facts(keys, 0), high = row_facts(keys, 8);
    scores.for_each([&](float& s, int row, int column) {
      s = window_score(s, TokenFacts(queries, column, terms), row < 8 ? low : high, terms);
    });
  }
  __device__ __forceinline__ TokenFacts row_facts(const TokenTile& tokens, int r) const {
    return TokenFacts(tokens, own + lane_index() / 4 + r, terms);
  }
  // What a score adds to h·q̂: without the biases.
  __device__ __forceinline__ float cosine_part(float s, const TokenFacts& query, const TokenFacts& key) const {
    s *= kLn2;
    if (terms.table) s -= terms.table[query.code - key.code];
    if (terms.bias) s -= terms.bias[query.token * terms.tokens + key.token];
    return s;
  }

  // Turns sums of dS (1 / |other|) other into the gradient of the rows of `tile`. along: of each row, Σ dS s.
  __device__ __forceinline__ void finish(Channels& sums, const typename Shape::Rows& tile, const TokenTile& tokens, const float (&along)[2]) const {
    const float parallel[2] = {row_sum(along[0]), row_sum(along[1])};
    sums.for_each([&](float& x, int row, int column) {
      x *= terms.factor;
      if (!terms.cosine) return;
      const float inverse = tokens.inverse(own + row);
      x = inverse * (x - parallel[row / 8] * inverse * element(tile, own + row, column));
    });
  }
  __device__ __forceinline__ static float element(const typename Shape::Rows& tile, int row, int column) {
    if constexpr (sizeof(T) == 4) return __uint_as_float(load_shared(tile.at(row, column)));
    else {
      const float2 two = unpaired(load_shared(tile.at(row, column & ~1)), T{});
      return column & 1 ? two.y : two.x;
    }
  }

  // lse (in units of log2) and delta of a tile's queries.
  __device__ __forceinline__ void sum_rows(int64_t window0, int query_block) const {
    float most[2] = {-XF_INFINITY, -XF_INFINITY}, sum[2] = {0.f, 0.f}, dot[2] = {0.f, 0.f};
    for (int key_block = 0; key_block < tiles; ++key_block) {
      copy(window0, key_block ? -1 : query_block, key_block);
      Scores scores, grads;
      products(scores, grads);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float tile_most = -XF_INFINITY;
#pragma unroll
        for (int j = 0; j < kRows / 8; ++j) tile_most = fmaxf(tile_most, fmaxf(scores.of[0][j][2 * r], scores.of[0][j][2 * r + 1]));
        const float new_most = fmaxf(most[r], row_max(tile_most)), finite = new_most == -XF_INFINITY ? 0.f : new_most;
        const float correction = exp2_fast(most[r] - finite);
        most[r] = new_most;
        sum[r] *= correction;
        dot[r] *= correction;
#pragma unroll
        for (int j = 0; j < kRows / 8; ++j)
#pragma unroll
          for (int e = 2 * r; e < 2 * r + 2; ++e) {
            const float weight = exp2_fast(scores.of[0][j][e] - finite);
            sum[r] += weight;
            dot[r] += weight * grads.of[0][j][e];
          }
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float total = row_sum(sum[r]), delta = row_sum(dot[r]);
      const int at = query_block * kRows + own + lane_index() / 4 + 8 * r;
      if (lane_index() % 4) continue;
      store_shared(lse_at(at), __float_as_uint(total == 0.f ? XF_INFINITY : most[r] + log2f(total)));
      store_shared(delta_at(at), __float_as_uint(total == 0.f ? 0.f : delta / total));
    }
    __syncwarp();
  }

  // dQ of a tile's queries; returns what they add to the gradient of the factor.
  __device__ __forceinline__ float query_gradient(int64_t window0, int query_block) const {
    Channels sums;
    sums.clear();
    float along[2] = {0.f, 0.f}, lse[2], delta[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int at = query_block * kRows + own + lane_index() / 4 + 8 * r;
      lse[r] = __uint_as_float(load_shared(lse_at(at)));
      delta[r] = __uint_as_float(load_shared(delta_at(at)));
    }
    const int64_t pairs = terms.tokens * terms.tokens;
    float* shares = grad.pair_shares ? grad.pair_shares + (static_cast<int64_t>(head) * a.shares + share) * a.together * pairs : nullptr;
    for (int key_block = 0; key_block < tiles; ++key_block) {
      if (tiles > 1) copy(window0, -1, key_block);
      Scores scores, grads;
      products(scores, grads);
      const TokenFacts low = row_facts(queries, 0), high = row_facts(queries, 8);
#pragma unroll
      for (int j = 0; j < kRows / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int r = e / 2, column = 8 * j + 2 * (lane_index() % 4) + e % 2;
          const TokenFacts facts = r ? high : low, other(keys, column, terms);
          const float s = scores.of[0][j][e];
          const float ds = exp2_fast(s - lse[r]) * (grads.of[0][j][e] - delta[r]);
          if (facts.tag == other.tag && facts.tag >= 0) {
            if (shares) shares[(facts.tag >> kMaxAxes) * pairs + facts.token * terms.tokens + other.token] += ds;
            if (terms.cosine) along[r] += ds * cosine_part(s, facts, other);
          }
          grads.of[0][j][e] = ds * other.inverse;
        }
      add_weighted_rows(sums, grads, key_tile, 0);
    }
    finish(sums, query_tile, queries, along);
    store_tokens(sums, MapRows<T>(grad.grad_query, head, a.head_dim), queries, own);
    return along[0] + along[1];
  }

  // dK, dV or both, of a tile's keys.
  template <bool kKey, bool kValue>
  __device__ __forceinline__ void key_gradient(int64_t window0, int key_block) const {
    Channels grad_key, grad_value;
    grad_key.clear();
    grad_value.clear();
    float along[2] = {0.f, 0.f};
    for (int query_block = 0; query_block < tiles; ++query_block) {
      if (tiles > 1) copy(window0, query_block, query_block ? -1 : key_block);
      Scores weights, grads;
      products_transposed<kKey>(weights, grads);
      const TokenFacts low = row_facts(keys, 0), high = row_facts(keys, 8);
#pragma unroll
      for (int j = 0; j < kRows / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int r = e / 2, column = 8 * j + 2 * (lane_index() % 4) + e % 2, at = query_block * kRows + column;
          const float s = weights.of[0][j][e], weight = exp2_fast(s - __uint_as_float(load_shared(lse_at(at))));
          weights.of[0][j][e] = weight;
          if (!kKey) continue;
          const TokenFacts facts = r ? high : low, other(queries, column, terms);
          const float ds = weight * (grads.of[0][j][e] - __uint_as_float(load_shared(delta_at(at))));
          if (terms.cosine && facts.tag == other.tag && facts.tag >= 0) along[r] += ds * cosine_part(s, other, facts);
          grads.of[0][j][e] = ds * other.inverse;
        }
      if (kValue) add_weighted_rows(grad_value, weights, grad_out_tile, 0);
      if (kKey) add_weighted_rows(grad_key, grads, query_tile, 0);
    }
    if (kKey) {
      finish(grad_key, key_tile, keys, along);
      store_tokens(grad_key, MapRows<T>(grad.grad_key, head, a.head_dim), keys, own);
    }
    if (kValue) store_tokens(grad_value, MapRows<T>(grad.grad_value, head, a.head_dim_v), keys, own);
  }
};

template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    window_attention_backward_kernel(const __grid_constant__ CudaWindowAttention a, const __grid_constant__ CudaWindowAttentionGrad grad) {
  const int shares = static_cast<int>(a.shares);
  WindowGradients<Shape> gradients(a, grad, blockIdx.x / shares, blockIdx.x % shares);
  float factor_gradient = 0.f;
  for (int64_t group = 0; group < a.groups_of_share; ++group) {
    const int64_t window0 = (gradients.share * a.groups_of_share + group) * a.together;
    if (window0 >= a.windows) break;
    forget(gradients.query_tile.base), forget(gradients.key_tile.base);
    forget(gradients.grad_out_tile.base), forget(gradients.value_tile.base);
    for (int block = 0; block < gradients.tiles; ++block) {
      gradients.sum_rows(window0, block);
      factor_gradient += gradients.query_gradient(window0, block);
    }
    __syncthreads();  // every query's numbers are there
    for (int block = 0; block < gradients.tiles; ++block) {
      if constexpr (Shape::kAtOnce) {
        gradients.template key_gradient<true, true>(window0, block);
      } else {
        gradients.template key_gradient<true, false>(window0, block);
        gradients.template key_gradient<false, true>(window0, block);
      }
    }
  }
  if (grad.scale_shares) {
    const float sum = block_sum<Shape::kWarps>(factor_gradient, gradients.numbers);
    if (threadIdx.x == 0) grad.scale_shares[blockIdx.x] = sum / gradients.terms.factor;
  }
}

constexpr int kPairThreads = 128;

__global__ void __launch_bounds__(kPairThreads) window_pairs_kernel(const __grid_constant__ CudaWindowPairs p) {
  const int64_t size = p.tokens * p.tokens, at = static_cast<int64_t>(blockIdx.x) * kPairThreads + threadIdx.x, head = blockIdx.y;
  if (at >= size) return;
  float sum = 0.f;
  for (int64_t share = 0; share < p.shares; ++share) sum += p.pair_shares[(head * p.shares + share) * size + at];
  p.pairs[head * size + at] = sum;
}

// A thread owns a row of the table and a head: all pairs of a window that are that far apart.
__global__ void __launch_bounds__(kPairThreads) window_table_kernel(const __grid_constant__ CudaWindowPairs p) {
  const int row = blockIdx.x * kPairThreads + threadIdx.x;
  const int64_t head = blockIdx.y;
  if (row >= p.rows) return;
  int apart[kMaxAxes], rest = row;
#pragma unroll
  for (int x = kMaxAxes - 1; x >= 0; --x) {
    const int places = static_cast<int>(2 * p.window[x] - 1);
    apart[x] = rest % places - static_cast<int>(p.window[x] - 1);
    rest /= places;
  }
  float sum = 0.f;
  for (int query = 0; query < p.tokens; ++query) {
    int left = query, key = 0, stride = 1;
    bool inside = true;
#pragma unroll
    for (int x = kMaxAxes - 1; x >= 0; --x) {
      const int wide = static_cast<int>(p.window[x]), place = left % wide - apart[x];
      inside = inside && place >= 0 && place < wide;
      key += place * stride;
      stride *= wide;
      left /= wide;
    }
    if (inside) sum += p.pairs[(head * p.tokens + query) * p.tokens + key];
  }
  p.table[row * p.heads + head] = sum;
}

}  // namespace

int window_attention_backward_cuda(const CudaWindowAttention& a, const CudaWindowAttentionGrad& grad, void* stream) {
  return with_window_shape(a.element, a.head_dim > a.head_dim_v ? a.head_dim : a.head_dim_v, [&](auto shape) {
    using Shape = decltype(shape);
    const int64_t tokens = (a.together * a.tokens + Shape::kRows - 1) / Shape::kRows * Shape::kRows;
    return launch(window_attention_backward_kernel<Shape>, dim3(static_cast<unsigned>(a.heads * a.shares)), dim3(Shape::kThreads),
                  kBackwardBytes<Shape> + 2 * 4 * tokens, stream, a, grad);
  });
}

int window_pairs_cuda(const CudaWindowPairs& p, void* stream) {
  const auto blocks = [&](int64_t n) { return dim3(static_cast<unsigned>((n + kPairThreads - 1) / kPairThreads), static_cast<unsigned>(p.heads)); };
  const cudaError_t error = launch(window_pairs_kernel, blocks(p.tokens * p.tokens), dim3(kPairThreads), 0, stream, p);
  if (error != cudaSuccess || !p.table) return error;
  return launch(window_table_kernel, blocks(p.rows), dim3(kPairThreads), 0, stream, p);
}

}  // namespace xformer_fast
