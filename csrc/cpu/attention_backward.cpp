// Softmax attention backward on a CPU. With the scores s_ij and the log-sum-exp of the forward, for every kept pair:
//
//   P_ij  = exp(s_ij - lse_i)              dP_ij   = grad_out_i . v_j       (both dropped where the forward dropped)
//   dS_ij = P_ij (dP_ij - delta_i)         delta_i = grad_out_i . out_i - grad_lse_i
//   dv_j += P_ij grad_out_i    dk_j += scale dS_ij q_i    dq_i += scale dS_ij k_j    (dS (1 - tanh^2) under a softcap)
//
// Three runs over the pool:
//   1. row statistics   -lse and delta of every query row.
//   2. key ranges       A task owns a range of one KV head's keys and walks it in blocks that stay in the L2 cache:
//                       packed keys and values, float32 dk and dv. Past each block stream the query blocks of the
//                       head's group. Score tiles are held as in the forward, S^T: rows are keys, lanes are queries.
//                       The five products are tile products (microkernels.h); only query-side operands are transposed,
//                       once a block pair. dq of the range is summed in a float32 workspace.
//   3. gather           dq of the ranges, summed in a fixed order, scaled and rounded; sums for sinks, ALiBi slopes and the
//                       bias of distance, whose gradient every range sums along the diagonals of its own tiles.
// With one range a head, a task of run 2 does all three for its heads.
//
// Global keys are one more range, gathered, that follows run 2 for each head: run 2 leaves its sums of dk and dv for these
// keys in a workspace, and the global range adds its own and writes their rows.
//
// The number of ranges comes from the shape alone (at most kMaxSplits), so that results have the same bits for any
// number of threads; ranges are cut to equal work under causal and window limits. Block pairs outside the limits, the
// window or the key length are never visited, and only tiles on an edge are masked. Where a mask that wants a gradient
// is broadcast, everything that shares its elements is one task, walked in order.
//
// With AVX512_BF16, bfloat16 operands are multiplied as they are, P and dS rounded to bfloat16; every other type is
// converted to float32 when packed. All sums are float32, rounded once at the end.
//
// out is as rounded as its type. Where sums of dS cancel (a bias shared by many scores, a sink, dropout), delta takes the
// residual of that rounding along, if the forward has saved it.
//
// Workspace: at most kMaxSplits float32 copies of grad_query (one more with global keys), and two floats a query row; for
// a bias of distance, a vector of all distances, for a bias of the map, its gradient, for every head, batch and range; for
// global keys, their gradients.
#include "attention_backward_tiles.h"

namespace xformer_fast {
namespace XFORMER_FAST_ISA {
namespace {

constexpr int64_t kMaxSplits = 8;
constexpr int64_t kTasksWanted = 32;
constexpr int64_t kKeyUnit = 64;             // ranges and blocks of keys are multiples of it
constexpr int64_t kKeysPerSplit = 512;       // about, at least
constexpr int64_t kKeysPerBlock = 512;       // at most
constexpr int64_t kBlockBytes = 1024 * 1024; // of packed keys and values with their gradients: about an L2 cache
constexpr int64_t kTileKeys = 128;           // keys of a score tile
constexpr int64_t kStripKeys = 32;           // of the part that goes from scores to dS while it is in the L1 cache
constexpr int64_t kRowsPerTask = 256;        // query rows a task of the first and the last run
constexpr int64_t kGradientChain = 32;       // terms of dP added one behind the other: dS is a difference of such sums

struct Range {
  int64_t begin, end;
  bool empty() const { return begin >= end; }
};

// How the problem is cut, and the workspaces.
struct Plan {
  const Attention& a;
  const AttentionGrad& g;
  int64_t rows = 0;                  // query rows of all sequences and heads
  int64_t width = 0, width_v = 0;    // head dims in whole vectors
  int64_t block_k = 0, splits = 1;   // keys of a block, ranges of keys
  int64_t parts = 1;                 // sums of dq: one a range, and one of the global keys
  int64_t tasks_b = 0, tasks_h = 0;  // tasks along batch and KV heads: 1 where a broadcast mask's gradient ties them
  int64_t* split_bounds = nullptr;  // (batch, splits + 1), keys
  float* neg_lse = nullptr;         // (rows); -inf for a row without keys
  float* neg_rest = nullptr;        // (rows), what rounding took from neg_lse, in units of log2
  float* delta = nullptr;           // (rows)
  float* grad_query = nullptr;      // (parts, rows, width)
  double* grad_alibi = nullptr;     // (parts, batch, heads_q)
  float* grad_lag = nullptr;        // (parts, batch, heads_q, lag_head), in the order of Attention::lag_bias
  float* grad_map = nullptr;        // (parts, batch, heads_q, query blocks, map rows + columns, queries of a block)
  float* grad_global = nullptr;     // (heads_kv, global keys of all sequences, width + width_v), from run 2

  int64_t row0(int64_t b, int64_t h) const {
    return a.cu_seqlens_q ? h * a.cu_seqlens_q[a.batch] + a.cu_seqlens_q[b] : (b * a.heads_q + h) * a.seqlen_q;
  }

