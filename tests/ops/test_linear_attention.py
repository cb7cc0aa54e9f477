"""`linear_attention` against the quadratic formula in float64: random calls, gradients, instruction sets, states."""

import random

import pytest
import torch
import torch.nn.functional as F
from attention_cases import unwritten_memory_is_nan
from marks import needs_kernels

import xformer_fast
from xformer_fast import build_info, dispatch, reference
from xformer_fast.testing import check_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ISAS = build_info.usable_isa_levels() if dispatch.build_problem() is None else []

LENGTHS = [(1, 1), (1, 70), (17, 17), (64, 64), (65, 65), (130, 130), (40, 110), (110, 40), (3, 0), (0, 9)]
DIMS = [(1, 1), (3, 7), (16, 16), (24, 40), (64, 64), (64, 16), (40, 72), (96, 8)]
POSITIVE = ["elu", "exp", "softmax", "taylor"]
OTHERS = ["identity", "relu", "square_relu"]
STATE = ("kv", "z")


class Case:
    """A drawn call: float inputs by name (the initial state as kv and z), everything else in `options`."""

    def __init__(self, seed: int, dtype: torch.dtype, *, small: bool = False):
        rng = random.Random(f"linear {seed}")
        torch.manual_seed(seed)
        self.dtype = dtype
        heads, kv_heads = rng.choice([(1, 1), (2, 2), (4, 2), (3, 1)])
        batch = rng.choice([1, 2])
        dim, dim_v = rng.choice(DIMS)
        len_q, len_k = rng.choice(LENGTHS)
        if small:
            dim, dim_v, len_q, len_k = min(dim, 24), min(dim_v, 24), min(len_q, 80), min(len_k, 80)
        options = {"normalize": rng.random() < 0.7, "causal": rng.random() < 0.7}
        options["feature_map"] = rng.choice(POSITIVE if options["normalize"] else POSITIVE + OTHERS)
        if options["feature_map"] == "taylor":
            dim = min(dim, 7)
        features = 1 + dim + dim**2 if options["feature_map"] == "taylor" else dim
        options["eps"] = rng.choice([1e-6, 1e-6, 0.1])
        if rng.random() < 0.3:
            options["scale"] = rng.choice([0.3, 2.0])
        self.packed = rng.random() < 0.25
        if self.packed:
            cuts = sorted(rng.choices(range(len_k + 1), k=batch))
            options["cu_seqlens"] = torch.tensor([0, *cuts, len_k], dtype=torch.int32)
            batch += 1
            shapes = (len_k, heads, dim), (len_k, kv_heads, dim), (len_k, kv_heads, dim_v)
            longest = options["cu_seqlens"].diff().tolist()
        else:
            shapes = (batch, heads, len_q, dim), (batch, kv_heads, len_k, dim), (batch, kv_heads, len_k, dim_v)
            longest = [len_k] * batch
        self.tensors = {
            name: self._arranged(shape, rng) for name, shape in zip(("query", "key", "value"), shapes, strict=True)
        }
        if rng.random() < 0.4:
            options["key_lengths"] = torch.tensor(
                [rng.randint(0, n) for n in longest], dtype=rng.choice([torch.int32, torch.int64])
            )
        most = max([*longest, 0]) if "key_lengths" not in options else max([*options["key_lengths"].tolist(), 0])
        if most <= 1 or dim == 1:  # normalised, the output depends on query and key through eps alone
            options["eps"] = 0.1
        if options["causal"] and rng.random() < 0.5:
            # Queries before the first key see an initial state grown by decay^-n: keep that within reason.
            self.tensors["decay"] = 1 - torch.rand(heads) * (0.02 if len_q > len_k else 0.3)
        if rng.random() < 0.4:
            self.tensors |= {"kv": torch.rand(batch, heads, features, dim_v), "z": torch.rand(batch, heads, features)}
        self.options = options

    def _arranged(self, shape, rng):
        """Values of the case's dtype in one of a few memory layouts."""
        if len(shape) == 4 and rng.random() < 0.5:
            b, h, s, d = shape
            x = torch.randn(b, s, h, d).transpose(1, 2)
        elif rng.random() < 0.3:
            x = torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2]
        else:
            x = torch.randn(shape)
        return (x * 0.7).to(self.dtype)

    def differentiated(self):
        # Half inputs: the denominator's gradient is taken from the output as it was stored. What only it reaches, and
        # what sums over every position, shows that rounding: states and decay are left to float32.
        return [n for n in self.tensors if self.dtype == torch.float32 or n in ("query", "key", "value")]

    def evaluate(self, function, dtype=None) -> dict[str, torch.Tensor]:
        """The output, the final state, and every gradient."""
        wanted = self.differentiated()
        leaves = {}
        for name, t in self.tensors.items():
            to = dtype or t.dtype
            leaves[name] = t.detach().to(to).requires_grad_(name in wanted)
        keywords = {n: t for n, t in leaves.items() if n not in STATE}
        if "kv" in leaves:
            keywords["initial_state"] = leaves["kv"], leaves["z"]
        out, state = function(**keywords, **self.options, return_state=True)
        generator = torch.Generator().manual_seed(7)
        results = {"out": out, "state kv": state[0], "state z": state[1]}
        weights = [torch.randn(t.shape, generator=generator).to(self.dtype).to(t) for t in results.values()]
        grads = torch.autograd.grad(
            list(results.values()), [leaves[n] for n in wanted], weights, allow_unused=True, materialize_grads=True
        )
        return results | {f"gradient of {n}": g for n, g in zip(wanted, grads, strict=True)}

    def check(self, function, truth, naive, where: str):
        with unwritten_memory_is_nan():
            results = self.evaluate(function)
        # The decay's gradient is a difference, of numerator and denominator, of terms whose sum is at most:
        largest = {"gradient of decay": self.tensors["key"].shape[-2] * truth["out"].abs().sum().item()}
        for name, result in results.items():
            magnitude = largest.get(name, 0.0) if self.options.get("normalize", True) else 0.0
            where_ = f"{where}: {name} of {self}"
            check_close(result, truth[name], naive[name], where_, dtype=self.dtype, magnitude=magnitude)

    def __str__(self):
        return f"{self.dtype} { {n: (tuple(t.shape), t.stride()) for n, t in self.tensors.items()} } {self.options}"


