// Scratch of a task, and rows in and out of it.
#pragma once
#include "attention_tiles.h"

namespace xformer_fast {
namespace XFORMER_FAST_ISA {
namespace {

// Cuts scratch into arrays; given none, it only counts.
class Arena {
 public:
  explicit Arena(char* scratch) : scratch_(scratch) {}
  template <class... T>
  void take(int64_t count, T*&... arrays) {
    (place(count, arrays), ...);
  }
  int64_t used() const { return used_; }

 private:
  template <class T>
  void place(int64_t count, T*& array) {
    array = scratch_ ? reinterpret_cast<T*>(scratch_ + used_) : nullptr;
    used_ += round_up(count * int64_t(sizeof(T)), 64);
  }
  char* scratch_;
  int64_t used_ = 0;
};

// out[r][column] = in at offsets[r], zeros past the columns and past the rows up to `padded`; ld is whole vectors.
template <class T>
XF_NOINLINE void gather_rows(const T* in, const int64_t* offsets, int64_t rows, int64_t padded, int64_t columns, float* out,
                             int64_t ld) {
  const int tail = int(columns % kLanes);
  for (int64_t r = 0; r < padded; ++r, out += ld) {
    int64_t c = 0;
    if (r < rows) {
      const T* row = in + offsets[r];
      for (; c + kLanes <= columns; c += kLanes) store(out + c, load(row + c));
      if (tail) store(out + c, load(row + c, tail)), c += kLanes;
    }
    for (; c < ld; c += kLanes) store(out + c, zero());
  }
}

#if defined(XF_BF16_DOT)
XF_NOINLINE void gather_rows(const bfloat16* in, const int64_t* offsets, int64_t rows, int64_t padded, int64_t columns,
                             bfloat16* out, int64_t ld) {
  for (int64_t r = 0; r < padded; ++r, out += ld)
    for (int64_t c = 0; c < ld; c += 2 * kLanes) {
      const int64_t n = r < rows ? columns - c : 0;
      const Vec pairs = n > 0 ? load_pairs(in + offsets[r] + c, n) : zero();
      __builtin_memcpy(out + c, &pairs, sizeof pairs);
    }
}
#endif

template <class T>
XF_NOINLINE void scatter_rows(const float* in, int64_t ld, float factor, int64_t rows, int64_t columns, T* out,
                              const int64_t* offsets) {
  const int tail = int(columns % kLanes);
  for (int64_t r = 0; r < rows; ++r, in += ld) {
    T* row = out + offsets[r];
    int64_t c = 0;
    for (; c + kLanes <= columns; c += kLanes) store(row + c, load(in + c) * factor);
    if (tail) store(row + c, load(in + c) * factor, tail);
  }
}

}  // namespace
}  // namespace XFORMER_FAST_ISA
}  // namespace xformer_fast
