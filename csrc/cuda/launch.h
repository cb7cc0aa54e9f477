// What every CUDA launcher shares.
#pragma once
#include <torch_device.h>

#include "../cpu/launch.h"

namespace xformer_fast {

// A call on the device and the current stream of `like`. Every tensor whose memory a kernel reaches goes through it.
class CudaCall {
 public:
  explicit CudaCall(const Tensor& like) : device_(like) {}

  View view(const Tensor& t) {
    device_.allow(t);
    return view_of(t);
  }
  template <class T>
  T* data(const Tensor& t) {
    device_.allow(t);
    return static_cast<T*>(t.data_ptr());
  }
  const float* floats(const Tensor& t, const char* name) {
    device_.allow(t);
    return float_data(t, name);
  }
  int multiprocessors() const { return device_.multiprocessors(); }
  void* stream() const { return device_.stream(); }

  void check(int error) const {
    STD_TORCH_CHECK(error == cudaSuccess, "a CUDA kernel of xformer_fast failed: ",
                    cudaGetErrorString(static_cast<cudaError_t>(error)));
  }

 private:
  Device device_;
};

// Integers that stay on their device.
inline Tensor as_int64(const Tensor& t) {
  return t.scalar_type() == ScalarType::Long ? t : torch::stable::to(t, ScalarType::Long);
}

}  // namespace xformer_fast
