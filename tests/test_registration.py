"""The operators as torch sees them: opcheck, compile, autocast, double backward, transforms, number of crossings."""

import functools

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from attention_cases import arguments, draw, evaluate, formula
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import xformer_fast
from xformer_fast import dispatch, ops, reference

pytestmark = pytest.mark.skipif(dispatch.build_problem() is not None, reason=str(dispatch.build_problem()))


class Recorder(TorchDispatchMode):
    """The xformer_fast operators that run inside, with their arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "xformer_fast":
            self.calls.append((function, args))
        return function(*args, **(kwargs or {}))

    def names(self):
        return [function._schema.name.split("::")[1] for function, _ in self.calls]


def recorded(run) -> list:
    with Recorder() as recorder:
        run()
    return recorder.calls


def ran(profile) -> set[str]:
    """The xformer_fast operators of a profile, which unlike a dispatch mode changes nothing about a call."""
    keys = (event.key.split("::") for event in profile.key_averages())
    return {key[1] for key in keys if key[0] == "xformer_fast" and len(key) == 2}


CASES = {
    "plain": dict(seed=1, options=[]),
    "masked": dict(seed=4, options=["mask", "causal", "window", "key_lengths", "alibi_slopes", "return_lse"], rate=1.0),
    "sinks": dict(seed=9, options=["sinks", "softcap", "dropout_p", "scale", "alibi_slopes"], rate=1.0),
    "half": dict(seed=2, options=["causal", "mask", "aux_grad"], rate=1.0, dtype=torch.bfloat16),
    "globals": dict(seed=5, options=["window", "global_keys", "causal", "return_lse"], rate=1.0),
    "decomposed": dict(seed=7, options=["decomposed_bias", "key_lengths", "window", "global_keys"], rate=1.0),
    "packed": dict(seed=3, options=["causal", "return_lse"], rate=1.0, packed=True),
    "packed_options": dict(seed=6, options=["alibi_slopes", "sinks", "key_lengths", "window"], rate=1.0, packed=True),
}


def make(name):
    return draw(**{"dtype": torch.float32, "small": True, **CASES[name]})


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name):
    case = make(name)
    public = xformer_fast.varlen_attention if case.packed else xformer_fast.attention
    calls = recorded(lambda: evaluate(case, lambda **k: public(**k, backend="cpu")))
    assert len(calls) == 2
    for operator, args in calls:
        inputs = [
            a.detach().clone().requires_grad_(a.is_floating_point()) if isinstance(a, torch.Tensor) else a for a in args
        ]
        if "backward" in operator._schema.name:
            inputs = [a.detach() if isinstance(a, torch.Tensor) else a for a in inputs]
        torch.library.opcheck(operator, tuple(inputs))


@pytest.mark.parametrize("name", CASES)
def test_one_operator_a_direction(name):
    case = make(name)
    public = xformer_fast.varlen_attention if case.packed else xformer_fast.attention
    with Recorder() as recorder:
        evaluate(case, public)
    assert recorder.names() == ["attention_cpu", "attention_cpu_backward"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True, "top_left"])
@pytest.mark.parametrize("lengths", [(9, 21), (1, 40), (0, 7), (7, 0)], ids=str)
def test_plain_operators_have_the_same_bits(lengths, causal, dtype):
    """A window without limits says nothing, but takes the operator of all options."""
    (len_q, len_k), results = lengths, []
    q, k, v = torch.randn(2, 4, len_q, 24), torch.randn(2, 2, len_k, 24), torch.randn(2, len_k, 2, 40).transpose(1, 2)
    leaves = [t.to(dtype).requires_grad_() for t in (q, k, v)]
    for window, operator in ((None, "attention_cpu_plain"), ((-1, -1), "attention_cpu")):
        with torch.profiler.profile() as profile:
            out, lse = xformer_fast.attention(*leaves, causal=causal, window=window, scale=0.3, return_lse=True)
            weights = torch.linspace(-1, 1, out.numel()).view_as(out).to(dtype), torch.ones_like(lse)
            grads = torch.autograd.grad((out, lse), leaves, weights)
        assert ran(profile) == {operator, f"{operator}_backward"}
        with torch.no_grad():
            assert torch.equal(out, xformer_fast.attention(*leaves, causal=causal, window=window, scale=0.3))
        results.append((out, lse, *grads))
    for plain, general in zip(*results, strict=True):
        assert torch.equal(plain, general) and plain.stride() == general.stride()


def test_batched_gradients():
    """vmap over a backward whose forward knew nothing of it."""
    q, k, v = (torch.randn(1, 2, 6, 4, requires_grad=True) for _ in range(3))
    out = xformer_fast.attention(q, k, v, causal=True)
    weights = torch.randn(3, *out.shape)
    batched = torch.autograd.grad(out, (q, k, v), weights, is_grads_batched=True, retain_graph=True)
    singly = zip(*(torch.autograd.grad(out, (q, k, v), w, retain_graph=True) for w in weights), strict=True)
    for ours, expected in zip(batched, singly, strict=True):
        torch.testing.assert_close(ours, torch.stack(expected))


def test_a_call_crosses_little_else():
    """No hidden copies: a plain call is the operator alone, forward and backward."""
    names = []

    class All(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(function._schema.name)
            return function(*args, **(kwargs or {}))

    q = torch.randn(1, 2, 8, 16, requires_grad=True)
    with All():
        out = xformer_fast.attention(q, q.detach(), q.detach(), causal=True)
        torch.autograd.grad(out, q, torch.ones(1, 2, 8, 16))
    ours = [n for n in names if n.split("::")[1] not in ("detach", "ones", "view", "alias")]
    assert ours == ["xformer_fast::attention_cpu", "xformer_fast::attention_cpu_backward"]


def test_an_unwatched_call_without_options_takes_the_plain_operators():
    q = torch.randn(1, 2, 8, 16, requires_grad=True)
    with torch.profiler.profile() as profile:
        torch.autograd.grad(xformer_fast.attention(q, q, q, causal=True).sum(), q)
    assert ran(profile) == {"attention_cpu_plain", "attention_cpu_plain_backward"}


@pytest.mark.parametrize("wrong, error", [
    ({"dropout_p": False}, TypeError), ({"scale": float("nan")}, ValueError), ({"scale": True}, TypeError),
    ({"causal": "sideways"}, ValueError), ({"causal": 1}, ValueError), ({"query": [1.0]}, TypeError),
    ({"key": torch.zeros(1, 2, 8, 15)}, ValueError), ({"value": torch.zeros(1, 2, 7, 16)}, ValueError),
    ({"key": torch.zeros(1, 2, 8, 16).double()}, TypeError),
    ({"value": torch.zeros(1, 2, 8, 16, device="meta")}, ValueError),
    ({"backend": "triton"}, xformer_fast.BackendUnavailable), ({"scale": 1e300}, ValueError),
])  # fmt: skip
def test_a_call_is_checked_though_one_like_it_passed(wrong, error):
    right = dict.fromkeys(("query", "key", "value"), torch.randn(1, 2, 8, 16))
    for _ in range(2):
        xformer_fast.attention(**right)
    with pytest.raises(error):
        xformer_fast.attention(**right | wrong)


def unused(*args, **kwargs):
    raise AssertionError("not to be called")


def test_a_call_like_one_that_passed_is_not_checked_again(monkeypatch):
    """One that named its backend has not passed for those that do not."""
    monkeypatch.setattr(ops.attention, "_PASSED", {})
    q, x = torch.randn(1, 2, 8, 16), torch.randn(1, 2, 9, 16)
    out = xformer_fast.attention(q, q, q, causal=True)
    xformer_fast.attention(x, x, x, backend="cpu")
    monkeypatch.setattr(ops.attention, "_dense_call", unused)
    assert torch.equal(xformer_fast.attention(q, q, q, causal=True, dropout_p=0), out)
    with pytest.raises(AssertionError, match="not to be called"):
        xformer_fast.attention(x, x, x)


def test_a_call_is_watched_though_one_like_it_was_not(monkeypatch):
    """What passed unwatched does not pass by autocast, tracing, transforms, forward-mode AD, or the environment."""
    q = torch.randn(1, 2, 8, 16)
    out = xformer_fast.attention(q, q, q)
    assert torch.equal(xformer_fast.attention(q, q, q), out)
    monkeypatch.setattr(ops.attention, "_run_plain", unused)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert xformer_fast.attention(q, q, q).dtype == torch.bfloat16
    graph = make_fx(lambda q: xformer_fast.attention(q, q, q))(q)
    assert "xformer_fast.attention_cpu.default" in graph.code
    batched = torch.vmap(lambda q: xformer_fast.attention(q, q, q))(torch.stack([q, q]))
    assert torch.allclose(batched[1], out, atol=1e-6)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        xformer_fast.attention(forward_ad.make_dual(q, q), q, q)
    compiled = torch.compile(lambda q: xformer_fast.attention(q, q, q), fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(q), out, atol=1e-6)
    monkeypatch.setattr("xformer_fast.dispatch.DEFAULT", "reference")
    with torch.profiler.profile() as profile:
        xformer_fast.attention(q, q, q)
    assert not ran(profile)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("trace", [make_fx, lambda f: lambda *args: torch.jit.trace(f, args)], ids=["make_fx", "jit"])
def test_traced_graphs_have_gradients_and_autocast(trace):
    def function(q, k, v):
        return xformer_fast.attention(q, k, v, causal=True)

    inputs = [torch.randn(1, 2, 9, 16) for _ in range(3)]
    traced = trace(function)(*inputs)
    leaves = [t.clone().requires_grad_() for t in inputs]
    wanted = torch.autograd.grad(function(*leaves).square().sum(), leaves)
    for ours, eager in zip(torch.autograd.grad(traced(*leaves).square().sum(), leaves), wanted, strict=True):
        assert torch.equal(ours, eager)
    with torch.autocast("cpu", torch.bfloat16):
        out = traced(inputs[0].bfloat16(), *inputs[1:])
    assert out.dtype == torch.bfloat16 and out.isfinite().all()


MAP_SHAPE = (1, 4, 4, 2, 8)
THREE_INPUTS = {
    "attention": (lambda q, k, v: xformer_fast.attention(q, k, v), (1, 2, 9, 8)),
    "attention with options": (lambda q, k, v: xformer_fast.attention(q, k, v, window=(3, 3)), (1, 2, 9, 8)),
    "linear_attention": (lambda q, k, v: xformer_fast.linear_attention(q, k, v), (1, 2, 9, 8)),
    "window_attention": (lambda q, k, v: xformer_fast.window_attention(q, k, v, 2), MAP_SHAPE),
    "neighborhood_attention": (lambda q, k, v: xformer_fast.neighborhood_attention(q, k, v, 3), MAP_SHAPE),
}


@pytest.mark.parametrize("op", THREE_INPUTS)
@pytest.mark.parametrize("place", range(3), ids=["query", "key", "value"])
def test_float64_beside_other_types_is_refused_under_autocast(op, place):
    run, shape = THREE_INPUTS[op]
    inputs = [torch.randn(shape) for _ in range(3)]
    inputs[place] = inputs[place].double()
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="float64"):
        run(*inputs)


@pytest.mark.parametrize("op", THREE_INPUTS)
def test_operators_refuse_memory_of_another_type(op):
    """What the public functions never let through: kernels would read it as query's type."""
    run, shape = THREE_INPUTS[op]
    inputs = [torch.randn(shape) for _ in range(3)]
    function, args = recorded(lambda: run(*inputs))[0]
    with pytest.raises(RuntimeError, match="must have query's dtype"):
        function(args[0], args[1].double(), *args[2:])


