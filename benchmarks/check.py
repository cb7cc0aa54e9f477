"""When is a result right enough for its speed to be shown.

    max|result - ref| <= 2 * max|naive - ref| + atol * max|ref|        for the output and for every gradient

The rule and its atol are those of `xformer_fast.testing`; ref is the naive formula in float64
(`xformer_fast.reference`), naive the plain formula in the case's own dtype. Large problems are checked on their last
rows: the output gradient is zero elsewhere, so gradients of key and value are still checked everywhere, and the truth
of 32k tokens fits into memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from xformer_fast import reference, testing

from .op import Op

FULL_CHECK = 1 << 27  # score elements; above it, the last rows are checked
SPLIT = 1 << 25  # score elements held in float64 at a time


@dataclass(frozen=True)
class Error:
    tensor: str  # "out", or the argument whose gradient it is
    max_abs: float
    naive_max_abs: float
    limit: float
    rel_rms: float

    @property
    def ok(self) -> bool:
        return self.max_abs <= self.limit  # false for NaN


class Truth:
    """The float64 results of one case, and the errors that naive attention makes in the case's dtype."""

    def __init__(self, name: str, op: Op, case: Any, inputs: dict[str, Any], *, with_grads: bool):
        self.op, self.inputs = op, inputs
        query = next(iter(inputs.values()))
        elements, rows = op.score_elements(case), query.shape[-2]
        self.rows = rows if elements <= FULL_CHECK else max(1, rows * FULL_CHECK // elements)
        self.scope = "all" if self.rows == rows else f"last {self.rows} rows"
        self.wrt = [n for n in op.differentiable if isinstance(inputs.get(n), torch.Tensor)] if with_grads else []
        self.grad_out: torch.Tensor | None = None
        self.expected: dict[str, torch.Tensor] = {}
        self.naive: dict[str, torch.Tensor] = {}
        tail = inputs if self.rows == rows else op.tail(inputs, self.rows)
        whole = [(tail, {})]
        for part, index in op.parts(tail) if elements * self.rows // rows > SPLIT else whole:
            self._add_part(name, part, index, tail)

    def _add_part(self, name: str, part: dict[str, Any], index: dict[str, Any], tail: dict[str, Any]) -> None:
        double = {
            n: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for n, x in part.items()
        }
        exact = self._run(lambda x: self.op.caller(name)(reference, x), double, index, tail)
        naive = self._run(self.op.naive, part, index, tail)
        for store, results in ((self.expected, exact), (self.naive, naive)):
            for n, x in results.items():
                if n not in store:
                    shape = self._out_shape(x, tail) if n == "out" else tail[n].shape
                    store[n] = torch.zeros(shape, dtype=torch.float64, device=x.device)
                store[n][index.get(n, ...)] += x

    @staticmethod
    def _out_shape(out: torch.Tensor, tail: dict[str, Any]) -> torch.Size:
        return next(iter(tail.values())).shape[:-1] + out.shape[-1:]

    def _run(self, function, part, index, tail) -> dict[str, torch.Tensor]:
        part = {
            n: x.detach().requires_grad_(n in self.wrt) if isinstance(x, torch.Tensor) else x for n, x in part.items()
        }
        with torch.set_grad_enabled(bool(self.wrt)):
            out = function(part)
        results = {"out": out.detach()}
        if self.wrt:
            if self.grad_out is None:
                generator = torch.Generator(out.device).manual_seed(1)
                shape = self._out_shape(out, tail)
                dtype = next(iter(tail.values())).dtype
                self.grad_out = torch.randn(shape, generator=generator, device=out.device).to(dtype)
            grads = torch.autograd.grad(
                out, [part[n] for n in self.wrt], self.grad_out[index.get("out", ...)].to(out.dtype)
            )
            results |= dict(zip(self.wrt, grads, strict=True))
        return results

    def output_gradient(self, out: torch.Tensor) -> torch.Tensor:
        """The gradient a candidate has to start from: zero outside the rows that are checked."""
        grad = torch.zeros_like(out)
        grad[..., -self.rows :, :] = self.grad_out
        return grad

    def errors(self, results: dict[str, torch.Tensor]) -> list[Error]:
        if self.scope != "all":
            results = self.op.tail(results, self.rows)
        return [self._error(name, x) for name, x in results.items()]

    def _error(self, name: str, x: torch.Tensor) -> Error:
        ref = self.expected[name]
        if x.shape != ref.shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {tuple(ref.shape)}")
        naive = (self.naive[name] - ref).abs().max().item() if ref.numel() else 0.0
        error = testing.measure(x, ref, self.naive[name], dtype=x.dtype)
        return Error(name, error.largest, naive, error.allowed, error.relative_rms)


def worst(errors: list[Error]) -> Error:
    """The error nearest to its limit, or past it; NaN counts as past."""
    return max(errors, key=lambda e: float("inf") if e.max_abs != e.max_abs else e.max_abs / max(e.limit, 1e-300))
