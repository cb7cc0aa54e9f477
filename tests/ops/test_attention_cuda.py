"""The CUDA C++ kernels of softmax attention on an emulated device, on the CPU: make test-cuda.

Every thread of every block runs, and every access is checked: shapes are small. Threads run in another order each seed.
"""

import functools
import math

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

if dispatch.cuda_problem("attention_cuda") or not dispatch.emulates_cuda("attention_cuda"):
    pytest.skip("no emulated device (make test-cuda)", allow_module_level=True)

from tests.cuda_emulation import plugin as device

KERNEL_OPTIONS = [n for n in OPTIONS if n not in ("rope", "global_keys", "decomposed_bias")]  # composed, or refused
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
MOST_TILES = 24  # of 32 x 32 scores, visited by one pass over a case


@pytest.fixture(autouse=True)
def order(request):
    """Threads, warps and blocks run in an order that the test's name decides."""
    device.set_order(sum(request.node.name.encode()))


def tiles(case) -> int:
    """How many score tiles one pass computes, about."""
    query, key = case.tensors["query"], case.tensors["key"]
    lengths = [(query.shape[2], key.shape[2])] * query.shape[0] if not case.packed else []
    if case.packed:
        ends = (case.options[f"cu_seqlens_{name}"].diff().tolist() for name in "qk")
        lengths = list(zip(*ends, strict=True))
    return query.shape[1] * sum(math.ceil(q / 32) * math.ceil(k / 32) for q, k in lengths)


def cheap_cases(count: int, **kind) -> list:
    """Drawn cases of few tiles."""
    cases, seed = [], 0
    while len(cases) < count:
        seed += 1
        case = draw(seed, torch.float32, options=KERNEL_OPTIONS, rate=0.35, **kind)
        if tiles(case) <= MOST_TILES:
            dtype = DTYPES[len(cases) % 3]
            cases.append(pytest.param(seed, dtype, id=f"{seed}-{str(dtype)[6:]}"))
    return cases


def compare(case):
    truth, naive = truth_and_naive(case)
    with unwritten_memory_is_nan():
        results = evaluate(case, on_backend("cuda", packed=case.packed))
    check(case, results, truth, naive, "cuda, emulated")


@pytest.mark.parametrize("seed, dtype", cheap_cases(90, small=True))
def test_random_small(seed, dtype):
    compare(draw(seed, dtype, small=True, options=KERNEL_OPTIONS, rate=0.35))


@pytest.mark.parametrize("seed, dtype", cheap_cases(24))
def test_random_dense(seed, dtype):
    compare(draw(seed, dtype, options=KERNEL_OPTIONS, rate=0.35))


@pytest.mark.parametrize("seed, dtype", cheap_cases(30, packed=True, small=True))
def test_random_packed(seed, dtype):
    compare(draw(seed, dtype, packed=True, small=True, options=KERNEL_OPTIONS, rate=0.35))


def run(query, key, value, **options):
    """Outputs and gradients of everything that requires grad, by the kernels, the exact formula and the naive one."""
    tensors = {"query": query, "key": key, "value": value}
    tensors |= {name: t for name, t in options.items() if isinstance(t, torch.Tensor) and t.is_floating_point()}
    options = {name: value for name, value in options.items() if name not in tensors}
    grad_out = torch.randn(*query.shape[:-1], value.shape[-1])
    grad_lse = torch.randn(query.shape[:-1])
    results = []
    for function, dtype in (
        (on_backend("cuda"), None),
        (reference.attention, torch.float64),
        (reference.attention, None),
    ):
        leaves = {n: t.detach().to(dtype or t.dtype).requires_grad_() for n, t in tensors.items()}
        out, lse = function(**leaves, **options, return_lse=True)
        loss = (out * grad_out.to(out)).sum() + (lse.masked_fill(lse.isinf(), 0) * grad_lse).sum()
        grads = torch.autograd.grad(loss, list(leaves.values()))
        results.append({"out": out, "lse": lse, **dict(zip(leaves, grads, strict=True))})
    for name in results[0]:
        check_close(*(result[name] for result in results), name, dtype=query.dtype)


