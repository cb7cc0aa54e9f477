// Linear attention: o_i = scale φ(q_i)·S_i / (scale φ(q_i)·z_i + eps),  S_i = Σ_j decay^(p_i - j) φ(k_j) v_jᵀ + decay^(p_i + 1) S_0,
// z_i likewise without v; j <= p_i if causal. Forward and backward are walks of one form over chunks of positions:
//
//   out_a = Σ_b w_ab (left_a·depth_b [+ biases]) columns_b
//     forward, out     left φ(q)  depth φ(k)  columns v                      (kValues; the weights' sum is the denominator)
//     backward, dv     left φ(k)  depth φ(q)  columns g   in reverse         (kValues)
//     backward, dφ(q)  left g     depth v     columns φ(k)                   (kFeatures; row_grad_i is added to g_i·v_j)
//     backward, dφ(k)  left v     depth g     columns φ(q)   in reverse      (kFeatures)     g_i = scale dO_i / denominator_i
//
// A block owns a (batch, head), a segment of its chunks, and kColumns of `columns`. It carries the state Σ w columnsᵀ depth in
// registers, float32; within a chunk scores are left·depthᵀ, masked by position. The state of a chunk that starts at position p is
// taken at time m = clamp(p, 0, limit): it stands still before the first key and after the last, so that queries outside the keys,
// key lengths and the final state need no case of their own. φ is applied to tiles in shared memory.
// Where heads are few a sequence is cut into segments: a kState walk sums what each one adds, linear_prefix_kernel runs over them,
// and every segment then starts from its own; not causal, the same two give the whole state. The cut depends on the shape alone.
//
// Not here: the gradient of the decay, and the "softmax" map, whose rows the blocks of columns do not see whole.
//
// NOTES
//   No GPU has run it: tests/cuda_emulation has, and it is compiled for sm_80, sm_89 and sm_90a (no spills in half precision).
#include <type_traits>

#include "attention_scores.cuh"
#include "linear_attention.h"

namespace xformer_fast {
namespace {

template <class T_, int kDepth_, int kChunk_, int kColumns_>
struct Shape {
  using T = T_;
  static constexpr int kDepth = kDepth_, kChunk = kChunk_, kColumns = kColumns_, kWarps = 4, kThreads = 32 * kWarps;
  using DepthTile = Tile<T, kChunk, kDepth>;
  using ColumnTile = Tile<T, kChunk, kColumns>;
  using StateTile = Tile<T, kColumns, kDepth>;
  // Warps over the state's rows (columns of `columns`), and parts of its depth; over the chunk's rows, and parts of the columns.
  static constexpr int kStateGroups = kColumns / 16, kStateParts = kWarps / kStateGroups, kStateDepth = kDepth / kStateParts;
  static constexpr int kRowGroups = kChunk / 16, kPartsThere = kWarps / kRowGroups;
  static constexpr int kOutParts = kPartsThere < kColumns / 16 ? kPartsThere : kColumns / 16, kOutColumns = kColumns / kOutParts;
  static constexpr int kSharedBytes =
      2 * DepthTile::kBytes + ColumnTile::kBytes + StateTile::kBytes + 4 * (2 * kChunk + kDepth + kWarps);
  static_assert(kStateGroups <= kWarps && kRowGroups <= kWarps && kColumns <= kDepth);
};

__device__ __forceinline__ float load_float(uint32_t from) { return __uint_as_float(load_shared(from)); }
__device__ __forceinline__ void store_float(uint32_t to, float x) { store_shared(to, __float_as_uint(x)); }

__device__ __forceinline__ float mapped(float x, FeatureMap map) {
  switch (map) {
    case FeatureMap::elu: return x > 0.f ? x + 1.f : exp2_fast(x * kLog2E);
    case FeatureMap::relu: return fmaxf(x, 0.f);
    case FeatureMap::square_relu: return fmaxf(x, 0.f) * fmaxf(x, 0.f);
    case FeatureMap::exp: return exp2_fast(x * kLog2E);
    default: return x;
  }
}
__device__ __forceinline__ float map_derivative(float x, FeatureMap map) {
  switch (map) {
    case FeatureMap::elu: return x > 0.f ? 1.f : exp2_fast(x * kLog2E);
    case FeatureMap::relu: return x > 0.f ? 1.f : 0.f;
    case FeatureMap::square_relu: return 2.f * fmaxf(x, 0.f);
    case FeatureMap::exp: return exp2_fast(x * kLog2E);
    default: return 1.f;
  }
}

// One (batch, head): where its rows are, and the times of its chunks.
struct LinearPlace {
  int batch, head, kv_head, length_q, length_k, limit, shift;
  int64_t first, numbers;  // of packed rows; of the numbers of queries
  float rate;              // log2 of the decay

