// In place of CUDA's: what the kernels of csrc/cuda use of it, on the emulated device.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>

#include "../emulation.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __grid_constant__
#define __launch_bounds__(...)
#define __restrict__

namespace emulation {
template <class T, T (*triple)()>
struct Index {  // read as it is used: the running thread changes
  template <unsigned T::*part>
  struct Part {
    operator unsigned() const { return triple().*part; }
  };
  Part<&T::x> x;
  Part<&T::y> y;
  Part<&T::z> z;
};
}  // namespace emulation
inline constexpr ::emulation::Index<uint3, ::emulation::thread_index> threadIdx;
inline constexpr ::emulation::Index<uint3, ::emulation::block_index> blockIdx;
inline constexpr ::emulation::Index<dim3, ::emulation::block_size> blockDim;
inline constexpr ::emulation::Index<dim3, ::emulation::grid_size> gridDim;

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

template <class T>
inline T min(T a, T b) { return b < a ? b : a; }
template <class T>
inline T max(T a, T b) { return a < b ? b : a; }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32); }
inline float __int_as_float(int x) { float f; memcpy(&f, &x, 4); return f; }
inline int __float_as_int(float x) { int i; memcpy(&i, &x, 4); return i; }
inline float __fmul_rn(float x, float y) {
  volatile float product = x * y;  // or it would be fused with what follows
  return product;
}
inline unsigned __float_as_uint(float x) { unsigned i; memcpy(&i, &x, 4); return i; }
inline float __uint_as_float(unsigned x) { float f; memcpy(&f, &x, 4); return f; }

inline void __syncthreads() {
  ::emulation::synchronize(0, static_cast<int>(blockDim.x * blockDim.y * blockDim.z));
}
inline void __syncwarp(unsigned mask = 0xffffffffu) { ::emulation::synchronize_warp(mask); }

namespace emulation {
uint32_t shuffle(uint32_t mask, uint32_t value, unsigned source);
}
template <class T>
inline T __shfl_sync(unsigned mask, T value, int source) {
  static_assert(sizeof(T) == 4);
  uint32_t bits;
  memcpy(&bits, &value, 4);
  bits = ::emulation::shuffle(mask, bits, static_cast<unsigned>(source) % ::emulation::kLanes);
  memcpy(&value, &bits, 4);
  return value;
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int flip) {
  return __shfl_sync(mask, value, static_cast<int>(::emulation::lane()) ^ flip);
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  void* attrs;
  unsigned numAttrs;
};

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int bytes) {
  return static_cast<size_t>(bytes) <= ::emulation::kMostSharedBytes ? cudaSuccess : cudaErrorInvalidValue;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> parameters;
  };
  const Call call = {kernel, std::tuple<Parameters...>(arguments...)};
  auto body = [](const void* context) {
    const Call& call = *static_cast<const Call*>(context);
    std::apply(call.kernel, call.parameters);
  };
  return static_cast<cudaError_t>(::emulation::launch(config->gridDim, config->blockDim, config->dynamicSmemBytes, body, &call));
}
inline const char* cudaGetErrorString(cudaError_t) { return ::emulation::last_error(); }
