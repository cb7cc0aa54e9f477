"""Neighborhood attention: every instruction set against the formula in float64, the formula against loops."""

import itertools
import math

import pytest
import torch
from attention_cases import unwritten_memory_is_nan
from marks import needs_kernels
from neighborhood_cases import Case, check, draw, evaluate, on_backend, truth_and_naive

import xformer_fast
from xformer_fast import BackendUnavailable, build_info, dispatch, neighborhood_attention, reference
from xformer_fast.testing import check_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ISAS = build_info.usable_isa_levels() if dispatch.build_problem() is None else []


def agree(case: Case, monkeypatch):
    truth, naive = truth_and_naive(case)
    for isa in ISAS:
        monkeypatch.setenv("XFORMER_FAST_ISA", isa)
        with unwritten_memory_is_nan():
            results = evaluate(case, on_backend("cpu"))
        check(case, results, truth, naive, isa)


# ---- the kernel


@needs_kernels
@pytest.mark.parametrize("seed", range(120))
def test_random_calls(seed, monkeypatch):
    """The output and all gradients, on every instruction set."""
    agree(draw(seed, DTYPES[seed % 3]), monkeypatch)


def made(kernel, space, *, heads=2, heads_kv=2, dim=16, dtype=torch.float32, batch=1, table=True, **options) -> Case:
    torch.manual_seed(0)
    tensors = {"query": torch.randn(batch, *space, heads, dim)}
    tensors |= {n: torch.randn(batch, *space, heads_kv, dim) for n in ("key", "value")}
    if table:
        tensors["relative_bias_table"] = torch.randn(math.prod(2 * k - 1 for k in kernel), heads)
    tensors = {n: t.to(dtype) for n, t in tensors.items()}
    return Case("made", dtype, tensors, kernel, torch.randn(batch, *space, heads, dim).to(dtype), options)


@needs_kernels
@pytest.mark.parametrize(
    "case",
    [
        made((301,), (700,), heads_kv=1),  # cut along the sequence, tiles of several vectors
        made((5, 9), (26, 3 * 13), dilation=(1, 3)),  # cut into strips, groups of unequal length
        made((7, 7), (7, 7)),  # all of the map: full attention
        made((3, 4, 5), (5, 6, 11), causal=(True, False, True), batch=2),
        made((2, 3), (64, 6), heads_kv=1),  # tiles wider than the map
    ],
    ids=lambda case: f"{case.kernel} of {tuple(case.grad.shape[1:-2])}",
)
def test_cuts(case, monkeypatch):
    agree(case, monkeypatch)


@needs_kernels
def test_results_do_not_depend_on_threads():
    case = made((7, 7), (40, 44), heads=4, dim=32)
    results, threads = [], torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(evaluate(case, on_backend("cpu")))
    torch.set_num_threads(threads)
    for name, first in results[0].items():
        assert all(torch.equal(first, other[name]) for other in results[1:]), name


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_kernels)])
def test_a_query_whose_bias_is_minus_infinity_everywhere_gives_zeros(backend):
    case = made((3,), (8,), causal=True)
    case.tensors["relative_bias_table"][2, 0] = -math.inf  # its own key: all that the first query has
    results = evaluate(case, on_backend(backend))
    assert not results["out"][0, 0, 0].any() and not results["grad_query"][0, 0, 0].any()
    assert all(r.isfinite().all() for r in results.values())


@needs_kernels
def test_empty_batch():
    shapes = [(0, 4, 4, 2, 8)] * 3 + [(25, 2)]
    leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
    out = neighborhood_attention(*leaves[:3], 3, relative_bias_table=leaves[3], backend="cpu")
    assert out.shape == (0, 4, 4, 2, 8)
    assert not torch.autograd.grad(out.sum(), leaves)[3].any()


@needs_kernels
def test_memory_order_is_query_s():
    q, k, v = (torch.randn(2, 3, 8, 12, 16).movedim(1, -2) for _ in range(3))
    assert neighborhood_attention(q, k, v, 3, backend="cpu").stride() == q.stride()
    packed = torch.randn(2, 8, 12, 3, 3, 16)
    assert neighborhood_attention(*packed.unbind(3), 3, backend="cpu").is_contiguous()


@needs_kernels
def test_what_no_query_of_a_place_sees_does_not_reach_it():
    """NaN in a key is seen by its neighbours alone; values that are NaN may spread over a tile, as under any mask."""
    q, k, v = torch.randn(3, 1, 30, 1, 8).unbind(0)
    clean = neighborhood_attention(q, k, v, 5, backend="cpu")
    k[0, 20] = math.nan
    out = neighborhood_attention(q, k, v, 5, backend="cpu")
    assert torch.equal(out[0, :18], clean[0, :18]) and torch.equal(out[0, 23:], clean[0, 23:])
    assert out[0, 18:23].isnan().all()


