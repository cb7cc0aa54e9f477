"""Compiles the Triton kernels of softmax attention to sm_80 and sm_90 machine code (triton_compilation).

What is checked: no spilled registers and no stack in the main configurations, shared memory within the architecture's
limit, tensor-core instructions (HGMMA on sm_90), and that neither a new length nor a new window compiles anything.
"""

import functools
import os
import re
from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("triton")
from triton_compilation import MACHINE_NAMES, SHARED_MEMORY, compiling, disassemble, resources

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles for a GPU")


@dataclass(frozen=True)
class Config:
    arch: int
    head_dim: int
    dtype: str = "bfloat16"
    causal: bool = False
    terms: str = ""  # "all", "packed", "distance", "global", "map", or "mask" and "bias": float32, under dropout

    def __str__(self):
        return f"sm{self.arch}-D{self.head_dim}-{self.dtype}{'-causal' * self.causal}{self.terms and '-' + self.terms}"


MAIN = [Config(arch, dim, causal=causal) for arch in (80, 90) for dim in (64, 128, 256) for causal in (False, True)]
MAIN += [Config(arch, 64, "float32", causal=True) for arch in (80, 90)]
MAIN += [Config(90, 128, "float16", causal=True)]
MAIN += [Config(arch, dim, terms="distance") for arch in (80, 90) for dim in (64, 128)]
MAIN += [Config(arch, dim, terms=terms) for arch in (80, 90) for dim in (64, 128) for terms in ("global", "map")]
MORE = [Config(arch, d, "float16", c) for arch in (80, 90) for d in (64, 128, 256) for c in (False, True)]
MORE = [config for config in MORE if config not in MAIN]
LOADED = [Config(90, 128, terms="mask"), Config(90, 256, terms="mask"), Config(90, 256, terms="bias")]
OTHER = [Config(90, 64, terms="all"), Config(80, 80, terms="packed")]


def launches_only_compile(arch: int, only: str = ""):
    from xformer_fast.kernels import attention, attention_backward, attention_scores

    return compiling(arch, attention, attention_backward, attention_scores, only=only, architecture=f"sm{arch}")


def call(config: Config, length: int = 512, window: int = -1):
    """Forward and backward on uninitialised CPU tensors, of which only shapes and strides matter."""
    from xformer_fast.kernels import attention, attention_backward

    dtype, dim, everything = getattr(torch, config.dtype), config.head_dim, config.terms == "all"
    dropped = everything or config.terms in ("mask", "bias")
    seed = torch.zeros(1, dtype=torch.int64) if dropped else None
    mask = slopes = sinks = lengths = ends = distance = keys = rel_h = rel_w = None
    if config.terms == "packed":
        query, key, value = (torch.empty(length, heads, dim, dtype=dtype) for heads in (4, 2, 2))
        ends = torch.zeros(3, dtype=torch.int32)
    else:
        query, key, value = (torch.empty(2, heads, length, dim, dtype=dtype) for heads in (4, 2, 2))
    if everything:
        mask, lengths = torch.empty(1, 4, length, length, dtype=dtype), torch.zeros(2, dtype=torch.int32)
        slopes, sinks, window = torch.empty(2, 4), torch.empty(4), 100
    if config.terms == "mask":
        mask = torch.empty(2, 4, length, length)
    if config.terms == "bias":
        distance = torch.empty(4, 2 * length - 1)
    of_distance, of_map = everything or config.terms == "distance", everything or config.terms == "map"
    if of_distance:
        distance = torch.empty(4, 2 * length - 1)
    if of_map:
        rel_h, rel_w = (torch.empty(2, 4, length, n) for n in (length // 32, 32))
    if everything or config.terms == "global":
        window, keys = 100, torch.zeros(2, 3, dtype=torch.int64)
    terms = mask, lengths, ends, ends, slopes, distance, sinks, seed, keys, rel_h, rel_w, length, length, 0.125
    numbers = 30.0 * everything, 0.1 * dropped, int(config.causal), window, -1
    learned = of_distance or of_map
    out, lse, residual = attention.forward(query, key, value, *terms, *numbers, learned, learned)
    grad_lse = torch.empty_like(lse) if everything else None
    needs = everything, everything, of_distance, everything, of_map
    attention_backward.backward(out, grad_lse, query, key, value, out, lse, residual, *terms, *numbers, *needs)


MOST_STACK = 16  # bytes: four numbers of a row that a loop does not need


@functools.cache
def rows_of(config: Config) -> list[dict]:
    with launches_only_compile(config.arch) as compiled:
        call(config)
    return resources(compiled)


def check(config: Config, rows: list[dict]):
    for row in rows:
        assert not row["narrow"], f"{config}: {row}"
        spilled = row["STACK"] + row["LOCAL"]
        assert spilled <= MOST_STACK, f"{config}: {row['kernel']} has {spilled} bytes of stack"
        assert row["shared"] <= SHARED_MEMORY[config.arch], f"{config}: {row}"
        wanted = "HGMMA" if config.arch == 90 else "HMMA"
        assert wanted in row["matrix"], f"{config}: {row['kernel']} uses {row['matrix']}, not {wanted}"


@pytest.mark.parametrize("arch", [80, 90])
def test_instructions_have_the_names_that_are_looked_for(arch):
    config = Config(arch, 64)
    with launches_only_compile(arch) as compiled:
        call(config)
    for name, kernel in compiled:
        code = disassemble(kernel, "-sass")
        for ptx, machine in MACHINE_NAMES.items():
            found = re.search(rf"\b{machine}\b", code)
            assert bool(re.search(ptx, kernel.asm["ptx"])) == bool(found), f"{name}: {machine}"


@pytest.mark.parametrize("config", MAIN, ids=str)
def test_main_configurations(config):
    rows = rows_of(config)
    assert len(rows) == (4 if config.head_dim == 256 or config.terms else 3)
    check(config, rows)


@pytest.mark.slow
@pytest.mark.parametrize("config", MORE, ids=str)
def test_float16(config):
    check(config, rows_of(config))


@pytest.mark.parametrize("config", OTHER, ids=str)
def test_every_term_compiles(config):
    rows = rows_of(config)
    assert len(rows) == (7 if config.terms == "all" else 3)
    for row in rows:
        assert not row["narrow"], f"{config}: {row}"
        assert row["shared"] <= SHARED_MEMORY[config.arch], f"{config}: {row}"


@pytest.mark.parametrize("config", LOADED, ids=str)
def test_scores_that_pass_through_shared_memory_fit(config):
    """A mask or a bias is loaded in one layout and added in another; the keys' gradient has most beside them."""
    with launches_only_compile(config.arch, only="attention_key_gradient_kernel") as compiled:
        call(config)
    assert len(compiled) == (2 if config.head_dim == 256 else 1)
    for row in resources(compiled):
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
