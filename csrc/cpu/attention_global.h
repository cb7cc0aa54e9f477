// Global keys, which queries see beside their window. They are gathered into blocks of keys of their own, whose tiles are
// computed as any other's: what an option wants to know of a key's place is asked run by run of adjacent keys, and a pair
// is masked where the query's window holds the key already, so that none counts twice.
#pragma once
#include "attention_tiles.h"

namespace xformer_fast {
namespace XFORMER_FAST_ISA {
namespace {

// pass(tile, segment, first row) for the rows of `tile`, keys[r] being the key of row r: once a run of adjacent keys, as a
// tile of which row 0 is the run's first key. Without a list of keys the tile is one run.
template <class Pass>
XF_INLINE void for_each_run(const int64_t* keys, const ScoreTile& tile, const Segment& segment, Pass pass) {
  if (!keys) return pass(tile, segment, 0);
  for (int64_t r = segment.row0, end; r < segment.row1; r = end) {
    for (end = r + 1; end < segment.row1 && keys[end] == keys[end - 1] + 1;) ++end;
    ScoreTile run = tile;
    run.scores += r * tile.ld;
    run.key0 = keys[r];
    pass(run, Segment{0, end - r, segment.vector0, segment.vector1}, r);
  }
}

// Sets to -inf what is in a query's window, and what a causal query may not see.
XF_NOINLINE void mask_window(const Attention& a, const ScoreTile& tile, const Segment& segment, const int64_t* keys) {
  const IVec lane = lane_index();
  for (int v = segment.vector0; v < segment.vector1; ++v)
    for (int64_t r = segment.row0; r < segment.row1; ++r) {
      const int64_t distance = keys[r] - (tile.query0 + v * kLanes + tile.shift);  // from the position of lane 0
      const int lanes_before = a.causal ? 0 : int(max_of(0, min_of(kLanes, distance - a.right)));  // whose window ends before it
      const int last_lane_inside = int(max_of(-1, min_of(kLanes, distance + a.left)));
      const IVec seen = (lane < broadcast_int(lanes_before)) | (lane > broadcast_int(last_lane_inside));
      float* s = tile.scores + r * tile.ld + v * kLanes;
      store(s, seen ? load(s) : broadcast(-kInfinity));
    }
}

// All ones in the lanes of query vector v whose pair with `key` dropout keeps.
XF_INLINE IVec dropout_keep(const DropoutKeep& dropout, const ScoreTile& tile, int v, int64_t key) {
  IVec keep[4];
  dropout(tile.query0 + v * kLanes, key / 4, keep);
  return keep[key % 4];
}

XF_NOINLINE void apply_dropout(const DropoutKeep& dropout, const ScoreTile& tile, const Segment& segment, const int64_t* keys) {
  for_each_score(tile, segment, [&](Vec p, int64_t r, int v) {
    return (Vec)((IVec)p & dropout_keep(dropout, tile, v, keys[r]));
  });
}

// The rows of a list as a block's copies of keys and of values are laid out: float32, columns adjacent.
template <class T>
void gather_keys(const View& view, int64_t b, int64_t h, const int64_t* keys, int64_t rows, int64_t columns, float* out) {
  for (int64_t r = 0; r < rows; ++r) convert_rows(row_of<const T>(view, b, h, keys[r]), 0, 1, columns, out + r * columns);
}
template <class T>
void gather_values(const View& view, int64_t b, int64_t h, const int64_t* keys, int64_t rows, int64_t columns, float* out) {
  gather_keys<T>(view, b, h, keys, rows, columns, out);
}

#if defined(XF_BF16_DOT)
// Of bfloat16 pairs, as exponentials_pairs leaves them.
XF_NOINLINE void apply_dropout_pairs(const DropoutKeep& dropout, const ScoreTile& tile, const Segment& segment,
                                     const int64_t* keys) {
  for (int64_t r = segment.row0; r < segment.row1; r += 2)
    for (int v = segment.vector0; v < segment.vector1; ++v) {
      const IVec even = dropout_keep(dropout, tile, v, keys[r]);
      const IVec odd = r + 1 < segment.row1 ? dropout_keep(dropout, tile, v, keys[r + 1]) : IVec{};
      float* p = tile.scores + r / 2 * tile.ld + v * kLanes;
      store(p, (Vec)((IVec)load(p) & ((even & 0xffff) | (odd << 16))));
    }
}

// Or padded to an even width, and in pairs of rows.
template <class T>
void gather_keys(const View& view, int64_t b, int64_t h, const int64_t* keys, int64_t rows, int64_t columns, bfloat16* out) {
  for (int64_t r = 0; r < rows; ++r)
    pad_rows(row_of<const bfloat16>(view, b, h, keys[r]), 0, 1, columns, out + r * round_up(columns, 2));
}
template <class T>
void gather_values(const View& view, int64_t b, int64_t h, const int64_t* keys, int64_t rows, int64_t columns, bfloat16* out) {
  for (int64_t r = 0; r < rows; r += 2) {
    const int64_t n = min_of(2, rows - r), apart = n == 2 ? (keys[r + 1] - keys[r]) * view.row : 0;
    interleave_row_pairs(row_of<const bfloat16>(view, b, h, keys[r]), apart, n, columns, out + r * columns);
  }
}
#endif

}  // namespace
}  // namespace XFORMER_FAST_ISA
}  // namespace xformer_fast
