// The maps of csrc/cuda/hopper.cuh, for ctypes.
#include "hopper.cuh"

using namespace xformer_fast;

extern "C" {
uint32_t hopper_swizzled(uint32_t offset, uint32_t mode) { return swizzled(offset, static_cast<Swizzle>(mode)); }
uint64_t hopper_matrix_descriptor(uint32_t address, uint32_t mode, uint32_t leading, uint32_t stride) {
  return matrix_descriptor(address, static_cast<Swizzle>(mode), leading, stride);
}
uint64_t hopper_rows_descriptor(uint32_t tile, uint32_t mode, int depth) { return rows_descriptor(tile, static_cast<Swizzle>(mode), depth); }
int hopper_accumulator_row(int thread, int i) { return accumulator_row(thread, i); }
int hopper_accumulator_column(int thread, int i) { return accumulator_column(thread, i); }

// numbers: size and box of each axis, then the strides of axes 1 and on, in bytes.
const char* hopper_tile_map(uint64_t address, int element_bytes, const uint64_t* shape, const uint64_t* strides, uint32_t rows,
                            uint32_t mode, uint64_t* numbers) {
  const TileMap map = tile_map(address, element_bytes, shape[0], shape[1], shape[2], shape[3], strides[0], strides[1], strides[2], rows,
                               static_cast<Swizzle>(mode));
  for (int i = 0; i < 4; ++i) numbers[i] = map.size[i], numbers[4 + i] = map.box[i], numbers[8 + i] = map.stride[i];
  numbers[12] = map.box_bytes();
  return map.problem();
}

// Of each round: index, parity of a consumer, parity of a producer.
void hopper_stages(int rounds, int* numbers) {
  Stage<3> stage;
  for (int i = 0; i < rounds; ++i, stage.advance()) {
    numbers[3 * i] = stage.index;
    numbers[3 * i + 1] = static_cast<int>(stage.full_parity());
    numbers[3 * i + 2] = static_cast<int>(stage.empty_parity());
  }
}
}
