"""RoPE on a GPU: each kernel backend against the formula in float64."""

import pytest
import torch
from attention_cases import unwritten_memory_is_nan
from rope_cases import compare, draw, evaluate, on_backend, tables

import xformer_fast
from xformer_fast import Rope, dispatch, reference

pytestmark = pytest.mark.gpu
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(params=["triton", "cuda"], autouse=True)
def backend(request, record_property):
    """The backend under test; the recorded property is what `make gpu-proof` takes as evidence for it."""
    if request.param == "cuda" and (missing := dispatch.cuda_problem("rope_cuda")):
        pytest.skip(missing)
    record_property("proves", f"apply_rope/{request.param}")
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(24))
def test_random_calls(backend, seed, dtype):
    case = draw(seed, dtype)
    with unwritten_memory_is_nan():
        results = evaluate(case, on_backend(backend), device="cuda")
    compare(case, results, backend)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_model_s_shapes(backend, dtype, interleaved):
    x, (cos, sin) = torch.randn(2, 32, 4096, 128, device="cuda").to(dtype), (t.cuda() for t in tables(128, 4096))
    out = xformer_fast.apply_rope(x, cos, sin, interleaved=interleaved, backend=backend)
    expected = reference.apply_rope(x, cos, sin, interleaved=interleaved)
    torch.testing.assert_close(out, expected)
    xformer_fast.apply_rope(x, cos, sin, interleaved=interleaved, inplace=True, backend=backend)
    assert torch.equal(x, out)


def test_query_and_key_under_compile(backend):
    q, k = torch.randn(2, 8, 77, 64, device="cuda"), torch.randn(2, 2, 77, 64, device="cuda")
    rope = Rope(*(t.cuda() for t in tables(64)))
    function = torch.compile(lambda q, k: rope.rotate(q, k, backend=backend), fullgraph=True, dynamic=True)
    for ours, expected in zip(function(q, k), rope.rotate(q, k, backend="reference"), strict=True):
        torch.testing.assert_close(ours, expected)


def test_positions_outside_the_tables_stay_in_memory(backend):
    x, (cos, sin) = torch.randn(1, 1, 4, 8, device="cuda"), (t.cuda() for t in tables(8, 10))
    places = torch.tensor([-5, 0, 9, 100], device="cuda")
    out = xformer_fast.apply_rope(x, cos, sin, positions=places, backend=backend)
    torch.testing.assert_close(out, reference.apply_rope(x, cos, sin, positions=places.clamp(0, 9)))
