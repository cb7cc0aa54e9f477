// The operators xformer_fast::attention_cuda and attention_cuda_backward: schema, tensors to raw pointers, workspaces.
// Shapes, dtypes and option types were checked by the public function; kernels hold values that live in tensors to what there is.
// The schema is every backend's; global keys and a decomposed bias have no kernel here.
#include "attention.h"
#include "launch.h"

#include <algorithm>

namespace xformer_fast {
namespace {

enum Causal : int64_t { kNotCausal = 0, kBottomRight = 1, kTopLeft = 2 };
constexpr int64_t kMaskBlocks = 1024;  // as many as keep any GPU busy: fewer mask tiles than that are split
constexpr int64_t kMaskTile = 64;

struct Options {
  OptionalTensor mask, key_lengths, cu_seqlens_q, cu_seqlens_k, alibi_slopes, distance_bias, sinks, dropout_seed,
      global_keys, rel_h, rel_w;
  int64_t max_seqlen_q, max_seqlen_k;
  double scale, softcap, dropout_p;
  int64_t causal, window_left, window_right;
};

// CudaAttention plus the tensors its pointers point into.
class Prepared {
 public:
  CudaAttention a{};
  CudaCall call;

  Prepared(const Tensor& q, const Tensor& k, const Tensor& v, const Options& o)
      : call(q), query_(with_unit_rows(q)), key_(with_unit_rows(k)), value_(with_unit_rows(v)) {
    STD_TORCH_CHECK(!o.global_keys && !o.rel_h && !o.rel_w, "xformer_fast: the CUDA kernels take no global_keys and no decomposed_bias");
    const bool packed = q.dim() == 3;
    a.element = element_of(q, "query");
    a.heads_q = q.size(1);
    a.heads_kv = k.size(1);
    a.head_dim = q.size(-1);
    a.head_dim_v = v.size(-1);
    STD_TORCH_CHECK(std::max(a.head_dim, a.head_dim_v) <= kMostHeadDim, "xformer_fast: head_dim is at most ", kMostHeadDim);
    a.query = call.view(query_);
    a.key = call.view(key_);
    a.value = call.view(value_);
    a.rows_q = q.size(packed ? 0 : 2);
    a.rows_k = k.size(packed ? 0 : 2);
    a.batch = packed ? o.cu_seqlens_q->size(0) - 1 : q.size(0);
    a.seqlen_q = packed ? std::min(o.max_seqlen_q, a.rows_q) : a.rows_q;
    a.seqlen_k = packed ? std::min(o.max_seqlen_k, a.rows_k) : a.rows_k;
    if (packed) {
      a.cu_seqlens_q = integers(cu_q_, *o.cu_seqlens_q);
      a.cu_seqlens_k = integers(cu_k_, *o.cu_seqlens_k);
    }
    if (o.key_lengths) a.key_lengths = integers(lengths_, *o.key_lengths);
    if (o.mask) {
      a.mask = call.data<void>(*o.mask);
      a.mask_element = element_of(*o.mask, "mask");
      auto stride = [&](int64_t dim) { return o.mask->size(dim) == 1 ? 0 : o.mask->stride(dim); };
      a.mask_batch = stride(0), a.mask_head = stride(1), a.mask_q = stride(2), a.mask_k = stride(3);
    }
    if (o.alibi_slopes) {
      a.alibi_slopes = call.floats(*o.alibi_slopes, "alibi_slopes");
      a.alibi_batch = o.alibi_slopes->dim() == 2 ? o.alibi_slopes->stride(0) : 0;
      a.alibi_head = o.alibi_slopes->stride(-1);
    }
    if (o.distance_bias) {
      STD_TORCH_CHECK(o.distance_bias->is_contiguous(), "xformer_fast: distance_bias must be contiguous");
      const int64_t count = std::max<int64_t>(o.max_seqlen_q + o.max_seqlen_k - 1, 0);
      STD_TORCH_CHECK(o.distance_bias->size(1) == count, "xformer_fast: distance_bias must have ", count, " columns");
      a.distance_bias = call.floats(*o.distance_bias, "distance_bias");
      a.distance_head = a.distance_count = count;
      a.distance_offset = (o.causal == kTopLeft ? o.max_seqlen_q : o.max_seqlen_k) - 1;
    }
    if (o.sinks) {
      STD_TORCH_CHECK(o.sinks->is_contiguous(), "xformer_fast: sinks must be contiguous");
      a.sinks = call.floats(*o.sinks, "sinks");
    }
    a.scale = static_cast<float>(o.scale);
    a.softcap = static_cast<float>(o.softcap);
    a.dropout_p = o.dropout_p;
    if (o.dropout_seed && o.dropout_p > 0) a.dropout_seed = call.data<int64_t>(*o.dropout_seed);
    a.top_left = o.causal == kTopLeft;
    auto limit = [](int64_t window) { return window < 0 ? kUnlimited : std::min(window, kUnlimited); };
    a.left = limit(o.window_left);
    a.right = o.causal != kNotCausal ? 0 : limit(o.window_right);
  }

