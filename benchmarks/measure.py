"""The measuring instruments: interleaved timing, peak memory, ceilings of the machine, and what identifies it.

Timing: every round runs each peer once, in rotating order, each for at least a millisecond of repeated calls (CPU) or
between two events after the L2 cache was overwritten (CUDA). The GPU is kept busy while the host launches, so that the
events see its work, not the host's, as in a model whose launches run ahead; a call that waits for the GPU, or takes the
host longer than AHEAD_S, still counts that. torch's threads are awake when a call begins. Medians with the 20th and
80th percentile are reported.
Peak memory: what one call adds to the resident set (CPU: the kernel's high-water mark) or to the allocator (CUDA).
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import gc
import pathlib
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

MIN_CHUNK_S = 1e-3  # a measured stretch of calls lasts at least this long on a CPU
REST_S = 5e-3  # thread pools spin on after a call: without a rest one peer's would run into the next peer's time
MIN_ROUNDS, MAX_ROUNDS = 5, 60
SLOW_S, SLOW_ROUNDS = 2.0, 3  # a round that takes longer is repeated less
AHEAD_S = 1e-3  # of the GPU's time, in which the host launches a call
AHEAD_CYCLES = int(AHEAD_S * 2e9)  # no GPU's clock is much faster
SLOW_CALL_S = 0.5  # one call of this length tells how long it takes


@dataclass(frozen=True)
class Timing:
    p20_ms: float
    median_ms: float
    p80_ms: float
    rounds: int


def _summary(seconds: list[float]) -> Timing:
    if len(seconds) < 2:
        return Timing(*[seconds[0] * 1e3] * 3, rounds=1)
    cuts = statistics.quantiles(seconds, n=5, method="inclusive")
    return Timing(cuts[0] * 1e3, statistics.median(seconds) * 1e3, cuts[3] * 1e3, len(seconds))


class _CpuClock:
    def __init__(self):
        self.wake = torch.zeros(1 << 20)

    def measure(self, call: Callable[[], Any], repeats: int) -> float:
        time.sleep(REST_S)
        if repeats > 1:
            call()  # wakes the threads that the rest sent to sleep
        else:
            self.wake.add_(1)  # as whatever ran before the call in a model would have
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats

    def repeats(self, call: Callable[[], Any]) -> tuple[int, float]:
        seconds = self.measure(call, 1)
        if seconds < SLOW_CALL_S:
            seconds = min(seconds, self.measure(call, 1))
        return max(1, min(10_000, round(MIN_CHUNK_S / max(seconds, 1e-7)))), max(seconds, MIN_CHUNK_S) + REST_S


class _CudaClock:
    def __init__(self):
        self.flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")

    def measure(self, call: Callable[[], Any], repeats: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(AHEAD_CYCLES)
        self.flush.zero_()
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / repeats

    def repeats(self, call: Callable[[], Any]) -> tuple[int, float]:
        return 1, min(self.measure(call, 1) for _ in range(2)) + AHEAD_S + 2e-4


def interleaved(
    calls: dict[str, Callable[[], Any]],
    contexts: dict[str, Callable[[], Any]],
    *,
    device: str,
    seconds: float,
    grad: bool,
) -> dict[str, Timing]:
    """Times all calls side by side for about `seconds` altogether."""
    clock = _CudaClock() if device == "cuda" else _CpuClock()
    repeats, cost = {}, 0.0
    with torch.set_grad_enabled(grad):
        for name, call in calls.items():
            with contexts[name]():
                repeats[name], duration = clock.repeats(call)
            cost += duration
        fewest = MIN_ROUNDS if cost < SLOW_S else SLOW_ROUNDS
        rounds = max(fewest, min(MAX_ROUNDS, int(seconds / cost)))
        samples: dict[str, list[float]] = {name: [] for name in calls}
        order = list(calls)
        for _ in range(rounds):
            for name in order:
                with contexts[name]():
                    samples[name].append(clock.measure(calls[name], repeats[name]))
            order.append(order.pop(0))
    return {name: _summary(s) for name, s in samples.items()}


def _status_kib(field: str) -> int:
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise KeyError(field)


def peak_memory_mib(call: Callable[[], Any], device: str) -> float | None:
    """Extra memory that one call takes at its peak, its results included; None where the system cannot tell."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # else freed heap pages would hide new ones
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = _status_kib("VmRSS")
        call()
        return max(0, _status_kib("VmHWM") - before) / 2**10
    except (OSError, AttributeError, KeyError):
        return None


