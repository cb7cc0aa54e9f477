"""Attention to the nearest keys of a map: `neighborhood_attention` and its table of backends."""

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
    kernel_limits,
    triton_problem,
    triton_unproven,
    triton_unsupported,
)
from . import checks
from . import neighborhood_operator as operator
from .attention_operator import apply_twin


@dataclass(slots=True)
class Call:
    """A checked call, options one an axis."""

    query: Tensor
    key: Tensor
    value: Tensor
    kernel: tuple[int, ...]
    dilation: tuple[int, ...]
    causal: tuple[bool, ...]
    table: Tensor | None
    scale: float | None


def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | Sequence[int],
    *,
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
    relative_bias_table: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """softmax(scale * Q K^T + bias) V over the kernel_size nearest keys of each query along each axis of a map.

    Hassani et al., "Neighborhood Attention Transformer" (2023) and, with dilation, "Dilated Neighborhood Attention
    Transformer" (2022); NATTEN's windows, in one to three dimensions, at a cost linear in the map. Along an axis,
    places `dilation` apart are a group of L that attend to each other alone. Query i of a group sees the keys from
    clamp(i - kernel_size // 2, 0, L - kernel_size) on, kernel_size of them: at a border the window is moved inward.
    Where the axis is causal, it sees the keys from max(0, i - kernel_size + 1) to i.

    Args:
        query: (B, *space, H, D) with one to three axes of space, float32, bfloat16 or float16 (float64: reference
            formula). Any strides; rows with a unit last stride are read in place, such as slices of a packed
            projection (B, height, width, 3, H, D).
        key, value: (B, *space, Hkv, D or Dv), H a multiple of Hkv (GQA: query head h reads head h // (H / Hkv)).
        kernel_size: keys that a query sees along each axis, odd or even, or one number an axis. kernel_size * dilation
            must not exceed the map's side.
        dilation: distance of neighbours, or one an axis.
        causal: keys do not lie past the query, along every axis or one answer an axis.
        relative_bias_table: (prod(2 * kernel_size - 1), H), added by relative place: of distances j - i of key and
            query (in steps of dilation), row j - i + kernel_size - 1, the last axis running fastest. Axes are in the
            order of `window_attention`'s table, but distances run the other way (Swin's are i - j): flip(0) turns one
            into the other. NATTEN's rpb (H, 2k - 1, ...) is this table as rpb.flatten(1).T.
        scale: default 1/sqrt(D).
        backend: "triton", "cpu" or "reference"; None takes the first that supports the call (`xformer_fast.explain`).

    Returns:
        (B, *space, H, Dv), in query's memory order. Differentiable in every tensor.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value; the message names it.
        BackendUnavailable: the backend asked for cannot run this call.

    >>> import torch, xformer_fast
    >>> q, k, v = torch.randn(2, 14, 14, 3, 4, 32).unbind(3)
    >>> table = torch.randn(13 * 13, 4)
    >>> xformer_fast.neighborhood_attention(q, k, v, 7, dilation=(1, 2), relative_bias_table=table).shape
    torch.Size([2, 14, 14, 4, 32])
    """
    call = _checked(query, key, value, kernel_size, dilation, causal, relative_bias_table, scale)
    return TABLE.run(call, backend)


def explain(
    query, key, value, kernel_size, *, dilation=1, causal=False, relative_bias_table=None, scale=None, backend=None
):
    """Backend -> why it would not be chosen for `neighborhood_attention(...)`; "" if nothing bars it."""
    call = _checked(query, key, value, kernel_size, dilation, causal, relative_bias_table, scale)
    return TABLE.reasons(call, backend)


