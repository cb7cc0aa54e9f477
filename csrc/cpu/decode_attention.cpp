// Softmax attention of few queries against many keys (decoding from a KV cache), forward only:
//   out_i = sum_j exp(s_ij - lse_i) v_j,  s_ij = mask(bias(alibi(softcap(scale * q_i . k_j)))),  as in attention_forward.cpp.
//
// It is bound by the reading of K and V, so each of them is read once: the query heads of a KV head and the tokens of a call
// are the rows of one small problem, and a block of keys serves all of them while it is near.
//     scores   S[row][key] = q_row . k_key: both operands stream along head_dim, a tile is kRowsAtOnce rows x kTileKeys keys,
//              and kLanes sums are reduced together, so nothing is transposed
//     softmax  along the lanes of a row of S: maximum, exponential, sum (Milakov & Gimelshein, "Online normalizer", 2018)
//     values   O[row][column] += p[row][key] * V[key][column], p broadcast, a few rows x columns in registers
// A task is a range of keys of one KV head; ranges are cut by shape and lengths alone. Where a head has several, each leaves
// (maximum, sum, O), and whichever ends last merges them in the order of the keys (Dao et al., "Flash-Decoding", 2023). So
// one sequence with one KV head still uses every core, and the result has the same bits for any number of threads.
//
// What lies 16 KB ahead is prefetched, in a paged cache the next page: where rows are adjacent, a few lines at each step of a
// product, in the order of addresses whatever order the product reads in, because the memory's own prefetchers follow a
// stream; where they are not, beside each load. bfloat16 with XF_BF16_DOT multiplies pairs: of
// channels for the scores, of keys for the values (P is rounded, and summed as rounded); other half types are converted in
// registers.
//
// Not here: dropout, packed sequences, gradients.
//
// NOTES (Zen 4; 32 query heads, 8 KV heads, 8192 keys, head_dim 128, one token)
//   - Prefetching into the second-level cache, 16 KB ahead: 1.5 times as fast as into the first, 4 KB ahead; without any
//     prefetch half as fast. 8 to 32 KB are alike; asking for whole rows at a time instead of a line a step changes nothing.
//   - Blocks of 64 or 512 keys and pieces of 64: within noise. 80-88% of the speed of a plain read loop over the caches.
//   - In cache one core does 82 GF/s of 112 in float32, 140 of 226 in bfloat16: with more than about ten rows a KV head
//     the kernel is bound by arithmetic, and where 8 or more queries a head fill the lanes of attention_forward.cpp's tiles,
//     those do it with fewer instructions (see decode_takes).
// Zen 3 (AVX2, two threads; the same; caches not in any cache before, beside a plain read of them in turns)
//   - Lines asked for in the order of addresses: float32 from 63% to 80% of the speed of the read. A tile's four rows asked
//     for side by side are read at 13 GB/s by a loop that does nothing else, one after another at 18, as without asking.
//   - Rows of float32 with gaps, 4 KB from one to the next: 8 ms with four questions a line, 11 to 15 with one or two, in
//     either order, however far ahead; touching pages first changes nothing.
//   - Asking is not free (a line costs as much as the product with it in float32): two lines a step from straight code,
//     not a walk of line by line, is a tenth of the time in bfloat16, 65% to 72%.
//   - Four rows of queries with three keys, twelve sums: 70% of the FMA ceiling in cache; with two keys, eight sums, 55%.
//   - Into the first-level cache 4 or 8 KB ahead, pieces of 8 to 16 keys, 24 or 32 KB ahead, half of the lines: no better.
//     Of what is missing, softmax passes, where nothing is asked for, take 5%.
#include "decode.h"

#include "attention_tiles.h"

