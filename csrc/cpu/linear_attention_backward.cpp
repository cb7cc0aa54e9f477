// Linear attention, backward. With g_i = scale dO_i / den_i, h_i = -scale (dO_i . O_i) / den_i (0 if not normalised) and
// w_ij = decay^(p_i - j), dP_ij = w_ij (g_i . v_j + h_i):
//
//     dphi(q_i) = sum_j dP_ij phi(k_j)      = S_i g_i + h_i z_i          S_i, z_i as in the forward
//     dphi(k_j) = sum_i dP_ij phi(q_i)      = G_j v_j + y_j              G_j = sum_i w_ij phi(q_i) g_i^T, y_j = sum_i w_ij h_i phi(q_i)
//     dv_j      = sum_i P_ij g_i            = G_j^T phi(k_j)
//
// over i with p_i >= j. The gradient of a returned state joins G as a query at the last key would; G at the start of the
// sequence is the gradient of the initial state.
//
// Causal: two walks over chunks, each as the forward's (chunks, squares of the triangle, segments, prefix): the first goes
// forward and recomputes S, transposed, for dQ; the second goes backward and carries G for dK and dV. Not causal: S from a
// pass over the keys, dQ and G from one over the queries, dK and dV from another over the keys. Nothing per chunk is kept
// from the forward; of each row only the denominator is, and h from the first time it is met. All states and products are
// float32, for half types too. dK and dV are written once, by a task that takes all query heads of a group.
//
// The rows of the next chunk are asked for between the row chunks of the products of this one.
//
// The gradient of decay is carried along the first walk when it is asked for, by the derivative of the recurrence,
// M = dS / d log(decay): M' = decay^n (M + n S) + sum_j (n-1-j) decay^(n-1-j) phi(k_j) v_j^T. Sums of position times
// gradient, which need no M, would cancel: positions are large and distances small.
#include "linear_attention_tiles.h"

namespace xformer_fast {
namespace XFORMER_FAST_ISA {
namespace {

struct Plan {
  const LinearAttention* attention;
  const LinearAttentionGrad* grad;
  int64_t ldk, ldv;
  int64_t state_size;    // S^T [ldv][ldk], z, and M^T, its z, if the decay's gradient is wanted; or G [ldk][ldv], y
  int64_t segments;
  float* states;         // [stream][segment]
  float* totals;         // [stream], not causal
  float* row_grads;      // h of every query
  double* decay_sums;    // [stream][segment]
};

XF_INLINE int64_t kv_size(const Plan& plan) { return plan.ldk * plan.ldv; }
XF_INLINE int64_t one_state(const Plan& plan) { return kv_size(plan) + plan.ldk; }

void clear_state(float* state, int64_t size) {
  for (int64_t c = 0; c < size; c += kLanes) store(state + c, zero());
}
void merge_states(float keep, const float* more, float* state, int64_t size) {
  for (int64_t c = 0; c < size; c += kLanes) store(state + c, load(state + c) * keep + load(more + c));
}

// Where h of a head's queries begins.
float* row_grads_of(const Plan& plan, int64_t b, int64_t h) {
  const LinearAttention& a = *plan.attention;
  return plan.row_grads + (a.cu_seqlens ? h * a.cu_seqlens[a.batch] + a.cu_seqlens[b] : (b * a.heads_q + h) * a.seqlen_q);
}

void copy_state(float* to, const float* from, int64_t size) { __builtin_memcpy(to, from, size_t(size) * sizeof(float)); }

// state += kv, z of a tensor, as [head_dim][head_dim_v] or transposed.
void add_tensor_state(const Plan& plan, const float* kv, const float* z, int64_t stream, bool transposed, float* state) {
  const LinearAttention& a = *plan.attention;
  if (kv) {
    kv += stream * a.head_dim * a.head_dim_v;
    for (int64_t d = 0; d < a.head_dim; ++d)
      for (int64_t e = 0; e < a.head_dim_v; ++e)
        state[transposed ? e * plan.ldk + d : d * plan.ldv + e] += kv[d * a.head_dim_v + e];
  }
  if (z)
    for (int64_t d = 0; d < a.head_dim; ++d) state[kv_size(plan) + d] += z[stream * a.head_dim + d];
}
void store_initial_gradient(const Plan& plan, int64_t stream, const float* state) {
  const LinearAttention& a = *plan.attention;
  const LinearAttentionGrad& g = *plan.grad;
  if (!g.grad_initial_kv) return;
  for (int64_t d = 0; d < a.head_dim; ++d)
    copy_state(g.grad_initial_kv + (stream * a.head_dim + d) * a.head_dim_v, state + d * plan.ldv, a.head_dim_v);
  copy_state(g.grad_initial_z + stream * a.head_dim, state + kv_size(plan), a.head_dim);
}

// out[r][0..ld) = weights[r] * grad[r], zeros past `columns`; dots[r] = grad[r] . forward[r] (forward nullptr: not wanted).
template <class T>
XF_NOINLINE void weigh_gradients(const T* grad, int64_t grad_stride, const T* forward, int64_t forward_stride, const float* weights,
                                 int64_t rows, int64_t columns, float* out, int64_t ld, float* dots) {
  const int tail = int(columns % kLanes);
  const int64_t whole = columns - tail;
  for (int64_t r = 0; r < rows; ++r, grad += grad_stride, out += ld) {
    const Vec weight = broadcast(weights[r]);
    int64_t c = 0;
    for (; c < whole; c += kLanes) store(out + c, load(grad + c) * weight);
    if (tail) {
      store(out + c, lane_index() < broadcast_int(tail) ? load(grad + c, tail) * weight : zero());
      c += kLanes;
    }
    for (; c < ld; c += kLanes) store(out + c, zero());
    if (!forward) continue;
    Vec sum = zero();
    for (c = 0; c < whole; c += kLanes) sum += load(grad + c) * load(forward + c);
    if (tail) sum += lane_index() < broadcast_int(tail) ? load(grad + c, tail) * load(forward + c, tail) : zero();
    dots[r] = reduce_add(sum);
    forward += forward_stride;
  }
}

// Rows of one head's chunk, as both walks need them.
template <class T>
class Rows {
 public:
  Rows(const Plan& plan, int64_t b, char*& space) : plan_(plan), a_(*plan.attention), b_(b) {
    const int64_t ldk = plan.ldk, ldv = plan.ldv;
    key = take<float>(space, kChunk * ldk);
    query = take<float>(space, kChunk * ldk);
    grad_phi = take<float>(space, kChunk * ldk);
    weighted_key = take<float>(space, kChunk * ldk);
    query_packed = take<float>(space, kChunk * ldk);
    value_copy = take<float>(space, kChunk * ldv);
    grad = take<float>(space, kChunk * ldv);
    weighted_grad = take<float>(space, kChunk * ldv);
    weighted_value = take<float>(space, kChunk * ldv);
    grad_packed = take<float>(space, kChunk * ldv);
    probabilities = take<float>(space, kChunk * kChunk);
    grad_tile = take<float>(space, kChunk * kChunk);
    row_grad = take<float>(space, kChunk + kPad);
    weighted_row_grad = take<float>(space, kChunk + kPad);
    dots = take<float>(space, kChunk + kPad);
    weights = take<float>(space, kChunk + kPad);
  }
  static int64_t bytes(const Plan& plan) {
    return int64_t(sizeof(float)) * (kChunk * (5 * (plan.ldk + plan.ldv) + 2 * kChunk + 4) + 4 * kPad) + 32 * 64;
  }

