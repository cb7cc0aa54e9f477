// Softmax attention, forward:  out_i = sum_j P_ij v_j,  P_ij = exp(s_ij - lse_i),  lse_i = log(sum_j exp(s_ij) [+ exp(sink)]),
// s_ij = mask(alibi(softcap(scale * q_i . k_j))), dropout on P after the sums.
//
// Tiling. A tile is one head's 1..kTileVectors vectors of queries, one query a lane. Its scores are computed transposed,
// S^T[key][query], so that softmax statistics are vertical and the same tile is the B operand of both products:
//     S^T = K Q^T       A = K where it lies (scalar broadcast),      B = Q^T, packed and scaled once a tile
//     O^T += V^T P^T    A = V where it lies, read transposed,        B = S^T after the exponential, in place
// A task is a few tiles that share a KV head (neighbouring queries, the heads of a group): a block of keys serves all of
// them while it is in the cache, and is converted or copied once where it cannot be read in place. Tasks are cut by shape
// alone, longest key ranges first. Per block: scores, options, maximum, exponential and sum, product; the rescaling of
// O^T rides in the product. Blocks outside the range of a tile are never touched. A block that its edge crosses is cut into
// columns, one for each run of query vectors that see the same keys, and a column is worked on as a narrower tile.
//
// Global keys (attention_global.h) come first, gathered into blocks of their own. A bias of the map (attention_decomposed.h)
// is transposed beside Q^T.
//
// bfloat16 with XF_BF16_DOT multiplies pairs: Q^T and P^T hold pairs, V's rows are interleaved per block, and the sum is
// taken from the rounded P. Otherwise half types are converted to float32 per block.
//
// Memory that is needed next (the following block, the next tile's queries, the rows of out) is prefetched between the row
// chunks of a product, where the loads have time to spare.
//
// Not here: splitting the keys of one query tile over threads (decoding), and more than one head in a vector, so a call with
// few queries and many keys uses few lanes and few tasks.
//
// NOTES (Zen 4, one core, of an FMA ceiling of 118 GF/s; head_dim 64)
//   - In cache, both products run at 97-99% of the ceiling; the exponential pass takes 8.4 cycles a vector (6% of the time at
//     head_dim 64) and the maximum 1-2 (1%), so 91% is the most that this structure gives in float32 there, 84% in bfloat16.
//   - Prefetching inside the products: (1,8,2048,64) 93 -> 99 GF/s, causal 1024 88 -> 95, (8,12,128,64) 69 -> 84,
//     (8,12,197,64) 78 -> 86. Short sequences were bound by the latency of first touches in the transposes and in V.
//   - Eight query tiles a task instead of four: +4%, the fewer first touches of K and V.
//   - A block that an edge crosses: whole columns of one vector each (8 x 1 register tiles) beat rectangles of 16 rows and
//     several vectors, whose short products pay for loading and storing O^T: causal 1024 +5%.
//   - Blocks of 64, 128, 512 keys: within noise of 256. One row more in the 1-vector register tile (12 or 16): slower.
//   - Subtracting the maximum before the multiplication costs one operation in the exponential and keeps masks of -3e38 exact.
#include "attention_global.h"
#include "decode.h"

