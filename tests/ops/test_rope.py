"""RoPE: every instruction set against the formula in float64, frequencies and positions against transformers."""

import math

import pytest
import torch
from attention_cases import unwritten_memory_is_nan
from marks import needs_kernels
from rope_cases import compare, draw, evaluate, on_backend, tables
from torch.utils._python_dispatch import TorchDispatchMode

import xformer_fast
from xformer_fast import BackendUnavailable, Rope, dispatch, reference
from xformer_fast.testing import check_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
apply_rope = xformer_fast.apply_rope


# ---- the kernel


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_calls(isa, dtype):
    """120 draws an instruction set, 40 a dtype: forward and gradient."""
    for seed in range(40 * DTYPES.index(dtype), 40 * DTYPES.index(dtype) + 40):
        case = draw(seed, dtype)
        with unwritten_memory_is_nan():
            results = evaluate(case, on_backend("cpu"))
        compare(case, results, isa)


@needs_kernels
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_results_are_written_past_the_caches(isa, dtype, interleaved):
    """Outputs of 8 MiB and more take other store instructions; tails and short last blocks too."""
    for heads, length, dim, rotary in ((9, 1037, 256, 256), (5, 2100, 224, 128), (8, 1025, 256, 256)):
        x, (cos, sin) = torch.randn(2, heads, length, dim).to(dtype), tables(rotary, length)
        out = apply_rope(x, cos, sin, interleaved=interleaved, backend="cpu")
        assert out.numel() * out.element_size() >= 8 << 20
        rows = torch.tensor([0, 1, 511, 512, 513, 1024, length - 1])
        part = {"positions": rows, "interleaved": interleaved}
        exact = reference.apply_rope(x[:, :, rows].double(), cos.double(), sin.double(), **part)
        naive = reference.apply_rope(x[:, :, rows], cos, sin, **part)
        check_close(out[:, :, rows], exact, naive)
        again = torch.cat([apply_rope(h, cos, sin, interleaved=interleaved) for h in x.split(1, 1)], 1)
        assert torch.equal(out, again)  # which, a head at a time, goes through the caches


@needs_kernels
def test_results_do_not_depend_on_threads():
    x, (cos, sin) = torch.randn(2, 8, 700, 96), tables(64, 700)
    results, threads = [], torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(apply_rope(x, cos, sin, backend="cpu"))
    torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results)


def test_memory_order_is_kept():
    x, (cos, sin) = torch.randn(2, 9, 4, 16).transpose(1, 2), tables(16)
    assert apply_rope(x, cos, sin).stride() == x.stride()


def test_inverse_undoes():
    x, (cos, sin) = torch.randn(2, 3, 50, 40), tables(24)
    for interleaved in (False, True):
        there = apply_rope(x, cos, sin, interleaved=interleaved)
        torch.testing.assert_close(apply_rope(there, cos, sin, interleaved=interleaved, inverse=True), x)
        torch.testing.assert_close(there.norm(dim=-1), x.norm(dim=-1))


def test_scores_depend_on_distances_alone():
    q, k, (cos, sin) = torch.randn(1, 1, 1, 64), torch.randn(1, 1, 1, 64), tables(64)
    scores = []
    for shift in (0, 17, 400):
        places = (torch.tensor([shift + 30]), torch.tensor([shift]))
        turned = (apply_rope(x, cos, sin, positions=p) for x, p in zip((q, k), places, strict=True))
        scores.append(math.prod(turned, start=torch.ones(1)).sum().item())
    assert max(scores) - min(scores) < 1e-4


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_kernels)])
def test_position_a_million(backend, interleaved):
    """Angles are right to 1e-4 far from the origin, also those of the fastest pairs."""
    places = torch.tensor([999_999, 1_000_000, 3])
    inv_freq, _ = xformer_fast.rope_frequencies(128)
    cos, sin = xformer_fast.rope_tables(inv_freq, places)
    x = torch.zeros(1, 1, 3, 128)
    x[..., :: 2 if interleaved else 1] = 1.0
    if not interleaved:
        x[..., 64:] = 0.0
    out = apply_rope(x, cos, sin, interleaved=interleaved, backend=backend)
    a, b = (out[0, 0, :, 0::2], out[0, 0, :, 1::2]) if interleaved else out[0, 0].chunk(2, -1)
    for s, place in enumerate(places.tolist()):
        for k in range(64):
            angle = math.fmod(place * 10000.0 ** (-k / 64), 2 * math.pi)
            error = (math.atan2(b[s, k], a[s, k]) - angle) % (2 * math.pi)
            assert min(error, 2 * math.pi - error) < 1e-4