  void set_results(const Tensor& out, const Tensor& lse, const Tensor& residual) {
    a.out = call.view(out);
    if (residual.numel() > 0) a.residual = call.view(residual);
    a.lse = call.data<float>(lse);
    a.lse_error = a.lse + lse.stride(0);
    a.lse_batch = lse.dim() == 3 ? 0 : lse.stride(1);
    a.lse_head = lse.stride(lse.dim() - 2);
  }

 private:
  const int64_t* integers(Tensor& kept, const Tensor& t) {
    kept = torch::stable::contiguous(as_int64(t));
    return call.data<int64_t>(kept);
  }

  Tensor query_, key_, value_, cu_q_, cu_k_, lengths_;
};

std::tuple<Tensor, Tensor, Tensor> forward(Tensor query, Tensor key, Tensor value, OptionalTensor mask, OptionalTensor key_lengths,
                                           OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k, OptionalTensor alibi_slopes,
                                           OptionalTensor distance_bias, OptionalTensor sinks, OptionalTensor dropout_seed,
                                           OptionalTensor global_keys, OptionalTensor rel_h, OptionalTensor rel_w,
                                           int64_t max_seqlen_q, int64_t max_seqlen_k, double scale, double softcap, double dropout_p,
                                           int64_t causal, int64_t window_left, int64_t window_right, bool save_residual,
                                           bool exact_weights) {
  Prepared p(query, key, value,
             {mask, key_lengths, cu_seqlens_q, cu_seqlens_k, alibi_slopes, distance_bias, sinks, dropout_seed, global_keys, rel_h,
              rel_w, max_seqlen_q, max_seqlen_k, scale, softcap, dropout_p, causal, window_left, window_right});
  Tensor out = empty_in_order_of(query, p.a.head_dim_v);
  Tensor lse = query.dim() == 3
                   ? torch::stable::new_empty(query, {2, query.size(1), query.size(0)}, ScalarType::Float)
                   : torch::stable::new_empty(query, {2, query.size(0), query.size(1), query.size(2)}, ScalarType::Float);
  save_residual = save_residual && query.scalar_type() != ScalarType::Float;
  Tensor residual = save_residual ? empty_in_order_of(query, p.a.head_dim_v) : torch::stable::new_empty(query, {0});
  if (lse.numel() > 0) {
    p.set_results(out, lse, residual);
    p.a.exact_weights = exact_weights;
    p.call.check(attention_forward_cuda(p.a, p.call.stream()));
  }
  return {out, lse, residual};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    Tensor grad_out, OptionalTensor grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, Tensor residual,
    OptionalTensor mask, OptionalTensor key_lengths, OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k,
    OptionalTensor alibi_slopes, OptionalTensor distance_bias, OptionalTensor sinks, OptionalTensor dropout_seed,
    OptionalTensor global_keys, OptionalTensor rel_h, OptionalTensor rel_w, int64_t max_seqlen_q, int64_t max_seqlen_k, double scale,
    double softcap, double dropout_p, int64_t causal, int64_t window_left, int64_t window_right, bool need_mask_grad,
    bool need_alibi_grad, bool need_distance_grad, bool need_sinks_grad, bool /*need_decomposed_grad*/) {
  Prepared p(query, key, value,
             {mask, key_lengths, cu_seqlens_q, cu_seqlens_k, alibi_slopes, distance_bias, sinks, dropout_seed, global_keys, rel_h,
              rel_w, max_seqlen_q, max_seqlen_k, scale, softcap, dropout_p, causal, window_left, window_right});
  const CudaAttention& a = p.a;
  CudaCall& call = p.call;
  using torch::stable::new_empty;
  using torch::stable::new_zeros;
  Tensor d_query = empty_in_order_of(query, a.head_dim);
  Tensor d_key = empty_in_order_of(key, a.head_dim);
  Tensor d_value = empty_in_order_of(value, a.head_dim_v);
  auto none = [&] { return new_empty(query, {0}, ScalarType::Float); };  // results may not share memory
  Tensor d_mask = none(), d_alibi = none(), d_distance = none(), d_sinks = none();
  if (lse.numel() == 0) {  // no query: nothing flows back
    torch::stable::zero_(d_key);
    torch::stable::zero_(d_value);
    if (need_mask_grad) d_mask = new_zeros(*mask, mask->sizes());
    if (need_alibi_grad) d_alibi = new_zeros(*alibi_slopes, alibi_slopes->sizes());
    if (need_distance_grad) d_distance = new_zeros(query, {a.heads_q, a.distance_count}, ScalarType::Float);
    if (need_sinks_grad) d_sinks = new_zeros(query, {a.heads_q}, ScalarType::Float);
    return {d_query, d_key, d_value, d_mask, d_alibi, d_distance, d_sinks, none(), none()};
  }

  const Tensor go = with_unit_rows(grad_out), o = with_unit_rows(out), l = torch::stable::contiguous(lse), e = with_unit_rows(residual);
  p.set_results(o, l, e);
  OptionalTensor gl;
  if (grad_lse) gl = torch::stable::contiguous(torch::stable::to(*grad_lse, ScalarType::Float));
  CudaAttentionGrad g{};
  g.grad_out = call.view(go);
  if (gl) g.grad_lse = call.floats(*gl, "grad_lse");
  g.grad_query = call.view(d_query);
  g.grad_key = call.view(d_key);
  g.grad_value = call.view(d_value);

  const int64_t rows = statistics_rows(a), streams = a.cu_seqlens_q ? a.heads_q : a.batch * a.heads_q;
  const Tensor statistics = new_empty(query, {3, streams, rows}, ScalarType::Float);
  g.statistics.lse = call.data<float>(statistics);
  g.statistics.rest = g.statistics.lse + streams * rows;
  g.statistics.delta = g.statistics.rest + streams * rows;
  g.statistics.head = rows;
  const std::vector<int64_t> shares_shape{a.batch, a.heads_q, attention_query_blocks(a)};
  const Tensor slope_shares = need_alibi_grad ? new_zeros(query, shares_shape, ScalarType::Float) : none();
  const Tensor sink_shares = need_sinks_grad ? new_zeros(query, shares_shape, ScalarType::Float) : none();
  if (need_alibi_grad) g.slope_shares = call.data<float>(slope_shares);
  if (need_sinks_grad) g.sink_shares = call.data<float>(sink_shares);
  call.check(attention_query_gradient_cuda(a, g, call.stream()));
  call.check(attention_key_gradient_cuda(a, g, call.stream()));

  using Axes = std::vector<int64_t>;
  if (need_mask_grad) {
    for (int i = 0; i < 4; ++i) g.mask_sizes[i] = mask->size(i);
    const int64_t planes = mask->size(0) * mask->size(1), pairs = a.batch * a.heads_q / std::max<int64_t>(planes, 1);
    const int64_t tiles = planes * ((mask->size(2) + kMaskTile - 1) / kMaskTile) * ((mask->size(3) + kMaskTile - 1) / kMaskTile);
    g.mask_splits = std::max<int64_t>(1, std::min(pairs, kMaskBlocks / std::max<int64_t>(tiles, 1)));
    const Tensor parts = new_empty(query, {g.mask_splits, mask->size(0), mask->size(1), mask->size(2), mask->size(3)}, ScalarType::Float);
    g.grad_mask = call.data<float>(parts);
    call.check(attention_mask_gradient_cuda(a, g, call.stream()));
    d_mask = torch::stable::to(torch::stable::sum(parts, Axes{0}), mask->scalar_type());
  }
  if (need_distance_grad) {
    const Tensor parts = new_zeros(query, {2, a.batch, a.heads_q, a.distance_count}, ScalarType::Float);
    g.distance_parts = call.data<float>(parts);
    call.check(attention_distance_gradient_cuda(a, g, call.stream()));
    d_distance = torch::stable::sum(parts, Axes{0, 1});
  }
  if (need_alibi_grad) d_alibi = torch::stable::sum(slope_shares, alibi_slopes->dim() == 2 ? Axes{2} : Axes{0, 2});
  if (need_sinks_grad) d_sinks = torch::stable::sum(sink_shares, Axes{0, 2});
  return {d_query, d_key, d_value, d_mask, d_alibi, d_distance, d_sinks, none(), none()};
}

#define XFORMER_FAST_ATTENTION_OPTIONS                                                                              \
  "Tensor? mask, Tensor? key_lengths, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? alibi_slopes, "           \
  "Tensor? distance_bias, Tensor? sinks, Tensor? dropout_seed, Tensor? global_keys, Tensor? rel_h, Tensor? rel_w, " \
  "SymInt max_seqlen_q, SymInt max_seqlen_k, float scale, float softcap, float dropout_p, int causal, "             \
  "SymInt window_left, SymInt window_right"

}  // namespace
}  // namespace xformer_fast

STABLE_TORCH_LIBRARY_FRAGMENT(xformer_fast, m) {
  m.def("attention_cuda(Tensor query, Tensor key, Tensor value, " XFORMER_FAST_ATTENTION_OPTIONS
        ", bool save_residual, bool exact_weights) -> (Tensor, Tensor, Tensor)");
  m.def(
      "attention_cuda_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, "
      "Tensor lse, Tensor residual, " XFORMER_FAST_ATTENTION_OPTIONS
      ", bool need_mask_grad, bool need_alibi_grad, bool need_distance_grad, bool need_sinks_grad, "
      "bool need_decomposed_grad) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(xformer_fast, XFORMER_FAST_DEVICE_KEY, m) {
  m.impl("attention_cuda", TORCH_BOX(&xformer_fast::forward));
  m.impl("attention_cuda_backward", TORCH_BOX(&xformer_fast::backward));
}
