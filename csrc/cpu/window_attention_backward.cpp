// Windowed attention, backward. With the exponents and P recomputed from q, k and the bias (neither the output nor its
// statistics are kept from the forward):
//     dP = dO V^T      dS = P (dP - rowsum(P dP))      dV = P^T dO      dQ = c dS K      dK = c dS^T Q      dbias = sum dS
// c is the scale. Cosine attention has c = logit_scale / (|q_i| |k_j|), inside dS, and the gradient of x / |x| takes from dQ
// its part along q; what that part sums to is the gradient of logit_scale.
//
// Tiling as forward: S^T and dP^T with a query a lane; the other three products take those tiles as the operand that is
// broadcast, rows of Q, dO and K as vectors. A window is whole inside a task, so no gradient of a row is shared.
//
// The gradient of the bias is summed by each task over its chunk of windows, [head][key][query], then over chunks in
// order, then along the table's rows in order: the same bits for any number of threads.
//
// Not here: products of bfloat16 pairs (half types are float32 in scratch), the last query apart.
//
// NOTES (Zen 3, AVX2, one thread, forward and backward of the forward's case, the quietest of 60 calls)
//   - 52.1 ms; 47.7 when the next head's rows are asked for as in the forward; 43.7 with the products of four vectors as two
//     and two (12 accumulators and a row of B fill the registers; 2 x 4 leaves 8, as many as the latency of an FMA asks for).
#include "window_tiles.h"

namespace xformer_fast {
namespace XFORMER_FAST_ISA {
namespace {

struct BackwardPlan : WindowPlan {
  WindowAttentionGrad grad;
  float* bias_sums;   // [chunk][head][key][query], null: not wanted
  double* scale_sums;  // [chunk][head]; many terms that cancel
};

// C (rows x columns) (+)= A B, columns whole vectors.
void wide_product(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t a_row, int64_t a_red, const float* b,
                  float* c, Start start) {
  const TileCut cut(columns / kLanes);
  for (int64_t t = 0; t < cut.tiles; ++t) {
    const int64_t at = cut.first(t) * kLanes;
    tile_product(rows, int(cut.first(t + 1) - cut.first(t)), depth, a, a_row, a_red, b + at, columns, c + at, columns, start);
  }
}

// From weights and dP of a tile: P and dS (times the norms), and the sum of dS.
template <int V>
XF_NOINLINE void score_gradients(const WindowScores& t, const float* sum, float* grad, const float* lane_norm, float* bias_sums) {
  Vec inverse[V], delta[V], norm[V], run[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    inverse[v] = 1.f / load(sum + v * kLanes);
    delta[v] = zero();
    norm[v] = t.row_scale ? load(lane_norm + v * kLanes) : broadcast(1.f);
  }
  for (int64_t first = 0; first < t.rows; first += kSumRows) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) run[v] = zero();
    for (int64_t r = first; r < min_of(first + kSumRows, t.rows); ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        float* s = t.scores + r * t.ld + v * kLanes;
        const Vec p = load(s) * inverse[v];
        store(s, p);
        run[v] += p * load(grad + r * t.ld + v * kLanes);
      }
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) delta[v] += run[v];
  }
  for (int64_t r = 0; r < t.rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      float* g = grad + r * t.ld + v * kLanes;
      Vec ds = load(t.scores + r * t.ld + v * kLanes) * (load(g) - delta[v]);
      if (bias_sums) {
        float* sums = bias_sums + r * t.bias_ld + v * kLanes;
        store(sums, load(sums) + ds);
      }
      if (t.row_scale) ds *= norm[v] * t.row_scale[r];
      store(g, ds);
    }
}

void score_gradients(int vectors, const WindowScores& t, const float* sum, float* grad, const float* lane_norm,
                     float* bias_sums) {
  switch (vectors) {
    case 1: return score_gradients<1>(t, sum, grad, lane_norm, bias_sums);
    case 2: return score_gradients<2>(t, sum, grad, lane_norm, bias_sums);
    case 3: return score_gradients<3>(t, sum, grad, lane_norm, bias_sums);
    default: return score_gradients<4>(t, sum, grad, lane_norm, bias_sums);
  }
}

// Takes from each row of `grad` its part along the same row x, as x / |x| asks, and returns the sum of x . grad.
double remove_radial_part(const float* x, const float* inverse_norm, int64_t rows, int64_t width, float* grad) {
  double sum = 0.;
  for (int64_t r = 0; r < rows; ++r, x += width, grad += width) {
    Vec products = zero();
    for (int64_t c = 0; c < width; c += kLanes) products += load(x + c) * load(grad + c);
    const float radial = reduce_add(products);
    sum += radial;
    if (inverse_norm[r] * kLeastNorm >= 1.f) continue;  // the norm is held at its least: no gradient goes through it
    const float factor = radial * inverse_norm[r] * inverse_norm[r];
    for (int64_t c = 0; c < width; c += kLanes) store(grad + c, load(grad + c) - load(x + c) * factor);
  }
  return sum;
}