# ---- in place


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_kernels)])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided", "slice"])
def test_in_place(backend, layout):
    make = {
        "contiguous": lambda: torch.randn(2, 3, 21, 24),
        "transposed": lambda: torch.randn(2, 21, 3, 24).transpose(1, 2),
        "strided": lambda: torch.randn(2, 3, 21, 48)[..., ::2],
        "slice": lambda: torch.randn(2, 5, 30, 24)[:, 1:4, :21],
    }[layout]
    x, (cos, sin) = make(), tables(20)
    expected, version, pointer = apply_rope(x, cos, sin), x._version, x.data_ptr()
    assert apply_rope(x, cos, sin, inplace=True, backend=backend) is x
    assert x._version > version and x.data_ptr() == pointer
    torch.testing.assert_close(x, expected)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_kernels)])
@pytest.mark.parametrize("view", [False, True])
def test_in_place_gradient(backend, view):
    leaf, (cos, sin) = torch.randn(2, 3, 21, 24, requires_grad=True), tables(24)

    def loss(inplace, backend):
        y = leaf.sin()
        part = y[:, :2] if view else y
        turned = apply_rope(part, cos, sin, inplace=inplace, backend=backend)
        whole = y if inplace else (torch.cat((turned, y[:, 2:]), 1) if view else turned)
        return (whole**3).sum()  # keeps what it is given: the rotated tensor, which nothing may change

    ours = torch.autograd.grad(loss(True, backend), leaf)[0]
    torch.testing.assert_close(ours, torch.autograd.grad(loss(False, "reference"), leaf)[0])


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_kernels)])
def test_in_place_keeps_torch_s_rules(backend):
    cos, sin = tables(24)
    leaf = torch.randn(1, 1, 5, 24, requires_grad=True)
    before = leaf.detach().clone()
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
        apply_rope(leaf, cos, sin, inplace=True, backend=backend)
    assert torch.equal(leaf, before)
    with torch.no_grad():
        apply_rope(leaf, cos, sin, inplace=True, backend=backend)
    saved = leaf * 1
    out = saved.square()  # keeps `saved`
    apply_rope(saved, cos, sin, inplace=True, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    with pytest.raises(ValueError, match="expanded"):
        apply_rope(torch.randn(1, 1, 5, 24).expand(2, 3, 5, 24), cos, sin, inplace=True, backend=backend)


@needs_kernels
def test_in_place_under_inference_mode():
    cos, sin = tables(8)
    with torch.inference_mode():
        x = torch.randn(1, 2, 5, 8)
        expected = apply_rope(x, cos, sin)
        torch.testing.assert_close(apply_rope(x, cos, sin, inplace=True), expected)


# ---- what torch expects


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls.append((function, args))
        return function(*args, **(kwargs or {}))

    def ours(self):
        return [(function, args) for function, args in self.calls if function.namespace == "xformer_fast"]


@needs_kernels
def test_opcheck():
    x, (cos, sin) = torch.randn(2, 3, 9, 24), tables(16)
    places = torch.randint(0, 99, (3, 2, 9))
    rope = Rope(cos, sin, query_positions=places, key_positions=places, sections=(2, 5, 1))
    with Recorder() as recorder:
        apply_rope(x, cos, sin, positions=torch.arange(9), interleaved=True)
        apply_rope(x.transpose(1, 2).contiguous().transpose(1, 2), cos, sin, inverse=True)
        rope.rotate(x, x[:, :1])
        Rope(cos, sin).rotate_packed(x[0], x[0], *[torch.tensor([0, 3], dtype=torch.int32)] * 2)
        apply_rope(x.clone(), cos, sin, inplace=True)
    assert [f._schema.name.split("::")[1] for f, _ in recorder.ours()] == [
        "rope_cpu", "rope_cpu", "rope_pair_cpu", "rope_pair_cpu", "rope_cpu_",
    ]  # fmt: skip
    for function, args in recorder.ours():
        mutates = function._schema.is_mutable
        shape = (args[0].shape, args[1].shape)
        args = [
            a.detach().clone().requires_grad_(not mutates and a.shape in shape and a.dim() > 2)
            if isinstance(a, torch.Tensor) and a.is_floating_point()
            else a
            for a in args
        ]
        torch.library.opcheck(function, tuple(args))


@needs_kernels
def test_rotating_query_and_key_is_one_operator_a_direction_and_keeps_neither():
    q, k = (torch.randn(1, heads, 8, 16, requires_grad=True) for heads in (4, 2))
    rope = Rope(*tables(16))
    with Recorder() as recorder:
        turned = rope.rotate(q, k)
        kept = turned[0].grad_fn.saved_tensors
        torch.autograd.grad(turned, (q, k), [torch.ones_like(t) for t in turned])
    assert [f._schema.name for f, _ in recorder.ours()] == ["xformer_fast::rope_pair_cpu"] * 2
    assert not {t.data_ptr() for t in kept if t is not None} & {q.data_ptr(), k.data_ptr()}


@needs_kernels
@pytest.mark.parametrize("inplace", [False, True])
def test_compile_once_for_all_lengths(inplace):
    torch._dynamo.reset()
    cos, sin = tables(16)
    places = torch.randperm(99)

    def run(x, positions):
        return apply_rope(x * 1, cos, sin, positions=positions, interleaved=True, inplace=inplace)

    with torch._dynamo.config.patch(error_on_recompile=True):
        function = torch.compile(run, fullgraph=True, dynamic=True)
        for length in (25, 37, 50):
            x = torch.randn(2, 3, length, 24, requires_grad=True)
            results = []
            for run_ in (function, run):
                out = run_(x, places[:length])
                results.append((out, *torch.autograd.grad(out.square().sum(), x)))
            for ours, eager in zip(*results, strict=True):
                torch.testing.assert_close(ours, eager)


@needs_kernels
def test_compile_in_place_without_gradients():
    torch._dynamo.reset()
    cos, sin = tables(16)
    function = torch.compile(
        lambda x: apply_rope(x, cos, sin, inplace=True).square().sum(), fullgraph=True, dynamic=True
    )
    x = torch.randn(2, 3, 20, 24)
    expected = apply_rope(x, cos, sin)
    torch.testing.assert_close(function(x), expected.square().sum())
    torch.testing.assert_close(x, expected)


@needs_kernels
def test_gradients_of_any_order():
    x, (cos, sin) = torch.randn(1, 2, 6, 8, requires_grad=True), tables(8)

    def third(function, x, cos, sin):
        y = function(x, cos, sin).sin().sum()
        for _ in range(2):
            (grad,) = torch.autograd.grad(y, x, create_graph=True)
            y = grad.square().sum()
        return torch.autograd.grad(y, x)[0]

    exact = x.detach().double().requires_grad_()
    expected = third(reference.apply_rope, exact, cos.double(), sin.double())
    torch.testing.assert_close(third(apply_rope, x, cos, sin).double(), expected, rtol=1e-4, atol=1e-5)


@needs_kernels
def test_transforms():
    x, (cos, sin) = torch.randn(3, 1, 2, 6, 8), tables(8)
    ours = torch.func.grad(lambda x: apply_rope(x, cos, sin).sin().sum())(x[0])
    expected = torch.func.grad(lambda x: reference.apply_rope(x, cos, sin).sin().sum())(x[0])
    torch.testing.assert_close(ours, expected)
    batched = torch.func.vmap(lambda x: apply_rope(x, cos, sin))(x)
    torch.testing.assert_close(batched, torch.stack([apply_rope(one, cos, sin) for one in x]))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x[0], x[1])
        with pytest.raises(NotImplementedError, match="forward-mode"):
            apply_rope(dual, cos, sin)
        tangent = torch.autograd.forward_ad.unpack_dual(apply_rope(dual, cos, sin, backend="reference")).tangent
    torch.testing.assert_close(tangent, apply_rope(x[1], cos, sin))


