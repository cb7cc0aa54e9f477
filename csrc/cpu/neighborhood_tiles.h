// What neighborhood attention forward and backward share: who sees whom along an axis, how a map is cut into tiles, the
// masks and biases of a tile, rows in and out of scratch.
//
// Places of an axis `dilation` apart are a group that attends to itself alone: a dilation group of the map is a map of its
// own, and everything below is inside one. A tile is a block of places, one a lane: queries, or keys in the second half of
// the backward. A score tile is S^T: its lanes are those places, its rows a box of places of the other kind that holds all
// that some lane sees (along each axis those are an interval whose ends grow with the place).
//
// A strip is the tiles of one place along axes 0 and 1, axis 2 running through them. The rows that a strip needs lie in
// scratch as [column][line]: a column is a place along axis 2, a line one along axes 0 and 1. So the box of a tile, some
// columns of all lines, is one run of dense rows, and one product serves it whatever the number of axes. The next strip
// needs most of the same lines: a line has a fixed slot, and only what the slot does not hold yet is copied.
//
// Who sees whom is two masks, of lines and of columns, a lane each; the bias is dense over the distances of a row from the
// tile's first place, the lanes adjacent, so that every tile reads it where the tile's box begins.
#pragma once
#include "neighborhood.h"
#include "scratch.h"

namespace xformer_fast {
namespace XFORMER_FAST_ISA {
namespace {

constexpr int64_t kTasksWanted = 64;
constexpr int64_t kLineBytes = 256 * 1024;       // of the rows of a strip: part of an L2 cache
constexpr int64_t kLeastStrips = 4;              // of a piece: its first strip copies every line, the next ones few
constexpr int64_t kPartialFloats = int64_t(1) << 24;  // of sums of the table's gradient, about

enum class Rows { keys, queries };  // of score tiles; the lanes are the other kind

struct Interval {
  int64_t first, last;  // last is excluded
  int64_t size() const { return last - first; }
  bool has(int64_t i) const { return first <= i && i < last; }
};

// One axis of a dilation group: `length` places.
struct Axis {
  int64_t length, kernel;
  bool causal;

  Interval keys_of(int64_t i) const {
    if (causal) return {max_of(0, i - kernel + 1), i + 1};
    const int64_t first = max_of(0, min_of(i - kernel / 2, length - kernel));
    return {first, first + kernel};
  }
  Interval queries_of(int64_t j) const {
    if (causal) return {j, min_of(length, j + kernel)};
    return {j < kernel ? 0 : j - kernel + 1 + kernel / 2, j >= length - kernel ? length : j + kernel / 2 + 1};
  }
  template <Rows kRows>
  Interval neighbours(int64_t lane_place) const {
    return kRows == Rows::keys ? keys_of(lane_place) : queries_of(lane_place);
  }
  // Of some place of [first, first + count).
  template <Rows kRows>
  Interval neighbours(int64_t first, int64_t count) const {
    return {neighbours<kRows>(first).first, neighbours<kRows>(min_of(length, first + count) - 1).last};
  }
  // The most that the above can be.
  template <Rows kRows>
  int64_t most_neighbours(int64_t count) const {
    return min_of(length, count + (kRows == Rows::keys || causal ? kernel - 1 : 2 * kernel - 2));
  }
};

// ---- how a map is cut ----

struct NeighborhoodPlan {
  const NeighborhoodAttention* attention;
  Axis longest[kMaxAxes];        // of the dilation groups
  int64_t tile[kMaxAxes];        // places of a tile along each axis
  int vectors;
  int64_t lanes;                 // of a tile
  int64_t width, width_v;        // of a row in scratch
  int64_t strip_cuts, tile_cuts; // a dilation group is cut into so many pieces, along axes 0 and 1 and along axis 2
  int64_t pieces;                // of the batch, a head
  int64_t chunks;                // of pieces; a task is a chunk for a KV head
  int64_t bias_extent[kMaxAxes];