  // Queries that keep some key of [begin, end).
  Range queries_of(int64_t b, Range keys) const {
    if (keys.empty()) return {0, 0};
    const int64_t shift = a.shift(b);
    return {max_of(0, keys.begin - a.right - shift), min_of(a.len_q(b), keys.end + a.left - shift)};
  }
  float* grad_map_of(int64_t part, int64_t b, int64_t head, int64_t query, int64_t block) const {
    const int64_t row = ((part * a.batch + b) * a.heads_q + head) * round_up(a.seqlen_q, block) + query;
    return grad_map + row * (a.map_rows + a.map_columns);
  }
  // Queries that some global key is outside the window of.
  Range global_queries_of(int64_t b) const {
    if (a.global_count(b) == 0) return {0, 0};
    const int64_t first = a.global_keys[a.global_begin[b]];
    return {a.causal ? max_of(0, first + a.left + 1 - a.shift(b)) : 0, a.len_q(b)};
  }
  float* grad_global_of(int64_t b, int64_t head_kv) const {
    return grad_global + (head_kv * a.global_begin[a.batch] + a.global_begin[b]) * (width + width_v);
  }
  Range keys_of(int64_t b, int64_t split) const {
    const int64_t* bounds = split_bounds + b * (splits + 1) + split;
    return {bounds[0], bounds[1]};
  }
};

// Cuts the keys of a sequence into one range a split: whole units, weighed by the queries that see them.
void cut_keys(const Plan& p, int64_t b, int64_t* bounds) {
  const int64_t len = p.a.len_k(b), units = (len + kKeyUnit - 1) / kKeyUnit;
  auto weight = [&](int64_t u) {
    const Range q = p.queries_of(b, {u * kKeyUnit, min_of(len, (u + 1) * kKeyUnit)});
    return q.empty() ? int64_t(1) : q.end - q.begin + 1;
  };
  int64_t total = 0, sum = 0, split = 0;
  for (int64_t u = 0; u < units; ++u) total += weight(u);
  for (int64_t u = 0; u < units; ++u) {  // a unit belongs to the split in which its weight begins
    for (; split <= sum * p.splits / total; ++split) bounds[split] = u * kKeyUnit;
    sum += weight(u);
  }
  for (; split <= p.splits; ++split) bounds[split] = len;
}

// ---- 1. row statistics ----

// -lse and delta of some rows of one head.
template <class T>
void row_statistics(const Plan& p, int64_t b, int64_t h, Range rows) {
  const Attention& a = p.a;
  const int64_t lse0 = b * a.lse_batch + h * a.lse_head + a.query_row0(b), row0 = p.row0(b, h);
  for (int64_t i0 = rows.begin; i0 < rows.end; i0 += kLanes) {
    const int count = int(min_of(kLanes, rows.end - i0));
    const T* out = row_of<const T>(a.out, b, h, a.query_row0(b) + i0);
    const T* grad = row_of<const T>(p.g.grad_out, b, h, a.query_row0(b) + i0);
    const T* residual = a.residual.data ? row_of<const T>(a.residual, b, h, a.query_row0(b) + i0) : nullptr;
    Vec sum = zero(), dot = zero();  // in the order of dP's sum: a row with one key has dP = delta almost to the last bit
    for (int64_t d = 0; d < a.head_dim_v; d += kLanes) {
      if (d % kGradientChain == 0) sum += dot, dot = zero();
      const int n = int(min_of(kLanes, a.head_dim_v - d));
      Vec o[kLanes], g[kLanes];
      for (int r = 0; r < kLanes; ++r) {
        o[r] = r < count ? load(out + r * a.out.row + d, n) : zero();
        if (residual && r < count) o[r] += load(residual + r * a.residual.row + d, n);
        g[r] = r < count ? load(grad + r * p.g.grad_out.row + d, n) : zero();
      }
      transpose(o);
      transpose(g);
      for (int k = 0; k < n; ++k) dot = o[k] * g[k] + dot;
    }
    float dots[kLanes];
    store(dots, sum + dot);
    for (int r = 0; r < count; ++r) {
      const int64_t i = i0 + r;
      const float lse = a.lse[lse0 + i];
      const bool dead = lse == -kInfinity || lse == kInfinity;
      p.neg_lse[row0 + i] = dead ? -kInfinity : -lse;
      p.neg_rest[row0 + i] = a.lse_error[lse0 + i] * -kLog2e;
      p.delta[row0 + i] = dead ? 0.f : dots[r] - (p.g.grad_lse ? p.g.grad_lse[lse0 + i] : 0.f);
    }
  }
}

// ---- 2. key ranges ----

// One block of keys in a thread's scratch, and the walk of the queries past it.
template <class T>
class KeyBlock {
 public:
  using Op = Operand<T>;

