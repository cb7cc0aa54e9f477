// What windowed attention forward and backward share: where a window's tokens lie, rows in and out of scratch, the bias as
// the tiles want it, and the softmax of a tile of scores.
//
// A score tile is S^T: row r is key r of the window, lane l is query `query0 + l`. Rows come into scratch as they are;
// scale, norms of cosine attention and log2(e) enter when the scores are made into exponents of two.
#pragma once
#include "scratch.h"
#include "window.h"

namespace xformer_fast {
namespace XFORMER_FAST_ISA {
namespace {

constexpr int kWindowTasks = 32;                      // aimed at: enough for every thread, few enough for partial sums
constexpr int64_t kHeadGroupBytes = 384 * 1024;       // of bias that a task goes through for every window
constexpr float kLeastNorm = 1e-12f;

// ---- geometry ----

struct WindowPlan {
  const WindowAttention* attention;
  int64_t tokens, padded;        // of a window; rounded up to full vectors
  int64_t width, width_v;        // of a row in scratch, elements
  int64_t windows[kMaxAxes];     // a map's, along each axis
  int64_t count;                 // of the whole batch
  int64_t chunks, head_groups;   // a task is a chunk of windows for a group of heads
  const int32_t* region;         // of a token: bit x is set past the wrap of axis x
  const int32_t* table_at;       // of a token: how far into the relative bias table it takes a query
  const float* bias;             // [head][key][query], times log2(e), and a row of the last query's by key; null: none
  bool shifted;

  int64_t bias_head() const { return (tokens + 1) * padded; }
  int64_t first_window(int64_t chunk) const { return count * chunk / chunks; }
  int64_t first_head(int64_t group) const { return attention->heads * group / head_groups; }
};

struct WindowPlace {
  int64_t batch, index[kMaxAxes];
  int32_t edges;  // bit x: the window holds the wrap of axis x
};

inline WindowPlace place_of(const WindowPlan& plan, int64_t window) {
  WindowPlace place{0, {}, 0};
  for (int x = kMaxAxes - 1; x >= 0; --x) {
    place.index[x] = window % plan.windows[x];
    window /= plan.windows[x];
    if (plan.attention->shift[x] > 0 && place.index[x] == plan.windows[x] - 1) place.edges |= 1 << x;
  }
  place.batch = window;
  return place;
}

// Where the rows of head 0 of a window's tokens begin.
inline void row_offsets(const WindowPlan& plan, const WindowPlace& place, const MapView& view, int64_t* offsets) {
  const WindowAttention& a = *plan.attention;
  const auto along = [&](int x, int64_t t) {
    const int64_t i = a.grid ? t * plan.windows[x] + place.index[x] : place.index[x] * a.window[x] + t + a.shift[x];
    return (i < a.side[x] ? i : i - a.side[x]) * view.axis[x];
  };
  for (int64_t t0 = 0; t0 < a.window[0]; ++t0)
    for (int64_t t1 = 0; t1 < a.window[1]; ++t1) {
      const int64_t base = place.batch * view.batch + along(0, t0) + along(1, t1);
      for (int64_t t2 = 0; t2 < a.window[2]; ++t2) *offsets++ = base + along(2, t2);
    }
}

// Row of the relative bias table for query i and key j, in Swin's order.
inline int64_t table_row(const WindowPlan& plan, int64_t i, int64_t j) {
  return plan.table_at[i] - plan.table_at[j] + plan.table_at[plan.tokens - 1];
}

// The bias of a head as the score tiles read it; scratch holds the head's column of the table.
void fill_bias(void* context, int64_t head, char* scratch) {
  const WindowPlan& plan = *static_cast<const WindowPlan*>(context);
  const WindowAttention& a = *plan.attention;
  const int64_t n = plan.tokens, table_rows = a.table ? table_row(plan, n - 1, 0) + 1 : 0;
  float* const table = reinterpret_cast<float*>(scratch);
  for (int64_t r = 0; r < table_rows; ++r) table[r] = a.table[r * a.heads + head];
  const float* bias = a.bias ? a.bias + head * n * n : nullptr;
  const auto entry = [&](int64_t i, int64_t j) {
    return ((a.table ? table[table_row(plan, i, j)] : 0.f) + (bias ? bias[i * n + j] : 0.f)) * kLog2e;
  };
  float* out = const_cast<float*>(plan.bias) + head * plan.bias_head();
  for (int64_t j = 0; j < n; ++j, out += plan.padded)
    for (int64_t i = 0; i < plan.padded; ++i) out[i] = i < n ? entry(i, j) : 0.f;
  for (int64_t j = 0; j < plan.padded; ++j) out[j] = j < n ? entry(n - 1, j) : 0.f;
}

inline WindowPlan plan_windows(const WindowAttention& a, int64_t width_step, const Pool& pool) {
  WindowPlan plan{};
  plan.attention = &a;
  plan.tokens = 1;
  plan.count = a.batch;
  for (int x = 0; x < kMaxAxes; ++x) {
    plan.tokens *= a.window[x];
    plan.windows[x] = a.side[x] / a.window[x];
    plan.count *= plan.windows[x];
    plan.shifted |= a.shift[x] > 0;
  }
  plan.padded = round_up(plan.tokens, kLanes);
  plan.width = round_up(a.head_dim, width_step);
  plan.width_v = round_up(a.head_dim_v, width_step);

  int32_t* region = static_cast<int32_t*>(pool.allocate(pool.self, size_t(2 * plan.padded) * sizeof(int32_t)));
  int32_t* table_at = region + plan.padded;
  for (int64_t t = 0; t < plan.padded; ++t) {
    region[t] = table_at[t] = 0;
    int64_t i = t, unit = 1;
    for (int x = kMaxAxes - 1; x >= 0; i /= a.window[x], unit *= 2 * a.window[x] - 1, --x) {
      if (i % a.window[x] >= a.window[x] - a.shift[x]) region[t] |= 1 << x;
      table_at[t] += int32_t(i % a.window[x] * unit);
    }
  }
  plan.region = region;
  plan.table_at = table_at;
  if (a.table || a.bias) {
    plan.bias = static_cast<float*>(pool.allocate(pool.self, size_t(a.heads * plan.bias_head()) * sizeof(float)));
    pool.run(a.heads, fill_bias, &plan, a.table ? size_t(table_row(plan, plan.tokens - 1, 0) + 1) * sizeof(float) : 0);
  }
  plan.chunks = min_of(plan.count, kWindowTasks);
  const int64_t cached = plan.bias ? max_of(1, kHeadGroupBytes / int64_t(plan.bias_head() * sizeof(float))) : a.heads;
  const int64_t groups = max_of((a.heads + cached - 1) / cached, (kWindowTasks + plan.chunks - 1) / max_of(1, plan.chunks));
  plan.head_groups = min_of(a.heads, groups);
  return plan;
}

// ---- the way through windows and heads ----

// Of the maps of T that a task reads (the first kReads of the list) and writes, where the rows of the window at work lie; and
// what the head after the one at work will read, so that it can be asked for in time.
template <class T, int kReads, int kMaps>
class WindowWalk {
 public:
  struct Map {
    const MapView* view;
    int64_t columns;
  };