def on_backend(name):
    return lambda **keywords: xformer_fast.linear_attention(**keywords, backend=name)


def agree(seed, dtype, monkeypatch):
    case = Case(seed, dtype)
    truth, naive = case.evaluate(reference.linear_attention, torch.float64), case.evaluate(reference.linear_attention)
    for isa in ISAS:
        monkeypatch.setenv("XFORMER_FAST_ISA", isa)
        case.check(on_backend("cpu"), truth, naive, isa)


@needs_kernels
@pytest.mark.parametrize("seed", range(220))
def test_random_calls(seed, monkeypatch):
    agree(seed, DTYPES[seed % 3] if seed % 2 else torch.float32, monkeypatch)


@needs_kernels
@pytest.mark.parametrize("decay", [0.1, 0.5])
def test_decay_of_queries_long_before_the_first_key(decay, monkeypatch):
    """They see no key and no state: zeros, whatever decay^-distance would be."""
    case = Case(0, torch.float32)
    case.tensors = {n: torch.randn(1, 1, length, 8) for n, length in (("query", 200), ("key", 3), ("value", 3))}
    case.tensors["decay"], case.options = torch.tensor([decay]), {"causal": True}
    truth, naive = case.evaluate(reference.linear_attention, torch.float64), case.evaluate(reference.linear_attention)
    for isa in ISAS:
        monkeypatch.setenv("XFORMER_FAST_ISA", isa)
        case.check(on_backend("cpu"), truth, naive, isa)
        assert not xformer_fast.linear_attention(**case.tensors, causal=True)[:, :, :197].any()


@needs_kernels
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [1, 8])
def test_segments(causal, heads, monkeypatch):
    """Long enough that few heads are split inside the sequence, and many are not."""
    torch.manual_seed(0)
    case = Case(0, torch.float32)
    length = 1100
    case.tensors = {n: torch.randn(1, heads, length, 5) * 0.7 for n in ("query", "key", "value")}
    case.tensors |= {"kv": torch.rand(1, heads, 5, 5), "z": torch.rand(1, heads, 5)}
    case.options = {"causal": causal, "key_lengths": torch.tensor([903])}
    if causal:
        case.tensors["decay"] = 1 - torch.logspace(-4, -1, heads)
    truth, naive = case.evaluate(reference.linear_attention, torch.float64), case.evaluate(reference.linear_attention)
    for isa in ISAS:
        monkeypatch.setenv("XFORMER_FAST_ISA", isa)
        case.check(on_backend("cpu"), truth, naive, isa)


