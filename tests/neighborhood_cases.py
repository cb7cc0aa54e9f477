"""Random neighborhood calls: maps of one to three axes, layouts, options; results and gradients by any backend."""

import math
import random
from dataclasses import dataclass, field

import torch
from torch import Tensor

import xformer_fast
from xformer_fast import reference
from xformer_fast.testing import check_close

KERNELS = {1: [1, 2, 3, 7, 8, 13, 31, 63], 2: [1, 2, 3, 5, 6, 7], 3: [1, 2, 3, 4]}  # axes -> along each
MOST_BEYOND = {1: 70, 2: 12, 3: 4}  # places of a map past what its kernel needs
HEADS = [(1, 1), (2, 2), (3, 3), (4, 2), (3, 1)]
HEAD_DIMS = [(32, 32), (32, 32), (16, 16), (7, 5), (1, 1), (24, 40), (64, 64), (33, 33)]
LAYOUTS = ["contiguous", "packed", "packed", "heads_first", "strided", "expanded"]


@dataclass
class Case:
    name: str
    dtype: torch.dtype
    tensors: dict[str, Tensor]  # by argument
    kernel: tuple[int, ...]
    grad: Tensor
    options: dict = field(default_factory=dict)

    def __str__(self):
        shapes = {name: (tuple(t.shape), t.stride()) for name, t in self.tensors.items()}
        return f"{self.name} {self.dtype} kernel {self.kernel} {shapes} {self.options}"


def draw(seed: int, dtype: torch.dtype, *, small: bool = False) -> Case:
    rng = random.Random(f"neighborhood {seed}")
    torch.manual_seed(seed)
    axes = rng.choice([1, 2, 2, 2, 3])
    kernel, dilation, space = [], [], []
    for _ in range(axes):
        k, step = rng.choice(KERNELS[axes]), rng.choice([1, 1, 1, 2, 3])
        if small:
            k = min(k, 7 if axes == 1 else 3)
        beyond = rng.randint(0, MOST_BEYOND[axes] // (4 if small else 1))
        kernel.append(k)
        dilation.append(step)
        space.append(k * step + beyond)
    heads, heads_kv = rng.choice(HEADS)
    batch = rng.choice([1, 1, 2])
    dim, dim_v = rng.choice(HEAD_DIMS)
    layout = rng.choice(LAYOUTS)
    shapes = (heads, dim), (heads_kv, dim), (heads_kv, dim_v)
    tensors = dict(zip(("query", "key", "value"), arrange(batch, space, shapes, layout, dtype), strict=True))
    options = {"dilation": tuple(dilation)}
    if rng.random() < 0.4:
        options["causal"] = tuple(rng.random() < 0.6 for _ in kernel)
    if rng.random() < 0.3:
        options["scale"] = rng.choice([0.05, 0.4, 1.0])
    if rng.random() < 0.6:
        rows = math.prod(2 * k - 1 for k in kernel)
        tensors["relative_bias_table"] = torch.randn(rows, heads).to(rng.choice([dtype, torch.float32]))
    grad = torch.randn(batch, *space, heads, tensors["value"].shape[-1]).to(dtype)
    return Case(f"neighborhood-{seed}-{layout}", dtype, tensors, tuple(kernel), grad, options)


def arrange(batch, space, shapes, layout, dtype) -> list[Tensor]:
    (heads, dim), (heads_kv, _), (_, dim_v) = shapes
    if layout == "packed" and dim == dim_v:  # slices of a projection
        packed = torch.randn(batch, *space, heads + 2 * heads_kv, dim).to(dtype)
        return list(packed.split([heads, heads_kv, heads_kv], -2))
    tensors = []
    for count, last in shapes:
        if layout == "heads_first":
            x = torch.randn(batch, count, *space, last).movedim(1, -2)
        elif layout == "strided":
            x = torch.randn(batch, *space, count, 2 * last)[..., ::2]
        elif layout == "expanded":
            x = torch.randn(1, *space, count, last).expand(batch, *space, count, last)
        else:
            x = torch.randn(batch, *space, count, last)
        tensors.append(x.to(dtype))
    return tensors


def evaluate(case: Case, function, *, exact=False) -> dict[str, Tensor]:
    """The result and the gradient of every tensor."""
    leaves = {n: (t.double() if exact else t).detach().requires_grad_() for n, t in case.tensors.items()}
    rest = {n: t for n, t in leaves.items() if n not in ("query", "key", "value")}
    out = function(leaves["query"], leaves["key"], leaves["value"], case.kernel, **rest, **case.options)
    grads = torch.autograd.grad(out, list(leaves.values()), case.grad.to(out.dtype))
    return {"out": out.detach()} | {f"grad_{n}": g for n, g in zip(leaves, grads, strict=True)}


def truth_and_naive(case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # many small operations: waking threads would cost more than they bring
    results = tuple(evaluate(case, reference.neighborhood_attention, exact=exact) for exact in (True, False))
    torch.set_num_threads(threads)
    return results


def check(case: Case, results: dict[str, Tensor], truth, naive, context=""):
    # Softmax over one key is 1: its gradient is zero but for rounding.
    sizes = {"grad_query": "grad_value", "grad_key": "grad_value"}
    for name, result in results.items():
        magnitude = truth[sizes[name]].abs().max().item() if name in sizes else 0.0
        if name == "grad_relative_bias_table":
            magnitude = case.grad.double().abs().max().item()
        try:
            assert result.dtype == (case.dtype if name == "out" else case.tensors[name.removeprefix("grad_")].dtype)
            check_close(result, truth[name], naive[name], name, dtype=case.dtype, magnitude=magnitude)
        except AssertionError as failure:
            raise AssertionError(f"{context} {failure}\n{case}") from None


def on_backend(name: str | None):
    return lambda *args, **options: xformer_fast.neighborhood_attention(*args, **options, backend=name)