namespace xformer_fast {
namespace XFORMER_FAST_ISA {
namespace {

constexpr int kTileQueries = kTileVectors * kLanes;
constexpr int kBlockKeys = 256;
constexpr int kMaxTiles = 16;                       // query tiles of a task
constexpr int64_t kTileBytesPerTask = 512 * 1024;   // their Q^T and O^T stay in the second-level cache beside a key block
constexpr int64_t kEnoughTasks = 32;

// The element the tile product multiplies for inputs of type T.
template <class T> struct ProductOf { typedef float Type; };
#if defined(XF_BF16_DOT)
template <> struct ProductOf<bfloat16> { typedef bfloat16 Type; };
#endif
template <class C> constexpr int kPair = sizeof(float) / sizeof(C);  // reduction steps that one multiply-add takes
template <class C> constexpr int kStatistics = 1 + kPair<C>;           // floats a query: maximum and sums

struct Plan {
  const Attention* attention;
  int64_t tiles_per_task, tasks_per_kv_head;
  bool copy_key, copy_value;
  int64_t key_copy_bytes, score_bytes;
  int64_t tile_floats;      // a query of a tile: Q^T, O^T, statistics, bias of the map
  bool split_weights;       // P^T is multiplied as two bfloat16, so that out is exact before it is rounded
  bool edges, options;      // some keys are out of some query's sight; some pass changes the scores
  float query_scale;        // the scale is applied here, to Q^T,
  float unapplied_scale;    // or here, by the first pass over the scores,
  float score_unit;         // or here, in the exponential
};

// Keys [first, last) are all that some query of a vector can see; both ends grow from vector to vector. With granule 2
// (bfloat16 pairs) ranges start at even keys and end at even keys or at the key limit.
struct KeyRange {
  int64_t first, last;
};

XF_INLINE KeyRange key_range(const Attention& a, int64_t first_position, int64_t last_position, int64_t limit, int granule) {
  return {max_of(0, first_position - a.left) / granule * granule,
          min_of(limit, round_up(max_of(0, last_position + a.right + 1), granule))};
}

struct QueryTile {
  int64_t head, query0, queries;
  int vectors;
  unsigned started;  // bit v: vector v has seen a key; until then its columns of O^T hold nothing
  KeyRange keys[kTileVectors];
  char* query;       // Q^T
  float* out;        // O^T [Dv][vectors * kLanes]
  float* max;        // running maximum of the scores, -inf before the first
  float* sum;        // sum of exp(score - max), as rounded for the product with V: what divides O^T
  float* exact_sum;  // the same before rounding: what lse and so the backward need; `sum` itself where nothing is rounded
  float* map_bias;   // its numbers of map rows, then of columns, [row or column][vectors * kLanes]
};

// ---- softmax of a score tile ----

template <int V>
XF_NOINLINE void row_maximum(const float* scores, int64_t ld, int64_t rows, float* max) {
  Vec m[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) m[v] = load(max + v * kLanes);
  for (int64_t r = 0; r < rows; ++r, scores += ld) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) m[v] = maximum(load(scores + v * kLanes), m[v]);
  }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) store(max + v * kLanes, m[v]);
}

// Scores become exp2((score - max) * factor); sum += their sum.
template <int V>
XF_NOINLINE void exponentials(float* scores, int64_t ld, int64_t rows, const float* max, float factor, float* sum) {
  Vec m[V], l[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) m[v] = load(max + v * kLanes), l[v] = zero();
  for (int64_t r = 0; r < rows; ++r, scores += ld) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const Vec p = exp2((load(scores + v * kLanes) - m[v]) * factor);
      l[v] += p;
      store(scores + v * kLanes, p);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) store(sum + v * kLanes, load(sum + v * kLanes) + l[v]);
}

#if defined(XF_BF16_DOT)
// The same into bfloat16 pairs of rows, [row / 2][lane][2]; a last odd row is paired with zeros. `pairs` may be the rows
// before `scores` in the same tile: pair r is written after rows 2r and 2r + 1 are read. With kSplit, `low_pairs` takes
// what rounding to `pairs` leaves, exponentials are exact, and there is one sum.
template <int V, bool kSplit>
XF_NOINLINE void exponentials_pairs(const float* scores, int64_t ld, int64_t rows, const float* max, float factor,
                                    bfloat16* pairs, float* sum, float* exact_sum, bfloat16* low_pairs) {
  const UVec ones = broadcast_bits(0x3f803f80u);
  Vec m[V], l[V], exact[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) m[v] = load(max + v * kLanes), l[v] = zero(), exact[v] = zero();
  const auto exponential = [](Vec x) __attribute__((always_inline)) { return kSplit ? exp2(x) : exp2_coarse(x); };
  for (int64_t r = 0; r < rows; r += 2, scores += 2 * ld, pairs += 2 * ld, low_pairs += kSplit ? 2 * ld : 0) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const Vec even = exponential((load(scores + v * kLanes) - m[v]) * factor);
      const Vec odd = r + 1 < rows ? exponential((load(scores + ld + v * kLanes) - m[v]) * factor) : zero();
      const UVec p = to_bf16_pairs(even, odd);
      if (kSplit) {
        const UVec low = to_bf16_pairs(even - (Vec)(p << 16), odd - (Vec)(p & 0xffff0000u));
        __builtin_memcpy(low_pairs + 2 * v * kLanes, &low, sizeof low);
      } else {
        l[v] = _mm512_dpbf16_ps(l[v], (__m512bh)p, (__m512bh)ones);
      }
      exact[v] += even + odd;
      __builtin_memcpy(pairs + 2 * v * kLanes, &p, sizeof p);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    if (!kSplit) store(sum + v * kLanes, load(sum + v * kLanes) + l[v]);
    store(exact_sum + v * kLanes, load(exact_sum + v * kLanes) + exact[v]);
  }
}

