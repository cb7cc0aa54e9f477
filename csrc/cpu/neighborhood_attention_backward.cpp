// Neighborhood attention, backward. With the exponents and P recomputed from q, k and the bias (nothing but the inputs is
// kept from the forward):
//     dP = dO V^T      dS = P (dP - rowsum(P dP))      dV = P^T dO      dQ = scale dS K      dK = scale dS^T Q      dbias = sum dS
//
// Two runs over the pool, tiled as the forward (neighborhood_tiles.h), so that no gradient of a row is shared by tasks:
//   1. queries in the lanes, their keys the rows: dQ, and three numbers a query for the second run: the maximum of its
//      exponents, the inverse of its sum, and rowsum(P dP).
//   2. keys in the lanes, the queries that see them the rows (again a box: along each axis an interval), over the heads of
//      the group: dK and dV.
// All seven products have the form of the forward's two: rows of scratch, read as they are or transposed, by lanes.
//
// The gradient of the table is summed over a task in the layout of the dense bias, then by rows of the table, then over
// tasks in order: the same bits for any number of threads.
//
// Not here: products of bfloat16 pairs; queries of one group in scratch at once (each head's are copied for each strip).
#include "neighborhood_tiles.h"

namespace xformer_fast {
namespace XFORMER_FAST_ISA {
namespace {

constexpr int64_t kStatistics = 3;  // of a query: maximum, inverse of the sum, rowsum(P dP)

struct BackwardPlan : NeighborhoodPlan {
  NeighborhoodAttentionGrad grad;
  const float *key_bias, *query_bias;  // dense, for rows that are keys and for rows that are queries
  MapView statistics;
  float* table_sums;  // [chunk][head][row of the table], null: not wanted
};

// ---- 1. queries ----

// From weights (not normalised) and dP of a tile: dS, in place of dP, and its sums by distance.
template <int V>
XF_NOINLINE void score_gradients_of(const ScoreRows rows, const float* weights, float* grads, const float* inverse,
                                    float* delta, float* bias_sums) {
  constexpr int64_t lanes = V * kLanes;
  const int64_t count = rows.count();
  Vec factor[V], sum[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) factor[v] = load(inverse + v * kLanes), sum[v] = zero();
  for (int64_t r = 0; r < count; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[v] += load(weights + r * lanes + v * kLanes) * load(grads + r * lanes + v * kLanes);
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) sum[v] *= factor[v], store(delta + v * kLanes, sum[v]);
  for (int64_t c = 0; c < rows.columns; ++c)
    for (int64_t s = 0; s < rows.lines; ++s, weights += lanes, grads += lanes) {
      float* sums = bias_sums ? bias_sums + rows.bias_column + c * lanes + rows.line_bias[s] : nullptr;
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const Vec ds = load(weights + v * kLanes) * factor[v] * (load(grads + v * kLanes) - sum[v]);
        if (bias_sums) store(sums + v * kLanes, load(sums + v * kLanes) + ds);
        store(grads + v * kLanes, ds);
      }
    }
}

void score_gradients(int vectors, const ScoreRows& rows, const float* weights, float* grads, const float* inverse,
                     float* delta, float* bias_sums) {
  switch (vectors) {
    case 1: return score_gradients_of<1>(rows, weights, grads, inverse, delta, bias_sums);
    case 2: return score_gradients_of<2>(rows, weights, grads, inverse, delta, bias_sums);
    case 3: return score_gradients_of<3>(rows, weights, grads, inverse, delta, bias_sums);
    default: return score_gradients_of<4>(rows, weights, grads, inverse, delta, bias_sums);
  }
}

template <class T>
class QueryGradient {
 public:
  QueryGradient(const BackwardPlan& plan, Arena arena) : p_(plan), a_(*plan.attention), walk_(plan, arena) {
    arena.take(walk_.most_line_rows() * plan.width, key_);
    arena.take(walk_.most_line_rows() * plan.width_v, value_);
    arena.take(walk_.most_rows() * plan.lanes, scores_, grads_);
    arena.take(plan.width * plan.lanes, query_t_);
    arena.take(plan.width_v * plan.lanes, grad_out_t_);
    arena.take(max_of(plan.width, plan.width_v) * plan.lanes, staging_);
    arena.take(kStatistics * plan.lanes, statistics_);
    arena.take(plan.lanes, scale_, one_);
    arena.take(plan.table_sums ? plan.group() * plan.bias_head() : 0, bias_sums_);
    used_ = arena.used();
  }

