"""Windowed attention on a GPU: every backend there against the formula in float64. `make gpu-proof` runs it."""

import dataclasses

import pytest
import torch
from attention_cases import unwritten_memory_is_nan
from window_cases import Case, compare, draw, evaluate, on_backend

from xformer_fast import dispatch, reference, window_attention
from xformer_fast.testing import check_close

pytestmark = pytest.mark.gpu
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(params=["triton", "cuda"], autouse=True)
def backend(request, record_property):
    """The backend under test; the recorded property is what `make gpu-proof` takes as evidence for it."""
    if request.param == "cuda" and (missing := dispatch.cuda_problem("window_attention_cuda")):
        pytest.skip(missing)
    record_property("proves", f"window_attention/{request.param}")
    return request.param


def moved(tensor):
    """`tensor` on the GPU, with its strides, offset and neighbours in memory."""
    whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage()).cuda()
    return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def check(case: Case, backend: str):
    tensors = {name: moved(t) for name, t in case.tensors.items()}
    case = dataclasses.replace(case, tensors=tensors, grad=case.grad.cuda())
    with unwritten_memory_is_nan():
        results = evaluate(case, on_backend(backend))
    compare(case, results, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(40))
def test_random_calls(backend, seed, dtype):
    check(draw(1000 + seed, dtype), backend)


def model_case(dtype, *, batch=4, side=28, heads=3, dim=32, window=7, shift=0, cosine=False, partition="window"):
    torch.manual_seed(0)
    query, key, value = torch.randn(batch, side, side, 3, heads, dim).to(dtype).unbind(3)
    tensors = {"query": query, "key": key, "value": value}
    if cosine:
        tensors["bias"] = 16 * torch.rand(heads, window**2, window**2).to(dtype)
        tensors["logit_scale"] = torch.rand(heads) * 40 + 1
    else:
        tensors["relative_bias_table"] = torch.randn((2 * window - 1) ** 2, heads).to(dtype)
    grad = torch.randn(batch, side, side, heads, dim).to(dtype)
    return Case("model", dtype, tensors, (window, window), grad, {"shift": shift, "partition": partition})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"shift": 3, "batch": 64},
        {"heads": 24, "side": 7},
        {"window": 8, "side": 32, "shift": 4, "cosine": True},
        {"window": 16, "side": 32, "shift": 8, "cosine": True},
        {"window": 12, "side": 24, "shift": 6},
        {"partition": "grid", "heads": 2},
        {"window": 14, "dim": 80},
    ],
    ids=str,
)
def test_models(backend, options, dtype):
    check(model_case(dtype, **options), backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("window", [3, 5, 7, 10])
@pytest.mark.parametrize("dim", [16, 64, 127, 256])
def test_head_dims(backend, dim, window, dtype):
    """Every row of the table of tiles, pieces of a head dim included."""
    if backend == "cuda" and dim > 128:
        pytest.skip("head_dim is at most 128")
    for cosine in (False, True):
        case = model_case(dtype, side=2 * window, batch=2, dim=dim, window=window, shift=window // 2, cosine=cosine)
        check(case, backend)


def test_more_than_two_to_the_31_elements(backend):
    batch, side, heads, dim = 300, 224, 3, 64
    if torch.cuda.mem_get_info()[0] < 10 * batch * side**2 * heads * dim:
        pytest.skip("needs 29 GB of GPU memory")
    packed = torch.empty(batch, side, side, 3, heads, dim, dtype=torch.bfloat16, device="cuda").normal_()
    assert packed.numel() > 2**31
    with torch.no_grad():
        out = window_attention(*packed.unbind(3), 7, shift=3, backend=backend)
        last = packed[-1:].unbind(3)
        exact = reference.window_attention(*(t.double() for t in last), 7, shift=3)
        naive = reference.window_attention(*last, 7, shift=3)
    check_close(out[-1:], exact, naive, dtype=torch.bfloat16)


@pytest.mark.parametrize("window", [7, 12])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_every_time(backend, dtype, window):
    case = model_case(dtype, batch=32, side=4 * window, window=window, shift=3, cosine=True)
    case = dataclasses.replace(case, tensors={n: t.cuda() for n, t in case.tensors.items()}, grad=case.grad.cuda())
    first = evaluate(case, on_backend(backend))
    for _ in range(3):
        again = evaluate(case, on_backend(backend))
        assert all(torch.equal(first[name], again[name]) for name in first)


def leaves_of(case: Case) -> list[torch.Tensor]:
    return [t.cuda().requires_grad_() for t in case.tensors.values()]


def outputs_and_grads(function, leaves):
    out = function(*leaves)
    return [out, *torch.autograd.grad(out.square().sum(), leaves)]


def test_compiled_with_dynamic_maps(backend):
    def attend(query, key, value, table):
        return window_attention(query, key, value, 7, shift=3, relative_bias_table=table, backend=backend)

    compiled = torch.compile(attend, fullgraph=True, dynamic=True)
    for batch, side in ((2, 14), (3, 28), (4, 56)):
        leaves = leaves_of(model_case(torch.bfloat16, batch=batch, side=side))
        expected = outputs_and_grads(attend, leaves)
        assert all(torch.equal(a, b) for a, b in zip(outputs_and_grads(compiled, leaves), expected, strict=True))


def test_no_hidden_synchronisation(backend):
    leaves = leaves_of(model_case(torch.bfloat16, shift=3))

    def step():
        return outputs_and_grads(
            lambda q, k, v, t: window_attention(q, k, v, 7, shift=3, relative_bias_table=t, backend=backend), leaves
        )

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(backend, dtype):
    leaves = leaves_of(model_case(torch.float32))
    with torch.autocast("cuda", dtype):
        out = window_attention(*leaves[:3], 7, relative_bias_table=leaves[3], backend=backend)
    assert out.dtype == dtype
    grads = torch.autograd.grad(out.float().sum(), leaves)
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads)