template <bool kSplit>
XF_INLINE void exponentials_pairs(int vectors, const float* scores, int64_t ld, int64_t rows, const float* max, float factor,
                                  bfloat16* pairs, float* sum, float* exact_sum, bfloat16* low_pairs) {
  switch (vectors) {
    case 1: return exponentials_pairs<1, kSplit>(scores, ld, rows, max, factor, pairs, sum, exact_sum, low_pairs);
    case 2: return exponentials_pairs<2, kSplit>(scores, ld, rows, max, factor, pairs, sum, exact_sum, low_pairs);
    case 3: return exponentials_pairs<3, kSplit>(scores, ld, rows, max, factor, pairs, sum, exact_sum, low_pairs);
    default: return exponentials_pairs<4, kSplit>(scores, ld, rows, max, factor, pairs, sum, exact_sum, low_pairs);
  }
}

XF_NOINLINE void apply_dropout_pairs(const DropoutKeep& dropout, const ScoreTile& tile, const Segment& segment) {
  for (int v = segment.vector0; v < segment.vector1; ++v)
    for (int64_t group = (tile.key0 + segment.row0) / 4; group * 4 < tile.key0 + segment.row1; ++group) {
      IVec keep[4];
      dropout(tile.query0 + v * kLanes, group, keep);
      for (int w = 0; w < 4; w += 2) {
        const int64_t r = group * 4 + w - tile.key0;
        if (r < segment.row0 || r >= segment.row1) continue;
        float* p = tile.scores + r / 2 * tile.ld + v * kLanes;
        store(p, (Vec)((IVec)load(p) & ((keep[w] & 0xffff) | (keep[w + 1] << 16))));
      }
    }
}
#endif

XF_INLINE void row_maximum(int vectors, const float* scores, int64_t ld, int64_t rows, float* max) {
  switch (vectors) {
    case 1: return row_maximum<1>(scores, ld, rows, max);
    case 2: return row_maximum<2>(scores, ld, rows, max);
    case 3: return row_maximum<3>(scores, ld, rows, max);
    default: return row_maximum<4>(scores, ld, rows, max);
  }
}

// Probabilities of a tile, in place, in the form that the product with V takes.
template <class C>
XF_INLINE void exponentials(int vectors, float* scores, int64_t ld, int64_t rows, const float* max, float factor, float* sum,
                            [[maybe_unused]] float* exact_sum, [[maybe_unused]] float* low) {
#if defined(XF_BF16_DOT)
  if constexpr (kPair<C> == 2) {
    bfloat16* pairs = reinterpret_cast<bfloat16*>(scores);
    bfloat16* low_pairs = reinterpret_cast<bfloat16*>(low);
    if (low) return exponentials_pairs<true>(vectors, scores, ld, rows, max, factor, pairs, sum, exact_sum, low_pairs);
    return exponentials_pairs<false>(vectors, scores, ld, rows, max, factor, pairs, sum, exact_sum, low_pairs);
  }
#endif
  switch (vectors) {
    case 1: return exponentials<1>(scores, ld, rows, max, factor, sum);
    case 2: return exponentials<2>(scores, ld, rows, max, factor, sum);
    case 3: return exponentials<3>(scores, ld, rows, max, factor, sum);
    default: return exponentials<4>(scores, ld, rows, max, factor, sum);
  }
}

// The running maximum moves from `old` to `max`: sums are rescaled, by the factor that O^T needs too (alpha), and max becomes
// what the exponential subtracts, 0 where every score so far is -inf.
XF_INLINE void move_maximum(int vectors, float unit, float* old, float* max, float* alpha, float* sum, float* exact_sum) {
  const bool two_sums = exact_sum != sum;
  for (int v = 0; v < vectors; ++v, old += kLanes, max += kLanes, alpha += kLanes, sum += kLanes, exact_sum += kLanes) {
    const Vec m = load(max), finite = m == -kInfinity ? zero() : m;
    const Vec ratio = exp2((load(old) - finite) * unit);
    store(old, m);
    store(max, finite);
    store(alpha, ratio);
    store(sum, load(sum) * ratio);
    if (two_sums) store(exact_sum, load(exact_sum) * ratio);
  }
}