  static size_t bytes(const BackwardPlan& plan) { return size_t(QueryGradient(plan, Arena(nullptr)).used_); }

  void start() {
    for (int64_t l = 0; l < p_.lanes; ++l) scale_[l] = a_.scale, one_[l] = 1.f;
    if (p_.table_sums) __builtin_memset(bias_sums_, 0, size_t(p_.group() * p_.bias_head()) * sizeof(float));
  }

  void run(const Piece& piece, int64_t head_kv) {
    if (piece.empty()) return;
    const HeadMap<T> key = head_map<T>(p_, piece, a_.key, head_kv), value = head_map<T>(p_, piece, a_.value, head_kv);
    walk_.start(piece);
    for (int64_t strip = piece.first_strip; strip < piece.last_strip; ++strip) {
      walk_.move_to_strip(strip);
      walk_.fill_lines([&](int64_t line, int64_t i0, int64_t i1) {
        walk_.copy_line(key, line, i0, i1, a_.head_dim, 1.f, key_, p_.width);
        walk_.copy_line(value, line, i0, i1, a_.head_dim_v, 1.f, value_, p_.width_v);
      });
      for (int64_t g = 0; g < p_.group(); ++g) {
        const int64_t h = head_kv * p_.group() + g;
        const HeadMap<T> query = head_map<T>(p_, piece, a_.query, h), grad_out = head_map<T>(p_, piece, p_.grad.grad_out, h);
        const HeadMap<T> grad_query = head_map<T>(p_, piece, p_.grad.grad_query, h);
        const HeadMap<float> statistics = head_map<float>(p_, piece, p_.statistics, h);
        for (int64_t t = piece.first_tile; t < piece.last_tile; ++t) {
          walk_.move_to_tile(t);
          Prefetch for_scores, for_grads;
          walk_.add_lanes(for_scores, query, a_.head_dim, true);
          walk_.add_next_lines(for_scores, key, a_.head_dim);
          walk_.add_lanes(for_grads, grad_out, a_.head_dim_v, true);
          walk_.add_next_lines(for_grads, value, a_.head_dim_v);
          walk_.load_lanes(query, a_.head_dim, p_.width, a_.scale * kLog2e, staging_, query_t_);
          walk_.load_lanes(grad_out, a_.head_dim_v, p_.width_v, 1.f, staging_, grad_out_t_);
          tile(h, p_.table_sums ? bias_sums_ + g * p_.bias_head() : nullptr, for_scores, for_grads);
          walk_.store_lanes(query_t_, scale_, a_.head_dim, p_.width, staging_, grad_query);
          walk_.store_lanes(statistics_, one_, kStatistics, kLanes, staging_, statistics);
        }
      }
    }
  }

  void finish(int64_t chunk, int64_t head_kv) {
    if (!p_.table_sums) return;
    for (int64_t g = 0; g < p_.group(); ++g) {
      float* sums = p_.table_sums + (chunk * a_.heads + head_kv * p_.group() + g) * p_.table_rows();
      const float* dense = bias_sums_ + g * p_.bias_head();
      __builtin_memset(sums, 0, size_t(p_.table_rows()) * sizeof(float));
      for_each_bias<Rows::keys>(p_, [=](int64_t place, int64_t row) { sums[row] += dense[place]; });
    }
  }

