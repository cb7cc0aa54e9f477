"""What torch has to know about an attention operator: fake (meta) results, autograd, autocast.

Every kernel backend registers the same pair, `xformer_fast::attention_<backend>` and `…_backward`, with one schema;
each direction of a call crosses exactly one of them. The forward returns

- out;
- lse and, behind it along a first axis, what rounding took from it: without that the backward would know the weights of
  a row whose scores are all large (a mask of -1e9) only up to a factor;
- the residual: what rounding took from a half-precision out, wanted (save_residual) where the backward's row sums
  dO·out cancel against other terms: under dropout, with sinks, and, there with weights that are not rounded either
  (exact_weights), for gradients that are sums of many dS.

A registered gradient of the backward makes double backward work in eager mode: it recomputes through the reference
formula.

`xformer_fast::attention_<backend>_plain` and `…_plain_backward`, where a backend has them, are the same pair for eager
calls without options: at the smallest shapes, arguments and results that say nothing cost as much as the work.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from . import checks

OPTIONS = (
    "Tensor? mask, Tensor? key_lengths, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? alibi_slopes, "
    "Tensor? distance_bias, Tensor? sinks, Tensor? dropout_seed, Tensor? global_keys, Tensor? rel_h, Tensor? rel_w, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k, float scale, float softcap, float dropout_p, int causal, "
    "SymInt window_left, SymInt window_right"
)
FORWARD_SCHEMA = (
    f"(Tensor query, Tensor key, Tensor value, {OPTIONS}, bool save_residual, bool exact_weights) "
    "-> (Tensor, Tensor, Tensor)"
)
BACKWARD_SCHEMA = (
    "(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
    f"Tensor residual, {OPTIONS}, bool need_mask_grad, bool need_alibi_grad, bool need_distance_grad, "
    "bool need_sinks_grad, bool need_decomposed_grad) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
TENSOR_OPTIONS = OPTIONS.count("Tensor")  # they come first
NOT_CAUSAL, BOTTOM_RIGHT, TOP_LEFT = 0, 1, 2
_LIBRARY = torch.library.Library("xformer_fast", "FRAGMENT")


def define(backend: str, forward=None, backward=None, keys=("CUDA", "CPU")):
    """Defines the pair for a backend whose kernels are launched from Python (C++ defines its own)."""
    for name, schema, function in (
        (f"attention_{backend}", FORWARD_SCHEMA, forward),
        (f"attention_{backend}_backward", BACKWARD_SCHEMA, backward),
    ):
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        for key in keys:
            _LIBRARY.impl(name, function, key)


class Operator(NamedTuple):
    """The forward operator of a backend, and autograd.Functions over the same kernels for those it does not serve."""

    forward: Callable
    eager: type[torch.autograd.Function]  # the operator's own autograd wrapper costs 100 us a call more; no autocast
    transformed: type[torch.autograd.Function]  # what torch.func's transforms take, and no other
    plain: "PlainOperator | None" = None


class PlainOperator(NamedTuple):
    """(query, key, value, scale, causal) -> (out, lse), for eager calls outside autocast and torch.func."""

    forward: Callable  # below autograd
    eager: type[torch.autograd.Function]


def register(backend: str) -> Operator:
    """Registers fake, autograd and autocast rules of a defined pair."""
    forward = getattr(torch.ops.xformer_fast, f"attention_{backend}").default
    backward = getattr(torch.ops.xformer_fast, f"attention_{backend}_backward").default
    torch.library.register_fake(forward, _forward_fake, lib=_LIBRARY)
    torch.library.register_fake(backward, _backward_fake, lib=_LIBRARY)

    run_backward = backward_runner("attention", backward, _twin(backward, _save_backward, _second_order))

    def first_order(ctx, grad_out, grad_lse, _):
        query, key, value, out, lse, residual, *auxiliary = ctx.saved_tensors
        grad_lse = None if grad_lse is None else grad_lse[0]
        needs = [ctx.needs_input_grad[i] for i in (3, 7, 8, 9)]
        needs.append(ctx.needs_input_grad[12] or ctx.needs_input_grad[13])
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        grads = run_backward(
            grad_out, grad_lse, query, key, value, out, lse, residual, *auxiliary, *ctx.numbers, *needs
        )
        needs.append(needs[-1])  # rel_h and rel_w come together
        mask, slopes, distances, sinks, *rel = (g if need else None for g, need in zip(grads[3:], needs, strict=True))
        return *grads[:3], mask, None, None, None, slopes, distances, sinks, None, None, *rel, *[None] * 10

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
    return Operator(forward, eager, _twin(forward, _save_forward, first_order), _register_plain(backend, run_backward))


def _register_plain(backend: str, run_backward: Callable) -> PlainOperator | None:
    if not hasattr(torch.ops.xformer_fast, f"attention_{backend}_plain"):
        return None
    forward = getattr(torch.ops.xformer_fast, f"attention_{backend}_plain").default
    backward = getattr(torch.ops.xformer_fast, f"attention_{backend}_plain_backward").default
    torch.library.register_fake(forward, _plain_fake, lib=_LIBRARY)
    torch.library.register_fake(backward, _plain_backward_fake, lib=_LIBRARY)

    def save(ctx, inputs, output):
        *tensors, scale, causal = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output)
        ctx.numbers = scale, causal

    def forward_eagerly(ctx, *inputs):
        with torch._C._AutoDispatchBelowAutograd():
            output = forward(*inputs)
        save(ctx, inputs, output)
        return output

    def first_order(ctx, grad_out, grad_lse):
        query, key, value, out, lse = ctx.saved_tensors
        scale, causal = ctx.numbers
        grad_lse = None if grad_lse is None else grad_lse[0]
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        gradients = grad_out, grad_lse, query, key, value, out, lse
        if _is_first_order():
            checks.refuse_forward_ad("attention", *gradients)
            with torch._C._AutoDispatchBelowAutograd():
                return *backward(*gradients, scale, causal), None, None
        options = [None] * TENSOR_OPTIONS
        numbers = query.shape[2], key.shape[2], scale, 0.0, 0.0, causal, -1, -1
        grads = run_backward(
            *gradients, empty_residual(query, value.shape[-1], False), *options, *numbers, *[False] * 5
        )
        return *grads[:3], None, None

    torch.library.register_autograd(forward, first_order, setup_context=save, lib=_LIBRARY)
    register_autocast(forward, backend)
    members = {"forward": staticmethod(forward_eagerly), "backward": staticmethod(first_order)}
    return PlainOperator(forward, type(f"{forward.name()}::eager", (torch.autograd.Function,), members))


def backward_runner(op: str, backward: Callable, twin: type[torch.autograd.Function]) -> Callable:
    """Runs the backward of an operator; `twin` is what torch.func's transforms take."""

    def run(*arguments):
        checks.refuse_forward_ad(op, *arguments)
        if _is_first_order():
            with torch._C._AutoDispatchBelowAutograd():
                return backward(*arguments)
        return (twin.apply if torch._C._are_functorch_transforms_active() else backward)(*arguments)

    return run