@needs_kernels
def test_one_gradient_of_two():
    q, k = (torch.randn(1, heads, 8, 16, requires_grad=True) for heads in (4, 2))
    rope = Rope(*tables(16))
    first = rope.rotate(q, k)[0]
    (grad,) = torch.autograd.grad(first.square().sum(), q)
    torch.testing.assert_close(grad, 2 * q)  # a rotation keeps lengths
    assert torch.autograd.grad(rope.rotate(q, k)[0].sum(), k, allow_unused=True)[0] is None


def test_tables_that_require_grad_take_the_formula():
    x, (cos, sin) = torch.randn(1, 2, 6, 8), tables(8)
    learned = cos.requires_grad_()
    assert "reference runs" in xformer_fast.explain("apply_rope", x, learned, sin)
    (grad,) = torch.autograd.grad(apply_rope(x, learned, sin).sum(), learned)
    assert grad[:6].abs().sum() > 0 and not grad[6:].any()
    if dispatch.build_problem() is None:
        with pytest.raises(BackendUnavailable, match="cos or sin requires grad"):
            apply_rope(x, learned, sin, backend="cpu")


@needs_kernels
def test_autocast_leaves_dtypes_alone():
    x, (cos, sin) = torch.randn(1, 2, 6, 8), tables(8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(apply_rope(x, cos, sin), apply_rope(x, cos, sin))
        q, k = Rope(cos, sin).rotate(x, x.bfloat16())
    assert (q.dtype, k.dtype) == (torch.float32, torch.bfloat16)


def test_meta_tensors_have_the_shape():
    x, cos = torch.empty(2, 4, 7, 8, device="meta"), torch.empty(9, 3, device="meta")
    assert apply_rope(x, cos, cos).shape == x.shape


X, COS = torch.randn(2, 3, 9, 16), torch.ones(20, 8)
BAD = {
    "x_type": ((None, COS, COS), {}, TypeError, "x must be a torch.Tensor"),
    "x_dims": ((X[0], COS, COS), {}, ValueError, r"x must be \(B, H, S, D\)"),
    "x_dtype": ((X.long(), COS, COS), {}, TypeError, "x must be a float tensor"),
    "tables": ((X, COS, COS[:3]), {}, ValueError, "cos and sin must both be"),
    "tables_wide": ((X, torch.ones(20, 9), torch.ones(20, 9)), {}, ValueError, "rotate 18 channels, but x has 16"),
    "tables_short": ((X, COS[:8], COS[:8]), {}, ValueError, "8 positions, too few for 9"),
    "positions_dtype": ((X, COS, COS), {"positions": torch.zeros(9)}, TypeError, "positions must be int32"),
    "positions_shape": ((X, COS, COS), {"positions": torch.zeros(8).long()}, ValueError, "9 rows of 2 sequences"),
    "positions_batch": ((X, COS, COS), {"positions": torch.zeros(3, 9).long()}, ValueError, "9 rows of 2 sequences"),
    "positions_axes": ((X, COS, COS), {"positions": torch.zeros(2, 2, 9).long()}, ValueError, "needs sections"),
    "positions_large": ((X, COS, COS), {"positions": torch.arange(9) + 12}, ValueError, r"must lie in 0\.\.19"),
    "positions_negative": ((X, COS, COS), {"positions": torch.arange(9) - 1}, ValueError, r"must lie in 0\.\.19"),
    "sections": ((X, COS, COS), {"sections": (3, 4)}, ValueError, "sections must sum to R/2 = 8"),
    "device": ((X, COS.to("meta"), COS), {}, ValueError, "cos is on meta, x on cpu"),
    "backend": ((X, COS, COS), {"backend": "abacus"}, ValueError, "backend must be one of"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("backend", ["reference", None])
def test_bad_arguments(name, backend):
    arguments, options, error, message = BAD[name]
    with pytest.raises(error, match=message):
        apply_rope(*arguments, **{"backend": backend, **options})


# ---- Rope


@needs_kernels
@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_against_the_formula(interleaved):
    """Positions of query and key, given or not, dense and packed."""
    q, k, (cos, sin) = torch.randn(2, 4, 7, 24), torch.randn(2, 2, 19, 24), tables(16)
    options = {"interleaved": interleaved}
    expected = [
        reference.apply_rope(q, cos, sin, positions=torch.arange(12, 19), **options),
        reference.apply_rope(k, cos, sin, positions=torch.arange(19), **options),
    ]
    for ours, right in zip(Rope(cos, sin, **options).rotate(q, k), expected, strict=True):
        torch.testing.assert_close(ours, right)
    top_left = Rope(cos, sin, **options).rotate(q, k, top_left=True)[0]
    torch.testing.assert_close(top_left, reference.apply_rope(q, cos, sin, **options))
    cu = torch.tensor([0, 3, 7], dtype=torch.int32)
    packed = q[0].transpose(0, 1)
    turned, _ = Rope(cos, sin, **options).rotate_packed(packed, packed, cu, cu)
    places = torch.tensor([0, 1, 2, 0, 1, 2, 3])
    torch.testing.assert_close(
        turned.transpose(0, 1)[None], reference.apply_rope(q[:1], cos, sin, positions=places, **options)
    )


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_kernels)])
def test_new_tokens_stand_behind_the_cached_ones(backend):
    q, k, (cos, sin) = torch.randn(2, 4, 3, 24), torch.randn(2, 2, 3, 24), tables(16)
    first = torch.tensor([5, 0], dtype=torch.int32)
    places = torch.tensor([[5, 6, 7], [0, 1, 2]])
    turned_q, turned_k = Rope(cos, sin).rotate_tokens(q, k, first, backend=backend)
    torch.testing.assert_close(turned_q, reference.apply_rope(q, cos, sin, positions=places))
    torch.testing.assert_close(turned_k, reference.apply_rope(k, cos, sin, positions=places))
    alone, none = Rope(cos, sin).rotate_tokens(q, None, first, backend=backend)
    assert none is None and torch.equal(alone, turned_q)
    places = torch.tensor([[5, 6, 7], [0, 0, 1]])  # a token at -1 sees no key, those behind it stand where they stand
    turned_q, _ = Rope(cos, sin).rotate_tokens(q, None, torch.tensor([5, -1]), backend=backend)
    torch.testing.assert_close(turned_q, reference.apply_rope(q, cos, sin, positions=places))


