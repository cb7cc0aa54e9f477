// The operators xformer_fast::rope_cuda, rope_pair_cuda and rope_cuda_: schema, tensors to raw pointers.
// Shapes, dtypes and option types were checked by the public function; the kernel clamps positions to the tables.
#include "launch.h"
#include "rope.h"

namespace xformer_fast {
namespace {

using Sections = std::optional<std::vector<int64_t>>;

// The tables, and up to two tensors to rotate by them, with what their pointers point into.
class Prepared {
 public:
  Prepared(const Tensor& like, const Tensor& cos, const Tensor& sin, const Sections& sections, bool interleaved, bool inverse)
      : call_(like), cos_(with_unit_rows(cos)), sin_(with_unit_rows(sin)) {
    rope_.element = element_of(like, "x");
    rope_.head_dim = static_cast<int32_t>(like.size(-1));
    rope_.cos = call_.floats(cos_, "cos");
    rope_.sin = call_.floats(sin_, "sin");
    rope_.cos_row = cos_.stride(0);
    rope_.sin_row = sin_.stride(0);
    rope_.table_rows = cos.size(0);
    rope_.pairs = static_cast<int32_t>(cos.size(1));
    rope_.axes = 1;
    rope_.interleaved = interleaved;
    rope_.inverse = inverse;
    if (!sections || sections->size() < 2) return;
    STD_TORCH_CHECK(sections->size() <= kMaxCudaRopeAxes, "xformer_fast: rope: sections must be at most ", kMaxCudaRopeAxes);
    rope_.axes = static_cast<int32_t>(sections->size());
    int32_t end = 0;
    for (int32_t axis = 0; axis < rope_.axes; ++axis) rope_.section_end[axis] = end += static_cast<int32_t>((*sections)[axis]);
  }

  void add(const Tensor& in, const Tensor& out, const OptionalTensor& positions, int64_t first, const char* name) {
    if (in.numel() == 0) return;
    const bool packed = in.dim() == 3;  // (T, H, D)
    CudaRopeTensor& t = rope_.tensors[rope_.count];
    const View from = call_.view(in), to = call_.view(out);
    rope_.batch = packed ? 1 : static_cast<int32_t>(in.size(0));
    t = {from.data, to.data, from.batch, from.head, from.row, to.batch, to.head, to.row, nullptr, 0, 0, 0, first,
         static_cast<int32_t>(in.size(1)), static_cast<int32_t>(packed ? in.size(0) : in.size(2))};
    if (positions) {
      Tensor& p = positions_[rope_.count];
      p = as_int64(*positions);
      t.positions = call_.data<int64_t>(p);
      t.position_row = p.stride(-1);
      if (p.dim() > 1 && p.size(-2) > 1) t.position_batch = p.stride(-2);
      if (p.dim() > 2) t.position_axis = p.stride(0);
    } else {
      STD_TORCH_CHECK(0 <= first && first + t.length <= rope_.table_rows, "xformer_fast: rope: tables of ", rope_.table_rows,
                      " positions are too short for ", first + t.length, " rows of ", name);
    }
    ++rope_.count;
  }

  void run() {
    if (rope_.count) call_.check(rope_cuda(rope_, call_.stream()));
  }

 private:
  CudaCall call_;
  Tensor cos_, sin_, positions_[2];
  CudaRope rope_{};
};

Tensor rotate(Tensor x, Tensor cos, Tensor sin, OptionalTensor positions, int64_t first, Sections sections, bool interleaved,
              bool inverse) {
  Prepared p(x, cos, sin, sections, interleaved, inverse);
  const Tensor in = with_unit_rows(x);
  Tensor out = empty_in_order_of(x, x.size(-1));
  p.add(in, out, positions, first, "positions");
  p.run();
  return out;
}

void rotate_in_place(Tensor x, Tensor cos, Tensor sin, OptionalTensor positions, int64_t first, Sections sections,
                     bool interleaved, bool inverse) {
  STD_TORCH_CHECK(x.stride(-1) == 1 || x.size(-1) == 1, "xformer_fast: rope: x must have a unit last stride to be rotated in place");
  Prepared p(x, cos, sin, sections, interleaved, inverse);
  p.add(x, x, positions, first, "positions");
  p.run();
}

std::tuple<Tensor, Tensor> rotate_pair(Tensor query, Tensor key, Tensor cos, Tensor sin, OptionalTensor query_positions,
                                       OptionalTensor key_positions, int64_t query_first, int64_t key_first, Sections sections,
                                       bool interleaved, bool inverse) {
  Prepared p(query, cos, sin, sections, interleaved, inverse);
  const Tensor q = with_unit_rows(query), k = with_unit_rows(key);
  Tensor q_out = empty_in_order_of(query, query.size(-1)), k_out = empty_in_order_of(key, key.size(-1));
  p.add(q, q_out, query_positions, query_first, "query_positions");
  p.add(k, k_out, key_positions, key_first, "key_positions");
  p.run();
  return {q_out, k_out};
}

}  // namespace
}  // namespace xformer_fast

#define XFORMER_FAST_ROPE_OPTIONS "int[]? sections, bool interleaved, bool inverse"

STABLE_TORCH_LIBRARY_FRAGMENT(xformer_fast, m) {
  m.def("rope_cuda(Tensor x, Tensor cos, Tensor sin, Tensor? positions, SymInt first, " XFORMER_FAST_ROPE_OPTIONS ") -> Tensor");
  m.def("rope_cuda_(Tensor(a!) x, Tensor cos, Tensor sin, Tensor? positions, SymInt first, " XFORMER_FAST_ROPE_OPTIONS ") -> ()");
  m.def(
      "rope_pair_cuda(Tensor query, Tensor key, Tensor cos, Tensor sin, Tensor? query_positions, Tensor? key_positions, "
      "SymInt query_first, SymInt key_first, " XFORMER_FAST_ROPE_OPTIONS ") -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(xformer_fast, XFORMER_FAST_DEVICE_KEY, m) {
  m.impl("rope_cuda", TORCH_BOX(&xformer_fast::rotate));
  m.impl("rope_cuda_", TORCH_BOX(&xformer_fast::rotate_in_place));
  m.impl("rope_pair_cuda", TORCH_BOX(&xformer_fast::rotate_pair));
}
