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
// The rows of the next head, or of the next window, are asked for between the row chunks of the products of this one.
//
// bfloat16 with XF_BF16_DOT multiplies pairs: Q^T and P^T hold pairs, V's rows are interleaved. Otherwise half types are
// float32 in scratch. A query that would have a vector to itself (the 49th of 7 x 7) is attended apart, keys or channels in
// the lanes.
//
// Not here: windows of very many tokens; a call with a table or a bias holds it densely, once for all windows.
//
// NOTES (Zen 4, a busy machine: CPU time of one thread, B 8, 56 x 56, 3 heads of 32, window 7, shift 3)
//   - float32: 18.1 ms with all 49 queries in four vectors; 16.8 with the last one apart; 12.2-12.7 with prefetching too,
//     where torch's roll, partition, SDPA and reverse take 38-40. bfloat16: 13.7 ms in float32, 8.0 with products of pairs.
// Zen 3 (AVX2, one thread, the quietest of 100 calls; at the FMA ceiling the products alone would take 5.9 ms):
//   - 19.1 ms when nothing is prefetched, half of it waiting in gather_rows; 15.5 when 48 lines at a time are asked for, 8 keys
//     apart; 13.0 when a few lines are, between chunks of rows (of a burst, what was asked for last arrived least often).
//   - A function that does nothing but prefetch is pure to GCC, and its calls vanish: ask inside a function that does more.
//   - The bias of a head by a division for every entry took 1.3 ms a call, for every batch.
//   - Asking for the rows of the output as well: no gain, its scatter is faster and all else slower.
#include "window_tiles.h"

namespace xformer_fast {
namespace XFORMER_FAST_ISA {
namespace {

// The element the tile product multiplies for inputs of type T.
template <class T> struct ProductOf { typedef float Type; };
#if defined(XF_BF16_DOT)
template <> struct ProductOf<bfloat16> { typedef bfloat16 Type; };
#endif

template <class T>
class WindowForward {
  typedef typename ProductOf<T>::Type C;
  static constexpr int kPair = sizeof(float) / sizeof(C);  // reduction steps that one multiply-add takes

 public:
  static constexpr int kWidthStep = kPair * kLanes;

  WindowForward(const WindowPlan& plan, Arena arena)
      : p_(plan), a_(*plan.attention),
        walk_(plan, {{&a_.query, a_.head_dim}, {&a_.key, a_.head_dim}, {&a_.value, a_.head_dim_v}, {&a_.out, a_.head_dim_v}},
              arena) {
    arena.take(plan.padded * plan.width, query_, key_, query_t_);
    arena.take(plan.padded * plan.width_v, value_);
    arena.take(kPair == 2 ? plan.padded * plan.width_v : 0, value_pairs_);
    arena.take(plan.padded * plan.width_v, out_);
    arena.take(plan.tokens * kTileVectors * kLanes, scores_);
    arena.take(plan.width_v * kTileVectors * kLanes, out_t_);
    arena.take(plan.padded, lane_scale_, key_scale_, sum_, weights_);
    used_ = arena.used();
  }

  static size_t bytes(const WindowPlan& plan) { return size_t(WindowForward(plan, Arena(nullptr)).used_); }

  void run(int64_t first_window, int64_t last_window, int64_t first_head, int64_t last_head) {
    walk_.run(first_window, last_window, first_head, last_head, [this](int64_t h) { head(h); });
  }

 private:
  enum { kQuery, kKey, kValue, kOut };  // of the walk's maps

  void head(int64_t h) {
    const int64_t n = p_.tokens;
    gather_rows(walk_.rows(kQuery, h), walk_.offsets(kQuery), n, p_.padded, a_.head_dim, query_, p_.width);
    gather_rows(walk_.rows(kKey, h), walk_.offsets(kKey), n, p_.padded, a_.head_dim, key_, p_.width);
    gather_rows(walk_.rows(kValue, h), walk_.offsets(kValue), n, n, a_.head_dim_v, value_, p_.width_v);
    if constexpr (kPair == 1) pack_transposed(query_, p_.width, p_.padded, p_.width, 1.f, query_t_, p_.padded);
#if defined(XF_BF16_DOT)
    if constexpr (kPair == 2) {
      pack_transposed_pairs(query_, p_.width, p_.padded, p_.width, query_t_, 2 * p_.padded);
      interleave_row_pairs(value_, p_.width_v, n, p_.width_v, value_pairs_);
    }
#endif
    scales(h);
    const bool apart = n % kLanes == 1 && n > kLanes;
    const TileCut cut(apart ? n / kLanes : p_.padded / kLanes);
    for (int64_t t = 0; t < cut.tiles; ++t) tile(h, cut, t);
    if (apart) last_query(h);
    scatter_rows(out_, p_.width_v, 1.f, n, a_.head_dim_v, walk_.rows(kOut, h), walk_.offsets(kOut));
  }

  void scales(int64_t h) {
    const float scale = (a_.logit_scale ? a_.logit_scale[h] : a_.scale) * kLog2e;
    if (a_.logit_scale) {
      inverse_norms(query_, p_.width, p_.padded, lane_scale_);
      inverse_norms(key_, p_.width, p_.padded, key_scale_);
      for (int64_t i = 0; i < p_.padded; i += kLanes) store(lane_scale_ + i, load(lane_scale_ + i) * scale);
    } else {
      for (int64_t i = 0; i < p_.padded; i += kLanes) store(lane_scale_ + i, broadcast(scale));
    }
  }