 private:
  // query_t_ becomes the gradient, transposed and before the scale.
  void tile(int64_t h, float* bias_sums, Prefetch& for_scores, Prefetch& for_grads) {
    const int64_t lanes = p_.lanes, rows = walk_.rows().count();
    const float *key = key_ + walk_.first_row() * p_.width, *value = value_ + walk_.first_row() * p_.width_v;
    float *top = statistics_, *sum = top + lanes, *delta = sum + lanes;
    tile_product(rows, p_.vectors, a_.head_dim, key, p_.width, 1, query_t_, lanes, scores_, lanes, Start::overwrite, nullptr,
                 &for_scores);
    softmax_rows(p_.vectors, walk_.rows(), scores_, p_.key_bias ? p_.key_bias + h * p_.bias_head() : nullptr, top, sum);
    invert(sum, lanes);
    walk_.clear_outside(sum);  // they take no part in the sums by distance
    tile_product(rows, p_.vectors, a_.head_dim_v, value, p_.width_v, 1, grad_out_t_, lanes, grads_, lanes, Start::overwrite,
                 nullptr, &for_grads);
    score_gradients(p_.vectors, walk_.rows(), scores_, grads_, sum, delta, bias_sums);
    tile_product(a_.head_dim, p_.vectors, rows, key, 1, p_.width, grads_, lanes, query_t_, lanes, Start::overwrite);
  }

  const BackwardPlan& p_;
  const NeighborhoodAttention& a_;
  TileWalk<Rows::keys> walk_;
  float *key_, *value_, *scores_, *grads_, *query_t_, *grad_out_t_, *staging_;
  float* statistics_;  // [kStatistics][lane]
  float *scale_, *one_;
  float* bias_sums_;   // [head of the group][as the dense bias]
  int64_t used_;
};

// ---- 2. keys ----

// From exponents (before the bias) and dP of a tile whose rows are queries: P and dS, in place.
template <int V>
XF_NOINLINE void weights_and_gradients_of(const ScoreRows rows, float* scores, float* grads, const float* bias,
                                          const float* statistics) {
  constexpr int64_t lanes = V * kLanes;
  for (int64_t c = 0; c < rows.columns; ++c) {
    IVec column[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) column[v] = load_as<IVec>(rows.column_seen + c * lanes + v * kLanes);
    for (int64_t s = 0; s < rows.lines; ++s, scores += lanes, grads += lanes, statistics += kLanes)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        Vec x = load(scores + v * kLanes);
        if (bias) x += load(bias + rows.bias_column + c * lanes + rows.line_bias[s] + v * kLanes);
        const IVec seen = load_as<IVec>(rows.line_seen + s * lanes + v * kLanes) & column[v];
        const Vec p = exp2((seen != 0 ? x : broadcast(-kInfinity)) - statistics[0]) * statistics[1];
        store(scores + v * kLanes, p);
        store(grads + v * kLanes, p * (load(grads + v * kLanes) - statistics[2]));
      }
  }
}

void weights_and_gradients(int vectors, const ScoreRows& rows, float* scores, float* grads, const float* bias,
                           const float* statistics) {
  switch (vectors) {
    case 1: return weights_and_gradients_of<1>(rows, scores, grads, bias, statistics);
    case 2: return weights_and_gradients_of<2>(rows, scores, grads, bias, statistics);
    case 3: return weights_and_gradients_of<3>(rows, scores, grads, bias, statistics);
    default: return weights_and_gradients_of<4>(rows, scores, grads, bias, statistics);
  }
}

template <class T>
class KeyGradient {
 public:
  KeyGradient(const BackwardPlan& plan, Arena arena) : p_(plan), a_(*plan.attention), walk_(plan, arena) {
    const int64_t tiles = plan.group() == 1 ? 1 : walk_.most_tiles();
    arena.take(walk_.most_line_rows() * plan.width, query_);
    arena.take(walk_.most_line_rows() * plan.width_v, grad_out_);
    arena.take(walk_.most_line_rows() * kLanes, statistics_);
    arena.take(walk_.most_rows() * plan.lanes, scores_, grads_);
    arena.take(plan.width * plan.lanes, key_t_);
    arena.take(plan.width_v * plan.lanes, value_t_);
    arena.take(tiles * plan.width * plan.lanes, grad_key_t_);
    arena.take(tiles * plan.width_v * plan.lanes, grad_value_t_);
    arena.take(max_of(plan.width, plan.width_v) * plan.lanes, staging_);
    arena.take(plan.lanes, ln2_, one_);
    used_ = arena.used();
  }