  int64_t tiles(int x, int64_t length) const { return (length + tile[x] - 1) / tile[x]; }
  int64_t strips() const { return tiles(0, longest[0].length) * tiles(1, longest[1].length); }
  int64_t bias_head() const { return bias_extent[0] * bias_extent[1] * bias_extent[2] * lanes; }
  int64_t table_rows() const {
    int64_t rows = 1;
    for (int64_t kernel : attention->kernel) rows *= 2 * kernel - 1;
    return rows;
  }
  int64_t group() const { return attention->heads / attention->heads_kv; }
};

// The shape of a tile: whole vectors of places, so that all scores of all tiles, masked ones included, are fewest.
inline void choose_tile(NeighborhoodPlan& plan) {
  constexpr double kBroadcasts = 0.15;  // what loading a row's scalars costs, in vectors
  double least = 0;
  for (int vectors = 1; vectors <= kTileVectors; ++vectors) {
    const int64_t lanes = vectors * kLanes;
    for (int64_t t0 = 1; t0 <= lanes; ++t0)
      for (int64_t t1 = 1; t0 * t1 <= lanes; ++t1) {
        if (lanes % (t0 * t1) != 0) continue;
        const int64_t tile[kMaxAxes] = {t0, t1, lanes / (t0 * t1)};
        double cost = vectors + kBroadcasts;
        for (int x = 0; x < kMaxAxes; ++x)
          cost *= double((plan.longest[x].length + tile[x] - 1) / tile[x]) *
                  double(plan.longest[x].most_neighbours<Rows::keys>(tile[x]));
        if (least > 0 && cost >= least) continue;
        least = cost;
        plan.vectors = vectors;
        plan.lanes = lanes;
        for (int x = 0; x < kMaxAxes; ++x) plan.tile[x] = tile[x];
      }
  }
}

inline NeighborhoodPlan plan_neighborhoods(const NeighborhoodAttention& a) {
  NeighborhoodPlan plan{};
  plan.attention = &a;
  int64_t maps = a.batch;
  for (int x = 0; x < kMaxAxes; ++x) {
    plan.longest[x] = {(a.side[x] + a.dilation[x] - 1) / a.dilation[x], a.kernel[x], a.causal[x]};
    maps *= a.dilation[x];
  }
  choose_tile(plan);
  for (int x = 0; x < kMaxAxes; ++x) plan.bias_extent[x] = 2 * a.kernel[x] + plan.tile[x] - 2;
  plan.width = round_up(a.head_dim, kLanes);
  plan.width_v = round_up(a.head_dim_v, kLanes);

  const auto rows_of = [&](int x, int64_t count) { return plan.longest[x].most_neighbours<Rows::keys>(count); };
  const int64_t column_bytes =
      rows_of(0, plan.tile[0]) * rows_of(1, plan.tile[1]) * (plan.width + plan.width_v) * int64_t(sizeof(float));
  const int64_t places = plan.longest[2].length, kernel = a.kernel[2];
  const int64_t fitting = max_of(kLineBytes / column_bytes - kernel, kernel);  // else most of what is copied is shared
  plan.tile_cuts = (places + fitting - 1) / fitting;
  const auto wanted = [&] {  // cuts of what there is, for enough tasks
    const int64_t units = maps * a.heads_kv * plan.tile_cuts;
    return (kTasksWanted + units - 1) / max_of(1, units);
  };
  plan.strip_cuts = max_of(1, min_of(wanted(), plan.strips() / kLeastStrips));
  if (plan.strip_cuts == 1) plan.tile_cuts = max_of(plan.tile_cuts, min_of(wanted() * plan.tile_cuts, places / (4 * kernel)));
  plan.tile_cuts = min_of(plan.tile_cuts, plan.tiles(2, places));
  plan.pieces = maps * plan.strip_cuts * plan.tile_cuts;
  plan.chunks = min_of(plan.pieces, kTasksWanted);
  return plan;
}

// Part of a dilation group's map: a range of strips, of each a range of tiles.
struct Piece {
  int64_t batch, group[kMaxAxes];
  Axis axis[kMaxAxes];
  int64_t first_strip, last_strip, first_tile, last_tile;
  bool empty() const { return first_strip >= last_strip || first_tile >= last_tile; }
};

inline Piece piece_of(const NeighborhoodPlan& plan, int64_t index) {
  const NeighborhoodAttention& a = *plan.attention;
  Piece piece{};
  const auto next = [&](int64_t count) {
    const int64_t i = index % count;
    index /= count;
    return i;
  };
  const int64_t tile_cut = next(plan.tile_cuts), strip_cut = next(plan.strip_cuts);
  for (int x = kMaxAxes - 1; x >= 0; --x) {
    piece.group[x] = next(a.dilation[x]);
    piece.axis[x] = {(a.side[x] - piece.group[x] + a.dilation[x] - 1) / a.dilation[x], a.kernel[x], a.causal[x]};
  }
  piece.batch = index;
  const int64_t strips = plan.tiles(0, piece.axis[0].length) * plan.tiles(1, piece.axis[1].length);
  const int64_t tiles = plan.tiles(2, piece.axis[2].length);
  piece.first_strip = strips * strip_cut / plan.strip_cuts;
  piece.last_strip = strips * (strip_cut + 1) / plan.strip_cuts;
  piece.first_tile = tiles * tile_cut / plan.tile_cuts;
  piece.last_tile = tiles * (tile_cut + 1) / plan.tile_cuts;
  return piece;
}

// The rows of one head in a piece's dilation group.
template <class T>
struct HeadMap {
  T* data;
  int64_t step[kMaxAxes];
  int64_t at(int64_t i0, int64_t i1, int64_t i2) const { return i0 * step[0] + i1 * step[1] + i2 * step[2]; }
};

template <class T>
HeadMap<T> head_map(const NeighborhoodPlan& plan, const Piece& piece, const MapView& view, int64_t head) {
  HeadMap<T> map{static_cast<T*>(view.data) + piece.batch * view.batch + head * view.head, {}};
  for (int x = 0; x < kMaxAxes; ++x) {
    map.data += piece.group[x] * view.axis[x];
    map.step[x] = plan.attention->dilation[x] * view.axis[x];
  }
  return map;
}

// ---- bias ----

// Calls visit(place in the dense bias, row of the table) for every pair of a lane and a distance that the table has.
template <Rows kRows, class Visit>
void for_each_bias(const NeighborhoodPlan& plan, Visit visit) {
  const int64_t *kernel = plan.attention->kernel, *extent = plan.bias_extent, *tile = plan.tile;
  // Of a distance of row and lane along an axis: the table's index, or -1.
  const auto index = [kernel](int x, int64_t e, int64_t l) {
    const int64_t distance = e - (kernel[x] - 1) - l, i = (kRows == Rows::keys ? distance : -distance) + kernel[x] - 1;
    return i < 2 * kernel[x] - 1 ? i : -1;
  };
  int64_t place = 0;
  for (int64_t e0 = 0; e0 < extent[0]; ++e0)
    for (int64_t e1 = 0; e1 < extent[1]; ++e1)
      for (int64_t e2 = 0; e2 < extent[2]; ++e2)
        for (int64_t l0 = 0; l0 < tile[0]; ++l0)
          for (int64_t l1 = 0; l1 < tile[1]; ++l1)
            for (int64_t l2 = 0; l2 < tile[2]; ++l2, ++place) {
              const int64_t i0 = index(0, e0, l0), i1 = index(1, e1, l1), i2 = index(2, e2, l2);
              if (i0 >= 0 && i1 >= 0 && i2 >= 0)
                visit(place, (i0 * (2 * kernel[1] - 1) + i1) * (2 * kernel[2] - 1) + i2);
            }
}

struct BiasFill {
  const NeighborhoodPlan* plan;
  float* bias;  // [head][places along axes 0, 1, 2][lane], times log2(e), 0 where the table has nothing
};

template <Rows kRows>
void fill_bias(void* context, int64_t head, char*) {
  const BiasFill& fill = *static_cast<const BiasFill*>(context);
  const NeighborhoodAttention& a = *fill.plan->attention;
  float* out = fill.bias + head * fill.plan->bias_head();
  __builtin_memset(out, 0, size_t(fill.plan->bias_head()) * sizeof(float));
  for_each_bias<kRows>(*fill.plan,
                       [&](int64_t place, int64_t row) { out[place] = a.table[row * a.heads + head] * kLog2e; });
}

// Null without a table.
template <Rows kRows>
const float* dense_bias(const NeighborhoodPlan& plan, const Pool& pool) {
  const NeighborhoodAttention& a = *plan.attention;
  if (!a.table) return nullptr;
  BiasFill fill{&plan, static_cast<float*>(pool.allocate(pool.self, size_t(a.heads * plan.bias_head()) * sizeof(float)))};
  pool.run(a.heads, fill_bias<kRows>, &fill, 0);
  return fill.bias;
}

// ---- where the work is ----

// The rows of a score tile, [column][line], and what the lanes see of them.
struct ScoreRows {
  int64_t columns, lines;
  const int32_t* column_seen;  // [column][lane], 0 or -1
  const int32_t* line_seen;    // [line][lane]
  const int64_t* line_bias;    // where the bias of a line begins
  int64_t bias_column;         // of the tile's first column
  int64_t count() const { return columns * lines; }
};

// Moves over a piece, strip by strip and tile by tile.
template <Rows kRows>
class TileWalk {
 public:
  TileWalk(const NeighborhoodPlan& plan, Arena& arena) : p_(plan) {
    const auto most = [&](int x, int64_t count) { return plan.longest[x].most_neighbours<kRows>(count); };
    most_tiles_ = (plan.tiles(2, plan.longest[2].length) + plan.tile_cuts - 1) / plan.tile_cuts;
    most_lines_ = most(0, plan.tile[0]) * most(1, plan.tile[1]);
    most_columns_ = most(2, most_tiles_ * plan.tile[2]);
    most_rows_ = most_lines_ * most(2, plan.tile[2]);
    arena.take(most_lines_ * plan.lanes, line_seen_);
    arena.take(most(2, plan.tile[2]) * plan.lanes, column_seen_);
    arena.take(most_lines_, line_bias_, line_place_, held_);
    for (auto& places_of_axis : place_) arena.take(plan.lanes, places_of_axis);
    arena.take(plan.lanes, offset_);
    arena.take(plan.tile[2], lane_columns_);
  }