  static size_t scratch_bytes(const Plan& p) {
    return KeyBlock(p, Arena(nullptr)).arena_bytes_;
  }
  KeyBlock(const Plan& p, Arena arena) : p_(p), a_(p.a) {
    stage_ = round_up(a_.head_dim, kLanes * kStep<Op>);
    stage_v_ = round_up(a_.head_dim_v, kLanes * kStep<Op>);
    const bool pairs = kStep<Op> == 2;
    query_scale_ = pairs ? 1.f : a_.scale;
    score_pass_ = has_score_options(a_) || (pairs && !(a_.scale > 0.f));  // else the exponent takes the scale: -inf stays
    exponent_scale_ = pairs && !score_pass_ ? a_.scale : 1.f;
    key_ = arena.take<Op>(p.block_k * stage_);
    value_ = arena.take<Op>(p.block_k * stage_v_);
    key_rows_ = pairs ? arena.take<Op>(p.block_k * p.width) : key_;
    grad_key_ = arena.take<float>(p.block_k * p.width);
    grad_value_ = arena.take<float>(p.block_k * p.width_v);
    staged_ = pairs ? arena.take<Op>(kBlockQ<Op> * max_of(stage_, stage_v_)) : nullptr;
    query_t_ = arena.take<Op>(kBlockQ<Op> * stage_);
    grad_out_t_ = arena.take<Op>(kBlockQ<Op> * stage_v_);
    query_ = arena.take<Op>(kBlockQ<Op> * stage_);
    grad_out_ = arena.take<Op>(kBlockQ<Op> * stage_v_);
    neg_lse_ = arena.take<float>(kBlockQ<Op>);
    neg_rest_ = arena.take<float>(kBlockQ<Op>);
    delta_ = arena.take<float>(kBlockQ<Op>);
    const int64_t whole = kTileKeys * kBlockQ<Op>, strip = kStripKeys * kBlockQ<Op>;
    tile_.scores = arena.take<float>(pairs ? strip : whole);
    tile_.grad = arena.take<float>(pairs ? strip : whole);
    tile_.factor = a_.softcap != 0.f ? arena.take<float>(strip) : nullptr;
    tile_.dropout = a_.dropout_p > 0 ? arena.take<float>(strip) : nullptr;
    tile_.p = pairs ? arena.take<Op>(whole) : reinterpret_cast<Op*>(tile_.scores);
    tile_.ds = pairs ? arena.take<Op>(whole) : reinterpret_cast<Op*>(tile_.grad);
    tile_.ds_pairs = pairs ? arena.take<Op>(whole) : tile_.ds;
    map_bias_ = arena.take<float>((a_.map_rows + a_.map_columns) * kBlockQ<Op>);
    arena_bytes_ = arena.bytes();
  }

  // All keys of one split of (batch, KV head).
  void run(int64_t b, int64_t head_kv, int64_t split) {
    start_part(b, head_kv, split);
    const Range keys = p_.keys_of(b, split);
    const int64_t len = keys.end - keys.begin, group = a_.heads_q / a_.heads_kv;
    const int64_t blocks = max_of(1, (len + p_.block_k - 1) / p_.block_k);
    const int64_t step = round_up((len + blocks - 1) / blocks, kKeyUnit);
    int64_t started = 0;  // rows of dq below it hold a sum already
    for (int64_t j = keys.begin; j < keys.end; j += step) {
      key0_ = j;
      count_ = min_of(step, keys.end - j);
      kept_ = max_of(0, min_of(count_, a_.key_limit(b) - j));
      const Range queries = p_.queries_of(b, {j, j + kept_});
      if (!queries.empty()) {
        load_keys();
        const int64_t first = queries.begin / kBlockQ<Op> * kBlockQ<Op>;
        for (int64_t h = 0; h < group; ++h)
          for (int64_t q = first; q < queries.end; q += kBlockQ<Op>) visit(head_kv * group + h, q, q >= started);
        started = max_of(started, round_up(queries.end, kBlockQ<Op>));
      }
      store_rows(p_.g.grad_key, a_.head_dim, grad_key_, p_.width, queries.empty() ? 0 : kept_, a_.scale);
      store_rows(p_.g.grad_value, a_.head_dim_v, grad_value_, p_.width_v, queries.empty() ? 0 : kept_, 1.f);
      if (a_.global_keys) keep_global_sums(queries.empty());
    }
  }

  // The global keys of (batch, KV head), after all its splits.
  void run_globals(int64_t b, int64_t head_kv) {
    start_part(b, head_kv, p_.splits);
    const int64_t count = a_.global_count(b), group = a_.heads_q / a_.heads_kv;
    const Range queries = p_.global_queries_of(b);
    const float* sums = p_.grad_global_of(b, head_kv);
    for (int64_t k = 0; k < count && !queries.empty(); k += p_.block_k) {
      global_keys_ = a_.global_keys + a_.global_begin[b] + k;
      kept_ = min_of(p_.block_k, count - k);
      load_keys();
      for (int64_t h = 0; h < group; ++h)
        for (int64_t q = queries.begin / kBlockQ<Op> * kBlockQ<Op>; q < queries.end; q += kBlockQ<Op>)
          visit(head_kv * group + h, q, k == 0);
      for (int64_t j = 0; j < kept_; ++j, sums += p_.width + p_.width_v) {
        add_row(grad_key_ + j * p_.width, sums, p_.width);
        add_row(grad_value_ + j * p_.width_v, sums + p_.width, p_.width_v);
        store_row(row_of<T>(p_.g.grad_key, b, head_kv, global_keys_[j]), a_.head_dim, grad_key_ + j * p_.width, a_.scale);
        store_row(row_of<T>(p_.g.grad_value, b, head_kv, global_keys_[j]), a_.head_dim_v, grad_value_ + j * p_.width_v, 1.f);
      }
    }
  }

