// The operators xformer_fast::neighborhood_attention_cpu and neighborhood_attention_cpu_backward: schema, tensors to raw
// pointers. Shapes, dtypes and options were checked by the public function.
#include "map_launch.h"
#include "neighborhood.h"

namespace xformer_fast {
namespace {

// The call, with the contiguous copies that its pointers may need.
struct Prepared {
  NeighborhoodAttention a;
  Tensor query, key, value;

  Prepared(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& table, const Sizes& kernel,
           const Sizes& dilation, const Sizes& causal, double scale)
      : query(with_unit_rows(q)), key(with_unit_rows(k)), value(with_unit_rows(v)) {
    const int64_t axes = q.dim() - 3;
    const auto one_an_axis = [axes](const Sizes& sizes) { return static_cast<int64_t>(sizes.size()) == axes; };
    STD_TORCH_CHECK(1 <= axes && axes <= kMaxAxes && one_an_axis(kernel) && one_an_axis(dilation) && one_an_axis(causal),
                    "xformer_fast: neighborhood_attention: query must be (B, *space, H, D) with one kernel, dilation and "
                    "causal an axis");
    a.element = element_of(q, "query");
    check_type_of(k, q, "key");
    check_type_of(v, q, "value");
    a.batch = q.size(0);
    a.heads = q.size(axes + 1);
    a.heads_kv = k.size(axes + 1);
    a.head_dim = q.size(axes + 2);
    a.head_dim_v = v.size(axes + 2);
    STD_TORCH_CHECK(k.dim() == q.dim() && v.dim() == q.dim() && k.size(axes + 2) == a.head_dim &&
                        v.size(axes + 1) == a.heads_kv && a.heads_kv > 0 && a.heads % a.heads_kv == 0 && a.head_dim > 0 &&
                        a.head_dim_v > 0 && k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(),
                    "xformer_fast: neighborhood_attention: key and value must fit query");
    for (int x = 0; x < kMaxAxes; ++x) a.side[x] = a.kernel[x] = a.dilation[x] = 1, a.causal[x] = false;
    int64_t rows = 1;
    for (int64_t i = 0; i < axes; ++i) {
      const int64_t x = kMaxAxes - axes + i, side = q.size(i + 1);
      STD_TORCH_CHECK(k.size(i + 1) == side && v.size(i + 1) == side && k.size(0) == a.batch && v.size(0) == a.batch,
                      "xformer_fast: neighborhood_attention: key and value must lie on query's map");
      STD_TORCH_CHECK(kernel[i] >= 1 && dilation[i] >= 1 && kernel[i] <= side / dilation[i],
                      "xformer_fast: neighborhood_attention: kernel_size * dilation must not exceed the map's side");
      a.side[x] = side;
      a.kernel[x] = kernel[i];
      a.dilation[x] = dilation[i];
      a.causal[x] = causal[i] != 0;
      rows *= 2 * kernel[i] - 1;
    }
    a.scale = static_cast<float>(scale);
    a.query = map_view(query);
    a.key = map_view(key);
    a.value = map_view(value);
    if (table) {
      STD_TORCH_CHECK(table->is_contiguous() && table->numel() == rows * a.heads,
                      "xformer_fast: relative_bias_table must be contiguous, of ", rows * a.heads, " numbers");
      a.table = float_data(*table, "relative_bias_table");
    }
  }

  double work(int64_t products) const {
    double kept = static_cast<double>(query.numel() / a.head_dim);
    for (int64_t kernel : a.kernel) kept *= static_cast<double>(kernel);
    return kept * static_cast<double>((a.head_dim + a.head_dim_v) * products) / 2;
  }
};

Tensor forward(Tensor query, Tensor key, Tensor value, OptionalTensor table, Sizes kernel, Sizes dilation, Sizes causal,
               double scale) {
  Prepared p(query, key, value, table, kernel, dilation, causal, scale);
  Tensor out = empty_map_in_order_of(query, p.a.head_dim_v);
  if (out.numel() == 0) return out;
  prefer_huge_pages(out);
  p.a.out = map_view(out);
  Call call(p.work(2));
  XF_KERNELS(neighborhood_attention_kernels).forward(p.a, call.pool());
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(Tensor grad_out, Tensor query, Tensor key, Tensor value,
                                                    OptionalTensor table, Sizes kernel, Sizes dilation, Sizes causal,
                                                    double scale, bool need_table_grad) {
  Prepared p(query, key, value, table, kernel, dilation, causal, scale);
  check_type_of(grad_out, query, "grad_out");
  const Tensor d_out = with_unit_rows(grad_out);
  Tensor d_query = empty_map_in_order_of(query, p.a.head_dim), d_key = empty_map_in_order_of(key, p.a.head_dim),
         d_value = empty_map_in_order_of(value, p.a.head_dim_v);
  Tensor d_table = need_table_grad ? empty_as(*table, Sizes(table->sizes().begin(), table->sizes().end()))
                                   : empty_floats(query, {0});
  if (d_query.numel() == 0) return {d_query, d_key, d_value, torch::stable::fill_(d_table, 0.0)};
  for (const Tensor& t : {d_query, d_key, d_value}) prefer_huge_pages(t);
  NeighborhoodAttentionGrad g;
  g.grad_out = map_view(d_out);
  g.grad_query = map_view(d_query);
  g.grad_key = map_view(d_key);
  g.grad_value = map_view(d_value);
  if (need_table_grad) g.grad_table = static_cast<float*>(d_table.data_ptr());
  Call call(p.work(7));
  XF_KERNELS(neighborhood_attention_kernels).backward(p.a, g, call.pool());
  return {d_query, d_key, d_value, d_table};
}

}  // namespace
}  // namespace xformer_fast

#define XFORMER_FAST_NEIGHBORHOOD_OPTIONS                                                                \
  "Tensor query, Tensor key, Tensor value, Tensor? table, int[] kernel, int[] dilation, int[] causal, " \
  "float scale"

STABLE_TORCH_LIBRARY_FRAGMENT(xformer_fast, m) {
  m.def("neighborhood_attention_cpu(" XFORMER_FAST_NEIGHBORHOOD_OPTIONS ") -> Tensor");
  m.def("neighborhood_attention_cpu_backward(Tensor grad_out, " XFORMER_FAST_NEIGHBORHOOD_OPTIONS
        ", bool need_table_grad) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(xformer_fast, CPU, m) {
  m.impl("neighborhood_attention_cpu", TORCH_BOX(&xformer_fast::forward));
  m.impl("neighborhood_attention_cpu_backward", TORCH_BOX(&xformer_fast::backward));
}