  int64_t most_tiles() const { return most_tiles_; }  // of a strip
  int64_t most_rows() const { return most_rows_; }
  int64_t most_line_rows() const { return most_lines_ * most_columns_; }

  void start(const Piece& piece) {
    piece_ = &piece;
    rows_.lines = 0;
    seen_columns_ = -1;
    const int64_t first = piece.first_tile * p_.tile[2];
    columns_ = piece.axis[2].neighbours<kRows>(first, (piece.last_tile - piece.first_tile) * p_.tile[2]);
  }

  void move_to_strip(int64_t strip) {
    const int64_t strips1 = p_.tiles(1, piece_->axis[1].length), tile[] = {strip / strips1, strip % strips1};
    for (int x = 0; x < 2; ++x) {
      first_[x] = tile[x] * p_.tile[x];
      box_[x] = piece_->axis[x].neighbours<kRows>(first_[x], p_.tile[x]);
    }
    if (rows_.lines != box_[0].size() * box_[1].size() || extent1_ != box_[1].size()) {
      rows_.lines = box_[0].size() * box_[1].size();
      extent1_ = box_[1].size();
      release_lines();
    }
    for (int64_t l = 0; l < p_.lanes; ++l) {
      const int64_t of_lane[] = {l / (p_.tile[1] * p_.tile[2]), l / p_.tile[2] % p_.tile[1]};
      for (int x = 0; x < 2; ++x) place_[x][l] = min_of(first_[x] + of_lane[x], piece_->axis[x].length - 1);
    }
    for (int64_t i0 = box_[0].first; i0 < box_[0].last; ++i0)
      for (int64_t i1 = box_[1].first; i1 < box_[1].last; ++i1) set_line(i0, i1, box_[0].size());
    rows_.line_seen = line_seen_;
    rows_.line_bias = line_bias_;
  }

