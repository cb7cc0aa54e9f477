// The operators xformer_fast::decode_attention_cpu and kv_cache_append_cpu: schema, value checks, tensors to raw pointers.
// Shapes, dtypes and option types were checked by the public function; values that live in tensors are checked here.
#include "decode.h"
#include "launch.h"

namespace xformer_fast {
namespace {

// Lengths, checked, and with a block table the pages that hold them.
struct Lengths {
  std::vector<int64_t> values;  // keys of each sequence after `appended` more
  Paging paging;
  int64_t capacity;

  Lengths(const Tensor& cache, const Tensor& cache_lengths, const OptionalTensor& block_table, int64_t appended)
      : values(integers(cache_lengths, "cache_lengths")), capacity(cache.size(2)) {
    const int64_t batch = static_cast<int64_t>(values.size());
    if (block_table) {
      STD_TORCH_CHECK(block_table->scalar_type() == ScalarType::Int && block_table->dim() == 2 && block_table->size(0) == batch &&
                          (batch == 0 || block_table->size(1) <= 1 || block_table->stride(1) == 1),
                      "xformer_fast: block_table must be int32 (B, max_pages) with a unit last stride");
      paging = {static_cast<const int32_t*>(block_table->data_ptr()), block_table->stride(0), cache.size(2)};
      capacity *= block_table->size(1);
    }
    for (int64_t b = 0; b < batch; ++b) {
      STD_TORCH_CHECK(0 <= values[b] && values[b] <= capacity - appended, "xformer_fast: cache_lengths[", b, "] is ", values[b],
                      ", must lie in 0..", capacity - appended, ": the cache holds ", capacity, " keys a sequence",
                      appended ? " and the call adds " : "", appended ? std::to_string(appended) : "");
      values[b] += appended;
      if (!block_table) continue;
      const int32_t* pages = paging.block_table + b * paging.table_row;
      for (int64_t page = 0; page * paging.page_size < values[b]; ++page)
        STD_TORCH_CHECK(0 <= pages[page] && pages[page] < cache.size(0), "xformer_fast: block_table[", b, ", ", page, "] is ",
                        pages[page], ", must lie in 0..", cache.size(0) - 1);
    }
  }
};

int64_t element_bytes(const Tensor& t) { return element_of(t, "key_cache") == Element::float32 ? 4 : 2; }

void append(Tensor key_cache, Tensor value_cache, Tensor new_key, Tensor new_value, Tensor cache_lengths,
            OptionalTensor block_table) {
  STD_TORCH_CHECK(key_cache.stride(3) == 1 && value_cache.stride(3) == 1,
                  "xformer_fast: key_cache and value_cache must have a unit last stride");
  const Lengths lengths(key_cache, cache_lengths, block_table, new_key.size(2));
  const Tensor key = with_unit_rows(new_key), value = with_unit_rows(new_value);
  const CacheAppend a{element_bytes(key_cache), new_key.size(0), new_key.size(1), new_key.size(2), new_key.size(3), new_value.size(3),
                      lengths.values.data(), view_of(key_cache), view_of(value_cache), view_of(key), view_of(value), lengths.paging};
  Call call(static_cast<double>(key.numel() + value.numel()));
  XF_KERNELS(decode_kernels).append(a, call.pool());
}

std::tuple<Tensor, Tensor> decode(Tensor query, Tensor key_cache, Tensor value_cache, Tensor cache_lengths,
                                  OptionalTensor block_table, OptionalTensor alibi_slopes, OptionalTensor distance_bias,
                                  OptionalTensor sinks, int64_t appended, double scale, double softcap, int64_t window_left) {
  STD_TORCH_CHECK(key_cache.stride(3) == 1 && value_cache.stride(3) == 1,
                  "xformer_fast: key_cache and value_cache must have a unit last stride");
  const Lengths lengths(key_cache, cache_lengths, block_table, appended);
  const Tensor q = with_unit_rows(query);
  Decode d;
  Attention& a = d.attention;
  d.paging = lengths.paging;
  d.at_the_end = true;
  a.element = element_of(query, "query");
  a.batch = query.size(0);
  a.heads_q = query.size(1);
  a.heads_kv = key_cache.size(1);
  a.head_dim = query.size(3);
  a.head_dim_v = value_cache.size(3);
  a.seqlen_q = query.size(2);
  a.seqlen_k = lengths.capacity;
  a.key_lengths = lengths.values.data();
  a.query = view_of(q);
  a.key = view_of(key_cache);
  a.value = view_of(value_cache);
  if (alibi_slopes) {
    a.alibi_slopes = float_data(*alibi_slopes, "alibi_slopes");
    a.alibi_batch = alibi_slopes->dim() == 2 ? alibi_slopes->stride(0) : 0;
    a.alibi_head = alibi_slopes->stride(-1);
  }
  if (distance_bias) {
    STD_TORCH_CHECK(distance_bias->dim() == 2 && distance_bias->size(0) == a.heads_q &&
                        distance_bias->size(1) >= a.seqlen_k + a.seqlen_q - 1 &&
                        (distance_bias->size(1) <= 1 || distance_bias->stride(1) == 1),
                    "xformer_fast: the bias of the distance must be (Hq, T + capacity - 1) with a unit last stride");
    a.distance_bias = float_data(*distance_bias, "relative_bias");
    a.distance_head = distance_bias->stride(0);
    a.distance_offset = a.seqlen_k - 1;
  }
  if (sinks) {
    STD_TORCH_CHECK(sinks->is_contiguous(), "xformer_fast: sinks must be contiguous");
    a.sinks = float_data(*sinks, "sinks");
  }
  a.scale = static_cast<float>(scale);
  a.softcap = static_cast<float>(softcap);
  a.left = window_left < 0 ? kNoLimit : window_left;
  a.right = 0;
  Tensor out = empty_in_order_of(query, a.head_dim_v);
  Tensor lse = empty_floats(query, {a.batch, a.heads_q, a.seqlen_q});
  if (lse.numel() > 0) {
    a.out = view_of(out);
    a.lse = static_cast<float*>(lse.data_ptr());
    a.lse_batch = lse.stride(0);
    a.lse_head = lse.stride(1);
    double keys = 0;
    for (int64_t n : lengths.values) keys += static_cast<double>(n > a.left ? a.left + 1 : n);
    Call call(4. * static_cast<double>(a.heads_q * a.seqlen_q * (a.head_dim + a.head_dim_v)) * keys);  // memory-bound
    XF_KERNELS(decode_kernels).forward(d, call.pool());
  }
  return {out, lse};
}

}  // namespace
}  // namespace xformer_fast

STABLE_TORCH_LIBRARY_FRAGMENT(xformer_fast, m) {
  m.def(
      "kv_cache_append_cpu(Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor new_key, Tensor new_value, "
      "Tensor cache_lengths, Tensor? block_table) -> ()");
  m.def(
      "decode_attention_cpu(Tensor query, Tensor key_cache, Tensor value_cache, Tensor cache_lengths, Tensor? block_table, "
      "Tensor? alibi_slopes, Tensor? distance_bias, Tensor? sinks, SymInt appended, float scale, float softcap, "
      "SymInt window_left) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(xformer_fast, CPU, m) {
  m.impl("kv_cache_append_cpu", TORCH_BOX(&xformer_fast::append));
  m.impl("decode_attention_cpu", TORCH_BOX(&xformer_fast::decode));
}
