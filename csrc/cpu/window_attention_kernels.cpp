// The table of one instruction set; compiled, like the kernels it names, once for each.
#include "window.h"

namespace xformer_fast {
namespace XFORMER_FAST_ISA {

void window_attention_forward(const WindowAttention&, const Pool&);
void window_attention_backward(const WindowAttention&, const WindowAttentionGrad&, const Pool&);

const WindowAttentionKernels window_attention_kernels = {window_attention_forward, window_attention_backward};

}  // namespace XFORMER_FAST_ISA
}  // namespace xformer_fast