  static size_t bytes(const BackwardPlan& plan) { return size_t(KeyGradient(plan, Arena(nullptr)).used_); }

  void start() {
    for (int64_t l = 0; l < p_.lanes; ++l) ln2_[l] = kLn2, one_[l] = 1.f;
  }

  void run(const Piece& piece, int64_t head_kv) {
    if (piece.empty()) return;
    const HeadMap<T> key = head_map<T>(p_, piece, a_.key, head_kv), value = head_map<T>(p_, piece, a_.value, head_kv);
    const HeadMap<T> grad_key = head_map<T>(p_, piece, p_.grad.grad_key, head_kv),
                     grad_value = head_map<T>(p_, piece, p_.grad.grad_value, head_kv);
    walk_.start(piece);
    for (int64_t strip = piece.first_strip; strip < piece.last_strip; ++strip) {
      walk_.move_to_strip(strip);
      for (int64_t g = 0; g < p_.group(); ++g) {
        const int64_t h = head_kv * p_.group() + g;
        const HeadMap<T> query = head_map<T>(p_, piece, a_.query, h), grad_out = head_map<T>(p_, piece, p_.grad.grad_out, h);
        const HeadMap<float> statistics = head_map<float>(p_, piece, p_.statistics, h);
        if (p_.group() > 1) walk_.release_lines();
        walk_.fill_lines([&](int64_t line, int64_t i0, int64_t i1) {
          walk_.copy_line(query, line, i0, i1, a_.head_dim, a_.scale * kLog2e, query_, p_.width);
          walk_.copy_line(grad_out, line, i0, i1, a_.head_dim_v, 1.f, grad_out_, p_.width_v);
          walk_.copy_line(statistics, line, i0, i1, kStatistics, 1.f, statistics_, kLanes);
        });
        for (int64_t t = piece.first_tile; t < piece.last_tile; ++t) {
          const int64_t kept = p_.group() == 1 ? 0 : t - piece.first_tile;
          float* grad_key_t = grad_key_t_ + kept * p_.width * p_.lanes;
          float* grad_value_t = grad_value_t_ + kept * p_.width_v * p_.lanes;
          walk_.move_to_tile(t);
          Prefetch for_scores, for_grads;
          walk_.add_lanes(for_scores, key, a_.head_dim, true);
          walk_.add_next_lines(for_scores, query, a_.head_dim);
          walk_.add_lanes(for_grads, value, a_.head_dim_v, true);
          walk_.add_next_lines(for_grads, grad_out, a_.head_dim_v);
          walk_.load_lanes(key, a_.head_dim, p_.width, 1.f, staging_, key_t_);
          walk_.load_lanes(value, a_.head_dim_v, p_.width_v, 1.f, staging_, value_t_);
          tile(h, grad_key_t, grad_value_t, g == 0 ? Start::overwrite : Start::accumulate, for_scores, for_grads);
          if (g + 1 < p_.group()) continue;
          walk_.store_lanes(grad_key_t, ln2_, a_.head_dim, p_.width, staging_, grad_key);
          walk_.store_lanes(grad_value_t, one_, a_.head_dim_v, p_.width_v, staging_, grad_value);
        }
      }
    }
  }

  void finish(int64_t, int64_t) {}

 private:
  void tile(int64_t h, float* grad_key_t, float* grad_value_t, Start start, Prefetch& for_scores, Prefetch& for_grads) {
    const int64_t lanes = p_.lanes, rows = walk_.rows().count(), first = walk_.first_row();
    const float *query = query_ + first * p_.width, *grad_out = grad_out_ + first * p_.width_v;
    tile_product(rows, p_.vectors, a_.head_dim, query, p_.width, 1, key_t_, lanes, scores_, lanes, Start::overwrite, nullptr,
                 &for_scores);
    tile_product(rows, p_.vectors, a_.head_dim_v, grad_out, p_.width_v, 1, value_t_, lanes, grads_, lanes, Start::overwrite,
                 nullptr, &for_grads);
    weights_and_gradients(p_.vectors, walk_.rows(), scores_, grads_, p_.query_bias ? p_.query_bias + h * p_.bias_head() : nullptr,
                          statistics_ + first * kLanes);
    tile_product(a_.head_dim_v, p_.vectors, rows, grad_out, 1, p_.width_v, scores_, lanes, grad_value_t, lanes, start);
    tile_product(a_.head_dim, p_.vectors, rows, query, 1, p_.width, grads_, lanes, grad_key_t, lanes, start);
  }

