// The table of one instruction set; compiled, like the kernels it names, once for each.
#include "attention.h"

namespace xformer_fast {
namespace XFORMER_FAST_ISA {

void attention_forward(const Attention&, const Pool&);
void attention_backward(const Attention&, const AttentionGrad&, const Pool&);

const AttentionKernels attention_kernels = {attention_forward, attention_backward};

}  // namespace XFORMER_FAST_ISA
}  // namespace xformer_fast
