// The arithmetic ceiling of this CPU: independent multiply-adds in registers, nothing else. Benchmarks divide by it.
#pragma once
#include <string>

namespace xformer_fast {

// GFLOP/s of `threads` threads together. "bfloat16" is the dot-product rate where the CPU has AVX512_BF16 and the
// kernels use it, else the float32 rate (bf16 is then converted and computed in float32).
double fma_gflops(const std::string& element, int threads, double seconds);

}  // namespace xformer_fast
