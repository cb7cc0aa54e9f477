// Decoding on a GPU: what a launcher hands to the kernels. Raw pointers, no torch.
#pragma once
#include "../cpu/decode.h"
#include "attention.h"

namespace xformer_fast {

// Attention of `tokens` = seqlen_q queries a sequence over a cache of seqlen_k = capacity keys. key_lengths counts the keys before
// the call; `appended` more were written. Query i stands at length - tokens + i.
struct CudaDecode : CudaAttention {
  Paging paging;
  int64_t pages;     // of a paged cache
  int64_t appended;
  int64_t splits;    // ranges that a sequence's keys are cut into
  // Of every split and every (batch, query head, token): its maximum (in units of log2), sum, and unscaled output.
  float* partial_max;
  float* partial_sum;
  float* partial_out;
};

// New rows on their way into the cache, one for each of `tokens` tokens of each (batch, head): see csrc/cpu/decode.h. Of `lengths`
// keys before them.
struct CudaCacheAppend : CacheAppend {
  int64_t capacity, pages;
};

int64_t decode_row_blocks(const CudaDecode& d);  // of the queries of one KV head
int decode_attention_cuda(const CudaDecode& d, void* stream);
int kv_cache_append_cuda(const CudaCacheAppend& a, void* stream);

}  // namespace xformer_fast