XF_NOINLINE void clear(float* out, int64_t ld, int64_t rows, int vectors) {
  for (int64_t r = 0; r < rows; ++r)
    for (int v = 0; v < vectors; ++v) store(out + r * ld + v * kLanes, zero());
}

// ---- one block of keys for one query tile ----

// Keys key0..key0+rows: key points at the first's row, value at the first's row or row pair.
template <class C>
struct KeyBlock {
  const C* key;
  const C* value;
  int64_t key_ld, value_ld;
  int64_t key0, rows;
  const int64_t* global_keys = nullptr;  // or these keys, outside the window
};

// Query vectors [vector0, vector1) of the tile and all keys of the block. for_value and for_next are what the two products
// bring into the cache meanwhile.
template <class C>
void attend_column(const Plan& plan, QueryTile& q, int vector0, int vector1, const KeyBlock<C>& block, int64_t b,
                   int64_t shift, float* scores, Prefetch* for_value, Prefetch* for_next) {
  const Attention& a = *plan.attention;
  const int vectors = vector1 - vector0;
  const int64_t lane0 = vector0 * kLanes, ld = vectors * kLanes, tile_ld = q.vectors * kLanes, rows = block.rows;
  const C* query = reinterpret_cast<const C*>(q.query) + lane0 * kPair<C>;
  tile_product(rows, vectors, (a.head_dim + kPair<C> - 1) / kPair<C>, block.key, block.key_ld, kPair<C>, query, tile_ld * kPair<C>,
               scores, ld, Start::overwrite, nullptr, for_value);

  ScoreTile tile{scores, ld, b, q.head, block.key0, q.query0 + lane0, q.queries - lane0, shift};
  if (a.has_map_bias())
    tile.map_bias = {q.map_bias + lane0, q.map_bias + a.map_rows * tile_ld + lane0, tile_ld, a.map_columns};
  const Segment all{0, rows, 0, vectors};
  if (plan.options)
    for_each_run(block.global_keys, tile, all, [&](const ScoreTile& run, const Segment& segment, int64_t) {
      apply_options(a, run, segment, plan.unapplied_scale);
    });
  if (block.global_keys)
    mask_window(a, tile, all, block.global_keys);
  else if (plan.edges)
    mask_edges(a, tile, all);

  alignas(64) float max[kTileQueries], alpha[kTileQueries];
  for (int v = 0; v < vectors; ++v) store(max + v * kLanes, load(q.max + lane0 + v * kLanes));
  row_maximum(vectors, scores, ld, rows, max);
  const float unit = plan.score_unit * kLog2e;
  move_maximum(vectors, unit, q.max + lane0, max, alpha, q.sum + lane0, q.exact_sum + lane0);
  float* low = plan.split_weights ? scores + kBlockKeys * kTileQueries : nullptr;
  exponentials<C>(vectors, scores, ld, rows, max, unit, q.sum + lane0, q.exact_sum + lane0, low);
  if (a.dropout_p > 0.f) {
    const DropoutKeep dropout(a, b, q.head);
#if defined(XF_BF16_DOT)
    if constexpr (kPair<C> == 2) {
      const auto drop = [&](const ScoreTile& pairs) {
        if (block.global_keys) return apply_dropout_pairs(dropout, pairs, all, block.global_keys);
        apply_dropout_pairs(dropout, pairs, all);
      };
      drop(tile);
      ScoreTile low_tile = tile;
      low_tile.scores = low;
      if (low) drop(low_tile);
    } else
#endif
      if (block.global_keys)
        apply_dropout(dropout, tile, all, block.global_keys);
      else
        apply_dropout(dropout, tile, all);
  }

  float* out = q.out + lane0;
  const unsigned column = (1u << vector1) - (1u << vector0), started = q.started & column;
  if (started != 0 && started != column)
    for (int v = vector0; v < vector1; ++v)
      if (!(started >> v & 1)) clear(q.out + v * kLanes, tile_ld, a.head_dim_v, 1);
  q.started |= column;
  tile_product(a.head_dim_v, vectors, (rows + kPair<C> - 1) / kPair<C>, block.value, kPair<C>, block.value_ld,
               reinterpret_cast<const C*>(scores), ld * kPair<C>, out, tile_ld, started ? Start::rescale : Start::overwrite, alpha,
               for_next);
  if (low)
    tile_product(a.head_dim_v, vectors, (rows + kPair<C> - 1) / kPair<C>, block.value, kPair<C>, block.value_ld,
                 reinterpret_cast<const C*>(low), ld * kPair<C>, out, tile_ld, Start::accumulate);
}