namespace xformer_fast {
namespace XFORMER_FAST_ISA {
namespace {

constexpr int64_t kBlockKeys = 256;      // scores and probabilities of a block stay in the first-level cache
constexpr int64_t kPieceKeys = 32;       // a piece of K or V that several rows pass over stays there too
constexpr int64_t kMaxRows = 64;         // of a task
constexpr int64_t kTasks = 128;          // enough for any machine to share evenly,
constexpr int64_t kLeastTaskKeys = 1024;  // unless tasks would get shorter than this
constexpr int64_t kAheadBytes = 16384;  // into the second-level cache
constexpr int kSums = kLanes == 16 ? 16 : 8;  // accumulators of a value tile

// How elements of type T are multiplied: as floats, or as they are, in pairs.
template <class T> struct ProductOf {
  typedef float Type;
  static constexpr int kStep = kLanes;  // elements of a load
};
#if defined(XF_BF16_DOT)
template <> struct ProductOf<bfloat16> {
  typedef bfloat16 Type;
  static constexpr int kStep = 2 * kLanes;
};
#endif
template <class T> using Product = typename ProductOf<T>::Type;
template <class T> constexpr bool kPairs = sizeof(Product<T>) == 2;
constexpr int kRowsAtOnce = kLanes == 4 ? 1 : 4;  // of queries: what is read of K and V serves them all
// Keys of a score tile of R rows, and the sums of a row that are reduced together.
template <int R> constexpr int kTileKeys = R == 4 && kLanes == 8 ? 3 : kLanes / R;  // twelve sums: four rows of four do not fit
template <int R> constexpr int kTileSums = kTileKeys<R> < 4 ? 4 : kTileKeys<R>;
constexpr int64_t kPad = 2 * kLanes;  // rows of Q and O are padded with zeros to whole loads

struct Plan {
  const Decode* decode;
  int64_t rows, row_groups, group_rows;  // query rows of a KV head; a task takes one group of them
  int64_t units;                         // (KV head, row group) of a sequence
  int64_t task_keys;
  int64_t* first_task;  // (batch + 1)
  int32_t* pending;     // (batch * units) tasks that have not ended
  float* partials;      // a task's rows of O, maxima, sums
  int64_t query_ld, out_ld;
  float query_scale, score_scale;  // the scale is applied to Q or to the scores
};

struct KeyRange {
  int64_t first, last;
};

// Keys that some query of sequence b sees.
XF_INLINE KeyRange keys_of(const Decode& d, int64_t b) {
  const Attention& a = d.attention;
  const int64_t shift = d.shift(b), first = max_of(0, shift - a.left);
  return {first, max_of(first, min_of(a.key_limit(b), shift + a.seqlen_q - 1 + a.right + 1))};
}

// A task's rows and keys, and its running state in scratch.
struct Share {
  int64_t batch, kv_head, row0, rows;
  int64_t unit, split, splits;
  KeyRange keys;
  char* query;    // [rows][query_ld], Product
  float* scores;  // [rows][kBlockKeys + kPad]
  char* weights;  // likewise, Product; the scores themselves if that is float
  float* out;     // [rows][out_ld]
  float* max;     // [rows], of the scores so far
  float* sum;     // [rows], of exp(score - max)
};
constexpr int64_t kScoresLd = kBlockKeys + kPad;

struct Row {
  int64_t head, query, position;
};
XF_INLINE Row row_at(const Plan& plan, const Share& share, int64_t r) {
  const Attention& a = plan.decode->attention;
  const int64_t row = share.row0 + r, query = row % a.seqlen_q;
  return {share.kv_head * (a.heads_q / a.heads_kv) + row / a.seqlen_q, query, query + plan.decode->shift(share.batch)};
}

// ---- where keys lie ----

// Adjacent keys; `ahead` elements on lies what will be needed a while later.
template <class T>
struct Run {
  const T* rows;
  int64_t stride, count, ahead;
};

// The run that starts at key `key` and ends before key `end`.
template <class T>
Run<T> run_at(const Plan& plan, const View& view, const Share& share, int64_t columns, int64_t key, int64_t end) {
  const Paging& paging = plan.decode->paging;
  const int64_t rows_ahead = max_of(4, kAheadBytes / (columns * int64_t(sizeof(T)))), ahead = rows_ahead * view.row;
  if (!paging.page_size) return {row_of<const T>(view, share.batch, share.kv_head, key), view.row, end - key, ahead};
  const int32_t* table = paging.block_table + share.batch * paging.table_row;
  const int64_t page = key / paging.page_size, at = key % paging.page_size, next_page = (page + 1) * paging.page_size;
  Run<T> run{row_of<const T>(view, table[page], share.kv_head, at), view.row, min_of(end, next_page) - key, ahead};
  if (paging.page_size < 4 * rows_ahead)
    run.ahead = next_page < share.keys.last ? (int64_t(table[page + 1]) - table[page]) * view.batch : 0;
  return run;
}

// Asks for what lies ahead of a run of adjacent rows, in the order of addresses: some lines at each of `steps` steps of the
// passes over the run.
class Ahead {
 public:
  template <class T>
  Ahead(const Run<T>& run, int64_t columns, int64_t steps)
      : line_(reinterpret_cast<const char*>(run.rows + run.ahead)),
        left_((run.count * columns * int64_t(sizeof(T)) + kCacheLine - 1) / kCacheLine),
        step_lines_((left_ + steps - 1) / max_of(1, steps)) {}

  XF_INLINE void step() {
    const int64_t lines = min_of(step_lines_, left_);
    left_ -= lines;
    ask_for(line_, lines);
  }

