"""What torch has to know about a neighborhood attention operator: fake (meta) results, autograd, autocast.

A kernel backend registers `xformer_fast::neighborhood_attention_<backend>` and `…_backward`, with one schema. The
backward recomputes the weights from query and key: autograd keeps the inputs alone. A registered gradient of the
backward makes double backward work: it recomputes through the reference formula.
"""

import torch
from torch import Tensor

from .. import reference
from .attention_operator import Operator, _twin, backward_runner, leaf_of, register_autocast
from .window_operator import in_order_of

OPTIONS = (
    "Tensor query, Tensor key, Tensor value, Tensor? table, int[] kernel, int[] dilation, int[] causal, float scale"
)
FORWARD_SCHEMA = f"({OPTIONS}) -> Tensor"
BACKWARD_SCHEMA = f"(Tensor grad_out, {OPTIONS}, bool need_table_grad) -> (Tensor, Tensor, Tensor, Tensor)"
_LIBRARY = torch.library.Library("xformer_fast", "FRAGMENT")
_TENSORS = 4  # of the forward: query, key, value, table


def define(backend: str, forward, backward, keys):
    """Defines the pair for a backend whose kernels are launched from Python (C++ defines its own)."""
    for name, schema, function in (
        (f"neighborhood_attention_{backend}", FORWARD_SCHEMA, forward),
        (f"neighborhood_attention_{backend}_backward", BACKWARD_SCHEMA, backward),
    ):
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        for key in keys:
            _LIBRARY.impl(name, function, key)


def register(backend: str) -> Operator:
    """Registers fake, autograd and autocast rules of a defined pair."""
    forward = getattr(torch.ops.xformer_fast, f"neighborhood_attention_{backend}").default
    backward = getattr(torch.ops.xformer_fast, f"neighborhood_attention_{backend}_backward").default
    torch.library.register_fake(forward, lambda q, k, v, *rest: in_order_of(q, v.shape[-1]), lib=_LIBRARY)
    torch.library.register_fake(backward, _backward_fake, lib=_LIBRARY)
    run_backward = backward_runner("neighborhood_attention", backward, _twin(backward, _save_backward, _second_order))

    def first_order(ctx, grad_out):
        need_table_grad = ctx.needs_input_grad[_TENSORS - 1]
        grads = run_backward(grad_out, *ctx.saved_tensors, *ctx.options, need_table_grad)
        return *grads[:3], grads[3] if need_table_grad else None, None, None, None, None

    torch.library.register_autograd(forward, first_order, setup_context=_save_forward, lib=_LIBRARY)
    torch.library.register_autograd(backward, _second_order, setup_context=_save_backward, lib=_LIBRARY)
    for device in ("cpu", "cuda"):
        register_autocast(forward, device)

    def forward_eagerly(ctx, *inputs):
        with torch._C._AutoDispatchBelowAutograd():
            output = forward(*inputs)
        _save_forward(ctx, inputs, output)
        return output

    members = {"forward": staticmethod(forward_eagerly), "backward": staticmethod(first_order)}
    eager = type(f"{forward.name()}::eager", (torch.autograd.Function,), members)
    return Operator(forward, eager, _twin(forward, _save_forward, first_order))


def _backward_fake(grad_out, query, key, value, table, kernel, dilation, causal, scale, need_table_grad):
    grad_table = table.new_empty(table.shape) if need_table_grad else query.new_empty(0, dtype=torch.float32)
    return *(in_order_of(t, t.shape[-1]) for t in (query, key, value)), grad_table


def _save_forward(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:_TENSORS])
    ctx.options = inputs[_TENSORS:]


def _save_backward(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[: 1 + _TENSORS])
    ctx.options = inputs[1 + _TENSORS :]


def _second_order(ctx, *grad_grads):
    """Vector-Jacobian product of the backward, recomputed through the reference: materialises the scores."""
    kernel, dilation, causal, scale, _ = ctx.options
    leaves = [None if t is None else leaf_of("neighborhood_attention", t) for t in ctx.saved_tensors]
    grads: list[Tensor | None] = [None] * (len(leaves) + len(ctx.options))
    wanted = [(t, g) for t, g in zip(leaves[1:], grad_grads, strict=True) if t is not None and g is not None]
    if not wanted:
        return tuple(grads)
    with torch.enable_grad():
        grad_out, query, key, value, table = leaves
        out = reference.neighborhood_attention(
            query, key, value, kernel, dilation=dilation, causal=causal, relative_bias_table=table, scale=scale
        )
        first = torch.autograd.grad(out, [t for t, _ in wanted], grad_out, create_graph=True)
        places = [i for i, t in enumerate(leaves) if t is not None and ctx.needs_input_grad[i]]
        second = torch.autograd.grad(
            first, [leaves[i] for i in places], [g for _, g in wanted], allow_unused=True, materialize_grads=True
        )
    for i, grad in zip(places, second, strict=True):
        grads[i] = grad
    return tuple(grads)
