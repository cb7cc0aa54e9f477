"""What torch has to know about a linear-attention operator: fake (meta) results, autograd, autocast.

Every kernel backend registers the same pair, `xformer_fast::linear_attention_<backend>` and `…_backward`, with one
schema. The forward also returns every query's denominator, all that the backward needs beside inputs and output. A
registered gradient of the backward makes double backward work in eager mode, through the reference formula.
"""

from collections.abc import Callable

import torch

from .. import feature_maps, reference
from .attention_operator import (
    _LIBRARY,
    _save_backward,
    _twin,
    backward_runner,
    in_order_of,
    leaf_of,
    register_autocast,
)

OPTIONS = (
    "Tensor? key_lengths, Tensor? cu_seqlens, Tensor? decay, Tensor? initial_kv, Tensor? initial_z, int feature_map, "
    "bool causal, bool normalize, float eps, float scale"
)
FORWARD_SCHEMA = (
    f"(Tensor query, Tensor key, Tensor value, {OPTIONS}, bool return_state) -> (Tensor, Tensor, Tensor, Tensor)"
)
BACKWARD_SCHEMA = (
    "(Tensor grad_out, Tensor? grad_kv, Tensor? grad_z, Tensor query, Tensor key, Tensor value, Tensor out, "
    f"Tensor denominator, {OPTIONS}, bool need_decay_grad, bool need_state_grad) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def define(backend: str, forward, backward, keys):
    """Defines the pair for a backend whose kernels are launched from Python (C++ defines its own)."""
    for name, schema, function in (
        (f"linear_attention_{backend}", FORWARD_SCHEMA, forward),
        (f"linear_attention_{backend}_backward", BACKWARD_SCHEMA, backward),
    ):
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        for key in keys:
            _LIBRARY.impl(name, function, key)


def register(backend: str) -> tuple[Callable, type[torch.autograd.Function]]:
    """Registers fake, autograd and autocast rules of a defined pair; returns the forward operator and its twin."""
    forward = getattr(torch.ops.xformer_fast, f"linear_attention_{backend}").default
    backward = getattr(torch.ops.xformer_fast, f"linear_attention_{backend}_backward").default
    torch.library.register_fake(forward, _forward_fake, lib=_LIBRARY)
    torch.library.register_fake(backward, _backward_fake, lib=_LIBRARY)
    run_backward = backward_runner("linear_attention", backward, _twin(backward, _save_backward, _second_order))

    def first_order(ctx, grad_out, grad_kv, grad_z, grad_denominator):
        query, key, value, out, denominator, *auxiliary = ctx.saved_tensors
        needs = ctx.needs_input_grad[5], ctx.needs_input_grad[6] or ctx.needs_input_grad[7]
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        if not ctx.numbers[-1]:
            grad_kv = grad_z = None
        elif grad_kv is not None or grad_z is not None:
            shapes = state_shapes(query, value, auxiliary[1])
            grad_kv, grad_z = (
                denominator.new_zeros(shape) if grad is None else grad
                for grad, shape in zip((grad_kv, grad_z), shapes, strict=True)
            )
        grads = run_backward(
            grad_out, grad_kv, grad_z, query, key, value, out, denominator, *auxiliary, *ctx.numbers[:-1], *needs
        )
        decay = grads[3] if needs[0] else None
        states = grads[4:] if needs[1] else (None, None)
        return *grads[:3], None, None, decay, *states, *[None] * 6

    torch.library.register_autograd(forward, first_order, setup_context=_save_forward, lib=_LIBRARY)
    torch.library.register_autograd(backward, _second_order, setup_context=_save_backward, lib=_LIBRARY)
    for device in ("cpu", "cuda"):
        register_autocast(forward, device)
    return forward, _twin(forward, _save_forward, first_order)


def state_shapes(query, value, cu_seqlens) -> tuple[tuple, tuple]:
    batch = query.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    z = batch, query.shape[1], query.shape[-1]
    return (*z, value.shape[-1]), z


def denominator_shape(query) -> tuple:
    return tuple(query.shape[:-1]) if query.dim() == 4 else (query.shape[1], query.shape[0])


def _forward_fake(query, key, value, key_lengths, cu_seqlens, *options):
    shapes = state_shapes(query, value, cu_seqlens) if options[-1] else ((0,), (0,))
    states = [query.new_empty(shape, dtype=torch.float32) for shape in shapes]
    return (
        in_order_of(query, value.shape[-1]),
        *states,
        query.new_empty(denominator_shape(query), dtype=torch.float32),
    )


def _backward_fake(grad_out, grad_kv, grad_z, query, key, value, out, denominator, *options):
    cu_seqlens, decay, (need_decay, need_state) = options[1], options[2], options[-2:]
    shapes = [(0,) if not need_decay else decay.shape]
    shapes += state_shapes(query, value, cu_seqlens) if need_state else [(0,), (0,)]
    rest = [query.new_empty(shape, dtype=torch.float32) for shape in shapes]
    return (*(in_order_of(t, t.shape[-1]) for t in (query, key, value)), *rest)


def _save_forward(ctx, inputs, output):
    query, key, value, *options = inputs
    ctx.set_materialize_grads(False)
    out, _, _, denominator = output
    ctx.mark_non_differentiable(denominator)
    ctx.save_for_backward(query, key, value, out, denominator, *options[:5])
    ctx.numbers = options[5:]


def _second_order(ctx, *grad_grads):
    """Vector-Jacobian product of the backward, recomputed through the reference: materialises the scores."""
    inputs = list(ctx.inputs)
    for place, tensor in zip(ctx.tensor_places, ctx.saved_tensors, strict=True):
        inputs[place] = tensor
    grad_out, grad_kv, grad_z, query, key, value, _, _, lengths, cu_seqlens, decay, kv, z, *numbers = inputs
    feature_map, causal, normalize, eps, scale = numbers[:5]
    names = ("query", "key", "value", "decay", "kv", "z", "grad_out", "grad_kv", "grad_z")
    tensors = (query, key, value, decay, kv, z, grad_out, grad_kv, grad_z)
    leaves = {n: leaf_of("linear_attention", t) for n, t in zip(names, tensors, strict=True) if t is not None}
    with torch.enable_grad():
        out, states = reference.linear_attention(
            leaves["query"], leaves["key"], leaves["value"], feature_map=feature_maps.FUSED[feature_map],
            causal=causal, normalize=normalize, eps=eps, decay=leaves.get("decay"), scale=scale, key_lengths=lengths,
            cu_seqlens=cu_seqlens, initial_state=None if kv is None else (leaves["kv"], leaves["z"]),
            return_state=True,
        )  # fmt: skip
        outputs = [(out, leaves["grad_out"])]
        outputs += [(s, leaves[n]) for s, n in zip(states, ("grad_kv", "grad_z"), strict=True) if n in leaves]
        wanted = [(leaves[n], g) for n, g in zip(names, grad_grads, strict=False) if n in leaves and g is not None]
        if not wanted:
            return (None,) * len(ctx.inputs)
        first = torch.autograd.grad(
            [t for t, _ in outputs], [t for t, _ in wanted], [g for _, g in outputs], create_graph=True,
            allow_unused=True, materialize_grads=True,
        )  # fmt: skip
        pairs = [(f, g) for f, (_, g) in zip(first, wanted, strict=True) if f.requires_grad]
        second = torch.autograd.grad(
            [f for f, _ in pairs], list(leaves.values()), [g for _, g in pairs], allow_unused=True
        ) if pairs else [None] * len(leaves)  # fmt: skip
    grads = dict(zip(leaves, second, strict=True))
    places = {
        "grad_out": 0,
        "grad_kv": 1,
        "grad_z": 2,
        "query": 3,
        "key": 4,
        "value": 5,
        "decay": 10,
        "kv": 11,
        "z": 12,
    }
    result = [None] * len(ctx.inputs)
    for name, grad in grads.items():
        if ctx.needs_input_grad[places[name]]:
            result[places[name]] = grad
    return tuple(result)
