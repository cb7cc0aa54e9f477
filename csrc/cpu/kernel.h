// What every CPU kernel is handed: element types, strided views, and the pool that runs its tasks.
// Nothing here knows torch; nothing here is compiled for one instruction set.
#pragma once
#include <cstddef>
#include <cstdint>

namespace xformer_fast {

enum class Element : int { float32, bfloat16, float16, boolean };

// A (batch, heads, sequence, head_dim) view whose last stride is 1. Packed (T, H, D) inputs have batch stride 0.
struct View {
  void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0;  // strides
};

// Runs task 0..count-1, each exactly once, in any order on any thread, lowest numbers first (put the heaviest there).
// `scratch` is private to the running thread, 64-byte aligned, `scratch_bytes` long, uninitialised.
using Task = void (*)(void* context, int64_t task, char* scratch);
struct Pool {
  void (*run)(int64_t count, Task task, void* context, size_t scratch_bytes);
  void* (*allocate)(void* self, size_t bytes);  // 64-byte aligned workspace that lives until the launcher returns
  void* self;
};

}  // namespace xformer_fast

// A kernel's table of entry points is compiled once an instruction set, from the same sources with other flags:
// XF_DECLARE_KERNELS(AttentionKernels, attention_kernels) declares one in each namespace.
#if defined(__x86_64__)
#define XF_DECLARE_KERNELS(Type, name)                                    \
  namespace portable { extern const Type name; }                          \
  namespace avx2 { extern const Type name; }        /* AVX2, FMA, F16C */ \
  namespace avx512 { extern const Type name; }      /* F, BW, DQ, VL */   \
  namespace avx512_bf16 { extern const Type name; } /* and AVX512_BF16 */
#else
#define XF_DECLARE_KERNELS(Type, name) \
  namespace portable { extern const Type name; }
#endif
