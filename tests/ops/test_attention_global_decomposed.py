"""`global_keys=` and `decomposed_bias=` of `attention`: formulas written apart, Hugging Face's models, edges."""

import math

import pytest
import torch
from attention_cases import check, draw, evaluate, on_backend, truth_and_naive, unwritten_memory_is_nan
from marks import needs_kernels

import xformer_fast
from xformer_fast import build_info, dispatch, reference
from xformer_fast.testing import check_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ISAS = build_info.usable_isa_levels() if dispatch.build_problem() is None else []


@pytest.fixture(params=[*(f"cpu-{isa}" for isa in ISAS), "reference"])
def backend(request, monkeypatch):
    name, _, isa = request.param.partition("-")
    if isa:
        monkeypatch.setenv("XFORMER_FAST_ISA", isa)
    with unwritten_memory_is_nan():
        yield name


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype).requires_grad_()


def qkv(batch, heads, kv_heads, len_q, len_k, dim, dtype=torch.float32):
    torch.manual_seed(0)
    return [normal(batch, h, n, dim, dtype=dtype) for h, n in ((heads, len_q), (kv_heads, len_k), (kv_heads, len_k))]


def with_gradients(run, inputs):
    """The result of run(*inputs) and its gradients, for the same gradient of the result at every call."""
    out = run(*inputs)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, inputs, weight)]


def agree(backend, inputs, formula, call):
    """A call and all gradients by the tolerance rule: `formula` is the truth in float64, naive in the inputs' dtype."""
    truth = with_gradients(formula, [t.detach().double().requires_grad_() for t in inputs])
    naive = with_gradients(formula, inputs)
    for i, (got, exact, plain) in enumerate(zip(with_gradients(call, inputs), truth, naive, strict=True)):
        check_close(got, exact, plain, f"{backend} result {i}", dtype=inputs[0].dtype)