template <class C>
void attend_block(const Plan& plan, QueryTile& q, const KeyBlock<C>& block, int64_t b, int64_t shift, float* scores,
                  Prefetch* for_value, Prefetch* for_next) {
  const int64_t end = block.key0 + block.rows;
  for (int vector0 = 0, vector1; vector0 < q.vectors; vector0 = vector1) {
    const auto seen = [&](int v) { return KeyRange{max_of(q.keys[v].first, block.key0), min_of(q.keys[v].last, end)}; };
    const KeyRange keys = seen(vector0);
    for (vector1 = vector0 + 1; vector1 < q.vectors; ++vector1)
      if (seen(vector1).first != keys.first || seen(vector1).last != keys.last) break;
    if (keys.first >= keys.last) continue;
    const int64_t skipped = keys.first - block.key0;
    const KeyBlock<C> part{block.key + skipped * block.key_ld, block.value + skipped / kPair<C> * block.value_ld, block.key_ld,
                           block.value_ld, keys.first, keys.last - keys.first};
    attend_column(plan, q, vector0, vector1, part, b, shift, scores, for_value, for_next);
  }
}

// ---- one task ----

// The tile's rows of query or out.
template <class T>
XF_INLINE T* rows_of(const Attention& a, const View& view, int64_t b, const QueryTile& q) {
  return row_of<T>(view, b, q.head, a.query_row0(b) + q.query0);
}

// out = O^T / sum, with the sink in the sum; lse.
template <class T>
void finish_tile(const Plan& plan, QueryTile& q, int64_t b) {
  const Attention& a = *plan.attention;
  alignas(64) float factor[kTileQueries];
  const float keep = a.dropout_p > 0.f ? DropoutKeep(a, b, q.head).rescale : 1.f;
  float* lse = a.lse ? a.lse + b * a.lse_batch + q.head * a.lse_head + a.query_row0(b) + q.query0 : nullptr;
  for (int v = 0; v < q.vectors; ++v)
    if (!(q.started >> v & 1)) clear(q.out + v * kLanes, q.vectors * kLanes, a.head_dim_v, 1);
  for (int v = 0; v < q.vectors; ++v) {
    Vec max = load(q.max + v * kLanes) * plan.score_unit, ratio = broadcast(1.f);
    Vec sum = load(q.sum + v * kLanes), exact = load(q.exact_sum + v * kLanes);
    if (a.sinks) {
      const Vec sink = broadcast(a.sinks[q.head]), larger = maximum(max, sink);
      const Vec finite = larger == -kInfinity ? zero() : larger;
      const Vec of_sink = exp2((sink - finite) * kLog2e);
      ratio = exp2((max - finite) * kLog2e);
      sum = sum * ratio + of_sink;
      exact = exact * ratio + of_sink;
      max = larger;
    }
    store(factor + v * kLanes, sum == 0.f ? zero() : ratio * keep / sum);
    if (lse) {
      const int n = int(min_of(kLanes, q.queries - v * kLanes));
      const Vec rest = log(exact), rounded = max + rest;
      store(lse + v * kLanes, rounded, n);
      if (a.lse_error) store(lse + (a.lse_error - a.lse) + v * kLanes, lse_error(max, rest, rounded), n);
    }
  }
  store_transposed(q.out, q.vectors * kLanes, q.queries, a.head_dim_v, factor, rows_of<T>(a, a.out, b, q), a.out.row);
  if (a.residual.data)
    store_transposed<T, true>(q.out, q.vectors * kLanes, q.queries, a.head_dim_v, factor, rows_of<T>(a, a.residual, b, q),
                              a.residual.row);
}

template <class T>
void pack_query(const Plan& plan, QueryTile& q, int64_t b) {
  const Attention& a = *plan.attention;
  const T* query = rows_of<T>(a, a.query, b, q);
  const int64_t ld = q.vectors * kLanes;
  if (a.has_map_bias()) {
    const float* row_bias = row_of<const float>(a.row_bias, b, q.head, q.query0);
    const float* column_bias = row_of<const float>(a.column_bias, b, q.head, q.query0);
    pack_transposed(row_bias, a.row_bias.row, q.queries, a.map_rows, 1.f, q.map_bias, ld);
    pack_transposed(column_bias, a.column_bias.row, q.queries, a.map_columns, 1.f, q.map_bias + a.map_rows * ld, ld);
  }
#if defined(XF_BF16_DOT)
  if constexpr (kPair<typename ProductOf<T>::Type> == 2)
    return pack_transposed_pairs(query, a.query.row, q.queries, a.head_dim, reinterpret_cast<bfloat16*>(q.query), 2 * ld);
#endif
  pack_transposed(query, a.query.row, q.queries, a.head_dim, plan.query_scale,
                  reinterpret_cast<float*>(q.query), ld);
}

