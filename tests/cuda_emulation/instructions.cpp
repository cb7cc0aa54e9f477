// What the functions of csrc/cuda/ptx.cuh do, from the PTX ISA (9.0): the layouts of ldmatrix and mma fragments, cp.async.
// Products are exact and their sum is added to the accumulator with truncation, as on Ampere and later (Fasi, Higham et al.,
// "Numerical behavior of NVIDIA tensor cores", 2021); ex2.approx keeps 22 bits, its specified error.
#include <cstring>

#include "ptx.cuh"

namespace emulation {

uint32_t shuffle(uint32_t mask, uint32_t value, unsigned source) {
  struct Mine {
    uint32_t value;
    unsigned source;
    uint32_t result;
  } mine = {value, source, 0};
  together("__shfl_sync", mask, &mine, [](void* const* all, uint32_t lanes) {
    for (unsigned i = 0; i < kLanes; ++i) {
      if (!(lanes >> i & 1)) continue;
      Mine& m = *static_cast<Mine*>(all[i]);
      if (!(lanes >> m.source & 1)) fail("__shfl_sync: lane %u reads lane %u, which does not take part", i, m.source);
      m.result = static_cast<Mine*>(all[m.source])->value;
    }
  });
  return mine.result;
}

namespace {

constexpr uint32_t kAll = 0xffffffffu;

// Lanes that name rows of one matrix read at the same time: two rows in the same banks take two turns.
void count_conflicts(const uint32_t* rows) {
  int turns[8] = {}, most = 0;
  for (int i = 0; i < 8; ++i) {
    bool seen = false;
    for (int j = 0; j < i; ++j) seen = seen || rows[j] == rows[i];
    if (!seen) most = turns[rows[i] / 16 % 8] + 1 > most ? turns[rows[i] / 16 % 8] + 1 : most, ++turns[rows[i] / 16 % 8];
  }
  ++count().matrix_loads;
  count().matrix_load_conflicts += static_cast<uint64_t>(most - 1);
}

template <bool kTransposed>
void load_matrices_of_warp(uint32_t (&m)[4], uint32_t row, const void* where) {
  struct Mine {
    uint32_t row;
    uint32_t* result;
    const void* where;
  } mine = {row, m, where};
  together("ldmatrix", kAll, &mine, [](void* const* all, uint32_t) {
    for (unsigned i = 0; i < 4; ++i) {
      uint16_t elements[8][8];
      uint32_t rows[8];
      for (unsigned r = 0; r < 8; ++r) {
        rows[r] = static_cast<Mine*>(all[8 * i + r])->row;
        if (rows[r] % 16) fail("ldmatrix: the row of lane %u is not aligned to 16 bytes", 8 * i + r);
        access(8 * i + r, shared_pointer(rows[r]), 16, Access::read, static_cast<Mine*>(all[8 * i + r])->where);
        memcpy(elements[r], shared_pointer(rows[r]), 16);
      }
      count_conflicts(rows);
      for (unsigned l = 0; l < kLanes; ++l) {
        const unsigned g = l / 4, t = l % 4;
        const uint16_t low = kTransposed ? elements[2 * t][g] : elements[g][2 * t];
        const uint16_t high = kTransposed ? elements[2 * t + 1][g] : elements[g][2 * t + 1];
        static_cast<Mine*>(all[l])->result[i] = low | static_cast<uint32_t>(high) << 16;
      }
    }
  });
}

float low_half(uint32_t pair, xformer_fast::half) { return __half2float({static_cast<uint16_t>(pair)}); }
float low_half(uint32_t pair, xformer_fast::bf16) { return __bfloat162float({static_cast<uint16_t>(pair)}); }

float truncated(double x) {
  const float nearest = static_cast<float>(x);
  return std::fabs(static_cast<double>(nearest)) > std::fabs(x) ? std::nextafterf(nearest, 0.f) : nearest;
}

struct Fragments {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};

template <int kDepth, class A, class B>
void multiply(void* const* all, const A& a, const B& b) {
  ++count().products;
  for (unsigned l = 0; l < kLanes; ++l) {
    float* d = static_cast<Fragments*>(all[l])->d;
    for (unsigned i = 0; i < 4; ++i) {
      const unsigned row = l / 4 + 8 * (i / 2), column = 2 * (l % 4) + i % 2;
      double sum = 0;
      for (int k = 0; k < kDepth; ++k) sum += static_cast<double>(a[row][k]) * static_cast<double>(b[column][k]);
      d[i] = truncated(sum + static_cast<double>(d[i]));
    }
  }
}

template <class T>
void multiply_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Fragments mine = {d, a, {b0, b1}};
  together("mma.m16n8k16", kAll, &mine, [](void* const* all, uint32_t) {
    float a[16][16], b[8][16];  // b[column][k]
    for (unsigned l = 0; l < kLanes; ++l) {
      const Fragments& f = *static_cast<Fragments*>(all[l]);
      const unsigned g = l / 4, t = l % 4;
      for (unsigned i = 0; i < 4; ++i)
        for (unsigned e = 0; e < 2; ++e) a[g + 8 * (i % 2)][2 * t + 8 * (i / 2) + e] = low_half(f.a[i] >> 16 * e, T{});
      for (unsigned i = 0; i < 2; ++i)
        for (unsigned e = 0; e < 2; ++e) b[g][2 * t + 8 * i + e] = low_half(f.b[i] >> 16 * e, T{});
    }
    multiply<16>(all, a, b);
  });
}

float tf32(uint32_t bits) { return __uint_as_float(bits & 0xffffe000u); }  // the unit ignores the last 13 bits

}  // namespace
}  // namespace emulation

