// Windowed attention on a GPU: what a launcher hands to the kernels. Raw pointers, no torch.
#pragma once
#include "../cpu/window.h"

namespace xformer_fast {

constexpr int64_t kMostWindowTokens = 1024, kMostWindowHeadDim = 128;

// `table` is (heads, prod(2 window - 1)) here. Windows are taken in groups, whose tokens fill one tile if they are few; a block owns
// a head and one of `shares` ranges of the groups.
struct CudaWindowAttention : WindowAttention {
  int64_t together;  // windows of a group
  int64_t shares, groups_of_share;
  int64_t tokens, windows;  // of a window; of all maps
  int64_t table_rows;
};

struct CudaWindowAttentionGrad {
  MapView grad_out, grad_query, grad_key, grad_value;
  float* pair_shares = nullptr;   // Σ dS of each share: (heads, shares, together, tokens, tokens), zeros before; or not wanted
  float* scale_shares = nullptr;  // (heads, shares), likewise
};

// Adds up the shares in order: `pairs` (heads, tokens, tokens) is the gradient of a bias, and from it that of the table,
// (prod(2 window - 1), heads), or none.
struct CudaWindowPairs {
  int64_t heads, shares, tokens, rows, window[kMaxAxes];  // shares: of every window of a group
  const float* pair_shares;
  float *pairs, *table;
};

int64_t window_tile_rows(Element element, int64_t width);  // tokens of a tile, by the larger head dim
int window_attention_forward_cuda(const CudaWindowAttention& a, void* stream);
int window_attention_backward_cuda(const CudaWindowAttention& a, const CudaWindowAttentionGrad& grad, void* stream);
int window_pairs_cuda(const CudaWindowPairs& pairs, void* stream);

}  // namespace xformer_fast
