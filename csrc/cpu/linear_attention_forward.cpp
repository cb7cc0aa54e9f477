// Linear attention, forward (Katharopoulos et al. 2020; decay as in RetNet, Sun et al. 2023):
//
//     out_i = scale phi(q_i)^T S_i / (scale phi(q_i).z_i + eps),   S_i = sum_j decay^(p_i - j) phi(k_j) v_j^T,  z_i = sum_j ...
//
// over j <= p_i = i + Sk - Sq if causal, over all keys otherwise, both without keys at or past the key length, plus
// decay^(p_i + 1) times the initial state.
//
// Tiling. Positions are cut into chunks of kChunk, where keys and queries of a chunk stand at the same positions:
//     O  = phi(Q) S                 the state before the chunk; its rows' denominators are dot products with z
//     P^T = phi(K) phi(Q)^T         squares with j <= i only; masked, decayed, summed down the columns in one pass
//     O += P V                      P^T read transposed where it lies
//     S  = decay^n S + phi(K)^T V   phi(K) read transposed where it lies; the factor rides in the product
// S is float32, head_dim x head_dim_v, and stays in the nearest cache. Feature maps are applied as rows are loaded. Float32
// values are read in place. Not causal: one pass over the keys for S, one over the queries for O.
//
// Parallelism. A task is a head; where heads are few, a segment of a head: each segment sums its own state, an exclusive
// prefix with decay runs over them, then each computes its outputs (a third more work when causal, none otherwise). The cut
// depends on the shape alone, so results have the same bits for any number of threads.
//
// bfloat16 with XF_BF16_DOT multiplies pairs: phi(Q), phi(K), P and a copy of S are rounded to bfloat16, sums are float32.
// With decay, whose weights would be rounded as well, and otherwise, half types are converted to float32 as they are loaded.
//
// Not here: one pass over the keys for all query heads of a group when causal (with decay each has a state of its own).
//
// NOTES (Zen 4, two cores, FMA ceiling 222 GF/s, elu, (1,8,8192,64), fresh output each call)
//   - float32: not causal 8.4-10 ms (107-127 GF/s), causal 11.8 ms (136 GF/s of three products a token, 3.25 are computed).
//     bfloat16: 6.9 and 9.3 ms.
//   - The triangle in squares of 16 computes 10/16 of both in-chunk products.
//   - Powers of decay are formed in double and rounded once: by repeated float squaring, 1,200 tokens erred by 3e-6.
// Zen 3 (AVX2, two threads; the same)
//   - Not causal in float32: 10 ms at its quietest, two thirds of it in products (at 85% of the FMA ceiling), 18% in maps,
//     7% in writing rows of out, 4% in asking for memory.
//   - Asking for two lines at a time, and in the products of all columns instead of the first ones: 1.05 to 1.14 times as
//     fast. Asking for the rows of out as well, and an elu without exp's upper clamp: nothing.
#include "linear_attention_tiles.h"

namespace xformer_fast {
namespace XFORMER_FAST_ISA {
namespace {

struct Plan {
  const LinearAttention* attention;
  int64_t ldk, ldv, state_size;
  int64_t segments;
  float* states;  // [stream][segment] of what a segment adds; after the prefix: what it starts from
  float* totals;  // [batch * heads_q], not causal
};

template <class T, class C>
struct Buffers {
  C* key_rows;      // [kChunk][ldk] phi(K)
  C* key_operand;   // phi(K) as A of the state's product: transposed by strides, weighted, or in row pairs
  C* query_rows;    // [kChunk][ldk] phi(Q)
  C* query_weighted;
  C* query_packed;  // [ldk][kChunk] phi(Q)^T
  C* value_rows;    // V where it is not read in place
  C* value_flat;    // V padded, before its rows are paired
  C* state_copy;    // S in row pairs
  float* scores;    // P^T
  float* out;       // [kChunk][ldv]
  float* denominator;
  float* state;

