"""`info()` and `explain()`: what runs here, what would run for a call, and why the rest would not."""

import functools
import platform

import torch

from . import build_info
from .dispatch import TABLES, proven
from .ops import attention as attention_ops
from .ops import decode_attention as decode_ops
from .ops import linear_attention as linear_attention_ops
from .ops import neighborhood_attention as neighborhood_ops
from .ops import rope as rope_ops
from .ops import window_attention as window_ops

# Public function -> (its arguments -> backend -> why it would not be chosen, "" if nothing bars it).
_EXPLAIN = {
    "attention": functools.partial(attention_ops.explain, attention_ops.attention),
    "varlen_attention": functools.partial(attention_ops.explain, attention_ops.varlen_attention),
    "decode_attention": decode_ops.explain,
    "apply_rope": rope_ops.explain,
    "linear_attention": linear_attention_ops.explain,
    "window_attention": window_ops.explain,
    "neighborhood_attention": neighborhood_ops.explain,
}


def explain(op: str, *args, **kwargs) -> str:
    """What `xformer_fast.<op>(*args, **kwargs)` would run, and why the other backends would not; runs nothing.

    >>> import torch, xformer_fast
    >>> q = torch.randn(1, 2, 8, 16)
    >>> text = xformer_fast.explain("attention", q, q, q, causal=True)
    """
    if op not in _EXPLAIN:
        raise ValueError(f"op must be one of {', '.join(_EXPLAIN)}, got {op!r}")
    reasons = _EXPLAIN[op](*args, **kwargs)
    chosen = next((name for name, reason in reasons.items() if not reason), None)
    lines = [f"{op}: {chosen or 'no backend'} runs this call"]
    lines += [
        f"  {name:<10} {'chosen' if name == chosen else reason or 'would run when named'}"
        for name, reason in reasons.items()
    ]
    return "\n".join(lines)


def info() -> str:
    """A table of ops and backends: available, or why not; and what was built on what."""
    from . import __version__

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    lines = [
        f"xformer_fast {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        f"GPU: {gpu}",
        f"C++ kernels: {build_info.compiler() or 'not built'}; "
        f"instruction sets: {', '.join(build_info.isa_levels()) or '-'}; "
        f"this CPU: {build_info.cpu_isa() or '-'}; in use: {build_info.selected_isa() or '-'}",
        "",
        f"{'op':<24}{'backend':<12}state",
    ]
    for op, table in TABLES.items():
        for backend in table.backends:
            lines.append(f"{op:<24}{backend.name:<12}{_state(op, backend)}")
    return "\n".join(lines)


def _state(op: str, backend) -> str:
    reason = backend.missing()
    proof = proven().get(f"{op}/{backend.name}")
    if backend.name in ("triton", "cuda"):
        so_far = "executed by emulation only, no GPU has run it" if backend.name == "cuda" else "no GPU has run it yet"
        ran = f"proven on {proof['device']}" if proof else f"{so_far}: not chosen by default"
        return f"{ran}; here: {reason or 'available'}"
    return f"not available: {reason}" if reason else "available"
