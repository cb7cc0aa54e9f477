"""The CUDA C++ kernels of windowed attention on an emulated device, on the CPU: make test-cuda."""

import math

import pytest
import torch
from attention_cases import unwritten_memory_is_nan
from window_cases import compare, draw, evaluate, on_backend

import xformer_fast
from xformer_fast import dispatch, reference
from xformer_fast.testing import check_close

if dispatch.cuda_problem("window_attention_cuda") or not dispatch.emulates_cuda("window_attention_cuda"):
    pytest.skip("no emulated device (make test-cuda)", allow_module_level=True)

from tests.cuda_emulation import plugin as device

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
MOST_TILES = 60


def cheap_cases(count: int) -> list:
    """Drawn cases of few tiles of 64 x 64 scores."""
    cases, seed = [], 0
    while len(cases) < count:
        seed += 1
        case = draw(seed, torch.float32)
        tokens, query = math.prod(case.window), case.tensors["query"]
        tiles = max(1, math.ceil(tokens / 64)) ** 2 * query[..., 0].numel() / max(tokens, 64)
        if tiles <= MOST_TILES:
            dtype = DTYPES[len(cases) % 3]
            cases.append(pytest.param(seed, dtype, id=f"{seed}-{str(dtype)[6:]}"))
    return cases


@pytest.mark.parametrize("seed, dtype", cheap_cases(90))
def test_random_calls(seed, dtype):
    device.set_order(seed)
    case = draw(seed, dtype)
    with unwritten_memory_is_nan():
        results = evaluate(case, on_backend("cuda"))
    compare(case, results, "cuda, emulated")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dims", [(32, 32), (64, 64), (128, 128), (72, 20)], ids=str)
@pytest.mark.parametrize("cosine", [False, True])
def test_head_dims(cosine, dims, dtype):
    """A window of one tile and one of several, shifted, with a table."""
    torch.manual_seed(0)
    for window in ((7, 7), (9, 10)):
        space = 2 * window[0], window[1]
        tensors = [torch.randn(1, *space, 2, d).to(dtype) for d in (dims[0], *dims)]
        table = torch.randn(math.prod(2 * w - 1 for w in window), 2)
        logit = torch.tensor([3.0, 8.0]) if cosine else None
        results = []
        for function, raised in (
            (on_backend("cuda"), dtype),
            (reference.window_attention, torch.float64),
            (reference.window_attention, dtype),
        ):
            float_ = torch.float64 if raised == torch.float64 else torch.float32
            leaves = [t.to(raised).requires_grad_() for t in tensors] + [table.to(float_).requires_grad_()]
            leaves += [logit.to(float_).requires_grad_()] if cosine else []
            scale = {"logit_scale": leaves[4]} if cosine else {}
            out = function(*leaves[:3], window, shift=(3, 2), relative_bias_table=leaves[3], **scale)
            results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
        for ours, truth, naive in zip(*results, strict=True):
            check_close(ours, truth, naive, dtype=dtype)


def test_what_does_not_fit_is_refused():
    x = torch.randn(1, 8, 8, 1, 130)
    with pytest.raises(xformer_fast.BackendUnavailable, match="head_dim is at most 128"):
        xformer_fast.window_attention(x, x, x, 4, backend="cuda")
    x = torch.randn(1, 33, 33, 1, 2)
    with pytest.raises(xformer_fast.BackendUnavailable, match="at most 1024 tokens"):
        xformer_fast.window_attention(x, x, x, 33, backend="cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_in_every_order(dtype):
    leaves = [torch.randn(2, 14, 14, 2, 16).to(dtype).requires_grad_() for _ in range(3)]
    table = torch.randn(169, 2, requires_grad=True)
    results = []
    for seed in range(3):
        device.set_order(seed)
        out = xformer_fast.window_attention(*leaves, 7, shift=3, relative_bias_table=table, backend="cuda")
        results.append([out, *torch.autograd.grad(out.square().sum(), [*leaves, table])])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