def _is_first_order() -> bool:
    """Whether nothing looks at a backward that runs: no second differentiation, no transform, no tracing."""
    observed = torch.is_grad_enabled() or torch.compiler.is_compiling()
    return not observed and not torch._C._are_functorch_transforms_active()


def _plain_fake(query, key, value, scale, causal):
    return in_order_of(query, value.shape[-1]), query.new_empty((2, *query.shape[:-1]), dtype=torch.float32)


def _plain_backward_fake(grad_out, grad_lse, query, key, value, out, lse, scale, causal):
    return tuple(in_order_of(t, t.shape[-1]) for t in (query, key, value))


def _twin(operator, setup_context, backward) -> type[torch.autograd.Function]:
    op = operator.name().partition("::")[2].removesuffix("_backward").rpartition("_")[0]

    def jvp(ctx, *tangents):
        raise NotImplementedError(checks.NO_FORWARD_AD.format(op))

    members = {"forward": operator, "setup_context": setup_context, "backward": backward, "jvp": jvp}
    statics = {name: staticmethod(function) for name, function in members.items()}
    return type(operator.name(), (torch.autograd.Function,), statics | {"generate_vmap_rule": True})


def apply_twin(twin: type[torch.autograd.Function], query: Tensor, key: Tensor, value: Tensor, *options):
    """Autocast's rule comes before a twin, which keeps its inputs for the backward as it gets them."""
    device = query.device.type
    if torch.is_autocast_enabled(device):
        query, key, value = in_autocast_dtype(device, query, key, value)
    return twin.apply(query, key, value, *options)