  void load_keys(int64_t kv_head, int64_t key0, int64_t rows) {
    const int64_t row = a_.row0(b_) + key0;
    map_rows(a_.map, row_of<T>(a_.key, b_, kv_head, row), a_.key.row, rows, a_.head_dim, key, plan_.ldk);
    const T* in = row_of<T>(a_.value, b_, kv_head, row);
    if (sizeof(T) == sizeof(float) && a_.head_dim_v == plan_.ldv) {
      value = reinterpret_cast<const float*>(in), value_ld = a_.value.row;
      return;
    }
    map_rows_of<FeatureMap::identity>(in, a_.value.row, rows, a_.head_dim_v, value_copy, plan_.ldv);
    value = value_copy, value_ld = plan_.ldv;
  }

  // phi(Q), g and h, worked out or as an earlier pass left it; with decay also g and h times what the state before the chunk
  // has left at each row.
  enum class RowGrads { compute, recall };
  void load_queries(int64_t head, int64_t query0, int64_t rows, const Decay& decay, RowGrads how) {
    const int64_t row = a_.row0(b_) + query0;
    const View& grad_out = plan_.grad->grad_out;
    map_rows(a_.map, row_of<T>(a_.query, b_, head, row), a_.query.row, rows, a_.head_dim, query, plan_.ldk);
    const float* denominators = a_.denominator + b_ * a_.denominator_batch + head * a_.denominator_head + row;
    for (int64_t i = 0; i < rows; ++i) weights[i] = denominators[i] == 0.f ? 0.f : a_.scale / denominators[i];
    float* kept = row_grads_of(plan_, b_, head) + query0;
    const bool dots_wanted = a_.normalize && how == RowGrads::compute;
    weigh_gradients(row_of<T>(grad_out, b_, head, row), grad_out.row, dots_wanted ? row_of<T>(a_.out, b_, head, row) : nullptr,
                    a_.out.row, weights, rows, a_.head_dim_v, grad, plan_.ldv, dots);
    for (int64_t i = 0; dots_wanted && i < rows; ++i) kept[i] = -weights[i] * dots[i];
    for (int64_t i = 0; i < round_up(rows, kPad); ++i) row_grad[i] = a_.normalize && i < rows ? kept[i] : 0.f;
    carried_grad = grad, carried_row_grad = row_grad;
    if (!decay.active) return;
    weigh_rows(grad, plan_.ldv, decay.up, rows, plan_.ldv, weighted_grad, plan_.ldv);
    for (int64_t i = 0; i < rows; ++i) weighted_row_grad[i] = row_grad[i] * decay.up[i];
    carried_grad = weighted_grad, carried_row_grad = weighted_row_grad;
  }

  void prefetch_keys(int64_t kv_head, int64_t key0, int64_t rows, Prefetch& ahead) const {
    const int64_t row = a_.row0(b_) + key0;
    ahead.add(row_of<T>(a_.key, b_, kv_head, row), a_.key.row, rows, a_.head_dim);
    ahead.add(row_of<T>(a_.value, b_, kv_head, row), a_.value.row, rows, a_.head_dim_v);
  }
  void prefetch_queries(int64_t head, int64_t query0, int64_t rows, RowGrads how, Prefetch& ahead) const {
    const int64_t row = a_.row0(b_) + query0;
    const View& grad_out = plan_.grad->grad_out;
    ahead.add(row_of<T>(a_.query, b_, head, row), a_.query.row, rows, a_.head_dim);
    ahead.add(row_of<T>(grad_out, b_, head, row), grad_out.row, rows, a_.head_dim_v);
    if (a_.normalize && how == RowGrads::compute) ahead.add(row_of<T>(a_.out, b_, head, row), a_.out.row, rows, a_.head_dim_v);
  }

