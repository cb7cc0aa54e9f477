// Rotary position embedding, for every instruction set: what the launcher hands to the kernel.
#pragma once
#include "kernel.h"

namespace xformer_fast {

constexpr int kMaxRopeAxes = 8;

// Row p holds the cosines (sines) of position p's angles, one for each pair of channels that turns.
struct RopeTables {
  const float* cos;
  const float* sin;
  int64_t cos_row, sin_row;  // strides
  int64_t pairs;             // angles; 2 * pairs channels turn, those after them pass through
  int64_t axes;              // 1, or the number of sections
  int64_t section_end[kMaxRopeAxes];  // angle k follows the first axis whose end lies past k
  bool interleaved;          // pairs are (2k, 2k + 1); otherwise (k, k + pairs)
  bool inverse;              // turn by the negative angles
};

// One tensor to rotate; input and output may be the same memory.
struct Rotation {
  Element element;
  View in, out;
  int64_t batch, heads, length, head_dim;
  const int64_t* positions;  // rows of the tables; none: row s stands at first + s
  int64_t position_axis, position_batch, position_row;  // strides
  int64_t first;
};

struct RopeKernels {
  void (*rotate)(const RopeTables&, const Rotation* rotations, int count, const Pool&);
};

XF_DECLARE_KERNELS(RopeKernels, rope_kernels)

}  // namespace xformer_fast