  void move_to_tile(int64_t tile) {
    const Axis& axis = piece_->axis[2];
    first_[2] = tile * p_.tile[2];
    tile_columns_ = axis.neighbours<kRows>(first_[2], p_.tile[2]);
    rows_.columns = tile_columns_.size();
    rows_.bias_column = (tile_columns_.first - first_[2] + axis.kernel - 1) * p_.lanes;
    rows_.column_seen = column_seen_;
    whole_ = true;
    for (int x = 0; x < kMaxAxes; ++x) whole_ &= first_[x] + p_.tile[x] <= piece_->axis[x].length;
    for (int64_t l = 0; l < p_.lanes; ++l) place_[2][l] = min_of(first_[2] + l % p_.tile[2], axis.length - 1);
    if (see_the_same()) return;
    for (int64_t c = 0; c < rows_.columns; ++c)
      for (int64_t l = 0; l < p_.lanes; ++l) column_seen_[c * p_.lanes + l] = lane_columns_[l % p_.tile[2]].has(c) ? -1 : 0;
  }

  const ScoreRows& rows() const { return rows_; }
  // Where the tile's rows begin among those of the strip.
  int64_t first_row() const { return (tile_columns_.first - columns_.first) * rows_.lines; }

  // ---- lines ----

  void release_lines() {
    for (int64_t s = 0; s < rows_.lines; ++s) held_[s] = -1;
  }