 private:
  const char* line_;
  int64_t left_, step_lines_;
};

// Where rows have gaps between them: for what lies ahead of p, and, as some are not heard, again when it is nearer.
template <class T>
XF_INLINE void ask_twice(const T* p, int64_t ahead) {
  __builtin_prefetch(p + ahead, 0, 2);
  __builtin_prefetch(p + ahead / 2, 0, 2);
}

// ---- scores ----

XF_INLINE Vec load_step(const float* p) { return load(p); }
XF_INLINE Vec load_step(const float16* p) { return load(p); }
XF_INLINE Vec load_step(const float* p, int64_t n) { return load(p, int(n)); }
XF_INLINE Vec load_step(const float16* p, int64_t n) { return load(p, int(n)); }
#if defined(XF_BF16_DOT)
XF_INLINE UVec load_step(const bfloat16* p) { return load_as<UVec>(p); }
XF_INLINE UVec load_step(const bfloat16* p, int64_t n) { return (UVec)load_pairs(p, n); }
XF_INLINE void add_product(Vec& sum, UVec a, UVec b) { sum = _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
#else
XF_INLINE Vec load_step(const bfloat16* p) { return load(p); }
XF_INLINE Vec load_step(const bfloat16* p, int64_t n) { return load(p, int(n)); }
#endif
XF_INLINE void add_product(Vec& sum, Vec a, Vec b) { sum = a * b + sum; }

// Lane i becomes the sum of the lanes of vector i.
XF_INLINE Vec reduce_each(Vec (&v)[kLanes]) {
#if defined(XF_AVX2) && !defined(XF_AVX512)  // shuffles inside the halves of a register are cheaper
  const auto add_pairs = [](Vec a, Vec b) __attribute__((always_inline)) {
    return (Vec)_mm256_shuffle_ps(a, b, 0x88) + (Vec)_mm256_shuffle_ps(a, b, 0xdd);
  };
  const Vec low = add_pairs(add_pairs(v[0], v[1]), add_pairs(v[2], v[3]));
  const Vec high = add_pairs(add_pairs(v[4], v[5]), add_pairs(v[6], v[7]));
  return (Vec)_mm256_permute2f128_ps(low, high, 0x20) + (Vec)_mm256_permute2f128_ps(low, high, 0x31);
#else
#pragma GCC unroll 4
  for (int n = kLanes / 2; n > 0; n /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) v[i] = interleave_low(v[i], v[i + n]) + interleave_high(v[i], v[i + n]);
  }
  return v[0];
#endif
}

// scores[r][key] of R rows and the keys of a run; up to kLanes scores past the last are overwritten.
template <int R, bool Gaps, class T>
XF_NOINLINE void score_rows(const Product<T>* query, int64_t query_ld, const Run<T>& run, int64_t dim, Ahead& asked, float* scores) {
  constexpr int kKeys = kTileKeys<R>, kReduced = kTileSums<R>, kQuad = kKeys < 4 ? kKeys : 4, kStep = ProductOf<T>::kStep;
  const int64_t whole = dim / kStep * kStep, last = run.count - 1;
  Ahead ahead = asked;
  for (int64_t key = 0; key <= last; key += kKeys) {
    if (!Gaps) ahead.step();
    Vec sums[R * kReduced];  // [row][key], a missing fourth key is the third again
#pragma GCC unroll 4
    for (int quad = 0; quad < kKeys; quad += kQuad) {
      const T* k[kQuad];
      Vec sum[R][kQuad];
#pragma GCC unroll 4
      for (int i = 0; i < kQuad; ++i) {
        k[i] = run.rows + min_of(key + quad + i, last) * run.stride;
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) sum[r][i] = zero();
      }
      const Product<T>* q = query;
      for (int64_t c = 0; c < whole; c += kStep) {
        decltype(load_step(k[0])) x[kQuad];
#pragma GCC unroll 4
        for (int i = 0; i < kQuad; ++i) {
          x[i] = load_step(k[i] + c);
          if (Gaps) ask_twice(k[i] + c, run.ahead);
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const auto y = load_step(q + r * query_ld);
#pragma GCC unroll 4
          for (int i = 0; i < kQuad; ++i) add_product(sum[r][i], x[i], y);
        }
        q += kStep;
      }
      if (whole < dim) {
#pragma GCC unroll 4
        for (int i = 0; i < kQuad; ++i) {
          const auto x = load_step(k[i] + whole, dim - whole);
          if (Gaps) ask_twice(k[i] + whole, run.ahead);
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) add_product(sum[r][i], x, load_step(q + r * query_ld));
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) sums[r * kReduced + quad + i] = sum[r][i < kQuad ? i : kQuad - 1];
    }
    constexpr int kRows = kLanes / kReduced;  // that are reduced together
#pragma GCC unroll 4
    for (int first = 0; first < R; first += kRows) {
      float row[kLanes];
      store(row, reduce_each(reinterpret_cast<Vec(&)[kLanes]>(sums[first * kReduced])));
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r)
        __builtin_memcpy(scores + (first + r) * kScoresLd + key, row + r * kReduced, kReduced * sizeof(float));
    }
  }
  asked = ahead;
}

// visit(Rows<n>, r) for rows r..r+n-1, over all rows, as many at once as fit.
template <int N> struct Rows { static constexpr int count = N; };
template <int R, class Visit>
XF_INLINE void for_rows(int64_t first, int64_t rows, Visit visit) {
  for (; first + R <= rows; first += R) visit(Rows<R>{}, first);
  if constexpr (R > 1) for_rows<R / 2>(first, rows, visit);
}

template <class T>
void score_block(const Plan& plan, const Share& share, int64_t key0, int64_t end) {
  const Attention& a = plan.decode->attention;
  const Product<T>* query = reinterpret_cast<const Product<T>*>(share.query);
  for (int64_t key = key0; key < end;) {
    Run<T> run = run_at<T>(plan, a.key, share, a.head_dim, key, end);
    run.count = min_of(run.count, kPieceKeys);
    int64_t steps = 0;
    for_rows<kRowsAtOnce>(0, share.rows, [&](auto rows, int64_t) {
      constexpr int kKeys = kTileKeys<decltype(rows)::count>;
      steps += (run.count + kKeys - 1) / kKeys;
    });
    Ahead ahead(run, a.head_dim, steps);
    for_rows<kRowsAtOnce>(0, share.rows, [&](auto rows, int64_t r) __attribute__((always_inline)) {
      constexpr int R = decltype(rows)::count;
      const auto pass = run.stride == a.head_dim ? score_rows<R, false, T> : score_rows<R, true, T>;
      pass(query + r * plan.query_ld, plan.query_ld, run, a.head_dim, ahead, share.scores + r * kScoresLd + (key - key0));
    });
    key += run.count;
  }
}

// ---- softmax ----

template <class M>
XF_INLINE Vec load_mask_lanes(const M* p, int64_t stride, int n) {
  if (stride == 1) return n == kLanes ? load(p) : load(p, n);
  float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = i < n ? scalar(p + i * stride) : 0.f;
  return load(lanes);
}

XF_INLINE Vec mask_lanes(const Attention& a, int64_t offset, int n) {
  switch (a.mask_element) {
    case Element::float32: return load_mask_lanes(static_cast<const float*>(a.mask) + offset, a.mask_k, n);
    case Element::bfloat16: return load_mask_lanes(static_cast<const bfloat16*>(a.mask) + offset, a.mask_k, n);
    case Element::float16: return load_mask_lanes(static_cast<const float16*>(a.mask) + offset, a.mask_k, n);
    default: return load_mask_lanes(static_cast<const boolean*>(a.mask) + offset, a.mask_k, n);
  }
}

// Scale, softcap, ALiBi, bias of the distance, mask, in the contract's order, to scores [first, last) of keys from key0 on.
XF_NOINLINE void apply_row_options(const Attention& a, const Row& row, int64_t b, int64_t key0, int64_t first, int64_t last,
                                   float scale, float* scores) {
  const float slope = a.alibi_slopes ? a.alibi_slopes[b * a.alibi_batch + row.head * a.alibi_head] : 0.f;
  const int64_t distance0 = key0 - row.position;
  const float* bias = a.distance_bias ? a.distance_bias + row.head * a.distance_head + a.distance_offset : nullptr;
  const int64_t mask0 = b * a.mask_batch + row.head * a.mask_head + row.query * a.mask_q + key0 * a.mask_k;
  const bool boolean_mask = a.mask_element == Element::boolean;
  for (int64_t j = first; j < last; j += kLanes) {
    const int n = int(min_of(kLanes, last - j));
    Vec s = load(scores + j) * scale;
    if (a.softcap != 0.f) s = tanh(s * (1.f / a.softcap)) * a.softcap;
    if (a.alibi_slopes) s -= absolute(to_float(lane_index() + int32_t(distance0 + j))) * slope;
    if (bias) s += load(bias + distance0 + j, n);
    if (a.mask) {
      const Vec m = mask_lanes(a, mask0 + j * a.mask_k, n);
      s = boolean_mask ? (m == 0.f ? s : m) : s + m;
    }
    store(scores + j, s);
  }
}

// weights = exp(scores - max) over `vectors` whole vectors, the running maximum and sum; returns what O is to be scaled by.
template <class P>
XF_NOINLINE float softmax_row(const float* scores, int64_t keys, P* weights, float& max, float& sum) {
  Vec top = load(scores);
  for (int64_t j = kLanes; j < keys; j += kLanes) top = maximum(load(scores + j), top);
  const float old = max, highest = reduce_max(top);
  max = highest > old ? highest : old;
  const float finite = max == -kInfinity ? 0.f : max;
  const float ratio = exp2(broadcast((old - finite) * kLog2e))[0];
  Vec total = zero();
  if constexpr (sizeof(P) == sizeof(float)) {
    for (int64_t j = 0; j < keys; j += kLanes) {
      const Vec p = exp2((load(scores + j) - finite) * kLog2e);
      total += p;
      store(weights + j, p);
    }
  } else {
    for (int64_t j = 0; j < keys; j += kLanes) {
      store(weights + j, exp2_coarse((load(scores + j) - finite) * kLog2e));
      total += load(weights + j);
    }
  }
  sum = sum * ratio + reduce_add(total);
  return ratio;
}

XF_NOINLINE void scale_row(float* out, int64_t columns, float factor) {
  for (int64_t c = 0; c < columns; c += kLanes) store(out + c, load(out + c) * factor);
}

template <class T>
void softmax_block(const Plan& plan, const Share& share, int64_t key0, int64_t end) {
  const Attention& a = plan.decode->attention;
  const bool options = plan.score_scale != 1.f || has_score_options(a) || a.distance_bias;
  const int64_t keys = end - key0, padded = round_up(keys, kLanes);
  for (int64_t r = 0; r < share.rows; ++r) {
    float* scores = share.scores + r * kScoresLd;
    const Row row = row_at(plan, share, r);
    const int64_t first = max_of(0, min_of(keys, row.position - a.left - key0));
    const int64_t last = max_of(first, min_of(keys, row.position + a.right + 1 - key0));
    if (options) apply_row_options(a, row, share.batch, key0, first, last, plan.score_scale, scores);
    for (int64_t j = 0; j < first; ++j) scores[j] = -kInfinity;
    for (int64_t j = last; j < padded; ++j) scores[j] = -kInfinity;
    const float ratio = softmax_row(scores, padded, reinterpret_cast<Product<T>*>(share.weights) + r * kScoresLd,
                                    share.max[r], share.sum[r]);
    if (ratio != 1.f) scale_row(share.out + r * plan.out_ld, plan.out_ld, ratio);
  }
}

// ---- values ----

// Keys of a step of a value tile: those that two lines serve, and a pair where keys are multiplied in pairs.
template <class T, int V> constexpr int64_t kStepKeys = [] {
  constexpr int64_t keys = 128 / (V * kLanes * int64_t(sizeof(T)));
  return kPairs<T> ? 2 : keys < 1 ? 1 : keys;
}();

// out[r][column] += sum of weights[r][key] * V[key][column] over a run: R rows, V vectors of columns, the last of which may
// hold fewer. The old O joins last: sums over many pieces lose less than one long chain would.
template <int R, int V, bool Whole, bool Gaps, class T>
XF_NOINLINE void add_values(const float* weights, const Run<T>& run, int64_t columns, Ahead& asked, float* out, int64_t out_ld) {
  Vec sum[R][V];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sum[r][v] = zero();
  const T* row = run.rows;
  const auto add_key = [&](int64_t j) __attribute__((always_inline)) {
    Vec x[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      x[v] = Whole ? load(row + v * kLanes) : load(row + v * kLanes, int(columns));
      if (Gaps) ask_twice(row + v * kLanes, run.ahead);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vec p = broadcast(weights[r * kScoresLd + j]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[r][v] = p * x[v] + sum[r][v];
    }
    row += run.stride;
  };
  constexpr int64_t kKeys = kStepKeys<T, V>;
  Ahead ahead = asked;
  int64_t j = 0;
  for (; j + kKeys <= run.count; j += kKeys) {
    if (!Gaps) ahead.step();
#pragma GCC unroll 8
    for (int64_t i = 0; i < kKeys; ++i) add_key(j + i);
  }
  for (; j < run.count; ++j) add_key(j);
  asked = ahead;
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      float* o = out + r * out_ld + v * kLanes;
      store(o, load(o) + sum[r][v]);
    }
}

#if defined(XF_BF16_DOT)
// The same by pairs of keys: two rows of V, interleaved in registers, give two vectors of pairs for 32 columns.
template <int R, int V, bool Whole, bool Gaps>
XF_NOINLINE void add_values(const bfloat16* weights, const Run<bfloat16>& run, int64_t columns, Ahead& asked, float* out,
                            int64_t out_ld) {
  static_assert(V % 2 == 0, "a load holds two vectors of columns");
  Vec sum[R][V];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sum[r][v] = zero();
  const bfloat16* row = run.rows;
  Ahead ahead = asked;
  for (int64_t j = 0; j < run.count; j += 2, row += 2 * run.stride) {
    if (!Gaps) ahead.step();
    const bool paired = j + 1 < run.count;
    const bfloat16* next = paired ? row + run.stride : row;
    const uint32_t keep = paired ? 0xffffffffu : 0xffffu;
    UVec x[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; v += 2) {
      const __m512i a = (__m512i)(Whole ? load_step(row + v * kLanes) : load_step(row + v * kLanes, columns));
      const __m512i b = (__m512i)(Whole ? load_step(next + v * kLanes) : load_step(next + v * kLanes, columns));
      if (Gaps) {
        ask_twice(row + v * kLanes, run.ahead);
        ask_twice(next + v * kLanes, run.ahead);
      }
      x[v] = (UVec)_mm512_unpacklo_epi16(a, b);
      x[v + 1] = (UVec)_mm512_unpackhi_epi16(a, b);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const UVec p = broadcast_bits(load_as<uint32_t>(weights + r * kScoresLd + j) & keep);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) add_product(sum[r][v], x[v], p);
    }
  }
  asked = ahead;
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; v += 2) {
      float* o = out + r * out_ld + v * kLanes;
      const Vec low = sum[r][v], high = sum[r][v + 1];  // columns 8i..8i+3 and 8i+4..8i+7
      const Vec first = __builtin_shuffle(low, high, IVec{0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23});
      const Vec second = __builtin_shuffle(low, high, IVec{8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31});
      store(o, load(o) + first);
      store(o + kLanes, load(o + kLanes) + second);
    }
}
#endif

