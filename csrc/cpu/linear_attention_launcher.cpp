// The operators xformer_fast::linear_attention_cpu and linear_attention_cpu_backward: schema, value checks, tensors to raw
// pointers. Shapes, dtypes and option types were checked by the public function; values are checked here.
#include "launch.h"
#include "linear_attention.h"

namespace xformer_fast {
namespace {

struct Options {
  OptionalTensor key_lengths, cu_seqlens, decay, initial_kv, initial_z;
  int64_t feature_map;
  bool causal, normalize;
  double eps, scale;
};

const float* contiguous_data(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_contiguous(), "xformer_fast: ", name, " must be contiguous");
  return float_data(t, name);
}

// LinearAttention plus the tensors and vectors its pointers point into.
struct Prepared {
  LinearAttention a{};
  Tensor query, key, value;
  std::vector<int64_t> offsets, lengths;

  Prepared(const Tensor& q, const Tensor& k, const Tensor& v, const Options& o)
      : query(with_unit_rows(q)), key(with_unit_rows(k)), value(with_unit_rows(v)) {
    a.element = element_of(q, "query");
    check_type_of(k, q, "key");
    check_type_of(v, q, "value");
    a.map = static_cast<FeatureMap>(o.feature_map);
    a.heads_q = q.size(1);
    a.heads_kv = k.size(1);
    a.head_dim = q.size(-1);
    a.head_dim_v = v.size(-1);
    a.query = view_of(query);
    a.key = view_of(key);
    a.value = view_of(value);
    if (q.dim() == 3) {
      offsets = integers(*o.cu_seqlens, "cu_seqlens");
      STD_TORCH_CHECK(!offsets.empty() && offsets.front() == 0, "xformer_fast: cu_seqlens must start at 0");
      for (size_t i = 1; i < offsets.size(); ++i) {
        STD_TORCH_CHECK(offsets[i - 1] <= offsets[i], "xformer_fast: cu_seqlens must not decrease, but entry ", i, " is ",
                        offsets[i], " after ", offsets[i - 1]);
        a.seqlen_q = std::max(a.seqlen_q, offsets[i] - offsets[i - 1]);
      }
      STD_TORCH_CHECK(offsets.back() == q.size(0), "xformer_fast: cu_seqlens must end at the number of packed rows, ",
                      q.size(0), ", but ends at ", offsets.back());
      a.batch = static_cast<int64_t>(offsets.size()) - 1;
      a.cu_seqlens = offsets.data();
      a.seqlen_k = a.seqlen_q;
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
    if (o.decay) {
      a.decay = contiguous_data(*o.decay, "decay");
      for (int64_t h = 0; h < a.heads_q; ++h)
        STD_TORCH_CHECK(a.decay[h] > 0.f && a.decay[h] <= 1.f, "xformer_fast: decay[", h, "] is ", a.decay[h], ", must lie in (0, 1]");
    }
    if (o.initial_kv) {
      a.initial_kv = contiguous_data(*o.initial_kv, "initial_state");
      a.initial_z = contiguous_data(*o.initial_z, "initial_state");
    }
    a.causal = o.causal;
    a.normalize = o.normalize;
    a.scale = static_cast<float>(o.scale);
    a.eps = static_cast<float>(o.eps);
  }

  void set_results(const Tensor& out, const Tensor& denominator) {
    a.out = view_of(out);
    a.denominator = static_cast<float*>(denominator.data_ptr());
    a.denominator_batch = denominator.dim() == 2 ? 0 : denominator.stride(0);
    a.denominator_head = denominator.stride(denominator.dim() - 2);
  }

  double work() const {  // multiply-adds, about
    return static_cast<double>(a.batch * a.heads_q) * static_cast<double>(a.seqlen_q + a.seqlen_k) *
           static_cast<double>(a.head_dim * a.head_dim_v);
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_forward(Tensor query, Tensor key, Tensor value, OptionalTensor key_lengths,
                                                   OptionalTensor cu_seqlens, OptionalTensor decay, OptionalTensor initial_kv,
                                                   OptionalTensor initial_z, int64_t feature_map, bool causal, bool normalize,
                                                   double eps, double scale, bool return_state) {
  Prepared p(query, key, value,
             {key_lengths, cu_seqlens, decay, initial_kv, initial_z, feature_map, causal, normalize, eps, scale});
  LinearAttention& a = p.a;
  auto floats = [&](std::initializer_list<int64_t> shape) { return empty_floats(query, shape); };
  Tensor out = empty_in_order_of(query, a.head_dim_v);
  Tensor denominator = query.dim() == 3 ? floats({query.size(1), query.size(0)}) : floats({query.size(0), query.size(1), query.size(2)});
  Tensor kv = return_state ? floats({a.batch, a.heads_q, a.head_dim, a.head_dim_v}) : floats({0});
  Tensor z = return_state ? floats({a.batch, a.heads_q, a.head_dim}) : floats({0});
  p.set_results(out, denominator);
  if (return_state) a.final_kv = static_cast<float*>(kv.data_ptr()), a.final_z = static_cast<float*>(z.data_ptr());
  if (a.batch > 0) {
    Call call(p.work());
    XF_KERNELS(linear_attention_kernels).forward(a, call.pool());
  }
  return {out, kv, z, denominator};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_backward(
    Tensor grad_out, OptionalTensor grad_kv, OptionalTensor grad_z, Tensor query, Tensor key, Tensor value, Tensor out,
    Tensor denominator, OptionalTensor key_lengths, OptionalTensor cu_seqlens, OptionalTensor decay, OptionalTensor initial_kv,
    OptionalTensor initial_z, int64_t feature_map, bool causal, bool normalize, double eps, double scale, bool need_decay,
    bool need_initial) {
  Prepared p(query, key, value,
             {key_lengths, cu_seqlens, decay, initial_kv, initial_z, feature_map, causal, normalize, eps, scale});
  LinearAttention& a = p.a;
  auto floats = [&](std::initializer_list<int64_t> shape) { return empty_floats(query, shape); };
  Tensor d_query = empty_in_order_of(query, a.head_dim);
  Tensor d_key = empty_in_order_of(key, a.head_dim);
  Tensor d_value = empty_in_order_of(value, a.head_dim_v);
  Tensor d_decay = need_decay ? floats({a.batch, a.heads_q}) : floats({0});
  Tensor d_kv = need_initial ? floats({a.batch, a.heads_q, a.head_dim, a.head_dim_v}) : floats({0});
  Tensor d_z = need_initial ? floats({a.batch, a.heads_q, a.head_dim}) : floats({0});
  check_type_of(grad_out, query, "grad_out");
  Tensor d_out = with_unit_rows(grad_out), o = with_unit_rows(out);
  OptionalTensor g_kv, g_z;
  if (grad_kv) g_kv = torch::stable::contiguous(*grad_kv);
  if (grad_z) g_z = torch::stable::contiguous(*grad_z);
  p.set_results(o, denominator);
  LinearAttentionGrad g;
  g.grad_out = view_of(d_out);
  if (g_kv) g.grad_final_kv = float_data(*g_kv, "the state's gradient");
  if (g_z) g.grad_final_z = float_data(*g_z, "the state's gradient");
  g.grad_query = view_of(d_query);
  g.grad_key = view_of(d_key);
  g.grad_value = view_of(d_value);
  if (need_decay) g.grad_decay = static_cast<float*>(d_decay.data_ptr());
  if (need_initial) g.grad_initial_kv = static_cast<float*>(d_kv.data_ptr()), g.grad_initial_z = static_cast<float*>(d_z.data_ptr());
  if (a.batch > 0) {
    Call call(3 * p.work());
    XF_KERNELS(linear_attention_kernels).backward(a, g, call.pool());
  }
  const std::vector<int64_t> batch_axis{0};
  if (need_decay) d_decay = torch::stable::sum(d_decay, batch_axis);
  return {d_query, d_key, d_value, d_decay, d_kv, d_z};
}

#define XFORMER_FAST_LINEAR_ATTENTION_OPTIONS                                                                          \
  "Tensor? key_lengths, Tensor? cu_seqlens, Tensor? decay, Tensor? initial_kv, Tensor? initial_z, int feature_map, "   \
  "bool causal, bool normalize, float eps, float scale"

}  // namespace
}  // namespace xformer_fast

STABLE_TORCH_LIBRARY_FRAGMENT(xformer_fast, m) {
  m.def("linear_attention_cpu(Tensor query, Tensor key, Tensor value, " XFORMER_FAST_LINEAR_ATTENTION_OPTIONS
        ", bool return_state) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "linear_attention_cpu_backward(Tensor grad_out, Tensor? grad_kv, Tensor? grad_z, Tensor query, Tensor key, Tensor value, "
      "Tensor out, Tensor denominator, " XFORMER_FAST_LINEAR_ATTENTION_OPTIONS
      ", bool need_decay_grad, bool need_state_grad) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(xformer_fast, CPU, m) {
  m.impl("linear_attention_cpu", TORCH_BOX(&xformer_fast::linear_forward));
  m.impl("linear_attention_cpu_backward", TORCH_BOX(&xformer_fast::linear_backward));
}
