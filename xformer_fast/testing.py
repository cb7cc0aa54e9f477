"""When is a kernel right: one rule, shared by tests and benchmarks, for every output and every gradient.

    max|result - reference| <= 2 * max|naive - reference| + atol * max|reference|

`reference` is the naive formula in float64 on the same (rounded) inputs, `naive` the same formula in the kernel's own
dtype: a fused kernel may err twice as much as unfused code, plus a few roundings of the largest value.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

ATOL = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 1e-4, torch.bfloat16: 1e-3}


@dataclass(frozen=True)
class Error:
    """How far a result is from its reference: the largest error, what the rule allows, and the relative RMS error."""

    largest: float
    allowed: float
    relative_rms: float


def measure(result: Tensor, reference: Tensor, naive: Tensor, *, dtype: torch.dtype, magnitude: float = 0.0) -> Error:
    """The error of `result` under the rule. Infinities of the reference (an lse of no key) must be met exactly.

    dtype: the dtype of query, key and value, which sets the tolerance (a float32 lse of bfloat16 inputs is judged as
    bfloat16). magnitude: the size of what the reference is a difference of, where that difference is zero by
    cancellation (softmax over a single key has no gradient); max|reference| otherwise.
    """
    result, reference, naive = (t.detach().double() for t in (result, reference, naive))
    if result.shape != reference.shape:
        raise AssertionError(f"shape is {tuple(result.shape)}, must be {tuple(reference.shape)}")
    finite = reference.isfinite()
    if not torch.equal(result[~finite], reference[~finite]):
        raise AssertionError("infinities differ from the reference's")
    result, reference, naive = result[finite], reference[finite], naive[finite]
    if not result.numel():
        return Error(0.0, 0.0, 0.0)
    difference = result - reference
    largest = difference.abs().max().item()
    size = max(reference.abs().max().item(), magnitude)
    allowed = 2 * (naive - reference).abs().max().item() + ATOL[dtype] * size
    rms = difference.square().mean().sqrt().item() / max(reference.square().mean().sqrt().item(), 1e-300)
    return Error(largest, allowed, rms)


def check_close(
    result: Tensor, reference: Tensor, naive: Tensor, name: str = "result", *, dtype=None, magnitude: float = 0.0
) -> Error:
    """The error of `result`; raises AssertionError, naming `name` and the worst element, where the rule is broken.

    >>> import torch
    >>> from xformer_fast.testing import check_close
    >>> x = torch.rand(100, dtype=torch.float64)
    >>> error = check_close(x.float().exp(), x.exp(), x.float().exp())
    """
    try:
        error = measure(result, reference, naive, dtype=dtype or result.dtype, magnitude=magnitude)
    except AssertionError as failure:
        raise AssertionError(f"{name}: {failure}") from None
    if not error.largest <= error.allowed:  # NaN fails
        difference = (result.detach().double() - reference.double()).nan_to_num(nan=float("inf")).abs()
        where = tuple(i.item() for i in torch.unravel_index(difference.argmax(), difference.shape))
        raise AssertionError(
            f"{name}: error {error.largest:.3e} exceeds {error.allowed:.3e}, relative RMS {error.relative_rms:.1e}; "
            f"worst at {where}: {result[where].item():.6g}, reference {reference[where].item():.6g}, "
            f"naive {naive[where].item():.6g}"
        )
    return error
