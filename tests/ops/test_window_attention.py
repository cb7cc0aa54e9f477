"""Windowed attention: every instruction set against the formula in float64, the formula against the models' code."""

import pytest
import torch
import torch.nn.functional as F
from attention_cases import unwritten_memory_is_nan
from marks import needs_kernels
from window_cases import compare, draw, evaluate, on_backend

import xformer_fast
from xformer_fast import BackendUnavailable, reference, window_attention
from xformer_fast.testing import check_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


# ---- the kernel


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_calls(isa, dtype):
    """105 draws an instruction set, 35 a dtype: the output and all gradients."""
    for seed in range(35 * DTYPES.index(dtype), 35 * DTYPES.index(dtype) + 35):
        case = draw(seed, dtype)
        with unwritten_memory_is_nan():
            results = evaluate(case, on_backend("cpu"))
        compare(case, results, isa)


@needs_kernels
@pytest.mark.parametrize("seed", [2040, 3882, 3915, 4710])
def test_gradients_that_cancel(isa, seed):
    """Draws in which sums one number after the other lose too much: of a row's weights, of the logit scale's terms."""
    case = draw(seed, torch.float32)
    compare(case, evaluate(case, on_backend("cpu")), isa)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_windows(isa, dtype):
    """More queries than a tile holds, shifted, with the gradient of the table."""
    torch.manual_seed(0)
    window, heads = (8, 7, 7), 2
    q, k, v = (t.requires_grad_() for t in torch.randn(1, 16, 7, 14, 3, heads, 32).to(dtype).unbind(4))
    table = torch.randn(15 * 13 * 13, heads).to(dtype).requires_grad_()
    grad = torch.randn(q.shape).to(dtype)

    def run(function, *tensors):
        tensors = [t.detach().requires_grad_() for t in tensors]
        out = function(*tensors[:3], window, shift=(4, 0, 3), relative_bias_table=tensors[3])
        return [out, *torch.autograd.grad(out, tensors, grad.to(out.dtype))]

    exact = run(reference.window_attention, *(t.double() for t in (q, k, v, table)))
    naive = run(reference.window_attention, q, k, v, table)
    for result, truth, plain in zip(run(on_backend("cpu"), q, k, v, table), exact, naive, strict=True):
        check_close(result, truth, plain, dtype=dtype)


@needs_kernels
def test_results_do_not_depend_on_threads():
    case = draw(1, torch.float32)
    case.tensors["query"], case.tensors["key"], case.tensors["value"] = torch.randn(3, 4, 28, 28, 2, 32).unbind(0)
    case.window, case.options, case.grad = (7, 7), {"shift": 3}, torch.randn(4, 28, 28, 2, 32)
    case.tensors = {n: case.tensors[n] for n in ("query", "key", "value")}
    case.tensors |= {"relative_bias_table": torch.randn(169, 2), "logit_scale": torch.rand(2) * 10}
    results, threads = [], torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(evaluate(case, on_backend("cpu")))
    torch.set_num_threads(threads)
    for name, first in results[0].items():
        assert all(torch.equal(first, other[name]) for other in results[1:]), name


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_kernels)])
def test_zero_rows_of_cosine_attention(backend):
    q, k, v = torch.randn(3, 1, 4, 4, 2, 8).unbind(0)
    q[0, 1, 2] = 0
    k[0, 0, 3] = 0
    leaves = [t.requires_grad_() for t in (q, k, v, torch.tensor([0.0, 7.0]))]
    out = window_attention(*leaves[:3], 4, logit_scale=leaves[3], backend=backend)
    assert all(g.isfinite().all() for g in (out, *torch.autograd.grad(out.square().sum(), leaves)))


@needs_kernels
@pytest.mark.parametrize("shape", [(0, 4, 4, 2, 8), (2, 0, 4, 2, 8)])
def test_empty_maps(shape):
    leaves = [torch.randn(shape, requires_grad=True) for _ in range(3)] + [torch.randn(49, 2, requires_grad=True)]
    out = window_attention(*leaves[:3], 4, relative_bias_table=leaves[3], backend="cpu")
    assert out.shape == shape
    assert not torch.autograd.grad(out.sum(), leaves)[3].any()


