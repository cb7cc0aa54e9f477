"""Compiles the Triton kernels of linear attention to sm_80 and sm_90, without a GPU, as test_triton_compile does."""

import contextlib
import functools
import os
import re
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch

triton = pytest.importorskip("triton")
from test_triton_compile import SHARED_MEMORY, Config, Driver, disassemble  # noqa: E402

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles for a GPU")

MAIN = [Config(arch, dim, causal=causal) for arch in (80, 90) for dim in (64, 128) for causal in (False, True)]
MAIN += [Config(80, 64, "float16", causal=True)]
OTHER = [Config(90, 256, causal=True), Config(90, 64, "float32", causal=True)]  # spill a little: not tuned on a GPU yet
OTHER += [Config(90, 64, causal=True, terms="all"), Config(80, 80, causal=True, terms="packed")]
ALL = (*MAIN, *OTHER)


@contextlib.contextmanager
def launches_only_compile(arch: int):
    from xformer_fast.kernels import linear_attention, linear_attention_backward

    compiled, run = [], triton.JITFunction.run

    def compile_only(self, *args, warmup, **keywords):
        compiled.append((self.__name__, run(self, *args, warmup=True, **keywords)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.JITFunction, "run", compile_only)
        for module in (linear_attention, linear_attention_backward):
            patch.setattr(module, "launch_context", lambda tensor: contextlib.nullcontext())
        patch.setattr(triton.runtime.driver, "_active", Driver(arch))
        yield compiled


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


def resources(config: Config) -> list[dict]:
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
    with ProcessPoolExecutor(max_workers=min(8, os.cpu_count()), mp_context=get_context("spawn")) as pool:
        return dict(zip(configs, pool.map(resources, configs), strict=True))


@pytest.mark.parametrize("config", ALL, ids=str)
def test_compiles_without_spills(config):
    for row in compiled_in_parallel(ALL)[config]:
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
