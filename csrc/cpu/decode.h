// What launchers hand to the decoding kernels: a few queries a sequence against many cached keys, and the writing of new
// keys and values into the cache. Nothing here knows torch; nothing here is compiled for one instruction set.
#pragma once
#include "attention.h"

namespace xformer_fast {

// Where the rows of a cache lie: (batch, heads, capacity, head_dim), or with a block table (pages, heads, page_size,
// head_dim), whose View::batch is the stride of a page: key j of sequence b is row j % page_size of page
// block_table[b * table_row + j / page_size].
struct Paging {
  const int32_t* block_table = nullptr;
  int64_t table_row = 0, page_size = 0;
};

struct Decode {
  Attention attention;  // key and value view the cache, seqlen_k is its capacity
  Paging paging;
  bool at_the_end = false;  // query i stands at key_lengths[b] - seqlen_q + i, whatever seqlen_k is

  int64_t shift(int64_t b) const {
    return at_the_end ? attention.key_limit(b) - attention.seqlen_q : attention.shift(b);
  }
};

// The last `tokens` of the lengths[b] keys of a sequence are written: the rows of new_key and new_value.
struct CacheAppend {
  int64_t element_bytes, batch, heads, tokens, head_dim, head_dim_v;
  const int64_t* lengths;
  View key_cache, value_cache, new_key, new_value;
  Paging paging;
};

struct DecodeKernels {
  void (*forward)(const Decode&, const Pool&);
  void (*append)(const CacheAppend&, const Pool&);
};

XF_DECLARE_KERNELS(DecodeKernels, decode_kernels)

}  // namespace xformer_fast
