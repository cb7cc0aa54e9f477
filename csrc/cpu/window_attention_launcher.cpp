// The operators xformer_fast::window_attention_cpu and window_attention_cpu_backward: schema, tensors to raw pointers.
// Shapes, dtypes and options were checked by the public function.
#include "map_launch.h"
#include "window.h"

namespace xformer_fast {
namespace {

// The call, with the contiguous copies that its pointers may need.
struct Prepared {
  WindowAttention a;
  Tensor query, key, value;

  Prepared(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& table, const OptionalTensor& bias,
           const OptionalTensor& logit_scale, const Sizes& window, const Sizes& shift, bool grid, double scale)
      : query(with_unit_rows(q)), key(with_unit_rows(k)), value(with_unit_rows(v)) {
    const int64_t axes = q.dim() - 3;
    STD_TORCH_CHECK(1 <= axes && axes <= kMaxAxes && static_cast<int64_t>(window.size()) == axes &&
                        static_cast<int64_t>(shift.size()) == axes,
                    "xformer_fast: window_attention: query must be (B, *space, H, D) with one window side and shift an axis");
    a.element = element_of(q, "query");
    check_type_of(k, q, "key");
    check_type_of(v, q, "value");
    a.batch = q.size(0);
    a.heads = q.size(axes + 1);
    a.head_dim = q.size(axes + 2);
    a.head_dim_v = v.size(axes + 2);
    for (int x = 0; x < kMaxAxes; ++x) a.side[x] = a.window[x] = 1, a.shift[x] = 0;
    int64_t tokens = 1, rows = 1;
    for (int64_t x = 0; x < axes; ++x) {
      const int64_t at = kMaxAxes - axes + x, side = q.size(x + 1);
      STD_TORCH_CHECK(window[x] >= 1 && side % window[x] == 0 && 0 <= shift[x] && shift[x] < window[x],
                      "xformer_fast: window_attention: window_size must divide each side, shift lie in 0..window_size - 1");
      a.side[at] = side;
      a.window[at] = window[x];
      a.shift[at] = shift[x];
      tokens *= window[x];
      rows *= 2 * window[x] - 1;
    }
    a.grid = grid;
    a.scale = static_cast<float>(scale);
    a.query = map_view(query);
    a.key = map_view(key);
    a.value = map_view(value);
    a.table = pointer(table, rows * a.heads, "relative_bias_table");
    a.bias = pointer(bias, a.heads * tokens * tokens, "bias");
    a.logit_scale = pointer(logit_scale, a.heads, "logit_scale");
  }

  double work(int64_t products) const {
    double n = static_cast<double>(a.window[0] * a.window[1] * a.window[2]);
    return n * static_cast<double>(query.numel() / (a.head_dim ? a.head_dim : 1)) *
           static_cast<double>((a.head_dim + a.head_dim_v) * products) / 2;
  }

 private:
  static const float* pointer(const OptionalTensor& t, int64_t numel, const char* name) {
    if (!t) return nullptr;
    STD_TORCH_CHECK(t->is_contiguous() && t->numel() == numel, "xformer_fast: ", name, " must be contiguous, of ", numel,
                    " numbers");
    return float_data(*t, name);
  }
};

Tensor forward(Tensor query, Tensor key, Tensor value, OptionalTensor table, OptionalTensor bias, OptionalTensor logit_scale,
               Sizes window, Sizes shift, bool grid, double scale) {
  Prepared p(query, key, value, table, bias, logit_scale, window, shift, grid, scale);
  Tensor out = empty_map_in_order_of(query, p.a.head_dim_v);
  if (out.numel() == 0) return out;
  prefer_huge_pages(out);
  p.a.out = map_view(out);
  Call call(p.work(2));
  XF_KERNELS(window_attention_kernels).forward(p.a, call.pool());
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    Tensor grad_out, Tensor query, Tensor key, Tensor value, OptionalTensor table, OptionalTensor bias,
    OptionalTensor logit_scale, Sizes window, Sizes shift, bool grid, double scale, bool need_table_grad, bool need_bias_grad, bool need_scale_grad) {
  Prepared p(query, key, value, table, bias, logit_scale, window, shift, grid, scale);
  check_type_of(grad_out, query, "grad_out");
  const Tensor d_out = with_unit_rows(grad_out);
  Tensor d_query = empty_map_in_order_of(query, p.a.head_dim), d_key = empty_map_in_order_of(key, p.a.head_dim),
         d_value = empty_map_in_order_of(value, p.a.head_dim_v);
  const auto zeros_like = [&](const OptionalTensor& t, bool wanted) {
    Tensor g = wanted ? empty_as(*t, Sizes(t->sizes().begin(), t->sizes().end()))
                      : empty_floats(query, {0});
    return torch::stable::fill_(g, 0.0);
  };
  Tensor d_table = zeros_like(table, need_table_grad), d_bias = zeros_like(bias, need_bias_grad),
         d_scale = zeros_like(logit_scale, need_scale_grad);
  if (d_query.numel() > 0) {
    WindowAttentionGrad g;
    for (const Tensor& t : {d_query, d_key, d_value}) prefer_huge_pages(t);
    g.grad_out = map_view(d_out);
    g.grad_query = map_view(d_query);
    g.grad_key = map_view(d_key);
    g.grad_value = map_view(d_value);
    if (need_table_grad) g.grad_table = static_cast<float*>(d_table.data_ptr());
    if (need_bias_grad) g.grad_bias = static_cast<float*>(d_bias.data_ptr());
    if (need_scale_grad) g.grad_logit_scale = static_cast<float*>(d_scale.data_ptr());
    Call call(p.work(5));
    XF_KERNELS(window_attention_kernels).backward(p.a, g, call.pool());
  }
  return {d_query, d_key, d_value, d_table, d_bias, d_scale};
}

}  // namespace
}  // namespace xformer_fast

#define XFORMER_FAST_WINDOW_OPTIONS                                                                             \
  "Tensor query, Tensor key, Tensor value, Tensor? table, Tensor? bias, Tensor? logit_scale, int[] window, " \
  "int[] shift, bool grid, float scale"

STABLE_TORCH_LIBRARY_FRAGMENT(xformer_fast, m) {
  m.def("window_attention_cpu(" XFORMER_FAST_WINDOW_OPTIONS ") -> Tensor");
  m.def("window_attention_cpu_backward(Tensor grad_out, " XFORMER_FAST_WINDOW_OPTIONS
        ", bool need_table_grad, bool need_bias_grad, bool need_scale_grad) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(xformer_fast, CPU, m) {
  m.impl("window_attention_cpu", TORCH_BOX(&xformer_fast::forward));
  m.impl("window_attention_cpu_backward", TORCH_BOX(&xformer_fast::backward));
}