# ---- the formula


def by_loops(q, k, v, kernel, dilation, causal, table):
    """Of one batch and head: every query on its own."""
    space = q.shape[:-1]
    out = torch.empty(*space, v.shape[-1], dtype=q.dtype)
    for place in itertools.product(*map(range, space)):
        axes, indices = [], []
        for i, n, size, step, forward_only in zip(place, space, kernel, dilation, causal, strict=True):
            group = list(range(i % step, n, step))
            own = group.index(i)
            if forward_only:
                seen = group[max(0, own - size + 1) : own + 1]
            else:
                first = own - size // 2
                while first < 0:
                    first += 1
                while first + size > len(group):
                    first -= 1
                seen = group[first : first + size]
            axes.append(seen)
            indices.append([(j - i) // step + size - 1 for j in seen])
        keys = list(itertools.product(*axes))
        scores = torch.stack([(q[place] * k[key]).sum() for key in keys]) / math.sqrt(q.shape[-1])
        if table is not None:
            shape = [2 * size - 1 for size in kernel]
            scores = scores + torch.stack([table.view(shape)[index] for index in itertools.product(*indices)])
        out[place] = (scores.softmax(0)[:, None] * torch.stack([v[key] for key in keys])).sum(0)
    return out


@pytest.mark.parametrize(
    "space, kernel, dilation, causal",
    [
        ((9,), (4,), (1,), (False,)),
        ((9,), (3,), (3,), (False,)),
        ((11,), (4,), (2,), (True,)),
        ((5, 6), (3, 3), (1, 2), (False, False)),
        ((5, 4), (2, 3), (2, 1), (True, False)),
        ((3, 4, 5), (3, 2, 2), (1, 2, 2), (False, True, False)),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_kernels)])
def test_formula_is_what_every_query_sees(space, kernel, dilation, causal, backend):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, *space, 4, dtype=torch.float64).unbind(0)
    table = torch.randn(math.prod(2 * size - 1 for size in kernel), dtype=torch.float64)
    for bias in (None, table):
        expected = by_loops(q, k, v, kernel, dilation, causal, bias)
        dtype = torch.float64 if backend == "reference" else torch.float32
        arguments = (x[None, ..., None, :].to(dtype) for x in (q, k, v))
        bias = None if bias is None else bias[:, None].to(dtype)
        options = {"dilation": dilation, "causal": causal, "relative_bias_table": bias, "backend": backend}
        out = neighborhood_attention(*arguments, kernel, **options)[0, ..., 0, :]
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6 if backend == "cpu" else 1e-12)


def test_one_causal_axis_is_a_sliding_window():
    q, k, v = torch.randn(3, 2, 20, 4, 8, dtype=torch.float64).unbind(0)
    windowed = reference.attention(*(x.transpose(1, 2) for x in (q, k, v)), causal=True, window=(4, 0)).transpose(1, 2)
    torch.testing.assert_close(neighborhood_attention(q, k, v, 5, causal=True), windowed)


def test_the_whole_map_with_swin_s_table_is_a_window():
    q, k, v = torch.randn(3, 1, 4, 5, 2, 8, dtype=torch.float64).unbind(0)
    table = torch.randn(7 * 9, 2, dtype=torch.float64)
    window = xformer_fast.window_attention(q, k, v, (4, 5), relative_bias_table=table)
    torch.testing.assert_close(neighborhood_attention(q, k, v, (4, 5), relative_bias_table=table.flip(0)), window)


# ---- what torch expects


def example(**extra):
    torch.manual_seed(3)
    tensors = {"query": torch.randn(2, 4, 8, 4, 16), "key": torch.randn(2, 4, 8, 2, 16)}
    tensors |= {"value": torch.randn(2, 4, 8, 2, 8), "relative_bias_table": torch.randn(25, 4)}
    return {n: t.requires_grad_() for n, t in tensors.items()} | {"kernel_size": 3} | extra


def tensors_of(inputs) -> list[torch.Tensor]:
    return [t for t in inputs.values() if isinstance(t, torch.Tensor)]


@needs_kernels
def test_opcheck():
    inputs = [t.detach() for t in tensors_of(example())]
    options = ([3, 3], [1, 2], [0, 1], 0.3)
    leaves = [t.clone().requires_grad_() for t in inputs]
    torch.library.opcheck(torch.ops.xformer_fast.neighborhood_attention_cpu.default, (*leaves, *options))
    backward = torch.ops.xformer_fast.neighborhood_attention_cpu_backward.default
    torch.library.opcheck(backward, (torch.randn(2, 4, 8, 4, 8), *inputs, *options, True))


