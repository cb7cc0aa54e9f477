// The tile product, the one inner loop that every kernel is built from:
//
//   C[r][lane] = start(r, lane) + sum_k A(r, k) * B[k][lane]        r < rows, lane < vectors * kLanes, k < depth
//
// A is read one scalar at a time and broadcast, at a + r*a_row + k*a_red: A transposed, or a tensor where it lies, costs
// nothing. B is rows of `vectors` vectors, b_ld elements apart; C is float32 rows, c_ld apart; B and C need no alignment
// but are fastest at 64 bytes. Start is 0 (overwrite), the old C (accumulate), or the old C times scale[lane] (rescale).
//
//   tile_product(rows, vectors, depth, a, a_row, a_red, b, b_ld, c, c_ld, Start::..., scale, prefetch)
//
// with vectors = 1..4. What is needed after the product can be brought into the second-level cache meanwhile: a
// Prefetch lists memory, and the product asks for a share of its lines between chunks of rows: in the order of addresses
// within an area, as a memory's own prefetchers follow a stream.
//
// Two forms, chosen by the type of A and B:
//   float       the plain one, on every instruction set.
//   bfloat16    only with XF_BF16_DOT: k counts PAIRS. A's pair is the two adjacent elements at a + r*a_row + k*a_red, B is
//               pair-interleaved, [k][lane][2], and b_ld counts elements, so 2 * lanes a row when dense. A last odd element
//               must be paired with zeros in BOTH operands (0 * NaN is NaN).
//
// Rows are walked in chunks of at most R, all chunks nearly equal; R x vectors accumulators and a row of B fill the
// register file. Each R x V body is a function of its own, so that the compiler allocates its registers alone.
#pragma once
#include "simd.h"

namespace xformer_fast {
namespace XFORMER_FAST_ISA {
namespace {

enum class Start { overwrite, accumulate, rescale };

constexpr int64_t kLongestChain = 256;  // terms added one behind the other: sums of parts lose fewer digits
#if defined(XF_AVX512)
constexpr int kTileVectors = 4;  // vectors a tile of queries is best cut into
template <int V> constexpr int kTileRows = V == 1 ? 8 : V == 2 ? 8 : V == 3 ? 8 : 6;
#else
constexpr int kTileVectors = 3;
template <int V> constexpr int kTileRows = V == 1 ? 8 : V == 2 ? 6 : V == 3 ? 4 : 2;
#endif

XF_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
XF_INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

XF_INLINE void multiply_add(Vec& sum, float a, Vec b) { sum = broadcast(a) * b + sum; }
#if defined(XF_BF16_DOT)
struct BfloatPairs { uint32_t bits; };
XF_INLINE BfloatPairs broadcast_source(const bfloat16* a) { return {load_as<uint32_t>(a)}; }
XF_INLINE UVec load_operand(const bfloat16* b) { return load_as<UVec>(b); }
XF_INLINE void multiply_add(Vec& sum, BfloatPairs a, UVec b) {
  sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(int(a.bits)), (__m512bh)b);
}
#endif
XF_INLINE float broadcast_source(const float* a) { return *a; }
XF_INLINE Vec load_operand(const float* b) { return load(b); }

constexpr int64_t kCacheLine = 64;

// Asks for `lines` adjacent lines, and steps past them. A loop of one line each costs twice as much.
XF_INLINE void ask_for(const char*& line, int64_t lines) {
  for (; lines >= 2; lines -= 2, line += 2 * kCacheLine) {
    __builtin_prefetch(line, 0, 2);
    __builtin_prefetch(line + kCacheLine, 0, 2);
  }
  if (lines) {
    __builtin_prefetch(line, 0, 2);
    line += kCacheLine;
  }
}

// Areas of rows, `stride` elements or the `offsets` of a list apart. What does not fit the list of areas is not asked for.
class Prefetch {
 public:
  template <class T>
  void add(const T* p, int64_t stride, int64_t rows, int64_t columns) {
    if (stride == columns)
      add(p, nullptr, 0, 1, rows * columns);
    else
      add(p, nullptr, stride, rows, columns);
  }
  template <class T>
  void add(const T* p, const int64_t* offsets, int64_t rows, int64_t columns) {
    add(p, offsets, 0, rows, columns);
  }
  // Everything is asked for by `steps` steps, of one product or of several.
  void spread(int64_t steps) {
    steps_ = steps;
    share_ = (lines_ + steps - 1) / max_of(1, steps);
  }
  void start(int64_t steps) {
    if (steps_ == 0) spread(steps);
  }
  XF_NOINLINE void step() {
    int64_t now = min_of(share_, lines_);
    lines_ -= now;
    while (now > 0) {
      if (left_ == 0) next_row();
      const int64_t lines = min_of(now, left_);
      now -= lines;
      left_ -= lines;
      ask_for(line_, lines);
    }
  }

 private:
  template <class T>
  void add(const T* p, const int64_t* offsets, int64_t stride, int64_t rows, int64_t columns) {
    if (count_ == kMostAreas || rows * columns <= 0) return;
    const int64_t element = sizeof(T), lines = (columns * element + kCacheLine - 1) / kCacheLine;
    areas_[count_++] = {reinterpret_cast<const char*>(p), offsets, element, stride * element, rows, lines};
    lines_ += rows * lines;
  }
  void next_row() {
    if (row_ == areas_[area_].rows) ++area_, row_ = 0;
    const Area& area = areas_[area_];
    line_ = area.begin + (area.offsets ? area.offsets[row_] * area.element : row_ * area.stride);
    left_ = area.lines;
    ++row_;
  }