  void tile(int64_t h, const TileCut& cut, int64_t t) {
    const int64_t query0 = cut.first(t) * kLanes;
    const int vectors = int(cut.first(t + 1) - cut.first(t));
    Prefetch ahead[2] = {walk_.next_rows(2 * t, 2 * cut.tiles), walk_.next_rows(2 * t + 1, 2 * cut.tiles)};
    const int64_t ld = vectors * kLanes, steps = (a_.head_dim + kPair - 1) / kPair, key_steps = (p_.tokens + kPair - 1) / kPair;
    tile_product(p_.tokens, vectors, steps, key_, p_.width, kPair, query_t_ + kPair * query0, kPair * p_.padded, scores_, ld,
                 Start::overwrite, nullptr, &ahead[0]);
    const WindowScores s{scores_, ld, p_.tokens, p_.bias ? p_.bias + h * p_.bias_head() + query0 : nullptr, p_.padded,
                         lane_scale_ + query0, a_.logit_scale ? key_scale_ : nullptr, p_.region,
                         p_.region + query0, walk_.edges()};
    const C* value = value_;
#if defined(XF_BF16_DOT)
    if constexpr (kPair == 2) value = value_pairs_, softmax_column_pairs(vectors, s, sum_);
#endif
    if constexpr (kPair == 1) softmax_columns(vectors, s, sum_);
    for (int v = 0; v < vectors; ++v) store(sum_ + v * kLanes, 1.f / load(sum_ + v * kLanes));
    tile_product(a_.head_dim_v, vectors, key_steps, value, kPair, kPair * p_.width_v, reinterpret_cast<const C*>(scores_),
                 kPair * ld, out_t_, ld, Start::overwrite, nullptr, &ahead[1]);
    store_transposed(out_t_, ld, ld, p_.width_v, sum_, out_ + query0 * p_.width_v, p_.width_v);
  }

  // The last query of the window: keys in the lanes for its weights, channels for its result.
  XF_NOINLINE void last_query(int64_t h) {
    const int64_t n = p_.tokens, i = n - 1;
    const C* query = query_ + i * p_.width;
    const float* bias = p_.bias ? p_.bias + h * p_.bias_head() + n * p_.padded : nullptr;
    const IVec region = broadcast_int(p_.region[i] & walk_.edges());
    Vec top = broadcast(-kInfinity);
    for (int64_t j = 0; j < p_.padded; j += kLanes) {
      Vec products[kLanes];
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) {
        const C* key = key_ + (j + r) * p_.width;
        products[r] = load(query) * load(key);
        for (int64_t c = kLanes; c < p_.width; c += kLanes) products[r] += load(query + c) * load(key + c);
      }
      transpose(products);
#pragma GCC unroll 4
      for (int step = kLanes / 2; step > 0; step /= 2)
#pragma GCC unroll 8
        for (int r = 0; r < step; ++r) products[r] += products[r + step];
      Vec s = products[0] * lane_scale_[i];
      if (a_.logit_scale) s *= load(key_scale_ + j);
      if (bias) s += load(bias + j);
      if (walk_.edges()) s = (load_as<IVec>(p_.region + j) & walk_.edges()) == region ? s : broadcast(-kInfinity);
      s = lane_index() < broadcast_int(int(n - j)) ? s : broadcast(-kInfinity);
      store(weights_ + j, s);
      top = maximum(s, top);
    }
    const Vec most = broadcast(reduce_max(top));
    Vec sum = zero();
    for (int64_t j = 0; j < p_.padded; j += kLanes) {
      const Vec p = exp2(load(weights_ + j) - most);
      store(weights_ + j, p);
      sum += p;
    }
    const float inverse = 1.f / reduce_add(sum);
    for (int64_t c = 0; c < p_.width_v; c += kLanes) {
      Vec parts[4] = {zero(), zero(), zero(), zero()};
      const C* value = value_ + c;
      int64_t j = 0;
      for (; j + 4 <= n; j += 4)
#pragma GCC unroll 4
        for (int part = 0; part < 4; ++part)
          parts[part] += broadcast(weights_[j + part]) * load(value + (j + part) * p_.width_v);
      for (; j < n; ++j) parts[0] += broadcast(weights_[j]) * load(value + j * p_.width_v);
      store(out_ + i * p_.width_v + c, ((parts[0] + parts[1]) + (parts[2] + parts[3])) * inverse);
    }
  }

  const WindowPlan& p_;
  const WindowAttention& a_;
  WindowWalk<T, 3, 4> walk_;
  C *query_, *key_, *query_t_, *value_, *value_pairs_;
  float *out_, *scores_, *out_t_, *lane_scale_, *key_scale_, *sum_, *weights_;
  int64_t used_;
};

template <class T>
void forward_task(void* context, int64_t task, char* scratch) {
  const WindowPlan& plan = *static_cast<const WindowPlan*>(context);
  const int64_t chunk = task / plan.head_groups, group = task % plan.head_groups;
  WindowForward<T>(plan, Arena(scratch))
      .run(plan.first_window(chunk), plan.first_window(chunk + 1), plan.first_head(group), plan.first_head(group + 1));
}

template <class T>
void forward_of(const WindowAttention& a, const Pool& pool) {
  WindowPlan plan = plan_windows(a, WindowForward<T>::kWidthStep, pool);
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
