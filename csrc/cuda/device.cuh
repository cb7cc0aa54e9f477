// What every kernel here starts from: elements as float and back, and how a kernel is launched.
// tests/cuda_emulation has headers of CUDA's names with which g++ compiles the kernels for an emulated device.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace xformer_fast {

using bf16 = __nv_bfloat16;
using half = __half;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(half x) { return __half2float(x); }
__device__ __forceinline__ void assign(float& to, float x) { to = x; }
__device__ __forceinline__ void assign(bf16& to, float x) { to = __float2bfloat16_rn(x); }
__device__ __forceinline__ void assign(half& to, float x) { to = __float2half_rn(x); }
template <class T>
__device__ __forceinline__ float rounded(float x) {
  T to;
  assign(to, x);
  return to_float(to);
}

// Up to 16 bytes that are read and written at once.
template <class T, int N>
struct alignas(N * sizeof(T) > 16 ? 16 : N * sizeof(T)) Pack {
  T values[N];
};
template <class T, int N>
__device__ __forceinline__ Pack<T, N> load(const T* p) { return *reinterpret_cast<const Pack<T, N>*>(p); }
template <class T, int N>
__device__ __forceinline__ void store(T* p, const Pack<T, N>& pack) { *reinterpret_cast<Pack<T, N>*>(p) = pack; }

constexpr size_t kSharedBytesUnasked = 48 * 1024;  // a block gets more only if its kernel says so

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
                   const Arguments&... arguments) {
  if (shared_bytes > kSharedBytesUnasked) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace xformer_fast