@pytest.mark.parametrize(
    "options",
    [
        {"eps": 0.5},
        {"scale": 2.5},
        {"normalize": False, "scale": 0.3},
        {"feature_map": "relu", "eps": 0.1, "scale": 0.7, "decay": torch.tensor([1.0, 0.9, 0.5, 0.99])},
    ],
    ids=lambda options: " ".join(options),
)
def test_a_step_has_the_options_of_the_whole(options):
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, 9, 8) for heads in (4, 2, 2))
    whole = xformer_fast.linear_attention(query, key, value, causal=True, **options)
    state, outputs = None, []
    for tokens in (slice(0, 1), slice(1, 4), slice(4, 9)):
        token = (x[:, :, tokens] for x in (query, key, value))
        out, state = xformer_fast.linear_attention_step(*token, state, **options)
        outputs.append(out)
    torch.testing.assert_close(torch.cat(outputs, 2), whole)


@pytest.mark.parametrize(
    "decay", [None, torch.tensor([1.0, 0.9, 0.5, 0.99], dtype=torch.float64)], ids=["plain", "decay"]
)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("feature_map", [*POSITIVE, *OTHERS])
def test_quadratic_form_equals_recurrent_form(feature_map, normalize, decay):
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, h, 23, 6, dtype=torch.float64) for h in (4, 2, 2))
    features = 43 if feature_map == "taylor" else 6
    state = torch.rand(2, 4, features, 6).double(), torch.rand(2, 4, features).double()
    options = {"feature_map": feature_map, "normalize": normalize, "decay": decay, "scale": 0.7, "initial_state": state}
    out, final = reference.linear_attention(q, k, v, causal=True, return_state=True, **options)
    out_, final_ = reference.linear_attention_recurrent(q, k, v, **options)
    scale = out_.abs().max()
    torch.testing.assert_close(out / scale, out_ / scale, rtol=1e-9, atol=1e-9)
    for a, b in zip(final, final_, strict=True):
        torch.testing.assert_close(a, b)


@pytest.fixture(params=[*(f"cpu-{isa}" for isa in ISAS), "reference"])
def backend(request, monkeypatch):
    name, _, isa = request.param.partition("-")
    if isa:
        monkeypatch.setenv("XFORMER_FAST_ISA", isa)
    with unwritten_memory_is_nan():
        yield name


