// What the launcher hands to the linear-attention kernels: raw pointers, sizes, strides (in elements), options.
// Nothing here knows torch; nothing here is compiled for one instruction set.
#pragma once
#include "kernel.h"

namespace xformer_fast {

enum class FeatureMap : int { identity, elu, relu, square_relu, exp, softmax };  // elu: elu(x) + 1; softmax: over head_dim

// States are float32 and contiguous: kv (batch, heads_q, head_dim, head_dim_v), z (batch, heads_q, head_dim).
struct LinearAttention {
  Element element;  // of query, key, value, out and their gradients
  FeatureMap map;
  int64_t batch, heads_q, heads_kv, head_dim, head_dim_v;
  int64_t seqlen_q, seqlen_k;             // packed: the longest sequence of the batch
  const int64_t* cu_seqlens = nullptr;    // packed: (batch + 1) row offsets of queries and keys alike
  const int64_t* key_lengths = nullptr;   // (batch) or nullptr
  View query, key, value, out;
  float* denominator = nullptr;           // scale * phi(q).z + eps of every query; strides below, rows are adjacent
  int64_t denominator_batch = 0, denominator_head = 0;
  const float* decay = nullptr;           // (heads_q) in (0, 1], causal only
  const float* initial_kv = nullptr;
  const float* initial_z = nullptr;
  float* final_kv = nullptr;              // or nullptr: not wanted
  float* final_z = nullptr;
  bool causal, normalize;
  float scale, eps;

  int64_t row0(int64_t b) const { return cu_seqlens ? cu_seqlens[b] : 0; }
  int64_t len_q(int64_t b) const { return cu_seqlens ? cu_seqlens[b + 1] - cu_seqlens[b] : seqlen_q; }
  int64_t len_k(int64_t b) const { return cu_seqlens ? cu_seqlens[b + 1] - cu_seqlens[b] : seqlen_k; }
  int64_t key_limit(int64_t b) const {  // keys at or past it are never read
    const int64_t n = len_k(b);
    return key_lengths && key_lengths[b] < n ? key_lengths[b] : n;
  }
};

// The backward reads all of LinearAttention (out and denominator as the forward wrote them) and writes every gradient that
// is not null. Gradients of key and value are per KV head. Every element inside a sequence is written.
struct LinearAttentionGrad {
  View grad_out;
  const float* grad_final_kv = nullptr;  // of the returned states, or nullptr
  const float* grad_final_z = nullptr;
  View grad_query, grad_key, grad_value;
  float* grad_decay = nullptr;           // (batch, heads_q), always per batch; the launcher sums
  float* grad_initial_kv = nullptr;
  float* grad_initial_z = nullptr;
};

struct LinearAttentionKernels {
  void (*forward)(const LinearAttention&, const Pool&);
  void (*backward)(const LinearAttention&, const LinearAttentionGrad&, const Pool&);
};

XF_DECLARE_KERNELS(LinearAttentionKernels, linear_attention_kernels)

}  // namespace xformer_fast
