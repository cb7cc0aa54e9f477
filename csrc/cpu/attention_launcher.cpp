// The operators xformer_fast::attention_cpu and attention_cpu_backward: schema, value checks, tensors to raw pointers.
// Shapes, dtypes and option types were checked by the public function; values that live in tensors are checked here.
#include "attention.h"
#include "launch.h"

#include <algorithm>

namespace xformer_fast {
namespace {

enum Causal : int64_t { kNotCausal = 0, kBottomRight = 1, kTopLeft = 2 };

struct Options {
  OptionalTensor mask, key_lengths, cu_seqlens_q, cu_seqlens_k, alibi_slopes, distance_bias, sinks, dropout_seed,
      global_keys, rel_h, rel_w;
  int64_t max_seqlen_q, max_seqlen_k;
  double scale, softcap, dropout_p;
  int64_t causal, window_left, window_right;
};

std::vector<int64_t> checked_offsets(const Tensor& t, const char* name, int64_t total) {
  std::vector<int64_t> offsets = integers(t, name);
  STD_TORCH_CHECK(!offsets.empty() && offsets.front() == 0, "xformer_fast: ", name, " must start at 0");
  for (size_t i = 1; i < offsets.size(); ++i)
    STD_TORCH_CHECK(offsets[i - 1] <= offsets[i], "xformer_fast: ", name, " must not decrease, but entry ", i, " is ",
                    offsets[i], " after ", offsets[i - 1]);
  STD_TORCH_CHECK(offsets.back() == total, "xformer_fast: ", name, " must end at the number of packed rows, ", total,
                  ", but ends at ", offsets.back());
  return offsets;
}

int64_t longest(const std::vector<int64_t>& offsets, const char* name, int64_t promised) {
  int64_t most = 0;
  for (size_t i = 1; i < offsets.size(); ++i) most = std::max(most, offsets[i] - offsets[i - 1]);
  STD_TORCH_CHECK(most <= promised, "xformer_fast: ", name, " is ", promised,
                  ", must be at least the longest sequence, ", most);
  return most;
}

// Attention plus the tensors and vectors its pointers point into.
struct Prepared {
  Attention a{};
  Tensor query, key, value;
  OptionalTensor rel_h, rel_w;
  std::vector<int64_t> cu_q, cu_k, lengths, global_keys, global_begin;
  std::vector<float> lag_bias;