def dense(q, k, v, bias):
    """softmax(q k^T / sqrt(D) + bias) v, key and value heads repeated."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) * q.shape[-1] ** -0.5 + bias
    return torch.softmax(scores, -1).to(v.dtype) @ v


# ---- global keys


def brute_force_keep(len_q, len_k, window, named, causal, limit):
    """Which pairs Longformer keeps, one at a time."""
    keep = torch.zeros(len_q, len_k, dtype=torch.bool)
    for i in range(len_q):
        p = i if causal == "top_left" else i + len_k - len_q
        for j in range(limit):
            inside = (window[0] < 0 or j >= p - window[0]) and (window[1] < 0 or j <= p + window[1])
            keep[i, j] = (inside or j in named) and not (causal and j > p)
    return keep


WINDOWS = [(4, 4), (7, 0), (0, 0), (-1, 3), (5, -1), (40, 40)]


@pytest.mark.parametrize("window, dtype", [*zip(WINDOWS, DTYPES * 2, strict=True)], ids=str)
@pytest.mark.parametrize("causal", [False, True, "top_left"])
def test_longformer_written_out(backend, window, causal, dtype):
    inputs = qkv(2, 4, 2, 45, 53, 24, dtype)
    keys = torch.tensor([[0, 17, 52, 17, -1, 30], [41, -1, -1, -1, -1, 3]])
    lengths = [53, 40]
    keep = torch.stack(
        [
            brute_force_keep(45, 53, window, row, causal, n)
            for row, n in zip(keys.tolist(), lengths, strict=True)
        ]
    )[:, None]  # fmt: skip
    seen = keep.any(-1, keepdim=True)

    def formula(q, k, v):
        bias = torch.zeros(keep.shape).masked_fill(~keep, -math.inf).masked_fill(~seen, 0)
        return dense(q, k, v, bias.to(torch.promote_types(q.dtype, torch.float32))) * seen

    def call(q, k, v):
        return xformer_fast.attention(
            q, k, v, window=window, global_keys=keys, causal=causal, key_lengths=torch.tensor(lengths), backend=backend
        )

    agree(backend, inputs, formula, call)


def test_what_names_the_same_keys_gives_the_same_bits(backend):
    """Repetitions, order, -1, dtype, a row for all: none of them counts."""
    inputs = qkv(2, 2, 1, 70, 80, 16)
    named = [0, 1, 2, 60]
    forms = [
        torch.tensor(named),
        torch.tensor([60, 2, 0, 1, 0, 60, -1], dtype=torch.int32),
        torch.tensor([named, named]).flip(1),
        torch.tensor([[-1, 60, 60, 2, 1, 0], [0, 1, -1, 2, 60, 60]]),
        torch.tensor([[60, 0, 2, 1]]).expand(2, -1),
    ]
    results = [
        with_gradients(
            lambda q, k, v, keys=keys: xformer_fast.attention(
                q, k, v, window=(5, 5), global_keys=keys, backend=backend
            ),
            inputs,
        )
        for keys in forms
    ]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


@pytest.mark.parametrize("count", [0, 1, 3, 30, 99])
def test_a_count_is_the_first_keys(backend, count):
    q, k, v = qkv(1, 2, 2, 20, 30, 8)
    out = xformer_fast.attention(q, k, v, window=(2, 0), causal=True, global_keys=count, backend=backend)
    keys = torch.arange(min(count, 30))
    listed = xformer_fast.attention(q, k, v, window=(2, 0), causal=True, global_keys=keys, backend=backend)
    assert torch.equal(out, listed)
    if count >= 30:
        torch.testing.assert_close(out, xformer_fast.attention(q, k, v, causal=True, backend=backend))


@pytest.mark.parametrize("causal", [False, True])
def test_without_a_window_nothing_changes(backend, causal):
    q, k, v = qkv(1, 2, 2, 20, 30, 8)
    plain = xformer_fast.attention(q, k, v, causal=causal, backend=backend)
    keys = torch.tensor([3, 29])
    assert torch.equal(xformer_fast.attention(q, k, v, causal=causal, global_keys=keys, backend=backend), plain)


def test_more_global_keys_than_a_block(backend):
    inputs = qkv(1, 2, 1, 90, 700, 16)
    keys = torch.randperm(700)[:600]
    keep = torch.stack([(torch.arange(700) >= i + 610 - 3) & (torch.arange(700) <= i + 610 + 9) for i in range(90)])
    keep[:, keys] = True
    bias = torch.zeros(90, 700, dtype=torch.float64).masked_fill(~keep, -math.inf)
    agree(
        backend,
        inputs,
        lambda q, k, v: dense(q, k, v, bias.to(q.dtype)),
        lambda q, k, v: xformer_fast.attention(q, k, v, window=(3, 9), global_keys=keys, backend=backend),
    )


def test_padding_is_not_global(backend):
    """A key past key_lengths is padding though it is named, whatever it holds."""
    lengths, keys = torch.tensor([5, 0, 12]), torch.tensor([2, 8])
    results = []
    for poison in (0.0, math.nan):
        q, k, v = (t.detach().clone() for t in qkv(3, 2, 2, 9, 12, 8))
        for b, n in enumerate(lengths):
            k[b, :, n:], v[b, :, n:] = poison, poison
        inputs = [t.requires_grad_() for t in (q, k, v)]
        results.append(
            with_gradients(
                lambda q, k, v: xformer_fast.attention(
                    q, k, v, window=(1, 1), global_keys=keys, key_lengths=lengths, backend=backend
                ),
                inputs,
            )
        )
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    out, _, grad_key, grad_value = results[0]
    assert not out[1].any() and not grad_key[0, :, 5:].any() and not grad_value[0, :, 5:].any()
    assert grad_value[0, :, 2].any() and grad_value[2, :, 8].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_of_a_global_key_is_that_of_its_index(backend, dtype):
    """Uniform scores and one-hot values show each weight: its zeros are those of `reference.dropout_mask`."""
    len_q, len_k = 37, 61
    q, k = torch.zeros(2, 3, len_q, 8, dtype=dtype), torch.zeros(2, 3, len_k, 8, dtype=dtype)
    v = torch.eye(len_k, dtype=dtype).expand(2, 3, len_k, len_k)
    keys = torch.tensor([1, 2, 3, 30, 58, 60])
    plain = xformer_fast.attention(q, k, v, window=(4, 2), global_keys=keys, backend=backend)
    torch.manual_seed(5)
    out = xformer_fast.attention(q, k, v, window=(4, 2), global_keys=keys, dropout_p=0.5, backend=backend)
    torch.manual_seed(5)
    kept = reference.dropout_mask(reference.draw_seed("cpu"), 0.5, 2, 3, len_q, len_k)
    keep = plain != 0
    assert keep[..., keys].all()
    assert torch.equal(out != 0, kept & keep)


def test_global_keys_need_memory_of_their_number():
    """Nothing of size Sq x Sk, in either direction."""
    length = 3000
    q, k, v = qkv(1, 1, 1, length, length, 8)
    with torch.profiler.profile(profile_memory=True) as profile:
        xformer_fast.attention(q, k, v, window=(64, 64), global_keys=4).sum().backward()
    assert max(event.self_cpu_memory_usage for event in profile.events()) < length * length


def test_hugging_face_longformer():
    """The rows of ordinary tokens; global tokens' own rows are projected apart there."""
    longformer = pytest.importorskip("transformers.models.longformer.modeling_longformer")
    torch.manual_seed(0)
    width, heads, length, one_sided = 32, 4, 48, 4
    config = longformer.LongformerConfig(
        hidden_size=width, num_attention_heads=heads, attention_window=[2 * one_sided], num_hidden_layers=1,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    layer = longformer.LongformerSelfAttention(config, 0).eval()
    hidden = torch.randn(2, length, width)
    is_global = torch.zeros(2, length, dtype=torch.bool)
    is_global[0, [0, 3, 30]], is_global[1, 20] = True, True
    lengths = torch.tensor([length, 37])
    padding = torch.arange(length) >= lengths[:, None]
    mask = (is_global * 10000.0).masked_fill(padding, -10000.0)
    expected = layer(
        hidden, mask, is_index_masked=padding, is_index_global_attn=is_global, is_global_attn=True,
    )[0]  # fmt: skip
    q, k, v = (
        project(hidden).unflatten(-1, (heads, -1)).transpose(1, 2) for project in (layer.query, layer.key, layer.value)
    )
    keys = torch.tensor([[0, 3, 30], [20, -1, -1]])
    out = xformer_fast.attention(
        q, k, v, window=(one_sided, one_sided), global_keys=keys, key_lengths=lengths
    ).transpose(1, 2).flatten(2)  # fmt: skip
    ordinary = ~is_global & ~padding
    torch.testing.assert_close(out[ordinary], expected[ordinary])


# ---- decomposed bias


def spread(rel_h, rel_w):
    """The bias of every pair that a decomposed one stands for, written out."""
    return rel_h.repeat_interleave(rel_w.shape[-1], -1) + rel_w.repeat(1, 1, 1, rel_h.shape[-1])


MAPS = [(1, 1), (1, 37), (37, 1), (14, 14), (3, 100), (100, 3)]


@pytest.mark.parametrize(
    "shape, dtype", [*zip(MAPS, DTYPES * 2, strict=True), *(((5, 130), dtype) for dtype in DTYPES)], ids=str
)
def test_decomposed_bias_is_the_bias_it_stands_for(backend, shape, dtype):
    """A float32 bias beside half inputs, of maps narrower and wider than a tile, with grouped heads."""
    rows, columns = shape
    q, k, v = qkv(2, 4, 2, 29, rows * columns, 24, dtype)
    sinks = normal(4)  # or the gradient of a map of one row would be a sum of 0
    biases = [normal(2, 4, 29, n) for n in shape]

    def formula(q, k, v, rel_h, rel_w, sinks):
        return reference.attention(q, k, v, mask=spread(rel_h, rel_w), sinks=sinks)

    def call(q, k, v, rel_h, rel_w, sinks):
        return xformer_fast.attention(q, k, v, decomposed_bias=(rel_h, rel_w), sinks=sinks, backend=backend)

    agree(backend, [q, k, v, *biases, sinks], formula, call)


@pytest.mark.parametrize("causal", [True, "top_left"])
def test_decomposed_bias_counts_keys_from_the_first(backend, causal):
    """Whatever part of the map a query sees: causal, windows and lengths do not move it."""
    q, k, v = qkv(2, 2, 2, 50, 66, 16)
    biases = [normal(2, 2, 50, n) for n in (6, 11)]
    options = {"causal": causal, "window": (20, -1), "key_lengths": torch.tensor([66, 31])}
    agree(
        backend,
        [q, k, v, *biases],
        lambda q, k, v, h, w: reference.attention(q, k, v, mask=spread(h, w), **options),
        lambda q, k, v, h, w: xformer_fast.attention(q, k, v, decomposed_bias=(h, w), backend=backend, **options),
    )


def test_decomposed_bias_of_any_strides(backend):
    q, k, v = qkv(2, 3, 3, 20, 24, 8)
    rel_h, rel_w = torch.randn(2, 20, 3, 4).transpose(1, 2), torch.randn(1, 1, 20, 12)[..., ::2].expand(2, 3, -1, -1)
    out = xformer_fast.attention(q, k, v, decomposed_bias=(rel_h, rel_w), backend=backend)
    dense = xformer_fast.attention(q, k, v, decomposed_bias=(rel_h.contiguous(), rel_w.contiguous()), backend=backend)
    assert torch.equal(out, dense)


def test_one_learned_half(backend):
    """rel_h alone requires grad."""
    q, k, v = (t.detach() for t in qkv(1, 2, 2, 20, 24, 8))
    rel_h, rel_w = normal(1, 2, 20, 4), torch.randn(1, 2, 20, 6)
    agree(
        backend,
        [rel_h],
        lambda h: reference.attention(q.to(h), k.to(h), v.to(h), mask=spread(h, rel_w.to(h))),
        lambda h: xformer_fast.attention(q, k, v, decomposed_bias=(h, rel_w), backend=backend),
    )


@pytest.mark.parametrize("shape", [(0, 2, 5, 2, 3), (2, 2, 0, 2, 3), (2, 2, 5, 0, 3), (2, 2, 5, 3, 0)], ids=str)
def test_zero_sizes(backend, shape):
    batch, heads, len_q, rows, columns = shape
    q, k, v = qkv(batch, heads, heads, len_q, rows * columns, 8)
    bias = normal(batch, heads, len_q, rows), normal(batch, heads, len_q, columns)
    out = xformer_fast.attention(
        q, k, v, decomposed_bias=bias, window=(1, 1), global_keys=torch.full((2,), -1), backend=backend
    )
    if rows * columns == 0:
        assert not out.any()
    for tensor, grad in zip((q, k, v, *bias), torch.autograd.grad(out.sum(), (q, k, v, *bias)), strict=True):
        assert grad.shape == tensor.shape and (tensor is v or not grad.any())


def test_decomposed_bias_needs_memory_of_its_size():
    side = 50
    q, k, v = qkv(1, 1, 1, side * side, side * side, 8)
    bias = [normal(1, 1, side * side, side) for _ in range(2)]
    with torch.profiler.profile(profile_memory=True) as profile:
        xformer_fast.attention(q, k, v, decomposed_bias=bias).sum().backward()
    assert max(event.self_cpu_memory_usage for event in profile.events()) < side**4


@pytest.mark.parametrize("window", [0, 4])
def test_hugging_face_sam(window):
    """SAM's attention of a global block and of a window: outputs and the gradients of its relative positions."""
    sam = pytest.importorskip("transformers.models.sam.modeling_sam")
    torch.manual_seed(0)
    config = sam.SamVisionConfig(hidden_size=32, num_attention_heads=4, image_size=48, patch_size=8)
    layer = sam.SamVisionAttention(config, window)
    side = window or 6
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    hidden = torch.randn(3, side, side, 32)
    expected = layer(hidden)[0]
    q, k, v = layer.qkv(hidden).reshape(3, side * side, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind()
    on_map = q.unflatten(2, (side, side))
    rel_h = torch.einsum("nbhwc,hkc->nbhwk", on_map, layer.get_rel_pos(side, side, layer.rel_pos_h))
    rel_w = torch.einsum("nbhwc,wkc->nbhwk", on_map, layer.get_rel_pos(side, side, layer.rel_pos_w))
    out = xformer_fast.attention(q, k, v, decomposed_bias=(rel_h.flatten(2, 3), rel_w.flatten(2, 3)))
    out = layer.proj(out.transpose(1, 2).reshape(3, side, side, 32))
    torch.testing.assert_close(out, expected)
    learned = [*layer.parameters()]
    weight = torch.randn_like(out)
    grads = (torch.autograd.grad(result, learned, weight) for result in (out, expected))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


# ---- both, with the rest


BOTH = ["global_keys", "decomposed_bias", "window", "causal", "key_lengths", "mask", "alibi_slopes", "relative_bias"]
BOTH += ["sinks", "softcap", "dropout_p", "return_lse", "aux_grad"]


def draw_both(seed):
    return draw(seed, DTYPES[seed % 3], options=BOTH, rate=0.6)


@needs_kernels
@pytest.mark.parametrize("seed", range(21))
def test_random_calls_of_many_options(seed, monkeypatch):
    case = draw_both(seed)
    truth, naive = truth_and_naive(case)
    for isa in ISAS:
        monkeypatch.setenv("XFORMER_FAST_ISA", isa)
        with unwritten_memory_is_nan():
            check(case, evaluate(case, on_backend("cpu")), truth, naive, isa)


@needs_kernels
@pytest.mark.parametrize("seed", range(100, 106))
def test_any_number_of_threads_gives_the_same_bits(isa, seed):
    case = draw_both(seed)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 3, 2):
            torch.set_num_threads(count)
            results.append(evaluate(case, on_backend("cpu")))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for name, result in other.items():
            assert torch.equal(result.nan_to_num(), results[0][name].nan_to_num()), f"{name}\n{case}"


def test_packed_and_decoding_calls_have_neither():
    x, cu = torch.randn(4, 1, 8), torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(TypeError, match="global_keys"):
        xformer_fast.varlen_attention(x, x, x, cu, cu, 4, 4, global_keys=1)
    cache = torch.randn(1, 1, 8, 8)
    with pytest.raises(TypeError, match="decomposed_bias"):
        xformer_fast.decode_attention(cache[:, :, :1], cache, cache, torch.tensor([8]), decomposed_bias=(cache, cache))