  __device__ __forceinline__ LinearPlace(const CudaLinear& a, int stream)
      : batch(stream / static_cast<int>(a.heads_q)), head(stream % static_cast<int>(a.heads_q)),
        kv_head(head / static_cast<int>(a.heads_q / a.heads_kv)), length_q(static_cast<int>(a.rows_q)),
        length_k(static_cast<int>(a.rows_k)), first(0), numbers(stream * a.rows_q),
        rate(a.decay ? log2f(a.decay[head]) : 0.f) {
    if (a.cu_seqlens) {
      first = clamped(a.cu_seqlens[batch], 0, a.rows_q);
      length_q = length_k = static_cast<int>(clamped(a.cu_seqlens[batch + 1], first, a.rows_q) - first);
      numbers = head * a.rows_q + first;
    }
    limit = a.key_lengths ? static_cast<int>(clamped(a.key_lengths[batch], 0, length_k)) : length_k;
    shift = length_k - length_q;
  }
  __device__ __forceinline__ int first_chunk(int chunk) const { return -divide_up(max(-shift, 0), chunk); }
  __device__ __forceinline__ int time(int position) const { return min(max(position, 0), limit); }
};

// The rows of an operand in one chunk.
template <class T>
struct ChunkRows {
  const LinearOperand& operand;
  Rows<const T> rows;
  int row0, limit;
  int64_t numbers;

