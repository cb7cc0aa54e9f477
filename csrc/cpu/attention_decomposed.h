// A bias that is decomposed over a map (SAM, MViT): the keys are a map, row by row, and every query has one number for
// each row of it and one for each column; key j of query i gets row_bias[i][j / width] + column_bias[i][j % width].
//
// A tile's numbers are held as panels, [row or column of the map][lane]. Scores read them and gradients are summed into
// panels of the same form, a stretch of keys in one row of the map at a time: its row's number stays in a register.
#pragma once
#include "simd.h"

namespace xformer_fast {
namespace XFORMER_FAST_ISA {
namespace {

template <class Float>  // const float, or float for sums
struct MapPanels {
  Float* rows = nullptr;  // of lane 0; nullptr: no such bias
  Float* columns = nullptr;
  int64_t ld = 0;     // from a row or column to the next
  int64_t width = 0;  // columns of the map
};

// stretch(row of the map, its first column, first key, keys) for keys [begin, end), which count from key0.
template <class Stretch>
XF_INLINE void for_each_stretch(int64_t width, int64_t key0, int64_t begin, int64_t end, Stretch stretch) {
  int64_t row = (key0 + begin) / width, column = (key0 + begin) % width;
  for (int64_t n; begin < end; begin += n, column = 0, ++row) {
    n = width - column < end - begin ? width - column : end - begin;
    stretch(row, column, begin, n);
  }
}

// scores[key][lane] = scores * scale + bias, for keys [begin, end) and query vectors [vector0, vector1).
XF_NOINLINE void apply_decomposed_bias(const MapPanels<const float>& bias, float* scores, int64_t ld, int64_t key0,
                                       int64_t begin, int64_t end, int vector0, int vector1, float scale) {
  for_each_stretch(bias.width, key0, begin, end, [&](int64_t row, int64_t column, int64_t key, int64_t n) {
    for (int v = vector0; v < vector1; ++v) {
      const Vec of_row = load(bias.rows + row * bias.ld + v * kLanes);
      const float* of_column = bias.columns + column * bias.ld + v * kLanes;
      float* s = scores + key * ld + v * kLanes;
      for (int64_t i = 0; i < n; ++i, s += ld, of_column += bias.ld) store(s, load(s) * scale + of_row + load(of_column));
    }
  });
}

// Sums of ds[key][lane] over the keys of each row and of each column, added to `sums`.
XF_NOINLINE void add_decomposed_gradient(const MapPanels<float>& sums, const float* ds, int64_t ld, int64_t key0,
                                         int64_t begin, int64_t end, int vector0, int vector1) {
  for_each_stretch(sums.width, key0, begin, end, [&](int64_t row, int64_t column, int64_t key, int64_t n) {
    for (int v = vector0; v < vector1; ++v) {
      float* of_row = sums.rows + row * sums.ld + v * kLanes;
      float* of_column = sums.columns + column * sums.ld + v * kLanes;
      const float* d = ds + key * ld + v * kLanes;
      Vec sum = zero();
      for (int64_t i = 0; i < n; ++i, d += ld, of_column += sums.ld) {
        const Vec of_key = load(d);
        sum += of_key;
        store(of_column, load(of_column) + of_key);
      }
      store(of_row, load(of_row) + sum);
    }
  });
}

}  // namespace
}  // namespace XFORMER_FAST_ISA
}  // namespace xformer_fast
