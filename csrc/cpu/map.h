// Maps of one to three axes of space, as the launchers hand them to the kernels.
#pragma once
#include "kernel.h"

namespace xformer_fast {

constexpr int kMaxAxes = 3;  // maps of fewer axes have leading sides of 1

// A (batch, *space, heads, head_dim) view whose last stride is 1.
struct MapView {
  void* data = nullptr;
  int64_t batch = 0, axis[kMaxAxes] = {0, 0, 0}, head = 0;  // strides
};

}  // namespace xformer_fast
