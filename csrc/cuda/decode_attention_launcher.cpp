// The operators xformer_fast::decode_attention_cuda and kv_cache_append_cuda: schema, tensors to raw pointers, workspaces.
// Shapes, dtypes and option types were checked by the public function; kernels hold values that live in tensors to what there is.
#include <algorithm>

#include "decode.h"
#include "launch.h"

namespace xformer_fast {
namespace {

constexpr int64_t kMostSplits = 64;
constexpr int64_t kLeastSplit = 256;  // keys

// How many keys a sequence's part of the cache, or the pages of its table, can hold.
struct CacheShape {
  Paging paging;
  int64_t capacity, pages;

  CacheShape(CudaCall& call, const Tensor& cache, const OptionalTensor& block_table)
      : capacity(cache.size(2)), pages(cache.size(0)) {
    if (!block_table) return;
    STD_TORCH_CHECK(block_table->scalar_type() == ScalarType::Int && block_table->dim() == 2 &&
                        (block_table->size(1) <= 1 || block_table->stride(1) == 1),
                    "xformer_fast: block_table must be int32 (B, max_pages) with a unit last stride");
    paging = {call.data<int32_t>(*block_table), block_table->stride(0), cache.size(2)};
    capacity *= block_table->size(1);
  }
};

void check_cache(const Tensor& key_cache, const Tensor& value_cache) {
  STD_TORCH_CHECK(key_cache.stride(3) == 1 && value_cache.stride(3) == 1,
                  "xformer_fast: key_cache and value_cache must have a unit last stride");
}

void append(Tensor key_cache, Tensor value_cache, Tensor new_key, Tensor new_value, Tensor cache_lengths, OptionalTensor block_table) {
  check_cache(key_cache, value_cache);
  CudaCall call(key_cache);
  const CacheShape shape(call, key_cache, block_table);
  const Tensor key = with_unit_rows(new_key), value = with_unit_rows(new_value);
  const Tensor lengths = torch::stable::contiguous(as_int64(cache_lengths));
  CudaCacheAppend a{};
  a.element_bytes = key_cache.element_size();
  a.batch = new_key.size(0), a.heads = new_key.size(1), a.tokens = new_key.size(2);
  a.head_dim = new_key.size(3), a.head_dim_v = new_value.size(3);
  a.lengths = call.data<int64_t>(lengths);
  a.key_cache = call.view(key_cache), a.value_cache = call.view(value_cache);
  a.new_key = call.view(key), a.new_value = call.view(value);
  a.paging = shape.paging, a.capacity = shape.capacity, a.pages = shape.pages;
  call.check(kv_cache_append_cuda(a, call.stream()));
}

// Two blocks a multiprocessor, if ranges stay long enough: from shapes alone, for lengths stay on the device.
int64_t split_count(const CudaDecode& d, int64_t multiprocessors) {
  const int64_t units = d.batch * d.heads_kv * decode_row_blocks(d), wanted = (2 * multiprocessors + units - 1) / units;
  return std::max<int64_t>(1, std::min({wanted, (d.seqlen_k + kLeastSplit - 1) / kLeastSplit, kMostSplits}));
}

std::tuple<Tensor, Tensor> decode(Tensor query, Tensor key_cache, Tensor value_cache, Tensor cache_lengths,
                                  OptionalTensor block_table, OptionalTensor alibi_slopes, OptionalTensor distance_bias,
                                  OptionalTensor sinks, int64_t appended, double scale, double softcap, int64_t window_left) {
  check_cache(key_cache, value_cache);
  CudaCall call(query);
  const CacheShape shape(call, key_cache, block_table);
  const Tensor q = with_unit_rows(query), lengths = torch::stable::contiguous(as_int64(cache_lengths));
  CudaDecode d{};
  d.paging = shape.paging;
  d.pages = shape.pages;
  d.appended = appended;
  d.element = element_of(query, "query");
  d.batch = query.size(0);
  d.heads_q = query.size(1);
  d.heads_kv = key_cache.size(1);
  d.head_dim = query.size(3);
  d.head_dim_v = value_cache.size(3);
  STD_TORCH_CHECK(std::max(d.head_dim, d.head_dim_v) <= kMostHeadDim, "xformer_fast: head_dim is at most ", kMostHeadDim);
  d.seqlen_q = query.size(2);
  d.seqlen_k = shape.capacity;
  d.key_lengths = call.data<int64_t>(lengths);
  d.query = call.view(q);
  d.key = call.view(key_cache);
  d.value = call.view(value_cache);
  if (alibi_slopes) {
    d.alibi_slopes = call.floats(*alibi_slopes, "alibi_slopes");
    d.alibi_batch = alibi_slopes->dim() == 2 ? alibi_slopes->stride(0) : 0;
    d.alibi_head = alibi_slopes->stride(-1);
  }
  if (distance_bias) {
    STD_TORCH_CHECK(distance_bias->dim() == 2 && distance_bias->size(0) == d.heads_q &&
                        distance_bias->size(1) >= d.seqlen_k + d.seqlen_q - 1 && distance_bias->stride(1) == 1,
                    "xformer_fast: the bias of the distance must be (Hq, T + capacity - 1) with a unit last stride");
    d.distance_bias = call.floats(*distance_bias, "relative_bias");
    d.distance_head = distance_bias->stride(0);
    d.distance_offset = d.seqlen_k - 1;
  }
  if (sinks) {
    STD_TORCH_CHECK(sinks->is_contiguous(), "xformer_fast: sinks must be contiguous");
    d.sinks = call.floats(*sinks, "sinks");
  }
  d.scale = static_cast<float>(scale);
  d.softcap = static_cast<float>(softcap);
  d.left = window_left < 0 ? kUnlimited : std::min(window_left, kUnlimited);
  Tensor out = empty_in_order_of(query, d.head_dim_v);
  Tensor lse = torch::stable::new_empty(query, {d.batch, d.heads_q, d.seqlen_q}, ScalarType::Float);
  if (lse.numel() > 0) {
    d.out = call.view(out);
    d.lse = call.data<float>(lse);
    d.lse_batch = lse.stride(0);
    d.lse_head = lse.stride(1);
    d.splits = split_count(d, call.multiprocessors());
    const int64_t rows = d.splits * lse.numel();
    const Tensor partial = torch::stable::new_empty(query, {rows * (2 + d.head_dim_v)}, ScalarType::Float);
    d.partial_max = call.data<float>(partial);
    d.partial_sum = d.partial_max + rows;
    d.partial_out = d.partial_sum + rows;
    call.check(decode_attention_cuda(d, call.stream()));
  }
  return {out, lse};
}

}  // namespace
}  // namespace xformer_fast

STABLE_TORCH_LIBRARY_FRAGMENT(xformer_fast, m) {
  m.def(
      "kv_cache_append_cuda(Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor new_key, Tensor new_value, "
      "Tensor cache_lengths, Tensor? block_table) -> ()");
  m.def(
      "decode_attention_cuda(Tensor query, Tensor key_cache, Tensor value_cache, Tensor cache_lengths, Tensor? block_table, "
      "Tensor? alibi_slopes, Tensor? distance_bias, Tensor? sinks, SymInt appended, float scale, float softcap, "
      "SymInt window_left) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(xformer_fast, XFORMER_FAST_DEVICE_KEY, m) {
  m.impl("kv_cache_append_cuda", TORCH_BOX(&xformer_fast::append));
  m.impl("decode_attention_cuda", TORCH_BOX(&xformer_fast::decode));
}
