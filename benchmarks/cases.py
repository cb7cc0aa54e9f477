"""Every op that can be benchmarked, and the choice among its cases. Tests and benchmarks share them.

To add a case: one line in the table of its op's file. To add an op: a file like attention.py and one row in OPS.
"""

from __future__ import annotations

import math
from typing import Any

from .attention import ATTENTION, sweep_cases
from .decode_attention import DECODE
from .linear_attention import LINEAR_ATTENTION
from .neighborhood_attention import NEIGHBORHOOD
from .op import Op
from .rope import ROPE
from .sam_attention import SAM_ATTENTION
from .t5_attention import T5_ATTENTION
from .window_attention import WINDOW

OPS: dict[str, Op] = {
    "attention": ATTENTION,
    "t5_attention": T5_ATTENTION,
    "sam_attention": SAM_ATTENTION,
    "decode_attention": DECODE,
    "apply_rope": ROPE,
    "linear_attention": LINEAR_ATTENTION,
    "window_attention": WINDOW,
    "neighborhood_attention": NEIGHBORHOOD,
}


def select(op: str, *, device: str = "cpu", names: str | None = None, quick: bool = False) -> list[Any]:
    """The cases of `op` for a device type; `names`: comma-separated beginnings of names, `length_...` among them."""
    cases = [*OPS[op].cases, *(sweep_cases() if op == "attention" and names else ())]
    chosen = [case for case in cases if device in case.devices and (case.quick or not quick)]
    if names:
        wanted = [name.strip() for name in names.split(",")]
        chosen = [case for case in chosen if any(case.name.startswith(name) for name in wanted)]
        if not chosen:
            known = ", ".join(case.name for case in cases if device in case.devices)
            raise ValueError(f"no case of {op!r} on {device!r} is called {names!r}; there are {known}")
    return chosen


def geometric_mean(values) -> float:
    values = list(values)
    return math.exp(sum(map(math.log, values)) / len(values)) if values else float("nan")
