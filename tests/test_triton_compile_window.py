"""Compiles the Triton kernels of windowed attention to sm_80 and sm_90, without a GPU, as test_triton_compile does."""

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
    """Swin's windows, shifted, with a table; with `cosine` Swin-V2's, a bias and a logit scale; `grid`: MaxViT's."""

    arch: int
    window: tuple[int, ...] = (7, 7)
    dtype: str = "bfloat16"
    cosine: bool = False
    grid: bool = False
    head_dim: int = 32

    def __str__(self):
        window = "x".join(map(str, self.window))
        options = "-cosine" * self.cosine + "-grid" * self.grid
        return f"sm{self.arch}-{window}-D{self.head_dim}-{self.dtype}{options}"


ARCHITECTURES = (80, 90)
MAIN = [Config(arch) for arch in ARCHITECTURES] + [Config(arch, (8, 8), cosine=True) for arch in ARCHITECTURES]
MAIN += [Config(80, (12, 12)), Config(90, (12, 12), "float16", cosine=True), Config(90, dtype="float16", grid=True)]
MORE = [Config(arch, dtype="float32") for arch in ARCHITECTURES] + [Config(80, (4, 4)), Config(90, (2, 3, 5))]
MORE += [Config(90, (12, 12)), Config(80, (12, 12), cosine=True)]
WIDE = [Config(80, (2, 7, 7), head_dim=80), Config(90, head_dim=256)]  # spill a few registers


def launches_only_compile(arch: int):
    from xformer_fast.kernels import window_attention, window_attention_backward

    return compiling(arch, window_attention, window_attention_backward)


def call(config: Config, batch=2, counts=(2, 3, 2), heads=3, shift=None):
    """Forward and backward on uninitialised CPU tensors, of which only shapes and strides matter."""
    from xformer_fast.kernels import window_attention, window_attention_backward

    space = [w * n for w, n in zip(config.window, counts, strict=False)]
    packed = torch.empty(batch, *space, 3, heads, config.head_dim, dtype=getattr(torch, config.dtype))
    tokens, rows = torch.tensor(config.window).prod(), (2 * torch.tensor(config.window) - 1).prod()
    table = None if config.cosine else torch.empty(rows, heads)
    bias, logit_scale = (torch.empty(heads, tokens, tokens), torch.empty(heads)) if config.cosine else (None, None)
    if shift is None:
        shift = [0 if config.grid else w // 2 for w in config.window]
    arguments = *packed.unbind(-3), table, bias, logit_scale, config.window, shift, config.grid, 0.125
    out = window_attention.forward(*arguments)
    needs = not config.cosine, config.cosine, config.cosine
    window_attention_backward.backward(out, *arguments, *needs)


@functools.cache
def rows_of(config: Config) -> list[dict]:
    with launches_only_compile(config.arch) as compiled:
        call(config)
    return resources(compiled)


def compiled_rows(config: Config) -> list[dict]:
    rows = rows_of(config)
    for row in rows:
        assert row["shared"] <= SHARED_MEMORY[config.arch], f"{config}: {row}"
        if row["kernel"] not in ("window_bias_kernel", "window_table_gradient_kernel"):
            assert row["matrix"], f"{config}: {row['kernel']} uses no matrix instructions"
    return rows


def check(config: Config, rows: list[dict]):
    for row in rows:
        spilled = row["STACK"] + row["LOCAL"]
        assert spilled == 0, f"{config}: {row['kernel']} has {spilled} bytes of stack"
        if "forward" in row["kernel"] and config.dtype != "float32":
            assert row["asynchronous"], f"{config}: the next rows are not fetched ahead"
            if config.arch == 90 and max(config.window) > 6:
                assert row["matrix"] == ["HGMMA"], f"{config}: {row['kernel']} uses {row['matrix']}"


@pytest.mark.parametrize("config", MAIN, ids=str)
def test_main_configurations(config):
    rows = compiled_rows(config)
    check(config, rows)
    assert any("large" in row["kernel"] for row in rows) == (config.window == (12, 12))


@pytest.mark.slow
@pytest.mark.parametrize("config", MORE, ids=str)
def test_more_configurations(config):
    check(config, compiled_rows(config))


@pytest.mark.slow
@pytest.mark.parametrize("config", WIDE, ids=str)
def test_wide_heads_compile(config):
    compiled_rows(config)


def test_another_map_compiles_nothing():
    with launches_only_compile(90) as compiled:
        config = Config(90, (4, 4))
        call(config)
        first = {kernel.hash for _, kernel in compiled}
        for batch, counts, heads, shift in ((1, (1, 1), 3, (2, 1)), (64, (16, 5), 24, (0, 3)), (5, (7, 8), 4, (1, 0))):
            call(config, batch, counts, heads, shift)
        assert {kernel.hash for _, kernel in compiled} == first