@needs_kernels
def test_compile_once_for_all_maps():
    torch._dynamo.reset()

    def run(query, key, value, table):
        return neighborhood_attention(query, key, value, 3, dilation=(2, 1), relative_bias_table=table)

    function = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, *space in ((3, 7, 9), (4, 12, 10), (5, 20, 33)):
            leaves = [torch.randn(batch, *space, 2, 16, requires_grad=True) for _ in range(3)]
            leaves.append(torch.randn(25, 2, requires_grad=True))
            results = []
            for each in (function, run):
                out = each(*leaves)
                results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
            for ours, theirs in zip(*results, strict=True):
                torch.testing.assert_close(ours, theirs)


@needs_kernels
def test_double_backward():
    results = []
    for backend, dtype in (("cpu", torch.float32), ("reference", torch.float64), ("reference", torch.float32)):
        inputs = example(causal=(False, True), backend=backend)
        inputs |= {n: t.detach().to(dtype).requires_grad_() for n, t in inputs.items() if isinstance(t, torch.Tensor)}
        leaves = tensors_of(inputs)
        out = neighborhood_attention(**inputs)
        first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    for ours, exact, naive in zip(*results, strict=True):
        check_close(ours, exact, naive)


@needs_kernels
def test_torch_func_autocast_and_forward_ad():
    q, k, v = torch.randn(3, 2, 4, 4, 1, 8).unbind(0)
    grad = torch.func.grad(lambda q: neighborhood_attention(q, k, v, 3, backend="cpu").sum())(q)
    expected = torch.func.grad(lambda q: neighborhood_attention(q, k, v, 3, backend="reference").sum())(q)
    torch.testing.assert_close(grad, expected, atol=1e-5, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert neighborhood_attention(q, k, v, 3).dtype == torch.bfloat16
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, q)
        with pytest.raises(NotImplementedError, match="forward-mode"):
            neighborhood_attention(dual, k, v, 3, backend="cpu")


@needs_kernels
def test_an_unwanted_table_gradient_is_not_computed():
    inputs = example()
    inputs["relative_bias_table"] = inputs["relative_bias_table"].detach()
    out = neighborhood_attention(**inputs)
    names = []

    class Names(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append((function._schema.name.split("::")[1], args[-1] if args else None))
            return function(*args, **(kwargs or {}))

    with Names():
        torch.autograd.grad(out, inputs["query"], torch.ones_like(out))
    assert ("neighborhood_attention_cpu_backward", False) in names


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"kernel_size": 5}, ValueError, r"must not exceed the map's sides \(4, 8\)"),
        ({"kernel_size": 3, "dilation": (2, 1)}, ValueError, "kernel_size \\* dilation"),
        ({"kernel_size": (3, 3, 3)}, ValueError, "kernel_size must be an int or 2"),
        ({"kernel_size": 3.0}, TypeError, "kernel_size"),
        ({"kernel_size": 0}, ValueError, "kernel_size must be at least 1"),
        ({"dilation": 0}, ValueError, "dilation must be at least 1"),
        ({"dilation": (1,)}, ValueError, "dilation must be an int or 2"),
        ({"causal": "top_left"}, ValueError, "causal must be True or False"),
        ({"causal": (True,)}, ValueError, "causal must be True or False, or 2"),
        ({"scale": math.inf}, ValueError, "scale must be finite"),
        ({"relative_bias_table": torch.zeros(25, 2)}, ValueError, "relative_bias_table must have shape"),
        ({"relative_bias_table": torch.zeros(9, 4)}, ValueError, "relative_bias_table must have shape"),
        ({"key": torch.zeros(2, 4, 8, 3, 16), "value": torch.zeros(2, 4, 8, 3, 8)}, ValueError, "must divide"),
        ({"key": torch.zeros(2, 4, 4, 2, 16)}, ValueError, "key must be"),
        ({"key": torch.zeros(2, 4, 8, 2, 8)}, ValueError, "key has head_dim"),
        ({"value": torch.zeros(2, 4, 8, 4, 8)}, ValueError, "value has 2 heads|value has 4 heads"),
        ({"value": torch.zeros(2, 4, 8, 2, 8).half()}, TypeError, "value is"),
        ({"query": torch.zeros(2, 4, 16)}, ValueError, "one to three axes"),
        ({"query": [1.0]}, TypeError, "query must be a torch.Tensor"),
        ({"backend": "tpu"}, ValueError, "backend must be one of"),
    ],
    ids=lambda x: str(x) if isinstance(x, str) else None,
)
def test_errors(change, error, message):
    with pytest.raises(error, match=message):
        neighborhood_attention(**example() | change)


def test_backends():
    inputs = {n: t.detach().double() if isinstance(t, torch.Tensor) else t for n, t in example().items()}
    assert "neighborhood_attention: reference runs" in xformer_fast.explain("neighborhood_attention", **inputs)
    with pytest.raises(BackendUnavailable, match="float64"):
        neighborhood_attention(**inputs, backend="cpu")