  // G += phi(Q)^T g, y likewise, of the queries that load_queries left.
  void add_queries(int64_t rows, float* state, Prefetch* ahead) const {
    add_rows(query, plan_.ldk, carried_row_grad, rows, plan_.ldk, 1.f, state + kv_size(plan_));
    multiply(a_.head_dim, plan_.ldv, rows, query, 1, plan_.ldk, carried_grad, plan_.ldv, state, plan_.ldv, Start::accumulate,
             nullptr, ahead);
  }

  void make_grad_tile(int64_t rows, const Decay& decay) {
    pack_transposed(grad, plan_.ldv, rows, plan_.ldv, 1.f, grad_packed, kChunk);
    causal_products(rows, a_.head_dim_v, value, value_ld, grad_packed, grad_tile);
    finish_causal_tile(grad_tile, rows, decay, row_grad, nullptr);
  }
  void make_products(int64_t rows) {
    pack_transposed(query, plan_.ldk, rows, plan_.ldk, 1.f, query_packed, kChunk);
    causal_products(rows, a_.head_dim, key, plan_.ldk, query_packed, probabilities);
  }

  float *key, *query, *grad_phi, *weighted_key;                       // [kChunk][ldk]
  float *value_copy, *grad, *weighted_grad, *weighted_value;          // [kChunk][ldv]
  float *query_packed, *grad_packed, *probabilities, *grad_tile;
  float *row_grad, *weighted_row_grad, *dots, *weights;
  const float* value = nullptr;
  int64_t value_ld = 0;
  const float *carried_grad = nullptr, *carried_row_grad = nullptr;

 private:
  const Plan& plan_;
  const LinearAttention& a_;
  const int64_t b_;
};

struct Range { int64_t first, last; };
XF_INLINE Range segment(int64_t count, int64_t index, int64_t segments) {
  return {count * index / segments, count * (index + 1) / segments};
}
XF_INLINE int64_t rows_at(int64_t k, int64_t length) { return min_of(kChunk, length - k * kChunk); }

// ---- dQ: the state S^T, walked forward ----

template <class T>
struct QueryWalk {
  const Plan& plan;
  const LinearAttention& a;
  const int64_t b, head;
  float* state;
  Rows<T> x;
  Decay decay;
  double decay_sum = 0.;

  QueryWalk(const Plan& p, int64_t batch, int64_t h, char* scratch)
      : plan(p), a(*p.attention), b(batch), head(h), state(take<float>(scratch, p.state_size)), x(p, batch, scratch) {
    decay.start(a, h);
  }
  static size_t scratch_bytes(const Plan& plan) {
    return size_t(plan.state_size) * sizeof(float) + 64 + size_t(Rows<T>::bytes(plan));
  }
  int64_t kv_head() const { return head / (a.heads_q / a.heads_kv); }
  void prefetch_keys(const Chunk& chunk, Prefetch& ahead) const {
    if (chunk.keys) x.prefetch_keys(kv_head(), chunk.position, chunk.rows, ahead);
  }
  bool wants_decay() const { return plan.grad->grad_decay != nullptr; }
  float* moment() const { return state + one_state(plan); }