// Keys [key0, key0 + rows) of KV head h, in place or packed at `space`.
template <class T, class C>
KeyBlock<C> load_block(const Plan& plan, int64_t b, int64_t h, int64_t key0, int64_t rows, char* space) {
  const Attention& a = *plan.attention;
  const T* key = row_of<T>(a.key, b, h, a.key_row0(b) + key0);
  const T* value = row_of<T>(a.value, b, h, a.key_row0(b) + key0);
  C* key_copy = reinterpret_cast<C*>(space);
  C* value_copy = reinterpret_cast<C*>(space + plan.key_copy_bytes);
  KeyBlock<C> block{key_copy, value_copy, a.head_dim, a.head_dim_v, key0, rows};
#if defined(XF_BF16_DOT)
  if constexpr (kPair<C> == 2) {
    block.key_ld = round_up(a.head_dim, 2);
    block.value_ld = 2 * a.head_dim_v;
    if (plan.copy_key)
      pad_rows(key, a.key.row, rows, a.head_dim, key_copy);
    else
      block.key = key, block.key_ld = a.key.row;
    interleave_row_pairs(value, a.value.row, rows, a.head_dim_v, value_copy);
    return block;
  }
#endif
  if (plan.copy_key) convert_rows(key, a.key.row, rows, a.head_dim, reinterpret_cast<float*>(key_copy));
  if (plan.copy_value) convert_rows(value, a.value.row, rows, a.head_dim_v, reinterpret_cast<float*>(value_copy));
  if constexpr (sizeof(T) == sizeof(C)) {
    if (!plan.copy_key) block.key = key, block.key_ld = a.key.row;
    if (!plan.copy_value) block.value = value, block.value_ld = a.value.row;
  }
  return block;
}

XF_INLINE int64_t vectors_of(int64_t queries) { return (queries + kLanes - 1) / kLanes; }
XF_INLINE int64_t tiles_of(int64_t queries) { return (vectors_of(queries) + kTileVectors - 1) / kTileVectors; }

// The query tiles of a task and the keys that some of them see.
struct Job {
  int64_t batch, kv_head, limit, shift;
  int64_t first_key, last_key;
  int64_t count;
  QueryTile tiles[kMaxTiles];
};

// Cuts the task's share of queries into tiles of nearly equal width (13 vectors are 4, 3, 3, 3), tile by tile of the
// sequence and head by head of the group; their space is taken from scratch.
template <class C>
void place_tiles(const Plan& plan, int64_t task, Job& job, char*& scratch) {
  const Attention& a = *plan.attention;
  const int64_t kv_heads = a.batch * a.heads_kv, group = a.heads_q / a.heads_kv;
  const int64_t part = plan.tasks_per_kv_head - 1 - task / kv_heads;  // the last queries see most when causal
  const int64_t b = task % kv_heads / a.heads_kv;
  job.batch = b;
  job.kv_head = task % a.heads_kv;
  job.limit = a.key_limit(b);
  job.shift = a.shift(b);
  job.first_key = job.limit;
  job.last_key = 0;
  job.count = 0;

  const int64_t len_q = a.len_q(b), vectors = vectors_of(len_q), tiles = tiles_of(len_q);
  const int64_t first = part * plan.tiles_per_task, last = min_of(first + plan.tiles_per_task, tiles * group);
  for (int64_t t = first; t < last; ++t) {
    QueryTile& q = job.tiles[job.count++];
    const int64_t index = t / group, wider = vectors % tiles;
    q.head = job.kv_head * group + t % group;
    q.vectors = int(vectors / tiles + (index < wider));
    q.query0 = (index * (vectors / tiles) + min_of(index, wider)) * kLanes;
    q.queries = min_of(q.vectors * kLanes, len_q - q.query0);
    q.started = 0;
    const int64_t bytes = q.vectors * kLanes * sizeof(float);
    q.query = scratch;
    q.out = reinterpret_cast<float*>(q.query + bytes * a.head_dim);
    q.max = q.out + q.vectors * kLanes * a.head_dim_v;
    q.sum = q.max + q.vectors * kLanes;
    q.exact_sum = kPair<C> == 2 && !plan.split_weights ? q.sum + q.vectors * kLanes : q.sum;
    q.map_bias = q.max + q.vectors * kLanes * kStatistics<C>;
    scratch += bytes * plan.tile_floats;
    for (int v = 0; v < q.vectors; ++v) {
      store(q.max + v * kLanes, broadcast(-kInfinity));
      store(q.sum + v * kLanes, zero());
      store(q.exact_sum + v * kLanes, zero());
      const int64_t position = q.query0 + v * kLanes + job.shift;
      const int64_t last_position = position + min_of(kLanes, q.queries - v * kLanes) - 1;
      q.keys[v] = key_range(a, position, last_position, job.limit, kPair<C>);
      if (q.keys[v].first < q.keys[v].last) {
        job.first_key = min_of(job.first_key, q.keys[v].first);
        job.last_key = max_of(job.last_key, q.keys[v].last);
      }
    }
  }
}

