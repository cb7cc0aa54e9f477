// The emulated device: operators of the CUDA kernels on CPU tensors.
#pragma once
#include <cuda_runtime.h>
#include <torch/csrc/stable/tensor.h>

#define XFORMER_FAST_DEVICE_KEY CPU

namespace xformer_fast {

class Device {
 public:
  explicit Device(const torch::stable::Tensor&) { emulation::forget_all(); }
  void* stream() const { return nullptr; }
  int multiprocessors() const { return 2; }

  // The bytes from the first to the last element of a tensor, and no other.
  void allow(const torch::stable::Tensor& t) {
    if (t.numel() == 0) return;
    int64_t last = 0;
    for (int64_t i = 0; i < t.dim(); ++i) last += (t.size(i) - 1) * t.stride(i);
    const std::string name = "tensor " + std::to_string(++count_);
    emulation::allow(t.data_ptr(), static_cast<size_t>((last + 1) * t.element_size()), name.c_str());
  }

 private:
  int count_ = 0;
};

}  // namespace xformer_fast
