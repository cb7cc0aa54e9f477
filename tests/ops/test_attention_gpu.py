"""Softmax attention on a GPU: each kernel backend against the formula in float64, and what torch expects of it."""

import dataclasses

import pytest
import torch
from attention_cases import (
    OPTIONS,
    check,
    check_rows_of_least_numbers,
    draw,
    evaluate,
    on_backend,
    truth_and_naive,
    unwritten_memory_is_nan,
)

import xformer_fast
from xformer_fast import dispatch, reference
from xformer_fast.testing import check_close

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
HALF = [torch.bfloat16, torch.float16]
KERNEL_OPTIONS = {"triton": OPTIONS, "cuda": [n for n in OPTIONS if n not in ("global_keys", "decomposed_bias")]}


@pytest.fixture(params=["triton", "cuda"], autouse=True)
def backend(request, record_property):
    """The backend under test; the recorded property is what `make gpu-proof` takes as evidence for it."""
    if request.param == "cuda" and (missing := dispatch.cuda_problem("attention_cuda")):
        pytest.skip(missing)
    record_property("proves", f"attention/{request.param}")
    return request.param


@pytest.fixture(autouse=True)
def memory_given_back():
    yield
    torch.cuda.empty_cache()


def moved(tensor):
    """`tensor` on the GPU with the strides, offset and neighbours in memory that it has on the CPU."""
    whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage()).to(DEVICE)
    return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def on_gpu(case):
    def move(value):
        if isinstance(value, torch.Tensor):
            return moved(value)
        if isinstance(value, (tuple, list)):
            return type(value)(move(x) for x in value)
        return {name: move(x) for name, x in value.items()} if isinstance(value, dict) else value

    return dataclasses.replace(case, tensors=move(case.tensors), options=move(case.options))


def check_case(case, backend):
    case = on_gpu(case)
    truth, naive = truth_and_naive(case)
    with unwritten_memory_is_nan():
        results = evaluate(case, on_backend(backend, packed=case.packed))
    check(case, results, truth, naive, f"{backend} on {DEVICE}")


def inputs(batch, heads, heads_kv, len_q, len_k, dim, dtype, *, dim_v=None, grad=True):
    shapes = (heads, len_q, dim), (heads_kv, len_k, dim), (heads_kv, len_k, dim_v or dim)
    return [torch.randn(batch, *shape, device=DEVICE).to(dtype).requires_grad_(grad) for shape in shapes]


def outputs_and_grads(function, tensors, grad_out, **options):
    out = function(*tensors, **options)
    return [out.detach(), *torch.autograd.grad(out, tensors, grad_out.to(out.dtype))]


def check_call(tensors, backend, **options):
    """One call and its gradients against the formula."""
    grad_out = torch.randn(*tensors[0].shape[:-1], tensors[2].shape[-1], device=DEVICE).to(tensors[0].dtype)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    truth = outputs_and_grads(reference.attention, exact, grad_out, **options)
    naive = outputs_and_grads(reference.attention, tensors, grad_out, **options)
    results = outputs_and_grads(xformer_fast.attention, tensors, grad_out, backend=backend, **options)
    for name, result, expected, plain in zip(("out", "dq", "dk", "dv"), results, truth, naive, strict=True):
        check_close(result, expected, plain, name, dtype=tensors[0].dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(24))
def test_random_calls(backend, seed, dtype):
    check_case(draw(1000 + seed, dtype, options=KERNEL_OPTIONS[backend]), backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(8))
def test_random_packed_calls(backend, seed, dtype):
    check_case(draw(2000 + seed, dtype, packed=True), backend)


@pytest.mark.parametrize("seed", range(6))
def test_random_long_calls(backend, seed):
    check_case(draw(3000 + seed, HALF[seed % 2], long=True, options=KERNEL_OPTIONS[backend]), backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [16, 40, 64, 72, 96, 127, 128, 160, 192, 256])
def test_head_dims(backend, dim, dtype):
    """Every row of the table of tiles, over several blocks of queries and keys, with grouped heads."""
    for causal in (False, True):
        check_call(inputs(2, 4, 2, 333, 517, dim, dtype), backend, causal=causal)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim, dim_v", [(64, 128), (192, 128), (256, 32)])
def test_value_width_of_its_own(backend, dim, dim_v, dtype):
    check_call(inputs(1, 4, 4, 200, 300, dim, dtype, dim_v=dim_v), backend, causal=True)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "window": (1023, 0)}], ids=str)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_thirty_thousand_tokens(backend, dim, options):
    """Gradients flow from the last rows alone, which the formula can do in float64 by itself."""
    length, rows = 32_768, 128
    tensors = inputs(1, 4, 2, length, length, dim, torch.bfloat16)
    grad_out = torch.zeros(1, 4, length, dim, device=DEVICE, dtype=torch.bfloat16)
    grad_out[:, :, -rows:] = torch.randn(1, 4, rows, dim, device=DEVICE).to(torch.bfloat16)
    out, dq, dk, dv = outputs_and_grads(xformer_fast.attention, tensors, grad_out, backend=backend, **options)
    assert not dq[:, :, :-rows].any()
    results = [out[:, :, -rows:], dq[:, :, -rows:], dk, dv]

    tail = [tensors[0][:, :, -rows:], *tensors[1:]]
    naive = [t.detach().requires_grad_() for t in tail]
    exact = [t.detach().double().requires_grad_() for t in tail]
    expected, plain = (
        outputs_and_grads(reference.attention, t, grad_out[:, :, -rows:], **options) for t in (exact, naive)
    )
    for name, *three in zip(("out", "dq", "dk", "dv"), results, expected, plain, strict=True):
        check_close(*three, name, dtype=torch.bfloat16)