 private:
  void start_part(int64_t b, int64_t head_kv, int64_t split) {
    b_ = b, head_kv_ = head_kv, split_ = split;
    const int64_t group = a_.heads_q / a_.heads_kv;
    for (int64_t h = head_kv * group; h < (head_kv + 1) * group; ++h) {
      if (p_.grad_alibi) grad_alibi(h) = 0.;
      if (p_.grad_lag) __builtin_memset(grad_lag(h), 0, size_t(a_.lag_head) * sizeof(float));
    }
  }

  void pack_keys(const View& view, int64_t dim, Op* out, int64_t width) {
    const int64_t padded = round_up(kept_, kStep<Op>);
    if (!global_keys_) {
      const T* rows = row_of<const T>(view, b_, head_kv_, a_.key_row0(b_) + key0_);
      return pack_rows(rows, view.row, kept_, padded, dim, out, width);
    }
    for (int64_t j = 0; j < padded; ++j)
      pack_rows(row_of<const T>(view, b_, head_kv_, global_keys_[min_of(j, kept_ - 1)]), 0, j < kept_, 1, dim,
                out + j * width, width);
  }

  void load_keys() {
    pack_keys(a_.key, a_.head_dim, key_, stage_);
    pack_keys(a_.value, a_.head_dim_v, value_, stage_v_);
#if defined(XF_BF16_DOT)
    if constexpr (kStep<Op> == 2) interleave_row_pairs(key_, stage_, round_up(kept_, kStep<Op>), p_.width, key_rows_);
#endif
    __builtin_memset(grad_key_, 0, size_t(kept_ * p_.width) * sizeof(float));
    __builtin_memset(grad_value_, 0, size_t(kept_ * p_.width_v) * sizeof(float));
  }

  void store_rows(const View& grad, int64_t dim, const float* sums, int64_t width, int64_t kept, float scale) {
    for (int64_t j = 0; j < count_; ++j)
      store_row(row_of<T>(grad, b_, head_kv_, a_.key_row0(b_) + key0_ + j), dim,
                j < kept ? sums + j * width : nullptr, scale);
  }

  // For run_globals: the block's sums for global keys, not rounded.
  void keep_global_sums(bool none) {
    const int64_t* keys = a_.global_keys + a_.global_begin[b_];
    float* out = p_.grad_global_of(b_, head_kv_);
    for (int64_t n = 0; n < a_.global_count(b_); ++n, out += p_.width + p_.width_v) {
      const int64_t j = keys[n] - key0_;
      if (j < 0 || j >= kept_) continue;
      __builtin_memset(out, 0, size_t(p_.width + p_.width_v) * sizeof(float));
      if (none) continue;
      add_row(out, grad_key_ + j * p_.width, p_.width);
      add_row(out + p_.width, grad_value_ + j * p_.width_v, p_.width_v);
    }
  }

  double& grad_alibi(int64_t head) { return p_.grad_alibi[(split_ * a_.batch + b_) * a_.heads_q + head]; }
  float* grad_lag(int64_t head) { return p_.grad_lag + ((split_ * a_.batch + b_) * a_.heads_q + head) * a_.lag_head; }

  void visit(int64_t head, int64_t q0, bool first) {
    const int64_t rows = min_of(kBlockQ<Op>, a_.len_q(b_) - q0), row0 = p_.row0(b_, head) + q0;
    for (int64_t i = 0; i < kBlockQ<Op>; ++i) {
      neg_lse_[i] = i < rows ? p_.neg_lse[row0 + i] : -kInfinity;
      neg_rest_[i] = i < rows ? p_.neg_rest[row0 + i] : 0.f;
      delta_[i] = i < rows ? p_.delta[row0 + i] : 0.f;
    }
    const int64_t row = a_.query_row0(b_) + q0;
    pack_queries(row_of<const T>(a_.query, b_, head, row), a_.query.row, rows, a_.head_dim, query_scale_, query_t_,
                 query_);
    pack_queries(row_of<const T>(p_.g.grad_out, b_, head, row), p_.g.grad_out.row, rows, a_.head_dim_v, 1.f,
                 grad_out_t_, grad_out_);
    float* grad_query = p_.grad_query + (split_ * p_.rows + row0) * p_.width;
    if (first) __builtin_memset(grad_query, 0, size_t(rows * p_.width) * sizeof(float));
    if (a_.has_map_bias()) load_map_bias(head, q0, rows, first);

    const int64_t shift = a_.shift(b_);
    for (int64_t j = 0, n; j < kept_; j += n) {
      n = min_of(kTileKeys, kept_ - j);
      if (global_keys_) {
        const int64_t begin = a_.causal ? max_of(0, global_keys_[j] + a_.left + 1 - shift - q0) / kLanes * kLanes : 0;
        if (begin < rows) tile(head, q0, rows, j, n, {begin, round_up(rows, kLanes)}, grad_query);
        continue;
      }
      if (!all_kept(q0, rows, key0_ + j, n, shift)) n = min_of(n, kStripKeys);
      const Range kept = p_.queries_of(b_, {key0_ + j, key0_ + j + n});
      const int64_t begin = max_of(0, kept.begin - q0) / kLanes * kLanes;
      const int64_t end = round_up(min_of(rows, kept.end - q0), kLanes);
      if (begin < end) tile(head, q0, rows, j, n, {begin, end}, grad_query);
    }
  }

