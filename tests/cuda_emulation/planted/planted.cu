// Small kernels, each right, and each wrong in one way that a GPU would let pass on most days. tests/test_cuda_emulation.py
// runs them all: the emulated device has to find every planted fault, and none in the kernels that have none.
#include "ptx.cuh"

namespace emulation {  // bar.sync, which ptx.cuh has no use for
void synchronize(int barrier, int threads);
}

namespace xformer_fast {
namespace {

enum Fault : int { kNone, kFirst, kSecond, kThird };
constexpr int kThreads = 128;

// out[i] = the sum over three rounds of what the thread 32 further on wrote.
template <int kFault>
__global__ void barriers(const float* in, float* out, int) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int i = threadIdx.x;
  float sum = 0;
  for (int round = 0; round < 3; ++round) {
    shared[i] = in[i] + round;
    if (kFault != kFirst) __syncthreads();   // written before it is read
    sum += shared[(i + 32) % kThreads];
    if (kFault != kSecond) __syncthreads();  // read before it is written again
  }
  out[i] = sum;
}

// The same within a warp.
template <int kFault>
__global__ void warp_barriers(const float* in, float* out, int) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int i = threadIdx.x, neighbour = i / 32 * 32 + (i + 1) % 32;
  shared[i] = in[i];
  if (kFault == kNone) __syncwarp();
  if (kFault == kFirst) __shfl_xor_sync(0xffffffffu, i, 1);  // orders no memory
  out[i] = shared[neighbour];
}

// Halves of a block that wait for themselves alone.
template <int kFault>
__global__ void named_barriers(const float* in, float* out, int) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int i = threadIdx.x, half = i / 64;
  shared[i] = in[i];
  if (kFault == kFirst) {
    if (half == 0) emulation::synchronize(1, 64);  // the other half does not wait
  } else {
    emulation::synchronize(1 + half, 64);
  }
  const int partner = kFault == kSecond ? (i + 64) % kThreads : half * 64 + (i + 32) % 64;  // second: of the other half
  out[i] = shared[partner];
}

// A thread in every four copies for the four.
template <int kFault>
__global__ void copies(const float* in, float* out, int) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int i = threadIdx.x;
  if (i % 4 == 0) copy_16_bytes(shared_address(shared + i), in + i, 16);
  commit_copies();
  if (i % 4 == 0) copy_16_bytes(shared_address(shared + kThreads + i), in + i, 4);  // three zeros follow
  commit_copies();
  if (kFault != kFirst) wait_for_copies<kFault == kSecond ? 1 : 0>();
  if (kFault != kThird) __syncthreads();
  out[i] = shared[i] + shared[kThreads + i];
  wait_for_copies<0>();
}

// n numbers for kThreads threads.
template <int kFault>
__global__ void bounds(const float* in, float* out, int n) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (kFault != kThird && (kFault == kFirst ? i <= n : i < n)) out[i] = in[kFault == kSecond && i == 0 ? -1 : i];
  if (kFault == kThird && i < n / 8) store(out + 4 * i, load<float, 4>(in + 3 * i));  // 16 bytes from any multiple of 4
}

template <int kFault>
__global__ void shared_bounds(const float* in, float* out, int) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int i = threadIdx.x;
  if (kFault != kFirst || i != 77) shared[i] = in[i];  // first: nobody writes [77]
  __syncthreads();
  out[i] = shared[kFault == kSecond ? i + kThreads + 1 : i];
}

// Each block its own numbers, or all the same.
template <int kFault>
__global__ void blocks(const float* in, float* out, int n) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i < n) out[kFault == kFirst ? threadIdx.x : i] = in[i];
  if (kFault == kSecond && i < n) out[i] += out[(i + kThreads) % n];
}

template <int kFault>
__global__ void divergence(const float* in, float* out, int) {
  const int i = threadIdx.x;
  if (kFault != kFirst || i < 64) __syncthreads();
  float x = in[i];
  if (kFault != kSecond || i % 2 == 0) x += __shfl_sync(0xffffffffu, x, 0);
  out[i] = x;
}

using Kernel = void (*)(const float*, float*, int);

int run_kernel(Kernel kernel, const float* in, float* out, int n, size_t shared_bytes) {
  emulation::forget_all();
  emulation::allow(in, n * sizeof(float), "in");
  emulation::allow(out, n * sizeof(float), "out");
  return launch(kernel, (n + kThreads - 1) / kThreads, kThreads, shared_bytes, nullptr, in, out, n);
}

#define XF_FAULTS(kernel) {kernel<kNone>, kernel<kFirst>, kernel<kSecond>, kernel<kThird>}
const struct {
  const char* name;
  Kernel kernel[4];
  size_t shared_bytes;
} kKernels[] = {
    {"barriers", XF_FAULTS(barriers), kThreads * 4},
    {"warp_barriers", XF_FAULTS(warp_barriers), kThreads * 4},
    {"named_barriers", XF_FAULTS(named_barriers), kThreads * 4},
    {"copies", XF_FAULTS(copies), 2 * kThreads * 4},
    {"bounds", XF_FAULTS(bounds), 0},
    {"shared_bounds", XF_FAULTS(shared_bounds), kThreads * 4},
    {"blocks", XF_FAULTS(blocks), 0},
    {"divergence", XF_FAULTS(divergence), 0},
};

}  // namespace
}  // namespace xformer_fast

// 0 and results, or an error and its message.
extern "C" int run_planted(const char* name, int fault, const float* in, float* out, int n, uint64_t order, const char** message) {
  emulation::set_order(order);
  int error = -1;
  for (const auto& entry : xformer_fast::kKernels)
    if (std::strcmp(entry.name, name) == 0)
      error = xformer_fast::run_kernel(entry.kernel[fault], in, out, n, entry.shared_bytes);
  *message = emulation::last_error();
  return error;
}