template <int R, int V, bool Gaps, class T>
XF_INLINE void add_columns(const Product<T>* weights, Run<T> run, int64_t columns, Ahead& ahead, float* out, int64_t out_ld) {
  constexpr int64_t kWide = V * kLanes;
  for (; columns >= kWide; columns -= kWide, run.rows += kWide, out += kWide)
    add_values<R, V, true, Gaps>(weights, run, columns, ahead, out, out_ld);
  if (columns == 0) return;
  if constexpr (kWide > ProductOf<T>::kStep)
    add_columns<R, V / 2, Gaps, T>(weights, run, columns, ahead, out, out_ld);
  else
    add_values<R, V, false, Gaps>(weights, run, columns, ahead, out, out_ld);
}

template <int R> constexpr int kColumnVectors = kSums / R < 8 ? kSums / R : 8;  // of a value tile

template <class T>
void value_block(const Plan& plan, const Share& share, int64_t key0, int64_t end) {
  const Attention& a = plan.decode->attention;
  const Product<T>* weights = reinterpret_cast<const Product<T>*>(share.weights);
  for (int64_t key = key0; key < end;) {
    Run<T> run = run_at<T>(plan, a.value, share, a.head_dim_v, key, end);
    run.count = min_of(run.count, kPieceKeys);
    int64_t steps = 0;
    for_rows<kRowsAtOnce>(0, share.rows, [&](auto rows, int64_t) {
      constexpr int V = kColumnVectors<decltype(rows)::count>;
      constexpr int64_t kWide = V * kLanes, kKeys = kStepKeys<T, V>;
      steps += (a.head_dim_v + kWide - 1) / kWide * (kPairs<T> ? (run.count + 1) / 2 : run.count / kKeys);
    });
    Ahead ahead(run, a.head_dim_v, steps);
    for_rows<kRowsAtOnce>(0, share.rows, [&](auto rows, int64_t r) __attribute__((always_inline)) {
      constexpr int R = decltype(rows)::count;
      constexpr int V = kColumnVectors<R>;
      const auto passes = run.stride == a.head_dim_v ? add_columns<R, V, false, T> : add_columns<R, V, true, T>;
      passes(weights + r * kScoresLd + (key - key0), run, a.head_dim_v, ahead, share.out + r * plan.out_ld, plan.out_ld);
    });
    key += run.count;
  }
}