def in_autocast_dtype(device: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def leaf_of(op: str, tensor: Tensor) -> Tensor:
    """What a second derivative starts from."""
    try:
        return tensor.detach().requires_grad_()
    except RuntimeError:
        if not torch._C._are_functorch_transforms_active():
            raise
        raise NotImplementedError(
            f"{op}: second derivatives by torch.func are not implemented by the kernels; use torch.autograd.grad with "
            'create_graph=True, or backend="reference"'
        ) from None


def in_order_of(like: Tensor, last) -> Tensor:
    """An empty result with the memory order of `like`, and `last` channels."""
    if like.dim() == 4 and like.stride(1) < like.stride(2):
        batch, heads, length = like.shape[:3]
        return like.new_empty(batch, length, heads, last).transpose(1, 2)
    return like.new_empty(*like.shape[:-1], last)


def empty_residual(query: Tensor, last, wanted: bool) -> Tensor:
    """Where the rounding errors of a half-precision output go; a float32 output has none."""
    wanted = wanted and query.dtype != torch.float32
    return in_order_of(query, last) if wanted else query.new_empty(0)


def _forward_fake(query, key, value, *options):
    rows = query.shape[:-1] if query.dim() == 4 else (query.shape[1], query.shape[0])
    lse = query.new_empty((2, *rows), dtype=torch.float32)
    return in_order_of(query, value.shape[-1]), lse, empty_residual(query, value.shape[-1], options[-2])


def _backward_fake(grad_out, grad_lse, query, key, value, out, lse, residual, *options):
    learned, needs = (options[0], *options[4:7], *options[9:11]), (*options[-5:], options[-1])
    rest = [
        like.new_empty(like.shape) if need else query.new_empty(0, dtype=torch.float32)
        for like, need in zip(learned, needs, strict=True)
    ]
    return (*(in_order_of(t, t.shape[-1]) for t in (query, key, value)), *rest)


def _save_forward(ctx, inputs, output):
    query, key, value, *options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, *output, *options[:TENSOR_OPTIONS])
    ctx.numbers = options[TENSOR_OPTIONS:-2]