  Prepared(const Tensor& q, const Tensor& k, const Tensor& v, const Options& o)
      : query(with_unit_rows(q)), key(with_unit_rows(k)), value(with_unit_rows(v)) {
    const bool packed = q.dim() == 3;
    a.element = element_of(q, "query");
    check_type_of(k, q, "key");
    check_type_of(v, q, "value");
    a.heads_q = q.size(1);
    a.heads_kv = k.size(1);
    a.head_dim = q.size(-1);
    a.head_dim_v = v.size(-1);
    a.query = view_of(query);
    a.key = view_of(key);
    a.value = view_of(value);
    if (packed) {
      cu_q = checked_offsets(*o.cu_seqlens_q, "cu_seqlens_q", q.size(0));
      cu_k = checked_offsets(*o.cu_seqlens_k, "cu_seqlens_k", k.size(0));
      STD_TORCH_CHECK(cu_q.size() == cu_k.size(), "xformer_fast: cu_seqlens_q and cu_seqlens_k must have equal lengths");
      a.batch = static_cast<int64_t>(cu_q.size()) - 1;
      a.cu_seqlens_q = cu_q.data();
      a.cu_seqlens_k = cu_k.data();
      a.seqlen_q = longest(cu_q, "max_seqlen_q", o.max_seqlen_q);
      a.seqlen_k = longest(cu_k, "max_seqlen_k", o.max_seqlen_k);
    } else {
      a.batch = q.size(0);
      a.seqlen_q = q.size(2);
      a.seqlen_k = k.size(2);
    }
    if (o.key_lengths) {
      lengths = integers(*o.key_lengths, "key_lengths");
      STD_TORCH_CHECK(static_cast<int64_t>(lengths.size()) == a.batch, "xformer_fast: key_lengths must have one entry per batch");
      for (int64_t b = 0; b < a.batch; ++b)
        STD_TORCH_CHECK(0 <= lengths[b] && lengths[b] <= a.len_k(b), "xformer_fast: key_lengths[", b, "] is ", lengths[b],
                        ", must lie in 0..", a.len_k(b));
      a.key_lengths = lengths.data();
    }
    if (o.mask) {
      a.mask = o.mask->data_ptr();
      a.mask_element = element_of(*o.mask, "mask");
      auto stride = [&](int64_t dim) { return o.mask->size(dim) == 1 ? 0 : o.mask->stride(dim); };
      a.mask_batch = stride(0), a.mask_head = stride(1), a.mask_q = stride(2), a.mask_k = stride(3);
    }
    if (o.alibi_slopes) {
      a.alibi_slopes = float_data(*o.alibi_slopes, "alibi_slopes");
      a.alibi_batch = o.alibi_slopes->dim() == 2 ? o.alibi_slopes->stride(0) : 0;
      a.alibi_head = o.alibi_slopes->stride(-1);
    }
    if (o.distance_bias) set_distance_bias(*o.distance_bias, o);
    if (o.sinks) {
      STD_TORCH_CHECK(o.sinks->is_contiguous(), "xformer_fast: sinks must be contiguous");
      a.sinks = float_data(*o.sinks, "sinks");
    }
    a.scale = static_cast<float>(o.scale);
    a.softcap = static_cast<float>(o.softcap);
    a.dropout_p = o.dropout_p;
    if (o.dropout_seed && o.dropout_p > 0)
      a.dropout_seed = static_cast<uint64_t>(*static_cast<const int64_t*>(o.dropout_seed->data_ptr()));
    a.top_left = o.causal == kTopLeft;
    a.left = o.window_left < 0 ? kNoLimit : o.window_left;
    a.right = o.window_right < 0 ? kNoLimit : o.window_right;
    a.causal = o.causal != kNotCausal;
    if (a.causal && a.right > 0) a.right = 0;
    if (o.global_keys) set_global_keys(*o.global_keys);
    if (o.rel_h) set_decomposed_bias(*o.rel_h, *o.rel_w);
  }

  void set_global_keys(const Tensor& keys) {
    const bool shared = keys.dim() == 1;
    const int64_t count = keys.size(-1);
    global_begin.push_back(0);
    for (int64_t b = 0; b < a.batch; ++b) {
      const std::vector<int64_t> row = integers(shared ? keys : torch::stable::select(keys, 0, b), "global_keys");
      for (int64_t n = 0; n < count; ++n) {
        STD_TORCH_CHECK(-1 <= row[n] && row[n] < a.seqlen_k, "xformer_fast: global_keys[", shared ? "" : std::to_string(b) + ", ",
                        n, "] is ", row[n], ", must lie in 0..", a.seqlen_k - 1, ", or be -1 for no key");
        if (0 <= row[n] && row[n] < a.key_limit(b)) global_keys.push_back(row[n]);
      }
      std::sort(global_keys.begin() + global_begin[b], global_keys.end());
      global_keys.erase(std::unique(global_keys.begin() + global_begin[b], global_keys.end()), global_keys.end());
      global_begin.push_back(static_cast<int64_t>(global_keys.size()));
    }
    const bool window = a.left < kNoLimit || (a.right < kNoLimit && !a.causal);
    if (!window || global_keys.empty()) return;
    a.global_keys = global_keys.data();
    a.global_begin = global_begin.data();
  }

  void set_decomposed_bias(const Tensor& h, const Tensor& w) {
    float_data(h, "rel_h"), float_data(w, "rel_w");
    rel_h = with_unit_rows(h), rel_w = with_unit_rows(w);
    a.row_bias = view_of(*rel_h), a.column_bias = view_of(*rel_w);
    a.map_rows = h.size(3), a.map_columns = w.size(3);
    STD_TORCH_CHECK(a.map_rows * a.map_columns == a.seqlen_k, "xformer_fast: rel_h and rel_w must span the keys");
  }