@pytest.mark.parametrize("op", THREE_INPUTS)
def test_forward_mode_ad_through_a_backward_raises(op):
    run, shape = THREE_INPUTS[op]
    inputs = [torch.randn(shape, requires_grad=True) for _ in range(3)]
    out = run(*inputs)
    with torch.autograd.forward_ad.dual_level():
        tangent = torch.autograd.forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out))
        with pytest.raises(NotImplementedError, match="forward-mode AD"):
            torch.autograd.grad(out, inputs, tangent)


@pytest.mark.parametrize("op", THREE_INPUTS)
def test_func_grad_under_autocast(op):
    run, shape = THREE_INPUTS[op]
    inputs = [torch.randn(shape) for _ in range(3)]
    leaves = [t.clone().requires_grad_() for t in inputs]
    with torch.autocast("cpu", torch.bfloat16):
        ours = torch.func.grad(lambda *tensors: run(*tensors).float().square().sum(), (0, 1, 2))(*inputs)
        expected = torch.autograd.grad(run(*leaves).float().square().sum(), leaves)
    for got, wanted in zip(ours, expected, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("op", THREE_INPUTS)
def test_second_derivatives_by_func_are_refused_by_name(op):
    run, shape = THREE_INPUTS[op]
    q, k, v = (torch.randn(shape) for _ in range(3))
    name = op.partition(" ")[0]

    def loss(q):
        return run(q, k, v).square().sum()

    with pytest.raises(NotImplementedError, match=f"^{name}: second derivatives by torch.func"):
        torch.func.grad(lambda q: torch.func.grad(loss)(q).square().sum())(q)
    with pytest.raises(NotImplementedError, match=f"^{name}: forward-mode AD"):
        torch.func.hessian(loss)(q)
    hessian = torch.autograd.functional.hessian(loss, q, vectorize=True)
    torch.testing.assert_close(hessian, torch.autograd.functional.hessian(loss, q))


@pytest.mark.parametrize("op", THREE_INPUTS)
def test_results_are_no_views(op):
    """Of tensors in any memory order: what is a view may not be changed in place wherever another tensor may."""
    run, shape = THREE_INPUTS[op]
    if shape == MAP_SHAPE:  # heads outside of space in memory
        inputs = [torch.randn(1, 2, 4, 4, 8).movedim(1, -2) for _ in range(3)]
    else:
        inputs = [torch.randn(1, 9, 2, 8).transpose(1, 2) for _ in range(3)]
    with torch.no_grad():
        out = run(*inputs)
    assert not out._is_view() and out.stride() == inputs[0].stride()
    out += torch.ones((), requires_grad=True)
    leaves = [t.requires_grad_() for t in inputs]
    out = run(*leaves)
    assert not out._is_view() and not any(g._is_view() for g in torch.autograd.grad(out.sum(), leaves))


# ---- compile


@pytest.fixture
def compiled():
    """torch.compile of a function in one graph that may not be compiled again."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield lambda function: torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)


OPTIONS = {
    "plain": lambda b, h, n: {},
    "causal": lambda b, h, n: {"causal": True, "window": (7, 0)},
    "mask": lambda b, h, n: {"mask": torch.randn(b, 1, n, n, requires_grad=True), "return_lse": True},
    "lengths": lambda b, h, n: {
        "key_lengths": torch.full((b,), n - 2),
        "alibi_slopes": torch.rand(h, requires_grad=True),
    },
    "sinks": lambda b, h, n: {"sinks": torch.randn(h, requires_grad=True), "softcap": 3.0},
    "dropout": lambda b, h, n: {"dropout_p": 0.3},
    "rope": lambda b, h, n: {"rope": xformer_fast.Rope(*torch.rand(2, 99, 4).unbind())},
    "t5": lambda b, h, n: {"relative_bias": xformer_fast.T5Bias(torch.randn(8, h, requires_grad=True))},
    "globals": lambda b, h, n: {"window": (5, 3), "global_keys": torch.tensor([0, n - 1, -1]), "causal": True},
    "global_count": lambda b, h, n: {"window": (5, 3), "global_keys": 2},
    "distance": lambda b, h, n: {
        "relative_bias": xformer_fast.DistanceBias(torch.randn(h, 2 * n - 1, requires_grad=True))
    },
}  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS)
def test_compile_once_for_all_lengths(option, compiled):
    function = compiled(xformer_fast.attention)
    for length in (24, 37, 50):
        options = OPTIONS[option](2, 4, length)
        q, k, v = (torch.randn(2, heads, length, 16, requires_grad=True) for heads in (4, 2, 2))
        results = []
        for run in (function, xformer_fast.attention):
            torch.manual_seed(0)
            out = run(q, k, v, **options)
            outs = out if isinstance(out, tuple) else (out,)
            results.append((*outs, *torch.autograd.grad(outs, (q, k, v), [torch.ones_like(o) for o in outs])))
        if option != "dropout":  # a compiled program draws its seed in its own way
            for ours, eager in zip(*results, strict=True):
                torch.testing.assert_close(ours, eager)


def test_compile_once_for_all_maps(compiled):
    function = compiled(xformer_fast.attention)
    for rows, columns in ((5, 6), (3, 7), (12, 5)):
        q, k, v = (torch.randn(2, heads, rows * columns, 16, requires_grad=True) for heads in (4, 2, 2))
        bias = tuple(torch.randn(2, 4, rows * columns, n, requires_grad=True) for n in (rows, columns))
        results = []
        for run in (function, xformer_fast.attention):
            out = run(q, k, v, decomposed_bias=bias)
            results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v, *bias))))
        for ours, eager in zip(*results, strict=True):
            torch.testing.assert_close(ours, eager)


def test_compile_packed_once_for_all_lengths(compiled):
    function = compiled(xformer_fast.varlen_attention)
    rope = xformer_fast.Rope(*torch.rand(2, 99, 4).unbind())
    for lengths in ([5, 9, 20], [30, 2, 8], [11, 11, 40]):
        cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        q = torch.randn(sum(lengths), 2, 8, requires_grad=True)
        results = []
        for run in (function, xformer_fast.varlen_attention):
            out = run(q, q, q, cu, cu, max(lengths), max(lengths), causal=True, rope=rope)
            results.append((out, *torch.autograd.grad(out.square().sum(), q)))
        for ours, eager in zip(*results, strict=True):
            torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("shapes", [((2, 4), (2, 4)), ((2, 4), (2, 1)), ((3,), (3,))], ids=str)
def test_compile_torch_signature(shapes, compiled):
    function = compiled(xformer_fast.scaled_dot_product_attention)
    for length in (16, 23, 40):
        q, k = (torch.randn(*lead, length, 8) for lead in shapes)
        torch.testing.assert_close(
            function(q, k, k, is_causal=True), xformer_fast.scaled_dot_product_attention(q, k, k, is_causal=True)
        )


def test_compile_with_inductor():
    torch._dynamo.reset()
    q, k, v = (torch.randn(2, 4, 33, 16, requires_grad=True) for _ in range(3))
    function = torch.compile(
        lambda q, k, v: xformer_fast.attention(q * 2, k, v, causal=True).relu().sum(), fullgraph=True
    )
    ours = torch.autograd.grad(function(q, k, v), (q, k, v))
    eager = torch.autograd.grad(xformer_fast.attention(q * 2, k, v, causal=True).relu().sum(), (q, k, v))
    for a, b in zip(ours, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_compiled_calls_check_values_too(compiled):
    function = compiled(xformer_fast.attention)
    q = torch.randn(1, 1, 8, 8)
    with pytest.raises((RuntimeError, ValueError), match=r"key_lengths\[0\] is 9"):
        function(q, q, q, key_lengths=torch.tensor([9]))


def test_export():
    class Model(torch.nn.Module):
        def forward(self, x):
            return xformer_fast.attention(x, x, x, causal=True)

    x = torch.randn(2, 2, 16, 8)
    length = torch.export.Dim("length", min=2, max=512)
    program = torch.export.export(Model(), (x,), dynamic_shapes={"x": {2: length}})
    longer = torch.randn(2, 2, 100, 8)
    torch.testing.assert_close(program.module()(longer), Model()(longer))


# ---- autocast, grad modes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    q, k, v = (torch.randn(2, 2, 16, 8, requires_grad=True) for _ in range(3))
    with torch.autocast("cpu", dtype):
        out = xformer_fast.attention(q, k, v.to(dtype), causal=True)
    assert out.dtype == dtype
    half = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
    expected = xformer_fast.attention(*half, causal=True)
    assert torch.equal(out, expected)
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    for grad, wanted in zip(grads, torch.autograd.grad(expected.sum(), half), strict=True):
        assert grad.dtype == torch.float32 and torch.equal(grad, wanted.float())


def test_mixed_dtypes_raise_outside_autocast():
    q = torch.randn(1, 1, 4, 8)
    with pytest.raises(TypeError, match=r"key is torch\.bfloat16"):
        xformer_fast.attention(q, q.bfloat16(), q.bfloat16())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_without_gradients(mode, backend):
    q = torch.randn(2, 2, 16, 8, requires_grad=True)
    expected = xformer_fast.attention(q, q, q, backend=backend)
    with mode():
        out = xformer_fast.attention(q, q, q, backend=backend)
    assert not out.requires_grad and torch.equal(out, expected)


def test_unwanted_gradients_are_not_computed():
    """A frozen mask, slopes or sinks cost nothing: the operator is told."""
    q = torch.randn(1, 2, 8, 8, requires_grad=True)
    options = {"mask": torch.randn(8, 8), "alibi_slopes": torch.rand(2), "sinks": torch.rand(2)}
    options["decomposed_bias"] = torch.rand(1, 2, 8, 2), torch.rand(1, 2, 8, 4)
    calls = recorded(lambda: xformer_fast.attention(q, q, q, **options).sum().backward())
    assert calls[1][1][-5:] == (False,) * 5


def test_fake_tensors_have_the_shape():
    with FakeTensorMode():
        q, v = torch.empty(2, 7, 4, 8).transpose(1, 2).requires_grad_(), torch.empty(2, 4, 7, 16)
        out, lse = xformer_fast.attention(q, q, v, return_lse=True)
        (grad,) = torch.autograd.grad(out.sum(), q)
    assert out.shape == (2, 4, 7, 16) and lse.shape == (2, 4, 7) and grad.stride() == q.stride()
    assert out.transpose(1, 2).is_contiguous()


def test_meta_tensors_have_the_shape():
    q = torch.empty(2, 4, 7, 8, device="meta")
    assert xformer_fast.attention(q, q, q).shape == (2, 4, 7, 8)


# ---- gradients of gradients, transforms


@pytest.mark.parametrize("name", ["plain", "masked", "sinks", "globals", "decomposed", "packed", "packed_options"])
def test_double_backward(name):
    case = make(name)
    if "mask" in case.options or "mask" in case.tensors:
        case.options["mask"] = None
        case.tensors["mask"] = torch.randn(1, 1, *(case.tensors[n].shape[2] for n in ("query", "key")))
    case.options.pop("key_lengths", None)  # its NaN padding has no place in the comparison of second derivatives
    case.tensors = {n: t.nan_to_num(0.3) for n, t in case.tensors.items()}
    case.options = {n: v for n, v in case.options.items() if v is not None}
    results = []
    public = xformer_fast.varlen_attention if case.packed else xformer_fast.attention
    for function, exact in ((lambda **k: public(**k, backend="cpu"), False), (formula(packed=case.packed), True)):
        tensors = {n: (t.double() if exact else t).detach().requires_grad_() for n, t in case.tensors.items()}
        torch.manual_seed(case.seed)
        outs = function(**arguments(case, tensors, exact))
        outs = outs if isinstance(outs, tuple) else (outs,)
        outs = [o.masked_fill(o.isinf(), 0) for o in outs]
        first = torch.autograd.grad(sum(o.sin().sum() for o in outs), list(tensors.values()), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), list(tensors.values()))
        results.append(second)
    for n, ours, exact in zip(case.tensors, *results, strict=True):
        scale = exact.abs().max().item() + 1e-3
        torch.testing.assert_close(ours.double(), exact, rtol=1e-3, atol=1e-4 * scale, msg=lambda m, n=n: f"{n}: {m}")


def test_gradient_penalty():
    """The common use of double backward: a penalty on the gradient's norm is trained on."""
    q, k, v = (torch.randn(1, 2, 6, 4, requires_grad=True) for _ in range(3))
    (grad,) = torch.autograd.grad(xformer_fast.attention(q, k, v).square().sum(), q, create_graph=True)
    grad.norm().backward()
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    (grad,) = torch.autograd.grad(reference.attention(*exact).square().sum(), exact[0], create_graph=True)
    grad.norm().backward()
    for ours, theirs in zip((q, k, v), exact, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-3, atol=1e-5)


def test_forward_mode_raises():
    q = torch.randn(1, 2, 6, 4)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
        for arguments in ((dual, q, q), (q, dual, q), (q, q, dual)):
            with pytest.raises(NotImplementedError, match="forward-mode"):
                xformer_fast.attention(*arguments)
        with pytest.raises(NotImplementedError, match="forward-mode"):
            xformer_fast.attention(q, q, q, sinks=torch.autograd.forward_ad.make_dual(torch.ones(2), torch.ones(2)))
        out = xformer_fast.attention(dual, q, q, backend="reference")
        assert torch.autograd.forward_ad.unpack_dual(out).tangent is not None
    with pytest.raises((NotImplementedError, RuntimeError)):
        torch.func.jvp(lambda x: xformer_fast.attention(x, q, q), (q,), (torch.ones_like(q),))


@pytest.mark.parametrize(
    "op,make,shape",
    [
        ("apply_rope", lambda x: {"rope": xformer_fast.Rope(x, torch.ones(9, 2))}, (9, 2)),
        ("apply_rope", lambda x: {"rope": xformer_fast.Rope(torch.ones(9, 2), x)}, (9, 2)),
        ("attention", lambda x: {"relative_bias": xformer_fast.T5Bias(x)}, (32, 2)),
        ("attention", lambda x: {"relative_bias": xformer_fast.DistanceBias(x)}, (2, 11)),
    ],
)
def test_forward_mode_through_positions_raises(op, make, shape):
    q, x = torch.randn(1, 2, 6, 4), torch.ones(shape)
    with pytest.raises(NotImplementedError, match=f"^{op}: forward-mode AD"):
        torch.func.jvp(lambda x: xformer_fast.attention(q, q, q, **make(x)), (x,), (x,))


def test_func_grad():
    q, k, v = torch.randn(3, 1, 2, 6, 4).unbind()
    ours = torch.func.grad(lambda x: xformer_fast.attention(x, k, v, causal=True).square().sum())(q)
    expected = torch.func.grad(lambda x: reference.attention(x, k, v, causal=True).square().sum())(q)
    torch.testing.assert_close(ours, expected)


def test_vmap_works_or_raises():
    q, k, v = torch.randn(3, 5, 1, 2, 6, 4).unbind()
    expected = torch.stack([xformer_fast.attention(a, b, c) for a, b, c in zip(q, k, v, strict=True)])
    try:
        ours = torch.func.vmap(xformer_fast.attention)(q, k, v)
    except (NotImplementedError, RuntimeError) as error:
        assert "vmap" in str(error) or "atching" in str(error)
    else:
        torch.testing.assert_close(ours, expected)


def test_accumulation_and_reuse():
    """The same tensor as query, key and value, and a graph that is kept: gradients add up."""
    x = torch.randn(1, 2, 9, 8, requires_grad=True)
    out = xformer_fast.attention(x, x, x)
    out.sum().backward(retain_graph=True)
    once = x.grad.clone()
    out.sum().backward()
    torch.testing.assert_close(x.grad, 2 * once)
    exact = x.detach().double().requires_grad_()
    reference.attention(exact, exact, exact).sum().backward()
    torch.testing.assert_close(once.double(), exact.grad, rtol=1e-4, atol=1e-5)


def test_inputs_changed_before_backward_are_noticed():
    x = torch.randn(1, 2, 9, 8, requires_grad=True)
    y = x * 1
    out = xformer_fast.attention(y, y, y)
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        out.sum().backward()


# ---- what runs and why


def test_info_names_every_backend():
    text = xformer_fast.info()
    for word in ("xformer_fast", torch.__version__, "triton", "cpu", "reference", "avx2"):
        assert word in text


def test_explain(monkeypatch):
    q = torch.randn(1, 2, 8, 16)
    text = xformer_fast.explain("attention", q, q, q, causal=True)
    assert "cpu runs this call" in text and "triton" in text
    text = xformer_fast.explain("attention", q.double(), q.double(), q.double())
    assert "reference runs this call" in text and "float64" in text
    cu = torch.tensor([0, 8], dtype=torch.int32)
    packed = torch.randn(8, 2, 513)
    text = xformer_fast.explain("varlen_attention", packed, packed, packed, cu, cu, 8, 8)
    assert "reference runs this call" in text and "head_dim is at most 512" in text
    with pytest.raises(TypeError):
        xformer_fast.explain("attention", q, q, q, colour="red")
    with pytest.raises(ValueError, match="head_dim"):
        xformer_fast.explain("attention", q, q[..., :3], q)
    monkeypatch.setattr("xformer_fast.dispatch.DEFAULT", "reference")
    text = xformer_fast.explain("attention", q, q, q)
    assert "reference runs this call" in text and "XFORMER_FAST_BACKEND=reference" in text


Q, PACKED, MAP = torch.randn(1, 2, 8, 16), torch.randn(8, 2, 16), torch.randn(1, 4, 4, 2, 16)
CU, TABLE = torch.tensor([0, 8], dtype=torch.int32), torch.ones(8, 8)
CALLS = {
    "attention": (Q, Q, Q),
    "varlen_attention": (PACKED, PACKED, PACKED, CU, CU, 8, 8),
    "decode_attention": (Q, Q, Q, torch.tensor([8])),
    "apply_rope": (Q, TABLE, TABLE),
    "linear_attention": (Q, Q, Q),
    "window_attention": (MAP, MAP, MAP, 2),
    "neighborhood_attention": (MAP, MAP, MAP, 2),
}


@pytest.mark.parametrize("default", [None, "cpu"])
@pytest.mark.parametrize("op", CALLS)
def test_explain_of_a_backend_asked_for(op, default, monkeypatch):
    monkeypatch.setattr("xformer_fast.dispatch.DEFAULT", default)
    text = xformer_fast.explain(op, *CALLS[op], backend="reference")
    assert text.startswith(f"{op}: reference runs this call")
    assert "backend='reference' is asked for" in text and "XFORMER_FAST_BACKEND" not in text
    doubles = [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in CALLS[op]]
    text = xformer_fast.explain(op, *doubles, backend="cpu")
    assert text.startswith(f"{op}: no backend runs this call")
    with pytest.raises(ValueError, match=r"backend must be one of .* got 'fast'"):
        xformer_fast.explain(op, *CALLS[op], backend="fast")


def test_a_default_that_an_op_lacks(monkeypatch):
    monkeypatch.setattr("xformer_fast.dispatch.DEFAULT", "cuda")
    words = "neighborhood_attention: XFORMER_FAST_BACKEND must be one of triton, cpu, reference, got 'cuda'"
    for run in (xformer_fast.neighborhood_attention, functools.partial(xformer_fast.explain, "neighborhood_attention")):
        with pytest.raises(ValueError, match=words):
            run(*CALLS["neighborhood_attention"])
    xformer_fast.neighborhood_attention(*CALLS["neighborhood_attention"], backend="reference")