  // The query block's bias of the map for the rows of it that the key block lies in, and all columns.
  void load_map_bias(int64_t head, int64_t q0, int64_t rows, bool first) {
    constexpr int64_t ld = kBlockQ<Op>;
    Range of_map{0, a_.map_rows};
    if (!global_keys_) of_map = {key0_ / a_.map_columns, (key0_ + kept_ - 1) / a_.map_columns + 1};
    const float* row_bias = row_of<const float>(a_.row_bias, b_, head, q0) + of_map.begin;
    const float* column_bias = row_of<const float>(a_.column_bias, b_, head, q0);
    pack_transposed(row_bias, a_.row_bias.row, rows, of_map.end - of_map.begin, 1.f, map_bias_ + of_map.begin * ld, ld);
    pack_transposed(column_bias, a_.column_bias.row, rows, a_.map_columns, 1.f, map_bias_ + a_.map_rows * ld, ld);
    if (first && p_.grad_map)
      __builtin_memset(grad_map(head, q0), 0, size_t((a_.map_rows + a_.map_columns) * ld) * sizeof(float));
  }

  float* grad_map(int64_t head, int64_t q0) { return p_.grad_map_of(split_, b_, head, q0, kBlockQ<Op>); }

  // Query-side rows as the operand that is reduced over the head dim, scaled unless it is bfloat16, and as the one that
  // is reduced over queries.
  void pack_queries(const T* in, int64_t stride, int64_t rows, int64_t dim, float scale, Op* transposed,
                    Op* out) {
    const int64_t padded = round_up(rows, kLanes), width = round_up(dim, kLanes);
    if constexpr (kStep<Op> == 1) {
      pack_rows(in, stride, rows, padded, dim, out, width, neg_lse_);
      pack_transposed(out, width, padded, dim, scale, transposed, kBlockQ<Op>);
    }
#if defined(XF_BF16_DOT)
    if constexpr (kStep<Op> == 2) {
      const int64_t stage = round_up(dim, 2 * kLanes);
      pack_rows(in, stride, rows, padded, dim, staged_, stage, neg_lse_);
      pack_transposed_pairs(staged_, stage, padded, dim, transposed, 2 * kBlockQ<Op>);
      interleave_row_pairs(staged_, stage, padded, width, out);
    }
#endif
  }

  bool all_kept(int64_t q0, int64_t rows, int64_t key, int64_t n, int64_t shift) const {
    return key + n - 1 <= q0 + shift + a_.right && key >= q0 + rows - 1 + shift - a_.left;
  }

  // Keys [j, j + n) of the block against lanes of the query block at q0.
  void tile(int64_t head, int64_t q0, int64_t rows, int64_t j, int64_t n, Range lanes, float* grad_query) {
    for (int64_t s = 0; s < n; s += kStripKeys)
      strip(head, q0, rows, j + s, min_of(kStripKeys, n - s), lanes, tile_.from(s));

    const int64_t width = lanes.end - lanes.begin, ld = kBlockQ<Op>, at = lanes.begin;
    product(n, p_.width_v, width / kStep<Op>, tile_.p + at, ld, kStep<Op>, grad_out_ + at * p_.width_v,
            p_.width_v * kStep<Op>, grad_value_ + j * p_.width_v, p_.width_v, Start::accumulate);
    product(n, p_.width, width / kStep<Op>, tile_.ds + at, ld, kStep<Op>, query_ + at * p_.width, p_.width * kStep<Op>,
            grad_key_ + j * p_.width, p_.width, Start::accumulate);
    product(min_of(rows, lanes.end) - at, p_.width, (n + kStep<Op> - 1) / kStep<Op>, tile_.ds_pairs + at * kStep<Op>,
            kStep<Op>, ld * kStep<Op>, key_rows_ + j * p_.width, p_.width * kStep<Op>, grad_query + at * p_.width,
            p_.width, Start::accumulate);
  }

  // S, dP, then P and dS of some keys of a tile.
  void strip(int64_t head, int64_t q0, int64_t rows, int64_t j, int64_t n, Range lanes, const GradientTile<Op>& out) {
    constexpr int64_t step = kStep<Op>, ld = kBlockQ<Op>;
    const int64_t width = lanes.end - lanes.begin, at = lanes.begin;
    product(n, width, (a_.head_dim + step - 1) / step, key_ + j * stage_, stage_, step, query_t_ + at * step, ld * step,
            out.scores + at, ld, Start::overwrite);
    for (int64_t d = 0; d < a_.head_dim_v; d += kGradientChain)
      product(n, width, (min_of(kGradientChain, a_.head_dim_v - d) + step - 1) / step, value_ + j * stage_v_ + d, stage_v_,
              step, grad_out_t_ + at * step + d * ld, ld * step, out.grad + at, ld, d ? Start::accumulate : Start::overwrite);

    const MapPanels<const float> map_bias{map_bias_, map_bias_ + a_.map_rows * ld, ld, a_.map_columns};
    const ScoreTile scores{out.scores, ld, b_, head, key0_ + j, q0, rows, a_.shift(b_), map_bias};
    const Segment segment{0, n, int(at / kLanes), int(lanes.end / kLanes)};
    const int64_t* keys = global_keys_ ? global_keys_ + j : nullptr;
    if (score_pass_) score_options(scores, segment, keys);
    if (keys)
      mask_window(a_, scores, segment, keys);
    else if (!all_kept(q0, rows, key0_ + j, n, scores.shift))
      mask_edges(a_, scores, segment);
    if (out.dropout) dropout_factor(DropoutKeep(a_, b_, head), scores, segment, keys, out.dropout);
    const bool keep_float = p_.grad_alibi || p_.grad_lag || p_.grad_map || p_.g.grad_mask;
    softmax_gradient(out, n, at, lanes.end, exponent_scale_, {neg_lse_, neg_rest_, delta_}, keep_float);
    if (!keep_float) return;
    const float* ds = out.factor ? out.factor : out.grad;
    for_each_run(keys, scores, segment, [&](const ScoreTile& run, const Segment& part, int64_t row) {
      auxiliary_gradients(run, part, ds + row * ld);
    });
  }