def inputs(batch, heads, heads_kv, len_q, len_k, dim, dim_v=None, dtype=torch.float32):
    torch.manual_seed(0)
    shapes = (heads, len_q, dim), (heads_kv, len_k, dim), (heads_kv, len_k, dim_v or dim)
    return [torch.randn(batch, *shape).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dims", [(1, 1), (64, 64), (3, 200), (128, 128), (127, 96), (130, 5), (256, 256)], ids=str)
def test_head_dims(dims, dtype):
    """Every tile width of every kernel, several blocks of queries and of keys, with options and without."""
    query, key, value = inputs(1, 2, 1, 133, 70, *dims, dtype=dtype)
    run(query, key, value, causal=True)
    slopes = torch.rand(2) * 0.1
    run(query, key, value, alibi_slopes=slopes, mask=torch.randn(1, 2, 133, 70) * 0.5, window=(60, 20))


@pytest.mark.parametrize("broadcast", range(8))
def test_mask_gradient_over_broadcast_axes(broadcast):
    shape = [1 if broadcast >> axis & 1 else n for axis, n in enumerate((2, 2, 75))] + [48]
    run(*inputs(2, 2, 1, 75, 48, 8), mask=torch.randn(shape), causal=broadcast % 3 == 0)


@pytest.mark.parametrize("dim", [8, 72, 136])
def test_distance_gradient(dim):
    query, key, value = inputs(2, 2, 1, 70, 101, dim, dtype=torch.float16)
    bias = torch.randn(2, 170)
    leaves = [bias.clone().double().requires_grad_(), bias.clone().requires_grad_(), bias.clone().requires_grad_()]
    functions = [reference.attention, reference.attention, on_backend("cuda")]
    sides = []
    for leaf, function, dtype in zip(leaves, functions, (torch.float64, torch.float16, torch.float16), strict=True):
        tensors = (t.to(dtype) for t in (query, key, value))
        out = function(**dict(zip(("query", "key", "value"), tensors, strict=True)), window=(90, 80),
                       relative_bias=xformer_fast.DistanceBias(leaf))  # fmt: skip
        sides.append(torch.autograd.grad(out.square().sum(), leaf)[0])
    check_close(sides[2], sides[0], sides[1], dtype=torch.float16)


@pytest.mark.parametrize("window", [(0, 0), (5, 0), (40, 3), (-1, 2), (7, -1), (100, 100)], ids=str)
@pytest.mark.parametrize("causal", [False, True, "top_left"])
def test_windows(window, causal):
    run(*inputs(1, 1, 1, 140, 100, 8, dtype=torch.float16), window=window, causal=causal)


@pytest.mark.parametrize("p", [0.25, 0.75])
def test_dropout_bits_do_not_depend_on_the_tiling(p):
    """Value is the identity: the output is the weights themselves."""
    query, key, _ = inputs(2, 2, 2, 40, 45, 8)
    value = torch.eye(45).expand(2, 2, 45, 45)
    torch.manual_seed(1)
    out = xformer_fast.attention(query, key, value, dropout_p=p, backend="cuda")
    torch.manual_seed(1)
    kept = reference.dropout_mask(reference.draw_seed("cpu"), p, 2, 2, 40, 45)
    assert torch.equal(out != 0, kept)


def test_more_than_2_to_the_31_elements():
    """Rows 2^26 elements apart: offsets of the last rows do not fit 32 bits. Pages that nobody touches cost nothing."""
    rows, apart, dim = 40, 2**26, 8
    memory = torch.empty((rows - 1) * apart + 64, dtype=torch.float16)
    query, key, value = (
        memory.as_strided((1, 1, rows, dim), (0, 0, apart, 1), offset).copy_(torch.randn(1, 1, rows, dim))
        for offset in (0, 16, 32)
    )
    run(query, key, value, causal=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_in_every_order(dtype):
    attention = functools.partial(xformer_fast.attention, backend="cuda")
    tensors = [t.requires_grad_() for t in inputs(1, 4, 2, 133, 65, 16, dtype=dtype)]
    mask, slopes = torch.randn(1, 1, 133, 65, requires_grad=True), torch.rand(4, requires_grad=True)
    results = []
    for seed in range(4):
        device.set_order(seed)
        out = attention(*tensors, mask=mask, alibi_slopes=slopes, causal=True)
        results.append([out, *torch.autograd.grad(out.square().sum(), [*tensors, mask, slopes])])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matrix_loads_meet_no_bank_conflict(dtype):
    before = device.counts()
    for dim in (64, 128, 256):
        run(*inputs(1, 1, 1, 65, 65, dim, dtype=dtype))
    after = device.counts()
    assert after.matrix_loads > before.matrix_loads
    assert after.matrix_load_conflicts == before.matrix_load_conflicts


def test_runs_by_name_alone():
    text = xformer_fast.explain("attention", *inputs(1, 1, 1, 4, 6, 8))
    assert "cuda runs this call" not in text and "the emulation is for tests" in text


@pytest.mark.parametrize("name", ["global_keys", "decomposed_bias"])
def test_what_has_no_kernel_is_refused(name):
    query, key, value = inputs(1, 1, 1, 4, 6, 8)
    option = {"global_keys": 2, "decomposed_bias": (torch.randn(1, 1, 4, 2), torch.randn(1, 1, 4, 3))}[name]
    with pytest.raises(xformer_fast.BackendUnavailable, match=f"{name} is not in the CUDA kernels"):
        xformer_fast.attention(query, key, value, **{name: option}, backend="cuda")


def test_wrong_lengths_stay_in_memory():
    """Offsets and lengths past the tensors' rows, which only the CPU's operators refuse."""
    x = torch.randn(50, 2, 16)
    wrong = torch.tensor([0, 20, 900], dtype=torch.int32)
    operator = torch.ops.xformer_fast.attention_cuda
    lengths = torch.tensor([500, -3])
    out, lse, _ = operator(
        x, x, x, None, lengths, wrong, wrong, *[None] * 7, 900, 900, 0.25, 0.0, 0.0, 1, -1, -1, False, False
    )
    right = torch.tensor([0, 20, 50], dtype=torch.int32)
    expected = reference.varlen_attention(
        x, x, x, right, right, causal=True, scale=0.25, key_lengths=torch.tensor([20, 0])
    )
    torch.testing.assert_close(out, expected)
    assert lse[:, 20:].eq(-math.inf).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_least_numbers(dtype):
    check_rows_of_least_numbers("cuda", dtype)


def test_results_are_on_the_device_of_the_inputs():
    """Asked of the meta device: the emulated one is the CPU."""
    for like in (torch.empty(1, 2, 3, 4, device="meta"), torch.empty(1, 3, 2, 4, device="meta").transpose(1, 2)):
        for result in torch.ops.xformer_fast_emulation.results_like(like, 4):
            assert result.device.type == "meta"
