"""Rotary position embedding: `apply_rope`, what `Rope` runs on, and their table of backends."""

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
    triton_problem,
    triton_unproven,
    triton_unsupported,
)
from . import checks
from . import rope_operator as operator


@dataclass(slots=True)
class Call:
    """A checked call: one tensor, or query and key, to rotate by the same tables.

    Tensors are (B, H, S, D) or packed (T, H, D); where positions are None, row s stands at `first` + s.
    """

    tensors: tuple[Tensor, ...]
    positions: tuple[Tensor | None, ...]
    first: tuple[int, ...]
    cos: Tensor
    sin: Tensor
    sections: Sequence[int] | None = None
    interleaved: bool = False
    inverse: bool = False
    inplace: bool = False
    names: tuple[str, ...] = ("positions",)  # what errors call the positions


def apply_rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    positions: Tensor | None = None,
    sections: Sequence[int] | None = None,
    interleaved: bool = False,
    inverse: bool = False,
    inplace: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Rotates pairs of channels of x by the angles of their row's position, in one pass.

    Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021). Computed in float32 (float64 for
    float64). The gradient is the rotation back: autograd keeps cos, sin and positions, never x.

    Args:
        x: (B, H, S, D) float32, bfloat16, float16 (or float64: reference formula). Any strides; rows with a unit last
            stride are read in place.
        cos, sin: (P, R/2), a row a position (`rope_tables`), of any float dtype; float32 is read as it is. R <= D: the
            first R channels turn, the others pass through ("partial rotary"). Only the reference formula has a
            gradient for them: tables that require grad choose it.
        positions: int32 or int64, rows of the tables: (S,), (B, S), or (axes, B, S) with `sections`; default 0..S-1.
        sections: with (axes, B, S) positions, how many of the R/2 angles follow each axis (M-RoPE, 2-D axial); sums to
            R/2, at most 8.
        interleaved: pairs are neighbours (2k, 2k + 1) (GPT-J); otherwise (k, k + R/2) (NeoX, LLaMA).
        inverse: rotates by the negative angles.
        inplace: rotates x itself and returns it. As with torch's own, a leaf that requires grad cannot be.
        backend: "cpu", "triton", "cuda" or "reference"; None takes the first that supports the call
            (`xformer_fast.explain`).

    Returns:
        A tensor of x's shape and dtype, in its memory order; with inplace, x.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value; the message names it.
        BackendUnavailable: the backend asked for cannot run this call.

    >>> import torch, xformer_fast
    >>> inv_freq, factor = xformer_fast.rope_frequencies(64)
    >>> cos, sin = xformer_fast.rope_tables(inv_freq, 128, factor=factor)
    >>> xformer_fast.apply_rope(torch.randn(2, 8, 128, 64), cos, sin).shape
    torch.Size([2, 8, 128, 64])
    """
    call = _checked(x, cos, sin, positions, sections, interleaved, inverse, inplace)
    return TABLE.run(call, backend)[0]


def rotate(call: Call, backend: str | None = None) -> tuple[Tensor, ...]:
    """Rotates the tensors of a call whose arguments were checked (`Rope` does so)."""
    return TABLE.run(call, backend)


def explain(
    x, cos, sin, *, positions=None, sections=None, interleaved=False, inverse=False, inplace=False, backend=None
):
    """Backend -> why it would not be chosen for `apply_rope(...)`; "" if nothing bars it."""
    return TABLE.reasons(_checked(x, cos, sin, positions, sections, interleaved, inverse, inplace), backend)


def _checked(x, cos, sin, positions, sections, interleaved, inverse, inplace) -> Call:
    checks.check_tensors(x=x, cos=cos, sin=sin)
    if x.dim() != 4 or x.shape[-1] < 1:
        raise ValueError(f"x must be (B, H, S, D), got shape {tuple(x.shape)}")
    checks.check_float("x", x)
    check_tables(cos, sin, sections)
    if positions is not None:
        checks.check_tensors(positions=positions)
    for name, tensor in (("cos", cos), ("sin", sin), ("positions", positions)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}: they must share a device")
    if 2 * cos.shape[1] > x.shape[-1]:
        raise ValueError(f"cos and sin rotate {2 * cos.shape[1]} channels, but x has {x.shape[-1]}")
    batch, _, length, _ = x.shape
    if positions is not None:
        check_positions("positions", positions, sections, batch, length)
    elif length > cos.shape[0]:
        raise ValueError(f"cos and sin have {cos.shape[0]} positions, too few for {length} rows of x")
    if inplace and any(step == 0 and size > 1 for step, size in zip(x.stride(), x.shape, strict=True)):
        raise ValueError("x must not be expanded to be rotated in place: several elements share one place in memory")
    return Call((x,), (positions,), (0,), cos, sin, sections, interleaved, inverse, inplace)


def check_tables(cos: Tensor, sin: Tensor, sections: Sequence[int] | None):
    checks.check_tensors(cos=cos, sin=sin)
    if cos.dim() != 2 or cos.shape != sin.shape:
        raise ValueError(f"cos and sin must both be (P, R/2), got {tuple(cos.shape)} and {tuple(sin.shape)}")
    checks.check_float("cos", cos)
    checks.check_float("sin", sin)
    if sections is None:
        return
    if not isinstance(sections, (tuple, list)) or any(type(n) is not int for n in sections):
        raise TypeError(f"sections must be a tuple of ints, got {sections!r}")
    if not sections or sum(sections) != cos.shape[1] or min(sections) < 0 or len(sections) > 8:
        raise ValueError(
            f"sections must sum to R/2 = {cos.shape[1]}, each at least 0 and at most 8 of them, got {tuple(sections)}"
        )


def check_positions(name: str, positions: Tensor, sections: Sequence[int] | None, batch=None, length=None):
    """Type and shape; the batch and the number of rows only if they are given."""
    checks.check_tensors(**{name: positions})
    if positions.dim() not in (1, 2, 3):
        raise ValueError(f"{name} must be (S,), (B, S) or (axes, B, S), got shape {tuple(positions.shape)}")
    if positions.dim() == 3 and (sections is None or len(sections) != positions.shape[0]):
        raise ValueError(f"{name} of shape (axes, B, S) needs sections, one number of angles an axis")
    if positions.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {positions.dtype}")
    if length is None:
        return
    if positions.shape[-1] != length or (positions.dim() > 1 and positions.shape[-2] not in (1, batch)):
        raise ValueError(f"rope: {name} must be for {length} rows of {batch} sequences, got {tuple(positions.shape)}")


# ---- backends


def check_values(call: Call):
    """What the CPU kernels check themselves: values of positions."""
    for name, positions in zip(call.names, call.positions, strict=True):
        if positions is not None and positions.numel() and checks.values_are_readable(positions):
            least, most = (p.item() for p in positions.aminmax())
            if least < 0 or most >= call.cos.shape[0]:
                rows = call.cos.shape[0] - 1
                raise ValueError(f"rope: {name} must lie in 0..{rows}, the tables' rows, got {least}..{most}")


def run_reference(call: Call) -> tuple[Tensor, ...]:
    check_values(call)
    results = []
    for x, positions, first in zip(call.tensors, call.positions, call.first, strict=True):
        packed = x.dim() == 3
        x = x.transpose(0, 1)[None] if packed else x
        if positions is None:
            positions = torch.arange(first, first + x.shape[2], device=x.device)
        options = {"sections": call.sections, "interleaved": call.interleaved, "inverse": call.inverse}
        out = reference.apply_rope(x, call.cos, call.sin, positions=positions, **options)
        results.append(out[0].transpose(0, 1) if packed else x.copy_(out) if call.inplace else out)
    return tuple(results)


def kernel_runner(operators: operator.Operators) -> Callable[[Call], tuple[Tensor, ...]]:
    """Runs a checked call on registered operators."""

    def run(call: Call) -> tuple[Tensor, ...]:
        checks.refuse_forward_ad("apply_rope", *call.tensors, call.cos, call.sin)
        sections = None if call.sections is None else list(call.sections)
        cos, sin = (table if table.dtype == torch.float32 else table.float() for table in (call.cos, call.sin))
        arguments = cos, sin, *call.positions, *call.first, sections, call.interleaved, call.inverse
        if call.inplace:
            return (_run_in_place(operators, call.tensors[0], arguments),)
        if len(call.tensors) == 2:
            return _run(operators.pair, operators.pair_twin, (*call.tensors, *arguments))
        return (_run(operators.one, operators.one_twin, (*call.tensors, *arguments)),)

    return run


def _run(forward: Callable, twin: type, arguments):
    if torch.compiler.is_compiling():
        return forward(*arguments)
    try:
        if torch._C._are_functorch_transforms_active():
            return twin.apply(*arguments)
        if torch.is_grad_enabled() and (arguments[0].requires_grad or arguments[1].requires_grad):
            return forward(*arguments)
        with torch._C._AutoDispatchBelowAutograd():  # spares the operator's autograd wrapper, which is Python
            return forward(*arguments)
    except RuntimeError as error:
        raise checks.as_value_error(error) from None


def _run_in_place(operators: operator.Operators, x: Tensor, arguments) -> Tensor:
    tracked = torch.is_grad_enabled() and x.requires_grad
    if torch._C._are_functorch_transforms_active() or (torch.compiler.is_compiling() and tracked):
        return x.copy_(_run(operators.one, operators.one_twin, (x, *arguments)))  # torch makes what it can of it
    if torch.compiler.is_compiling():
        operators.in_place(x, *arguments)
        return x
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        return x.copy_(_run(operators.one, operators.one_twin, (x, *arguments)))
    try:
        if tracked:
            if x.is_leaf:
                raise RuntimeError("a leaf Variable that requires grad is being used in an in-place operation.")
            return operators.in_place_twin.apply(x, *arguments)
        with torch._C._AutoDispatchBelowAutograd():
            operators.in_place(x, *arguments)
    except RuntimeError as error:
        raise checks.as_value_error(error) from None
    if not x.is_inference():
        torch.autograd.graph.increment_version(x)
    return x


def _kernel_limits(call: Call) -> str | None:
    if any(x.dtype == torch.float64 for x in call.tensors):
        return "float64 runs through the reference formula"
    if torch.is_grad_enabled() and (call.cos.requires_grad or call.sin.requires_grad):
        return "cos or sin requires grad, for which only the reference formula has a gradient"
    return None


def _cpu_unsupported(call: Call) -> str | None:
    if any(x.device.type != "cpu" for x in call.tensors):
        return f"tensors are on {call.tensors[0].device}, not on the CPU"
    return _kernel_limits(call)


def _triton_unsupported(call: Call) -> str | None:
    return triton_unsupported(call.tensors[0].device) or _kernel_limits(call)


def _triton_unproven(call: Call) -> str | None:
    return triton_unproven("apply_rope", call.tensors[0].device)


def _triton_runner() -> Callable:
    def launch(name: str):
        def function(*arguments):
            from ..kernels import rope as kernels

            return getattr(kernels, name)(*arguments)

        return function

    keys = ("CUDA", "CPU") if triton_problem() is None else ("CUDA",)
    operator.define("triton", launch("rotate"), launch("rotate_pair"), launch("rotate_in_place"), keys)
    return kernel_runner(operator.register("triton"))


def _cuda_unsupported(call: Call) -> str | None:
    return cuda_unsupported("rope_cuda", call.tensors[0].device) or _kernel_limits(call)


def _cuda_unproven(call: Call) -> str | None:
    return cuda_unproven("apply_rope", call.tensors[0].device)


def _cuda_problem() -> str | None:
    return cuda_problem("rope_cuda")


def _cuda_runner() -> Callable:
    return kernel_runner(operator.register("cuda")) if _cuda_problem() is None else run_reference


def _cpu_runner() -> Callable:
    return kernel_runner(operator.register("cpu")) if build_problem() is None else run_reference


TABLE = Table(
    "apply_rope",
    [
        Backend("triton", _triton_runner(), triton_problem, _triton_unsupported, _triton_unproven),
        Backend("cuda", _cuda_runner(), _cuda_problem, _cuda_unsupported, _cuda_unproven),
        Backend("cpu", _cpu_runner(), build_problem, _cpu_unsupported),
        Backend("reference", run_reference, lambda: None, lambda call: None),
    ],
    check_values,
)
