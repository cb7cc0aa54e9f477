// The table of one instruction set; compiled, like the kernels it names, once for each.
#include "neighborhood.h"

namespace xformer_fast {
namespace XFORMER_FAST_ISA {

void neighborhood_attention_forward(const NeighborhoodAttention&, const Pool&);
void neighborhood_attention_backward(const NeighborhoodAttention&, const NeighborhoodAttentionGrad&, const Pool&);

const NeighborhoodAttentionKernels neighborhood_attention_kernels = {neighborhood_attention_forward,
                                                                     neighborhood_attention_backward};

}  // namespace XFORMER_FAST_ISA
}  // namespace xformer_fast
