// Softmax attention on a GPU: what a launcher hands to the kernels. Raw pointers, no torch.
#pragma once
#include "../cpu/attention.h"

namespace xformer_fast {

constexpr int kMostHeadDim = 256;
constexpr int64_t kUnlimited = int64_t(1) << 30;  // left and right without a limit, safe to add to a 32-bit position

// Every pointer is to device memory. distance_bias is read, lag_bias is not; left and right are at most kUnlimited.
struct CudaAttention : Attention {
  int64_t rows_q, rows_k;                 // of the tensors: what sequences are held to, whatever cu_seqlens say
  const int64_t* dropout_seed = nullptr;  // instead of the number
};

// Numbers a query that the first kernel of a backward leaves to the others: lse in units of log2, +infinity where every
// weight is zero, what rounding took from it, and delta = dO·O - dlse. Every sequence's rows are padded, and begin at a multiple of 16 bytes.
struct Statistics {
  float* lse;
  float* rest;
  float* delta;
  int64_t head;  // from one head (packed), or one (batch, head), to the next
};
constexpr int64_t kStatisticsPadding = 136;
inline int64_t statistics_rows(const CudaAttention& a) {
  return a.cu_seqlens_q ? (a.rows_q + 3) / 4 * 4 + (a.batch + 1) * kStatisticsPadding : (a.seqlen_q + 127) / 128 * 128;
}

struct CudaAttentionGrad : AttentionGrad {
  Statistics statistics;
  // Of grad_alibi_slopes and grad_sinks every block of queries writes a share, which the launcher adds up: [batch][heads_q][blocks],
  // zeros before. attention_query_blocks() says how many there are.
  float* slope_shares = nullptr;
  float* sink_shares = nullptr;
  // Two parts of grad_distance for every (batch, head): [2][batch][heads_q][distance_count], zeros before; the launcher adds.
  float* distance_parts = nullptr;
  // Of grad_mask: `mask_splits` parts of its shape one behind the other; the launcher adds.
  int64_t mask_splits = 1;
  int64_t mask_sizes[4];
};

int64_t attention_query_blocks(const CudaAttention& a);

// Each launches on a cudaStream_t and returns a cudaError_t. The backward's first is the query gradient.
int attention_forward_cuda(const CudaAttention& a, void* stream);
int attention_query_gradient_cuda(const CudaAttention& a, const CudaAttentionGrad& g, void* stream);
int attention_key_gradient_cuda(const CudaAttention& a, const CudaAttentionGrad& g, void* stream);
int attention_mask_gradient_cuda(const CudaAttention& a, const CudaAttentionGrad& g, void* stream);
int attention_distance_gradient_cuda(const CudaAttention& a, const CudaAttentionGrad& g, void* stream);

}  // namespace xformer_fast
