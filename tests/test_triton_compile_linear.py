"""Compiles the Triton kernels of linear attention to sm_80 and sm_90, without a GPU, as test_triton_compile does."""

import functools
import os

import pytest
import torch

pytest.importorskip("triton")
from test_triton_compile import Config
from triton_compilation import SHARED_MEMORY, compiling, resources

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles for a GPU")

MAIN = [Config(arch, dim, causal=causal) for arch in (80, 90) for dim in (64, 128) for causal in (False, True)]
MAIN += [Config(80, 64, "float16", causal=True)]
OTHER = [Config(90, 256, causal=True), Config(90, 64, "float32", causal=True)]  # spill a little: not tuned on a GPU yet
OTHER += [Config(90, 64, causal=True, terms="all"), Config(80, 80, causal=True, terms="packed")]


def launches_only_compile(arch: int):
    from xformer_fast.kernels import linear_attention, linear_attention_backward

    return compiling(arch, linear_attention, linear_attention_backward)


def call(config: Config, length: int = 512):
    """Forward and backward on CPU tensors of which only shapes and strides matter."""
    from xformer_fast.kernels import linear_attention, linear_attention_backward

    dtype, dim, everything = getattr(torch, config.dtype), config.head_dim, config.terms == "all"
    lengths = ends = decay = kv = z = None
    if config.terms == "packed":
        query, key, value = (torch.zeros(length, heads, dim, dtype=dtype) for heads in (4, 2, 2))
        ends = torch.zeros(3, dtype=torch.int32)
    else:
        query, key, value = (torch.zeros(2, heads, length, dim, dtype=dtype) for heads in (4, 2, 2))
    if everything:
        lengths, decay = torch.zeros(2, dtype=torch.int32), torch.ones(4)
        kv, z = torch.zeros(2, 4, dim, dim), torch.zeros(2, 4, dim)
    options = lengths, ends, decay, kv, z, linear_attention.ELU, config.causal, True, 1e-6, 1.0
    out, state, sums, denominator = linear_attention.forward(query, key, value, *options, everything)
    grads = (state, sums) if everything else (None, None)
    linear_attention_backward.backward(
        out, *grads, query, key, value, out, denominator, *options, everything, everything
    )


@functools.cache
def rows_of(config: Config) -> list[dict]:
    with launches_only_compile(config.arch) as compiled:
        call(config)
    return resources(compiled)


@pytest.mark.parametrize("config", [*MAIN, *OTHER], ids=str)
def test_compiles_without_spills(config):
    for row in rows_of(config):
        assert not row["narrow"], f"{config}: {row}"
        assert row["shared"] <= SHARED_MEMORY[config.arch], f"{config}: {row}"
        if config in OTHER:
            continue
        assert row["STACK"] + row["LOCAL"] == 0, f"{config}: {row['kernel']} has {row['STACK']} bytes of stack"
        if "prefix" not in row["kernel"]:
            assert row["matrix"], f"{config}: {row['kernel']} uses no matrix instructions"


def test_a_new_length_compiles_nothing():
    """Sequences too short to be cut take a variant of their own, without the states that segments start from."""
    with launches_only_compile(90) as compiled:
        config = Config(90, 64, causal=True)
        call(config, 512)
        first = {kernel.hash for _, kernel in compiled}
        for length in (513, 640, 2048, 4000):
            call(config, length)
        assert {kernel.hash for _, kernel in compiled} == first
