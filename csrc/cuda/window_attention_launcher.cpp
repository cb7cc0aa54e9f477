// The operators xformer_fast::window_attention_cuda and window_attention_cuda_backward: schema, tensors to raw pointers, the cut of
// the windows over blocks. Shapes, dtypes and options were checked by the public function.
#include <algorithm>

#include "launch.h"
#include "window_attention.h"

namespace xformer_fast {
namespace {

using Sizes = std::vector<int64_t>;

constexpr int64_t kBlocksOfMultiprocessor = 8;
constexpr int64_t kMostShareNumbers = int64_t(1) << 24;  // of the biases' gradients, in all blocks

// (B, *space, H, last) in the memory order of `like`: heads inside the map's axes, or outside.
Tensor empty_map_in_order_of(const Tensor& like, int64_t last) {
  const int64_t axes = like.dim() - 3;
  Sizes shape;
  for (int64_t i = 0; i < like.dim() - 1; ++i) shape.push_back(like.size(i));
  shape.push_back(last);
  if (like.stride(axes + 1) <= like.stride(1)) return torch::stable::new_empty(like, shape);
  for (int64_t i = axes + 1; i > 1; --i) std::swap(shape[i], shape[i - 1]);
  Tensor out = torch::stable::new_empty(like, shape);
  for (int64_t i = 1; i <= axes; ++i) out = torch::stable::transpose(out, i, i + 1);
  return out;
}

// The call, with the copies that its pointers may need.
class Prepared {
 public:
  CudaCall call;
  CudaWindowAttention a{};

  Prepared(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& table, const OptionalTensor& bias,
           const OptionalTensor& logit_scale, const Sizes& window, const Sizes& shift, bool grid, double scale, bool of_pairs)
      : call(q), query_(with_unit_rows(q)), key_(with_unit_rows(k)), value_(with_unit_rows(v)) {
    const int64_t axes = q.dim() - 3;
    STD_TORCH_CHECK(1 <= axes && axes <= kMaxAxes && static_cast<int64_t>(window.size()) == axes &&
                        static_cast<int64_t>(shift.size()) == axes,
                    "xformer_fast: window_attention: query must be (B, *space, H, D) with one window side and shift an axis");
    a.element = element_of(q, "query");
    a.batch = q.size(0);
    a.heads = q.size(axes + 1);
    a.head_dim = q.size(axes + 2);
    a.head_dim_v = v.size(axes + 2);
    a.tokens = a.table_rows = 1;
    a.windows = a.batch;
    for (int x = 0; x < kMaxAxes; ++x) a.side[x] = a.window[x] = 1, a.shift[x] = 0;
    for (int64_t x = 0; x < axes; ++x) {
      const int64_t at = kMaxAxes - axes + x, side = q.size(x + 1);
      STD_TORCH_CHECK(window[x] >= 1 && side % window[x] == 0 && 0 <= shift[x] && shift[x] < window[x],
                      "xformer_fast: window_attention: window_size must divide each side, shift lie in 0..window_size - 1");
      a.side[at] = side;
      a.window[at] = window[x];
      a.shift[at] = shift[x];
      a.tokens *= window[x];
      a.table_rows *= 2 * window[x] - 1;
      a.windows *= side / window[x];
    }
    const int64_t width = std::max(a.head_dim, a.head_dim_v);
    STD_TORCH_CHECK(width <= kMostWindowHeadDim && a.tokens <= kMostWindowTokens,
                    "xformer_fast: window_attention: the CUDA kernels take head dims to ", kMostWindowHeadDim, " and windows to ",
                    kMostWindowTokens, " tokens");
    a.grid = grid;
    a.scale = static_cast<float>(scale);
    a.query = map_view(query_), a.key = map_view(key_), a.value = map_view(value_);
    if (table) {
      table_ = torch::stable::contiguous(torch::stable::transpose(*table, 0, 1));
      a.table = call.floats(table_, "relative_bias_table");
    }
    if (bias) a.bias = contiguous(*bias, "bias");
    if (logit_scale) a.logit_scale = contiguous(*logit_scale, "logit_scale");

    a.together = std::max<int64_t>(1, window_tile_rows(a.element, width) / a.tokens);
    const int64_t groups = (a.windows + a.together - 1) / a.together, blocks = kBlocksOfMultiprocessor * call.multiprocessors();
    int64_t shares = std::max<int64_t>(1, std::min(groups, (blocks + a.heads - 1) / a.heads));
    if (of_pairs)
      shares = std::max<int64_t>(1, std::min(shares, kMostShareNumbers / (a.heads * a.together * a.tokens * a.tokens)));
    a.groups_of_share = (groups + shares - 1) / shares;
    a.shares = (groups + a.groups_of_share - 1) / std::max<int64_t>(a.groups_of_share, 1);
  }

