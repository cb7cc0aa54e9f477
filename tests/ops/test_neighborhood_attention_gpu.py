"""`neighborhood_attention` on a GPU: every backend there against the formula in float64. `make gpu-proof` runs it."""

import pytest
import torch
from attention_cases import unwritten_memory_is_nan
from neighborhood_cases import check, draw, evaluate, on_backend, truth_and_naive
from test_neighborhood_attention import made

from xformer_fast import neighborhood_attention

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["triton"], autouse=True)
def backend(request, record_property):
    """The backend under test; the recorded property is what `make gpu-proof` takes as evidence for it."""
    record_property("proves", f"neighborhood_attention/{request.param}")
    return request.param


def agree(case, backend):
    case.tensors = {n: t.cuda() for n, t in case.tensors.items()}
    case.grad = case.grad.cuda()
    truth, naive = truth_and_naive(case)
    with unwritten_memory_is_nan():
        results = evaluate(case, on_backend(backend))
    check(case, results, truth, naive, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(40))
def test_random_calls(backend, seed, dtype):
    agree(draw(seed, dtype), backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [32, 64, 72, 128, 256])
def test_models_shapes(backend, dim, dtype):
    agree(made((7, 7), (28, 28), heads=4, heads_kv=4, dim=dim, dtype=dtype, batch=2), backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "kernel, space, options",
    [
        ((301,), (1500,), {}),
        ((63,), (1500,), {"causal": True}),
        ((7, 7), (33, 50), {"dilation": 4}),
        ((3, 7, 7), (6, 14, 14), {"causal": (True, False, False)}),
    ],
    ids=str,
)
def test_larger_maps(backend, kernel, space, options, dtype):
    agree(made(kernel, space, heads_kv=1, dim=64, dtype=dtype, **options), backend)


def test_the_same_call_gives_the_same_bits(backend):
    leaves = [torch.randn(4, 56, 56, 4, 32, device="cuda", requires_grad=True) for _ in range(3)]
    table = torch.randn(169, 4, device="cuda", requires_grad=True)
    first, second = (
        torch.autograd.grad(
            neighborhood_attention(*leaves, 7, relative_bias_table=table, backend=backend).square().sum(),
            [*leaves, table],
        )
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_under_compile(backend):
    def run(query, key, value):
        return neighborhood_attention(query, key, value, 5, backend=backend)

    compiled = torch.compile(run, fullgraph=True, dynamic=True)
    for side in (12, 19):
        leaves = [torch.randn(3, side, 20, 2, 32, device="cuda", requires_grad=True) for _ in range(3)]
        results = []
        for function in (compiled, run):
            out = function(*leaves)
            results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
        for ours, eager in zip(*results, strict=True):
            torch.testing.assert_close(ours, eager)