def available_memory(device: str) -> float:
    """Bytes that are free now."""
    if device == "cuda":
        return float(torch.cuda.mem_get_info()[0])
    for line in pathlib.Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return float(line.split()[1]) * 1024
    return float("inf")


def retain_freed_memory() -> None:
    """Makes glibc keep freed memory, so that large results are not mapped page by page again at every call."""
    libc = ctypes.CDLL(None)
    m_trim_threshold, m_mmap_max = -1, -4
    if not (libc.mallopt(m_mmap_max, 0) and libc.mallopt(m_trim_threshold, -1)):
        raise OSError("mallopt refused")


@dataclass(frozen=True)
class Ceiling:
    gflops: float
    source: str
    gbps: float


def _best(call: Callable[[], Any], device: str, times: int = 5) -> float:
    clock = _CudaClock() if device == "cuda" else _CpuClock()
    call()
    return min(clock.measure(call, 1) for _ in range(times))


READINGS = 4  # of a ceiling, short ones: the busy moments of a shared machine last longer
FMA_S = 0.04
_highest_flops: dict[tuple[str, torch.dtype], tuple[float, str]] = {}  # what this process has seen so far
_highest_gbps: dict[str, float] = {}
_cpu_memory: list[torch.Tensor] = []  # read for the bandwidth: fetching its pages anew would take longer than reading


def ceiling(device: str, dtype: torch.dtype, readings: int = READINGS) -> Ceiling:
    """The most that this machine has reached in this process: multiply-adds in the unit of `dtype`, and reading memory.

    Every call measures again: a machine that is busy at one call is not at another. On a CPU float16 is stored,
    computed in float32: its ceiling is float32's."""
    dtype = torch.float32 if device == "cpu" and dtype is torch.float16 else dtype
    with torch.no_grad():
        flops = _cuda_flops(dtype, readings) if device == "cuda" else _cpu_flops(dtype, readings)
        gbps = _bandwidth(device, readings)
    flops = _highest_flops[device, dtype] = max(flops, _highest_flops.get((device, dtype), flops))
    gbps = _highest_gbps[device] = max(gbps, _highest_gbps.get(device, gbps))
    return Ceiling(*flops, gbps)


def _matmul_gflops(dtype: torch.dtype, device: str, n: int, readings: int) -> float:
    a = torch.randn(n, n, device=device).to(dtype)
    return 2 * n**3 / _best(lambda: a @ a, device, readings) / 1e9


def _cuda_flops(dtype: torch.dtype, readings: int) -> tuple[float, str]:
    name = str(dtype).removeprefix("torch.")
    return _matmul_gflops(dtype, "cuda", 8192, readings), f"matmul {name} 8192"


def _cpu_flops(dtype: torch.dtype, readings: int) -> tuple[float, str]:
    name = str(dtype).removeprefix("torch.")
    try:
        from xformer_fast.build_info import fma_gflops
    except ImportError:
        return _matmul_gflops(dtype, "cpu", 2048, readings), f"matmul {name} 2048"
    measured = max(fma_gflops(name, FMA_S) or 0.0 for _ in range(readings))
    if measured:
        return measured, f"fma loop {name}"
    return _matmul_gflops(dtype, "cpu", 2048, readings), f"matmul {name} 2048"


def _bandwidth(device: str, readings: int) -> float:
    if device == "cuda":
        x = torch.zeros((4 << 30) // 4, device=device)
    else:
        _cpu_memory[:] = _cpu_memory or [torch.ones((256 << 20) // 4)]
        x = _cpu_memory[0]
    return x.numel() * 4 / _best(x.sum, device, readings) / 1e9


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    """The commit, with -dirty where the tree differs from it in more than the results that runs write into it."""
    root = pathlib.Path(__file__).resolve().parent.parent
    git = ["git", "-C", str(root)]
    try:
        commit = subprocess.run(
            [*git, "describe", "--always", "--abbrev=12"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = [*git, "diff", "--quiet", "HEAD", "--", ".", ":(exclude)benchmarks/results"]
        return commit + ("-dirty" if subprocess.run(changed, capture_output=True).returncode else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine_facts(device: str) -> dict[str, Any]:
    """The columns that say where and with what a row was measured."""
    import xformer_fast

    cpu = f"{_cpu_name()} ({torch.backends.cpu.get_cpu_capability()})"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": _commit(),
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{cpu}, {torch.get_num_threads()} threads",
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "xformer_fast": getattr(xformer_fast, "__version__", "unknown"),
    }
