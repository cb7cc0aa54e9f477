// Neighborhood attention, for every instruction set: what the launcher hands to the kernels.
#pragma once
#include "map.h"

namespace xformer_fast {

struct NeighborhoodAttention {
  Element element;
  int64_t batch, heads, heads_kv, head_dim, head_dim_v;
  int64_t side[kMaxAxes], kernel[kMaxAxes], dilation[kMaxAxes];  // kernel * dilation <= side
  bool causal[kMaxAxes];
  MapView query, key, value, out;
  const float* table = nullptr;  // (prod(2 kernel - 1), heads), contiguous
  float scale = 1.f;
};

struct NeighborhoodAttentionGrad {
  MapView grad_out, grad_query, grad_key, grad_value;
  float* grad_table = nullptr;  // null: not wanted
};

struct NeighborhoodAttentionKernels {
  void (*forward)(const NeighborhoodAttention&, const Pool&);
  void (*backward)(const NeighborhoodAttention&, const NeighborhoodAttentionGrad&, const Pool&);
};

XF_DECLARE_KERNELS(NeighborhoodAttentionKernels, neighborhood_attention_kernels)

}  // namespace xformer_fast