  void score_options(const ScoreTile& scores, const Segment& segment, const int64_t* keys) {
    const float unapplied = kStep<Op> == 2 ? a_.scale : 1.f;
    const auto apply = [&](const Attention& a, float scale) {
      for_each_run(keys, scores, segment, [&](const ScoreTile& run, const Segment& part, int64_t) {
        apply_options(a, run, part, scale);
      });
    };
    if (a_.softcap == 0.f) return apply(a_, unapplied);
    apply_softcap(scores, segment, unapplied, a_.softcap);
    softcap_factor(scores, segment, a_.softcap, tile_.factor);
    Attention rest = a_;
    rest.softcap = 0.f;
    apply(rest, 1.f);
  }

  void auxiliary_gradients(const ScoreTile& scores, const Segment& segment, const float* ds) {
    if (p_.grad_alibi) grad_alibi(scores.head) -= distance_sum(ds, scores, segment);
    if (p_.grad_lag) add_distance_gradient(ds, scores, segment, grad_lag(scores.head) + a_.lag_offset);
    if (p_.grad_map) {
      float* sums = grad_map(scores.head, scores.query0);
      constexpr int64_t block = kBlockQ<Op>;
      add_decomposed_gradient({sums, sums + a_.map_rows * block, block, a_.map_columns}, ds, scores.ld, scores.key0,
                              segment.row0, segment.row1, segment.vector0, segment.vector1);
    }
    if (const AttentionGrad& g = p_.g; g.grad_mask)
      add_mask_gradient(ds, scores, segment,
                        g.grad_mask + b_ * g.grad_mask_batch + scores.head * g.grad_mask_head +
                            scores.query0 * g.grad_mask_q + scores.key0 * g.grad_mask_k,
                        g.grad_mask_q, g.grad_mask_k);
  }