  // M += n S, before the state is carried on by n positions.
  void age_moment(int64_t n) {
    float* m = moment();
    for (int64_t c = 0; c < one_state(plan); c += kLanes) store(m + c, load(state + c) * float(n) + load(m + c));
  }
  void carry(int64_t rows) {
    if (!decay.active) return;
    if (wants_decay()) age_moment(rows);
    for (int64_t c = 0; c < plan.state_size; c += kLanes) store(state + c, load(state + c) * decay.power[rows]);
  }
  void add_weighted(const float* weights, int64_t rows, float* to, Prefetch* ahead) {
    const float* operand = x.key;
    if (weights) weigh_rows(x.key, plan.ldk, weights, rows, plan.ldk, x.weighted_key, plan.ldk), operand = x.weighted_key;
    add_rows(x.key, plan.ldk, weights, rows, plan.ldk, 1.f, to + kv_size(plan));
    multiply(a.head_dim_v, plan.ldk, rows, x.value, 1, x.value_ld, operand, plan.ldk, to, plan.ldk, Start::accumulate,
             nullptr, ahead);
  }
  void add_keys(int64_t rows, Prefetch* ahead) {
    carry(rows);
    add_weighted(decay.active ? decay.down : nullptr, rows, state, ahead);
    if (!wants_decay()) return;
    for (int64_t j = 0; j < rows; ++j) x.weights[j] = decay.down[j] * float(rows - 1 - j);
    add_weighted(x.weights, rows, moment(), nullptr);
  }
  void apply(const float* from, int64_t rows, float* to, Prefetch* ahead) {
    multiply(rows, plan.ldk, a.head_dim_v, x.carried_grad, plan.ldv, 1, from, plan.ldk, to, plan.ldk, Start::overwrite, nullptr,
             ahead);
    add_outer(x.carried_row_grad, from + kv_size(plan), rows, plan.ldk, to, plan.ldk);
  }
  void apply_state(int64_t query0, const Chunk& chunk, Prefetch* ahead) {
    const int64_t rows = chunk.rows;
    x.load_queries(head, query0, rows, decay, Rows<T>::RowGrads::compute);
    if (wants_decay()) {
      apply(moment(), rows, x.grad_phi, nullptr);
      row_dots(x.query, plan.ldk, x.grad_phi, plan.ldk, rows, plan.ldk, x.dots);
      for (int64_t i = 0; i < rows; ++i) decay_sum += x.dots[i];
    }
    apply(state, rows, x.grad_phi, ahead);
    if (wants_decay()) {
      row_dots(x.query, plan.ldk, x.grad_phi, plan.ldk, rows, plan.ldk, x.dots);
      for (int64_t i = 0; i < rows; ++i) decay_sum += double(chunk.first + i) * double(x.dots[i]);
    }
  }
  void attend(int64_t rows) {
    x.make_grad_tile(rows, decay);
    for (int64_t i = 0; i < rows; i += kPad)
      multiply(min_of(kPad, rows - i), plan.ldk, min_of(rows, i + kPad), x.grad_tile + i, 1, kChunk, x.key, plan.ldk,
               x.grad_phi + i * plan.ldk, plan.ldk, Start::accumulate);
    if (!wants_decay()) return;
    x.make_products(rows);
    for (int64_t j = 0; j < rows; ++j) {
      Vec sum = zero();
      for (int64_t i0 = j / kPad * kPad; i0 < rows; i0 += kLanes) {
        const Vec t = load(x.probabilities + j * kChunk + i0) * load(x.grad_tile + j * kChunk + i0);
        const IVec lane = lane_index() + int32_t(i0);
        sum += (lane > int32_t(j)) & (lane < int32_t(rows)) ? t * to_float(lane - int32_t(j)) : zero();
      }
      decay_sum += double(reduce_add(sum));
    }
  }
  void store_gradient(int64_t query0, int64_t rows) {
    const int64_t row = a.row0(b) + query0;
    const View& out = plan.grad->grad_query;
    pull_back_rows(a.map, row_of<T>(a.query, b, head, row), a.query.row, rows, a.head_dim, x.query, x.grad_phi, plan.ldk,
                   row_of<T>(out, b, head, row), out.row);
  }
  void meet_final_state(int64_t stream) {
    if (!wants_decay() || !plan.grad->grad_final_kv) return;
    const float* kv = plan.grad->grad_final_kv + stream * a.head_dim * a.head_dim_v;
    for (int64_t d = 0; d < a.head_dim; ++d)
      for (int64_t e = 0; e < a.head_dim_v; ++e) decay_sum += double(kv[d * a.head_dim_v + e]) * double(moment()[e * plan.ldk + d]);
    for (int64_t d = 0; plan.grad->grad_final_z && d < a.head_dim; ++d)
      decay_sum += double(plan.grad->grad_final_z[stream * a.head_dim + d]) * double(moment()[kv_size(plan) + d]);
  }
};

template <class T>
void query_segment_state(void* context, int64_t task, char* scratch) {
  const Plan& plan = *static_cast<const Plan*>(context);
  const LinearAttention& a = *plan.attention;
  const int64_t stream = task / plan.segments, b = stream / a.heads_q, h = stream % a.heads_q;
  QueryWalk<T> run(plan, b, h, scratch);
  const Walk walk(a, b);
  const Range range = segment(walk.count, task % plan.segments, plan.segments);
  clear_state(run.state, plan.state_size);
  for (int64_t k = range.first; k < range.last; ++k) {
    const Chunk chunk = walk[k];
    if (chunk.position < 0) continue;
    run.decay.weigh(chunk.rows, chunk.first);
    if (chunk.keys) {
      Prefetch keys;
      if (k + 1 < range.last) run.prefetch_keys(walk[k + 1], keys);
      run.x.load_keys(run.kv_head(), chunk.position, chunk.rows);
      run.add_keys(chunk.rows, &keys);
    } else {
      run.carry(chunk.rows);
    }
  }
  copy_state(plan.states + task * plan.state_size, run.state, plan.state_size);
}

void query_prefix(void* context, int64_t stream, char* scratch) {
  const Plan& plan = *static_cast<const Plan*>(context);
  const LinearAttention& a = *plan.attention;
  const Walk walk(a, stream / a.heads_q);
  Decay decay;
  decay.start(a, stream % a.heads_q);
  float* run = reinterpret_cast<float*>(scratch);
  float* next = run + plan.state_size;
  clear_state(run, plan.state_size);
  add_tensor_state(plan, a.initial_kv, a.initial_z, stream, true, run);
  for (int64_t s = 0; s < plan.segments; ++s) {
    const Range range = segment(walk.count, s, plan.segments);
    float* mine = plan.states + (stream * plan.segments + s) * plan.state_size;
    copy_state(next, mine, plan.state_size);
    copy_state(mine, run, plan.state_size);
    const int64_t rows = max_of(0, walk.end_position(range.last)) - max_of(0, walk.end_position(range.first));
    if (plan.grad->grad_decay) {
      float* moment = run + one_state(plan);
      for (int64_t c = 0; c < one_state(plan); c += kLanes) store(moment + c, load(run + c) * float(rows) + load(moment + c));
    }
    merge_states(decay.active ? decay.at(rows) : 1.f, next, run, plan.state_size);
  }
}

template <class T>
void query_walk_task(void* context, int64_t task, char* scratch) {
  const Plan& plan = *static_cast<const Plan*>(context);
  const LinearAttention& a = *plan.attention;
  const int64_t stream = task / plan.segments, b = stream / a.heads_q, h = stream % a.heads_q;
  QueryWalk<T> run(plan, b, h, scratch);
  const Walk walk(a, b);
  const Range range = segment(walk.count, task % plan.segments, plan.segments);
  if (plan.segments == 1) {
    clear_state(run.state, plan.state_size);
    add_tensor_state(plan, a.initial_kv, a.initial_z, stream, true, run.state);
  } else {
    copy_state(run.state, plan.states + task * plan.state_size, plan.state_size);
  }
  for (int64_t k = range.first; k < range.last; ++k) {
    const Chunk chunk = walk[k];
    if (chunk.position == walk.limit) run.meet_final_state(stream);
    run.decay.weigh(chunk.rows, chunk.first);
    Prefetch queries, keys;
    if (k + 1 < range.last) {
      const Chunk next = walk[k + 1];
      run.prefetch_keys(next, keys);
      if (next.queries) run.x.prefetch_queries(h, next.position - walk.shift, next.rows, Rows<T>::RowGrads::compute, queries);
    }
    if (chunk.keys) run.x.load_keys(run.kv_head(), chunk.position, chunk.rows);
    if (chunk.queries) {
      const int64_t query0 = chunk.position - walk.shift;
      run.apply_state(query0, chunk, &queries);
      if (chunk.keys) run.attend(chunk.rows);
      run.store_gradient(query0, chunk.rows);
    }
    if (chunk.keys)
      run.add_keys(chunk.rows, &keys);
    else if (chunk.position >= 0)
      run.carry(chunk.rows);
  }
  if ((task + 1) % plan.segments == 0 && walk.end_position(walk.count) == walk.limit) run.meet_final_state(stream);
  if (plan.grad->grad_decay) plan.decay_sums[task] = run.decay_sum;
}

// ---- dK, dV: the state G, walked backward ----

template <class T>
struct KeyWalk {
  const Plan& plan;
  const LinearAttention& a;
  const int64_t b, kv_head, group;
  float* states;      // [group] of G, y
  float* transposed;  // G^T [ldv][ldk]
  float* grad_value;  // [kChunk][ldv]
  Decay* decays;      // [group]
  Rows<T> x;