@pytest.mark.parametrize("cut", [1, 64, 77, 150])
@pytest.mark.parametrize("decay", [None, torch.tensor([1.0, 0.95])], ids=["plain", "decay"])
def test_split_and_resumed_equals_whole(backend, cut, decay):
    torch.manual_seed(2)
    q, k, v = torch.randn(3, 2, 2, 151, 24).unbind()
    options = {"causal": True, "decay": decay, "return_state": True, "backend": backend}
    whole, final = xformer_fast.linear_attention(q, k, v, **options)
    first, state = xformer_fast.linear_attention(q[:, :, :cut], k[:, :, :cut], v[:, :, :cut], **options)
    rest, state = xformer_fast.linear_attention(
        q[:, :, cut:], k[:, :, cut:], v[:, :, cut:], initial_state=state, **options
    )
    torch.testing.assert_close(torch.cat((first, rest), 2), whole, rtol=1e-5, atol=1e-5)
    for a, b in zip(state, final, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_steps_equal_the_op(backend):
    torch.manual_seed(3)
    q, k, v = (torch.randn(2, h, 20, 16) for h in (4, 2, 2))
    decay = torch.tensor([1.0, 0.9, 0.99, 0.5])
    whole, final = xformer_fast.linear_attention(q, k, v, causal=True, decay=decay, return_state=True, backend=backend)
    state, rows = None, []
    for t in range(20):
        token = (x[:, :, t : t + 1] for x in (q, k, v))
        out, state = xformer_fast.linear_attention_step(*token, state, decay=decay, backend=backend)
        rows.append(out)
    torch.testing.assert_close(torch.cat(rows, 2), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state[0], final[0], rtol=1e-5, atol=1e-5)


def test_rows_that_see_nothing_are_zero(backend):
    q, k, v = (torch.randn(1, 2, n, 8, requires_grad=True) for n in (9, 4, 4))
    out = xformer_fast.linear_attention(q, k, v, causal=True, eps=0.0, backend=backend)
    assert not out[:, :, :5].any() and out.isfinite().all()
    for grad in torch.autograd.grad(out.square().sum(), (q, k, v)):
        assert grad.isfinite().all()
    lengths = torch.tensor([0])
    out, state = xformer_fast.linear_attention(
        q, k, v, key_lengths=lengths, eps=0.0, return_state=True, backend=backend
    )
    assert not out.any() and not state[0].any() and not state[1].any()


@pytest.mark.parametrize("feature_map", ["elu", torch.exp], ids=["fused", "callable"])
@pytest.mark.parametrize("causal", [False, True])
def test_padding_may_hold_nan(backend, causal, feature_map):
    q, k, v = (torch.randn(2, 2, 70, 16) for _ in range(3))
    lengths = torch.tensor([66, 3])
    clean = [t.clone() for t in (k, v)]
    for b, n in enumerate(lengths.tolist()):
        k[b, :, n:] = v[b, :, n:] = float("nan")
    options = {"causal": causal, "key_lengths": lengths, "backend": backend, "feature_map": feature_map}
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out = xformer_fast.linear_attention(*leaves, **options)
    assert torch.equal(out, xformer_fast.linear_attention(q, *clean, **options))
    for grad in torch.autograd.grad(out.square().sum(), leaves):
        assert grad.isfinite().all()


def test_maps_outside_the_kernel(backend):
    torch.manual_seed(4)
    q, k, v = torch.randn(3, 1, 2, 40, 8).unbind()
    run = lambda f: xformer_fast.linear_attention(q, k, v, feature_map=f, causal=True, backend=backend)  # noqa: E731
    elu = lambda x: F.elu(x) + 1  # noqa: E731
    torch.testing.assert_close(run(elu), run("elu"), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(run((elu, elu)), run("elu"), rtol=1e-5, atol=1e-5)
    assert run("taylor").shape == run(lambda x: F.pad(elu(x), (0, 5))).shape == v.shape


def test_favor_plus_estimates_softmax_attention():
    torch.manual_seed(5)
    q, k, v = (0.5 * torch.randn(1, 1, 64, 16) for _ in range(3))
    exact = reference.attention(q, k, v)
    errors = []
    for features in (16, 256):
        maps = xformer_fast.FavorPlus(16, features, seed=3)
        estimates = [xformer_fast.linear_attention(q, k, v, feature_map=maps.redraw()) for _ in range(20)]
        errors.append(sum((e - exact).norm().item() for e in estimates) / exact.norm().item() / 20)
    assert errors[1] < 0.4 * errors[0] and errors[1] < 0.2
    same = xformer_fast.FavorPlus(16, 8, seed=9), xformer_fast.FavorPlus(16, 8, seed=9)
    assert torch.equal(same[0].projection, same[1].projection)
    assert not torch.equal(same[0].projection, same[1].redraw().projection)
    rows = xformer_fast.FavorPlus(16, 16).projection
    products = F.normalize(rows) @ F.normalize(rows).T
    torch.testing.assert_close(products, torch.eye(16), atol=1e-5, rtol=0)


@needs_kernels
@pytest.mark.parametrize("causal", [False, True])
def test_same_bits_for_any_number_of_threads(causal):
    torch.manual_seed(6)
    leaves = [torch.randn(1, 2, 2100, 16, requires_grad=True) for _ in range(3)]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            out = xformer_fast.linear_attention(*leaves, causal=causal, backend="cpu")
            results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_kernels
def test_a_million_tokens_do_not_drift():
    torch.manual_seed(7)
    length, dim = 1_000_000, 4
    q, k, v = (torch.randn(1, 1, length, dim) for _ in range(3))
    out, (kv, z) = xformer_fast.linear_attention(q, k, v, causal=True, return_state=True, backend="cpu")
    phi_k = F.elu(k[0, 0].double()) + 1
    exact_kv, exact_z = phi_k.T @ v[0, 0].double(), phi_k.sum(0)
    errors = {
        "kv": ((kv[0, 0] - exact_kv).abs().max() / exact_kv.abs().max()).item(),
        "z": ((z[0, 0] - exact_z).abs().max() / exact_z.abs().max()).item(),
    }
    last = F.elu(q[0, 0, -1].double()) + 1
    exact = last @ exact_kv / (last @ exact_z)
    errors["out"] = ((out[0, 0, -1] - exact).abs().max() / exact.abs().max()).item()
    print(f"relative error after {length} tokens: {errors}")
    assert errors["z"] < 1e-5 and errors["kv"] < 1e-4 and errors["out"] < 1e-3, errors


# ---- what torch expects of an operator


def leaves_of(**shapes):
    torch.manual_seed(8)
    return {n: (torch.rand if n in ("kv", "z") else torch.randn)(s).requires_grad_() for n, s in shapes.items()}


def arguments(packed=False):
    heads = {"query": (2, 4, 9, 8), "key": (2, 2, 9, 8), "value": (2, 2, 9, 5)}
    if packed:
        heads = {n: (18, s[1], s[3]) for n, s in heads.items()}
    x = leaves_of(**heads, kv=(2, 4, 8, 5), z=(2, 4, 8))
    decay = torch.tensor([1.0, 0.9, 0.8, 0.5]).requires_grad_()
    cu = torch.tensor([0, 7, 18], dtype=torch.int32) if packed else None
    return (
        x["query"], x["key"], x["value"], torch.tensor([3, 9]), cu, decay, x["kv"], x["z"], 1, True, True, 1e-6, 0.7,
        True,
    )  # fmt: skip


@needs_kernels
@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(packed):
    operator = torch.ops.xformer_fast.linear_attention_cpu.default
    torch.library.opcheck(operator, arguments(packed))
    plain = (*arguments(packed)[:3], None, arguments(packed)[4], *[None] * 3, 1, False, True, 1e-6, 1.0, False)
    torch.library.opcheck(operator, plain)


@needs_kernels
def test_compile_without_recompiling():
    torch._dynamo.reset()
    compiled = torch.compile(xformer_fast.linear_attention, fullgraph=True, dynamic=True)
    counts = []
    for length in (33, 47, 90):
        leaves = [torch.randn(2, 2, length, 16, requires_grad=True) for _ in range(3)]
        results = []
        for function in (compiled, xformer_fast.linear_attention):
            out, state = function(*leaves, causal=True, decay=torch.tensor([0.9, 0.8]), return_state=True)
            loss = out.square().sum() + state[0].sum()
            results.append((out, *torch.autograd.grad(loss, leaves)))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert counts[0] == counts[-1], counts


@needs_kernels
@pytest.mark.parametrize("normalize", [True, False])
def test_double_backward(normalize):
    torch.manual_seed(9)
    tensors = [torch.randn(1, 2, 6, 4) for _ in range(3)] + [torch.tensor([0.9, 0.7])]

    def second(function, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in tensors]
        out = function(*leaves[:3], decay=leaves[3], causal=True, normalize=normalize)
        grads = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)

    ours = second(lambda *a, **k: xformer_fast.linear_attention(*a, **k, backend="cpu"), torch.float32)
    exact = second(reference.linear_attention, torch.float64)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-3 * b.abs().max().item())