@pytest.mark.parametrize("sections", [(16, 24, 24), (8, 12, 12), (3, 0, 5)])
def test_sections_equal_qwen2_vl(sections):
    qwen = pytest.importorskip("transformers.models.qwen2_vl.modeling_qwen2_vl")
    from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig

    pairs = sum(sections)
    parameters = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections)}
    config = Qwen2VLTextConfig(hidden_size=8 * pairs, num_attention_heads=4, rope_parameters=parameters)
    q, k, positions = (
        torch.randn(2, 4, 21, 2 * pairs),
        torch.randn(2, 2, 21, 2 * pairs),
        torch.randint(0, 300, (3, 2, 21)),
    )
    cos, sin = qwen.Qwen2VLRotaryEmbedding(config)(q, positions)
    expected = qwen.apply_rotary_pos_emb(q, k, cos, sin)
    inv_freq, _ = xformer_fast.rope_frequencies(2 * pairs, scaling=parameters)
    tables_ = xformer_fast.rope_tables(inv_freq, 300)
    rope = Rope(*tables_, query_positions=positions, key_positions=positions, sections=sections)
    for ours, right in zip(rope.rotate(q, k), expected, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-4)  # its angles are float32


def test_two_axes_of_an_image():
    """A ViT's axial RoPE: half of the angles follow the row, half the column."""
    height, width, dim = 5, 7, 32
    inv_freq, _ = xformer_fast.rope_frequencies(dim // 2)
    cos, sin = xformer_fast.rope_tables(inv_freq.repeat(2), max(height, width))
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    positions = torch.stack((y.flatten(), x.flatten()))[:, None]  # (2, 1, H·W)
    rope = Rope(cos, sin, query_positions=positions, key_positions=positions, sections=(dim // 4, dim // 4))
    q = torch.randn(2, 3, height * width, dim)
    turned, _ = rope.rotate(q, q)
    angles = torch.cat((y.flatten()[:, None] * inv_freq, x.flatten()[:, None] * inv_freq), -1).float()
    a, b = q.chunk(2, -1)
    expected = torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), -1)
    torch.testing.assert_close(turned, expected)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_rotates_by_it(dtype):
    q, k, v = (torch.randn(2, heads, 33, 32).to(dtype).requires_grad_() for heads in (4, 2, 2))
    rope = Rope(*tables(32))
    fused = xformer_fast.attention(q, k, v, causal=True, rope=rope)
    turned = [apply_rope(x, rope.cos, rope.sin) for x in (q, k)]
    composed = xformer_fast.attention(*turned, v, causal=True)
    assert torch.equal(fused, composed)
    ours, theirs = (torch.autograd.grad(out.square().sum(), (q, k, v)) for out in (fused, composed))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


SEEN_FROM_BEFORE = {
    "all": {},
    "causal": {"causal": True},
    "window": {"window": (3, 2)},
    "causal_window": {"window": (4, 0)},
    "globals": {"window": (1, 1), "global_keys": 1},
    "top_left": {"causal": "top_left"},
}


def results_and_gradients(function, tensors):
    tensors = [t.clone().requires_grad_() for t in tensors]
    out = function(*tensors)
    return [out, *torch.autograd.grad(out, tensors, torch.ones_like(out).cumsum(-1))]


@needs_kernels
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("lengths", [(5, 0), (5, 3), (9, 2), (1, 0)])
@pytest.mark.parametrize("options", SEEN_FROM_BEFORE)
def test_queries_before_the_first_key(options, lengths, interleaved):
    """As if every position were 20 more: scores depend on distances alone."""
    (len_q, len_k), options = lengths, SEEN_FROM_BEFORE[options]
    tensors = [torch.randn(2, heads, length, 24) for heads, length in ((4, len_q), (2, len_k), (2, len_k))]
    first = 20 + (0 if options.get("causal") == "top_left" else len_k - len_q)
    given = {"query_positions": torch.arange(first, first + len_q), "key_positions": torch.arange(20, 20 + len_k)}

    def run(backend, dtype, tables, **given):
        rope = Rope(*(t.to(dtype) for t in tables), interleaved=interleaved, **given)
        return results_and_gradients(
            lambda q, k, v: xformer_fast.attention(q, k, v, rope=rope, backend=backend, **options),
            [t.to(dtype) for t in tensors],
        )

    exact = run("reference", torch.float64, tables(16), **given)
    naive = run("reference", torch.float32, tables(16), **given)
    for backend in ("cpu", "reference"):
        for ours, right, plain in zip(run(backend, torch.float32, tables(16)), exact, naive, strict=True):
            check_close(ours, right, plain, magnitude=10.0)


@needs_kernels
@pytest.mark.parametrize("options", [name for name in SEEN_FROM_BEFORE if name != "globals"])
def test_packed_queries_before_the_first_key(options):
    """A sequence with fewer keys than queries, one without a key, and one that has more keys."""
    options, (cos, sin) = SEEN_FROM_BEFORE[options], tables(16)
    lengths_q, lengths_k = (5, 4, 3), (2, 0, 7)
    cu_q, cu_k = (torch.tensor([0, *n]).cumsum(0).int() for n in (lengths_q, lengths_k))
    tensors = [torch.randn(sum(n), heads, 24) for heads, n in ((4, lengths_q), (2, lengths_k), (2, lengths_k))]

    def packed(backend, rope=None):
        rope = rope or Rope(cos, sin)
        return lambda q, k, v: xformer_fast.varlen_attention(
            q, k, v, cu_q, cu_k, 5, 7, rope=rope, backend=backend, **options
        )

    def one_by_one(q, k, v):
        outs = []
        for parts in zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True):
            parts = (t.transpose(0, 1)[None] for t in parts)
            outs.append(xformer_fast.attention(*parts, rope=Rope(cos, sin), **options)[0].transpose(0, 1))
        return torch.cat(outs)

    expected = results_and_gradients(one_by_one, tensors)
    compiled = torch.compile(packed(None), fullgraph=True, dynamic=True, backend="aot_eager")
    for function in (packed("cpu"), packed("reference"), compiled):
        for ours, right in zip(results_and_gradients(function, tensors), expected, strict=True):
            torch.testing.assert_close(ours, right)
    with pytest.raises(ValueError, match="rope: "):  # too short for seven keys
        packed("cpu", Rope(cos[:6], sin[:6]))(*tensors)