  KeyWalk(const Plan& p, int64_t batch, int64_t h, char* scratch)
      : plan(p), a(*p.attention), b(batch), kv_head(h), group(a.heads_q / a.heads_kv),
        states(take<float>(scratch, group * p.state_size)), transposed(take<float>(scratch, kv_size(p))),
        grad_value(take<float>(scratch, kChunk * p.ldv)), decays(take<Decay>(scratch, group)), x(p, batch, scratch) {
    for (int64_t i = 0; i < group; ++i) decays[i].start(a, h * group + i);
  }
  static size_t scratch_bytes(const Plan& plan) {
    const LinearAttention& a = *plan.attention;
    const int64_t group = a.heads_q / max_of(1, a.heads_kv), floats = group * plan.state_size + kv_size(plan) + kChunk * plan.ldv;
    return size_t(floats) * sizeof(float) + size_t(group) * sizeof(Decay) + 4 * 64 + size_t(Rows<T>::bytes(plan));
  }

  // dphi(K) and dV of the loaded keys from G of one head of the group; the first overwrites.
  void apply_state(const float* state, const Decay& decay, int64_t rows, bool first, Prefetch* ahead) {
    const float *key = x.key, *value = x.value;
    int64_t value_ld = x.value_ld;
    if (decay.active) {
      weigh_rows(x.key, plan.ldk, decay.down, rows, plan.ldk, x.weighted_key, plan.ldk);
      weigh_rows(x.value, x.value_ld, decay.down, rows, plan.ldv, x.weighted_value, plan.ldv);
      key = x.weighted_key, value = x.weighted_value, value_ld = plan.ldv;
    }
    const Start start = first ? Start::overwrite : Start::accumulate;
    multiply(rows, plan.ldk, a.head_dim_v, value, value_ld, 1, transposed, plan.ldk, x.grad_phi, plan.ldk, start,
             nullptr, ahead);
    add_outer(decay.active ? decay.down : nullptr, state + kv_size(plan), rows, plan.ldk, x.grad_phi, plan.ldk);
    multiply(rows, plan.ldv, a.head_dim, key, plan.ldk, 1, state, plan.ldv, grad_value, plan.ldv, start);
  }
  void transpose_state(const float* state) {
    pack_transposed(state, plan.ldv, plan.ldk, plan.ldv, 1.f, transposed, plan.ldk);
  }
  void attend(const Decay& decay, int64_t rows) {
    x.make_products(rows);
    finish_causal_tile(x.probabilities, rows, decay, nullptr, nullptr);
    x.make_grad_tile(rows, decay);
    for (int64_t j = 0; j < rows; j += kPad) {
      const int64_t n = min_of(kPad, rows - j), at = j * kChunk + j;
      multiply(n, plan.ldk, rows - j, x.grad_tile + at, kChunk, 1, x.query + j * plan.ldk, plan.ldk,
               x.grad_phi + j * plan.ldk, plan.ldk, Start::accumulate);
      multiply(n, plan.ldv, rows - j, x.probabilities + at, kChunk, 1, x.grad + j * plan.ldv, plan.ldv,
               grad_value + j * plan.ldv, plan.ldv, Start::accumulate);
    }
  }
  void store_gradients(int64_t key0, int64_t rows) {
    const int64_t row = a.row0(b) + key0;
    const View &out = plan.grad->grad_key, &out_v = plan.grad->grad_value;
    pull_back_rows(a.map, row_of<T>(a.key, b, kv_head, row), a.key.row, rows, a.head_dim, x.key, x.grad_phi, plan.ldk,
                   row_of<T>(out, b, kv_head, row), out.row);
    store_rows(grad_value, plan.ldv, nullptr, rows, a.head_dim_v, row_of<T>(out_v, b, kv_head, row), out_v.row);
  }
  void clear_gradients(int64_t key0, int64_t end) {
    const View &out = plan.grad->grad_key, &out_v = plan.grad->grad_value;
    for (int64_t j = a.row0(b) + key0; j < a.row0(b) + end; ++j) {
      __builtin_memset(static_cast<void*>(row_of<T>(out, b, kv_head, j)), 0, size_t(a.head_dim) * sizeof(T));
      __builtin_memset(static_cast<void*>(row_of<T>(out_v, b, kv_head, j)), 0, size_t(a.head_dim_v) * sizeof(T));
    }
  }
  void add_final(int64_t i) {
    add_tensor_state(plan, plan.grad->grad_final_kv, plan.grad->grad_final_z, stream(i), false, states + i * plan.state_size);
  }
  int64_t stream(int64_t i) const { return b * a.heads_q + kv_head * group + i; }