  // Calls copy(line, its first place (i0, i1)) for every line that its slot does not hold.
  template <class Copy>
  void fill_lines(Copy copy) {
    for (int64_t s = 0; s < rows_.lines; ++s) {
      if (held_[s] == line_place_[s]) continue;
      held_[s] = line_place_[s];
      copy(s, line_place_[s] / piece_->axis[1].length, line_place_[s] % piece_->axis[1].length);
    }
  }

  // One line, all columns of the piece.
  template <class T>
  void copy_line(const HeadMap<T>& map, int64_t line, int64_t i0, int64_t i1, int64_t dim, float factor, float* out,
                 int64_t width) const {
    copy_rows(map.data + map.at(i0, i1, columns_.first), map.step[2], columns_.size(), dim, factor, out + line * width,
              rows_.lines * width);
  }

  // ---- lanes ----

  // out[column][lane] = factor * the lane's row. `staging` takes lanes rows.
  template <class T>
  void load_lanes(const HeadMap<T>& map, int64_t dim, int64_t width, float factor, float* staging, float* out) {
    place_lanes(map);
    gather_rows(map.data, offset_, p_.lanes, p_.lanes, dim, staging, width);
    pack_transposed(staging, width, p_.lanes, dim, factor, out, p_.lanes);
  }

  // Sets `lanes` to 0 where a lane is past the map's end.
  void clear_outside(float* lanes) const {
    for (int64_t l = 0; l < p_.lanes && !whole_; ++l)
      if (!is_inside(l)) lanes[l] = 0.f;
  }

  // The inverse of load_lanes, for lanes inside the map.
  template <class T>
  void store_lanes(const float* in, const float* factor, int64_t dim, int64_t width, float* staging, const HeadMap<T>& map) {
    place_lanes(map);
    store_transposed(in, p_.lanes, p_.lanes, dim, factor, staging, width);
    if (whole_) return scatter_rows(staging, width, 1.f, p_.lanes, dim, map.data, offset_);
    for (int64_t l = 0; l < p_.lanes; ++l)
      if (is_inside(l)) scatter_rows(staging + l * width, width, 1.f, 1, dim, map.data, offset_ + l);
  }

  // ---- what is needed next ----

