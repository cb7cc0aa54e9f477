"""Windowed attention on a GPU: every kernel backend there against the formula in float64. `make gpu-proof` runs it."""

import dataclasses

import pytest
import torch
from attention_cases import unwritten_memory_is_nan
from window_cases import compare, draw, evaluate, on_backend

import xformer_fast
from xformer_fast import dispatch

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["cuda"], autouse=True)
def backend(request, record_property):
    """The backend under test; the recorded property is what `make gpu-proof` takes as evidence for it."""
    if missing := dispatch.cuda_problem("window_attention_cuda"):
        pytest.skip(missing)
    record_property("proves", f"window_attention/{request.param}")
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(40))
def test_random_calls(backend, seed, dtype):
    case = draw(seed, dtype)
    moved = dataclasses.replace(case, tensors={n: t.cuda() for n, t in case.tensors.items()}, grad=case.grad.cuda())
    with unwritten_memory_is_nan():
        results = evaluate(moved, on_backend(backend))
    compare(case, {name: result.cpu() for name, result in results.items()}, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_every_time(backend, dtype):
    leaves = [torch.randn(8, 56, 56, 4, 32, device="cuda").to(dtype).requires_grad_() for _ in range(3)]
    table = torch.randn(169, 4, device="cuda", requires_grad=True)

    def call():
        out = xformer_fast.window_attention(*leaves, 7, shift=3, relative_bias_table=table, backend=backend)
        return [out, *torch.autograd.grad(out.square().sum(), [*leaves, table])]

    first = call()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, call(), strict=True))
