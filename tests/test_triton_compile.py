"""Compiles the Triton kernels to sm_80 and sm_90 machine code, without a GPU, exactly as a launch there would.

A stand-in for Triton's driver names the target, and launches stop after compilation. What is checked: no spilled
registers and no stack in the main configurations, shared memory within the architecture's limit, tensor-core
instructions (HGMMA on sm_90), and that neither a new length nor a new window compiles anything.
"""

import contextlib
import functools
import os
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles for a GPU")

SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024}  # bytes a block may have


@dataclass(frozen=True)
class Config:
    arch: int
    head_dim: int
    dtype: str = "bfloat16"
    causal: bool = False
    terms: str = ""  # "all", "packed", "distance", "global" or "map"

    def __str__(self):
        return f"sm{self.arch}-D{self.head_dim}-{self.dtype}{'-causal' * self.causal}{self.terms and '-' + self.terms}"


MAIN = [Config(arch, dim, causal=causal) for arch in (80, 90) for dim in (64, 128, 256) for causal in (False, True)]
MAIN += [Config(arch, 64, "float32", causal=True) for arch in (80, 90)]
MAIN += [Config(90, 128, "float16", causal=True)]
MAIN += [Config(arch, dim, terms="distance") for arch in (80, 90) for dim in (64, 128)]
MAIN += [Config(arch, dim, terms=terms) for arch in (80, 90) for dim in (64, 128) for terms in ("global", "map")]
MORE = [Config(arch, d, "float16", c) for arch in (80, 90) for d in (64, 128, 256) for c in (False, True)]
MORE = [config for config in MORE if config not in MAIN]
OTHER = [Config(90, 64, terms="all"), Config(80, 80, terms="packed")]
ALL = (*MAIN, *OTHER)