  const Plan& p_;
  const Attention& a_;
  int64_t stage_ = 0, stage_v_ = 0;  // row lengths of packed operands
  float query_scale_ = 1.f;          // the forward's, so that both see the same scores to the last bit
  bool score_pass_ = false;
  float exponent_scale_ = 1.f;       // what softmax_gradient multiplies scores by
  Op *key_ = nullptr, *value_ = nullptr;              // (keys, stage)
  Op* key_rows_ = nullptr;                            // (keys, width); pairs: (keys / 2, width, 2)
  float *grad_key_ = nullptr, *grad_value_ = nullptr; // (keys, width)
  Op* staged_ = nullptr;                              // pairs: (queries, stage)
  Op *query_t_ = nullptr, *grad_out_t_ = nullptr;     // (head dim, queries); pairs: (head dim / 2, queries, 2)
  Op *query_ = nullptr, *grad_out_ = nullptr;         // (queries, width); pairs: (queries / 2, width, 2)
  float *neg_lse_ = nullptr, *neg_rest_ = nullptr, *delta_ = nullptr;  // (queries)
  GradientTile<Op> tile_{};
  float* map_bias_ = nullptr;  // (map rows, then columns, queries)
  size_t arena_bytes_ = 0;
  int64_t b_ = 0, head_kv_ = 0, split_ = 0;
  int64_t key0_ = 0, count_ = 0, kept_ = 0;  // the block: first key, keys, keys below the key limit
  const int64_t* global_keys_ = nullptr;     // or these
};

// The elements of grad_mask that belong to a task.
void clear_mask_gradient(const Plan& p, Range batch, Range heads_kv, Range keys) {
  const AttentionGrad& g = p.g;
  const int64_t group = p.a.heads_q / p.a.heads_kv;
  auto once = [](Range r, int64_t stride) { return stride == 0 ? Range{r.begin, r.begin + 1} : r; };
  const Range b = once(batch, g.grad_mask_batch);
  const Range h = once({heads_kv.begin * group, heads_kv.end * group}, g.grad_mask_head);
  const Range q = once({0, p.a.seqlen_q}, g.grad_mask_q), k = once(keys, g.grad_mask_k);
  for (int64_t ib = b.begin; ib < b.end; ++ib)
    for (int64_t ih = h.begin; ih < h.end; ++ih)
      for (int64_t i = q.begin; i < q.end; ++i) {
        float* row = g.grad_mask + ib * g.grad_mask_batch + ih * g.grad_mask_head + i * g.grad_mask_q;
        for (int64_t j = k.begin; j < k.end; ++j) row[j * g.grad_mask_k] = 0.f;
      }
}

// ---- 3. gather ----

// The sum of `count` numbers over the parts that have touched query i, in the first of them; nullptr if none has.
template <class PartOf>
float* sum_of_parts(const Plan& p, const Range* touched, int64_t i, int64_t count, PartOf part_of) {
  float* sum = nullptr;
  for (int64_t s = 0; s < p.parts; ++s) {
    if (i < touched[s].begin || i >= touched[s].end) continue;
    if (sum)
      add_row(sum, part_of(s), count);
    else
      sum = part_of(s);
  }
  return sum;
}

// dq and the bias of the map's gradient for some rows of one head.
template <class T>
void gather(const Plan& p, int64_t b, int64_t h, Range rows) {
  const Attention& a = p.a;
  constexpr int64_t block = kBlockQ<Operand<T>>;
  Range touched[kMaxSplits + 1];  // query rows that a part has summed
  for (int64_t s = 0; s < p.splits; ++s) {
    const Range keys = p.keys_of(b, s), q = p.queries_of(b, {keys.begin, min_of(keys.end, a.key_limit(b))});
    touched[s] = q.empty() ? Range{0, 0} : Range{q.begin / block * block, round_up(q.end, block)};
  }
  if (p.parts > p.splits) {
    const Range q = p.global_queries_of(b);
    touched[p.splits] = q.empty() ? Range{0, 0} : Range{q.begin / block * block, round_up(q.end, block)};
  }
  for (int64_t i = rows.begin; i < rows.end; ++i) {
    float* sum = sum_of_parts(p, touched, i, p.width, [&](int64_t s) {
      return p.grad_query + (s * p.rows + p.row0(b, h) + i) * p.width;
    });
    store_row(row_of<T>(p.g.grad_query, b, h, a.query_row0(b) + i), a.head_dim, sum, a.scale);
  }
  for (int64_t i = rows.begin; p.grad_map && i < rows.end; i += block) {
    const int64_t numbers = a.map_rows + a.map_columns, row = (b * a.heads_q + h) * a.seqlen_q + i;
    const float* sum = sum_of_parts(p, touched, i, numbers * block, [&](int64_t s) { return p.grad_map_of(s, b, h, i, block); });
    store_map_gradient(sum, block, min_of(block, rows.end - i), a.map_rows, p.g.grad_row_bias + row * a.map_rows);
    store_map_gradient(sum ? sum + a.map_rows * block : nullptr, block, min_of(block, rows.end - i), a.map_columns,
                       p.g.grad_column_bias + row * a.map_columns);
  }
  if (rows.begin > 0) return;
  if (p.g.grad_sinks) {
    const int64_t row0 = p.row0(b, h);
    p.g.grad_sinks[b * a.heads_q + h] = sink_gradient(a.sinks[h], {p.neg_lse + row0, p.neg_rest + row0, p.delta + row0}, a.len_q(b));
  }
  if (p.grad_alibi) {
    double sum = 0.;
    for (int64_t s = 0; s < p.parts; ++s) sum += p.grad_alibi[(s * a.batch + b) * a.heads_q + h];
    p.g.grad_alibi_slopes[b * a.heads_q + h] = float(sum);
  }
}

// The gradient of one head's bias of distance: its sums over splits and batch, from the nearest distance on.
void gather_distance(void* context, int64_t head, char*) {
  const Plan& p = *static_cast<const Plan*>(context);
  const Attention& a = p.a;
  float* out = p.g.grad_distance + head * a.distance_count;
  for (int64_t n = 0; n < a.distance_count; ++n) {
    const float* part = p.grad_lag + head * a.lag_head + a.lag_offset + a.distance_offset - n;
    float sum = 0.f;
    for (int64_t s = 0; s < p.parts * a.batch; ++s) sum += part[s * a.heads_q * a.lag_head];
    out[n] = sum;
  }
}

// ---- the runs ----

// Runs 1 and 3: a task is a chunk of one head's query rows.
template <void (*chunk_of_rows)(const Plan&, int64_t, int64_t, Range)>
void query_rows(void* context, int64_t task, char*) {
  const Plan& p = *static_cast<const Plan*>(context);
  const int64_t chunks = (p.a.seqlen_q + kRowsPerTask - 1) / kRowsPerTask, begin = task % chunks * kRowsPerTask;
  const int64_t b = task / chunks / p.a.heads_q, h = task / chunks % p.a.heads_q;
  chunk_of_rows(p, b, h, {begin, min_of(p.a.len_q(b), begin + kRowsPerTask)});
}

// Run 2; all three at once for a task that owns all keys of its heads.
template <class T>
void key_range(void* context, int64_t task, char* scratch) {
  const Plan& p = *static_cast<const Plan*>(context);
  const Attention& a = p.a;
  const int64_t split = task % p.splits, h = task / p.splits % p.tasks_h, b = task / p.splits / p.tasks_h;
  const Range batch = p.tasks_b == 1 ? Range{0, a.batch} : Range{b, b + 1};
  const Range heads = p.tasks_h == 1 ? Range{0, a.heads_kv} : Range{h, h + 1};
  if (p.g.grad_mask) clear_mask_gradient(p, batch, heads, p.keys_of(0, split));
  KeyBlock<T> block(p, Arena(scratch));
  for (int64_t i = batch.begin; i < batch.end; ++i)
    for (int64_t k = heads.begin; k < heads.end; ++k) {
      const int64_t group = p.parts == 1 ? a.heads_q / a.heads_kv : 0;
      for (int64_t q = k * group; q < (k + 1) * group; ++q) row_statistics<T>(p, i, q, {0, a.len_q(i)});
      block.run(i, k, split);
      for (int64_t q = k * group; q < (k + 1) * group; ++q) gather<T>(p, i, q, {0, a.len_q(i)});
    }
}

// The global keys, after run 2. Tasks are those of one range there.
template <class T>
void global_keys(void* context, int64_t task, char* scratch) {
  const Plan& p = *static_cast<const Plan*>(context);
  const int64_t h = task % p.tasks_h, b = task / p.tasks_h;
  const Range batch = p.tasks_b == 1 ? Range{0, p.a.batch} : Range{b, b + 1};
  const Range heads = p.tasks_h == 1 ? Range{0, p.a.heads_kv} : Range{h, h + 1};
  KeyBlock<T> block(p, Arena(scratch));
  for (int64_t i = batch.begin; i < batch.end; ++i)
    for (int64_t k = heads.begin; k < heads.end; ++k) block.run_globals(i, k);
}

template <class T>
void backward(const Attention& a, const AttentionGrad& g, const Pool& pool) {
  Plan p{a, g};
  p.rows = a.heads_q * (a.cu_seqlens_q ? a.cu_seqlens_q[a.batch] : a.batch * a.seqlen_q);
  p.width = round_up(a.head_dim, kLanes);
  p.width_v = round_up(a.head_dim_v, kLanes);
  const int64_t key_bytes = (p.width + p.width_v) * int64_t(sizeof(Operand<T>) + sizeof(float));
  p.block_k = min_of(kKeysPerBlock, max_of(kKeyUnit, kBlockBytes / key_bytes / kKeyUnit * kKeyUnit));
  p.block_k = min_of(p.block_k, round_up(max_of(1, a.seqlen_k), kKeyUnit));
  p.tasks_b = g.grad_mask && g.grad_mask_batch == 0 ? 1 : a.batch;
  p.tasks_h = g.grad_mask && g.grad_mask_head == 0 ? 1 : a.heads_kv;
  const int64_t heads = p.tasks_b * p.tasks_h, keys_per_split = heads < a.batch * a.heads_kv ? kKeyUnit : kKeysPerSplit;
  if (!(g.grad_mask && g.grad_mask_k == 0)) {
    p.splits = min_of((kTasksWanted + heads - 1) / heads, (a.seqlen_k + keys_per_split - 1) / keys_per_split);
    p.splits = max_of(1, min_of(kMaxSplits, p.splits));
  }
  p.split_bounds = static_cast<int64_t*>(pool.allocate(pool.self, size_t(a.batch * (p.splits + 1)) * sizeof(int64_t)));
  for (int64_t b = 0; b < a.batch; ++b) cut_keys(p, b, p.split_bounds + b * (p.splits + 1));

  p.parts = p.splits + (a.global_keys != nullptr);
  auto floats = [&](int64_t n) { return static_cast<float*>(pool.allocate(pool.self, size_t(n) * sizeof(float))); };
  p.neg_lse = floats(p.rows);
  p.neg_rest = floats(p.rows);
  p.delta = floats(p.rows);
  p.grad_query = floats(p.parts * p.rows * p.width);
  if (g.grad_alibi_slopes) p.grad_alibi = reinterpret_cast<double*>(floats(2 * p.parts * a.batch * a.heads_q));
  if (g.grad_distance) p.grad_lag = floats(p.parts * a.batch * a.heads_q * a.lag_head);
  if (g.grad_row_bias || g.grad_column_bias) {
    constexpr int64_t block = kBlockQ<Operand<T>>;
    p.grad_map = floats(p.parts * a.batch * a.heads_q * round_up(a.seqlen_q, block) * (a.map_rows + a.map_columns));
  }
  if (a.global_keys) p.grad_global = floats(a.heads_kv * a.global_begin[a.batch] * (p.width + p.width_v));

  const int64_t chunks = a.batch * a.heads_q * ((a.seqlen_q + kRowsPerTask - 1) / kRowsPerTask);
  if (p.parts > 1) pool.run(chunks, query_rows<row_statistics<T>>, &p, 0);
  pool.run(p.tasks_b * p.tasks_h * p.splits, key_range<T>, &p, KeyBlock<T>::scratch_bytes(p));
  if (a.global_keys) pool.run(p.tasks_b * p.tasks_h, global_keys<T>, &p, KeyBlock<T>::scratch_bytes(p));
  if (p.parts > 1) pool.run(chunks, query_rows<gather<T>>, &p, 0);
  if (g.grad_distance) pool.run(a.heads_q, gather_distance, &p, 0);
}

}  // namespace

void attention_backward(const Attention& a, const AttentionGrad& g, const Pool& pool) {
  switch (a.element) {
    case Element::float32: return backward<float>(a, g, pool);
    case Element::bfloat16: return backward<bfloat16>(a, g, pool);
    default: return backward<float16>(a, g, pool);
  }
}

}  // namespace XFORMER_FAST_ISA
}  // namespace xformer_fast
