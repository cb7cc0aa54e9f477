// Rotary position embedding on a GPU: what a launcher hands to the kernel. Raw pointers, no torch.
#pragma once
#include "../cpu/kernel.h"

namespace xformer_fast {

constexpr int kMaxCudaRopeAxes = 8;

// (batch, heads, length, head_dim) with a unit last stride; `in` and `out` may be the same memory.
struct CudaRopeTensor {
  const void* in;
  void* out;
  int64_t in_batch, in_head, in_row, out_batch, out_head, out_row;  // strides
  const int64_t* positions;                              // rows of the tables; none: row s stands at first + s
  int64_t position_axis, position_batch, position_row;   // strides
  int64_t first;
  int32_t heads, length;
};

// Query and key, or one tensor, rotated by the same tables.
struct CudaRope {
  CudaRopeTensor tensors[2];
  int32_t count, batch, head_dim;
  Element element;
  const float* cos;  // (table_rows, pairs)
  const float* sin;
  int64_t cos_row, sin_row, table_rows;
  int32_t pairs;  // 2 * pairs <= head_dim channels turn, those after them pass through
  int32_t axes;   // 1, or the number of sections
  int32_t section_end[kMaxCudaRopeAxes];  // angle k follows the first axis whose end lies past k
  bool interleaved, inverse;
  uint32_t row_blocks;  // of a sequence; set by rope_cuda
};

// Launches on a cudaStream_t; returns a cudaError_t.
int rope_cuda(const CudaRope& rope, void* stream);

}  // namespace xformer_fast
