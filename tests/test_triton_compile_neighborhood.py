"""Compiles the Triton kernels of neighborhood attention to sm_80 and sm_90, as test_triton_compile does."""

import functools
import os
from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("triton")
from triton_compilation import SHARED_MEMORY, compiling, resources

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles for a GPU")


@dataclass(frozen=True)
class Config:
    arch: int
    head_dim: int
    kernel: tuple[int, ...] = (7, 7)
    dtype: str = "bfloat16"
    table: bool = True
    causal: bool = False
    dilation: int = 1

    def __str__(self):
        kernel = "x".join(map(str, self.kernel))
        options = "-table" * self.table + "-causal" * self.causal + f"-dilation{self.dilation}" * (self.dilation > 1)
        return f"sm{self.arch}-D{self.head_dim}-{kernel}-{self.dtype}{options}"


MAIN = [Config(arch, dim) for arch in (80, 90) for dim in (32, 64)]
MAIN += [Config(80, 64, (3, 7, 7), causal=True, dilation=2), Config(90, 128, (63,), "float16", table=False)]
MORE = [Config(arch, dim) for arch in (80, 90) for dim in (128, 256)]
MORE += [Config(arch, dim, table=False) for arch in (80, 90) for dim in (32, 64, 128, 256)]
MORE += [Config(arch, dim, (3, 7, 7), "float16") for arch in (80, 90) for dim in (32, 64)]
MORE += [Config(arch, dim, dtype="float32") for arch in (80, 90) for dim in (32, 64)]
MORE += [Config(80, 128, dtype="float32")]
WIDE = Config(80, 256, dtype="float32")  # two rows of 256 numbers fill a thread's registers
WIDE_STACK = 1024  # bytes a thread


def launches_only_compile(arch: int):
    from xformer_fast.kernels import neighborhood_attention, neighborhood_attention_backward, neighborhood_tiles

    modules = neighborhood_attention, neighborhood_attention_backward, neighborhood_tiles
    return compiling(arch, *modules, architecture=f"sm{arch}")


def call(config: Config, side: int = 64, batch: int = 2):
    """Forward and backward on CPU tensors of which only shapes and strides matter."""
    from xformer_fast.kernels import neighborhood_attention, neighborhood_attention_backward

    axes, heads = len(config.kernel), 4
    shape = batch, *(side,) * axes, heads, config.head_dim
    query, key, value = (torch.empty(shape, dtype=getattr(torch, config.dtype)) for _ in range(3))
    rows = torch.Size(2 * k - 1 for k in config.kernel).numel()
    table = torch.empty(rows, heads) if config.table else None
    options = table, config.kernel, (config.dilation,) * axes, (int(config.causal),) * axes, 0.125
    out = neighborhood_attention.forward(query, key, value, *options)
    neighborhood_attention_backward.backward(out, query, key, value, *options, config.table)


@functools.cache
def rows_of(config: Config) -> list[dict]:
    with launches_only_compile(config.arch) as compiled:
        call(config)
    return resources(compiled)


def check(config: Config, stack: int = 0):
    rows = rows_of(config)
    assert len(rows) == (4 if config.table else 3)
    for row in rows:
        assert not row["narrow"], f"{config}: {row}"
        spilled = row["STACK"] + row["LOCAL"]
        assert spilled <= stack, f"{config}: {row['kernel']} has {spilled} bytes of stack"
        assert row["shared"] <= SHARED_MEMORY[config.arch], f"{config}: {row}"
        assert row["matrix"], f"{config}: {row['kernel']} uses no matrix instructions"


@pytest.mark.parametrize("config", MAIN, ids=str)
def test_main_configurations(config):
    check(config)


@pytest.mark.slow
@pytest.mark.parametrize("config", MORE, ids=str)
def test_other_configurations(config):
    check(config)


@pytest.mark.slow
def test_wide_rows_of_float32():
    check(WIDE, WIDE_STACK)


def test_a_new_map_compiles_nothing():
    with launches_only_compile(90) as compiled:
        config = Config(90, 64)
        call(config)
        first = {kernel.hash for _, kernel in compiled}
        for side, batch in ((56, 2), (15, 3), (113, 1), (7, 4)):
            call(config, side, batch)
        assert {kernel.hash for _, kernel in compiled} == first
