"""Random rotations: shapes, layouts, tables, positions, options; and their results and gradients by any backend."""

import random
from dataclasses import dataclass, field

import torch
from attention_cases import LAYOUTS, arrange
from torch import Tensor

import xformer_fast
from xformer_fast import reference
from xformer_fast.testing import check_close

SHAPES = [
    (1, 1, 1), (2, 3, 5), (1, 8, 64), (2, 4, 113), (3, 2, 65), (1, 1, 513), (2, 0, 4), (0, 2, 4), (2, 2, 0), (1, 33, 7)
]  # fmt: skip
HEAD_DIMS = [1, 2, 3, 8, 16, 31, 32, 40, 64, 72, 80, 96, 127, 128, 160, 256]
TABLE_ROWS = 600


@dataclass
class Case:
    name: str
    x: Tensor
    cos: Tensor  # float64, rounded to `table_dtype` for whatever is tested
    sin: Tensor
    grad: Tensor
    table_dtype: torch.dtype = torch.float32
    options: dict = field(default_factory=dict)

    def __str__(self):
        shapes = {n: f"{t.dtype} {tuple(t.shape)} {t.stride()}" for n, t in (("x", self.x), ("cos", self.cos))}
        options = {n: (tuple(v.shape), v.stride()) if isinstance(v, Tensor) else v for n, v in self.options.items()}
        return f"{self.name} {shapes} {options}"


def draw(seed: int, dtype: torch.dtype, *, small=False) -> Case:
    """The case of a seed; `small` keeps shapes for slow backends small."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    batch, heads, length = rng.choice(SHAPES)
    dim = rng.choice(HEAD_DIMS)
    if small:
        length, dim = min(length, 70), min(dim, 80)
    rotary = dim // 2 * 2 if rng.random() < 0.5 else 2 * rng.randint(0, dim // 2)
    layout = rng.choice([name for name in LAYOUTS if not name.startswith("expanded") or (batch and heads)])
    x = arrange((batch, heads, length, dim), dtype, layout)
    angles = torch.arange(TABLE_ROWS).double()[:, None] * 10000.0 ** (-torch.arange(0, rotary, 2) / max(rotary, 1))
    table_dtype = rng.choice([torch.float32] * 4 + [torch.bfloat16, torch.float64])
    case = Case(f"rope-{seed}-{layout}", x, angles.cos(), angles.sin(), torch.randn(x.shape).to(dtype), table_dtype)
    case.options = {"interleaved": rng.random() < 0.5, "inverse": rng.random() < 0.3}
    kind = rng.choice([0, 0, 1, 2, 3])
    if kind:
        lead = {1: (), 2: (rng.choice([1, batch]),), 3: (3, batch)}[kind]
        positions = torch.randint(0, TABLE_ROWS, (*lead, length * 2))[..., :: rng.choice([2, 1])][..., :length]
        case.options["positions"] = positions.to(rng.choice([torch.int32, torch.int64]))
    if kind == 3:
        cuts = sorted(rng.randint(0, rotary // 2) for _ in range(2))
        case.options["sections"] = (cuts[0], cuts[1] - cuts[0], rotary // 2 - cuts[1])
    return case


def evaluate(case: Case, function, *, exact=False, device=None) -> dict[str, Tensor]:
    """The result and the gradient of x. exact: in float64, of the numbers that the tables hold once rounded."""
    x = (case.x.double() if exact else case.x).detach().requires_grad_()
    tables = [table.to(case.table_dtype) for table in (case.cos, case.sin)]
    tables = [table.double() for table in tables] if exact else tables
    grad, options = case.grad.to(x), case.options
    if device is not None:
        x, grad, *tables = (t.detach().to(device) for t in (x, grad, *tables))
        x.requires_grad_()
        options = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in options.items()}
    out = function(x, *tables, **options)
    (grad_x,) = torch.autograd.grad(out, x, grad)
    return {"out": out.detach(), "grad_x": grad_x}


def compare(case: Case, results: dict[str, Tensor], context=""):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # many small operations: waking threads would cost more than they bring
    truth = evaluate(case, reference.apply_rope, exact=True)
    naive = evaluate(case, reference.apply_rope)
    torch.set_num_threads(threads)
    for name, result in results.items():
        try:
            assert result.dtype == case.x.dtype
            check_close(result.cpu(), truth[name], naive[name], name)
        except AssertionError as failure:
            raise AssertionError(f"{context} {failure}\n{case}") from None


def on_backend(name: str | None):
    return lambda x, cos, sin, **options: xformer_fast.apply_rope(x, cos, sin, **options, backend=name)


def tables(rotary: int, rows: int = TABLE_ROWS) -> tuple[Tensor, Tensor]:
    inv_freq, factor = xformer_fast.rope_frequencies(rotary)
    return xformer_fast.rope_tables(inv_freq, rows, factor=factor)