  __device__ __forceinline__ ChunkRows(const CudaLinear& a, const LinearOperand& operand, const LinearPlace& place, int position,
                                       int column)
      : operand(operand),
        rows(rows_of<const T>(operand.view, place.batch, operand.of_keys ? place.kv_head : place.head, place.first, operand.width)),
        row0(operand.of_keys || !a.causal ? position : position - place.shift),
        limit(operand.of_keys ? place.limit : place.length_q), numbers(place.numbers) {
    rows.data += column;
    rows.width -= column;
  }
  __device__ __forceinline__ bool there(int row) const { return row0 + row >= 0 && row0 + row < limit; }
  __device__ __forceinline__ float bias(int row) const {
    if (!there(row)) return 0.f;
    return operand.row_bias ? operand.row_bias[numbers + row0 + row] : 1.f;
  }
  template <int kThreads, class Tile>
  __device__ __forceinline__ void copy(const Tile& tile) const {
    copy_tile<kThreads>(tile, rows, row0, limit);
  }
  // What has arrived, mapped and scaled. Zeros where nothing is stay zeros.
  template <int kThreads, class Tile>
  __device__ __forceinline__ void apply(const Tile& tile, FeatureMap map) const {
    if (!operand.mapped && !operand.row_scale) return;
#pragma unroll 1
    for (int i = threadIdx.x; i < Tile::kRows * Tile::kChunks; i += kThreads) {
      const int row = i / Tile::kChunks, column = i % Tile::kChunks * kChunk<T>;
      if (!there(row) || column >= rows.width) continue;
      const float scale = operand.row_scale ? operand.row_scale[numbers + row0 + row] : 1.f;
      const uint4 bits = load_shared_16(tile.at(row, column));
      Pack<T, kChunk<T>> pack = reinterpret_cast<const Pack<T, kChunk<T>>&>(bits);
#pragma unroll
      for (int e = 0; e < kChunk<T>; ++e) {
        const float x = to_float(pack.values[e]);
        if (column + e < rows.width) assign(pack.values[e], operand.mapped ? mapped(x, map) : x * scale);
      }
      store_shared(tile.at(row, column), reinterpret_cast<const uint4&>(pack));
    }
  }
};

// f(x, column) for the elements column, column + 4 kWord... of a tile's row, from the lane's own place in its row's four on.
template <class Tile, class F>
__device__ __forceinline__ void for_quarter_row(const Tile& tile, int row, F f) {
  using T = typename Tile::T;
  constexpr int kWord = 4 / sizeof(T);
#pragma unroll 1
  for (int column = lane_index() % 4 * kWord; column < Tile::kWidth; column += 4 * kWord) {
    const uint32_t bits = load_shared(tile.at(row, column));
    if constexpr (kWord == 1) {
      f(__uint_as_float(bits), column);
    } else {
      const float2 x = unpaired(bits, T{});
      f(x.x, column);
      f(x.y, column + 1);
    }
  }
}

// total[column] = keep total[column] + Σ_row x[row][column] weight(row), by all threads.
template <int kThreads, class Tile, class Weight>
__device__ __forceinline__ void add_column_sums(uint32_t total, const Tile& x, float keep, Weight weight) {
  using T = typename Tile::T;
  constexpr int kWord = 4 / sizeof(T);
  for (int column = threadIdx.x * kWord; column < Tile::kWidth; column += kThreads * kWord) {
    float sums[kWord] = {};
    for (int row = 0; row < Tile::kRows; ++row) {
      const uint32_t bits = load_shared(x.at(row, column));
      if constexpr (kWord == 1) {
        sums[0] += __uint_as_float(bits) * weight(row);
      } else {
        const float2 pair = unpaired(bits, T{});
        sums[0] += pair.x * weight(row);
        sums[1] += pair.y * weight(row);
      }
    }
#pragma unroll
    for (int i = 0; i < kWord; ++i) {
      const uint32_t at = total + 4 * (column + i);
      store_float(at, keep * load_float(at) + sums[i]);
    }
  }
}

template <class Shape, LinearWalk kWalk>
__global__ void __launch_bounds__(Shape::kThreads, 1) linear_walk_kernel(const __grid_constant__ CudaLinear a) {
  using T = typename Shape::T;
  constexpr int kChunk = Shape::kChunk, kColumns = Shape::kColumns, kThreads = Shape::kThreads;
  constexpr bool kState = kWalk == LinearWalk::kState, kFeatures = kWalk == LinearWalk::kFeatures;
  // A sum over a long sequence may not fit float16: its tile is then divided by a power of two, which changes no digit.
  constexpr bool kScaled = !kState && std::is_same<T, half>::value;
  const int segments = static_cast<int>(a.segments), stream = blockIdx.x / segments, segment = blockIdx.x % segments;
  const int column0 = blockIdx.y * kColumns, warp = warp_index(), g = lane_index() / 4;
  const LinearPlace place(a, stream);

  SharedMemory shared;
  const auto depth_tile = shared.tile<typename Shape::DepthTile>(), left_tile = shared.tile<typename Shape::DepthTile>();
  const auto column_tile = shared.tile<typename Shape::ColumnTile>();
  const auto state_tile = shared.tile<typename Shape::StateTile>();
  const uint32_t left_bias = shared.next, depth_bias = left_bias + 4 * kChunk, total = depth_bias + 4 * kChunk;
  const uint32_t largest = total + 4 * Shape::kDepth;  // number of each warp's part of the state
  const int state_row = warp % Shape::kStateGroups * 16, state_column = warp / Shape::kStateGroups * Shape::kStateDepth;
  const int out_row = warp % Shape::kRowGroups * 16, part = warp / Shape::kRowGroups, out_column = part * Shape::kOutColumns;
  const bool writes = part < Shape::kOutParts;

  // The state's number at (column, depth) in a (.., head_dim, head_dim_v) state, or -1.
  const int features = static_cast<int>(a.head_dim), channels = static_cast<int>(a.head_dim_v);
  auto place_in_state = [&](int column, int depth) {
    const int feature = a.transposed_state ? depth : column, channel = a.transposed_state ? column : depth;
    return feature < features && channel < channels ? feature * channels + channel : -1;
  };
  constexpr int kTotals = kFeatures ? kColumns : Shape::kDepth;
  const int total0 = kFeatures ? column0 : 0;
  Sums<1, Shape::kStateDepth> state;
  state.clear();
  const int64_t slot = a.causal ? blockIdx.x : stream;
  if (a.start_kv) {
    const float* kv = a.start_kv + slot * a.head_dim * a.head_dim_v;
    state.for_each([&](float& x, int row, int column) {
      const int at = place_in_state(column0 + state_row + row, state_column + column);
      if (at >= 0) x = kv[at];
    });
  }
  for (int i = threadIdx.x; i < kTotals; i += kThreads)
    store_float(total + 4 * i, a.start_kv && total0 + i < a.head_dim ? a.start_z[slot * a.head_dim + total0 + i] : 0.f);

  const int start = (a.causal ? place.first_chunk(kChunk) : 0) + segment * static_cast<int>(a.chunks);
  for (int step = 0; step < a.chunks; ++step) {
    const int chunk = start + (a.reverse ? static_cast<int>(a.chunks) - 1 - step : step), position = chunk * kChunk;
    if (position >= max(place.length_k, place.length_q)) continue;  // packed: of a longer sequence
    const int now = place.time(position), later = place.time(position + kChunk);
    const float keep = exp2_fast(place.rate * static_cast<float>(later - now));
    const ChunkRows<T> left(a, a.left, place, position, 0), depth(a, a.depth, place, position, 0);
    const ChunkRows<T> columns(a, a.columns, place, position, column0);
    // From the state to a query, and from a key to the next state.
    auto weight_of = [&](bool of_key, int row) {
      const int age = of_key ? max(later - 1 - (position + row), 0) : position + row + 1 - now;
      return exp2_fast(place.rate * static_cast<float>(age));
    };
    auto left_weight = [&](int row) { return a.decay ? weight_of(a.left.of_keys, row) : 1.f; };
    auto depth_weight = [&](int row) { return !depth.there(row) ? 0.f : a.decay ? weight_of(a.depth.of_keys, row) : 1.f; };

    if constexpr (kScaled) {
      float most = 0.f;
      state.for_each([&](float& x, int, int) { most = fmaxf(most, fabsf(x)); });
      most = warp_max(most);
      if (lane_index() == 0) store_float(largest + 4 * warp, most);
    }
    __syncthreads();  // nobody reads the last chunk's tiles any more
    if (!kState) left.template copy<kThreads>(left_tile);
    if (kState || a.causal) {
      depth.template copy<kThreads>(depth_tile);
      columns.template copy<kThreads>(column_tile);
    }
    commit_copies();
    float factor = 1.f, inverse = 1.f;
    if constexpr (kScaled) {
      float most = 0.f;
#pragma unroll
      for (int i = 0; i < Shape::kWarps; ++i) most = fmaxf(most, load_float(largest + 4 * i));
      if (most > 32768.f) {
        const uint32_t bits = (__float_as_uint(most) & 0x7f800000u) - (14u << 23);
        factor = __uint_as_float(bits), inverse = __uint_as_float((254u << 23) - bits);
      }
    }
    if (!kState) {
#pragma unroll
      for (int j = 0; j < Shape::kStateDepth / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; e += 2)
          store_two(state_tile.at(state_row + g + e / 2 * 8, state_column + 8 * j + 2 * (lane_index() % 4)),
                    state.of[0][j][e] * inverse, state.of[0][j][e + 1] * inverse, T{});
    }
    for (int row = threadIdx.x; row < kChunk; row += kThreads) {
      if (!kState) store_float(left_bias + 4 * row, left.bias(row));
      store_float(depth_bias + 4 * row, depth.bias(row));
    }
    wait_for_copies<0>();
    __syncthreads();
    if (!kState) left.template apply<kThreads>(left_tile, a.map);
    if (kState || a.causal) {
      depth.template apply<kThreads>(depth_tile, a.map);
      columns.template apply<kThreads>(column_tile, a.map);
    }
    __syncthreads();

    if constexpr (!kState) {
      Sums<1, Shape::kOutColumns> out;
      out.clear();
      float sums[2] = {0.f, 0.f};
      if (writes) {
        using Part = Tile<T, Shape::kOutColumns, Shape::kDepth>;
        const float weight[2] = {left_weight(out_row + g), left_weight(out_row + g + 8)};
        add_product(out, left_tile, out_row, Part{state_tile.base + out_column * Part::kBytes / Part::kRows});
        out.for_each([&](float& x, int row, int column) {
          x *= factor;
          if (kFeatures) x += load_float(left_bias + 4 * (out_row + row)) * load_float(total + 4 * (out_column + column));
          x *= weight[row / 8];
        });
        if (!kFeatures && !a.reverse) {
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            for_quarter_row(left_tile, out_row + g + 8 * r, [&](float x, int column) { sums[r] += x * load_float(total + 4 * column); });
            sums[r] *= weight[r];
          }
        }
        if (a.causal) {
          Sums<1, kChunk> scores;
          scores.clear();
          add_product(scores, left_tile, out_row, depth_tile);
          scores.for_each([&](float& s, int row, int column) {
            const int distance = a.reverse ? column - (out_row + row) : out_row + row - column;
            if (kFeatures) s += load_float(left_bias + 4 * (out_row + row)) * load_float(depth_bias + 4 * column);
            if (a.decay) s *= exp2_fast(place.rate * static_cast<float>(max(distance, 0)));
            s = distance >= 0 ? s : 0.f;
            sums[row / 8] += s;
          });
          add_weighted_rows(out, scores, column_tile, out_column);
        }
      }
      __syncthreads();  // nobody reads the left tile any more: it takes the results
      if (writes) {
        const int row0 = left.row0;
        if (!kFeatures && !a.reverse) {
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const int row = out_row + g + 8 * r;
            // Without a key no gradient flows: 1 / eps would be infinite in float16, and infinity times zero is no number.
            const bool alone = a.fresh && (place.limit <= 0 || (a.causal && row0 + row + place.shift < 0));
            const float sum = row_sum(sums[r]), denominator = alone ? 0.f : a.normalize ? a.scale * sum + a.eps : 1.f;
            sums[r] = denominator == 0.f ? 0.f : a.scale / denominator;
            if (part == 0 && blockIdx.y == 0 && lane_index() % 4 == 0 && left.there(row))
              a.denominator[place.numbers + row0 + row] = denominator;
          }
          out.for_each([&](float& x, int row, int) { x *= sums[row / 8]; });
        }
        const int limit = a.left.of_keys ? place.length_k : place.length_q;
        const int own_column = column0 + out_column + 2 * (lane_index() % 4), width = static_cast<int>(a.columns.width);
        if (kFeatures) {
          const auto input = rows_of<const T>(a.derivative_of, place.batch, a.left.of_keys ? place.kv_head : place.head, place.first, 0);
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const int row = out_row + g + 8 * r;
            const T* of_row = input.data + (left.there(row) ? row0 + row : 0) * input.stride + own_column;
            const int there = left.there(row) ? width : 0;
#pragma unroll
            for (int j = 0; j < Shape::kOutColumns / 8; ++j)
#pragma unroll
              for (int e = 0; e < 2; ++e) {
                float& x = out.of[0][j][2 * r + e];
                x = own_column + 8 * j + e < there ? x * map_derivative(to_float(of_row[8 * j + e]), a.map) : 0.f;
              }
          }
        }
        if (a.wide) {
          const auto rows = rows_of<float>(a.out, place.batch, place.head, place.first, width);
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const int row = row0 + out_row + g + 8 * r, there = row >= 0 && row < limit ? width : 0;
            float* of_row = rows.data + row * rows.stride + own_column;
#pragma unroll
            for (int j = 0; j < Shape::kOutColumns / 8; ++j)
#pragma unroll
              for (int e = 0; e < 2; ++e)
                if (own_column + 8 * j + e < there) of_row[8 * j + e] = out.of[0][j][2 * r + e];
          }
        } else {
          auto rows = rows_of<T>(a.out, place.batch, place.head, place.first, a.columns.width);
          const Rows<T> own(rows.data + column0, rows.stride, rows.width - column0);
          store_rows(out, left_tile, out_row, out_column, own, row0, limit);
        }
      }
    }

    if (kState || a.causal) {
      if (a.decay) state.for_each([&](float& x, int, int) { x *= keep; });
      add_outer_product(state, column_tile, state_row, depth_tile, state_column, a.decay != nullptr, depth_weight);
      if constexpr (kFeatures)
        add_column_sums<kThreads>(total, column_tile, keep,
                                  [&](int row) { return load_float(depth_bias + 4 * row) * depth_weight(row); });
      else
        add_column_sums<kThreads>(total, depth_tile, keep,
                                  [&](int row) { return load_float(depth_bias + 4 * row) * depth_weight(row); });
    }
  }

  if constexpr (kState) {
    float* kv = a.sum_kv + static_cast<int64_t>(blockIdx.x) * a.head_dim * a.head_dim_v;
    state.for_each([&](float& x, int row, int column) {
      const int at = place_in_state(column0 + state_row + row, state_column + column);
      if (at >= 0) kv[at] = x;
    });
    __syncthreads();
    for (int i = threadIdx.x; i < kTotals; i += kThreads)
      if (blockIdx.y == 0 && i < a.head_dim) a.sum_z[static_cast<int64_t>(blockIdx.x) * a.head_dim + i] = load_float(total + 4 * i);
  }
}

