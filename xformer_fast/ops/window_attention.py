"""Attention inside the windows of a map: `window_attention` and its table of backends."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import reference
from ..dispatch import (
    Backend,
    Table,
    build_problem,
    cuda_problem,
    cuda_unproven,
    cuda_unsupported,
    kernel_limits,
    triton_problem,
    triton_unproven,
    triton_unsupported,
)
from . import checks
from . import window_operator as operator
from .attention_operator import apply_twin


@dataclass(slots=True)
class Call:
    """A checked call, sizes one an axis."""

    query: Tensor
    key: Tensor
    value: Tensor
    window: tuple[int, ...]
    shift: tuple[int, ...]
    table: Tensor | None
    bias: Tensor | None
    logit_scale: Tensor | None
    grid: bool
    scale: float | None


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window_size: int | Sequence[int],
    *,
    shift: int | Sequence[int] = 0,
    relative_bias_table: Tensor | None = None,
    bias: Tensor | None = None,
    logit_scale: Tensor | None = None,
    partition: str = "window",
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """softmax(scale * Q K^T + biases) V inside each window of a map: Swin, Swin-V2, MaxViT, in one to three dimensions.

    Liu et al., "Swin Transformer" (2021) and "Swin Transformer V2" (2022); Tu et al., "MaxViT" (2022). The cyclic
    shift, the partition, the region mask and the reverse are addresses inside the kernel: the map comes and goes as it
    lies.

    Args:
        query, key, value: (B, *space, H, D) with one to three axes of space, float32, bfloat16 or float16 (float64:
            reference formula). value may have another D. Any strides; rows with a unit last stride are read in place,
            such as slices of a packed projection (B, height, width, 3, H, D).
        window_size: side of a window, or one an axis. It must divide the map's sides: pad before the projection.
        shift: how far the map is rolled before it is cut, 0 <= shift < window_size, or one an axis. Tokens of a window
            that come from opposite borders do not see each other (Swin's mask).
        relative_bias_table: (prod(2 * window_size - 1), H), a bias of the relative place, rows in Swin's order.
        bias: (H, N, N), added for the N = prod(window_size) tokens of every window (Swin-V2's computed bias).
        logit_scale: (H,), cosine attention (Swin-V2): the cosines of query and key times it, in place of `scale`. It is
            the last factor, after what a model does to it (clamp, exp).
        partition: "window", neighbours; or "grid" (MaxViT): window_size is the side of the grid, and tokens a distance
            of side / window_size apart attend to each other; shift must be 0.
        scale: default 1/sqrt(D).
        backend: "cpu", "triton", "cuda" or "reference"; None takes the first that supports the call
            (`xformer_fast.explain`).

    Returns:
        (B, *space, H, D of value), in query's memory order. Differentiable in every tensor.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value; the message names it.
        BackendUnavailable: the backend asked for cannot run this call.

    >>> import torch, xformer_fast
    >>> q, k, v = torch.randn(2, 56, 56, 3, 3, 32).unbind(3)
    >>> table = torch.randn(13 * 13, 3)
    >>> xformer_fast.window_attention(q, k, v, 7, shift=3, relative_bias_table=table).shape
    torch.Size([2, 56, 56, 3, 32])
    """
    call = _checked(query, key, value, window_size, shift, relative_bias_table, bias, logit_scale, partition, scale)
    return TABLE.run(call, backend)


def explain(
    query, key, value, window_size, *, shift=0, relative_bias_table=None, bias=None, logit_scale=None,
    partition="window", scale=None, backend=None,
):  # fmt: skip
    """Backend -> why it would not be chosen for `window_attention(...)`; "" if nothing bars it."""
    call = _checked(query, key, value, window_size, shift, relative_bias_table, bias, logit_scale, partition, scale)
    return TABLE.reasons(call, backend)


def _checked(query, key, value, window_size, shift, table, bias, logit_scale, partition, scale) -> Call:
    checks.check_tensors(query=query, key=key, value=value)
    axes = query.dim() - 3
    if not 1 <= axes <= 3:
        raise ValueError(
            f"query must be (B, *space, H, D) with one to three axes of space, got shape {tuple(query.shape)}"
        )
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        checks.check_dtype(name, tensor, query.dtype)
        checks.check_device(name, tensor, query.device)
        if tensor.dim() != query.dim() or tensor.shape[:-1] != query.shape[:-1]:
            raise ValueError(
                f"{name} must be (B, *space, H, D) like query, {tuple(query.shape)}, got shape {tuple(tensor.shape)}"
            )
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"key has head_dim {key.shape[-1]}, query has {query.shape[-1]}: they must be equal")
    heads, dim = query.shape[-2:]
    if heads < 1 or dim < 1 or value.shape[-1] < 1:
        raise ValueError(f"query and value must have heads and head_dim >= 1, got {heads}, {dim}, {value.shape[-1]}")
    if partition not in ("window", "grid"):
        raise ValueError(f'partition must be "window" or "grid", got {partition!r}')
    window = _sizes("window_size", window_size, axes)
    shift = _sizes("shift", shift, axes)
    for side, w, s in zip(query.shape[1:-2], window, shift, strict=True):
        if w < 1 or side % w:
            raise ValueError(
                f"window_size must divide the map's sides {tuple(query.shape[1:-2])}, got {window}: pad the map before "
                "the projection"
            )
        if not 0 <= s < w:
            raise ValueError(f"shift must lie in 0..window_size - 1, got {shift} for windows of {window}")
    if partition == "grid" and any(shift):
        raise ValueError(f'shift must be 0 with partition="grid", got {shift}')
    tokens, rows = math.prod(window), math.prod([2 * w - 1 for w in window])
    for name, tensor, shape in (
        ("relative_bias_table", table, (rows, heads)),
        ("bias", bias, (heads, tokens, tokens)),
        ("logit_scale", logit_scale, (heads,)),
    ):
        if tensor is None:
            continue
        checks.check_float(name, tensor)
        checks.check_device(name, tensor, query.device)
        if tensor.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
    if logit_scale is not None and scale is not None:
        raise ValueError("scale must be None with logit_scale, which takes its place")
    checks.check_numbers(scale, None, 0.0)
    return Call(query, key, value, window, shift, table, bias, logit_scale, partition == "grid", scale)


def _sizes(name: str, given, axes: int) -> tuple[int, ...]:
    sizes = reference.per_axis(given, axes)
    if len(sizes) != axes:
        raise ValueError(f"{name} must be an int or {axes} of them, one an axis, got {given!r}")
    if any(isinstance(n, bool) or not isinstance(n, int) for n in sizes):
        raise TypeError(f"{name} must be an int or a tuple of ints, got {given!r}")
    return sizes


# ---- backends


def run_reference(call: Call) -> Tensor:
    return reference.window_attention(
        call.query, call.key, call.value, call.window, shift=call.shift, relative_bias_table=call.table, bias=call.bias,
        logit_scale=call.logit_scale, partition="grid" if call.grid else "window", scale=call.scale,
    )  # fmt: skip


def kernel_runner(kernels: operator.Operator) -> Callable[[Call], Tensor]:
    """Runs a checked call on a registered operator."""

    def run(call: Call) -> Tensor:
        tensors = call.query, call.key, call.value, call.table, call.bias, call.logit_scale
        checks.refuse_forward_ad("window_attention", *tensors)
        arguments = (
            *tensors[:3],
            *(None if t is None else t.float().contiguous() for t in tensors[3:]),
            call.window,
            call.shift,
            call.grid,
            call.query.shape[-1] ** -0.5 if call.scale is None else float(call.scale),
        )
        if torch.compiler.is_compiling():
            return kernels.forward(*arguments)
        if torch._C._are_functorch_transforms_active():
            return apply_twin(kernels.transformed, *arguments)
        if torch.is_autocast_enabled(call.query.device.type):
            return kernels.forward(*arguments)
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
            return kernels.eager.apply(*arguments)
        with torch._C._AutoDispatchBelowAutograd():  # spares the operator's autograd wrapper, which is Python
            return kernels.forward(*arguments)

    return run


def _cpu_unsupported(call: Call) -> str | None:
    if call.query.device.type != "cpu":
        return f"tensors are on {call.query.device}, not on the CPU"
    if call.query.dtype == torch.float64:
        return "float64 runs through the reference formula"
    return None


def _triton_unsupported(call: Call) -> str | None:
    return triton_unsupported(call.query.device) or kernel_limits(call.query, call.value, 256)


def _triton_unproven(call: Call) -> str | None:
    return triton_unproven("window_attention", call.query.device)


def _triton_runner() -> Callable:
    def forward(*arguments):
        from ..kernels import window_attention as kernels

        return kernels.forward(*arguments)

    def backward(*arguments):
        from ..kernels import window_attention_backward as kernels

        return kernels.backward(*arguments)

    keys = ("CUDA", "CPU") if triton_problem() is None else ("CUDA",)
    operator.define("triton", forward, backward, keys)
    return kernel_runner(operator.register("triton"))


def _cuda_unsupported(call: Call) -> str | None:
    if call.query.dtype == torch.float64:
        return "float64 runs through the reference formula"
    if max(call.query.shape[-1], call.value.shape[-1]) > 128:
        return "head_dim is at most 128"
    if math.prod(call.window) > 1024:
        return "a window has at most 1024 tokens"
    return cuda_unsupported("window_attention_cuda", call.query.device)


def _cuda_unproven(call: Call) -> str | None:
    return cuda_unproven("window_attention", call.query.device)


def _cuda_problem() -> str | None:
    return cuda_problem("window_attention_cuda")


def _cuda_runner() -> Callable:
    return kernel_runner(operator.register("cuda")) if _cuda_problem() is None else run_reference


def _cpu_runner() -> Callable:
    return kernel_runner(operator.register("cpu")) if build_problem() is None else run_reference


TABLE = Table(
    "window_attention",
    [
        Backend("triton", _triton_runner(), triton_problem, _triton_unsupported, _triton_unproven),
        Backend("cuda", _cuda_runner(), _cuda_problem, _cuda_unsupported, _cuda_unproven),
        Backend("cpu", _cpu_runner(), build_problem, _cpu_unsupported),
        Backend("reference", run_reference, lambda: None, lambda call: None),
    ],
)