// The global keys that are outside the windows of the job's queries, which are packed first.
template <class T, class C>
void attend_globals(const Plan& plan, Job& job, float* scores, char* space) {
  const Attention& a = *plan.attention;
  const int64_t* keys = a.global_keys + a.global_begin[job.batch];
  const int64_t count = a.global_count(job.batch), width = round_up(a.head_dim, kPair<C>);
  C* key_copy = reinterpret_cast<C*>(space);
  C* value_copy = key_copy + round_up(kBlockKeys * width, 64);
  for (int64_t k = 0; k < count; k += kBlockKeys, keys += kBlockKeys) {
    const int64_t rows = min_of(kBlockKeys, count - k);
    gather_keys<T>(a.key, job.batch, job.kv_head, keys, rows, a.head_dim, key_copy);
    gather_values<T>(a.value, job.batch, job.kv_head, keys, rows, a.head_dim_v, value_copy);
    for (QueryTile* q = job.tiles; q < job.tiles + job.count; ++q) {
      if (k == 0) pack_query<T>(plan, *q, job.batch);
      KeyBlock<C> block{key_copy, value_copy, width, kPair<C> * a.head_dim_v, 0, rows, keys};
      const int64_t last_position = q->query0 + q->queries - 1 + job.shift;
      while (a.causal && block.rows > 0 && keys[block.rows - 1] >= last_position - a.left) --block.rows;
      if (block.rows > 0) attend_column(plan, *q, 0, q->vectors, block, job.batch, job.shift, scores, nullptr, nullptr);
    }
  }
}

template <class T>
void attend_task(void* context, int64_t task, char* scratch) {
  typedef typename ProductOf<T>::Type C;
  const Plan& plan = *static_cast<const Plan*>(context);
  const Attention& a = *plan.attention;
  float* scores = reinterpret_cast<float*>(scratch);
  scratch += plan.score_bytes;
  Job job;
  place_tiles<C>(plan, task, job, scratch);
  QueryTile* const end = job.tiles + job.count;
  const bool packed = a.global_count(job.batch) > 0;
  if (packed) attend_globals<T, C>(plan, job, scores, scratch);
  if (job.first_key >= job.last_key) {
    for (QueryTile* q = job.tiles; q < end; ++q) finish_tile<T>(plan, *q, job.batch);
    return;
  }

  // The grid of blocks depends on the sequence alone: equal blocks from key 0.
  const int64_t blocks = (job.limit + kBlockKeys - 1) / kBlockKeys;
  const int64_t block_keys = round_up((job.limit + blocks - 1) / blocks, 16);
  for (int64_t k = job.first_key / block_keys * block_keys; k < job.last_key; k += block_keys) {
    const bool first_block = k <= job.first_key, last_block = k + block_keys >= job.last_key;
    const int64_t key0 = max_of(k, job.first_key / 16 * 16), rows = min_of(k + block_keys, job.last_key) - key0;
    const KeyBlock<C> block = load_block<T, C>(plan, job.batch, job.kv_head, key0, rows, scratch);
    for (QueryTile* q = job.tiles; q < end; ++q) {
      Prefetch for_value, for_next;
      if (q == job.tiles) {  // what is used in place is first touched now, what is copied by the next load_block
        if (!plan.copy_key) for_value.add(block.key, block.key_ld, rows, a.head_dim);
        if (!plan.copy_value) for_value.add(block.value, block.value_ld, rows, a.head_dim_v);
      }
      if (q + 1 == end && !last_block) {
        const int64_t next = k + block_keys, row0 = a.key_row0(job.batch) + next, n = min_of(block_keys, job.last_key - next);
        if (plan.copy_key) for_value.add(row_of<T>(a.key, job.batch, job.kv_head, row0), a.key.row, n, a.head_dim);
        if (plan.copy_value) for_value.add(row_of<T>(a.value, job.batch, job.kv_head, row0), a.value.row, n, a.head_dim_v);
      }
      if (first_block && !packed) {
        pack_query<T>(plan, *q, job.batch);
        if (q + 1 < end) for_next.add(rows_of<T>(a, a.query, job.batch, q[1]), a.query.row, q[1].queries, a.head_dim);
      }
      if (last_block) for_next.add(rows_of<T>(a, a.out, job.batch, *q), a.out.row, q->queries, a.head_dim_v);
      attend_block(plan, *q, block, job.batch, job.shift, scores, &for_value, &for_next);
      if (last_block) finish_tile<T>(plan, *q, job.batch);
    }
  }
}