class Driver:
    """What compilation asks of Triton's driver; one device number an architecture keeps their caches apart."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_device(self):
        return self.arch

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return triton.backends.compiler.GPUTarget("cuda", self.arch, 32)


@contextlib.contextmanager
def launches_only_compile(arch: int):
    """Yields the list of (kernel name, compiled kernel) of the launches inside."""
    from xformer_fast.kernels import attention, attention_backward, attention_scores

    compiled, run = [], triton.JITFunction.run

    def compile_only(self, *args, warmup, **keywords):
        kernel = run(self, *args, warmup=True, **keywords)
        compiled.append((self.__name__, kernel))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.JITFunction, "run", compile_only)
        patch.setattr(attention_scores, "architecture", lambda device: f"sm{arch}")
        for module in (attention, attention_backward):
            patch.setattr(module, "launch_context", lambda tensor: contextlib.nullcontext())
        patch.setattr(triton.runtime.driver, "_active", Driver(arch))
        yield compiled


def call(config: Config, length: int = 512, window: int = -1):
    """Forward and backward on uninitialised CPU tensors, of which only shapes and strides matter."""
    from xformer_fast.kernels import attention, attention_backward

    dtype, dim, everything = getattr(torch, config.dtype), config.head_dim, config.terms == "all"
    seed = torch.zeros(1, dtype=torch.int64) if everything else None
    mask = slopes = sinks = lengths = ends = distance = keys = rel_h = rel_w = None
    if config.terms == "packed":
        query, key, value = (torch.empty(length, heads, dim, dtype=dtype) for heads in (4, 2, 2))
        ends = torch.zeros(3, dtype=torch.int32)
    else:
        query, key, value = (torch.empty(2, heads, length, dim, dtype=dtype) for heads in (4, 2, 2))
    if everything:
        mask, lengths = torch.empty(1, 4, length, length, dtype=dtype), torch.zeros(2, dtype=torch.int32)
        slopes, sinks, window = torch.empty(2, 4), torch.empty(4), 100
    of_distance, of_map = everything or config.terms == "distance", everything or config.terms == "map"
    if of_distance:
        distance = torch.empty(4, 2 * length - 1)
    if of_map:
        rel_h, rel_w = (torch.empty(2, 4, length, n) for n in (length // 32, 32))
    if everything or config.terms == "global":
        window, keys = 100, torch.zeros(2, 3, dtype=torch.int64)
    terms = mask, lengths, ends, ends, slopes, distance, sinks, seed, keys, rel_h, rel_w, length, length, 0.125
    numbers = 30.0 * everything, 0.1 * everything, int(config.causal), window, -1
    learned = of_distance or of_map
    out, lse, residual = attention.forward(query, key, value, *terms, *numbers, learned, learned)
    grad_lse = torch.empty_like(lse) if everything else None
    needs = everything, everything, of_distance, everything, of_map
    attention_backward.backward(out, grad_lse, query, key, value, out, lse, residual, *terms, *numbers, *needs)


def disassemble(kernel, *options: str) -> str:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        environment = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
        command = [tools / "cuobjdump", *options, file.name]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def resources(config: Config) -> list[dict]:
    """Registers, bytes of stack and shared memory, and matrix instructions of each kernel of a configuration."""
    with launches_only_compile(config.arch) as compiled:
        call(config)
    rows = []
    for name, kernel in compiled:
        usage = re.findall(r"(REG|STACK|LOCAL):(\d+)", disassemble(kernel, "-res-usage"))
        matrix = sorted(set(re.findall(r"\b(HGMMA|HMMA)\b", disassemble(kernel, "-sass"))))
        row = {"kernel": name, "shared": kernel.metadata.shared, "matrix": matrix}
        rows.append({**row, **{field: int(number) for field, number in usage}})
    return rows


@functools.cache
def compiled_in_parallel(configs: tuple) -> dict:
    """Rows of every configuration, or what compiling it raised: a test that fails must not compile all of them anew."""
    with ProcessPoolExecutor(max_workers=min(8, os.cpu_count()), mp_context=get_context("spawn")) as pool:
        jobs = {config: pool.submit(resources, config) for config in configs}
        return {config: job.exception() or job.result() for config, job in jobs.items()}


def compiled(config: Config, configs: tuple) -> list[dict]:
    rows = compiled_in_parallel(configs)[config]
    if isinstance(rows, Exception):
        raise rows
    return rows


def check(config: Config, rows: list[dict]):
    for row in rows:
        spilled = row["STACK"] + row["LOCAL"]
        assert spilled == 0, f"{config}: {row['kernel']} has {spilled} bytes of stack"
        assert row["shared"] <= SHARED_MEMORY[config.arch], f"{config}: {row}"
        wanted = "HGMMA" if config.arch == 90 else "HMMA"
        assert wanted in row["matrix"], f"{config}: {row['kernel']} uses {row['matrix']}, not {wanted}"


@pytest.mark.parametrize("config", MAIN, ids=str)
def test_main_configurations(config):
    rows = compiled(config, ALL)
    assert len(rows) == (4 if config.head_dim == 256 or config.terms else 3)
    check(config, rows)


@pytest.mark.slow
@pytest.mark.parametrize("config", MORE, ids=str)
def test_float16(config):
    check(config, compiled(config, tuple(MORE)))


@pytest.mark.parametrize("config", OTHER, ids=str)
def test_every_term_compiles(config):
    rows = compiled(config, ALL)
    assert len(rows) == (7 if config.terms == "all" else 3)
    for row in rows:
        assert row["shared"] <= SHARED_MEMORY[config.arch], f"{config}: {row}"


def test_a_new_length_or_window_compiles_nothing():
    with launches_only_compile(90) as compiled:
        config = Config(90, 64, causal=True)
        call(config, 512)
        first = {kernel.hash for _, kernel in compiled}
        for length in (513, 96, 2048, 4000):
            call(config, length)
        assert {kernel.hash for _, kernel in compiled} == first
        compiled.clear()
        call(config, 512, window=100)
        windowed = {kernel.hash for _, kernel in compiled}
        for length, window in ((513, 16), (4096, 1024), (96, 0), (160, 1)):
            call(config, length, window)
        assert {kernel.hash for _, kernel in compiled} == windowed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_backward_tiles_divide(dtype):
    """grad_query pads the row statistics to its own blocks, and the other kernels read them in theirs."""
    from xformer_fast.kernels.attention_scores import FLOAT32_TILES, TILES

    table = FLOAT32_TILES if dtype == torch.float32 else TILES
    for (kernel, *rest), tile in table.items():
        if kernel not in ("forward", "grad_query"):
            assert table[("grad_query", *rest)].block_m % tile.block_m == 0, (kernel, *rest)
