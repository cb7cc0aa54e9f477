// Hopper (sm_90a): how wgmma, TMA and mbarrier want data laid out and described. Groundwork: no kernel of the package uses it yet.
// tests/test_cuda_hopper.py holds every map against its description in the PTX ISA (9.0), on the CPU, and compiles a product of
// tiles that is made of them (tests/cuda_emulation/hopper/product.cu) for sm_90a. No GPU has run any of it.
//
// Swizzle, swizzled()         where 16 bytes of a tile lie in shared memory ("Shared Memory Matrix Layout", swizzling modes)
// matrix_descriptor()         the 64 bits that tell wgmma where a matrix lies ("Matrix Descriptor Format")
// accumulator_row, _column    which number of the result a thread holds ("Register Fragments and Shared Memory Matrix Layouts")
// TileMap                     what cuTensorMapEncodeTiled is told of a tensor, and what of it would not be taken
// Stage                       where a ring of buffers stands: the buffer, and the parity of its barriers' phase
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define XF_HOPPER __host__ __device__ __forceinline__ constexpr
#else
#define XF_HOPPER inline constexpr
#endif

namespace xformer_fast {

// Rows of 128, 64 or 32 bytes (none: of 16), as matrix descriptors count the modes.
enum class Swizzle : uint32_t { none = 0, bytes128 = 1, bytes64 = 2, bytes32 = 3 };

XF_HOPPER uint32_t row_bytes(Swizzle mode) { return mode == Swizzle::none ? 16 : 256u >> static_cast<uint32_t>(mode); }
// The pattern repeats after so many bytes; a tile begins at a multiple of them.
XF_HOPPER uint32_t pattern_bytes(Swizzle mode) { return 8 * row_bytes(mode); }

// Of a byte's offset in a tile with rows of row_bytes(), where it lies: the number of the 16 bytes within a row, xor that of the
// 128 bytes (modulo the row's).
XF_HOPPER uint32_t swizzled(uint32_t offset, Swizzle mode) { return offset ^ (offset >> 3 & (row_bytes(mode) - 16)); }

// Of a matrix of 16-bit elements in shared memory. Rows along the contraction (K-major: queries and keys of Q·Kᵀ): `stride_bytes` from
// eight rows to the next eight, `leading_bytes` between the two halves of the contraction if not swizzled, else unused. Across it
// (MN-major: values of P·V): `stride_bytes` from eight rows of the contraction to the next, `leading_bytes` from one row_bytes() of
// columns to the next.
XF_HOPPER uint64_t matrix_descriptor(uint32_t address, Swizzle mode, uint32_t leading_bytes, uint32_t stride_bytes) {
  auto encoded = [](uint32_t bytes) { return static_cast<uint64_t>((bytes & 0x3ffff) >> 4); };
  return encoded(address) | encoded(leading_bytes) << 16 | encoded(stride_bytes) << 32 | static_cast<uint64_t>(mode) << 62;
}
// K-major rows one behind the other; `depth`: how many elements of the contraction lie before what is multiplied.
XF_HOPPER uint64_t rows_descriptor(uint32_t tile, Swizzle mode, int depth) {
  return matrix_descriptor(tile + 2 * static_cast<uint32_t>(depth), mode, 16, pattern_bytes(mode));
}

// Number i of the 64 x N result in a thread of a warpgroup. The left operand in registers has the same rows, and of every 16 columns
// the columns of mma.m16n8k16's.
XF_HOPPER int accumulator_row(int thread, int i) { return thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8; }
XF_HOPPER int accumulator_column(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

// A tensor of up to five axes, the first one contiguous, and the box of it that one copy brings to shared memory.
struct TileMap {
  static constexpr int kMostAxes = 5;
  uint64_t address;
  int axes, element_bytes;
  uint64_t size[kMostAxes];    // elements
  uint64_t stride[kMostAxes];  // bytes, of axes 1 and on
  uint32_t box[kMostAxes];     // elements
  Swizzle swizzle;

  XF_HOPPER uint32_t box_bytes() const {
    uint32_t bytes = static_cast<uint32_t>(element_bytes);
    for (int i = 0; i < axes; ++i) bytes *= box[i];
    return bytes;
  }
  // Why cuTensorMapEncodeTiled would refuse it, or nullptr.
  XF_HOPPER const char* problem() const {
    if (axes < 1 || axes > kMostAxes) return "one to five axes";
    if (address % 16) return "the tensor begins at no multiple of 16 bytes";
    for (int i = 0; i < axes; ++i) {
      if (size[i] == 0 || size[i] > uint64_t(1) << 32) return "an axis has none or more than 2^32 elements";
      if (box[i] == 0 || box[i] > 256) return "a side of the box is not in 1..256";
      if (i > 0 && (stride[i] % 16 || stride[i] >= uint64_t(1) << 40)) return "a stride is no multiple of 16 bytes below 2^40";
    }
    const uint32_t inner = box[0] * static_cast<uint32_t>(element_bytes);
    if (inner % 16) return "the box's rows are no multiple of 16 bytes";
    if (swizzle != Swizzle::none && inner > row_bytes(swizzle)) return "the box's rows are longer than the swizzle's";
    return nullptr;
  }
};

// (channels, rows, heads, batch) of a (batch, heads, rows, channels) tensor with strides in elements: boxes of `rows` rows of one head.
XF_HOPPER TileMap tile_map(uint64_t address, int element_bytes, uint64_t channels, uint64_t length, uint64_t heads, uint64_t batch,
                           uint64_t row_stride, uint64_t head_stride, uint64_t batch_stride, uint32_t rows, Swizzle mode) {
  const uint64_t bytes = static_cast<uint64_t>(element_bytes);
  const uint32_t span = row_bytes(mode) / static_cast<uint32_t>(element_bytes);
  return {address, 4, element_bytes, {channels, length, heads, batch, 1}, {0, row_stride * bytes, head_stride * bytes, batch_stride * bytes, 0},
          {span, rows, 1, 1, 1}, mode};
}

// Of a ring of kStages buffers, each with a barrier "full" and one "empty". A barrier's phases alternate, beginning with 0;
// try_wait.parity(p) passes once the phase of parity p is complete, and a fresh barrier counts the phase before its first as complete.
template <int kStages>
struct Stage {
  int index = 0;
  uint32_t phase = 0;

  XF_HOPPER void advance() {
    if (++index == kStages) index = 0, phase ^= 1;
  }
  XF_HOPPER uint32_t full_parity() const { return phase; }       // what a consumer waits for
  XF_HOPPER uint32_t empty_parity() const { return phase ^ 1; }  // what a producer waits for: the first round passes at once
};

#if defined(__CUDACC__)
#define XF_HOPPER_CODE __device__ __forceinline__

XF_HOPPER_CODE void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// One arrival, which also announces `bytes` that a copy will bring.
XF_HOPPER_CODE void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
XF_HOPPER_CODE void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
XF_HOPPER_CODE void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
// A box of the tensor at (channel, row, head, batch), on its way to shared memory; `barrier` counts its bytes.
XF_HOPPER_CODE void copy_box(uint32_t to, const void* map, uint32_t barrier, int channel, int row, int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(channel), "r"(row), "r"(head), "r"(batch)
      : "memory");
}
// Before the first product that reads registers or shared memory which others wrote, and the commit and wait of a group of them.
XF_HOPPER_CODE void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
XF_HOPPER_CODE void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kOpen>
XF_HOPPER_CODE void products_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kOpen) : "memory"); }

// d += a b: 64 x 16 times 16 x 64 bfloat16, both in shared memory, by a warpgroup. kAcross: b is MN-major.
template <int kAcross>
XF_HOPPER_CODE void product_64x64x16(float (&d)[32], uint64_t a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, 1, 1, 1, 0, %34;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]),
        "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]),
        "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
        "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
      : "l"(a), "l"(b), "n"(kAcross));
}
#endif

}  // namespace xformer_fast