  WindowWalk(const WindowPlan& plan, const Map (&maps)[kMaps], Arena& arena) : plan_(plan) {
    for (int m = 0; m < kMaps; ++m) maps_[m] = maps[m];
    for (auto& window : offsets_)
      for (int64_t*& map : window) arena.take(plan.tokens, map);
  }

  // head(h) for every head of a group, window by window.
  template <class Head>
  void run(int64_t first_window, int64_t last_window, int64_t first_head, int64_t last_head, const Head& head) {
    if (first_window < last_window) place(first_window);
    for (int64_t w = first_window; w < last_window; ++w) {
      now_ = w % 2;
      if (w + 1 < last_window) place(w + 1);
      for (int64_t h = first_head; h < last_head; ++h) {
        const bool last = h + 1 == last_head;
        next_ = last ? (w + 1) % 2 : now_;
        next_head_ = !last ? h + 1 : w + 1 < last_window ? first_head : -1;
        head(h);
      }
    }
  }

  int32_t edges() const { return edges_[now_]; }
  T* rows(int map, int64_t h) const { return static_cast<T*>(maps_[map].view->data) + h * maps_[map].view->head; }
  const int64_t* offsets(int map) const { return offsets_[now_][map]; }

  // What the next head reads, a part of it to each of the products of this one.
  Prefetch next_rows(int64_t product, int64_t products) const {
    Prefetch rows_ahead;
    for (int m = 0; m < kReads && next_head_ >= 0; ++m)
      if (m * products / kReads == product)
        rows_ahead.add(rows(m, next_head_), offsets_[next_][m], plan_.tokens, maps_[m].columns);
    return rows_ahead;
  }

 private:
  void place(int64_t window) {
    const WindowPlace at = place_of(plan_, window);
    edges_[window % 2] = at.edges;
    for (int m = 0; m < kMaps; ++m) row_offsets(plan_, at, *maps_[m].view, offsets_[window % 2][m]);
  }