namespace xformer_fast {

using emulation::Access;
#define XF_HERE __builtin_return_address(0)

char* shared_memory() { return emulation::shared_memory(); }
uint32_t shared_address(const void* p) { return emulation::shared_offset(p); }

void load_matrices(uint32_t (&m)[4], uint32_t row) { emulation::load_matrices_of_warp<false>(m, row, XF_HERE); }
void load_matrices_transposed(uint32_t (&m)[4], uint32_t row) { emulation::load_matrices_of_warp<true>(m, row, XF_HERE); }

void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, half) {
  emulation::multiply_16x8x16<half>(d, a, b0, b1);
}
void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bf16) {
  emulation::multiply_16x8x16<bf16>(d, a, b0, b1);
}
void mma_16x8x8(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulation::Fragments mine = {d, a, {b0, b1}};
  emulation::together("mma.m16n8k8", emulation::kAll, &mine, [](void* const* all, uint32_t) {
    float a[16][8], b[8][8];
    for (unsigned l = 0; l < emulation::kLanes; ++l) {
      const auto& f = *static_cast<emulation::Fragments*>(all[l]);
      const unsigned g = l / 4, t = l % 4;
      for (unsigned i = 0; i < 4; ++i) a[g + 8 * (i % 2)][t + 4 * (i / 2)] = emulation::tf32(f.a[i]);
      for (unsigned i = 0; i < 2; ++i) b[g][t + 4 * i] = emulation::tf32(f.b[i]);
    }
    emulation::multiply<8>(all, a, b);
  });
}

uint32_t to_tf32(float x) {
  const uint32_t bits = __float_as_uint(x);
  if ((bits >> 23 & 0xff) == 0xff) return bits;
  return (bits + 0x1000u) & 0xffffe000u;
}
float exp2_fast(float x) { return __uint_as_float(__float_as_uint(std::exp2f(x)) & ~1u); }

void copy_16_bytes(uint32_t to, const void* from, uint32_t bytes) {
  emulation::copy_async(emulation::shared_pointer(to), from, bytes, 16, XF_HERE);
}
void commit_copies() { emulation::commit_copies(); }
template <int kOpen>
void wait_for_copies() { emulation::wait_for_copies(kOpen); }
template void wait_for_copies<0>();
template void wait_for_copies<1>();
template void wait_for_copies<2>();

uint32_t load_shared(uint32_t from) {
  uint32_t value;
  emulation::access(emulation::lane(), emulation::shared_pointer(from), 4, Access::read, XF_HERE);
  memcpy(&value, emulation::shared_pointer(from), 4);
  return value;
}
void store_shared(uint32_t to, uint32_t value) {
  emulation::access(emulation::lane(), emulation::shared_pointer(to), 4, Access::write, XF_HERE);
  memcpy(emulation::shared_pointer(to), &value, 4);
}
uint4 load_shared_16(uint32_t from) {
  uint4 value;
  emulation::access(emulation::lane(), emulation::shared_pointer(from), 16, Access::read, XF_HERE);
  memcpy(&value, emulation::shared_pointer(from), 16);
  return value;
}
void store_shared(uint32_t to, uint4 value) {
  emulation::access(emulation::lane(), emulation::shared_pointer(to), 16, Access::write, XF_HERE);
  memcpy(emulation::shared_pointer(to), &value, 16);
}

}  // namespace xformer_fast
