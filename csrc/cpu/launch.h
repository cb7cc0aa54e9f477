// What every CPU launcher shares: a dynamic task pool over torch's threads, workspace, tensor-to-struct helpers.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <array>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <optional>
#include <vector>

#include "isa.h"
#include "kernel.h"

namespace xformer_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

struct FreeAligned {
  void operator()(void* p) const { std::free(p); }
};
using AlignedBuffer = std::unique_ptr<void, FreeAligned>;

inline AlignedBuffer aligned_buffer(size_t bytes) {
  void* p = nullptr;
  STD_TORCH_CHECK(posix_memalign(&p, 64, bytes ? bytes : 64) == 0, "xformer_fast: out of memory, wanted ", bytes, " bytes");
  return AlignedBuffer(p);
}

// One launcher call: owns the workspaces its kernel asks for, bounds its threads by the size of the work.
class Call {
 public:
  // `work`: multiply-adds in all; below a million or so a thread, waking threads costs more than it brings.
  explicit Call(double work) : pool_{&Call::run, &Call::allocate, this} {
    const double useful = work / kWorkPerThread;
    max_threads() = useful < 1 ? 1 : useful < 1e6 ? static_cast<int64_t>(useful) : 1000000;
  }
  Call(const Call&) = delete;
  const Pool& pool() const { return pool_; }

 private:
  static constexpr double kWorkPerThread = 1.5e6;

  static int64_t& max_threads() {
    static thread_local int64_t limit = 1;
    return limit;
  }

  static char* scratch(size_t bytes) {  // kept by the thread from call to call
    static thread_local AlignedBuffer buffer;
    static thread_local size_t size = 0;
    if (bytes > size) {
      buffer.reset();
      size = 0;
      buffer = aligned_buffer(bytes);
      size = bytes;
    }
    return static_cast<char*>(buffer.get());
  }

  static void run(int64_t count, Task task, void* context, size_t scratch_bytes) {
    int64_t threads = static_cast<int64_t>(torch::stable::get_num_threads());
    if (threads > max_threads()) threads = max_threads();
    if (threads > count) threads = count;
    if (threads <= 1) {
      char* mine = scratch(scratch_bytes);
      for (int64_t i = 0; i < count; ++i) task(context, i, mine);
      return;
    }
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
      char* mine = scratch(scratch_bytes);
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) task(context, i, mine);
    });
  }

  static void* allocate(void* self, size_t bytes) {
    auto& workspaces = static_cast<Call*>(self)->workspaces_;
    workspaces.push_back(aligned_buffer(bytes));
    return workspaces.back().get();
  }

  Pool pool_;
  std::vector<AlignedBuffer> workspaces_;
};

inline Element element_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Element::float32;
    case ScalarType::BFloat16: return Element::bfloat16;
    case ScalarType::Half: return Element::float16;
    case ScalarType::Bool: return Element::boolean;
    default: STD_TORCH_CHECK(false, "xformer_fast: ", name, " must be float32, bfloat16, float16 (or bool, for a mask)");
  }
}

// Kernels take the element type of query for all of them.
inline void check_type_of(const Tensor& t, const Tensor& query, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == query.scalar_type(), "xformer_fast: ", name, " must have query's dtype");
}

inline const float* float_data(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, "xformer_fast: ", name, " must be float32");
  return static_cast<const float*>(t.data_ptr());
}

// A kernel reads rows with a unit last stride; anything else is copied once here.
inline Tensor with_unit_rows(const Tensor& t) {
  return t.dim() == 0 || t.stride(t.dim() - 1) == 1 ? t : torch::stable::contiguous(t);
}

inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// int32 or int64 vector to int64 values.
inline std::vector<int64_t> integers(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 1, "xformer_fast: ", name, " must be one-dimensional");
  const int64_t n = t.size(0), step = t.stride(0);
  std::vector<int64_t> values(static_cast<size_t>(n));
  if (t.scalar_type() == ScalarType::Int)
    for (int64_t i = 0; i < n; ++i) values[i] = static_cast<const int32_t*>(t.data_ptr())[i * step];
  else if (t.scalar_type() == ScalarType::Long)
    for (int64_t i = 0; i < n; ++i) values[i] = static_cast<const int64_t*>(t.data_ptr())[i * step];
  else
    STD_TORCH_CHECK(false, "xformer_fast: ", name, " must be int32 or int64");
  return values;
}

// On the device of `like`. As torch::stable::new_empty, through the unboxed entry of torch's C interface: small tensors cost a call, and no more.
inline Tensor empty_of(int32_t dtype, const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  int32_t strided = aoti_torch_layout_strided();
  AtenTensorHandle result;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(like.get(), sizes.data(), static_cast<int64_t>(sizes.size()), &dtype,
                                                          &strided, nullptr, 0, nullptr, &result));
  return Tensor(result);
}

inline Tensor empty_as(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes) {  // in its dtype
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  return empty_of(dtype, like, sizes);
}

inline Tensor empty_floats(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  return empty_of(aoti_torch_dtype_float32(), like, sizes);
}

using Sizes = std::vector<int64_t>;

// Memory order[0] outermost. Not a transposed view of a contiguous tensor: autograd would take note of the view.
inline Tensor empty_in_order(const Tensor& like, const Sizes& sizes, const Sizes& order) {
  Sizes strides(sizes.size());
  int64_t step = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[order[i]] = step;
    step *= sizes[order[i]] > 0 ? sizes[order[i]] : 1;
  }
  using torch::stable::detail::from;
  using torch::headeronly::IntHeaderOnlyArrayRef;
  std::array<StableIValue, 7> stack{from(like), from(IntHeaderOnlyArrayRef(sizes)), from(IntHeaderOnlyArrayRef(strides)),
                                    from(std::nullopt), from(std::nullopt), from(std::nullopt), from(std::nullopt)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::new_empty_strided", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// An output with the memory order of `like`: (B, H, S, D) contiguous, or a transposed view of (B, S, H, D); packed (T, H, D).
inline Tensor empty_in_order_of(const Tensor& like, int64_t last) {
  if (like.dim() == 3) return empty_as(like, {like.size(0), like.size(1), last});
  const int64_t b = like.size(0), h = like.size(1), s = like.size(2);
  if (like.stride(1) < like.stride(2)) return empty_in_order(like, {b, h, s, last}, {0, 2, 1, 3});
  return empty_as(like, {b, h, s, last});
}

// A result that glibc maps afresh at each call (from 32 MiB on) is filled between page faults, which cost several times what
// the stores do: huge pages, where the system leaves them to madvise, make one fault of 512. An advice: failure is no error.
inline void prefer_huge_pages(const Tensor& fresh) {
#if defined(__linux__)
  constexpr uintptr_t kHugePage = 2 << 20, kLeast = 32 << 20;
  const uintptr_t bytes = static_cast<uintptr_t>(fresh.numel()) * static_cast<uintptr_t>(fresh.element_size());
  if (bytes < kLeast) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(fresh.data_ptr()), first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  madvise(reinterpret_cast<void*>(first), (begin + bytes - first) / kHugePage * kHugePage, MADV_HUGEPAGE);
#else
  (void)fresh;
#endif
}

inline View view_of(const Tensor& t) {
  if (t.dim() == 3) return {t.data_ptr(), 0, t.stride(1), t.stride(0)};
  return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

}  // namespace xformer_fast
