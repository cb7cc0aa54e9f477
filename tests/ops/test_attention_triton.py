"""The Triton kernels of softmax attention in Triton's interpreter, on the CPU: TRITON_INTERPRET=1 pytest <this file>.

The interpreter runs every operation of every program in numpy: shapes are small, and bfloat16, which it holds as
integers, is left to a GPU, as is the rounding of the matrix units.
"""

import functools
import math
import os

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
from xformer_fast import reference
from xformer_fast.testing import check_close

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("TRITON_INTERPRET=1 is not set", allow_module_level=True)

KERNEL_OPTIONS = [name for name in OPTIONS if name != "rope"]  # composed outside
MOST_TILES = 8  # visited by one pass over a case


def tiles(case) -> int:
    """How many score tiles one pass computes, about."""
    query, key = case.tensors["query"], case.tensors["key"]
    lengths = [(query.shape[2], key.shape[2])] * query.shape[0] if not case.packed else []
    if case.packed:
        ends = (case.options[f"cu_seqlens_{name}"].diff().tolist() for name in "qk")
        lengths = list(zip(*ends, strict=True))
    return query.shape[1] * sum(math.ceil(q / 32) * math.ceil(k / 16) for q, k in lengths)


def cheap_cases(count: int, packed: bool) -> list:
    """Drawn cases of few tiles."""
    cases, seed = [], 0
    while len(cases) < count:
        seed += 1
        case = draw(seed, torch.float32, packed=packed, small=True, options=KERNEL_OPTIONS, rate=0.4)
        if tiles(case) <= MOST_TILES:
            dtype = torch.float16 if len(cases) % 2 == 0 else torch.float32
            cases.append(pytest.param(seed, dtype, id=f"{seed}-{str(dtype)[6:]}"))
    return cases


def compare(case):
    truth, naive = truth_and_naive(case)
    with unwritten_memory_is_nan():
        results = evaluate(case, on_backend("triton", packed=case.packed))
    check(case, results, truth, naive, "triton, interpreted")


@pytest.mark.parametrize("seed, dtype", cheap_cases(48, packed=False))
def test_random_dense(seed, dtype):
    compare(draw(seed, dtype, small=True, options=KERNEL_OPTIONS, rate=0.4))


@pytest.mark.parametrize("seed, dtype", cheap_cases(16, packed=True))
def test_random_packed(seed, dtype):
    compare(draw(seed, dtype, packed=True, small=True, options=KERNEL_OPTIONS, rate=0.4))


def run(query, key, value, **options):
    """Outputs and gradients of everything that requires grad, by Triton, the exact formula and the naive one."""
    tensors = {"query": query, "key": key, "value": value}
    tensors |= {name: t for name, t in options.items() if isinstance(t, torch.Tensor) and t.is_floating_point()}
    options = {name: value for name, value in options.items() if name not in tensors}
    grad_out = torch.randn(*query.shape[:-1], value.shape[-1])
    grad_lse = torch.randn(query.shape[:-1])
    results = []
    for function, dtype in (
        (on_backend("triton"), None),
        (reference.attention, torch.float64),
        (reference.attention, None),
    ):
        leaves = {n: t.detach().to(dtype or t.dtype).requires_grad_() for n, t in tensors.items()}
        arguments = {**leaves, **options}
        if "rel_h" in leaves:
            arguments["decomposed_bias"] = arguments.pop("rel_h"), arguments.pop("rel_w")
        torch.manual_seed(0)
        out, lse = function(**arguments, return_lse=True)
        loss = (out * grad_out).sum() + (lse.masked_fill(lse.isinf(), 0) * grad_lse).sum()
        grads = torch.autograd.grad(loss, list(leaves.values()))
        results.append({"out": out, "lse": lse, **dict(zip(leaves, grads, strict=True))})
    for name in results[0]:
        check_close(*(result[name] for result in results), name, dtype=query.dtype)


def inputs(batch, heads, heads_kv, len_q, len_k, dim, dim_v=None):
    torch.manual_seed(0)
    shapes = (heads, len_q, dim), (heads_kv, len_k, dim), (heads_kv, len_k, dim_v or dim)
    return [torch.randn(batch, *shape) for shape in shapes]


@pytest.mark.parametrize("broadcast", range(16))
def test_mask_gradient_over_broadcast_axes(broadcast):
    shape = [1 if broadcast >> axis & 1 else n for axis, n in enumerate((2, 2, 35, 18))]
    run(*inputs(2, 2, 1, 35, 18, 8), mask=torch.randn(shape), causal=broadcast % 3 == 0)


@pytest.mark.parametrize("dims", [(1, 1), (3, 200), (130, 5), (256, 256)], ids=str)
def test_head_dims(dims):
    run(*inputs(1, 2, 1, 19, 40, *dims), causal=True)