  // Chunk k of the walk, all heads of the group; the one before it is the next. `outputs`: also dK and dV, not the state alone.
  void step(const Walk& walk, int64_t k, int64_t first, bool outputs) {
    const Chunk chunk = walk[k], next = k > first ? walk[k - 1] : Chunk{};
    Prefetch keys;
    if (outputs && next.keys) x.prefetch_keys(kv_head, next.position, next.rows, keys);
    if (outputs && chunk.keys) x.load_keys(kv_head, chunk.position, chunk.rows);
    for (int64_t i = 0; i < group; ++i) {
      Prefetch queries;
      const Chunk& then = i + 1 < group ? chunk : next;
      if (then.queries)
        x.prefetch_queries(kv_head * group + (i + 1) % group, then.position - walk.shift, then.rows, Rows<T>::RowGrads::recall, queries);
      head_step(i, walk, chunk, outputs, i == 0 ? &keys : nullptr, &queries);
    }
  }
  void head_step(int64_t i, const Walk& walk, const Chunk& chunk, bool outputs, Prefetch* next_keys, Prefetch* next_queries) {
    float* state = states + i * plan.state_size;
    Decay& decay = decays[i];
    decay.weigh(chunk.rows, chunk.first);
    if (chunk.keys && chunk.position + chunk.rows == walk.limit) add_final(i);
    if (chunk.queries)
      x.load_queries(kv_head * group + i, chunk.position - walk.shift, chunk.rows, decay, Rows<T>::RowGrads::recall);
    if (outputs && chunk.keys) {
      transpose_state(state);
      apply_state(state, decay, chunk.rows, i == 0, next_keys);
      if (chunk.queries) attend(decay, chunk.rows);
    }
    if (decay.active && chunk.position >= 0)
      for (int64_t c = 0; c < plan.state_size; c += kLanes) store(state + c, load(state + c) * decay.power[chunk.rows]);
    if (chunk.queries) x.add_queries(chunk.rows, state, next_queries);
  }
};

template <class T>
void key_segment_state(void* context, int64_t task, char* scratch) {
  const Plan& plan = *static_cast<const Plan*>(context);
  const LinearAttention& a = *plan.attention;
  const int64_t kv_stream = task / plan.segments, s = task % plan.segments, b = kv_stream / a.heads_kv;
  KeyWalk<T> run(plan, b, kv_stream % a.heads_kv, scratch);
  const Walk walk(a, b);
  const Range range = segment(walk.count, s, plan.segments);
  clear_state(run.states, run.group * plan.state_size);
  for (int64_t k = range.last - 1; k >= range.first; --k) run.step(walk, k, range.first, false);
  for (int64_t i = 0; i < run.group; ++i)
    copy_state(plan.states + (run.stream(i) * plan.segments + s) * plan.state_size, run.states + i * plan.state_size, plan.state_size);
}

void key_prefix(void* context, int64_t stream, char* scratch) {
  const Plan& plan = *static_cast<const Plan*>(context);
  const LinearAttention& a = *plan.attention;
  const Walk walk(a, stream / a.heads_q);
  Decay decay;
  decay.start(a, stream % a.heads_q);
  float* run = reinterpret_cast<float*>(scratch);
  float* next = run + plan.state_size;
  clear_state(run, plan.state_size);
  for (int64_t s = plan.segments - 1; s >= 0; --s) {
    const Range range = segment(walk.count, s, plan.segments);
    float* mine = plan.states + (stream * plan.segments + s) * plan.state_size;
    copy_state(next, mine, plan.state_size);
    copy_state(mine, run, plan.state_size);
    const int64_t rows = max_of(0, walk.end_position(range.last)) - max_of(0, walk.end_position(range.first));
    merge_states(decay.active ? decay.at(rows) : 1.f, next, run, plan.state_size);
  }
}

template <class T>
void key_walk_task(void* context, int64_t task, char* scratch) {
  const Plan& plan = *static_cast<const Plan*>(context);
  const LinearAttention& a = *plan.attention;
  const int64_t kv_stream = task / plan.segments, s = task % plan.segments, b = kv_stream / a.heads_kv;
  KeyWalk<T> run(plan, b, kv_stream % a.heads_kv, scratch);
  const Walk walk(a, b);
  const Range range = segment(walk.count, s, plan.segments);
  clear_state(run.states, run.group * plan.state_size);
  for (int64_t i = 0; plan.segments > 1 && i < run.group; ++i)
    copy_state(run.states + i * plan.state_size, plan.states + (run.stream(i) * plan.segments + s) * plan.state_size, plan.state_size);
  for (int64_t k = range.last - 1; k >= range.first; --k) {
    const Chunk chunk = walk[k];
    run.step(walk, k, range.first, true);
    if (chunk.keys)
      run.store_gradients(chunk.position, chunk.rows);
    else if (chunk.position >= 0)
      run.clear_gradients(chunk.position, chunk.position + chunk.rows);
  }
  for (int64_t i = 0; s == 0 && i < run.group; ++i) {
    if (walk.limit == 0) run.add_final(i);
    store_initial_gradient(plan, run.stream(i), run.states + i * plan.state_size);
  }
}

// ---- not causal: S whole; dQ and G; dK and dV ----

template <class T>
void key_sum_task(void* context, int64_t task, char* scratch) {
  const Plan& plan = *static_cast<const Plan*>(context);
  const LinearAttention& a = *plan.attention;
  const int64_t kv_stream = task / plan.segments, b = kv_stream / a.heads_kv, kv_head = kv_stream % a.heads_kv;
  QueryWalk<T> run(plan, b, kv_head * (a.heads_q / a.heads_kv), scratch);
  const int64_t limit = a.key_limit(b);
  const Range range = segment((limit + kChunk - 1) / kChunk, task % plan.segments, plan.segments);
  clear_state(run.state, plan.state_size);
  for (int64_t k = range.first; k < range.last; ++k) {
    Prefetch next;
    if (k + 1 < range.last) run.x.prefetch_keys(kv_head, (k + 1) * kChunk, rows_at(k + 1, limit), next);
    run.x.load_keys(kv_head, k * kChunk, rows_at(k, limit));
    run.add_keys(rows_at(k, limit), &next);
  }
  copy_state(plan.states + task * plan.state_size, run.state, plan.state_size);
}

void key_total(void* context, int64_t stream, char*) {
  const Plan& plan = *static_cast<const Plan*>(context);
  const LinearAttention& a = *plan.attention;
  const int64_t kv_stream = stream / (a.heads_q / a.heads_kv);
  float* total = plan.totals + stream * plan.state_size;
  clear_state(total, plan.state_size);
  add_tensor_state(plan, a.initial_kv, a.initial_z, stream, true, total);
  for (int64_t s = 0; s < plan.segments; ++s)
    merge_states(1.f, plan.states + (kv_stream * plan.segments + s) * plan.state_size, total, plan.state_size);
}

template <class T>
void query_task(void* context, int64_t task, char* scratch) {
  const Plan& plan = *static_cast<const Plan*>(context);
  const LinearAttention& a = *plan.attention;
  const int64_t stream = task / plan.segments, b = stream / a.heads_q, h = stream % a.heads_q, len = a.len_q(b);
  float* grad_state = take<float>(scratch, plan.state_size);
  QueryWalk<T> run(plan, b, h, scratch);
  clear_state(grad_state, plan.state_size);
  copy_state(run.state, plan.totals + stream * plan.state_size, plan.state_size);
  const Range range = segment((len + kChunk - 1) / kChunk, task % plan.segments, plan.segments);
  for (int64_t k = range.first; k < range.last; ++k) {
    const int64_t rows = rows_at(k, len);
    Prefetch next;
    if (k + 1 < range.last)
      run.x.prefetch_queries(h, (k + 1) * kChunk, rows_at(k + 1, len), Rows<T>::RowGrads::compute, next);
    run.apply_state(k * kChunk, {k * kChunk, rows, false, true, 1}, &next);
    run.x.add_queries(rows, grad_state, nullptr);
    run.store_gradient(k * kChunk, rows);
  }
  copy_state(plan.states + task * plan.state_size, grad_state, plan.state_size);
}

// G of every head is the gradient of its initial state; their sum over the group is what its keys meet.
void query_total(void* context, int64_t kv_stream, char* scratch) {
  const Plan& plan = *static_cast<const Plan*>(context);
  const LinearAttention& a = *plan.attention;
  const int64_t group = a.heads_q / a.heads_kv;
  float* mine = reinterpret_cast<float*>(scratch);
  float* total = plan.totals + kv_stream * plan.state_size;
  clear_state(total, plan.state_size);
  for (int64_t stream = kv_stream * group; stream < (kv_stream + 1) * group; ++stream) {
    clear_state(mine, plan.state_size);
    add_tensor_state(plan, plan.grad->grad_final_kv, plan.grad->grad_final_z, stream, false, mine);
    for (int64_t s = 0; s < plan.segments; ++s)
      merge_states(1.f, plan.states + (stream * plan.segments + s) * plan.state_size, mine, plan.state_size);
    store_initial_gradient(plan, stream, mine);
    merge_states(1.f, mine, total, plan.state_size);
  }
}

template <class T>
void key_task(void* context, int64_t task, char* scratch) {
  const Plan& plan = *static_cast<const Plan*>(context);
  const LinearAttention& a = *plan.attention;
  const int64_t kv_stream = task / plan.segments, s = task % plan.segments, b = kv_stream / a.heads_kv, limit = a.key_limit(b);
  KeyWalk<T> run(plan, b, kv_stream % a.heads_kv, scratch);
  const float* total = plan.totals + kv_stream * plan.state_size;
  run.transpose_state(total);
  const Range range = segment((limit + kChunk - 1) / kChunk, s, plan.segments);
  for (int64_t k = range.first; k < range.last; ++k) {
    Prefetch next;
    if (k + 1 < range.last) run.x.prefetch_keys(run.kv_head, (k + 1) * kChunk, rows_at(k + 1, limit), next);
    run.x.load_keys(run.kv_head, k * kChunk, rows_at(k, limit));
    run.apply_state(total, run.decays[0], rows_at(k, limit), true, &next);
    run.store_gradients(k * kChunk, rows_at(k, limit));
  }
  if (s + 1 == plan.segments) run.clear_gradients(limit, a.len_k(b));
}

template <class T>
void backward_of(const LinearAttention& a, const LinearAttentionGrad& g, const Pool& pool) {
  Plan plan;
  plan.attention = &a;
  plan.grad = &g;
  plan.ldk = padded(a.head_dim);
  plan.ldv = padded(a.head_dim_v);
  plan.states = plan.totals = nullptr;
  plan.decay_sums = nullptr;
  const int64_t streams = a.batch * a.heads_q, kv_streams = a.batch * a.heads_kv;
  const int64_t queries = a.cu_seqlens ? a.heads_q * a.cu_seqlens[a.batch] : streams * a.seqlen_q;
  plan.row_grads = static_cast<float*>(pool.allocate(pool.self, size_t(queries) * sizeof(float)));
  const auto space = [&](int64_t states) {
    return static_cast<float*>(pool.allocate(pool.self, size_t(states * plan.state_size) * sizeof(float)));
  };
  const auto state_bytes = [&] { return size_t(plan.state_size) * sizeof(float); };
  const int64_t longest = max_of(a.seqlen_q, a.seqlen_k);

  plan.state_size = one_state(plan) * (g.grad_decay ? 2 : 1);
  if (a.causal) {
    plan.segments = segments_of(streams, longest, false);
    plan.decay_sums = static_cast<double*>(pool.allocate(pool.self, size_t(streams * plan.segments) * sizeof(double)));
    if (plan.segments > 1) {
      plan.states = space(streams * plan.segments);
      pool.run(streams * plan.segments, query_segment_state<T>, &plan, QueryWalk<T>::scratch_bytes(plan));
      pool.run(streams, query_prefix, &plan, 2 * state_bytes());
    }
    pool.run(streams * plan.segments, query_walk_task<T>, &plan, QueryWalk<T>::scratch_bytes(plan));
    for (int64_t stream = 0; g.grad_decay && stream < streams; ++stream) {
      double sum = 0.;
      for (int64_t s = 0; s < plan.segments; ++s) sum += plan.decay_sums[stream * plan.segments + s];
      g.grad_decay[stream] = float(sum / double(a.decay[stream % a.heads_q]));
    }
    plan.state_size = one_state(plan);
    plan.segments = segments_of(kv_streams, longest, false);
    if (plan.segments > 1) {
      plan.states = space(streams * plan.segments);
      pool.run(kv_streams * plan.segments, key_segment_state<T>, &plan, KeyWalk<T>::scratch_bytes(plan));
      pool.run(streams, key_prefix, &plan, 2 * state_bytes());
    }
    return pool.run(kv_streams * plan.segments, key_walk_task<T>, &plan, KeyWalk<T>::scratch_bytes(plan));
  }

  plan.segments = segments_of(kv_streams, a.seqlen_k, true);
  plan.states = space(kv_streams * plan.segments);
  plan.totals = space(streams);
  pool.run(kv_streams * plan.segments, key_sum_task<T>, &plan, QueryWalk<T>::scratch_bytes(plan));
  pool.run(streams, key_total, &plan, 0);
  plan.segments = segments_of(streams, a.seqlen_q, true);
  plan.states = space(streams * plan.segments);
  pool.run(streams * plan.segments, query_task<T>, &plan, state_bytes() + 64 + QueryWalk<T>::scratch_bytes(plan));
  pool.run(kv_streams, query_total, &plan, state_bytes());
  plan.segments = segments_of(kv_streams, a.seqlen_k, true);
  pool.run(kv_streams * plan.segments, key_task<T>, &plan, KeyWalk<T>::scratch_bytes(plan));
}

}  // namespace

void linear_attention_backward(const LinearAttention& a, const LinearAttentionGrad& g, const Pool& pool) {
  switch (a.element) {
    case Element::float32: return backward_of<float>(a, g, pool);
    case Element::bfloat16: return backward_of<bfloat16>(a, g, pool);
    case Element::float16: return backward_of<float16>(a, g, pool);
    case Element::boolean: return;
  }
}

}  // namespace XFORMER_FAST_ISA
}  // namespace xformer_fast