// ---- one task ----

template <class T>
void pack_query(const Plan& plan, const Share& share) {
  const Attention& a = plan.decode->attention;
  for (int64_t r = 0; r < share.rows; ++r) {
    const Row row = row_at(plan, share, r);
    const T* in = row_of<const T>(a.query, share.batch, row.head, row.query);
    Product<T>* out = reinterpret_cast<Product<T>*>(share.query) + r * plan.query_ld;
    if constexpr (kPairs<T>) {
      __builtin_memcpy(out, in, size_t(a.head_dim) * sizeof(T));
      __builtin_memset(out + a.head_dim, 0, size_t(plan.query_ld - a.head_dim) * sizeof(T));
    } else {
      for (int64_t c = 0; c < plan.query_ld; c += kLanes) {
        const int64_t n = max_of(0, min_of(kLanes, a.head_dim - c));
        store(out + c, n == kLanes ? load(in + c) * plan.query_scale : n ? load(in + c, int(n)) * plan.query_scale : zero());
      }
    }
  }
}

template <class T>
void finish_row(const Plan& plan, const Share& share, int64_t r, const float* out, float max, float sum) {
  const Attention& a = plan.decode->attention;
  const Row row = row_at(plan, share, r);
  float ratio = 1.f;
  if (a.sinks) {
    const float sink = a.sinks[row.head], larger = max > sink ? max : sink, finite = larger == -kInfinity ? 0.f : larger;
    ratio = exp2(broadcast((max - finite) * kLog2e))[0];
    sum = sum * ratio + exp2(broadcast((sink - finite) * kLog2e))[0];
    max = larger;
  }
  const float factor = sum == 0.f ? 0.f : ratio / sum;
  T* result = row_of<T>(a.out, share.batch, row.head, row.query);
  int64_t c = 0;
  for (; c + kLanes <= a.head_dim_v; c += kLanes) store(result + c, load(out + c) * factor);
  if (c < a.head_dim_v) store(result + c, load(out + c) * factor, int(a.head_dim_v - c));
  if (a.lse) {
    const int64_t at = share.batch * a.lse_batch + row.head * a.lse_head + row.query;
    const Vec rest = log(broadcast(sum)), rounded = max + rest;
    a.lse[at] = rounded[0];
    if (a.lse_error) a.lse_error[at] = lse_error(broadcast(max), rest, rounded)[0];
  }
}