def _save_backward(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    tensors = [i for i, x in enumerate(inputs) if isinstance(x, Tensor)]
    ctx.tensor_places, ctx.inputs = tensors, [None if isinstance(x, Tensor) else x for x in inputs]
    ctx.save_for_backward(*(inputs[i] for i in tensors))


def _second_order(ctx, *grad_grads):
    """Vector-Jacobian product of the backward, recomputed through the reference: materialises the scores."""
    inputs = list(ctx.inputs)
    for place, tensor in zip(ctx.tensor_places, ctx.saved_tensors, strict=True):
        inputs[place] = tensor
    grad_out, grad_lse, query, key, value, _, _, _, *options = inputs
    mask, key_lengths, cu_q, cu_k, alibi_slopes, distance_bias, sinks, seed, *options = options
    global_keys, rel_h, rel_w, max_q, max_k, scale, softcap, dropout_p, causal, left, right, *_ = options
    tensors = {
        "query": query, "key": key, "value": value, "mask": mask, "alibi_slopes": alibi_slopes,
        "distance_bias": distance_bias, "sinks": sinks, "rel_h": rel_h, "rel_w": rel_w,
        "grad_out": grad_out, "grad_lse": grad_lse,
    }  # fmt: skip
    leaves = {n: leaf_of("attention", t) for n, t in tensors.items() if t is not None and t.is_floating_point()}
    with torch.enable_grad():
        distances = leaves.get("distance_bias")
        if distances is not None:
            distances = _Distances(distances, (max_q if causal == TOP_LEFT else max_k) - 1)
        keywords = {
            "key_lengths": key_lengths, "alibi_slopes": leaves.get("alibi_slopes"), "relative_bias": distances,
            "sinks": leaves.get("sinks"),
            "causal": (False, True, "top_left")[causal], "window": (left, right), "scale": scale, "softcap": softcap,
            "dropout_p": dropout_p, "dropout_seed": seed, "return_lse": True,
        }  # fmt: skip
        qkv = leaves["query"], leaves["key"], leaves["value"]
        if query.dim() == 4:
            keywords |= {"mask": leaves.get("mask", mask), "global_keys": global_keys}
            if rel_h is not None:
                keywords["decomposed_bias"] = leaves["rel_h"], leaves["rel_w"]
            out, lse = reference.attention(*qkv, **keywords)
        else:
            out, lse = reference.varlen_attention(*qkv, cu_q, cu_k, **keywords)
        outputs, weights = [out], [leaves["grad_out"]]
        if grad_lse is not None:
            outputs.append(lse.masked_fill(lse.isinf(), 0).to(leaves["grad_lse"].dtype))
            weights.append(leaves["grad_lse"])
        wanted = [(leaves[n], g) for n, g in zip(tensors, grad_grads, strict=False) if n in leaves and g is not None]
        if not wanted:
            return (None,) * len(ctx.inputs)
        first = torch.autograd.grad(
            outputs, [t for t, _ in wanted], weights, create_graph=True, allow_unused=True, materialize_grads=True
        )
        pairs = [(f, g) for f, (_, g) in zip(first, wanted, strict=True) if f.requires_grad]
        second = torch.autograd.grad(
            [f for f, _ in pairs], list(leaves.values()), [g for _, g in pairs], allow_unused=True
        ) if pairs else [None] * len(leaves)  # fmt: skip
    grads = dict(zip(leaves, second, strict=True))
    at = {"grad_out": 0, "grad_lse": 1, "query": 2, "key": 3, "value": 4, "mask": 8, "alibi_slopes": 12}
    at |= {"distance_bias": 13, "sinks": 14, "rel_h": 17, "rel_w": 18}
    result = [None] * len(ctx.inputs)
    for name, grad in grads.items():
        if ctx.needs_input_grad[at[name]]:
            result[at[name]] = grad
    return tuple(result)


class _Distances:
    """A relative bias out of the operator's vector of distances, entry `offset` of which is distance 0."""

    def __init__(self, values: Tensor, offset):
        self.values, self.offset = values, offset

    def values_for(self, len_q, len_k, *, top_left=False) -> Tensor:
        first = self.offset + 1 - (len_q if top_left else len_k)
        return self.values[:, first : first + max(len_q + len_k - 1, 0)]


def register_autocast(forward, device: str):
    """Casts query, key and value to the dtype of autocast, as torch does its own attention: float64 stays."""
    key = torch._C.DispatchKey.AutocastCPU if device == "cpu" else torch._C.DispatchKey.AutocastCUDA
    excluded = torch._C.DispatchKeySet(key)

    def autocast(query, key, value, *options):
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return forward(*in_autocast_dtype(device, query, key, value), *options)

    _LIBRARY.impl(forward, autocast, "AutocastCPU" if device == "cpu" else "AutocastCUDA")