  void set_distance_bias(const Tensor& bias, const Options& o) {
    STD_TORCH_CHECK(bias.is_contiguous(), "xformer_fast: distance_bias must be contiguous");
    const int64_t count = std::max<int64_t>(o.max_seqlen_q + o.max_seqlen_k - 1, 0);
    STD_TORCH_CHECK(bias.size(1) == count, "xformer_fast: distance_bias must have ", count, " columns");
    a.distance_bias = float_data(bias, "distance_bias");
    a.distance_head = a.distance_count = count;
    a.distance_offset = (o.causal == kTopLeft ? o.max_seqlen_q : o.max_seqlen_k) - 1;
    a.lag_head = count + 2 * kLagPadding;
    a.lag_offset = kLagPadding + count - 1 - a.distance_offset;
    lag_bias.assign(static_cast<size_t>(a.heads_q * a.lag_head), 0.f);
    for (int64_t h = 0; h < a.heads_q; ++h)
      std::reverse_copy(a.distance_bias + h * count, a.distance_bias + (h + 1) * count,
                        lag_bias.begin() + h * a.lag_head + kLagPadding);
    a.lag_bias = lag_bias.data();
  }

  void set_results(const Tensor& out, const Tensor& lse) {
    a.out = view_of(out);
    a.lse = static_cast<float*>(lse.data_ptr());
    a.lse_error = a.lse + lse.stride(0);
    a.lse_batch = lse.dim() == 3 ? 0 : lse.stride(1);
    a.lse_head = lse.stride(lse.dim() - 2);
  }

  double work() const {  // multiply-adds, an upper bound
    const int64_t window = std::min(a.seqlen_k, a.left >= kNoLimit ? a.seqlen_k : a.left + std::min(a.right, a.seqlen_k) + 1);
    const double keys = static_cast<double>(window + static_cast<int64_t>(global_keys.size()) / std::max<int64_t>(a.batch, 1));
    return static_cast<double>(a.batch * a.heads_q) * static_cast<double>(a.seqlen_q) * keys * static_cast<double>(a.head_dim + a.head_dim_v);
  }
};

std::tuple<Tensor, Tensor, Tensor> forward(Tensor query, Tensor key, Tensor value, OptionalTensor mask, OptionalTensor key_lengths,
                                   OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k, OptionalTensor alibi_slopes,
                                   OptionalTensor distance_bias, OptionalTensor sinks, OptionalTensor dropout_seed,
                                   OptionalTensor global_keys, OptionalTensor rel_h, OptionalTensor rel_w,
                                   int64_t max_seqlen_q, int64_t max_seqlen_k, double scale, double softcap, double dropout_p, int64_t causal, int64_t window_left,
                                   int64_t window_right, bool save_residual, bool exact_weights) {
  Prepared p(query, key, value,
             {mask, key_lengths, cu_seqlens_q, cu_seqlens_k, alibi_slopes, distance_bias, sinks, dropout_seed,
              global_keys, rel_h, rel_w, max_seqlen_q, max_seqlen_k, scale, softcap, dropout_p, causal, window_left, window_right});
  Tensor out = empty_in_order_of(query, p.a.head_dim_v);
  Tensor lse = query.dim() == 3
                   ? empty_floats(query, {2, query.size(1), query.size(0)})
                   : empty_floats(query, {2, query.size(0), query.size(1), query.size(2)});
  save_residual = save_residual && query.scalar_type() != ScalarType::Float;
  Tensor residual = save_residual ? empty_in_order_of(query, p.a.head_dim_v) : empty_as(query, {0});
  if (lse.numel() > 0) {
    p.set_results(out, lse);
    if (residual.numel() > 0) p.a.residual = view_of(residual);
    p.a.exact_weights = exact_weights;
    Call call(p.work());
    XF_KERNELS(attention_kernels).forward(p.a, call.pool());
  }
  return {out, lse, residual};
}

// AttentionGrad with what every call has, and the tensors that its pointers point into.
struct PreparedGrad {
  AttentionGrad g{};
  Tensor d_query, d_key, d_value, grad_out, out, lse;
  OptionalTensor grad_lse;

