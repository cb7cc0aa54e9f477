// The table of one instruction set; compiled, like the kernels it names, once for each.
#include "linear_attention.h"

namespace xformer_fast {
namespace XFORMER_FAST_ISA {

void linear_attention_forward(const LinearAttention&, const Pool&);
void linear_attention_backward(const LinearAttention&, const LinearAttentionGrad&, const Pool&);

const LinearAttentionKernels linear_attention_kernels = {linear_attention_forward, linear_attention_backward};

}  // namespace XFORMER_FAST_ISA
}  // namespace xformer_fast