constexpr int kPrefixThreads = 128;

__global__ void __launch_bounds__(kPrefixThreads) linear_prefix_kernel(const __grid_constant__ CudaLinearPrefix p, int chunk) {
  const CudaLinear& a = p.walk;
  const int64_t stream = blockIdx.x, at = static_cast<int64_t>(blockIdx.y) * kPrefixThreads + threadIdx.x;
  if (at >= p.size) return;
  const LinearPlace place(a, static_cast<int>(stream));
  float run = p.initial ? p.initial[stream * p.size + at] : 0.f;
  for (int64_t step = 0; step < a.segments; ++step) {
    const int64_t segment = a.reverse ? a.segments - 1 - step : step;
    float& state = p.states[(stream * a.segments + segment) * p.size + at];
    const float added = state;
    state = run;
    if (a.decay) {
      const int first = (place.first_chunk(chunk) + static_cast<int>(segment * a.chunks)) * chunk;
      const int elapsed = place.time(first + static_cast<int>(a.chunks) * chunk) - place.time(first);
      run *= exp2_fast(place.rate * static_cast<float>(elapsed));
    }
    run += added;
  }
  p.final[stream * p.size + at] = run;
}

// A warp a row.
template <class T>
__global__ void __launch_bounds__(kPrefixThreads) linear_rows_kernel(const __grid_constant__ CudaLinearRows a) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * (kPrefixThreads / 32) + warp_index();
  if (index >= a.batch * a.heads_q * a.rows_q) return;
  const int64_t row = index % a.rows_q, head = index / a.rows_q % a.heads_q, batch = index / a.rows_q / a.heads_q;
  const T* grad_out = static_cast<const T*>(a.grad_out.data) + batch * a.grad_out.batch + head * a.grad_out.head + row * a.grad_out.row;
  const T* out = static_cast<const T*>(a.out.data) + batch * a.out.batch + head * a.out.head + row * a.out.row;
  float dot = 0.f;
  for (int64_t i = lane_index(); i < a.head_dim_v; i += 32) dot += to_float(grad_out[i]) * to_float(out[i]);
  dot = warp_sum(dot);
  const float denominator = a.denominator[index], scale = denominator == 0.f ? 0.f : a.scale / denominator;
  if (lane_index() == 0) {
    a.grad_scale[index] = scale;
    a.row_grad[index] = a.normalize ? -dot * scale : 0.f;
  }
}