  // The next tile's rows; or this one's.
  template <class T>
  void add_lanes(Prefetch& prefetch, const HeadMap<T>& map, int64_t dim, bool next) const {
    const int64_t first = first_[2] + (next ? p_.tile[2] : 0), count = min_of(p_.tile[2], piece_->axis[2].length - first);
    for (int64_t l = 0; l < p_.lanes; l += p_.tile[2])
      if (count > 0) prefetch.add(map.data + map.at(place_[0][l], place_[1][l], first), map.step[2], count, dim);
  }

  // Of the lines that the next strip copies, the places of this tile.
  template <class T>
  void add_next_lines(Prefetch& prefetch, const HeadMap<T>& map, int64_t dim) const {
    const Axis& axis = piece_->axis[1];
    if (first_[1] + p_.tile[1] >= axis.length) return;
    const int64_t first = box_[1].last, last = axis.neighbours<kRows>(first_[1] + p_.tile[1], p_.tile[1]).last;
    const int64_t count = min_of(p_.tile[2], piece_->axis[2].length - first_[2]);
    for (int64_t i0 = box_[0].first; i0 < box_[0].last; ++i0)
      for (int64_t i1 = first; i1 < last; ++i1) prefetch.add(map.data + map.at(i0, i1, first_[2]), map.step[2], count, dim);
  }

 private:
  // Whether the tile's lanes see the columns of its box that those of the last tile saw of its own.
  bool see_the_same() {
    bool same = seen_columns_ == rows_.columns;
    seen_columns_ = rows_.columns;
    for (int64_t l = 0; l < p_.tile[2]; ++l) {
      Interval seen = piece_->axis[2].neighbours<kRows>(place_[2][l]);
      seen = {seen.first - tile_columns_.first, seen.last - tile_columns_.first};
      same &= lane_columns_[l].first == seen.first && lane_columns_[l].last == seen.last;
      lane_columns_[l] = seen;
    }
    return same;
  }

  template <class T>
  static XF_NOINLINE void copy_rows(const T* in, int64_t step, int64_t rows, int64_t dim, float factor, float* out,
                                    int64_t out_step) {
    constexpr int64_t kAhead = 4;  // rows far apart are in other pages: no hardware prefetcher follows
    const int tail = int(dim % kLanes);
    for (int64_t r = 0; r < rows; ++r, in += step, out += out_step) {
      if (r + kAhead < rows)
        for (int64_t c = 0; c < dim; c += 64 / int64_t(sizeof(T))) __builtin_prefetch(in + kAhead * step + c);
      int64_t c = 0;
      for (; c + kLanes <= dim; c += kLanes) store(out + c, load(in + c) * factor);
      if (tail) store(out + c, load(in + c, tail) * factor);
    }
  }

  void set_line(int64_t i0, int64_t i1, int64_t extent0) {
    const int64_t s = i0 % extent0 * extent1_ + i1 % extent1_, at[] = {i0, i1};
    line_place_[s] = i0 * piece_->axis[1].length + i1;
    int64_t bias = 0;
    for (int x = 0; x < 2; ++x) bias = bias * p_.bias_extent[x] + at[x] - first_[x] + piece_->axis[x].kernel - 1;
    line_bias_[s] = bias * p_.bias_extent[2] * p_.lanes;
    for (int64_t l = 0; l < p_.lanes; l += p_.tile[2]) {
      const bool seen = piece_->axis[0].neighbours<kRows>(place_[0][l]).has(i0) &&
                        piece_->axis[1].neighbours<kRows>(place_[1][l]).has(i1);
      for (int64_t i = 0; i < p_.tile[2]; ++i) line_seen_[s * p_.lanes + l + i] = seen ? -1 : 0;
    }
  }

  bool is_inside(int64_t l) const {
    return first_[0] + l / (p_.tile[1] * p_.tile[2]) < piece_->axis[0].length &&
           first_[1] + l / p_.tile[2] % p_.tile[1] < piece_->axis[1].length && first_[2] + l % p_.tile[2] < piece_->axis[2].length;
  }

