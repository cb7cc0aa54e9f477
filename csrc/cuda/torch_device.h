// The device of a call's tensors, as torch knows it. tests/cuda_emulation/include has the emulated one.
#pragma once
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#define XFORMER_FAST_DEVICE_KEY CUDA

// Weak: a CPU build of torch, which has none, loads the library all the same, and never comes here. Where torch has CUDA, it is
// found because setup.py makes the library depend on libtorch: Python loads torch's libraries for torch alone.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream) __attribute__((weak));

namespace xformer_fast {

// Makes a tensor's device the current one while it lives.
class Device {
 public:
  explicit Device(const torch::stable::Tensor& t) : guard_(t.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "xformer_fast: torch has no CUDA, or its libraries were not found");
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream_));
  }
  void* stream() const { return stream_; }
  void allow(const torch::stable::Tensor&) {}  // an emulated device wants to know what its kernels may touch

  int multiprocessors() const {
    int device = 0, count = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    return count;
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

}  // namespace xformer_fast
