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
// O^T rides in the product. Blocks outside the range of a tile are never touched; a block that its edge crosses is cut into
// rectangles at query-vector granularity (attention_tiles.h).
//
// bfloat16 with XF_BF16_DOT multiplies pairs: Q^T and P^T hold pairs, V's rows are interleaved per block, and the sum is
// taken from the rounded P. Otherwise half types are converted to float32 per block.
//
// Not here: splitting the keys of one query tile over threads (decoding), and more than one head in a vector, so a call with
// few queries and many keys uses few lanes and few tasks.
#include "attention_tiles.h"

namespace xformer_fast {
namespace XFORMER_FAST_ISA {
namespace {

constexpr int kTileQueries = kTileVectors * kLanes;
constexpr int kBlockKeys = 256;
constexpr int kMaxTiles = 16;                       // query tiles of a task
constexpr int64_t kTileBytesPerTask = 512 * 1024;   // their Q^T and O^T stay in the second-level cache beside a key block
constexpr int64_t kEnoughTasks = 64;

// The element the tile product multiplies for inputs of type T.
template <class T> struct ProductOf { typedef float Type; };
#if defined(XF_BF16_DOT)
template <> struct ProductOf<bfloat16> { typedef bfloat16 Type; };
#endif

struct Plan {
  const Attention* attention;
  int64_t tiles_per_head;   // of the longest sequence
  int64_t tiles_per_task, tasks_per_kv_head;
  bool copy_key, copy_value;
  bool scale_in_query;      // Q^T carries the scale; else the scores are raw and the exponential does, see score_unit
  float score_unit;         // natural logits per unit of score after the options
};

struct QueryTile {
  int64_t head, query0, queries;
  int vectors;
  bool started;      // O^T, max and sum hold something
  KeyRanges keys;
  char* query;       // Q^T
  float* out;        // O^T [Dv][vectors * kLanes]
  float* max;        // running maximum of the scores, -inf before the first
  float* sum;        // sum of exp(score - max)
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
  for (int v = 0; v < V; ++v) m[v] = load(max + v * kLanes), l[v] = load(sum + v * kLanes);
  for (int64_t r = 0; r < rows; ++r, scores += ld) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const Vec p = exp2((load(scores + v * kLanes) - m[v]) * factor);
      l[v] += p;
      store(scores + v * kLanes, p);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) store(sum + v * kLanes, l[v]);
}

#if defined(XF_BF16_DOT)
// The same into bfloat16 pairs of rows, [row / 2][lane][2]; a last odd row is paired with zeros. `pairs` may be the rows
// before `scores` in the same tile: pair r is written after rows 2r and 2r + 1 are read.
template <int V>
XF_NOINLINE void exponentials_pairs(const float* scores, int64_t ld, int64_t rows, const float* max, float factor,
                                    bfloat16* pairs, float* sum) {
  const UVec ones = broadcast_bits(0x3f803f80u);
  Vec m[V], l[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) m[v] = load(max + v * kLanes), l[v] = load(sum + v * kLanes);
  for (int64_t r = 0; r < rows; r += 2, scores += 2 * ld, pairs += 2 * ld) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const Vec even = exp2_coarse((load(scores + v * kLanes) - m[v]) * factor);
      const Vec odd = r + 1 < rows ? exp2_coarse((load(scores + ld + v * kLanes) - m[v]) * factor) : zero();
      const UVec p = to_bf16_pairs(even, odd);
      l[v] = _mm512_dpbf16_ps(l[v], (__m512bh)p, (__m512bh)ones);
      __builtin_memcpy(pairs + 2 * v * kLanes, &p, sizeof p);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) store(sum + v * kLanes, l[v]);
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

// Probabilities of a segment, in place, in the form that the product with V takes.
template <class C>
XF_INLINE void exponentials(const ScoreTile& tile, const Segment& segment, const float* max, float factor, float* sum) {
  const int64_t ld = tile.ld, rows = segment.row1 - segment.row0, lane0 = segment.vector0 * kLanes;
  float* scores = tile.scores + segment.row0 * ld + lane0;
  max += lane0;
  sum += lane0;
#if defined(XF_BF16_DOT)
  if constexpr (sizeof(C) == 2) {
    bfloat16* pairs = reinterpret_cast<bfloat16*>(tile.scores + segment.row0 / 2 * ld + lane0);
    switch (segment.vector1 - segment.vector0) {
      case 1: return exponentials_pairs<1>(scores, ld, rows, max, factor, pairs, sum);
      case 2: return exponentials_pairs<2>(scores, ld, rows, max, factor, pairs, sum);
      case 3: return exponentials_pairs<3>(scores, ld, rows, max, factor, pairs, sum);
      default: return exponentials_pairs<4>(scores, ld, rows, max, factor, pairs, sum);
    }
  }
#endif
  switch (segment.vector1 - segment.vector0) {
    case 1: return exponentials<1>(scores, ld, rows, max, factor, sum);
    case 2: return exponentials<2>(scores, ld, rows, max, factor, sum);
    case 3: return exponentials<3>(scores, ld, rows, max, factor, sum);
    default: return exponentials<4>(scores, ld, rows, max, factor, sum);
  }
}

XF_NOINLINE void scale_rows(float* out, int64_t rows, int vectors, const float* factor) {
  for (int64_t r = 0; r < rows; ++r)
    for (int v = 0; v < vectors; ++v, out += kLanes) store(out, load(out) * load(factor + v * kLanes));
}

XF_NOINLINE void clear(float* out, int64_t vectors) {
  for (int64_t i = 0; i < vectors; ++i) store(out + i * kLanes, zero());
}

// ---- one block of keys for one query tile ----

// Keys key0..key0+rows: key points at the first's row, value at the first's row or row pair.
template <class C>
struct KeyBlock {
  const C* key;
  const C* value;
  int64_t key_ld, value_ld;
  int64_t key0, rows;
};

template <class C>
void attend_block(const Plan& plan, QueryTile& q, const KeyBlock<C>& block, int64_t b, int64_t shift, float* scores) {
  const Attention& a = *plan.attention;
  constexpr int kPair = sizeof(C) == 2 ? 2 : 1;
  const int64_t ld = q.vectors * kLanes;
  Segment segments[kMaxSegments];
  const int count = cut_segments(q.keys, block.key0, block.key0 + block.rows, segments);
  if (count == 0) return;

  const ScoreTile tile{scores, ld, b, q.head, block.key0, q.query0, q.queries, shift};
  const bool edges = a.left != kNoLimit || a.right != kNoLimit;
  const float unapplied = plan.scale_in_query ? 1.f : a.scale / plan.score_unit;
  const bool options = has_score_options(a) || unapplied != 1.f;
  alignas(64) float max[kTileQueries], alpha[kTileQueries];
  for (int v = 0; v < q.vectors; ++v) store(max + v * kLanes, load(q.max + v * kLanes));

  for (int i = 0; i < count; ++i) {
    const Segment& s = segments[i];
    const int vectors = s.vector1 - s.vector0;
    const int64_t lane0 = s.vector0 * kLanes;
    const C* query = reinterpret_cast<const C*>(q.query) + lane0 * kPair;
    float* rows = scores + s.row0 * ld + lane0;
    tile_product(s.row1 - s.row0, vectors, (a.head_dim + kPair - 1) / kPair, block.key + s.row0 * block.key_ld,
                 block.key_ld, kPair, query, ld * kPair, rows, ld, Start::overwrite);
    if (options) apply_options(a, tile, s, unapplied);
    if (edges) mask_edges(a, tile, s);
    row_maximum(vectors, rows, ld, s.row1 - s.row0, max + lane0);
  }

  const float factor = plan.score_unit * kLog2e;
  for (int v = 0; v < q.vectors; ++v) {
    const int64_t lane0 = v * kLanes;
    const Vec m = load(max + lane0), finite = m == -kInfinity ? zero() : m;
    const Vec ratio = exp2((load(q.max + lane0) - finite) * factor);
    store(q.max + lane0, m);
    store(max + lane0, finite);
    store(alpha + lane0, ratio);
    store(q.sum + lane0, load(q.sum + lane0) * ratio);
  }
  for (int i = 0; i < count; ++i) exponentials<C>(tile, segments[i], max, factor, q.sum);

  if (a.dropout_p > 0.f) {
    const DropoutKeep dropout(a, b, q.head);
    for (int i = 0; i < count; ++i) {
#if defined(XF_BF16_DOT)
      if constexpr (sizeof(C) == 2) {
        apply_dropout_pairs(dropout, tile, segments[i]);
        continue;
      }
#endif
      apply_dropout(dropout, tile, segments[i]);
    }
  }

  Start start = q.started ? Start::rescale : Start::overwrite;
  if (count > 1 || segments[0].vector1 - segments[0].vector0 < q.vectors) {
    if (q.started)
      scale_rows(q.out, a.head_dim_v, q.vectors, alpha);
    else
      clear(q.out, a.head_dim_v * q.vectors);
    start = Start::accumulate;
  }
  q.started = true;
  for (int i = 0; i < count; ++i) {
    const Segment& s = segments[i];
    const int64_t lane0 = s.vector0 * kLanes;
    const C* probabilities = reinterpret_cast<const C*>(scores + s.row0 / kPair * ld + lane0);
    tile_product(a.head_dim_v, s.vector1 - s.vector0, (s.row1 - s.row0 + kPair - 1) / kPair,
                 block.value + s.row0 / kPair * block.value_ld, kPair, block.value_ld, probabilities, ld * kPair,
                 q.out + lane0, ld, start, alpha);
  }
}

// ---- one task ----

// out = O^T / sum, with the sink in the sum; lse.
template <class T>
void finish_tile(const Plan& plan, QueryTile& q, int64_t b) {
  const Attention& a = *plan.attention;
  alignas(64) float factor[kTileQueries];
  const float keep = a.dropout_p > 0.f ? DropoutKeep(a, b, q.head).rescale : 1.f;
  const int64_t row0 = a.query_row0(b) + q.query0;
  float* lse = a.lse ? a.lse + b * a.lse_batch + q.head * a.lse_head + row0 : nullptr;
  if (!q.started) clear(q.out, a.head_dim_v * q.vectors);
  for (int v = 0; v < q.vectors; ++v) {
    Vec max = load(q.max + v * kLanes) * plan.score_unit, sum = load(q.sum + v * kLanes), ratio = broadcast(1.f);
    if (a.sinks) {
      const Vec sink = broadcast(a.sinks[q.head]), larger = maximum(max, sink);
      const Vec finite = larger == -kInfinity ? zero() : larger;
      ratio = exp2((max - finite) * kLog2e);
      sum = sum * ratio + exp2((sink - finite) * kLog2e);
      max = larger;
    }
    store(factor + v * kLanes, sum == 0.f ? zero() : ratio * keep / sum);
    if (lse) {
      const int n = int(min_of(kLanes, q.queries - v * kLanes));
      store(lse + v * kLanes, max + log(sum), n);
    }
  }
  store_transposed(q.out, q.vectors * kLanes, q.queries, a.head_dim_v, factor, row_of<T>(a.out, b, q.head, row0), a.out.row);
}

template <class T>
void pack_query(const Plan& plan, QueryTile& q, int64_t b) {
  const Attention& a = *plan.attention;
  const T* query = row_of<T>(a.query, b, q.head, a.query_row0(b) + q.query0);
  const int64_t ld = q.vectors * kLanes;
#if defined(XF_BF16_DOT)
  if constexpr (sizeof(typename ProductOf<T>::Type) == 2)
    return pack_transposed_pairs(query, a.query.row, q.queries, a.head_dim, reinterpret_cast<bfloat16*>(q.query), 2 * ld);
#endif
  pack_transposed(query, a.query.row, q.queries, a.head_dim, plan.scale_in_query ? a.scale : 1.f,
                  reinterpret_cast<float*>(q.query), ld);
}

// Keys [key0, key0 + rows) of KV head h, in place or packed at `space`.
template <class T, class C>
KeyBlock<C> load_block(const Plan& plan, int64_t b, int64_t h, int64_t key0, int64_t rows, char* space) {
  const Attention& a = *plan.attention;
  const T* key = row_of<T>(a.key, b, h, a.key_row0(b) + key0);
  const T* value = row_of<T>(a.value, b, h, a.key_row0(b) + key0);
  C* key_copy = reinterpret_cast<C*>(space);
  C* value_copy = reinterpret_cast<C*>(space + (plan.copy_key ? round_up(kBlockKeys * (a.head_dim + 1) * sizeof(C), 64) : 0));
  KeyBlock<C> block{key_copy, value_copy, a.head_dim, a.head_dim_v, key0, rows};
#if defined(XF_BF16_DOT)
  if constexpr (sizeof(C) == 2) {
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

template <class T>
void attend_task(void* context, int64_t task, char* scratch) {
  typedef typename ProductOf<T>::Type C;
  const Plan& plan = *static_cast<const Plan*>(context);
  const Attention& a = *plan.attention;
  const int64_t kv_heads = a.batch * a.heads_kv;
  const int64_t part = plan.tasks_per_kv_head - 1 - task / kv_heads;  // the last queries see most when causal
  const int64_t b = task % kv_heads / a.heads_kv, kv_head = task % a.heads_kv, group = a.heads_q / a.heads_kv;

  const int64_t len_q = a.len_q(b), limit = a.key_limit(b), shift = a.shift(b);
  const int64_t vectors = vectors_of(len_q), tiles = tiles_of(len_q);
  const int64_t first = part * plan.tiles_per_task, last = min_of(first + plan.tiles_per_task, tiles * group);
  if (first >= last) return;

  float* scores = reinterpret_cast<float*>(scratch);
  scratch += kBlockKeys * kTileQueries * sizeof(float);
  QueryTile queries[kMaxTiles];
  int64_t first_key = limit, last_key = 0;
  for (int64_t t = first; t < last; ++t) {  // tiles of nearly equal width: 13 vectors are 4, 3, 3, 3
    QueryTile& q = queries[t - first];
    const int64_t index = t / group, wider = vectors % tiles;
    const int64_t vector0 = index * (vectors / tiles) + min_of(index, wider);
    q.head = kv_head * group + t % group;
    q.vectors = int(vectors / tiles + (index < wider));
    q.query0 = vector0 * kLanes;
    q.queries = min_of(q.vectors * kLanes, len_q - q.query0);
    q.started = false;
    q.keys = key_ranges(a, q.query0, q.queries, shift, limit, sizeof(C) == 2 ? 2 : 1);
    const int64_t bytes = q.vectors * kLanes * sizeof(float);
    q.query = scratch;
    q.out = reinterpret_cast<float*>(q.query + bytes * a.head_dim);
    q.max = q.out + q.vectors * kLanes * a.head_dim_v;
    q.sum = q.max + q.vectors * kLanes;
    scratch += bytes * (a.head_dim + a.head_dim_v + 2);
    for (int v = 0; v < q.vectors; ++v) {
      store(q.max + v * kLanes, broadcast(-kInfinity));
      store(q.sum + v * kLanes, zero());
      if (q.keys.first[v] < q.keys.last[v]) {
        first_key = min_of(first_key, q.keys.first[v]);
        last_key = max_of(last_key, q.keys.last[v]);
      }
    }
    pack_query<T>(plan, q, b);
  }

  if (first_key < last_key) {  // the grid of blocks depends on the sequence alone: equal blocks from key 0
    const int64_t blocks = (limit + kBlockKeys - 1) / kBlockKeys;
    const int64_t block_keys = round_up((limit + blocks - 1) / blocks, 16);
    for (int64_t k = first_key / block_keys * block_keys; k < last_key; k += block_keys) {
      const int64_t key0 = max_of(k, first_key / 16 * 16), rows = min_of(k + block_keys, last_key) - key0;
      const KeyBlock<C> block = load_block<T, C>(plan, b, kv_head, key0, rows, scratch);
      for (int64_t t = first; t < last; ++t) attend_block(plan, queries[t - first], block, b, shift, scores);
    }
  }
  for (int64_t t = first; t < last; ++t) finish_tile<T>(plan, queries[t - first], b);
}

template <class T>
void forward_of(const Attention& a, const Pool& pool) {
  typedef typename ProductOf<T>::Type C;
  Plan plan;
  plan.attention = &a;
  plan.tiles_per_head = tiles_of(a.seqlen_q);
  const int64_t kv_heads = a.batch * a.heads_kv, tiles = plan.tiles_per_head * (a.heads_q / max_of(1, a.heads_kv));
  if (kv_heads * tiles == 0) return;

  const bool pairs = sizeof(C) == 2, in_place = sizeof(C) == sizeof(T);
  plan.copy_key = pairs ? a.head_dim % 2 != 0 : !in_place;
  // V is read down its columns: rows a power of two apart would share a few cache sets.
  plan.copy_value = pairs || !in_place || a.value.row * sizeof(T) % 2048 == 0;
  plan.scale_in_query = !pairs;
  plan.score_unit = pairs && a.scale > 0.f && !has_score_options(a) ? a.scale : 1.f;

  const int64_t tile_bytes = (a.head_dim + a.head_dim_v + 2) * kTileQueries * sizeof(float);
  const int64_t enough_tasks = plan.copy_value ? kEnoughTasks / 2 : kEnoughTasks;  // a copied block should serve several tiles
  int64_t per_task = min_of(kv_heads * tiles / enough_tasks, min_of(kMaxTiles, kTileBytesPerTask / tile_bytes));
  per_task = max_of(1, min_of(per_task, tiles));
  plan.tasks_per_kv_head = (tiles + per_task - 1) / per_task;
  plan.tiles_per_task = (tiles + plan.tasks_per_kv_head - 1) / plan.tasks_per_kv_head;

  const int64_t scratch = kBlockKeys * kTileQueries * sizeof(float) + plan.tiles_per_task * tile_bytes +
                          (plan.copy_key ? round_up(kBlockKeys * (a.head_dim + 1) * sizeof(C), 64) : 0) +
                          (plan.copy_value ? kBlockKeys * a.head_dim_v * sizeof(C) : 0);
  pool.run(plan.tasks_per_kv_head * kv_heads, attend_task<T>, &plan, size_t(scratch));
}

}  // namespace

// Defined in this file, entered through the table of the instruction set.
void attention_forward(const Attention& a, const Pool& pool) {
  switch (a.element) {
    case Element::float32: return forward_of<float>(a, pool);
    case Element::bfloat16: return forward_of<bfloat16>(a, pool);
    case Element::float16: return forward_of<float16>(a, pool);
    case Element::boolean: return;
  }
}

}  // namespace XFORMER_FAST_ISA
}  // namespace xformer_fast