  struct Area {
    const char* begin;
    const int64_t* offsets;
    int64_t element, stride, rows, lines;  // lines of a row
  };
  static constexpr int kMostAreas = 8;
  Area areas_[kMostAreas];
  int count_ = 0, area_ = 0;
  int64_t row_ = 0, left_ = 0;  // the next row of the area; lines left of the row before it
  const char* line_ = nullptr;
  int64_t lines_ = 0, steps_ = 0, share_ = 0;
};

template <int R, int V, class T>
XF_NOINLINE void tile_product_rows(int64_t depth, const T* a, int64_t a_row, int64_t a_red, const T* b,
                                                 int64_t b_ld, float* c, int64_t c_ld, Start start, const float* scale) {
  constexpr int kStep = kLanes * sizeof(float) / sizeof(T);
  Vec sum[R][V];  // every loop over it is unrolled: one left rolled would put it on the stack
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[r][v] = zero();
  for (int64_t k = 0; k < depth; ++k) {
    decltype(load_operand(b)) row[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) row[v] = load_operand(b + v * kStep);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const auto x = broadcast_source(a + r * a_row);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) multiply_add(sum[r][v], x, row[v]);
    }
    a += a_red;
    b += b_ld;
  }
  asm("" : "+r"(c), "+r"(c_ld));  // or the addresses of every store are computed, and spilled, before the loop
  // The old C joins last: sums over many blocks lose less than one long chain would.
  if (scale && start == Start::rescale) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const Vec factor = load(scale + v * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sum[r][v] = load(c + r * c_ld + v * kLanes) * factor + sum[r][v];
    }
  } else if (start == Start::accumulate) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[r][v] += load(c + r * c_ld + v * kLanes);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(c + r * c_ld + v * kLanes, sum[r][v]);
}

template <int R, int V, class T>
XF_INLINE void tile_product_chunk(int64_t rows, int64_t depth, const T* a, int64_t a_row, int64_t a_red, const T* b,
                                  int64_t b_ld, float* c, int64_t c_ld, Start start, const float* scale) {
  if constexpr (R > 1) {
    if (rows < R) return tile_product_chunk<R - 1, V>(rows, depth, a, a_row, a_red, b, b_ld, c, c_ld, start, scale);
  }
  tile_product_rows<R, V>(depth, a, a_row, a_red, b, b_ld, c, c_ld, start, scale);
}

// Steps of prefetching in a product: the chunks that its rows are walked in.
XF_INLINE int64_t tile_product_steps(int64_t rows, int vectors) {
  constexpr int kRows[] = {kTileRows<1>, kTileRows<2>, kTileRows<3>, kTileRows<4>};
  return (rows + kRows[vectors - 1] - 1) / kRows[vectors - 1];
}

template <int V, class T>
void long_tile_product(int64_t rows, int64_t depth, const T* a, int64_t a_row, int64_t a_red, const T* b, int64_t b_ld,
                       float* c, int64_t c_ld, Start start, const float* scale);

template <int V, class T>
void tile_product(int64_t rows, int64_t depth, const T* a, int64_t a_row, int64_t a_red, const T* b, int64_t b_ld, float* c,
                  int64_t c_ld, Start start, const float* scale = nullptr, Prefetch* prefetch = nullptr) {
  constexpr int R = kTileRows<V>;
  if (rows <= 0) return;
  if (depth > kLongestChain) return long_tile_product<V>(rows, depth, a, a_row, a_red, b, b_ld, c, c_ld, start, scale);
  const int64_t chunks = (rows + R - 1) / R, least = rows / chunks, longer = rows % chunks;
  if (prefetch) prefetch->start(chunks);
  for (int64_t i = 0; i < chunks; ++i) {
    const int64_t now = least + (i < longer);
    if (prefetch) prefetch->step();
    tile_product_chunk<R, V>(now, depth, a, a_row, a_red, b, b_ld, c, c_ld, start, scale);
    a += now * a_row;
    c += now * c_ld;
  }
}

template <int V, class T>
void long_tile_product(int64_t rows, int64_t depth, const T* a, int64_t a_row, int64_t a_red, const T* b, int64_t b_ld,
                       float* c, int64_t c_ld, Start start, const float* scale) {
  for (int64_t done = 0; done < depth; done += kLongestChain) {
    const int64_t now = depth - done < kLongestChain ? depth - done : kLongestChain;
    tile_product<V>(rows, now, a + done * a_red, a_row, a_red, b + done * b_ld, b_ld, c, c_ld, start, scale);
    start = Start::accumulate;
  }
}

template <class T>
void tile_product(int64_t rows, int vectors, int64_t depth, const T* a, int64_t a_row, int64_t a_red, const T* b,
                  int64_t b_ld, float* c, int64_t c_ld, Start start, const float* scale = nullptr,
                  Prefetch* prefetch = nullptr) {
  switch (vectors) {
    case 1: return tile_product<1>(rows, depth, a, a_row, a_red, b, b_ld, c, c_ld, start, scale, prefetch);
    case 2: return tile_product<2>(rows, depth, a, a_row, a_red, b, b_ld, c, c_ld, start, scale, prefetch);
    case 3: return tile_product<3>(rows, depth, a, a_row, a_red, b, b_ld, c, c_ld, start, scale, prefetch);
    default: return tile_product<4>(rows, depth, a, a_row, a_red, b, b_ld, c, c_ld, start, scale, prefetch);
  }
}

}  // namespace
}  // namespace XFORMER_FAST_ISA
}  // namespace xformer_fast
