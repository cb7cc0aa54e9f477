"""Which backend runs a call: a visible table an op, read top to bottom; no import-time swapping, no silent fallback.

Environment variables: XFORMER_FAST_BACKEND names the backend of every call that names none. Lengths, offsets, positions
and page indices are checked by the CPU's kernels; GPU kernels clamp them, so that nothing waits for a GPU, and
XFORMER_FAST_CHECK=1 has eager calls wait, read them first, and raise the CPU's ValueError. XFORMER_FAST_ISA lowers the
instruction set of the CPU's kernels; a name that is none of this CPU's is ignored, with a warning at import.
"""

import functools
import importlib.util
import json
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import build_info

TABLES: dict[str, "Table"] = {}
# Read once: a graph must not depend on the environment.
DEFAULT = os.environ.get("XFORMER_FAST_BACKEND") or None
CHECK = os.environ.get("XFORMER_FAST_CHECK") == "1"


class BackendUnavailable(RuntimeError):
    """A backend asked for by name cannot run this call; the message says why."""


@dataclass(frozen=True)
class Backend:
    """One way to run an op.

    missing(): why the backend cannot run here at all (not built, no such hardware), or None.
    unsupported(call): why it cannot run this call, or None. Never looks at sequence lengths.
    unproven(call): why it is not chosen by default for this call, though it runs when named, or None.
    """

    name: str
    run: Callable[..., Any]
    missing: Callable[[], str | None]
    unsupported: Callable[[Any], str | None]
    unproven: Callable[[Any], str | None] = lambda call: None


class Table:
    """The backends of one op, in order of preference.

    check_values(call): raises for a tensor's values that kernels cannot take, where they are readable.
    """

    def __init__(self, op: str, backends: list[Backend], check_values: Callable[[Any], None] = lambda call: None):
        self.op, self.backends, self.check_values = op, backends, check_values
        self.usable = [backend for backend in backends if backend.missing() is None]
        TABLES[op] = self

    def names(self) -> list[str]:
        return [backend.name for backend in self.backends]

    def run(self, call, name: str | None):
        backend = self.choose(call, name)
        if CHECK:
            self.check_values(call)
        return backend.run(call)

    def choose(self, call, name: str | None) -> Backend:
        if name or DEFAULT:
            backend = self._named(name)
            if reason := backend.missing() or backend.unsupported(call):
                raise BackendUnavailable(f"{self.op}: backend {backend.name!r} cannot run this call: {reason}")
            return backend
        for backend in self.usable:
            if backend.unsupported(call) is None and backend.unproven(call) is None:
                return backend
        raise BackendUnavailable(f"{self.op}: no backend runs this call: {self.reasons(call)}")

    def _named(self, name: str | None) -> Backend:
        """The backend `name`, or that of XFORMER_FAST_BACKEND."""
        for backend in self.backends:
            if backend.name == (name or DEFAULT):
                return backend
        names = ", ".join(self.names())
        if name:
            raise ValueError(f"backend must be one of {names} or None, got {name!r}")
        raise ValueError(f"{self.op}: XFORMER_FAST_BACKEND must be one of {names}, got {DEFAULT!r}")

    def reasons(self, call, name: str | None = None) -> dict[str, str]:
        """Backend -> why it is not chosen for this call, "" where nothing is against it. name: as for `choose`."""
        named = self._named(name) if name or DEFAULT else None
        asked = f"backend={name!r} is asked for" if name else f"XFORMER_FAST_BACKEND={DEFAULT} is set"

        def passed_over(backend: Backend) -> str | None:
            return backend.unproven(call) if named is None else None if backend is named else asked

        return {b.name: b.missing() or b.unsupported(call) or passed_over(b) or "" for b in self.backends}


@functools.cache
def build_problem() -> str | None:
    """Why the C++ operators are not there, or None; loads them at the first call."""
    folder = Path(__file__).parent
    library = folder / "_ops.so"
    if not library.exists():
        failure = folder / "build_failure.txt"
        return failure.read_text().strip() if failure.exists() else "the C++ kernels were not built"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"{library.name} does not load: {error}"
    forced = os.environ.get("XFORMER_FAST_ISA")
    if forced and forced not in (usable := build_info.usable_isa_levels()):
        message = f"XFORMER_FAST_ISA={forced} is ignored: this build and CPU have {', '.join(usable)}"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    return None


@functools.cache
def triton_problem() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return "no GPU, and TRITON_INTERPRET=1 is not set"


def triton_interprets() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)


def triton_unsupported(device: torch.device) -> str | None:
    """Why Triton kernels do not run on a device's tensors, or None."""
    if device.type == "cuda":
        old = torch.cuda.get_device_capability(device) < (8, 0) and torch.version.hip is None
        return "the GPU is older than sm_80" if old else None
    return None if device.type == "cpu" and triton_interprets() else f"tensors are on {device}, not on a GPU"


def triton_unproven(op: str, device: torch.device) -> str | None:
    """Why the Triton kernels of an op are not chosen by default, or None."""
    if device.type == "cpu":
        return "the interpreter is for tests"
    return None if f"{op}/triton" in proven() else "no run on a GPU has proved it yet (make gpu-proof)"


def kernel_limits(query: torch.Tensor, value: torch.Tensor, most_head_dim: int) -> str | None:
    """Why tensors of these head dims and this dtype are not for kernels, or None."""
    if query.dtype == torch.float64:
        return "float64 runs through the reference formula"
    if query.shape[-1] > most_head_dim or value.shape[-1] > most_head_dim:
        return f"head_dim is at most {most_head_dim}"
    return None


@functools.cache
def cuda_problem(operator: str) -> str | None:
    """Why the CUDA C++ kernels behind an operator cannot run here, or None."""
    if not hasattr(torch.ops.xformer_fast, operator):
        return build_problem() or "built without CUDA: torch is a CPU build, or there was no nvcc"
    return None if emulates_cuda(operator) or torch.cuda.is_available() else "no GPU"


@functools.cache
def emulates_cuda(operator: str) -> bool:
    """Whether the CUDA C++ kernels behind an operator run on CPU tensors: tests/cuda_emulation is loaded."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"xformer_fast::{operator}", "CPU")


def cuda_unsupported(operator: str, device: torch.device) -> str | None:
    """Why the CUDA C++ kernels behind an operator do not run on a device's tensors, or None."""
    if device.type == "cuda":
        return "the GPU is older than sm_80" if torch.cuda.get_device_capability(device) < (8, 0) else None
    return None if device.type == "cpu" and emulates_cuda(operator) else f"tensors are on {device}, not on a GPU"


def cuda_unproven(op: str, device: torch.device) -> str | None:
    """Why the CUDA C++ kernels of an op are not chosen by default: they have to be proven on an architecture."""
    if device.type == "cpu":
        return "the emulation is for tests"
    proof = proven().get(f"{op}/cuda")
    here = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    if proof is None:
        return "executed by emulation only: no run on a GPU has proved it yet (make gpu-proof)"
    return None if proof["capability"] == here else f"proven on {proof['capability']} alone, this GPU is {here}"


@functools.cache
def proven() -> dict[str, dict]:
    """What runs on GPUs have proved, {"op/backend": {...}}: proven.json, written by `make gpu-proof`."""
    path = Path(__file__).parent / "proven.json"
    return json.loads(path.read_text()) if path.exists() else {}
