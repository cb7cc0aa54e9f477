"""The emulated device of tests/cuda_emulation finds what it promises to find, and nothing where nothing is wrong."""

import ctypes
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from cuda_emulation.build import build_planted

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
THREADS = 128
ORDERS = [0, 1, 2, 3]
RACE = r"4 bytes of shared memory .*has (read|written) it, and no barrier lies between"
UNORDERED = rf"{RACE}|nothing in this block has written it"  # the reader may come first
FAULTS = [  # kernel, fault, what the device says
    ("barriers", 1, UNORDERED),
    ("barriers", 2, RACE),
    ("warp_barriers", 1, UNORDERED),
    ("named_barriers", 1, UNORDERED),
    ("named_barriers", 2, UNORDERED),
    ("copies", 1, r"a cp\.async that was not waited for"),
    ("copies", 2, r"a cp\.async that was not waited for"),
    ("copies", 3, rf"{UNORDERED}|a cp\.async that was not waited for"),
    ("bounds", 1, r"(reads|writes) 4 bytes outside .*, 0 bytes past the end of (in|out)"),
    ("bounds", 2, r"reads 4 bytes outside .*4 bytes before in"),
    ("bounds", 3, r"misaligned pointer"),
    ("shared_bounds", 1, r"nothing in this block has written it"),
    ("shared_bounds", 2, r"shared memory .*past its end"),
    ("blocks", 1, r"writes 4 bytes of out .*another block of this launch has written it"),
    ("blocks", 2, r"of out .*another block of this launch has (written|read) it"),
    ("divergence", 1, r"deadlock: .*waits at barrier 0"),
    ("divergence", 2, r"deadlock: .*waits at __shfl_sync"),
]


@pytest.fixture(scope="module")
def run():
    library = ctypes.CDLL(str(build_planted()))

    def run_planted(kernel: str, fault: int, order: int, n: int = THREADS):
        source, out, message = torch.randn(n + 256), torch.full((n + 256,), float("nan")), ctypes.c_char_p()
        source, out = source[128 : 128 + n], out[128 : 128 + n]  # memory on either side
        pointers = (ctypes.c_void_p(t.data_ptr()) for t in (source, out))
        error = library.run_planted(kernel.encode(), fault, *pointers, n, ctypes.c_uint64(order), ctypes.byref(message))
        return error, message.value.decode(), source, out

    return run_planted


def expected(kernel: str, x: torch.Tensor) -> torch.Tensor:
    if kernel == "barriers":
        return 3 * x.roll(-32) + 3
    if kernel == "warp_barriers":
        return x.view(-1, 32).roll(-1, 1).flatten()
    if kernel == "named_barriers":
        return x.view(-1, 64).roll(-32, 1).flatten()
    if kernel == "copies":
        return x + torch.where(torch.arange(len(x)) % 4 == 0, x, 0.0)
    if kernel == "divergence":
        return x + x.view(-1, 32)[:, :1].expand(-1, 32).flatten()
    return x


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kernel", sorted({kernel for kernel, _, _ in FAULTS}))
def test_right_kernels_pass(run, kernel, order):
    n = 3 * THREADS if kernel == "blocks" else 100 if kernel == "bounds" else THREADS
    error, message, source, out = run(kernel, 0, order, n)
    assert error == 0, message
    torch.testing.assert_close(out, expected(kernel, source))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kernel, fault, says", FAULTS)
def test_planted_faults_are_found(run, kernel, fault, says, order):
    n = 3 * THREADS if kernel == "blocks" else 100 if kernel == "bounds" else THREADS
    error, message, *_ = run(kernel, fault, order, n)
    assert error == 700, message
    assert re.search(says, message), message
    assert re.search(r"\[\w+\.cuh?:\d+\]", message) or "deadlock" in message, message
