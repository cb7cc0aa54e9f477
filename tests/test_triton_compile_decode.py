"""Compiles the Triton kernels of decoding to sm_80 and sm_90 machine code, as test_triton_compile.py does."""

import functools
import os
from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles for a GPU")

from triton_compilation import SHARED_MEMORY, compiling, resources  # noqa: E402


@dataclass(frozen=True)
class Config:
    arch: int
    head_dim: int
    dtype: str = "bfloat16"
    group: int = 4
    page_size: int = 0
    options: bool = False

    def __str__(self):
        paged = f"-page{self.page_size}" if self.page_size else ""
        return f"sm{self.arch}-D{self.head_dim}-{self.dtype}-G{self.group}{paged}{'-options' * self.options}"


MAIN = tuple(Config(arch, dim, page_size=page) for arch in (80, 90) for dim in (64, 128, 256) for page in (0, 16))
MAIN += (Config(80, 128, "float32"), Config(90, 128, "float32"), Config(90, 128, "float16", group=1))
MAIN += (Config(80, 128, options=True), Config(90, 80, page_size=64, options=True, group=32))


def launches_only_compile(arch: int):
    from xformer_fast.kernels import decode

    return compiling(arch, decode, multiprocessors=132)


def call(config: Config, capacity=4096, tokens=1, window=-1, batch=2):
    """A step on uninitialised CPU tensors, of which only shapes and strides matter."""
    from xformer_fast.kernels import decode

    dtype, dim, heads_kv = getattr(torch, config.dtype), config.head_dim, 2
    heads = heads_kv * config.group
    query, key = (torch.empty(batch, h, tokens, dim, dtype=dtype) for h in (heads, heads_kv))
    lengths, table, slopes, bias, sinks = torch.zeros(batch, dtype=torch.int32), None, None, None, None
    if config.page_size:
        table = torch.zeros(batch, capacity // config.page_size, dtype=torch.int32)
        cache = torch.empty(table.numel(), heads_kv, config.page_size, dim, dtype=dtype)
    else:
        cache = torch.empty(batch, heads_kv, capacity, dim, dtype=dtype)
    if config.options:
        slopes, sinks, bias = torch.empty(batch, heads), torch.empty(heads), torch.empty(heads, capacity + tokens - 1)
    decode.append(cache, cache, key, key, lengths, table)
    terms = lengths, table, slopes, bias, sinks, tokens, 0.125, 30.0 * config.options, window
    decode.forward(query, cache, cache, *terms)


@functools.cache
def rows_of(config: Config) -> list[dict]:
    with launches_only_compile(config.arch) as compiled:
        call(config)
    return resources(compiled)


@pytest.mark.parametrize("config", MAIN, ids=str)
def test_compiles_without_spills(config):
    rows = rows_of(config)
    names = ["kv_cache_append_kernel", "decode_split_kernel", "decode_merge_kernel"]
    assert [row["kernel"] for row in rows] == names
    for row in rows:
        assert not row["narrow"], f"{config}: {row}"
        assert row["STACK"] + row["LOCAL"] == 0, f"{config}: {row} has stack"
        assert row["shared"] <= SHARED_MEMORY[config.arch], f"{config}: {row}"


def test_a_new_capacity_or_window_compiles_nothing():
    config = Config(90, 64, page_size=16)
    with launches_only_compile(90) as compiled:
        call(config, 4096)
        first = {kernel.hash for _, kernel in compiled}
        for capacity, tokens, window in ((8192, 1, 100), (160, 2, 7), (4112, 3, 0)):
            call(config, capacity, tokens, window)
        assert {kernel.hash for _, kernel in compiled} == first


@pytest.mark.parametrize("batch, tokens", [(40_000, 1), (1, 70_000)], ids=["sequences", "tokens"])
def test_many_sequences_or_tokens_fit_a_grid(batch, tokens):
    """Compiling checks the grids; 2 KV heads a sequence."""
    with launches_only_compile(90) as compiled:
        call(Config(90, 64), capacity=max(16, tokens), tokens=tokens, batch=batch)
    assert len(compiled) == 3