@needs_kernels
def test_memory_order_is_query_s():
    q, k, v = (torch.randn(2, 3, 8, 12, 16).movedim(1, -2) for _ in range(3))
    assert window_attention(q, k, v, 4, backend="cpu").stride() == q.stride()
    packed = torch.randn(2, 8, 12, 3, 3, 16)
    assert window_attention(*packed.unbind(3), 4, backend="cpu").is_contiguous()


# ---- the formula


def swin_layer(x, window, heads):
    from transformers.models.swin.configuration_swin import SwinConfig
    from transformers.models.swin.modeling_swin import SwinLayer

    config = SwinConfig(
        embed_dim=x.shape[-1], window_size=window, attention_probs_dropout_prob=0.0, drop_path_rate=0.0, qkv_bias=True
    )
    config._attn_implementation = "eager"
    return SwinLayer(config, x.shape[-1], tuple(x.shape[1:3]), heads, shift_size=window // 2).double().eval()


def test_shift_mask_and_table_are_swin_s():
    """Hugging Face's Swin layer: roll, partition, index of the table, region mask."""
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    heads, window = 2, 4
    x = torch.randn(2, 8, 12, 16, dtype=torch.float64)
    layer = swin_layer(x, window, heads)
    attention = layer.attention
    inner = attention.self if hasattr(attention, "self") else attention
    tables = [p for n, p in inner.named_parameters() if n.endswith("relative_position_bias_table")]
    with torch.no_grad():
        tables[0].normal_()
    seen = {}
    project = attention.output if hasattr(attention, "output") else attention.o_proj
    project.register_forward_pre_hook(lambda _, args: seen.update(context=args[0]))
    with torch.no_grad():
        layer(x.flatten(1, 2), (8, 12))
        hidden = layer.layernorm_before(x)
        names = ("query", "key", "value") if hasattr(inner, "query") else ("q_proj", "k_proj", "v_proj")
        q, k, v = (getattr(inner, name)(hidden).unflatten(-1, (heads, -1)) for name in names)
        out = window_attention(q, k, v, window, shift=window // 2, relative_bias_table=tables[0])
    rolled = torch.roll(out, (-2, -2), (1, 2))
    context = seen["context"].reshape(2, 2, 3, window, window, 16).transpose(2, 3).reshape(2, 8, 12, 16)
    torch.testing.assert_close(rolled.flatten(-2), context)


def test_grid_is_maxvit_s():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 8, 12, 2, 8, dtype=torch.float64).unbind(0)
    g = 4

    def parts(x):
        batch, height, width, heads, dim = x.shape
        x = x.view(batch, g, height // g, g, width // g, heads, dim).permute(0, 2, 4, 5, 1, 3, 6)
        return x.reshape(batch, height // g, width // g, heads, g * g, dim)

    out = F.scaled_dot_product_attention(*map(parts, (q, k, v))).unflatten(4, (g, g))
    out = out.permute(0, 4, 1, 5, 2, 3, 6).reshape(2, 8, 12, 2, 8)
    torch.testing.assert_close(window_attention(q, k, v, g, partition="grid"), out)


def test_cosine_attention_is_swin_v2_s():
    q, k, v = torch.randn(3, 1, 4, 4, 2, 8, dtype=torch.float64).unbind(0)
    scale = torch.tensor([3.0, 11.0], dtype=torch.float64)
    bias = torch.randn(2, 16, 16, dtype=torch.float64)
    query, key, value = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
    scores = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).mT * scale[:, None, None] + bias
    expected = (scores.softmax(-1) @ value).transpose(1, 2).unflatten(1, (4, 4))
    torch.testing.assert_close(window_attention(q, k, v, 4, logit_scale=scale, bias=bias), expected)


# ---- what torch expects


def leaves_of(case):
    return [t.detach().clone().requires_grad_() for t in case.tensors.values()]


def example(**extra):
    torch.manual_seed(3)
    tensors = {n: torch.randn(2, 4, 8, 2, 16) for n in ("query", "key", "value")}
    tensors |= {"relative_bias_table": torch.randn(49, 2), "bias": torch.randn(2, 16, 16), "logit_scale": torch.rand(2)}
    return {n: t.requires_grad_() for n, t in tensors.items()} | extra


@needs_kernels
def test_opcheck():
    inputs = [t.detach() for t in example().values()]
    options = ([4, 4], [1, 2], False, 0.3)
    leaves = [t.clone().requires_grad_() for t in inputs]
    torch.library.opcheck(torch.ops.xformer_fast.window_attention_cpu.default, (*leaves, *options))
    backward = torch.ops.xformer_fast.window_attention_cpu_backward.default
    torch.library.opcheck(backward, (torch.randn(2, 4, 8, 2, 16), *inputs, *options, True, True, True))


@needs_kernels
def test_compile():
    torch._dynamo.reset()

    def run(query, key, value, relative_bias_table):
        return window_attention(query, key, value, 4, shift=1, relative_bias_table=relative_bias_table)

    function = torch.compile(run, fullgraph=True, dynamic=True)
    for batch in (2, 3):
        leaves = [torch.randn(batch, 4, 8, 2, 16, requires_grad=True) for _ in range(3)]
        leaves.append(torch.randn(49, 2, requires_grad=True))
        results = []
        for each in (function, run):
            out = each(*leaves)
            results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs)


@needs_kernels
def test_double_backward():
    results = []
    for backend in ("cpu", "reference"):
        inputs = example()
        leaves = list(inputs.values())
        query, key, value, *_ = leaves
        rest = {n: t for n, t in inputs.items() if n not in ("query", "key", "value")}
        out = window_attention(query, key, value, 4, shift=(0, 2), **rest, backend=backend)
        first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max().item())


