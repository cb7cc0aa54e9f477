"""`linear_attention` on a GPU: every backend there against the formula in float64. `make gpu-proof` runs it."""

import pytest
import torch
from test_linear_attention import Case, on_backend

import xformer_fast
from xformer_fast import dispatch, reference

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["triton", "cuda"])
def backend(request, record_property):
    """The backend under test; the recorded property is what `make gpu-proof` takes as evidence for it."""
    if request.param == "cuda" and (missing := dispatch.cuda_problem("linear_attention_cuda")):
        pytest.skip(missing)
    record_property("proves", f"linear_attention/{request.param}")
    return request.param


def on_gpu(case: Case) -> Case:
    case.tensors = {n: t.cuda() for n, t in case.tensors.items()}
    case.options = {n: o.cuda() if isinstance(o, torch.Tensor) else o for n, o in case.options.items()}
    return case


def compare(case: Case, backend: str):
    truth, naive = case.evaluate(reference.linear_attention, torch.float64), case.evaluate(reference.linear_attention)
    case.check(on_backend(backend), truth, naive, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(40))
def test_random_calls(backend, seed, dtype):
    case = on_gpu(Case(seed, dtype))
    if backend == "cuda":  # has no gradient for the decay
        names = [name for name in case.differentiated() if name != "decay"]
        case.differentiated = lambda: names
    compare(case, backend)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim", [16, 64, 72, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_calls(backend, dim, causal, dtype):
    case = Case(0, dtype)
    torch.manual_seed(0)
    case.packed, case.options = False, {"causal": causal}
    case.tensors = {n: torch.randn(1, 2, 1500, dim).to(dtype) for n in ("query", "key", "value")}
    compare(on_gpu(case), backend)


def test_the_same_call_gives_the_same_bits(backend):
    leaves = [torch.randn(1, 2, 3000, 64, device="cuda", requires_grad=True) for _ in range(3)]
    first, second = (
        torch.autograd.grad(xformer_fast.linear_attention(*leaves, causal=True, backend=backend).square().sum(), leaves)
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
