// What the kernels of attention's backward share: with P = exp(s - lse), kept and scaled by dropout where it applies, and
// delta_i = dO_i·O_i - dlse_i,
//   dV = Pᵀ·dO,   dS = P (dO·Vᵀ - delta),   dQ = scale dS·K,   dK = scale dSᵀ·Q     (soft cap: dS times 1 - tanh²)
//   dmask = dS summed over the mask's broadcast axes,   dslope = -Σ dS |p_i - j|,   dsink = -Σ exp(sink - lse) delta
// Every kernel recomputes the scores, and every result belongs to one block: sums have one order, the same bits each time.
#pragma once
#include "attention_scores.cuh"

namespace xformer_fast {

struct RowNumbers { float lse, rest, delta; };  // of a query

enum class Orientation { kQueriesByKeys, kKeysByQueries };

// products: q·k in, P (before dropout's rescaling) out. grads: dO·v in, dS out, through the soft cap if `through_cap`.
// row(m, j, e): numbers of a sum's query. each(dS, distance) sees every dS before the cap.
template <Orientation kOrientation, bool kOptions, int M, int N, class Row, class Each>
__device__ __forceinline__ void score_gradients(Sums<M, N>& products, Sums<M, N>& grads, const Scores& terms,
                                                const Dropout& dropout, int query0, int key0, bool whole, bool through_cap,
                                                Row row_at, Each each) {
  constexpr bool kByKeys = kOrientation == Orientation::kQueriesByKeys;
  const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
      uint32_t keep = 0xf;
      if (kOptions && dropout.active)
        keep = kByKeys ? dropout.keep(query0 + 16 * m, key0 + 8 * j) : dropout.keep_transposed(key0 + 16 * m, query0 + 8 * j);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = 16 * m + g + e / 2 * 8, column = 8 * j + 2 * t + e % 2;
        const int query = query0 + (kByKeys ? row : column), key = key0 + (kByKeys ? column : row);
        const float product = products.of[m][j][e];
        const float s = kOptions ? terms.full(product, query, key) : terms.plain(product, query, key, whole);
        const RowNumbers numbers = row_at(m, j, e);
        const float p = exp2_fast(s - numbers.lse - numbers.rest);
        const bool kept = keep >> e & 1;
        const float dp = kOptions ? (kept ? grads.of[m][j][e] * dropout.rescale : 0.f) : grads.of[m][j][e];
        float ds = p * (dp - numbers.delta);
        each(ds, key - query - terms.shift);
        if (kOptions && through_cap && terms.cap != 0.f) {
          const float bent = terms.bent(product);
          ds *= 1.f - bent * bent;
        }
        products.of[m][j][e] = kept ? p : 0.f;
        grads.of[m][j][e] = ds;
      }
    }
}

// A lane's numbers of the rows that it holds, where rows are queries.
template <int M>
struct RowStatistics {
  float lse[M][2], rest[M][2], delta[M][2];

  __device__ __forceinline__ RowNumbers of(int m, int e) const { return {lse[m][e / 2], rest[m][e / 2], delta[m][e / 2]}; }
  // From what the query gradient has left.
  __device__ __forceinline__ void load(const Statistics& rows, int64_t first) {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int64_t row = first + 16 * m + lane_index() / 4 + 8 * r;
        lse[m][r] = rows.lse[row];
        rest[m][r] = rows.rest[row];
        delta[m][r] = rows.delta[row];
      }
  }
};

// The sum over a block of what its threads bring, in every thread; `scratch`: a float a warp.
template <int kWarps>
__device__ __forceinline__ float block_sum(float x, uint32_t scratch) {
  const float of_warp = warp_sum(x);
  __syncthreads();
  if (lane_index() == 0) store_shared(scratch + 4 * warp_index(), __float_as_uint(of_warp));
  __syncthreads();
  float sum = 0.f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += __uint_as_float(load_shared(scratch + 4 * w));
  return sum;
}

}  // namespace xformer_fast