  Buffers(const Plan& plan, char* space) {
    const int64_t ldk = plan.ldk, ldv = plan.ldv;
    state = take<float>(space, plan.state_size);
    key_rows = take<C>(space, kChunk * ldk);
    key_operand = take<C>(space, kChunk * ldk);
    query_rows = take<C>(space, kChunk * ldk);
    query_weighted = take<C>(space, kChunk * ldk);
    query_packed = take<C>(space, kChunk * ldk);
    value_rows = take<C>(space, kChunk * ldv);
    value_flat = take<C>(space, kStep<C> == 2 ? kChunk * ldv : 0);
    state_copy = take<C>(space, kStep<C> == 2 ? ldk * ldv : 0);
    scores = take<float>(space, kChunk * kChunk);
    out = take<float>(space, kChunk * ldv);
    denominator = take<float>(space, kChunk + kPad);
  }
  static size_t bytes(const Plan& plan) {
    const int64_t ldk = plan.ldk, ldv = plan.ldv, chunk = kChunk;
    return size_t(sizeof(float) * (plan.state_size + chunk * (chunk + ldv + 1) + kPad) +
                  sizeof(C) * (chunk * (5 * ldk + 2 * ldv) + (kStep<C> == 2 ? ldk * ldv : 0)) + 16 * 64);
  }
};

template <class T>
bool values_in_place(const Plan& plan) {
  return sizeof(T) == sizeof(float) && plan.attention->head_dim_v == plan.ldv;
}

void load_state(const Plan& plan, const float* kv, const float* z, float* state) {
  const LinearAttention& a = *plan.attention;
  for (int64_t c = 0; c < plan.state_size; c += kLanes) store(state + c, zero());
  if (!kv) return;
  for (int64_t d = 0; d < a.head_dim; ++d)
    __builtin_memcpy(state + d * plan.ldv, kv + d * a.head_dim_v, size_t(a.head_dim_v) * sizeof(float));
  __builtin_memcpy(state + plan.ldk * plan.ldv, z, size_t(a.head_dim) * sizeof(float));
}
void load_initial(const Plan& plan, int64_t stream, float* state) {
  const LinearAttention& a = *plan.attention;
  load_state(plan, a.initial_kv ? a.initial_kv + stream * a.head_dim * a.head_dim_v : nullptr,
             a.initial_z ? a.initial_z + stream * a.head_dim : nullptr, state);
}
void store_final(const Plan& plan, int64_t stream, const float* state) {
  const LinearAttention& a = *plan.attention;
  if (!a.final_kv) return;
  float* kv = a.final_kv + stream * a.head_dim * a.head_dim_v;
  for (int64_t d = 0; d < a.head_dim; ++d)
    __builtin_memcpy(kv + d * a.head_dim_v, state + d * plan.ldv, size_t(a.head_dim_v) * sizeof(float));
  __builtin_memcpy(a.final_z + stream * a.head_dim, state + plan.ldk * plan.ldv, size_t(a.head_dim) * sizeof(float));
}

// state = keep * state + more
void merge_states(const Plan& plan, float keep, const float* more, float* state) {
  for (int64_t c = 0; c < plan.state_size; c += kLanes) store(state + c, load(state + c) * keep + load(more + c));
}

// One head's chunks, on the buffers of one task.
template <class T, class C>
class Head {
 public:
  Head(const Plan& plan, int64_t b, int64_t h, char* scratch)
      : plan_(plan), a_(*plan.attention), x_(plan, scratch), b_(b), h_(h), kv_head_(h / (a_.heads_q / a_.heads_kv)) {
    decay_.start(a_, h);
  }
  float* state() { return x_.state; }
  const Decay& decay() const { return decay_; }
  void weigh(const Chunk& chunk) {
    if (decay_.active) decay_.weigh(chunk.rows, chunk.first);
  }

