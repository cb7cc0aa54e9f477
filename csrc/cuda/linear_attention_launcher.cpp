// The operators xformer_fast::linear_attention_cuda and linear_attention_cuda_backward: schema, tensors to raw pointers, the cut
// into segments. Shapes, dtypes and option types were checked by the public function; kernels hold lengths to the rows there are.
#include <algorithm>

#include "attention.h"
#include "launch.h"
#include "linear_attention.h"

namespace xformer_fast {
namespace {

constexpr int64_t kManyBlocks = 512;  // below it, sequences are cut
constexpr int64_t kLeastChunks = 4;   // of a segment

struct Options {
  OptionalTensor key_lengths, cu_seqlens, decay, initial_kv, initial_z;
  int64_t feature_map;
  bool causal, normalize;
  double eps, scale;
};

struct States {
  Tensor kv, z;
};

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What all walks of a call share.
class Problem {
 public:
  CudaCall call;
  CudaLinear walk{};
  int64_t streams;

  Problem(const Tensor& q, const Tensor& k, const Tensor& v, const Options& o)
      : call(q), query_(with_unit_rows(q)), key_(with_unit_rows(k)), value_(with_unit_rows(v)) {
    const bool packed = q.dim() == 3;
    walk.element = element_of(q, "query");
    walk.map = static_cast<FeatureMap>(o.feature_map);
    STD_TORCH_CHECK(walk.map != FeatureMap::softmax, "xformer_fast: the CUDA kernels do not have the softmax map");
    walk.heads_q = q.size(1), walk.heads_kv = k.size(1);
    walk.head_dim = q.size(-1), walk.head_dim_v = v.size(-1);
    STD_TORCH_CHECK(std::max(walk.head_dim, walk.head_dim_v) <= kMostHeadDim, "xformer_fast: head_dim is at most ", kMostHeadDim);
    walk.rows_q = q.size(packed ? 0 : 2), walk.rows_k = k.size(packed ? 0 : 2);
    walk.batch = packed ? o.cu_seqlens->size(0) - 1 : q.size(0);
    if (packed) walk.cu_seqlens = integers(offsets_, *o.cu_seqlens);
    if (o.key_lengths) walk.key_lengths = integers(lengths_, *o.key_lengths);
    if (o.decay) walk.decay = numbers(*o.decay, "decay");
    if (o.initial_kv) initial_ = States{*o.initial_kv, *o.initial_z};
    walk.causal = o.causal, walk.normalize = o.normalize;
    walk.scale = static_cast<float>(o.scale), walk.eps = static_cast<float>(o.eps);
    streams = walk.batch * walk.heads_q;
    tile_ = linear_tile(walk.element, std::max(walk.head_dim, walk.head_dim_v));
  }

  LinearOperand queries(bool mapped = true) { return {call.view(query_), walk.head_dim, false, mapped}; }
  LinearOperand keys(bool mapped = true) { return {call.view(key_), walk.head_dim, true, mapped}; }
  LinearOperand values() { return {call.view(value_), walk.head_dim_v, true, false}; }
  const std::optional<States>& initial() const { return initial_; }
  const float* numbers(const Tensor& t, const char* name) {
    STD_TORCH_CHECK(t.is_contiguous(), "xformer_fast: ", name, " must be contiguous");
    return call.floats(t, name);
  }

  // Positions that a causal walk meets, in whole chunks on both sides of position 0; else the rows given.
  int64_t positions(int64_t rows) const {
    return walk.causal ? divide_up(std::max<int64_t>(walk.rows_q - walk.rows_k, 0), tile_.chunk) * tile_.chunk + walk.rows_k : rows;
  }
  void cut(CudaLinear& w, int64_t rows) const {
    const int64_t chunks = std::max<int64_t>(1, divide_up(positions(rows), tile_.chunk));
    const int64_t blocks = streams * divide_up(std::max(walk.head_dim, walk.head_dim_v), tile_.columns);
    const int64_t segments = std::min(divide_up(kManyBlocks, std::max<int64_t>(blocks, 1)), std::max<int64_t>(1, chunks / kLeastChunks));
    w.segments = segments;
    w.chunks = divide_up(chunks, segments);
  }

  Tensor floats(std::initializer_list<int64_t> shape) const { return torch::stable::new_empty(query_, shape, ScalarType::Float); }
  States new_states(int64_t segments) const {
    return {floats({walk.batch, walk.heads_q, segments, walk.head_dim, walk.head_dim_v}), floats({walk.batch, walk.heads_q, segments, walk.head_dim})};
  }

