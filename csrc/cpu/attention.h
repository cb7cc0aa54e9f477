// What the launcher hands to the softmax-attention kernels: raw pointers, sizes, strides (in elements), options.
// Nothing here knows torch; nothing here is compiled for one instruction set.
#pragma once
#include "kernel.h"

namespace xformer_fast {

// Keys kept for query i of a sequence: max(0, p_i - left) <= j <= p_i + right, j < key length; p_i = i + shift.
constexpr int64_t kNoLimit = int64_t(1) << 60;  // left/right without a limit; safe to add to any position

constexpr int64_t kLagPadding = 32;  // at least two vectors: whole vectors of queries are read past either end

struct Attention {
  Element element;  // of query, key, value, out and their gradients: float32, bfloat16 or float16
  int64_t batch, heads_q, heads_kv, head_dim, head_dim_v;
  int64_t seqlen_q, seqlen_k;                             // varlen: the longest sequence of the batch
  const int64_t* cu_seqlens_q = nullptr;                  // varlen: (batch + 1) row offsets, else nullptr
  const int64_t* cu_seqlens_k = nullptr;
  const int64_t* key_lengths = nullptr;                   // (batch), 0 <= length <= seqlen_k, or nullptr; never moves p_i
  View query, key, value, out;
  View residual;                                          // what rounding took from out, in out's type, or nullptr
  bool exact_weights = false;                             // products with P lose no digits of it, so that residual is exact
  float* lse = nullptr;                                   // log of the softmax denominator, natural log; -inf for an empty row
  float* lse_error = nullptr;                             // what rounding took from it, in its layout, or nullptr
  int64_t lse_batch = 0, lse_head = 0;                    // strides; rows are adjacent (varlen: offset by cu_seqlens_q)
  const void* mask = nullptr;                             // additive (float types) or boolean (true = attend)
  Element mask_element = Element::float32;
  int64_t mask_batch = 0, mask_head = 0, mask_q = 0, mask_k = 0;  // strides, 0 where broadcast
  const float* alibi_slopes = nullptr;                    // adds -slope * |p_i - j|
  int64_t alibi_batch = 0, alibi_head = 0;                // strides
  const float* distance_bias = nullptr;                   // adds values[head * distance_head + (j - p_i) + distance_offset]
  int64_t distance_head = 0, distance_offset = 0, distance_count = 0;  // of distance_count numbers a head
  const float* lag_bias = nullptr;  // the same numbers at [head * lag_head + (p_i - j) + lag_offset], with kLagPadding
  int64_t lag_head = 0, lag_offset = 0;                   // zeros before and after each head's
  View row_bias, column_bias;                             // float32 (batch, heads_q, seqlen_q, map_rows | map_columns): adds
  int64_t map_rows = 0, map_columns = 0;                  // row_bias[j / map_columns] + column_bias[j % map_columns]
  const float* sinks = nullptr;                           // (heads_q): one more logit in every denominator
  float scale = 1.f;
  float softcap = 0.f;                                    // 0: none
  double dropout_p = 0.;  // a bit is dropped when its random word is below floor(dropout_p * 2^32)
  uint64_t dropout_seed = 0;
  bool top_left = false;                                  // shift = 0, else shift = len_k - len_q of the sequence
  int64_t left = kNoLimit, right = kNoLimit;
  const int64_t* global_keys = nullptr;   // seen beside the window: those of a sequence ascending, below its key limit,
  const int64_t* global_begin = nullptr;  // from its begin to the next one's (batch + 1); nullptr where there is no window
  bool causal = false;                    // global keys after p_i are not seen; the window's right is 0 already

  bool has_map_bias() const { return map_rows + map_columns > 0; }
  int64_t query_row0(int64_t b) const { return cu_seqlens_q ? cu_seqlens_q[b] : 0; }
  int64_t key_row0(int64_t b) const { return cu_seqlens_k ? cu_seqlens_k[b] : 0; }
  int64_t len_q(int64_t b) const { return cu_seqlens_q ? cu_seqlens_q[b + 1] - cu_seqlens_q[b] : seqlen_q; }
  int64_t len_k(int64_t b) const { return cu_seqlens_k ? cu_seqlens_k[b + 1] - cu_seqlens_k[b] : seqlen_k; }
  int64_t shift(int64_t b) const { return top_left ? 0 : len_k(b) - len_q(b); }
  int64_t global_count(int64_t b) const { return global_keys ? global_begin[b + 1] - global_begin[b] : 0; }
  int64_t key_limit(int64_t b) const {  // keys at or past it are never read
    const int64_t n = len_k(b);
    return key_lengths && key_lengths[b] < n ? key_lengths[b] : n;
  }
};

// The backward reads all of Attention (out and lse as the forward wrote them) and writes every gradient that is not null.
// Gradients of key and value are per KV head. Outputs arrive uninitialised; every element inside a sequence is written.
struct AttentionGrad {
  View grad_out;
  const float* grad_lse = nullptr;  // same layout as lse, or nullptr
  View grad_query, grad_key, grad_value;
  float* grad_mask = nullptr;       // float32, dense over the mask's own (unbroadcast) axes; see grad_mask_* strides
  int64_t grad_mask_batch = 0, grad_mask_head = 0, grad_mask_q = 0, grad_mask_k = 0;  // 0 where the mask broadcasts
  float* grad_alibi_slopes = nullptr;  // float32 (batch, heads_q), always per batch; the launcher sums
  float* grad_distance = nullptr;      // float32 (heads_q, distance_count)
  float* grad_sinks = nullptr;         // float32 (batch, heads_q), likewise
  float* grad_row_bias = nullptr;      // float32 (batch, heads_q, seqlen_q, map_rows), and with map_columns
  float* grad_column_bias = nullptr;   // both, unless a map without keys has none, or neither
};

struct AttentionKernels {
  void (*forward)(const Attention&, const Pool&);
  void (*backward)(const Attention&, const AttentionGrad&, const Pool&);
};

XF_DECLARE_KERNELS(AttentionKernels, attention_kernels)

}  // namespace xformer_fast
