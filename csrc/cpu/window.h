// Windowed attention, for every instruction set: what the launcher hands to the kernels.
#pragma once
#include "map.h"

namespace xformer_fast {

struct WindowAttention {
  Element element;
  int64_t batch, heads, head_dim, head_dim_v;
  int64_t side[kMaxAxes], window[kMaxAxes], shift[kMaxAxes];
  bool grid;  // tokens a distance of side / window apart attend to each other; else neighbours
  MapView query, key, value, out;
  const float* table = nullptr;        // (prod(2 window - 1), heads), contiguous
  const float* bias = nullptr;         // (heads, tokens, tokens), contiguous
  const float* logit_scale = nullptr;  // (heads,), contiguous: cosine attention
  float scale = 1.f;                   // otherwise
};

// What is null is not wanted.
struct WindowAttentionGrad {
  MapView grad_out, grad_query, grad_key, grad_value;
  float* grad_table = nullptr;
  float* grad_bias = nullptr;
  float* grad_logit_scale = nullptr;
};

struct WindowAttentionKernels {
  void (*forward)(const WindowAttention&, const Pool&);
  void (*backward)(const WindowAttention&, const WindowAttentionGrad&, const Pool&);
};

XF_DECLARE_KERNELS(WindowAttentionKernels, window_attention_kernels)

}  // namespace xformer_fast