  // phi(K) and V of keys [key0, key0 + rows).
  void load_keys(int64_t key0, int64_t rows) {
    const int64_t row = a_.row0(b_) + key0;
    map_rows(a_.map, row_of<T>(a_.key, b_, kv_head_, row), a_.key.row, rows, a_.head_dim, x_.key_rows, plan_.ldk);
    const T* value = row_of<T>(a_.value, b_, kv_head_, row);
    if (values_in_place<T>(plan_)) {
      value_ = reinterpret_cast<const C*>(value), value_ld_ = a_.value.row;
      return;
    }
    value_ = x_.value_rows, value_ld_ = plan_.ldv * kStep<C>;
#if defined(XF_BF16_DOT)
    if constexpr (kStep<C> == 2) {
      if (a_.head_dim_v == plan_.ldv) return interleave_row_pairs(value, a_.value.row, rows, plan_.ldv, x_.value_rows);
      map_rows_of<FeatureMap::identity>(value, a_.value.row, rows, a_.head_dim_v, x_.value_flat, plan_.ldv);
      return pair_rows(x_.value_flat, plan_.ldv, nullptr, rows, plan_.ldv, x_.value_rows);
    }
#endif
    map_rows_of<FeatureMap::identity>(value, a_.value.row, rows, a_.head_dim_v, x_.value_rows, plan_.ldv);
  }

  // S = decay^rows S + phi(K)^T V, z likewise, of the keys that load_keys left.
  void add_keys(int64_t rows, Prefetch* prefetch) {
    const float* weights = decay_.active ? decay_.down : nullptr;
    const float keep = decay_.active ? decay_.power[rows] : 1.f;
    alignas(64) float factor[kTileVectors * kLanes];
    for (int v = 0; v < kTileVectors; ++v) store(factor + v * kLanes, broadcast(keep));
    add_rows(x_.key_rows, plan_.ldk, weights, rows, plan_.ldk, keep, x_.state + plan_.ldk * plan_.ldv);
    const C* operand = x_.key_rows;
#if defined(XF_BF16_DOT)
    if constexpr (kStep<C> == 2) {
      pair_rows(x_.key_rows, plan_.ldk, weights, rows, plan_.ldk, x_.key_operand);
      operand = x_.key_operand;
    } else
#endif
        if (weights) {
      weigh_rows(x_.key_rows, plan_.ldk, weights, rows, plan_.ldk, x_.key_operand, plan_.ldk);
      operand = x_.key_operand;
    }
    multiply(a_.head_dim, plan_.ldv, (rows + kStep<C> - 1) / kStep<C>, operand, kStep<C>, plan_.ldk * kStep<C>, value_,
             value_ld_, x_.state, plan_.ldv, decay_.active ? Start::rescale : Start::accumulate, factor, prefetch);
    copied_ = false;
  }
  void decay_state(int64_t rows) {
    if (!decay_.active) return;
    for (int64_t c = 0; c < plan_.state_size; c += kLanes) store(x_.state + c, load(x_.state + c) * decay_.power[rows]);
    copied_ = false;
  }

  // O = phi(Q) S and the denominators, of queries [query0, query0 + rows).
  void apply_state(int64_t query0, int64_t rows, Prefetch* prefetch) {
    const T* query = row_of<T>(a_.query, b_, h_, a_.row0(b_) + query0);
    map_rows(a_.map, query, a_.query.row, rows, a_.head_dim, x_.query_rows, plan_.ldk);
    const C* operand = x_.query_rows;
    if (decay_.active) {
      weigh_rows(x_.query_rows, plan_.ldk, decay_.up, rows, plan_.ldk, x_.query_weighted, plan_.ldk);
      operand = x_.query_weighted;
    }
    row_dots(operand, plan_.ldk, x_.state + plan_.ldk * plan_.ldv, 0, rows, plan_.ldk, x_.denominator);
    const C* state = reinterpret_cast<const C*>(x_.state);
#if defined(XF_BF16_DOT)
    if constexpr (kStep<C> == 2) {
      if (!copied_) pair_rows(x_.state, plan_.ldv, nullptr, plan_.ldk, plan_.ldv, x_.state_copy);
      copied_ = true;
      state = x_.state_copy;
    }
#endif
    multiply(rows, plan_.ldv, (a_.head_dim + kStep<C> - 1) / kStep<C>, operand, plan_.ldk, kStep<C>, state,
             plan_.ldv * kStep<C>, x_.out, plan_.ldv, Start::overwrite, nullptr, prefetch);
  }