@needs_kernels
def test_torch_func_and_autocast_and_forward_ad():
    q, k, v = torch.randn(3, 1, 2, 10, 8).unbind()
    loss = lambda x: xformer_fast.linear_attention(x, k, v, causal=True, backend="cpu").square().sum()  # noqa: E731
    x = q.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(loss)(q), torch.autograd.grad(loss(x), x)[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert xformer_fast.linear_attention(q, k.bfloat16(), v).dtype == torch.bfloat16
    with pytest.raises(NotImplementedError, match="forward-mode"), torch.autograd.forward_ad.dual_level():
        xformer_fast.linear_attention(torch.autograd.forward_ad.make_dual(q, q), k, v, backend="cpu")


BAD = {
    "feature_map must be one of": {"feature_map": "cosine"},
    "decay needs causal": {"decay": torch.ones(2)},
    "decay must have shape": {"decay": torch.ones(3), "causal": True},
    r"decay\[1\] is 1.5": {"decay": torch.tensor([1.0, 1.5]), "causal": True},
    "eps must be finite": {"eps": -1.0},
    "scale must be a number": {"scale": "big"},
    "scale must be finite in float32": {"scale": 1e300},
    "key_lengths must": {"key_lengths": torch.tensor([1, 2, 3])},
    r"key_lengths\[0\] is 11": {"key_lengths": torch.tensor([11])},
    r"initial_state\[0\] must be": {"initial_state": (torch.zeros(1, 2, 8), torch.zeros(1, 2, 8))},
    "initial_state must have": {"initial_state": (torch.zeros(1, 2, 7, 8), torch.zeros(1, 2, 7))},
    "causal must be True or False": {"causal": "top_left"},
    "cu_seqlens must be int32": {"cu_seqlens": torch.tensor([0, 4])},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(backend, message):
    options = BAD[message]
    shape = (4, 2, 8) if "cu_seqlens" in options else (1, 2, 10, 8)
    x = torch.randn(shape)
    with pytest.raises((ValueError, TypeError), match=message):
        xformer_fast.linear_attention(x, x, x, **options, backend=backend)


def test_empty_batches_and_explain():
    x = torch.randn(0, 2, 5, 8)
    out, state = xformer_fast.linear_attention(x, x, x, causal=True, return_state=True)
    assert out.shape == x.shape and state[0].shape == (0, 2, 8, 8)
    assert "runs this call" in xformer_fast.explain("linear_attention", x, x, x)
