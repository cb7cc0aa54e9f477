// Neighborhood attention, forward: softmax(scale q_i . k_j + bias_(j-i)) v_j over the keys j near each query i of a map
// (Hassani et al., "Neighborhood Attention Transformer", 2023), with dilation, causal axes and grouped heads.
//
// Tiling, in neighborhood_tiles.h. A task is a chunk of the map's pieces for one KV head. Keys and values of a strip lie in
// scratch, float32; scores are computed transposed, S^T[key][query], all keys of a tile's box in one:
//     S^T = K Q^T     A = K in scratch (scalar broadcast),            B = Q^T, times scale and log2(e)
//     O^T = V^T P^T   A = V in scratch, read transposed,              B = S^T after the exponential, in place
// One pass between them adds the bias and masks what a lane does not see. A tile is small, one vector of queries where the
// kernel is: 2 x 4 queries under a kernel of 7 x 7 make 8 x 10 keys of their 49 (61% of the scores are kept).
//
// Not here: products of bfloat16 pairs; a softmax in blocks: the scores of a tile and its whole box are held at once, so
// boxes of many thousands of keys leave the second-level cache.
#include "neighborhood_tiles.h"

namespace xformer_fast {
namespace XFORMER_FAST_ISA {
namespace {

struct ForwardPlan : NeighborhoodPlan {
  const float* bias;
};

template <class T>
class NeighborhoodForward {
 public:
  NeighborhoodForward(const ForwardPlan& plan, Arena arena) : p_(plan), a_(*plan.attention), walk_(plan, arena) {
    arena.take(walk_.most_line_rows() * plan.width, key_);
    arena.take(walk_.most_line_rows() * plan.width_v, value_);
    arena.take(walk_.most_rows() * plan.lanes, scores_);
    arena.take(plan.width * plan.lanes, query_t_);
    arena.take(plan.width_v * plan.lanes, out_t_);
    arena.take(max_of(plan.width, plan.width_v) * plan.lanes, staging_);
    arena.take(plan.lanes, top_, sum_);
    used_ = arena.used();
  }

  static size_t bytes(const ForwardPlan& plan) { return size_t(NeighborhoodForward(plan, Arena(nullptr)).used_); }

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
      for (int64_t h = head_kv * p_.group(); h < (head_kv + 1) * p_.group(); ++h) {
        const HeadMap<T> query = head_map<T>(p_, piece, a_.query, h), out = head_map<T>(p_, piece, a_.out, h);
        for (int64_t t = piece.first_tile; t < piece.last_tile; ++t) {
          walk_.move_to_tile(t);
          Prefetch for_scores, for_out;
          walk_.add_lanes(for_scores, query, a_.head_dim, true);
          walk_.add_next_lines(for_scores, key, a_.head_dim);
          walk_.add_lanes(for_out, out, a_.head_dim_v, false);
          walk_.add_next_lines(for_out, value, a_.head_dim_v);
          tile(query, out, p_.bias ? p_.bias + h * p_.bias_head() : nullptr, for_scores, for_out);
        }
      }
    }
  }

 private:
  void tile(const HeadMap<T>& query, const HeadMap<T>& out, const float* bias, Prefetch& for_scores,
            Prefetch& for_out) {
    const int64_t lanes = p_.lanes, rows = walk_.rows().count();
    walk_.load_lanes(query, a_.head_dim, p_.width, a_.scale * kLog2e, staging_, query_t_);
    tile_product(rows, p_.vectors, a_.head_dim, key_ + walk_.first_row() * p_.width, p_.width, 1, query_t_, lanes, scores_,
                 lanes, Start::overwrite, nullptr, &for_scores);
    softmax_rows(p_.vectors, walk_.rows(), scores_, bias, top_, sum_);
    invert(sum_, lanes);
    tile_product(a_.head_dim_v, p_.vectors, rows, value_ + walk_.first_row() * p_.width_v, 1, p_.width_v, scores_, lanes,
                 out_t_, lanes, Start::overwrite, nullptr, &for_out);
    walk_.store_lanes(out_t_, sum_, a_.head_dim_v, p_.width_v, staging_, out);
  }

  const ForwardPlan& p_;
  const NeighborhoodAttention& a_;
  TileWalk<Rows::keys> walk_;
  float *key_, *value_, *scores_, *query_t_, *out_t_, *staging_, *top_, *sum_;
  int64_t used_;
};

template <class T>
void forward_task(void* context, int64_t task, char* scratch) {
  const ForwardPlan& plan = *static_cast<const ForwardPlan*>(context);
  const int64_t heads = plan.attention->heads_kv, chunk = task / heads;
  NeighborhoodForward<T> forward(plan, Arena(scratch));
  for (int64_t i = plan.pieces * chunk / plan.chunks; i < plan.pieces * (chunk + 1) / plan.chunks; ++i)
    forward.run(piece_of(plan, i), task % heads);
}

template <class T>
void forward_of(const NeighborhoodAttention& a, const Pool& pool) {
  ForwardPlan plan{plan_neighborhoods(a), nullptr};
  plan.bias = dense_bias<Rows::keys>(plan, pool);
  pool.run(plan.chunks * a.heads_kv, forward_task<T>, &plan, NeighborhoodForward<T>::bytes(plan));
}

}  // namespace

void neighborhood_attention_forward(const NeighborhoodAttention& a, const Pool& pool) {
  switch (a.element) {
    case Element::float32: return forward_of<float>(a, pool);
    case Element::bfloat16: return forward_of<bfloat16>(a, pool);
    case Element::float16: return forward_of<float16>(a, pool);
    case Element::boolean: return;
  }
}

}  // namespace XFORMER_FAST_ISA
}  // namespace xformer_fast