  template <class T>
  void place_lanes(const HeadMap<T>& map) {
    for (int64_t l = 0; l < p_.lanes; ++l) offset_[l] = map.at(place_[0][l], place_[1][l], place_[2][l]);
  }

  const NeighborhoodPlan& p_;
  const Piece* piece_ = nullptr;
  int64_t most_tiles_, most_lines_, most_columns_, most_rows_;
  Interval box_[2];                      // lines of the strip, along axes 0 and 1
  Interval columns_, tile_columns_;      // along axis 2: of the piece, of the tile
  Interval* lane_columns_;               // what a lane sees of the tile's columns
  int64_t seen_columns_ = -1;            // columns that column_seen_ was made for
  int64_t extent1_ = 0;                  // lines along axis 1
  int64_t first_[kMaxAxes];              // place of the tile
  bool whole_;                           // all lanes of the tile are inside the map
  ScoreRows rows_{};
  int32_t *line_seen_, *column_seen_;
  int64_t *line_bias_, *line_place_, *held_;
  int64_t *place_[kMaxAxes], *offset_;  // of lanes; those past the map's end stand on its last place
};

// scores: exponents of two of the rows, in place, with bias and -inf where a lane does not see a row; top: their maxima.
template <int V>
XF_INLINE void make_exponents(const ScoreRows rows, float* scores, const float* bias, Vec (&top)[V]) {
  constexpr int64_t lanes = V * kLanes;
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) top[v] = broadcast(-kInfinity);
  for (int64_t c = 0; c < rows.columns; ++c) {
    IVec column[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) column[v] = load_as<IVec>(rows.column_seen + c * lanes + v * kLanes);
    const float* column_bias = bias ? bias + rows.bias_column + c * lanes : nullptr;
    for (int64_t s = 0; s < rows.lines; ++s, scores += lanes)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        Vec x = load(scores + v * kLanes);
        if (bias) x += load(column_bias + rows.line_bias[s] + v * kLanes);
        const IVec seen = load_as<IVec>(rows.line_seen + s * lanes + v * kLanes) & column[v];
        x = seen != 0 ? x : broadcast(-kInfinity);
        store(scores + v * kLanes, x);
        top[v] = maximum(x, top[v]);
      }
  }
}

// scores <- weights, not normalised: 2^(x - top), with the top, 0 where nothing is seen, and their sum, a lane each.
template <int V>
XF_NOINLINE void softmax_rows_of(const ScoreRows& rows, float* scores, const float* bias, float* top, float* sum) {
  Vec most[V], sums[V];
  make_exponents<V>(rows, scores, bias, most);
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    most[v] = most[v] == -kInfinity ? zero() : most[v];
    sums[v] = zero();
  }
  const int64_t count = rows.count();
  for (int64_t r = 0; r < count; ++r, scores += V * kLanes)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const Vec p = exp2(load(scores + v * kLanes) - most[v]);
      store(scores + v * kLanes, p);
      sums[v] += p;
    }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    store(top + v * kLanes, most[v]);
    store(sum + v * kLanes, sums[v]);
  }
}

inline void softmax_rows(int vectors, const ScoreRows& rows, float* scores, const float* bias, float* top, float* sum) {
  switch (vectors) {
    case 1: return softmax_rows_of<1>(rows, scores, bias, top, sum);
    case 2: return softmax_rows_of<2>(rows, scores, bias, top, sum);
    case 3: return softmax_rows_of<3>(rows, scores, bias, top, sum);
    default: return softmax_rows_of<4>(rows, scores, bias, top, sum);
  }
}

// 1 / sum, 0 where nothing was seen.
XF_INLINE void invert(float* sum, int64_t lanes) {
  for (int64_t l = 0; l < lanes; l += kLanes) {
    const Vec s = load(sum + l);
    store(sum + l, s == 0.f ? zero() : 1.f / s);
  }
}

}  // namespace
}  // namespace XFORMER_FAST_ISA
}  // namespace xformer_fast
