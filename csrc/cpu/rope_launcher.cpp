// The operators xformer_fast::rope_cpu, rope_pair_cpu and rope_cpu_: schema, value checks, tensors to raw pointers.
// Shapes, dtypes and option types were checked by the public function; positions are checked here.
#include "launch.h"
#include "rope.h"

namespace xformer_fast {
namespace {

using Sections = std::optional<std::vector<int64_t>>;

// The tables, and up to two tensors to rotate by them, with what their pointers point into.
class Prepared {
 public:
  Prepared(const Tensor& cos, const Tensor& sin, const Sections& sections, bool interleaved, bool inverse)
      : cos_(with_unit_rows(cos)), sin_(with_unit_rows(sin)), rows_(cos.size(0)) {
    tables_ = {float_data(cos_, "cos"), float_data(sin_, "sin"), cos_.stride(0), sin_.stride(0), cos.size(1), 1, {}, interleaved, inverse};
    if (!sections || sections->size() < 2) return;
    STD_TORCH_CHECK(sections->size() <= kMaxRopeAxes, "xformer_fast: rope: sections must be at most ", kMaxRopeAxes);
    tables_.axes = static_cast<int64_t>(sections->size());
    int64_t end = 0;
    for (int64_t axis = 0; axis < tables_.axes; ++axis) tables_.section_end[axis] = end += (*sections)[axis];
  }

  void add(const Tensor& in, const Tensor& out, const OptionalTensor& positions, int64_t first, const char* name) {
    const bool packed = in.dim() == 3;  // (T, H, D)
    Rotation& r = rotations_[count_];
    r = {element_of(in, "x"), view_of(in), view_of(out), packed ? 1 : in.size(0), in.size(1), packed ? in.size(0) : in.size(2),
         in.size(-1), nullptr, 0, 0, 0, first};
    if (in.numel() == 0) return;
    if (positions) {
      Tensor& p = positions_[count_];
      p = positions->scalar_type() == ScalarType::Long ? *positions : torch::stable::to(*positions, ScalarType::Long);
      r.positions = static_cast<const int64_t*>(p.data_ptr());
      r.position_row = p.stride(-1);
      if (p.dim() > 1 && p.size(-2) > 1) r.position_batch = p.stride(-2);
      if (p.dim() > 2) r.position_axis = p.stride(0);
      check_positions(r, p.dim() > 2 ? p.size(0) : 1, r.position_batch ? r.batch : 1, name);
    } else {
      STD_TORCH_CHECK(0 <= first && first + r.length <= rows_, "xformer_fast: rope: tables of ", rows_,
                      " positions are too short for ", first + r.length, " rows of ", name);
    }
    if (in.data_ptr() != out.data_ptr()) prefer_huge_pages(out);
    work_ += 32. * static_cast<double>(in.numel());  // memory, not arithmetic, is what it takes
    ++count_;
  }

  void run() {
    if (!count_) return;
    Call call(work_);
    XF_KERNELS(rope_kernels).rotate(tables_, rotations_, count_, call.pool());
  }

 private:
  void check_positions(const Rotation& r, int64_t axes, int64_t batch, const char* name) const {
    int64_t least = 0, most = 0;
    for (int64_t axis = 0; axis < axes; ++axis)
      for (int64_t b = 0; b < batch; ++b)
        for (int64_t s = 0; s < r.length; ++s) {
          const int64_t p = r.positions[axis * r.position_axis + b * r.position_batch + s * r.position_row];
          least = p < least ? p : least;
          most = p > most ? p : most;
        }
    STD_TORCH_CHECK(least >= 0 && most < rows_, "xformer_fast: rope: ", name, " must lie in 0..", rows_ - 1,
                    ", the tables' rows, got ", least < 0 ? least : most);
  }

  Tensor cos_, sin_, positions_[2];
  int64_t rows_;
  RopeTables tables_{};
  Rotation rotations_[2]{};
  int count_ = 0;
  double work_ = 0;
};

Tensor rotate(Tensor x, Tensor cos, Tensor sin, OptionalTensor positions, int64_t first, Sections sections, bool interleaved,
              bool inverse) {
  Prepared p(cos, sin, sections, interleaved, inverse);
  const Tensor in = with_unit_rows(x);
  Tensor out = empty_in_order_of(x, x.size(-1));
  p.add(in, out, positions, first, "positions");
  p.run();
  return out;
}

void rotate_in_place(Tensor x, Tensor cos, Tensor sin, OptionalTensor positions, int64_t first, Sections sections,
                     bool interleaved, bool inverse) {
  STD_TORCH_CHECK(x.stride(-1) == 1 || x.size(-1) == 1, "xformer_fast: rope: x must have a unit last stride to be rotated in place");
  Prepared p(cos, sin, sections, interleaved, inverse);
  p.add(x, x, positions, first, "positions");
  p.run();
}

std::tuple<Tensor, Tensor> rotate_pair(Tensor query, Tensor key, Tensor cos, Tensor sin, OptionalTensor query_positions,
                                       OptionalTensor key_positions, int64_t query_first, int64_t key_first, Sections sections,
                                       bool interleaved, bool inverse) {
  Prepared p(cos, sin, sections, interleaved, inverse);
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
  m.def("rope_cpu(Tensor x, Tensor cos, Tensor sin, Tensor? positions, SymInt first, " XFORMER_FAST_ROPE_OPTIONS ") -> Tensor");
  m.def("rope_cpu_(Tensor(a!) x, Tensor cos, Tensor sin, Tensor? positions, SymInt first, " XFORMER_FAST_ROPE_OPTIONS ") -> ()");
  m.def(
      "rope_pair_cpu(Tensor query, Tensor key, Tensor cos, Tensor sin, Tensor? query_positions, Tensor? key_positions, "
      "SymInt query_first, SymInt key_first, " XFORMER_FAST_ROPE_OPTIONS ") -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(xformer_fast, CPU, m) {
  m.impl("rope_cpu", TORCH_BOX(&xformer_fast::rotate));
  m.impl("rope_cpu_", TORCH_BOX(&xformer_fast::rotate_in_place));
  m.impl("rope_pair_cpu", TORCH_BOX(&xformer_fast::rotate_pair));
}