  MapView map_view(const Tensor& t) {
    const int64_t axes = t.dim() - 3;
    MapView view;
    view.data = call.data<void>(t);
    view.batch = t.stride(0);
    view.head = t.stride(axes + 1);
    for (int64_t x = 0; x < axes; ++x) view.axis[kMaxAxes - axes + x] = t.stride(x + 1);
    return view;
  }

 private:
  const float* contiguous(const Tensor& t, const char* name) {
    STD_TORCH_CHECK(t.is_contiguous(), "xformer_fast: ", name, " must be contiguous");
    return call.floats(t, name);
  }

  Tensor query_, key_, value_, table_;
};

Tensor forward(Tensor query, Tensor key, Tensor value, OptionalTensor table, OptionalTensor bias, OptionalTensor logit_scale,
               Sizes window, Sizes shift, bool grid, double scale) {
  Prepared p(query, key, value, table, bias, logit_scale, window, shift, grid, scale, false);
  Tensor out = empty_map_in_order_of(query, p.a.head_dim_v);
  if (out.numel() == 0) return out;
  p.a.out = p.map_view(out);
  p.call.check(window_attention_forward_cuda(p.a, p.call.stream()));
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    Tensor grad_out, Tensor query, Tensor key, Tensor value, OptionalTensor table, OptionalTensor bias, OptionalTensor logit_scale,
    Sizes window, Sizes shift, bool grid, double scale, bool need_table, bool need_bias, bool need_scale) {
  Prepared p(query, key, value, table, bias, logit_scale, window, shift, grid, scale, need_table || need_bias);
  const CudaWindowAttention& a = p.a;
  const Tensor d_out = with_unit_rows(grad_out);
  Tensor d_query = empty_map_in_order_of(query, a.head_dim), d_key = empty_map_in_order_of(key, a.head_dim),
         d_value = empty_map_in_order_of(value, a.head_dim_v);
  auto zeros = [&](Sizes shape, bool wanted) {
    return torch::stable::new_zeros(query, wanted ? shape : Sizes{0}, ScalarType::Float);
  };
  Tensor d_table = zeros({a.table_rows, a.heads}, need_table), d_bias = zeros({a.heads, a.tokens, a.tokens}, need_bias);
  Tensor d_scale = zeros({a.heads}, need_scale);
  if (d_query.numel() == 0) return {d_query, d_key, d_value, d_table, d_bias, d_scale};

  const bool of_pairs = need_table || need_bias;
  const Tensor pair_shares = zeros({a.heads, a.shares, a.together, a.tokens, a.tokens}, of_pairs);
  const Tensor scale_shares = zeros({a.heads, a.shares}, need_scale);
  CudaWindowAttentionGrad g;
  g.grad_out = p.map_view(d_out);
  g.grad_query = p.map_view(d_query), g.grad_key = p.map_view(d_key), g.grad_value = p.map_view(d_value);
  if (of_pairs) g.pair_shares = p.call.data<float>(pair_shares);
  if (need_scale) g.scale_shares = p.call.data<float>(scale_shares);
  p.call.check(window_attention_backward_cuda(a, g, p.call.stream()));
  if (of_pairs) {
    const Tensor pairs = need_bias ? d_bias : zeros({a.heads, a.tokens, a.tokens}, true);
    const CudaWindowPairs sums{a.heads, a.shares * a.together, a.tokens, a.table_rows, {a.window[0], a.window[1], a.window[2]},
                               g.pair_shares, p.call.data<float>(pairs), need_table ? p.call.data<float>(d_table) : nullptr};
    p.call.check(window_pairs_cuda(sums, p.call.stream()));
  }
  const Sizes axis{1};
  if (need_scale) d_scale = torch::stable::sum(scale_shares, axis);
  return {d_query, d_key, d_value, d_table, d_bias, d_scale};
}

}  // namespace
}  // namespace xformer_fast

#define XFORMER_FAST_WINDOW_OPTIONS                                                                             \
  "Tensor query, Tensor key, Tensor value, Tensor? table, Tensor? bias, Tensor? logit_scale, int[] window, " \
  "int[] shift, bool grid, float scale"

STABLE_TORCH_LIBRARY_FRAGMENT(xformer_fast, m) {
  m.def("window_attention_cuda(" XFORMER_FAST_WINDOW_OPTIONS ") -> Tensor");
  m.def("window_attention_cuda_backward(Tensor grad_out, " XFORMER_FAST_WINDOW_OPTIONS
        ", bool need_table_grad, bool need_bias_grad, bool need_scale_grad) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(xformer_fast, XFORMER_FAST_DEVICE_KEY, m) {
  m.impl("window_attention_cuda", TORCH_BOX(&xformer_fast::forward));
  m.impl("window_attention_cuda_backward", TORCH_BOX(&xformer_fast::backward));
}