def _checked(query, key, value, kernel_size, dilation, causal, table, scale) -> Call:
    checks.check_tensors(query=query, key=key, value=value)
    axes = query.dim() - 3
    if not 1 <= axes <= 3:
        raise ValueError(
            f"query must be (B, *space, H, D) with one to three axes of space, got shape {tuple(query.shape)}"
        )
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        checks.check_dtype(name, tensor, query.dtype)
        checks.check_device(name, tensor, query.device)
        if tensor.dim() != query.dim() or tensor.shape[:-2] != query.shape[:-2]:
            raise ValueError(
                f"{name} must be (B, *space, H, D) on query's map, {tuple(query.shape)}, got shape "
                f"{tuple(tensor.shape)}"
            )
    (heads, dim), (heads_kv, dim_v) = query.shape[-2:], value.shape[-2:]
    if key.shape[-1] != dim:
        raise ValueError(f"key has head_dim {key.shape[-1]}, query has {dim}: they must be equal")
    if dim < 1 or dim_v < 1:
        raise ValueError(f"query and value must have head_dim >= 1, got {dim} and {dim_v}")
    if key.shape[-2] != heads_kv:
        raise ValueError(f"value has {heads_kv} heads, key has {key.shape[-2]}: they must be equal")
    if heads < 1 or heads_kv < 1 or heads % heads_kv:
        raise ValueError(f"key has {heads_kv} heads; they must divide the query's {heads}")
    kernel, dilation = _sizes("kernel_size", kernel_size, axes), _sizes("dilation", dilation, axes)
    causal = reference.per_axis(causal, axes)
    if len(causal) != axes or any(not isinstance(flag, bool) for flag in causal):
        raise ValueError(f"causal must be True or False, or {axes} of them, one an axis, got {causal!r}")
    for side, k, step in zip(query.shape[1:-2], kernel, dilation, strict=True):
        if k * step > side:
            raise ValueError(
                f"kernel_size * dilation must not exceed the map's sides {tuple(query.shape[1:-2])}, got kernels of "
                f"{kernel}, dilation {dilation}"
            )
    checks.check_numbers(scale, None, 0.0)
    if table is not None:
        checks.check_float("relative_bias_table", table)
        checks.check_device("relative_bias_table", table, query.device)
        shape = (math.prod([2 * k - 1 for k in kernel]), heads)
        if table.shape != shape:
            raise ValueError(f"relative_bias_table must have shape {shape}, got {tuple(table.shape)}")
    return Call(query, key, value, kernel, dilation, causal, table, scale)


def _sizes(name: str, given, axes: int) -> tuple[int, ...]:
    sizes = reference.per_axis(given, axes)
    if len(sizes) != axes:
        raise ValueError(f"{name} must be an int or {axes} of them, one an axis, got {given!r}")
    if any(isinstance(n, bool) or not isinstance(n, int) for n in sizes):
        raise TypeError(f"{name} must be an int or a tuple of ints, got {given!r}")
    if min(sizes) < 1:
        raise ValueError(f"{name} must be at least 1, got {given!r}")
    return sizes


# ---- backends


def run_reference(call: Call) -> Tensor:
    return reference.neighborhood_attention(
        call.query, call.key, call.value, call.kernel, dilation=call.dilation, causal=call.causal,
        relative_bias_table=call.table, scale=call.scale,
    )  # fmt: skip


def kernel_runner(kernels: operator.Operator) -> Callable[[Call], Tensor]:
    """Runs a checked call on a registered operator."""

    def run(call: Call) -> Tensor:
        tensors = call.query, call.key, call.value, call.table
        checks.refuse_forward_ad("neighborhood_attention", *tensors)
        arguments = (
            *tensors[:3],
            None if call.table is None else call.table.float().contiguous(),
            call.kernel,
            call.dilation,
            tuple(map(int, call.causal)),
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
    return kernel_limits(call.query, call.value, 512)


def _triton_unsupported(call: Call) -> str | None:
    return triton_unsupported(call.query.device) or kernel_limits(call.query, call.value, 256)


def _triton_unproven(call: Call) -> str | None:
    return triton_unproven("neighborhood_attention", call.query.device)


def _triton_runner() -> Callable:
    def forward(*arguments):
        from ..kernels import neighborhood_attention as kernels

        return kernels.forward(*arguments)

    def backward(*arguments):
        from ..kernels import neighborhood_attention_backward as kernels

        return kernels.backward(*arguments)

    operator.define("triton", forward, backward, ("CUDA", "CPU") if triton_problem() is None else ("CUDA",))
    return kernel_runner(operator.register("triton"))


def _cpu_runner() -> Callable:
    return kernel_runner(operator.register("cpu")) if build_problem() is None else run_reference


TABLE = Table(
    "neighborhood_attention",
    [
        Backend("triton", _triton_runner(), triton_problem, _triton_unsupported, _triton_unproven),
        Backend("cpu", _cpu_runner(), build_problem, _cpu_unsupported),
        Backend("reference", run_reference, lambda: None, lambda call: None),
    ],
)