  // The state of each segment of a walk as it starts, and the whole.
  std::pair<States, States> sums(CudaLinear w, const std::optional<States>& initial) {
    const States states = new_states(w.segments), whole = new_states(1);
    w.walk = LinearWalk::kState;
    w.transposed_state = true;
    w.start_kv = w.start_z = nullptr;
    w.sum_kv = call.data<float>(states.kv), w.sum_z = call.data<float>(states.z);
    call.check(linear_walk_cuda(w, call.stream()));
    const Tensor* pairs[2][3] = {{&states.kv, &whole.kv, initial ? &initial->kv : nullptr}, {&states.z, &whole.z, initial ? &initial->z : nullptr}};
    for (auto& [state, final, start] : pairs)
      call.check(linear_prefix_cuda({w, call.data<float>(*state), call.data<float>(*final), start ? numbers(*start, "a state") : nullptr,
                                     state == &states.kv ? walk.head_dim * walk.head_dim_v : walk.head_dim},
                                    call.stream()));
    return {states, whole};
  }
  void start_from(CudaLinear& w, const States& states) {
    w.start_kv = numbers(states.kv, "a state"), w.start_z = numbers(states.z, "a state");
  }

 private:
  const int64_t* integers(Tensor& kept, const Tensor& t) {
    kept = torch::stable::contiguous(as_int64(t));
    return call.data<int64_t>(kept);
  }

  Tensor query_, key_, value_, offsets_, lengths_;
  std::optional<States> initial_;
  LinearTile tile_;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(Tensor query, Tensor key, Tensor value, OptionalTensor key_lengths,
                                                   OptionalTensor cu_seqlens, OptionalTensor decay, OptionalTensor initial_kv,
                                                   OptionalTensor initial_z, int64_t feature_map, bool causal, bool normalize,
                                                   double eps, double scale, bool return_state) {
  Problem p(query, key, value,
            {key_lengths, cu_seqlens, decay, initial_kv, initial_z, feature_map, causal, normalize, eps, scale});
  Tensor out = empty_in_order_of(query, p.walk.head_dim_v);
  Tensor denominator = query.dim() == 3 ? p.floats({query.size(1), query.size(0)}) : p.floats({query.size(0), query.size(1), query.size(2)});
  Tensor kv = p.floats({0}), z = p.floats({0});
  if (p.streams > 0) {
    CudaLinear w = p.walk;
    w.left = p.queries(), w.depth = p.keys(), w.columns = p.values();
    p.cut(w, w.rows_k);
    if (p.initial()) p.start_from(w, *p.initial());
    States states, whole;
    if (!causal || w.segments > 1 || return_state) {
      std::tie(states, whole) = p.sums(w, p.initial());
      p.start_from(w, causal ? states : whole);
    }
    if (return_state) kv = torch::stable::squeeze(whole.kv, 2), z = torch::stable::squeeze(whole.z, 2);
    if (!causal) p.cut(w, w.rows_q);
    w.walk = LinearWalk::kValues;
    w.transposed_state = true;
    w.fresh = !p.initial();
    w.out = p.call.view(out);
    w.denominator = p.call.data<float>(denominator);
    if (out.numel() > 0) p.call.check(linear_walk_cuda(w, p.call.stream()));
  } else if (return_state) {
    kv = p.floats({p.walk.batch, p.walk.heads_q, p.walk.head_dim, p.walk.head_dim_v});
    z = p.floats({p.walk.batch, p.walk.heads_q, p.walk.head_dim});
  }
  return {out, kv, z, denominator};
}

// Where a gradient by KV head is written: itself, or for query heads that share a KV head, float32 by query head.
class GroupGradient {
 public:
  GroupGradient(const Tensor& of, int64_t heads_q) : result_(empty_in_order_of(of, of.size(-1))), written_(result_) {
    group_ = heads_q / std::max<int64_t>(of.size(1), 1);
    if (group_ == 1) return;
    const bool packed = of.dim() == 3;
    written_ = packed ? torch::stable::new_empty(of, {of.size(0), heads_q, of.size(2)}, ScalarType::Float)
                      : torch::stable::new_empty(of, {of.size(0), heads_q, of.size(2), of.size(3)}, ScalarType::Float);
  }
  const Tensor& written() const { return written_; }
  bool wide() const { return group_ > 1; }
  Tensor sum() {
    if (group_ == 1) return result_;
    const Tensor& w = written_;
    const std::vector<int64_t> shape = w.dim() == 3 ? std::vector<int64_t>{w.size(0), w.size(1) / group_, group_, w.size(2)}
                                                    : std::vector<int64_t>{w.size(0), w.size(1) / group_, group_, w.size(2), w.size(3)};
    const std::vector<int64_t> axis{2};
    torch::stable::copy_(result_, torch::stable::sum(torch::stable::view(w, shape), axis));
    return result_;
  }