@needs_kernels
def test_tables_too_short_for_queries_before_the_first_key():
    q, k = torch.randn(1, 2, 9, 8), torch.randn(1, 2, 3, 8)
    rope = Rope(*(t[:3] for t in tables(8)))
    assert xformer_fast.attention(q, k, k, rope=rope, causal=True).shape == q.shape
    assert xformer_fast.attention(q, k, k, rope=rope, window=(-1, 2)).shape == q.shape
    with pytest.raises(ValueError, match="3 positions are too short for a query 6 before the first key"):
        xformer_fast.attention(q, k, k, rope=rope)
    packed = [t[0].transpose(0, 1) for t in (q, k, k)]
    cu_q, cu_k = (torch.tensor([0, n], dtype=torch.int32) for n in (9, 3))
    with pytest.raises(ValueError, match="3 positions are too short for a query 6 before the first key"):
        xformer_fast.varlen_attention(*packed, cu_q, cu_k, 9, 3, rope=rope)


# ---- frequencies

SCALINGS = [
    {"rope_type": "linear", "factor": 4.0},
    {"type": "linear", "factor": 1.7},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 8.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048},
    {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 0.7,
     "mscale_all_dim": 1.0, "beta_fast": 16.0, "beta_slow": 2.0},
    {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False},
    {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 1024, "attention_factor": 0.9},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 8192},
    {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 2.0, "high_freq_factor": 3.0,
     "original_max_position_embeddings": 1000},
    {"rope_type": "longrope", "original_max_position_embeddings": 1024},
    {"rope_type": "longrope", "original_max_position_embeddings": 1024, "factor": 16.0},
    {"rope_type": "longrope", "original_max_position_embeddings": 4096, "attention_factor": 1.19},
    {"rope_type": "proportional", "partial_rotary_factor": 0.25},
    {"rope_type": "proportional", "partial_rotary_factor": 0.7, "factor": 2.0},
]  # fmt: skip


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: f"{s.get('rope_type', s.get('type'))}-{s.get('factor')}")
@pytest.mark.parametrize("head_dim, theta", [(64, 10000.0), (128, 500000.0), (80, 1e6)])
@pytest.mark.parametrize("seq_len", [None, 500, 7000])
def test_scalings_equal_transformers(scaling, head_dim, theta, seq_len):
    pytest.importorskip("transformers")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = dict(scaling)
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind == "longrope":
        scaling["short_factor"] = (1 + torch.rand(head_dim // 2)).tolist()
        scaling["long_factor"] = (4 + 30 * torch.rand(head_dim // 2)).tolist()
    config = LlamaConfig(
        hidden_size=4 * head_dim, num_attention_heads=4, head_dim=head_dim, max_position_embeddings=4096,
        rope_parameters={"rope_theta": theta, **scaling},
    )  # fmt: skip
    expected, factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=seq_len)
    inv_freq, ours = xformer_fast.rope_frequencies(
        head_dim, scaling=config.rope_parameters | scaling, seq_len=seq_len, max_position_embeddings=4096
    )
    assert inv_freq.dtype == torch.float64 and inv_freq.shape == expected.shape
    error = (inv_freq - expected.double()).abs()
    assert error.max() < 1e-6
    assert (error <= 2e-6 * expected).all()  # theirs is float32, which in interpolation errs by up to 1.2e-6 of it
    assert abs(ours - factor) < 1e-6


def test_default_frequencies_equal_transformers():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    from transformers import LlamaConfig

    config = LlamaConfig(hidden_size=256, num_attention_heads=4, head_dim=64)
    module = llama.LlamaRotaryEmbedding(config)
    inv_freq, factor = xformer_fast.rope_frequencies(64, scaling=config.rope_parameters)
    torch.testing.assert_close(inv_freq.float(), module.inv_freq, rtol=1e-6, atol=0)
    q, places = torch.randn(1, 4, 50, 64), torch.arange(50)[None]
    expected, _ = llama.apply_rotary_pos_emb(q, q, *module(q, places))
    cos, sin = xformer_fast.rope_tables(inv_freq, 50, factor=factor)
    torch.testing.assert_close(apply_rope(q, cos, sin), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((7, None), "rotary_dim must be even"),
        ((8, {"rope_type": "spiral"}), "rope_type must be one of default, linear"),
        ((8, {"rope_type": "linear"}), "'linear' needs factor"),
        ((8, {"rope_type": "dynamic", "factor": 2.0}), "an argument: .* needs max_position_embeddings"),
        ((2, {"rope_type": "dynamic", "factor": 2.0}), "rotary_dim above 2"),
        (
            (8, {"rope_type": "longrope", "short_factor": [1.0], "original_max_position_embeddings": 9, "factor": 2.0}),
            "short_factor must hold rotary_dim / 2 = 4 numbers, got 1",
        ),
    ],
)
def test_bad_scalings(arguments, message):
    rotary_dim, scaling = arguments
    with pytest.raises(ValueError, match=message):
        xformer_fast.rope_frequencies(rotary_dim, scaling=scaling)