@pytest.mark.parametrize("window", [(0, 0), (5, 0), (40, 3), (-1, 2), (7, -1), (100, 100)], ids=str)
@pytest.mark.parametrize("causal", [False, True, "top_left"])
def test_windows(window, causal):
    run(*inputs(1, 1, 1, 70, 50, 8), window=window, causal=causal)


@pytest.mark.parametrize("window", [(3, 3), (0, 0), (9, 0), (-1, 2), (20, -1)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_global_keys(window, causal, monkeypatch):
    """Two blocks of them, and several shares of the queries."""
    monkeypatch.setattr("xformer_fast.kernels.attention_backward.GLOBAL_SHARE", 32)
    keys = torch.tensor([[*range(12), 49, 20, 20, 3, -1, 30, 33, 34], [5, *[-1] * 19]])
    run(*inputs(2, 2, 1, 70, 50, 8), window=window, causal=causal, global_keys=keys)


@pytest.mark.parametrize("learned", ["mask", "alibi_slopes"])
def test_global_keys_beside_a_learned_bias(learned):
    """Biases gather from global keys outside the window too."""
    bias = {"mask": torch.randn(1, 1, 1, 90), "alibi_slopes": torch.rand(2)}[learned]
    keys = torch.tensor([2, 70, 40])
    run(*inputs(1, 2, 1, 40, 90, 8), window=(4, 4), global_keys=keys, dropout_p=0.2, **{learned: bias})


@pytest.mark.parametrize("shape", [(3, 5), (2, 23), (1, 40), (40, 1)], ids=str)
@pytest.mark.parametrize(
    "beside", [{}, {"window": (5, 5), "global_keys": torch.tensor([1, 33])}], ids=["alone", "window"]
)
def test_decomposed_bias(shape, beside):
    """Maps narrower and wider than a tile of keys."""
    rows, columns = shape
    tensors = inputs(1, 2, 1, 35, rows * columns, 8)
    bias = {"rel_h": torch.randn(1, 2, 35, rows), "rel_w": torch.randn(1, 2, 35, columns)}
    run(*tensors, **bias, **{n: v % (rows * columns) if n == "global_keys" else v for n, v in beside.items()})


@pytest.mark.parametrize("p", [0.25, 0.75])
def test_dropout_bits_do_not_depend_on_the_tiling(p):
    """Value is the identity: the output is the weights themselves."""
    query, key, _ = inputs(2, 2, 2, 40, 45, 8)
    value = torch.eye(45).expand(2, 2, 45, 45)
    torch.manual_seed(1)
    out = xformer_fast.attention(query, key, value, dropout_p=p, backend="triton")
    torch.manual_seed(1)
    kept = reference.dropout_mask(reference.draw_seed("cpu"), p, 2, 2, 40, 45)
    assert torch.equal(out != 0, kept)


def test_wide_float32_rows_are_multiplied_in_pieces(monkeypatch):
    """A matrix unit truncates within one product: no product of attention sums more than 64 terms, but for the
    gradients of masks and biases, whose kernels spill where they are cut."""
    from triton.runtime.interpreter import InterpreterBuilder

    terms, create_dot = set(), InterpreterBuilder.create_dot

    def recorded(self, a, b, *rest):
        terms.add(a.data.shape[1])
        return create_dot(self, a, b, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", recorded)
    run(*inputs(1, 1, 1, 33, 33, 200), causal=True)
    query, key, value = inputs(1, 2, 1, 3, 33, 256)
    ours, exact = (
        xformer_fast.decode_attention(query, key, value, torch.tensor([33]), backend=backend)
        for backend in ("triton", "reference")
    )
    check_close(ours, exact, exact)
    tensors = [torch.randn(1, 9, 1, 160, requires_grad=True) for _ in range(3)]
    out = xformer_fast.neighborhood_attention(*tensors, 3, backend="triton")
    torch.autograd.grad(out.square().sum(), tensors)
    assert max(terms) <= 64


def test_more_than_2_to_the_31_elements():
    """Rows 2^26 elements apart: offsets of the last rows do not fit 32 bits. Pages that nobody touches cost nothing."""
    rows, apart, dim = 40, 2**26, 8
    memory = torch.empty((rows - 1) * apart + 64, dtype=torch.float16)
    query, key, value = (
        memory.as_strided((1, 1, rows, dim), (0, 0, apart, 1), offset).copy_(torch.randn(1, 1, rows, dim))
        for offset in (0, 16, 32)
    )
    run(query, key, value, causal=True)


def test_the_same_call_gives_the_same_bits():
    attention = functools.partial(xformer_fast.attention, backend="triton")
    tensors = [t.requires_grad_() for t in inputs(1, 2, 1, 33, 33, 8)]
    mask = torch.randn(1, 1, 33, 33, requires_grad=True)
    first, second = (
        torch.autograd.grad(attention(*tensors, mask=mask).square().sum(), [*tensors, mask]) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_of_least_numbers(dtype):
    check_rows_of_least_numbers("triton", dtype)
