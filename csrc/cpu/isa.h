// Which instruction set the kernels run on: the best of what was built and what the CPU has, read at run time.
// XFORMER_FAST_ISA = portable | avx2 | avx512 | avx512_bf16 forces a lower level (a higher one than the CPU has is ignored).
#pragma once
#include <cstdlib>
#include <cstring>

namespace xformer_fast {

enum class Isa : int { portable, avx2, avx512, avx512_bf16 };
constexpr const char* kIsaNames[] = {"portable", "avx2", "avx512", "avx512_bf16"};

inline Isa cpu_isa() {
#if defined(XF_EMULATED_ISA)  // a build for tests
  return Isa::avx512_bf16;
#elif defined(__x86_64__)
  static const Isa best = [] {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c"))
      return Isa::portable;
    if (!__builtin_cpu_supports("x86-64-v4")) return Isa::avx2;
    return __builtin_cpu_supports("avx512bf16") ? Isa::avx512_bf16 : Isa::avx512;
  }();
  return best;
#else
  return Isa::portable;
#endif
}

inline Isa selected_isa() {
  const Isa best = cpu_isa();
  if (const char* forced = std::getenv("XFORMER_FAST_ISA"))
    for (int i = 0; i < static_cast<int>(best); ++i)
      if (std::strcmp(forced, kIsaNames[i]) == 0) return static_cast<Isa>(i);
  return best;
}

}  // namespace xformer_fast

// The table `name` (see XF_DECLARE_KERNELS) of the instruction set in use.
#if defined(__x86_64__)
#define XF_KERNELS(name)                                                      \
  ([]() -> decltype(::xformer_fast::portable::name)& {                        \
    switch (::xformer_fast::selected_isa()) {                                 \
      case ::xformer_fast::Isa::avx512_bf16: return ::xformer_fast::avx512_bf16::name; \
      case ::xformer_fast::Isa::avx512: return ::xformer_fast::avx512::name;  \
      case ::xformer_fast::Isa::avx2: return ::xformer_fast::avx2::name;      \
      default: return ::xformer_fast::portable::name;                         \
    }                                                                         \
  }())
#else
#define XF_KERNELS(name) (::xformer_fast::portable::name)
#endif