template <class T, class F>
auto with_shape_of(int64_t width, F f) {
  if constexpr (sizeof(T) == 4) {
    if (width <= 64) return f(Shape<T, 64, 32, 32>{});
    if (width <= 128) return f(Shape<T, 128, 32, 32>{});
    return f(Shape<T, 256, 16, 32>{});
  } else {
    if (width <= 64) return f(Shape<T, 64, 64, 64>{});
    if (width <= 128) return f(Shape<T, 128, 32, 64>{});
    return f(Shape<T, 256, 64, 32>{});
  }
}
template <class F>
auto with_shape(Element element, int64_t width, F f) {
  switch (element) {
    case Element::float32: return with_shape_of<float>(width, f);
    case Element::bfloat16: return with_shape_of<bf16>(width, f);
    default: return with_shape_of<half>(width, f);
  }
}

int64_t width_of(const CudaLinear& a) { return a.head_dim > a.head_dim_v ? a.head_dim : a.head_dim_v; }

}  // namespace

LinearTile linear_tile(Element element, int64_t width) {
  return with_shape(element, width, [](auto shape) { return LinearTile{shape.kChunk, shape.kColumns}; });
}

int linear_walk_cuda(const CudaLinear& a, void* stream) {
  return with_shape(a.element, width_of(a), [&](auto shape) {
    using Shape = decltype(shape);
    const int64_t blocks = a.batch * a.heads_q * a.segments, column_blocks = (a.columns.width + Shape::kColumns - 1) / Shape::kColumns;
    if (!blocks || !column_blocks) return cudaSuccess;
    const auto kernel = a.walk == LinearWalk::kState    ? linear_walk_kernel<Shape, LinearWalk::kState>
                        : a.walk == LinearWalk::kValues ? linear_walk_kernel<Shape, LinearWalk::kValues>
                                                        : linear_walk_kernel<Shape, LinearWalk::kFeatures>;
    return launch(kernel, dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(column_blocks)), dim3(Shape::kThreads),
                  Shape::kSharedBytes, stream, a);
  });
}

int linear_prefix_cuda(const CudaLinearPrefix& p, void* stream) {
  const int64_t streams = p.walk.batch * p.walk.heads_q, blocks = (p.size + kPrefixThreads - 1) / kPrefixThreads;
  if (!streams || !blocks) return cudaSuccess;
  const int chunk = static_cast<int>(linear_tile(p.walk.element, width_of(p.walk)).chunk);
  return launch(linear_prefix_kernel, dim3(static_cast<unsigned>(streams), static_cast<unsigned>(blocks)), dim3(kPrefixThreads), 0,
                stream, p, chunk);
}

int linear_rows_cuda(const CudaLinearRows& a, void* stream) {
  const int64_t rows = a.batch * a.heads_q * a.rows_q;
  if (!rows) return cudaSuccess;
  const auto kernel = a.element == Element::float32    ? linear_rows_kernel<float>
                      : a.element == Element::bfloat16 ? linear_rows_kernel<bf16>
                                                       : linear_rows_kernel<half>;
  return launch(kernel, dim3(static_cast<unsigned>((rows + 3) / 4)), dim3(kPrefixThreads), 0, stream, a);
}

}  // namespace xformer_fast