  PreparedGrad(Prepared& p, const Tensor& d_out, const OptionalTensor& d_lse, const Tensor& query, const Tensor& key,
               const Tensor& value, const Tensor& o, const Tensor& l)
      : d_query(empty_in_order_of(query, p.a.head_dim)),
        d_key(empty_in_order_of(key, p.a.head_dim)),
        d_value(empty_in_order_of(value, p.a.head_dim_v)),
        grad_out(with_unit_rows(d_out)),
        out(with_unit_rows(o)),
        lse(as_contiguous(l)) {
    check_type_of(d_out, query, "grad_out");
    p.set_results(out, lse);
    g.grad_out = view_of(grad_out);
    if (d_lse) {
      grad_lse = as_contiguous(*d_lse);
      g.grad_lse = float_data(*grad_lse, "grad_lse");
    }
    g.grad_query = view_of(d_query);
    g.grad_key = view_of(d_key);
    g.grad_value = view_of(d_value);
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    Tensor grad_out, OptionalTensor grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, Tensor residual,
    OptionalTensor mask, OptionalTensor key_lengths, OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k,
    OptionalTensor alibi_slopes, OptionalTensor distance_bias, OptionalTensor sinks, OptionalTensor dropout_seed,
    OptionalTensor global_keys, OptionalTensor rel_h, OptionalTensor rel_w, int64_t max_seqlen_q, int64_t max_seqlen_k,
    double scale, double softcap, double dropout_p, int64_t causal, int64_t window_left, int64_t window_right, bool need_mask_grad,
    bool need_alibi_grad, bool need_distance_grad, bool need_sinks_grad, bool need_decomposed_grad) {
  Prepared p(query, key, value,
             {mask, key_lengths, cu_seqlens_q, cu_seqlens_k, alibi_slopes, distance_bias, sinks, dropout_seed,
              global_keys, rel_h, rel_w, max_seqlen_q, max_seqlen_k, scale, softcap, dropout_p, causal, window_left, window_right});
  const Attention& a = p.a;
  PreparedGrad grad(p, grad_out, grad_lse, query, key, value, out, lse);
  auto none = [&] { return empty_floats(query, {0}); };  // results may not share memory
  Tensor d_mask = need_mask_grad ? empty_floats(query, {mask->size(0), mask->size(1), mask->size(2), mask->size(3)})
                                 : none();
  Tensor d_alibi = need_alibi_grad ? empty_floats(query, {a.batch, a.heads_q}) : none();
  Tensor d_distance =
      need_distance_grad ? empty_floats(query, {a.heads_q, a.distance_count}) : none();
  Tensor d_sinks = need_sinks_grad ? empty_floats(query, {a.batch, a.heads_q}) : none();
  auto like_queries = [&](int64_t last) { return empty_floats(query, {a.batch, a.heads_q, a.seqlen_q, last}); };
  Tensor d_rel_h = need_decomposed_grad ? like_queries(a.map_rows) : none();
  Tensor d_rel_w = need_decomposed_grad ? like_queries(a.map_columns) : none();
  if (lse.numel() == 0) {  // no query: nothing flows back
    for (Tensor* t : {&grad.d_key, &grad.d_value, &d_mask, &d_alibi, &d_distance, &d_sinks}) torch::stable::zero_(*t);
  } else {
    const Tensor e = with_unit_rows(residual);
    if (e.numel() > 0) p.a.residual = view_of(e);
    AttentionGrad& g = grad.g;
    if (need_mask_grad) {
      g.grad_mask = static_cast<float*>(d_mask.data_ptr());
      auto stride = [&](int64_t dim) { return d_mask.size(dim) == 1 ? 0 : d_mask.stride(dim); };
      g.grad_mask_batch = stride(0), g.grad_mask_head = stride(1), g.grad_mask_q = stride(2), g.grad_mask_k = stride(3);
    }
    if (need_alibi_grad) g.grad_alibi_slopes = static_cast<float*>(d_alibi.data_ptr());
    if (need_distance_grad) g.grad_distance = static_cast<float*>(d_distance.data_ptr());
    if (need_sinks_grad) g.grad_sinks = static_cast<float*>(d_sinks.data_ptr());
    if (need_decomposed_grad) {
      g.grad_row_bias = static_cast<float*>(d_rel_h.data_ptr());
      g.grad_column_bias = static_cast<float*>(d_rel_w.data_ptr());
    }
    Call call(2.5 * p.work());
    XF_KERNELS(attention_kernels).backward(a, g, call.pool());
  }
  if (need_mask_grad && mask->scalar_type() != ScalarType::Float) d_mask = torch::stable::to(d_mask, mask->scalar_type());
  const std::vector<int64_t> batch_axis{0};
  if (need_alibi_grad && alibi_slopes->dim() == 1) d_alibi = torch::stable::sum(d_alibi, batch_axis);
  if (need_sinks_grad) d_sinks = torch::stable::sum(d_sinks, batch_axis);
  return {grad.d_query, grad.d_key, grad.d_value, d_mask, d_alibi, d_distance, d_sinks, d_rel_h, d_rel_w};
}

// Calls without options: `forward` and `backward` with nothing but what they need.
Options plain_options(double scale, int64_t causal) {
  Options options{};
  options.scale = scale, options.causal = causal, options.window_left = options.window_right = -1;
  return options;
}

std::tuple<Tensor, Tensor> plain_forward(Tensor query, Tensor key, Tensor value, double scale, int64_t causal) {
  Prepared p(query, key, value, plain_options(scale, causal));
  Tensor out = empty_in_order_of(query, p.a.head_dim_v);
  Tensor lse = empty_floats(query, {2, p.a.batch, p.a.heads_q, p.a.seqlen_q});
  if (lse.numel() > 0) {
    p.set_results(out, lse);
    Call call(p.work());
    XF_KERNELS(attention_kernels).forward(p.a, call.pool());
  }
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> plain_backward(Tensor grad_out, OptionalTensor grad_lse, Tensor query, Tensor key, Tensor value,
                                                  Tensor out, Tensor lse, double scale, int64_t causal) {
  Prepared p(query, key, value, plain_options(scale, causal));
  PreparedGrad grad(p, grad_out, grad_lse, query, key, value, out, lse);
  if (lse.numel() == 0) {
    torch::stable::zero_(grad.d_key), torch::stable::zero_(grad.d_value);
  } else {
    Call call(2.5 * p.work());
    XF_KERNELS(attention_kernels).backward(p.a, grad.g, call.pool());
  }
  return {grad.d_query, grad.d_key, grad.d_value};
}

#define XFORMER_FAST_ATTENTION_OPTIONS                                                                                    \
  "Tensor? mask, Tensor? key_lengths, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? alibi_slopes, "                 \
  "Tensor? distance_bias, Tensor? sinks, Tensor? dropout_seed, Tensor? global_keys, Tensor? rel_h, Tensor? rel_w, "       \
  "SymInt max_seqlen_q, SymInt max_seqlen_k, float scale, float softcap, float dropout_p, int causal, "                   \
  "SymInt window_left, SymInt window_right"

}  // namespace
}  // namespace xformer_fast

STABLE_TORCH_LIBRARY_FRAGMENT(xformer_fast, m) {
  m.def("attention_cpu(Tensor query, Tensor key, Tensor value, " XFORMER_FAST_ATTENTION_OPTIONS
        ", bool save_residual, bool exact_weights) -> (Tensor, Tensor, Tensor)");
  m.def(
      "attention_cpu_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, "
      "Tensor lse, Tensor residual, " XFORMER_FAST_ATTENTION_OPTIONS
      ", bool need_mask_grad, bool need_alibi_grad, bool need_distance_grad, bool need_sinks_grad, "
      "bool need_decomposed_grad) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("attention_cpu_plain(Tensor query, Tensor key, Tensor value, float scale, int causal) -> (Tensor, Tensor)");
  m.def(
      "attention_cpu_plain_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, "
      "Tensor lse, float scale, int causal) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(xformer_fast, CPU, m) {
  m.impl("attention_cpu", TORCH_BOX(&xformer_fast::forward));
  m.impl("attention_cpu_backward", TORCH_BOX(&xformer_fast::backward));
  m.impl("attention_cpu_plain", TORCH_BOX(&xformer_fast::plain_forward));
  m.impl("attention_cpu_plain_backward", TORCH_BOX(&xformer_fast::plain_backward));
}
