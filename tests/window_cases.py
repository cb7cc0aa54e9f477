"""Random windowed calls: maps of one to three axes, layouts, options; results and gradients by any backend."""

import math
import random
from dataclasses import dataclass, field

import torch
from torch import Tensor

import xformer_fast
from xformer_fast import reference
from xformer_fast.testing import check_close

WINDOWS = {  # axes -> windows
    1: [(1,), (5,), (16,), (49,), (67,)],
    2: [(7, 7), (8, 8), (3, 5), (1, 4), (4, 12), (7, 9)],
    3: [(2, 3, 3), (1, 2, 5), (2, 4, 4), (2, 5, 7)],
}
HEAD_DIMS = [(32, 32), (32, 32), (16, 16), (7, 5), (1, 1), (24, 40), (64, 64), (33, 33)]
LAYOUTS = ["contiguous", "packed", "packed", "heads_first", "strided", "expanded"]


@dataclass
class Case:
    name: str
    dtype: torch.dtype
    tensors: dict[str, Tensor]  # by argument
    window: tuple[int, ...]
    grad: Tensor
    options: dict = field(default_factory=dict)

    def __str__(self):
        shapes = {name: (tuple(t.shape), t.stride()) for name, t in self.tensors.items()}
        return f"{self.name} {self.dtype} window {self.window} {shapes} {self.options}"


def draw(seed: int, dtype: torch.dtype) -> Case:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    axes = rng.choice([1, 2, 2, 2, 3])
    window = rng.choice(WINDOWS[axes])
    counts = [rng.randint(1, 3 if axes < 3 else 2) for _ in window]
    batch, heads = rng.choice([(1, 1), (2, 3), (1, 4), (3, 2), (5, 1)])
    space = tuple(w * n for w, n in zip(window, counts, strict=True))
    dim, dim_v = rng.choice(HEAD_DIMS)
    layout = rng.choice(LAYOUTS)
    tensors = dict(zip(("query", "key", "value"), arrange(batch, space, heads, dim, dim_v, layout, dtype), strict=True))
    tokens, rows = math.prod(window), math.prod(2 * w - 1 for w in window)
    options = {"partition": rng.choice(["window", "window", "grid"])}
    if options["partition"] == "window" and rng.random() < 0.6:
        options["shift"] = tuple(rng.randint(0, w - 1) for w in window)
    if rng.random() < 0.6:
        tensors["relative_bias_table"] = torch.randn(rows, heads).to(dtype)
    if rng.random() < 0.3:
        tensors["bias"] = torch.randn(heads, tokens, tokens).to(rng.choice([dtype, torch.float32]))
    if rng.random() < 0.4 and dim > 1:  # cosines of one channel are constant: their gradient is cancellation alone
        tensors["logit_scale"] = (torch.rand(heads) * 12 + 0.5).to(rng.choice([dtype, torch.float32]))
    elif rng.random() < 0.3:
        options["scale"] = rng.choice([0.05, 0.4, 1.0])
    grad = torch.randn(batch, *space, heads, tensors["value"].shape[-1]).to(dtype)
    return Case(f"window-{seed}-{layout}", dtype, tensors, window, grad, options)


def arrange(batch, space, heads, dim, dim_v, layout, dtype) -> list[Tensor]:
    if layout == "packed":  # slices of a projection
        return list(torch.randn(batch, *space, 3, heads, dim).to(dtype).unbind(-3))
    tensors = []
    for last in (dim, dim, dim_v):
        if layout == "heads_first":
            x = torch.randn(batch, heads, *space, last).movedim(1, -2)
        elif layout == "strided":
            x = torch.randn(batch, *space, heads, 2 * last)[..., ::2]
        elif layout == "expanded":
            x = torch.randn(1, *space, heads, last).expand(batch, *space, heads, last)
        else:
            x = torch.randn(batch, *space, heads, last)
        tensors.append(x.to(dtype))
    return tensors


def evaluate(case: Case, function, *, exact=False) -> dict[str, Tensor]:
    """The result and the gradient of every tensor."""
    leaves = {n: (t.double() if exact else t).detach().requires_grad_() for n, t in case.tensors.items()}
    rest = {n: t for n, t in leaves.items() if n not in ("query", "key", "value")}
    out = function(leaves["query"], leaves["key"], leaves["value"], case.window, **rest, **case.options)
    grads = torch.autograd.grad(out, list(leaves.values()), case.grad.to(out.dtype))
    return {"out": out.detach()} | {f"grad_{n}": g for n, g in zip(leaves, grads, strict=True)}


def compare(case: Case, results: dict[str, Tensor], context=""):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # many small operations: waking threads would cost more than they bring
    truth = evaluate(case, reference.window_attention, exact=True)
    naive = evaluate(case, reference.window_attention)
    torch.set_num_threads(threads)
    # Softmax over one token is 1: its gradient is zero but for rounding.
    sizes = {"grad_query": "grad_value", "grad_key": "grad_value"}
    for name, result in results.items():
        magnitude = truth[sizes[name]].abs().max().item() if name in sizes else 0.0
        if name in ("grad_relative_bias_table", "grad_bias", "grad_logit_scale"):
            magnitude = case.grad.double().abs().max().item()
        try:
            assert result.dtype == truth_dtype(case, name), name
            check_close(result, truth[name], naive[name], name, dtype=case.dtype, magnitude=magnitude)
        except AssertionError as failure:
            raise AssertionError(f"{context} {failure}\n{case}") from None


def truth_dtype(case: Case, name: str) -> torch.dtype:
    return case.dtype if name == "out" else case.tensors[name.removeprefix("grad_")].dtype


def on_backend(name: str | None):
    return lambda *args, **options: xformer_fast.window_attention(*args, **options, backend=name)