 private:
  Tensor result_, written_;
  int64_t group_;
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    Tensor grad_out, OptionalTensor grad_kv, OptionalTensor grad_z, Tensor query, Tensor key, Tensor value, Tensor out,
    Tensor denominator, OptionalTensor key_lengths, OptionalTensor cu_seqlens, OptionalTensor decay, OptionalTensor initial_kv,
    OptionalTensor initial_z, int64_t feature_map, bool causal, bool normalize, double eps, double scale, bool need_decay,
    bool need_initial) {
  STD_TORCH_CHECK(!need_decay, "xformer_fast: the CUDA kernels have no gradient for the decay");
  Problem p(query, key, value,
            {key_lengths, cu_seqlens, decay, initial_kv, initial_z, feature_map, causal, normalize, eps, scale});
  Tensor d_query = empty_in_order_of(query, p.walk.head_dim);
  GroupGradient d_key(key, p.walk.heads_q), d_value(value, p.walk.heads_q);
  Tensor d_kv = p.floats({0}), d_z = p.floats({0});
  if (p.streams == 0) {
    if (need_initial) {
      d_kv = p.floats({p.walk.batch, p.walk.heads_q, p.walk.head_dim, p.walk.head_dim_v});
      d_z = p.floats({p.walk.batch, p.walk.heads_q, p.walk.head_dim});
    }
    return {d_query, d_key.sum(), d_value.sum(), p.floats({0}), d_kv, d_z};
  }

  const Tensor go = with_unit_rows(grad_out), o = with_unit_rows(out), den = torch::stable::contiguous(denominator);
  const Tensor rows = p.floats({2, std::max<int64_t>(den.numel(), 1)});
  CudaLinearRows r{};
  r.element = p.walk.element;
  r.heads_q = p.walk.heads_q, r.head_dim_v = p.walk.head_dim_v, r.rows_q = p.walk.rows_q;
  r.batch = query.dim() == 3 ? 1 : p.walk.batch;
  r.grad_out = p.call.view(go), r.out = p.call.view(o);
  r.denominator = p.call.data<float>(den);
  r.grad_scale = p.call.data<float>(rows), r.row_grad = r.grad_scale + den.numel();
  r.normalize = normalize, r.scale = p.walk.scale;
  p.call.check(linear_rows_cuda(r, p.call.stream()));
  LinearOperand grads{r.grad_out, p.walk.head_dim_v, false, false, r.grad_scale, r.row_grad};
  std::optional<States> final;
  if (grad_kv) final = States{torch::stable::contiguous(*grad_kv), torch::stable::contiguous(*grad_z)};

  // Of the queries: the state of keys, from the beginning.
  CudaLinear w = p.walk;
  w.depth = p.keys(), w.columns = p.values();
  p.cut(w, w.rows_k);
  if (p.initial()) p.start_from(w, *p.initial());
  States states, whole;
  if (!causal || w.segments > 1) {
    std::tie(states, whole) = p.sums(w, p.initial());
    p.start_from(w, causal ? states : whole);
  }
  if (!causal) p.cut(w, w.rows_q);
  w.walk = LinearWalk::kFeatures;
  w.left = grads, w.depth = p.values(), w.columns = p.keys();
  w.out = p.call.view(d_query), w.derivative_of = p.queries().view;
  p.call.check(linear_walk_cuda(w, p.call.stream()));

  // Of the keys and values: the state of queries, from the end.
  w = p.walk;
  w.reverse = true;
  w.depth = p.queries(), w.columns = grads;
  w.depth.row_bias = r.row_grad;
  p.cut(w, w.rows_q);
  std::tie(states, whole) = p.sums(w, final);
  p.start_from(w, causal ? states : whole);
  if (need_initial) d_kv = torch::stable::squeeze(whole.kv, 2), d_z = torch::stable::squeeze(whole.z, 2);
  if (!causal) p.cut(w, w.rows_k);
  w.walk = LinearWalk::kFeatures;
  w.left = p.values(), w.depth = grads, w.columns = p.queries();
  w.out = p.call.view(d_key.written()), w.wide = d_key.wide(), w.derivative_of = p.keys().view;
  p.call.check(linear_walk_cuda(w, p.call.stream()));
  w.walk = LinearWalk::kValues;
  w.transposed_state = true;
  w.left = p.keys(), w.depth = p.queries(), w.columns = grads;
  w.out = p.call.view(d_value.written()), w.wide = d_value.wide();
  p.call.check(linear_walk_cuda(w, p.call.stream()));
  return {d_query, d_key.sum(), d_value.sum(), p.floats({0}), d_kv, d_z};
}

#define XFORMER_FAST_LINEAR_ATTENTION_OPTIONS                                                                          \
  "Tensor? key_lengths, Tensor? cu_seqlens, Tensor? decay, Tensor? initial_kv, Tensor? initial_z, int feature_map, "   \
  "bool causal, bool normalize, float eps, float scale"

}  // namespace
}  // namespace xformer_fast

STABLE_TORCH_LIBRARY_FRAGMENT(xformer_fast, m) {
  m.def("linear_attention_cuda(Tensor query, Tensor key, Tensor value, " XFORMER_FAST_LINEAR_ATTENTION_OPTIONS
        ", bool return_state) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "linear_attention_cuda_backward(Tensor grad_out, Tensor? grad_kv, Tensor? grad_z, Tensor query, Tensor key, Tensor value, "
      "Tensor out, Tensor denominator, " XFORMER_FAST_LINEAR_ATTENTION_OPTIONS
      ", bool need_decay_grad, bool need_state_grad) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(xformer_fast, XFORMER_FAST_DEVICE_KEY, m) {
  m.impl("linear_attention_cuda", TORCH_BOX(&xformer_fast::forward));
  m.impl("linear_attention_cuda_backward", TORCH_BOX(&xformer_fast::backward));
}
