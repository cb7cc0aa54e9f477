"""Compiles the Triton RoPE kernel to sm_80 and sm_90 machine code, without a GPU: no stack, wide accesses."""

import contextlib
import os
import re

import pytest
import torch

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles for a GPU")


@contextlib.contextmanager
def launches_only_compile(arch: int):
    """Yields the list of compiled kernels of the launches inside."""
    from triton_compilation import Driver

    from xformer_fast.kernels import rope

    compiled, run = [], triton.JITFunction.run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.JITFunction, "run", lambda *a, warmup, **k: compiled.append(run(*a, warmup=True, **k)))
        patch.setattr(rope, "launch_context", lambda tensor: contextlib.nullcontext())
        patch.setattr(triton.runtime.driver, "_active", Driver(arch))
        yield compiled


def rotate(dtype=torch.bfloat16, length=512, dim=128, rotary=128, interleaved=False, positions=None, sections=None):
    from xformer_fast.kernels import rope

    x, cos = torch.empty(2, 32, length, dim, dtype=dtype), torch.empty(4096, rotary // 2)
    rope.rotate(x, cos, cos, positions, 0, sections, interleaved, False)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("arch", [80, 90])
def test_main_configurations(arch, dtype, interleaved):
    from triton_compilation import disassemble

    with launches_only_compile(arch) as compiled:
        rotate(dtype, interleaved=interleaved)
        rotate(dtype, interleaved=interleaved, positions=torch.zeros(2, 512, dtype=torch.int64))
    for kernel in compiled:
        usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", disassemble(kernel, "-res-usage")))
        assert (usage["STACK"], usage["LOCAL"]) == ("0", "0"), usage
        code = disassemble(kernel, "-sass")
        assert re.search(r"LDG\.E\.\S*128", code) and re.search(r"STG\.E\.\S*128", code), "no 16-byte accesses"


def test_every_option_compiles():
    with launches_only_compile(90) as compiled:
        rotate(dim=80, rotary=24, positions=torch.zeros(3, 2, 512, dtype=torch.int32), sections=(4, 4, 4))
        rotate(torch.float16, dim=72, rotary=72, positions=torch.zeros(512, dtype=torch.int64), interleaved=True)
    assert len(compiled) == 2


def test_a_new_length_compiles_nothing():
    with launches_only_compile(90) as compiled:
        for length in (512, 513, 96, 2048, 4000):
            rotate(length=length)
    assert len({kernel.hash for kernel in compiled}) == 1
