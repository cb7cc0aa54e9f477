// One function an instruction that CUDA C++ has no name for, sm_80 and later. Shared memory is addressed by 32 bits.
// g++ sees declarations: tests/cuda_emulation/instructions.cpp defines what each does.
#pragma once
#include "device.cuh"

#if defined(__CUDACC__)
#define XF_PTX(...) { asm volatile(__VA_ARGS__); }
#define XF_PTX_VALUE(type, ...) { type result; asm(__VA_ARGS__); return result; }
#define XF_INSTRUCTION __device__ __forceinline__
#else
#define XF_PTX(...) ;
#define XF_PTX_VALUE(type, ...) ;
#define XF_INSTRUCTION
#endif

namespace xformer_fast {

#if defined(__CUDACC__)
XF_INSTRUCTION char* shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}
XF_INSTRUCTION uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
#else
char* shared_memory();
uint32_t shared_address(const void* p);
#endif

// A number that the compiler no longer knows: else it computes all that follows from it before a loop, and spills what does not fit.
#if defined(__CUDACC__)
XF_INSTRUCTION void forget(uint32_t& x) { asm volatile("" : "+r"(x)); }
#else
inline void forget(uint32_t&) {}
#endif

// Four 8x8 matrices of 16-bit elements, or 8x4 of 32-bit ones: lane 8 i + r names the 16 bytes of row r of matrix i. Of each,
// lane l receives the 32 bits at row l / 4, bytes 4 (l % 4)...
XF_INSTRUCTION void load_matrices(uint32_t (&m)[4], uint32_t row)
    XF_PTX("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
           : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3]) : "r"(row) : "memory")
// ... transposed: the elements at rows 2 (l % 4) and the next, column l / 4.
XF_INSTRUCTION void load_matrices_transposed(uint32_t (&m)[4], uint32_t row)
    XF_PTX("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
           : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3]) : "r"(row) : "memory")

// d += a b of a warp: 16x16 times 16x8 half-width floats, sums in float32. With g = lane / 4, t = lane % 4:
// a: {a[g][2t, +1], a[g + 8][2t, +1], a[g][2t + 8, +9], a[g + 8][2t + 8, +9]}, b: {b[2t, +1][g], b[2t + 8, +9][g]},
// d: {d[g][2t], d[g][2t + 1], d[g + 8][2t], d[g + 8][2t + 1]}.
XF_INSTRUCTION void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, half)
    XF_PTX("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
           : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
           : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
XF_INSTRUCTION void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bf16)
    XF_PTX("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
           : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
           : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
// The same of 16x8 times 8x8 TF32: a: {a[g][t], a[g + 8][t], a[g][t + 4], a[g + 8][t + 4]}, b: {b[t][g], b[t + 4][g]}.
XF_INSTRUCTION void mma_16x8x8(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
    XF_PTX("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
           : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
           : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))

// The nearest float32 with 10 bits after the point, away from zero at ties.
XF_INSTRUCTION uint32_t to_tf32(float x) XF_PTX_VALUE(uint32_t, "cvt.rna.tf32.f32 %0, %1;" : "=r"(result) : "f"(x))

// 2^x within 2 units of the last place; exp2(-inf) = 0.
XF_INSTRUCTION float exp2_fast(float x) XF_PTX_VALUE(float, "ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x))

// 16 bytes on their way to shared memory past the registers: `bytes` of them from `from`, then zeros. Whoever issued a copy
// sees it after wait_for_copies, the other threads after a barrier that follows.
XF_INSTRUCTION void copy_16_bytes(uint32_t to, const void* from, uint32_t bytes)
    XF_PTX("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory")
XF_INSTRUCTION void commit_copies() XF_PTX("cp.async.commit_group;" ::: "memory")
// Waits until at most kOpen of the last groups are still on their way.
#if defined(__CUDACC__)
template <int kOpen>
XF_INSTRUCTION void wait_for_copies() XF_PTX("cp.async.wait_group %0;" ::"n"(kOpen) : "memory")
#else
template <int kOpen>
void wait_for_copies();
#endif

XF_INSTRUCTION uint32_t load_shared(uint32_t from)
    XF_PTX_VALUE(uint32_t, "ld.shared.b32 %0, [%1];" : "=r"(result) : "r"(from) : "memory")
XF_INSTRUCTION void store_shared(uint32_t to, uint32_t value) XF_PTX("st.shared.b32 [%0], %1;" ::"r"(to), "r"(value) : "memory")
XF_INSTRUCTION void store_shared(uint32_t to, uint4 v)
    XF_PTX("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory")
XF_INSTRUCTION uint4 load_shared_16(uint32_t from)
    XF_PTX_VALUE(uint4, "ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(result.x), "=r"(result.y), "=r"(result.z), "=r"(result.w) : "r"(from) : "memory")

}  // namespace xformer_fast