// Merges the tasks of a unit, in the order of their keys.
template <class T>
void merge(const Plan& plan, const Share& share, const float* first, int64_t stride) {
  for (int64_t r = 0; r < share.rows; ++r) {
    float max = -kInfinity, sum = 0.f;
    for (int64_t s = 0; s < share.splits; ++s) {
      const float m = first[s * stride + plan.group_rows * plan.out_ld + r];
      max = m > max ? m : max;
    }
    for (int64_t c = 0; c < plan.out_ld; c += kLanes) store(share.out + r * plan.out_ld + c, zero());
    if (max != -kInfinity) {
      for (int64_t s = 0; s < share.splits; ++s) {
        const float* partial = first + s * stride;
        const float* statistics = partial + plan.group_rows * plan.out_ld + r;
        const float weight = exp2(broadcast((statistics[0] - max) * kLog2e))[0];
        sum += statistics[plan.group_rows] * weight;
        float* out = share.out + r * plan.out_ld;
        const float* add = partial + r * plan.out_ld;
        for (int64_t c = 0; c < plan.out_ld; c += kLanes) store(out + c, load(add + c) * weight + load(out + c));
      }
    }
    finish_row<T>(plan, share, r, share.out + r * plan.out_ld, max, sum);
  }
}

Share share_of(const Plan& plan, int64_t task) {
  const Attention& a = plan.decode->attention;
  int64_t b = 0, above = a.batch;
  while (above - b > 1) {
    const int64_t middle = (b + above) / 2;
    (plan.first_task[middle] <= task ? b : above) = middle;
  }
  Share share;
  share.batch = b;
  share.splits = (plan.first_task[b + 1] - plan.first_task[b]) / plan.units;
  share.unit = (task - plan.first_task[b]) / share.splits;
  share.split = (task - plan.first_task[b]) % share.splits;
  share.kv_head = share.unit / plan.row_groups;
  share.row0 = share.unit % plan.row_groups * plan.group_rows;
  share.rows = min_of(plan.group_rows, plan.rows - share.row0);
  const KeyRange keys = keys_of(*plan.decode, b);
  share.keys.first = keys.first + share.split * plan.task_keys;
  share.keys.last = min_of(keys.last, share.keys.first + plan.task_keys);
  return share;
}

