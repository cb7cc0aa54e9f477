"""What torch has to know about a window attention operator: fake (meta) results, autograd, autocast.

A kernel backend registers `xformer_fast::window_attention_<backend>` and `…_backward`, with one schema. The backward
recomputes the weights from query and key: autograd keeps the inputs alone. A registered gradient of the backward makes
double backward work: it recomputes through the reference formula.
"""

import torch
from torch import Tensor

from .. import reference
from .attention_operator import Operator, _twin, backward_runner, leaf_of, register_autocast

OPTIONS = "Tensor? table, Tensor? bias, Tensor? logit_scale, int[] window, int[] shift, bool grid, float scale"
FORWARD_SCHEMA = f"(Tensor query, Tensor key, Tensor value, {OPTIONS}) -> Tensor"
BACKWARD_SCHEMA = (
    f"(Tensor grad_out, Tensor query, Tensor key, Tensor value, {OPTIONS}, bool need_table_grad, bool need_bias_grad, "
    "bool need_scale_grad) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY = torch.library.Library("xformer_fast", "FRAGMENT")
_TENSORS = 6  # of the forward: query, key, value, table, bias, logit_scale


def define(backend: str, forward, backward, keys):
    """Defines the pair for a backend whose kernels are launched from Python (C++ defines its own)."""
    for name, schema, function in (
        (f"window_attention_{backend}", FORWARD_SCHEMA, forward),
        (f"window_attention_{backend}_backward", BACKWARD_SCHEMA, backward),
    ):
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        for key in keys:
            _LIBRARY.impl(name, function, key)


def register(backend: str) -> Operator:
    """Registers fake, autograd and autocast rules of a defined pair."""
    forward = getattr(torch.ops.xformer_fast, f"window_attention_{backend}").default
    backward = getattr(torch.ops.xformer_fast, f"window_attention_{backend}_backward").default
    torch.library.register_fake(forward, lambda q, k, v, *rest: in_order_of(q, v.shape[-1]), lib=_LIBRARY)
    torch.library.register_fake(backward, _backward_fake, lib=_LIBRARY)
    run_backward = backward_runner("window_attention", backward, _twin(backward, _save_backward, _second_order))

    def first_order(ctx, grad_out):
        needs = ctx.needs_input_grad[3:_TENSORS]
        grads = run_backward(grad_out, *ctx.saved_tensors, *ctx.options, *needs)
        rest = (g if need else None for g, need in zip(grads[3:], needs, strict=True))
        return *grads[:3], *rest, None, None, None, None

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


def in_order_of(like: Tensor, last) -> Tensor:
    """An empty (B, *space, H, last) with the heads inside the axes of the map, or outside, as `like` has them."""
    batch, *space, heads, _ = like.shape
    if like.stride(-2) <= like.stride(1):
        return like.new_empty(batch, *space, heads, last)
    return like.new_empty(batch, heads, *space, last).movedim(1, -2)


def _backward_fake(grad_out, query, key, value, table, bias, logit_scale, window, shift, grid, scale, *needs):
    rest = (
        like.new_empty(like.shape) if need else query.new_empty(0, dtype=torch.float32)
        for like, need in zip((table, bias, logit_scale), needs, strict=True)
    )
    return (*(in_order_of(t, t.shape[-1]) for t in (query, key, value)), *rest)


def _save_forward(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:_TENSORS])
    ctx.options = inputs[_TENSORS:]


def _save_backward(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[: 1 + _TENSORS])
    ctx.options = inputs[1 + _TENSORS :]


def _second_order(ctx, *grad_grads):
    """Vector-Jacobian product of the backward, recomputed through the reference: materialises the scores."""
    window, shift, grid, scale, *_ = ctx.options
    leaves = [None if t is None else leaf_of("window_attention", t) for t in ctx.saved_tensors]
    nothing = (None,) * (len(leaves) + len(ctx.options))
    wanted = [(t, g) for t, g in zip(leaves[1:], grad_grads, strict=True) if t is not None and g is not None]
    if not wanted:
        return nothing
    with torch.enable_grad():
        grad_out, query, key, value, table, bias, logit_scale = leaves
        out = reference.window_attention(
            query, key, value, window, shift=shift, relative_bias_table=table, bias=bias, logit_scale=logit_scale,
            partition="grid" if grid else "window", scale=None if logit_scale is not None else scale,
        )  # fmt: skip
        first = torch.autograd.grad(out, [t for t, _ in wanted], grad_out, create_graph=True)
        places = [i for i, t in enumerate(leaves) if t is not None and ctx.needs_input_grad[i]]
        second = torch.autograd.grad(
            first, [leaves[i] for i in places], [g for _, g in wanted], allow_unused=True, materialize_grads=True
        )
    grads = list(nothing)
    for i, grad in zip(places, second, strict=True):
        grads[i] = grad
    return tuple(grads)
