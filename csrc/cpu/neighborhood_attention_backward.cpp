#include "neighborhood_tiles.h"
namespace xformer_fast {
namespace XFORMER_FAST_ISA {
void neighborhood_attention_backward(const NeighborhoodAttention&, const NeighborhoodAttentionGrad&, const Pool&) {}
}  // namespace XFORMER_FAST_ISA
}  // namespace xformer_fast