  // O += P V within a chunk whose keys and queries are loaded.
  void attend(int64_t rows) {
    const int64_t depth = (a_.head_dim + kStep<C> - 1) / kStep<C>;
    const C* operand = reinterpret_cast<const C*>(x_.scores);
#if defined(XF_BF16_DOT)
    if constexpr (kStep<C> == 2)
      pack_transposed_pairs(x_.query_rows, plan_.ldk, rows, plan_.ldk, x_.query_packed, 2 * kChunk);
    else
#endif
      pack_transposed(x_.query_rows, plan_.ldk, rows, plan_.ldk, 1.f, x_.query_packed, kChunk);
    causal_products(rows, depth, x_.key_rows, plan_.ldk, x_.query_packed, x_.scores);
    finish_causal_tile(x_.scores, rows, decay_, nullptr, x_.denominator);
#if defined(XF_BF16_DOT)
    if constexpr (kStep<C> == 2) pair_triangle(x_.scores, rows);
#endif
    for (int64_t i = 0; i < rows; i += kPad) {
      const int64_t seen = min_of(rows, i + kPad);
      multiply(min_of(kPad, rows - i), plan_.ldv, (seen + kStep<C> - 1) / kStep<C>, operand + i * kStep<C>, kStep<C>,
               kChunk * kStep<C>, value_, value_ld_, x_.out + i * plan_.ldv, plan_.ldv, Start::accumulate);
    }
  }

  void store_queries(int64_t query0, int64_t rows) {
    const int64_t row = a_.row0(b_) + query0;
    float* denominators = a_.denominator + b_ * a_.denominator_batch + h_ * a_.denominator_head + row;
    for (int64_t i = 0; i < rows; ++i) {
      const float total = a_.normalize ? a_.scale * x_.denominator[i] + a_.eps : 1.f;
      denominators[i] = total;
      x_.denominator[i] = total == 0.f ? 0.f : a_.scale / total;
    }
    store_rows(x_.out, plan_.ldv, x_.denominator, rows, a_.head_dim_v, row_of<T>(a_.out, b_, h_, row), a_.out.row);
  }

  void prefetch_keys(int64_t key0, int64_t rows, Prefetch& prefetch) const {
    const int64_t row = a_.row0(b_) + key0;
    prefetch.add(row_of<T>(a_.key, b_, kv_head_, row), a_.key.row, rows, a_.head_dim);
    prefetch.add(row_of<T>(a_.value, b_, kv_head_, row), a_.value.row, rows, a_.head_dim_v);
  }
  void prefetch_queries(int64_t query0, int64_t rows, Prefetch& prefetch) const {
    prefetch.add(row_of<T>(a_.query, b_, h_, a_.row0(b_) + query0), a_.query.row, rows, a_.head_dim);
  }

 private:
#if defined(XF_BF16_DOT)
  // P^T to bfloat16 pairs of rows, [j / 2][i][2], in place.
  static XF_NOINLINE void pair_triangle(float* scores, int64_t rows) {
    for (int64_t i0 = 0; i0 < rows; i0 += kLanes) {
      const int64_t last = min_of(rows, (i0 / kPad + 1) * kPad);
      for (int64_t j = 0; j < last; j += 2) {
        const Vec high = j + 1 < last ? load(scores + (j + 1) * kChunk + i0) : zero();
        const UVec pairs = to_bf16_pairs(load(scores + j * kChunk + i0), high);
        store(scores + j / 2 * kChunk + i0, (Vec)pairs);
      }
    }
  }
#endif

