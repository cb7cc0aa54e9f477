// A 64 x 64 product of two bfloat16 matrices of rows along the contraction, by TMA, mbarrier and wgmma: for the compiler alone, which
// has to accept what csrc/cuda/hopper.cuh says to it.
#include "hopper.cuh"

#include <cuda.h>

namespace xformer_fast {

constexpr int kStages = 2, kTileBytes = 64 * 128;

__global__ void __launch_bounds__(128, 1) product_kernel(const __grid_constant__ CUtensorMap left, const __grid_constant__ CUtensorMap right,
                                                         float* out, int depth) {
  extern __shared__ __align__(1024) char memory[];
  const uint32_t tiles = static_cast<uint32_t>(__cvta_generic_to_shared(memory)), barriers = tiles + 2 * kStages * kTileBytes;
  const auto tile = [&](int stage, int which) { return tiles + (2 * stage + which) * kTileBytes; };
  if (threadIdx.x == 0)
    for (int i = 0; i < kStages; ++i) barrier_init(barriers + 8 * i, 1), barrier_init(barriers + 8 * (kStages + i), 128);
  __syncthreads();

  const int steps = depth / 64;
  Stage<kStages> produced, consumed;
  auto produce = [&](int step) {
    barrier_wait(barriers + 8 * (kStages + produced.index), produced.empty_parity());
    barrier_expect(barriers + 8 * produced.index, 2 * kTileBytes);
    copy_box(tile(produced.index, 0), &left, barriers + 8 * produced.index, 64 * step, 0, 0, 0);
    copy_box(tile(produced.index, 1), &right, barriers + 8 * produced.index, 64 * step, 0, 0, 0);
    produced.advance();
  };
  if (threadIdx.x == 0)
    for (int step = 0; step < min(kStages, steps); ++step) produce(step);

  float sums[32] = {};
  for (int step = 0; step < steps; ++step) {
    barrier_wait(barriers + 8 * consumed.index, consumed.full_parity());
    products_begin();
    for (int k = 0; k < 64; k += 16)
      product_64x64x16<0>(sums, rows_descriptor(tile(consumed.index, 0), Swizzle::bytes128, k),
                          rows_descriptor(tile(consumed.index, 1), Swizzle::bytes128, k));
    products_commit();
    products_wait<0>();
    barrier_arrive(barriers + 8 * (kStages + consumed.index));
    consumed.advance();
    if (threadIdx.x == 0 && step + kStages < steps) produce(step + kStages);
  }
  for (int i = 0; i < 32; ++i) out[64 * accumulator_row(threadIdx.x, i) + accumulator_column(threadIdx.x, i)] = sums[i];
}

}  // namespace xformer_fast