template <class T>
class WindowBackward {
 public:
  WindowBackward(const BackwardPlan& plan, int64_t chunk, Arena arena)
      : p_(plan), a_(*plan.attention), chunk_(chunk),
        walk_(plan, {{&a_.query, a_.head_dim}, {&a_.key, a_.head_dim}, {&a_.value, a_.head_dim_v},
                     {&plan.grad.grad_out, a_.head_dim_v}, {&plan.grad.grad_query, a_.head_dim},
                     {&plan.grad.grad_key, a_.head_dim}, {&plan.grad.grad_value, a_.head_dim_v}}, arena) {
    arena.take(plan.padded * plan.width, query_, key_, query_t_, grad_query_, grad_key_);
    arena.take(plan.padded * plan.width_v, value_, grad_out_, grad_out_t_, grad_value_);
    arena.take(plan.tokens * kTileVectors * kLanes, weights_, grads_);
    arena.take(plan.padded, lane_scale_, query_norm_, key_norm_, sum_);
    used_ = arena.used();
  }

  static size_t bytes(const BackwardPlan& plan) { return size_t(WindowBackward(plan, 0, Arena(nullptr)).used_); }

  void run(int64_t first_window, int64_t last_window, int64_t first_head, int64_t last_head) {
    walk_.run(first_window, last_window, first_head, last_head, [this](int64_t h) { head(h); });
  }

 private:
  enum { kQuery, kKey, kValue, kGradOut, kGradQuery, kGradKey, kGradValue };  // of the walk's maps

  void head(int64_t h) {
    const int64_t n = p_.tokens;
    gather_rows(walk_.rows(kQuery, h), walk_.offsets(kQuery), n, p_.padded, a_.head_dim, query_, p_.width);
    gather_rows(walk_.rows(kKey, h), walk_.offsets(kKey), n, n, a_.head_dim, key_, p_.width);
    gather_rows(walk_.rows(kValue, h), walk_.offsets(kValue), n, n, a_.head_dim_v, value_, p_.width_v);
    gather_rows(walk_.rows(kGradOut, h), walk_.offsets(kGradOut), n, p_.padded, a_.head_dim_v, grad_out_, p_.width_v);
    pack_transposed(query_, p_.width, p_.padded, p_.width, 1.f, query_t_, p_.padded);
    pack_transposed(grad_out_, p_.width_v, p_.padded, p_.width_v, 1.f, grad_out_t_, p_.padded);
    const float scale = a_.logit_scale ? a_.logit_scale[h] : a_.scale;
    if (a_.logit_scale) {
      inverse_norms(query_, p_.width, p_.padded, query_norm_);
      inverse_norms(key_, p_.width, n, key_norm_);
    }
    for (int64_t i = 0; i < p_.padded; i += kLanes)
      store(lane_scale_ + i, (a_.logit_scale ? load(query_norm_ + i) : broadcast(1.f)) * (scale * kLog2e));

    const TileCut cut(p_.padded / kLanes);
    for (int64_t t = 0; t < cut.tiles; ++t) tile(h, cut, t);

    if (a_.logit_scale) {
      const double sum = remove_radial_part(query_, query_norm_, n, p_.width, grad_query_);
      remove_radial_part(key_, key_norm_, n, p_.width, grad_key_);
      if (p_.scale_sums) p_.scale_sums[chunk_ * a_.heads + h] += sum;
    }
    const auto put = [&](const float* rows, int64_t width, float factor, int64_t dim, int map) {
      scatter_rows(rows, width, factor, n, dim, walk_.rows(map, h), walk_.offsets(map));
    };
    put(grad_query_, p_.width, scale, a_.head_dim, kGradQuery);
    put(grad_key_, p_.width, scale, a_.head_dim, kGradKey);
    put(grad_value_, p_.width_v, 1.f, a_.head_dim_v, kGradValue);
  }

