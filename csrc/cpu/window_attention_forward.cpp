// Windowed attention, forward: softmax(scale q_i . k_j + bias_ij) v_j over the tokens i, j of each window of a map, the
// windows shifted cyclically and cut into regions (Liu et al., "Swin Transformer", 2021), of cosines instead of products
// ("Swin Transformer V2", 2022), or of tokens spread over a grid (Tu et al., "MaxViT", 2022).
//
// Tiling. A task is a chunk of windows for a group of heads. A window's rows are gathered from where they lie, head after
// head while their pages are at hand, so that shift, partition and reverse are the addresses of rows. Scores are computed
// transposed, S^T[key][query], one tile of up to kTileVectors vectors of queries at a time, all keys of the window in one:
//     S^T = K Q^T     A = K in scratch (scalar broadcast),            B = Q^T
//     O^T = V^T P^T   A = V in scratch, read transposed,              B = S^T after the exponential, in place
// Scale, norms, bias and the region mask join in one pass between; the mask only where a window holds a wrap of the map.
//
// bfloat16 and float16 are float32 in scratch. Not here: windows of a million tokens; a call with a table or a bias holds
// it densely, once for all windows.
#include "window_tiles.h"

namespace xformer_fast {
namespace XFORMER_FAST_ISA {
namespace {

template <class T>
class WindowForward {
 public:
  WindowForward(const WindowPlan& plan, char* scratch) : p_(plan), a_(*plan.attention) {
    Arena arena(scratch);
    arena.take(plan.padded * plan.width, query_, key_, query_t_);
    arena.take(plan.padded * plan.width_v, value_, out_);
    arena.take(plan.tokens * kTileVectors * kLanes, scores_);
    arena.take(plan.width_v * kTileVectors * kLanes, out_t_);
    arena.take(plan.padded, lane_scale_, key_scale_, sum_);
    arena.take(plan.tokens, at_query_, at_key_, at_value_, at_out_);
    used_ = arena.used();
  }

  static size_t bytes(const WindowPlan& plan) { return size_t(WindowForward(plan, nullptr).used_); }

  void window(const WindowPlace& place, int64_t first_head, int64_t last_head) {
    place_ = place;
    row_offsets(p_, place, a_.query, at_query_);
    row_offsets(p_, place, a_.key, at_key_);
    row_offsets(p_, place, a_.value, at_value_);
    row_offsets(p_, place, a_.out, at_out_);
    for (int64_t h = first_head; h < last_head; ++h) head(h);
  }

 private:
  void head(int64_t h) {
    const int64_t n = p_.tokens;
    gather_rows(static_cast<const T*>(a_.query.data) + h * a_.query.head, at_query_, n, p_.padded, a_.head_dim, query_, p_.width);
    gather_rows(static_cast<const T*>(a_.key.data) + h * a_.key.head, at_key_, n, n, a_.head_dim, key_, p_.width);
    gather_rows(static_cast<const T*>(a_.value.data) + h * a_.value.head, at_value_, n, n, a_.head_dim_v, value_, p_.width_v);
    pack_transposed(query_, p_.width, p_.padded, p_.width, 1.f, query_t_, p_.padded);
    scales(h);
    const TileCut cut(p_.padded / kLanes);
    for (int64_t t = 0; t < cut.tiles; ++t) tile(h, cut.first(t) * kLanes, int(cut.first(t + 1) - cut.first(t)));
    scatter_rows(out_, p_.width_v, 1.f, n, a_.head_dim_v, static_cast<T*>(a_.out.data) + h * a_.out.head, at_out_);
  }

  void scales(int64_t h) {
    const float scale = (a_.logit_scale ? a_.logit_scale[h] : a_.scale) * kLog2e;
    if (a_.logit_scale) {
      inverse_norms(query_, p_.width, p_.padded, lane_scale_);
      inverse_norms(key_, p_.width, p_.tokens, key_scale_);
      for (int64_t i = 0; i < p_.padded; i += kLanes) store(lane_scale_ + i, load(lane_scale_ + i) * scale);
    } else {
      for (int64_t i = 0; i < p_.padded; i += kLanes) store(lane_scale_ + i, broadcast(scale));
    }
  }

  void tile(int64_t h, int64_t query0, int vectors) {
    const int64_t ld = vectors * kLanes;
    tile_product(p_.tokens, vectors, a_.head_dim, key_, p_.width, 1, query_t_ + query0, p_.padded, scores_, ld, Start::overwrite);
    const WindowScores s{scores_, ld, p_.tokens, p_.bias ? p_.bias + h * p_.bias_head() + query0 : nullptr, p_.padded,
                         lane_scale_ + query0, a_.logit_scale ? key_scale_ : nullptr, p_.region, p_.region + query0,
                         place_.edges};
    softmax_columns(vectors, s, sum_);
    for (int v = 0; v < vectors; ++v) store(sum_ + v * kLanes, 1.f / load(sum_ + v * kLanes));
    tile_product(a_.head_dim_v, vectors, p_.tokens, value_, 1, p_.width_v, scores_, ld, out_t_, ld, Start::overwrite);
    store_transposed(out_t_, ld, ld, p_.width_v, sum_, out_ + query0 * p_.width_v, p_.width_v);
  }

  const WindowPlan& p_;
  const WindowAttention& a_;
  WindowPlace place_;
  float *query_, *key_, *value_, *query_t_, *out_, *scores_, *out_t_, *lane_scale_, *key_scale_, *sum_;
  int64_t *at_query_, *at_key_, *at_value_, *at_out_;
  int64_t used_;
};

template <class T>
void forward_task(void* context, int64_t task, char* scratch) {
  const WindowPlan& plan = *static_cast<const WindowPlan*>(context);
  const int64_t chunk = task / plan.head_groups, group = task % plan.head_groups;
  WindowForward<T> forward(plan, scratch);
  for (int64_t w = plan.first_window(chunk); w < plan.first_window(chunk + 1); ++w)
    forward.window(place_of(plan, w), plan.first_head(group), plan.first_head(group + 1));
}

template <class T>
void forward_of(const WindowAttention& a, const Pool& pool) {
  WindowPlan plan = plan_windows(a, kLanes, pool);
  pool.run(plan.chunks * plan.head_groups, forward_task<T>, &plan, WindowForward<T>::bytes(plan));
}

}  // namespace

void window_attention_forward(const WindowAttention& a, const Pool& pool) {
  switch (a.element) {
    case Element::float32: return forward_of<float>(a, pool);
    case Element::bfloat16: return forward_of<bfloat16>(a, pool);
    case Element::float16: return forward_of<float16>(a, pool);
    case Element::boolean: return;
  }
}

}  // namespace XFORMER_FAST_ISA
}  // namespace xformer_fast
