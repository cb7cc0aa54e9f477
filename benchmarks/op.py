"""What a benchmark has to know about an op: its cases, how inputs are made, how much work a case is, who is timed.

A case knows nothing of dtypes, devices or peers; `Op.inputs(case, dtype, device)` returns the keyword arguments that
the public function, `reference` and every peer receive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

MODES = ("fwd", "bwd", "both")  # forward without grad, backward alone, one training step (forward and backward)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Work:
    """What one forward pass has to do at least: FLOPs of the kept pairs, bytes read and written once."""

    flops: float
    bytes: float

    def of(self, mode: str) -> Work:
        # Backward: 5 matrix products where the forward has 2; it reads q, k, v, out, d_out and writes dq, dk, dv.
        factor = {"fwd": (1.0, 1.0), "bwd": (2.5, 2.0), "both": (3.5, 3.0)}[mode]
        return Work(self.flops * factor[0], self.bytes * factor[1])


@dataclass(frozen=True)
class Op:
    cases: tuple[Any, ...]
    inputs: Callable[..., dict[str, Any]]  # (case, dtype, device) -> keyword arguments of the op
    differentiable: tuple[str, ...]  # the arguments whose gradient a training step computes, where a tensor is given
    work: Callable[[Any, int], Work]  # (case, bytes of an element)
    score_elements: Callable[[Any], int]  # elements that an unfused implementation holds per intermediate
    parts: Callable[[dict[str, Any]], Iterator[tuple[dict[str, Any], dict[str, Any]]]]  # independent sub-problems
    tail: Callable[[dict[str, Any], int], dict[str, Any]]  # (inputs or results, rows) -> those of the last rows alone
    naive: Callable[[dict[str, Any]], torch.Tensor]  # the plain formula in the case's dtype: the yardstick for errors
    peers: Callable[[str], list[Any]]  # device type -> who is timed beside xformer_fast
    # (xformer_fast or its reference, inputs, backend=...) -> result; None: calls the function that has the op's name
    call: Callable[..., torch.Tensor] | None = None

    def caller(self, name: str) -> Callable[..., torch.Tensor]:
        return self.call or (lambda module, inputs, **keywords: getattr(module, name)(**inputs, **keywords))