  void tile(int64_t h, const TileCut& cut, int64_t t) {
    const int64_t query0 = cut.first(t) * kLanes;
    const int vectors = int(cut.first(t + 1) - cut.first(t));
    Prefetch ahead[2] = {walk_.next_rows(2 * t, 2 * cut.tiles), walk_.next_rows(2 * t + 1, 2 * cut.tiles)};
    const int64_t n = p_.tokens, ld = vectors * kLanes, queries = min_of(ld, n - query0);
    const Start start = query0 == 0 ? Start::overwrite : Start::accumulate;
    tile_product(n, vectors, a_.head_dim, key_, p_.width, 1, query_t_ + query0, p_.padded, weights_, ld, Start::overwrite,
                 nullptr, &ahead[0]);
    const WindowScores s{weights_, ld, n, p_.bias ? p_.bias + h * p_.bias_head() + query0 : nullptr, p_.padded,
                         lane_scale_ + query0, a_.logit_scale ? key_norm_ : nullptr, p_.region,
                         p_.region + query0, walk_.edges()};
    softmax_columns(vectors, s, sum_);
    tile_product(n, vectors, a_.head_dim_v, value_, p_.width_v, 1, grad_out_t_ + query0, p_.padded, grads_, ld,
                 Start::overwrite, nullptr, &ahead[1]);
    float* sums = p_.bias_sums ? p_.bias_sums + (chunk_ * a_.heads + h) * p_.bias_head() + query0 : nullptr;
    score_gradients(vectors, s, sum_, grads_, query_norm_ + query0, sums);
    wide_product(n, p_.width_v, queries, weights_, ld, 1, grad_out_ + query0 * p_.width_v, grad_value_, start);
    wide_product(n, p_.width, queries, grads_, ld, 1, query_ + query0 * p_.width, grad_key_, start);
    wide_product(queries, p_.width, n, grads_, 1, ld, key_, grad_query_ + query0 * p_.width, Start::overwrite);
  }

  const BackwardPlan& p_;
  const WindowAttention& a_;
  int64_t chunk_;
  WindowWalk<T, 4, 7> walk_;
  float *query_, *key_, *value_, *grad_out_, *query_t_, *grad_out_t_, *grad_query_, *grad_key_, *grad_value_, *weights_, *grads_;
  float *lane_scale_, *query_norm_, *key_norm_, *sum_;
  int64_t used_;
};

template <class T>
void backward_task(void* context, int64_t task, char* scratch) {
  const BackwardPlan& plan = *static_cast<const BackwardPlan*>(context);
  const int64_t chunk = task / plan.head_groups, group = task % plan.head_groups, heads = plan.attention->heads;
  const int64_t first = plan.first_head(group), last = plan.first_head(group + 1);
  if (plan.bias_sums)
    __builtin_memset(plan.bias_sums + (chunk * heads + first) * plan.bias_head(), 0,
                     size_t((last - first) * plan.bias_head()) * sizeof(float));
  if (plan.scale_sums) __builtin_memset(plan.scale_sums + chunk * heads + first, 0, size_t(last - first) * sizeof(double));
  WindowBackward<T>(plan, chunk, Arena(scratch)).run(plan.first_window(chunk), plan.first_window(chunk + 1), first, last);
}

void reduce_head(void* context, int64_t head, char*) {
  const BackwardPlan& plan = *static_cast<const BackwardPlan*>(context);
  const WindowAttention& a = *plan.attention;
  const int64_t n = plan.tokens, chunk_step = a.heads * plan.bias_head();
  if (plan.bias_sums) {
    float* total = plan.bias_sums + head * plan.bias_head();
    for (int64_t chunk = 1; chunk < plan.chunks; ++chunk)
      for (int64_t i = 0; i < plan.bias_head(); i += kLanes)
        store(total + i, load(total + i) + load(total + chunk * chunk_step + i));
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; ++j) {
        const float sum = total[j * plan.padded + i];
        if (plan.grad.grad_bias) plan.grad.grad_bias[(head * n + i) * n + j] = sum;
        if (plan.grad.grad_table) plan.grad.grad_table[table_row(plan, i, j) * a.heads + head] += sum;
      }
  }
  if (plan.scale_sums) {
    double sum = 0.;
    for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) sum += plan.scale_sums[chunk * a.heads + head];
    plan.grad.grad_logit_scale[head] = float(sum);
  }
}

template <class T>
void backward_of(const WindowAttention& a, const WindowAttentionGrad& grad, const Pool& pool) {
  BackwardPlan plan{plan_windows(a, kLanes, pool), grad, nullptr, nullptr};
  const auto allocate = [&](int64_t n, size_t size) { return pool.allocate(pool.self, size_t(n) * size); };
  const int64_t sums = plan.chunks * a.heads;
  if (grad.grad_table || grad.grad_bias)
    plan.bias_sums = static_cast<float*>(allocate(sums * plan.bias_head(), sizeof(float)));
  if (grad.grad_logit_scale) plan.scale_sums = static_cast<double*>(allocate(sums, sizeof(double)));
  pool.run(plan.chunks * plan.head_groups, backward_task<T>, &plan, WindowBackward<T>::bytes(plan));
  if (plan.bias_sums || plan.scale_sums) pool.run(a.heads, reduce_head, &plan, 0);
}

}  // namespace

void window_attention_backward(const WindowAttention& a, const WindowAttentionGrad& grad, const Pool& pool) {
  switch (a.element) {
    case Element::float32: return backward_of<float>(a, grad, pool);
    case Element::bfloat16: return backward_of<bfloat16>(a, grad, pool);
    case Element::float16: return backward_of<float16>(a, grad, pool);
    case Element::boolean: return;
  }
}

}  // namespace XFORMER_FAST_ISA
}  // namespace xformer_fast