template <class T>
void forward_of(const Attention& a, const Pool& pool) {
  typedef typename ProductOf<T>::Type C;
  Plan plan;
  plan.attention = &a;
  const int64_t kv_heads = a.batch * a.heads_kv, tiles = tiles_of(a.seqlen_q) * (a.heads_q / max_of(1, a.heads_kv));
  if (kv_heads * tiles == 0) return;

  const bool pairs = kPair<C> == 2, in_place = sizeof(C) == sizeof(T);
  plan.copy_key = pairs ? a.head_dim % 2 != 0 : !in_place;
  plan.key_copy_bytes = plan.copy_key ? round_up(kBlockKeys * round_up(a.head_dim, 2) * sizeof(C), 64) : 0;
  // V is read down its columns: rows a power of two apart would share a few cache sets.
  plan.copy_value = pairs || !in_place || a.value.row * sizeof(T) % 2048 == 0;
  plan.split_weights = pairs && a.exact_weights;
  plan.score_bytes = (plan.split_weights ? 2 : 1) * kBlockKeys * kTileQueries * int64_t(sizeof(float));
  plan.edges = a.left != kNoLimit || a.right != kNoLimit;
  const bool in_exponential = pairs && a.scale > 0.f && !has_score_options(a);  // bfloat16 Q^T stays exact
  plan.query_scale = pairs ? 1.f : a.scale;
  plan.unapplied_scale = pairs && !in_exponential ? a.scale : 1.f;
  plan.score_unit = in_exponential ? a.scale : 1.f;
  plan.options = has_score_options(a) || plan.unapplied_scale != 1.f;

  plan.tile_floats = a.head_dim + a.head_dim_v + kStatistics<C> + a.map_rows + a.map_columns;
  const int64_t tile_bytes = plan.tile_floats * kTileQueries * sizeof(float);
  int64_t per_task = min_of(kv_heads * tiles / kEnoughTasks, min_of(kMaxTiles, kTileBytesPerTask / tile_bytes));
  per_task = max_of(1, min_of(per_task, tiles));
  plan.tasks_per_kv_head = (tiles + per_task - 1) / per_task;
  plan.tiles_per_task = (tiles + plan.tasks_per_kv_head - 1) / plan.tasks_per_kv_head;

  int64_t copy_bytes = plan.key_copy_bytes + (plan.copy_value ? kBlockKeys * a.head_dim_v * sizeof(C) : 0);
  if (a.global_keys) copy_bytes = (round_up(kBlockKeys * round_up(a.head_dim, 2), 64) + kBlockKeys * a.head_dim_v) * sizeof(C);
  const int64_t scratch = plan.score_bytes + plan.tiles_per_task * tile_bytes + copy_bytes;
  pool.run(plan.tasks_per_kv_head * kv_heads, attend_task<T>, &plan, size_t(scratch));
}

}  // namespace

bool decode_takes(const Attention&);
void decode_forward(const Decode&, const Pool&);

void attention_forward(const Attention& a, const Pool& pool) {
  if (decode_takes(a)) return decode_forward({a, {}, false}, pool);
  switch (a.element) {
    case Element::float32: return forward_of<float>(a, pool);
    case Element::bfloat16: return forward_of<bfloat16>(a, pool);
    case Element::float16: return forward_of<float16>(a, pool);
    case Element::boolean: return;
  }
}

}  // namespace XFORMER_FAST_ISA
}  // namespace xformer_fast
