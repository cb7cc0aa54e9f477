"""The Triton kernels of windowed attention in Triton's interpreter, on the CPU: TRITON_INTERPRET=1 pytest this file."""

import math
import os

import pytest
import torch
from attention_cases import unwritten_memory_is_nan
from window_cases import Case, compare, draw, evaluate, on_backend

import xformer_fast

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("TRITON_INTERPRET=1 is not set", allow_module_level=True)

MOST_TILES = 6  # of 16-bit 64 x 64 or float32 32 x 32 scores, over the windows and heads of a case
LARGE = (3, 11)  # tokens that do not fit one tile in float32


def tiles(case: Case) -> int:
    batch, *space, heads, _ = case.tensors["query"].shape
    tokens, block = math.prod(case.window), 32 if case.dtype == torch.float32 else 64
    return batch * heads * math.prod(space) // tokens * math.ceil(tokens / block) ** 2


def cheap_cases(count: int) -> list:
    """Drawn cases of few tiles."""
    cases, seed = [], 0
    while len(cases) < count:
        seed += 1
        dtype = torch.float16 if len(cases) % 3 == 2 else torch.float32
        if tiles(draw(seed, dtype)) <= MOST_TILES:
            cases.append(pytest.param(seed, dtype, id=f"{seed}-{str(dtype)[6:]}"))
    return cases


def check(case: Case):
    with unwritten_memory_is_nan():
        results = evaluate(case, on_backend("triton"))
    compare(case, results, "triton, interpreted")


@pytest.mark.parametrize("seed, dtype", cheap_cases(200))
def test_random_calls(seed, dtype):
    check(draw(seed, dtype))


def make(window, counts, heads=2, dims=(8, 8), batch=1, dtype=torch.float32, terms=("table",), **options) -> Case:
    torch.manual_seed(0)
    space = [w * n for w, n in zip(window, counts, strict=True)]
    tokens, dim, dim_v = math.prod(window), *dims
    tensors = {n: torch.randn(batch, *space, heads, d).to(dtype) for n, d in (("query", dim), ("key", dim))}
    tensors["value"] = torch.randn(batch, *space, heads, dim_v).to(dtype)
    if "table" in terms:
        tensors["relative_bias_table"] = torch.randn(math.prod(2 * w - 1 for w in window), heads)
    if "bias" in terms:
        tensors["bias"] = torch.randn(heads, tokens, tokens)
    if "logit_scale" in terms:
        tensors["logit_scale"] = torch.rand(heads) * 10 + 1
    return Case("made", dtype, tensors, window, torch.randn(batch, *space, heads, dim_v).to(dtype), options)


@pytest.mark.parametrize(
    "window, shift, dtype, terms",
    [
        ((4, 4), (2, 1), torch.float32, ("table", "bias", "logit_scale")),
        ((7, 7), (3, 3), torch.float16, ("table",)),
        ((8, 8), (4, 0), torch.float16, ("bias", "logit_scale")),
        (LARGE, (0, 5), torch.float32, ("table", "bias", "logit_scale")),
        ((2, 6, 6), (1, 3, 2), torch.float16, ("table", "logit_scale")),
    ],
    ids=str,
)
def test_shifted_windows(window, shift, dtype, terms):
    """Windows that a tile holds, one that fills it, and two that span tiles."""
    counts = (1,) * (len(window) - 2) + (1, 2)
    check(make(window, counts, heads=1, dtype=dtype, terms=terms, shift=shift))


@pytest.mark.parametrize("window", [(3, 3), LARGE], ids=str)
@pytest.mark.parametrize("dims", [(1, 1), (3, 70), (130, 5), (96, 96), (256, 256)], ids=str)
def test_head_dims(dims, window):
    """Head dims of several pieces, of a window in one tile and in several."""
    terms = ("bias", "logit_scale") if dims[0] > 3 else ()  # the cosines of one channel are constant
    check(make(window, (1, 1), heads=1, dims=dims, terms=terms))


def test_runs_of_windows(monkeypatch):
    """More windows than programs: each takes a run, across rows of windows and maps, and the last one a shorter one."""
    from xformer_fast.kernels import window_tiles

    monkeypatch.setattr(window_tiles, "PROGRAMS", 4)
    check(make((2, 2), (3, 1), batch=3, heads=2, dims=(5, 5), terms=("table", "logit_scale"), shift=1))
    monkeypatch.setattr(window_tiles, "PROGRAMS", 3)
    check(make(LARGE, (1, 2), batch=3, heads=1, dims=(5, 5), terms=("table", "logit_scale"), shift=(0, 2)))


@pytest.mark.parametrize("window", [(2, 2), (9, 9)], ids=str)
def test_rows_far_apart(window):
    """A map of more than 2^31 elements: offsets do not fit 32 bits. Pages that nobody touches cost nothing."""
    case = make(window, (2, 1), heads=1, dtype=torch.float16, shift=1)
    height, apart = 2 * window[0], 2**31 // (2 * window[0] - 1) // 64 * 64 + 64
    memory = torch.empty((height - 1) * apart + 64 * window[1], dtype=torch.float16)
    for i, name in enumerate(("query", "key", "value")):
        tensor = case.tensors[name]
        case.tensors[name] = memory.as_strided(tensor.shape, (0, apart, 64, 8, 1), 8 * i).copy_(tensor)
    check(case)


@pytest.mark.parametrize("window", [(4, 4), LARGE], ids=str)
def test_zero_rows_of_cosine_attention(window):
    case = make(window, (1, 1), terms=("logit_scale",))
    case.tensors["query"][0, 1, 2] = 0
    case.tensors["key"][0, 0, 3] = 0
    case.tensors["logit_scale"][0] = 0
    check(case)


@pytest.mark.parametrize("shape", [(0, 4, 4, 2, 8), (2, 0, 4, 2, 8)], ids=str)
def test_empty_maps(shape):
    leaves = [torch.randn(shape, requires_grad=True) for _ in range(3)] + [torch.randn(49, 2, requires_grad=True)]
    out = xformer_fast.window_attention(*leaves[:3], 4, relative_bias_table=leaves[3], backend="triton")
    assert out.shape == shape
    assert not torch.autograd.grad(out.sum(), leaves)[3].any()


def test_opcheck():
    case = make((4, 4), (1, 2), terms=("table", "bias", "logit_scale"))
    options = ([4, 4], [1, 2], False, 0.3)
    leaves = [t.requires_grad_() for t in case.tensors.values()]
    torch.library.opcheck(torch.ops.xformer_fast.window_attention_triton.default, (*leaves, *options))
    inputs = [t.detach() for t in leaves]
    backward = torch.ops.xformer_fast.window_attention_triton_backward.default
    torch.library.opcheck(backward, (case.grad, *inputs, *options, True, True, True))


@pytest.mark.parametrize("window", [(4, 4), LARGE], ids=str)
def test_the_same_call_gives_the_same_bits(window):
    case = make(window, (1, 2), terms=("table", "bias", "logit_scale"))
    first, second = (evaluate(case, on_backend("triton")) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