template <class T>
void decode_task(void* context, int64_t task, char* scratch) {
  const Plan& plan = *static_cast<const Plan*>(context);
  Share share = share_of(plan, task);
  const int64_t partial_floats = plan.group_rows * (plan.out_ld + 2);
  share.scores = reinterpret_cast<float*>(scratch);
  share.out = share.splits > 1 ? plan.partials + task * partial_floats
                               : share.scores + plan.group_rows * kScoresLd;
  share.max = share.out + plan.group_rows * plan.out_ld;
  share.sum = share.max + plan.group_rows;
  share.query = reinterpret_cast<char*>(share.scores + plan.group_rows * kScoresLd + round_up(partial_floats, 16));
  share.weights = kPairs<T> ? share.query + plan.group_rows * plan.query_ld * sizeof(Product<T>) : scratch;
  for (int64_t r = 0; r < share.rows; ++r) {
    share.max[r] = -kInfinity;
    share.sum[r] = 0.f;
    for (int64_t c = 0; c < plan.out_ld; c += kLanes) store(share.out + r * plan.out_ld + c, zero());
  }
  pack_query<T>(plan, share);
  for (int64_t key = share.keys.first; key < share.keys.last; key += kBlockKeys) {
    const int64_t end = min_of(key + kBlockKeys, share.keys.last);
    score_block<T>(plan, share, key, end);
    softmax_block<T>(plan, share, key, end);
    value_block<T>(plan, share, key, end);
  }
  if (share.splits == 1) {
    for (int64_t r = 0; r < share.rows; ++r)
      finish_row<T>(plan, share, r, share.out + r * plan.out_ld, share.max[r], share.sum[r]);
    return;
  }
  int32_t& pending = plan.pending[share.batch * plan.units + share.unit];
  if (__atomic_sub_fetch(&pending, 1, __ATOMIC_ACQ_REL) == 0) {
    share.out = share.scores + plan.group_rows * kScoresLd;
    merge<T>(plan, share, plan.partials + (task - share.split) * partial_floats, partial_floats);
  }
}