  const BackwardPlan& p_;
  const NeighborhoodAttention& a_;
  TileWalk<Rows::queries> walk_;
  float *query_, *grad_out_;  // lines; queries times scale and log2(e)
  float* statistics_;         // lines, kStatistics of kLanes columns
  float *scores_, *grads_, *key_t_, *value_t_, *staging_, *ln2_, *one_;
  float *grad_key_t_, *grad_value_t_;  // [tile of the strip, where a group has several heads][channel][lane]
  int64_t used_;
};

// ---- the runs ----

template <class Gradient>
void gradient_task(void* context, int64_t task, char* scratch) {
  const BackwardPlan& plan = *static_cast<const BackwardPlan*>(context);
  const int64_t heads = plan.attention->heads_kv, chunk = task / heads;
  Gradient gradient(plan, Arena(scratch));
  gradient.start();
  for (int64_t i = plan.pieces * chunk / plan.chunks; i < plan.pieces * (chunk + 1) / plan.chunks; ++i)
    gradient.run(piece_of(plan, i), task % heads);
  gradient.finish(chunk, task % heads);
}

void sum_table_gradient(void* context, int64_t head, char*) {
  const BackwardPlan& plan = *static_cast<const BackwardPlan*>(context);
  const int64_t heads = plan.attention->heads, rows = plan.table_rows();
  for (int64_t row = 0; row < rows; ++row) {
    float sum = 0.f;
    for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) sum += plan.table_sums[(chunk * heads + head) * rows + row];
    plan.grad.grad_table[row * heads + head] = sum;
  }
}

template <class T>
void backward_of(const NeighborhoodAttention& a, const NeighborhoodAttentionGrad& grad, const Pool& pool) {
  BackwardPlan plan{plan_neighborhoods(a), grad, nullptr, nullptr, {}, nullptr};
  const auto floats = [&](int64_t n) { return static_cast<float*>(pool.allocate(pool.self, size_t(n) * sizeof(float))); };
  plan.key_bias = dense_bias<Rows::keys>(plan, pool);
  plan.query_bias = dense_bias<Rows::queries>(plan, pool);
  plan.statistics.head = kStatistics;
  plan.statistics.axis[2] = a.heads * kStatistics;
  plan.statistics.axis[1] = plan.statistics.axis[2] * a.side[2];
  plan.statistics.axis[0] = plan.statistics.axis[1] * a.side[1];
  plan.statistics.batch = plan.statistics.axis[0] * a.side[0];
  plan.statistics.data = floats(plan.statistics.batch * a.batch);
  if (grad.grad_table) {
    const int64_t floats_a_chunk = a.heads * plan.table_rows();
    plan.chunks = max_of(1, min_of(plan.chunks, kPartialFloats / floats_a_chunk));
    plan.table_sums = floats(plan.chunks * floats_a_chunk);
  }
  const int64_t tasks = plan.chunks * a.heads_kv;
  pool.run(tasks, gradient_task<QueryGradient<T>>, &plan, QueryGradient<T>::bytes(plan));
  pool.run(tasks, gradient_task<KeyGradient<T>>, &plan, KeyGradient<T>::bytes(plan));
  if (grad.grad_table) pool.run(a.heads, sum_table_gradient, &plan, 0);
}

}  // namespace

void neighborhood_attention_backward(const NeighborhoodAttention& a, const NeighborhoodAttentionGrad& grad, const Pool& pool) {
  switch (a.element) {
    case Element::float32: return backward_of<float>(a, grad, pool);
    case Element::bfloat16: return backward_of<bfloat16>(a, grad, pool);
    case Element::float16: return backward_of<float16>(a, grad, pool);
    case Element::boolean: return;
  }
}

}  // namespace XFORMER_FAST_ISA
}  // namespace xformer_fast