def test_one_query_over_a_long_cache(backend):
    tensors = inputs(2, 32, 8, 1, 65_536, 128, torch.bfloat16, grad=False)
    lengths = torch.tensor([65_536, 40_001], device=DEVICE, dtype=torch.int32)
    with torch.no_grad():
        out = xformer_fast.attention(*tensors, key_lengths=lengths, backend=backend)
        exact = reference.attention(*(t.double() for t in tensors), key_lengths=lengths)
        check_close(out, exact, reference.attention(*tensors, key_lengths=lengths), dtype=torch.bfloat16)


def test_more_than_two_to_the_31_elements(backend):
    heads, length, dim = 65, 262_144, 128
    size = heads * length * dim
    assert size > 2**31
    if DEVICE == "cuda" and torch.cuda.mem_get_info()[0] < 6 * size:
        pytest.skip("needs 13 GB of GPU memory")
    cache = torch.empty(1, heads, length, dim, dtype=torch.bfloat16, device=DEVICE).normal_()
    query = torch.randn(1, heads, 16, dim, device=DEVICE).to(torch.bfloat16)
    with torch.no_grad():
        out = xformer_fast.attention(query, cache, cache, causal=True, backend=backend)
        last = [t[:, -1:] for t in (query, cache, cache)]
        exact = reference.attention(*(t.double() for t in last), causal=True)
        check_close(out[:, -1:], exact, reference.attention(*last, causal=True), dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_every_time(backend, dtype):
    tensors = inputs(2, 8, 2, 700, 900, 64, dtype)
    slopes = torch.rand(8, device=DEVICE, requires_grad=True)
    mask = torch.randn(1, 8, 1, 900, device=DEVICE, requires_grad=True)
    grad_out = torch.randn(2, 8, 700, 64, device=DEVICE).to(dtype)

    def call():
        torch.manual_seed(5)
        options = {"causal": True, "alibi_slopes": slopes, "mask": mask, "dropout_p": 0.2, "backend": backend}
        out = xformer_fast.attention(*tensors, **options)
        return [out, *torch.autograd.grad(out, [*tensors, slopes, mask], grad_out)]

    first = call()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, call(), strict=True))


def test_memory_is_linear_in_length(backend):
    def peak(length):
        tensors = inputs(1, 4, 4, length, length, 64, torch.bfloat16)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        xformer_fast.attention(*tensors, causal=True, backend=backend).sum().backward()
        return torch.cuda.max_memory_allocated() - before

    peak(1024)
    assert peak(32_768) < 2.5 * peak(16_384)


def test_no_hidden_synchronisation(backend):
    tensors = inputs(2, 4, 2, 300, 400, 64, torch.bfloat16)
    lengths = torch.tensor([400, 250], device=DEVICE)
    grad_out = torch.randn(2, 4, 300, 64, device=DEVICE, dtype=torch.bfloat16)

    def step():
        options = {"key_lengths": lengths, "dropout_p": 0.1, "causal": True, "backend": backend}
        torch.autograd.grad(xformer_fast.attention(*tensors, **options), tensors, grad_out)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compiled_with_dynamic_lengths(backend):
    def attend(query, key, value):
        return xformer_fast.attention(query, key, value, causal=True, window=(100, 0), backend=backend)

    compiled = torch.compile(attend, fullgraph=True, dynamic=True)
    for length in (130, 257, 512):
        tensors = inputs(2, 4, 2, length, length + 40, 64, torch.bfloat16)
        grad_out = torch.randn(2, 4, length, 64, device=DEVICE, dtype=torch.bfloat16)
        expected = outputs_and_grads(attend, tensors, grad_out)
        with torch._dynamo.config.patch(error_on_recompile=length > 130):
            results = outputs_and_grads(compiled, tensors, grad_out)
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_replayed_from_a_cuda_graph(backend):
    tensors = inputs(2, 4, 2, 256, 256, 64, torch.bfloat16)
    grad_out = torch.randn(2, 4, 256, 64, device=DEVICE, dtype=torch.bfloat16)

    def step():
        return outputs_and_grads(xformer_fast.attention, tensors, grad_out, causal=True, backend=backend)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for _ in range(2):
        with torch.no_grad():
            for tensor in (*tensors, grad_out):
                tensor.normal_()
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(results, step(), strict=True))


def test_on_a_stream_of_its_own(backend):
    tensors = inputs(1, 4, 4, 500, 500, 128, torch.float16, grad=False)
    expected = xformer_fast.attention(*tensors, backend=backend)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        out = xformer_fast.attention(*tensors, backend=backend)
    torch.cuda.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_autocast(backend, dtype):
    tensors = inputs(1, 2, 2, 100, 100, 64, torch.float32)
    with torch.autocast(DEVICE, dtype):
        out = xformer_fast.attention(*tensors, backend=backend)
    assert out.dtype == dtype
    grads = torch.autograd.grad(out.float().sum(), tensors)
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads)


def test_lengths_out_of_range_stay_in_memory(backend):
    """On a GPU values are clamped, not checked."""
    tensors = inputs(2, 2, 2, 40, 50, 64, torch.bfloat16, grad=False)
    lengths = torch.tensor([10_000_000, -3], device=DEVICE)
    out = xformer_fast.attention(*tensors, key_lengths=lengths, backend=backend)
    clamped = xformer_fast.attention(*tensors, key_lengths=lengths.clamp(0, 50), backend=backend)
    assert torch.equal(out, clamped)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_least_numbers(backend, dtype):
    check_rows_of_least_numbers(backend, dtype, device=DEVICE)