  const WindowPlan& plan_;
  Map maps_[kMaps];
  int64_t* offsets_[2][kMaps];  // of even and odd windows
  int32_t edges_[2];
  int64_t now_, next_, next_head_;  // the latter -1: none
};

// ---- rows ----

// 1 / max(|row|, 1e-12), of rows whose padding is zero.
template <class C>
XF_NOINLINE void inverse_norms(const C* in, int64_t ld, int64_t rows, float* out) {
  for (int64_t r = 0; r < rows; ++r, in += ld) {
    Vec squares = zero();
    for (int64_t c = 0; c < ld; c += kLanes) squares += load(in + c) * load(in + c);
    const float norm = __builtin_sqrtf(reduce_add(squares));
    out[r] = 1.f / (norm > kLeastNorm ? norm : kLeastNorm);
  }
}

// ---- scores ----

struct WindowScores {
  float* scores;
  int64_t ld, rows;
  const float* bias;       // of the first lane, or null
  int64_t bias_ld;
  const float* lane_scale;
  const float* row_scale;  // null: 1
  const int32_t* region;   // of a key; of the first lane: lane_region
  const int32_t* lane_region;
  int32_t edges;           // 0: every query sees every key
};

// Exponents of two, in place, and their maxima.
template <int V>
XF_INLINE void make_exponents(const WindowScores& t, Vec (&top)[V]) {
  Vec scale[V];
  IVec region[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    scale[v] = load(t.lane_scale + v * kLanes);
    region[v] = load_as<IVec>(t.lane_region + v * kLanes) & t.edges;
    top[v] = broadcast(-kInfinity);
  }
  float* s = t.scores;
  const float* bias = t.bias;
  for (int64_t r = 0; r < t.rows; ++r, s += t.ld) {
    Vec x[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) x[v] = load(s + v * kLanes) * scale[v];
    if (t.row_scale) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) x[v] *= t.row_scale[r];
    }
    if (bias) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) x[v] += load(bias + v * kLanes);
      bias += t.bias_ld;
    }
    if (t.edges) {
      const IVec mine = broadcast_int(t.region[r] & t.edges);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) x[v] = region[v] == mine ? x[v] : broadcast(-kInfinity);
    }
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      store(s + v * kLanes, x[v]);
      top[v] = maximum(x[v], top[v]);
    }
  }
}

// Sums over rows are added up in runs of so many: one after the other, every small weight past a large one would cost a
// rounding of the large one, and where one key has nearly all the weight the gradient is their small difference from 1.
constexpr int64_t kSumRows = 8;

// scores <- weights, not normalised; sum[lane] is what normalises them.
template <int V>
XF_NOINLINE void softmax_columns(const WindowScores& t, float* sum) {
  Vec top[V], sums[V], run[V];
  make_exponents<V>(t, top);
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) sums[v] = zero();
  float* s = t.scores;
  for (int64_t first = 0; first < t.rows; first += kSumRows) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) run[v] = zero();
    for (int64_t r = first; r < min_of(first + kSumRows, t.rows); ++r, s += t.ld)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const Vec p = exp2(load(s + v * kLanes) - top[v]);
        store(s + v * kLanes, p);
        run[v] += p;
      }
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sums[v] += run[v];
  }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) store(sum + v * kLanes, sums[v]);
}

#if defined(XF_BF16_DOT)
// The same, rounded to bfloat16 pairs [key / 2][query][2] where the scores were; the sums are of what is rounded.
template <int V>
XF_NOINLINE void softmax_column_pairs(const WindowScores& t, float* sum) {
  Vec top[V], sums[V];
  make_exponents<V>(t, top);
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) sums[v] = zero();
  for (int64_t r = 0; r < t.rows; r += 2) {
    const float* s = t.scores + r * t.ld;
    const bool paired = r + 1 < t.rows;
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const Vec low = exp2_coarse(load(s + v * kLanes) - top[v]);
      const Vec high = paired ? exp2_coarse(load(s + t.ld + v * kLanes) - top[v]) : zero();
      const UVec pairs = to_bf16_pairs(low, high);
      store(t.scores + r / 2 * t.ld + v * kLanes, (Vec)pairs);
      sums[v] += (Vec)(pairs << 16) + (Vec)(pairs & 0xffff0000u);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) store(sum + v * kLanes, sums[v]);
}

inline void softmax_column_pairs(int vectors, const WindowScores& t, float* sum) {
  switch (vectors) {
    case 1: return softmax_column_pairs<1>(t, sum);
    case 2: return softmax_column_pairs<2>(t, sum);
    case 3: return softmax_column_pairs<3>(t, sum);
    default: return softmax_column_pairs<4>(t, sum);
  }
}
#endif

inline void softmax_columns(int vectors, const WindowScores& t, float* sum) {
  switch (vectors) {
    case 1: return softmax_columns<1>(t, sum);
    case 2: return softmax_columns<2>(t, sum);
    case 3: return softmax_columns<3>(t, sum);
    default: return softmax_columns<4>(t, sum);
  }
}

// The tiles of a window: its query vectors in runs of nearly equal width.
struct TileCut {
  int64_t vectors, tiles;
  explicit TileCut(int64_t query_vectors) : vectors(query_vectors), tiles((query_vectors + kTileVectors - 1) / kTileVectors) {}
  int64_t first(int64_t tile) const { return vectors * tile / tiles; }
};

}  // namespace
}  // namespace XFORMER_FAST_ISA
}  // namespace xformer_fast