@needs_kernels
def test_torch_func_autocast_and_forward_ad():
    q, k, v = torch.randn(3, 2, 4, 4, 1, 8).unbind(0)
    grad = torch.func.grad(lambda q: window_attention(q, k, v, 4, backend="cpu").sum())(q)
    expected = torch.func.grad(lambda q: window_attention(q, k, v, 4, backend="reference").sum())(q)
    torch.testing.assert_close(grad, expected, atol=1e-5, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert window_attention(q, k, v, 4).dtype == torch.bfloat16
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, q)
        with pytest.raises(NotImplementedError, match="forward-mode"):
            window_attention(dual, k, v, 4, backend="cpu")


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"window_size": 3}, ValueError, "pad the map before the projection"),
        ({"window_size": (4, 4, 4)}, ValueError, "window_size must be an int or 2"),
        ({"window_size": 4.0}, TypeError, "window_size"),
        ({"shift": 4}, ValueError, "shift must lie in 0..window_size - 1"),
        ({"shift": 1, "partition": "grid"}, ValueError, "shift must be 0"),
        ({"partition": "block"}, ValueError, "partition"),
        ({"scale": 0.5}, ValueError, "scale must be None with logit_scale"),
        ({"relative_bias_table": torch.zeros(49, 3)}, ValueError, "relative_bias_table must have shape"),
        ({"bias": torch.zeros(2, 16, 15)}, ValueError, "bias must have shape"),
        ({"logit_scale": torch.zeros(2, 1, 1)}, ValueError, "logit_scale must have shape"),
        ({"logit_scale": torch.zeros(2, dtype=torch.int64)}, TypeError, "logit_scale"),
        ({"key": torch.zeros(2, 4, 4, 2, 16)}, ValueError, "key must be"),
        ({"value": torch.zeros(2, 4, 8, 2, 16).half()}, TypeError, "value is"),
        ({"query": torch.zeros(2, 4, 16)}, ValueError, "one to three axes"),
        ({"query": [1.0]}, TypeError, "query must be a torch.Tensor"),
    ],
    ids=lambda x: str(x) if isinstance(x, str) else None,
)
def test_errors(change, error, message):
    with pytest.raises(error, match=message):
        window_attention(**example(window_size=4) | change)


def test_backends():
    inputs = {n: t.detach().double() for n, t in example().items()}
    assert "window_attention: reference runs" in xformer_fast.explain("window_attention", **inputs, window_size=4)
    with pytest.raises(BackendUnavailable, match="float64"):
        window_attention(**inputs, window_size=4, backend="cpu")