  const Plan& plan_;
  const LinearAttention& a_;
  Buffers<T, C> x_;
  Decay decay_;
  const int64_t b_, h_, kv_head_;
  const C* value_ = nullptr;
  int64_t value_ld_ = 0;
  bool copied_ = false;
};

// ---- causal ----

struct Range { int64_t first, last; };
XF_INLINE Range segment(int64_t count, int64_t index, int64_t segments) {
  return {count * index / segments, count * (index + 1) / segments};
}

template <class T, class C>
void causal_segment_state(void* context, int64_t task, char* scratch) {
  const Plan& plan = *static_cast<const Plan*>(context);
  const LinearAttention& a = *plan.attention;
  const int64_t stream = task / plan.segments, b = stream / a.heads_q;
  Head<T, C> head(plan, b, stream % a.heads_q, scratch);
  const Walk walk(a, b);
  const Range range = segment(walk.count, task % plan.segments, plan.segments);
  load_state(plan, nullptr, nullptr, head.state());
  for (int64_t k = range.first; k < range.last; ++k) {
    const Chunk chunk = walk[k];
    if (chunk.position < 0) continue;
    head.weigh(chunk);
    if (chunk.keys) {
      head.load_keys(chunk.position, chunk.rows);
      head.add_keys(chunk.rows, nullptr);
    } else {
      head.decay_state(chunk.rows);
    }
  }
  __builtin_memcpy(plan.states + task * plan.state_size, head.state(), size_t(plan.state_size) * sizeof(float));
}

void causal_prefix(void* context, int64_t stream, char* scratch) {
  const Plan& plan = *static_cast<const Plan*>(context);
  const LinearAttention& a = *plan.attention;
  const Walk walk(a, stream / a.heads_q);
  Decay decay;
  decay.start(a, stream % a.heads_q);
  float* run = reinterpret_cast<float*>(scratch);
  float* next = run + plan.state_size;
  const size_t bytes = size_t(plan.state_size) * sizeof(float);
  load_initial(plan, stream, run);
  for (int64_t s = 0; s < plan.segments; ++s) {
    const Range range = segment(walk.count, s, plan.segments);
    float* mine = plan.states + (stream * plan.segments + s) * plan.state_size;
    __builtin_memcpy(next, mine, bytes);
    __builtin_memcpy(mine, run, bytes);
    const int64_t from = max_of(0, walk.end_position(range.first)), to = max_of(0, walk.end_position(range.last));
    merge_states(plan, decay.active ? decay.at(to - from) : 1.f, next, run);
  }
}

template <class T, class C>
void causal_task(void* context, int64_t task, char* scratch) {
  const Plan& plan = *static_cast<const Plan*>(context);
  const LinearAttention& a = *plan.attention;
  const int64_t stream = task / plan.segments, b = stream / a.heads_q;
  Head<T, C> head(plan, b, stream % a.heads_q, scratch);
  const Walk walk(a, b);
  const Range range = segment(walk.count, task % plan.segments, plan.segments);
  if (plan.segments == 1)
    load_initial(plan, stream, head.state());
  else
    __builtin_memcpy(head.state(), plan.states + task * plan.state_size, size_t(plan.state_size) * sizeof(float));
  for (int64_t k = range.first; k < range.last; ++k) {
    const Chunk chunk = walk[k];
    if (chunk.position == walk.limit && chunk.position >= 0) store_final(plan, stream, head.state());
    head.weigh(chunk);
    Prefetch queries, keys;
    if (k + 1 < range.last) {
      const Chunk next = walk[k + 1];
      if (next.queries) head.prefetch_queries(next.position - walk.shift, next.rows, queries);
      if (next.keys) head.prefetch_keys(next.position, next.rows, keys);
    }
    if (chunk.keys) head.load_keys(chunk.position, chunk.rows);
    if (chunk.queries) {
      head.apply_state(chunk.position - walk.shift, chunk.rows, &queries);
      if (chunk.keys) head.attend(chunk.rows);
      head.store_queries(chunk.position - walk.shift, chunk.rows);
    }
    if (chunk.keys)
      head.add_keys(chunk.rows, &keys);
    else if (chunk.position >= 0)
      head.decay_state(chunk.rows);
  }
  if ((task + 1) % plan.segments == 0 && walk.end_position(walk.count) == walk.limit) store_final(plan, stream, head.state());
}

// ---- not causal ----

template <class T, class C>
void key_task(void* context, int64_t task, char* scratch) {
  const Plan& plan = *static_cast<const Plan*>(context);
  const LinearAttention& a = *plan.attention;
  const int64_t stream = task / plan.segments, b = stream / a.heads_kv;
  Head<T, C> head(plan, b, stream % a.heads_kv * (a.heads_q / a.heads_kv), scratch);
  const int64_t limit = a.key_limit(b);
  const Range range = segment((limit + kChunk - 1) / kChunk, task % plan.segments, plan.segments);
  load_state(plan, nullptr, nullptr, head.state());
  const auto rows_at = [&](int64_t k) { return min_of(kChunk, limit - k * kChunk); };
  for (int64_t k = range.first; k < range.last; ++k) {
    Prefetch next;
    if (k + 1 < range.last) head.prefetch_keys((k + 1) * kChunk, rows_at(k + 1), next);
    head.load_keys(k * kChunk, rows_at(k));
    head.add_keys(rows_at(k), &next);
  }
  __builtin_memcpy(plan.states + task * plan.state_size, head.state(), size_t(plan.state_size) * sizeof(float));
}

void total_task(void* context, int64_t stream, char*) {
  const Plan& plan = *static_cast<const Plan*>(context);
  const LinearAttention& a = *plan.attention;
  const int64_t kv_stream = stream / (a.heads_q / a.heads_kv);
  float* total = plan.totals + stream * plan.state_size;
  load_initial(plan, stream, total);
  for (int64_t s = 0; s < plan.segments; ++s)
    merge_states(plan, 1.f, plan.states + (kv_stream * plan.segments + s) * plan.state_size, total);
  store_final(plan, stream, total);
}

template <class T, class C>
void query_task(void* context, int64_t task, char* scratch) {
  const Plan& plan = *static_cast<const Plan*>(context);
  const LinearAttention& a = *plan.attention;
  const int64_t stream = task / plan.segments, b = stream / a.heads_q, len = a.len_q(b);
  Head<T, C> head(plan, b, stream % a.heads_q, scratch);
  __builtin_memcpy(head.state(), plan.totals + stream * plan.state_size, size_t(plan.state_size) * sizeof(float));
  const Range range = segment((len + kChunk - 1) / kChunk, task % plan.segments, plan.segments);
  const auto rows_at = [&](int64_t k) { return min_of(kChunk, len - k * kChunk); };
  for (int64_t k = range.first; k < range.last; ++k) {
    Prefetch next;
    if (k + 1 < range.last) head.prefetch_queries((k + 1) * kChunk, rows_at(k + 1), next);
    head.apply_state(k * kChunk, rows_at(k), &next);
    head.store_queries(k * kChunk, rows_at(k));
  }
}

template <class T, class C>
void forward_of(const LinearAttention& a, const Pool& pool) {
  Plan plan;
  plan.attention = &a;
  plan.ldk = padded(a.head_dim);
  plan.ldv = padded(a.head_dim_v);
  plan.state_size = plan.ldk * plan.ldv + plan.ldk;
  plan.states = plan.totals = nullptr;
  const int64_t streams = a.batch * a.heads_q, kv_streams = a.batch * a.heads_kv;
  const size_t scratch = Buffers<T, C>::bytes(plan), state_bytes = size_t(plan.state_size) * sizeof(float);
  const auto states = [&](int64_t count) { return static_cast<float*>(pool.allocate(pool.self, size_t(count) * state_bytes)); };
  if (a.causal) {
    plan.segments = segments_of(streams, max_of(a.seqlen_q, a.seqlen_k), false);
    if (plan.segments > 1) {
      plan.states = states(streams * plan.segments);
      pool.run(streams * plan.segments, causal_segment_state<T, C>, &plan, scratch);
      pool.run(streams, causal_prefix, &plan, 2 * state_bytes);
    }
    return pool.run(streams * plan.segments, causal_task<T, C>, &plan, scratch);
  }
  plan.segments = segments_of(kv_streams, a.seqlen_k, true);
  plan.states = states(kv_streams * plan.segments);
  plan.totals = states(streams);
  pool.run(kv_streams * plan.segments, key_task<T, C>, &plan, scratch);
  pool.run(streams, total_task, &plan, 0);
  plan.segments = segments_of(streams, a.seqlen_q, true);
  pool.run(streams * plan.segments, query_task<T, C>, &plan, scratch);
}

}  // namespace

void linear_attention_forward(const LinearAttention& a, const Pool& pool) {
  switch (a.element) {
    case Element::float32: return forward_of<float, float>(a, pool);
    case Element::bfloat16:
#if defined(XF_BF16_DOT)
      if (!a.decay) return forward_of<bfloat16, bfloat16>(a, pool);
#endif
      return forward_of<bfloat16, float>(a, pool);
    case Element::float16: return forward_of<float16, float>(a, pool);
    case Element::boolean: return;
  }
}

}  // namespace XFORMER_FAST_ISA
}  // namespace xformer_fast
