"""Facts of the build and of this CPU; None or a reason where the C++ kernels were not built."""

import torch

try:
    from . import _build
except ImportError:
    _build = None


def isa_levels() -> list[str]:
    """Instruction sets in the binary, lowest first; empty without C++ kernels."""
    return _build.isa_levels() if _build else []


def cpu_isa() -> str | None:
    """The best instruction set in the binary that this CPU has."""
    return _build.cpu_isa() if _build else None


def selected_isa() -> str | None:
    """The instruction set in use: the CPU's best, or a lower one forced by XFORMER_FAST_ISA."""
    return _build.selected_isa() if _build else None


def usable_isa_levels() -> list[str]:
    """The levels XFORMER_FAST_ISA can choose here, lowest first."""
    levels = isa_levels()
    return levels[: levels.index(_build.cpu_isa()) + 1] if levels else []


def compiler() -> str | None:
    return _build.compiler() if _build else None


def fma_gflops(element: str, seconds: float = 0.2) -> float | None:
    """The multiply-add ceiling in GFLOP/s of torch's threads for "float32" or "bfloat16", measured now."""
    return _build.fma_gflops(element, torch.get_num_threads(), seconds) if _build else None