template <class T>
void decode_of(const Decode& d, const Pool& pool) {
  const Attention& a = d.attention;
  Plan plan;
  plan.decode = &d;
  plan.rows = a.heads_q / max_of(1, a.heads_kv) * a.seqlen_q;
  if (a.batch * plan.rows == 0) return;
  plan.row_groups = (plan.rows + kMaxRows - 1) / kMaxRows;
  plan.group_rows = round_up((plan.rows + plan.row_groups - 1) / plan.row_groups, plan.row_groups > 1 ? kRowsAtOnce : 1);
  plan.units = a.heads_kv * plan.row_groups;
  plan.query_ld = round_up(a.head_dim, kPad);
  plan.out_ld = round_up(a.head_dim_v, kPad);
  plan.query_scale = kPairs<T> ? 1.f : a.scale;
  plan.score_scale = kPairs<T> ? a.scale : 1.f;

  int64_t keys = 0;
  for (int64_t b = 0; b < a.batch; ++b) {
    const KeyRange range = keys_of(d, b);
    keys += range.last - range.first;
  }
  plan.task_keys = max_of(kLeastTaskKeys, round_up(keys * plan.units / kTasks, kBlockKeys));
  plan.first_task = static_cast<int64_t*>(pool.allocate(pool.self, size_t(a.batch + 1) * sizeof(int64_t)));
  plan.first_task[0] = 0;
  bool split = false;
  for (int64_t b = 0; b < a.batch; ++b) {
    const KeyRange range = keys_of(d, b);
    const int64_t splits = max_of(1, (range.last - range.first + plan.task_keys - 1) / plan.task_keys);
    plan.first_task[b + 1] = plan.first_task[b] + splits * plan.units;
    split |= splits > 1;
  }
  const int64_t tasks = plan.first_task[a.batch], partial_floats = plan.group_rows * (plan.out_ld + 2);
  plan.pending = nullptr;
  plan.partials = nullptr;
  if (split) {
    plan.pending = static_cast<int32_t*>(pool.allocate(pool.self, size_t(a.batch * plan.units) * sizeof(int32_t)));
    for (int64_t b = 0; b < a.batch; ++b)
      for (int64_t u = 0; u < plan.units; ++u)
        plan.pending[b * plan.units + u] = int32_t((plan.first_task[b + 1] - plan.first_task[b]) / plan.units);
    plan.partials = static_cast<float*>(pool.allocate(pool.self, size_t(tasks * partial_floats) * sizeof(float)));
  }
  const int64_t scratch = (plan.group_rows * kScoresLd + round_up(partial_floats, 16)) * int64_t(sizeof(float)) +
                          plan.group_rows * (plan.query_ld + (kPairs<T> ? kScoresLd : 0)) * int64_t(sizeof(Product<T>));
  pool.run(tasks, decode_task<T>, &plan, size_t(scratch));
}

// ---- writing ----

void append_rows(const View& cache, const Paging& paging, const View& rows, int64_t b, int64_t h, int64_t first, int64_t count,
                 int64_t row_elements, int64_t element_bytes) {
  for (int64_t t = 0; t < count; ++t) {
    const int64_t key = first + t;
    int64_t at = b * cache.batch + key * cache.row;
    if (paging.page_size)
      at = paging.block_table[b * paging.table_row + key / paging.page_size] * cache.batch + key % paging.page_size * cache.row;
    __builtin_memcpy(static_cast<char*>(cache.data) + (at + h * cache.head) * element_bytes,
                     static_cast<const char*>(rows.data) + (b * rows.batch + h * rows.head + t * rows.row) * element_bytes,
                     size_t(row_elements * element_bytes));
  }
}

}  // namespace

// Whether a call of `attention` runs faster here than in tiles whose lanes are queries: where those would be half empty, or
// too few for the cores.
bool decode_takes(const Attention& a) {
  if (a.cu_seqlens_q || a.dropout_p > 0. || a.residual.data || a.exact_weights) return false;
  if (a.global_keys || a.has_map_bias()) return false;
  return a.seqlen_q <= kLanes / 2 || (a.seqlen_q <= 16 && a.batch * a.heads_q < 32 && a.seqlen_k >= 2 * kLeastTaskKeys);
}

void decode_forward(const Decode& d, const Pool& pool) {
  switch (d.attention.element) {
    case Element::float32: return decode_of<float>(d, pool);
    case Element::bfloat16: return decode_of<bfloat16>(d, pool);
    case Element::float16: return decode_of<float16>(d, pool);
    case Element::boolean: return;
  }
}

void kv_cache_append(const CacheAppend& append, const Pool& pool) {
  const Task task = [](void* context, int64_t task, char*) {
    const CacheAppend& c = *static_cast<const CacheAppend*>(context);
    const int64_t b = task / c.heads, h = task % c.heads;
    append_rows(c.key_cache, c.paging, c.new_key, b, h, c.lengths[b] - c.tokens, c.tokens, c.head_dim, c.element_bytes);
    append_rows(c.value_cache, c.paging, c.new_value, b, h, c.lengths[b] - c.tokens, c.tokens, c.head_dim_v, c.element_bytes);
  };
  pool.run(append.batch * append.heads, task, const_cast<CacheAppend*>(&append), 64);
}

const DecodeKernels decode_kernels = {decode_forward, kv_cache_append};

}  // namespace XFORMER_FAST_ISA
}  // namespace xformer_fast
