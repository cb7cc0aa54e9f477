"""`decode_attention` against the formula in float64: random calls, the cache, errors, its operators in torch."""

import pytest
import torch
from attention_cases import unwritten_memory_is_nan
from decode_cases import arguments, check, draw, evaluate, truth_and_naive
from marks import needs_kernels

import xformer_fast
from xformer_fast import build_info, dispatch
from xformer_fast.testing import check_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def on_backend(name: str | None):
    return lambda **keywords: xformer_fast.decode_attention(**keywords, backend=name)


@needs_kernels
@pytest.mark.parametrize("seed", range(150))
def test_random_calls(seed, monkeypatch):
    case = draw(seed, DTYPES[seed % 3])
    truth, naive = truth_and_naive(case)
    for isa in build_info.usable_isa_levels():
        monkeypatch.setenv("XFORMER_FAST_ISA", isa)
        with unwritten_memory_is_nan():
            result = evaluate(case, on_backend("cpu"))
        check(case, result, truth, naive, isa)


@needs_kernels
@pytest.mark.parametrize("dim,dim_v", [(512, 512), (257, 40), (40, 511)])
def test_wide_heads(dim, dim_v, isa):
    torch.manual_seed(dim)
    case = draw(dim, DTYPES[dim % 3], options=[])
    q, k, v = (torch.randn(2, h, s, d).to(case.dtype) for h, s, d in ((4, 2, dim), (2, 70, dim), (2, 70, dim_v)))
    case.tensors, case.options = (
        {"query": q, "key_cache": k, "value_cache": v},
        {"cache_lengths": torch.tensor([3, 70])},
    )
    check(case, evaluate(case, on_backend("cpu")), *truth_and_naive(case), isa)


@pytest.fixture(params=["cpu", "reference"])
def backend(request):
    if request.param == "cpu" and dispatch.build_problem() is not None:
        pytest.skip(dispatch.build_problem())
    return request.param


def inputs(batch=2, heads=4, kv_heads=2, tokens=1, capacity=40, dim=16, dtype=torch.float32):
    shapes = (heads, tokens), (kv_heads, capacity), (kv_heads, capacity), (kv_heads, tokens), (kv_heads, tokens)
    return [torch.randn(batch, h, s, dim).to(dtype) for h, s in shapes]


@pytest.mark.parametrize("tokens", [1, 5, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_attention_of_the_concatenation(backend, dtype, tokens):
    torch.manual_seed(tokens)
    q, keys, values, k, v = inputs(tokens=tokens, dtype=dtype)
    angles = torch.arange(60)[:, None] * 10000.0 ** (-torch.arange(0, 16, 2) / 16)
    rope, slopes, sinks = xformer_fast.Rope(angles.cos(), angles.sin()), torch.rand(4), torch.randn(4)
    lengths = torch.tensor([0, 24], dtype=torch.int32)
    bias = xformer_fast.T5Bias(torch.randn(32, 4), bidirectional=False)
    options = dict(alibi_slopes=slopes, sinks=sinks, window=(12, 0), softcap=20.0, relative_bias=bias)
    raw_keys = keys.clone()
    for b, n in enumerate(lengths.tolist()):
        keys[b, :, :n] = xformer_fast.apply_rope(raw_keys[b : b + 1, :, :n], rope.cos, rope.sin, backend="reference")
    out, lse = xformer_fast.decode_attention(
        q, keys, values, lengths, new_key=k, new_value=v, rope=rope, **options, return_lse=True, backend=backend
    )
    again = xformer_fast.decode_attention(q, keys, values, lengths + tokens, rope=rope, **options, backend=backend)
    assert torch.equal(out, again)  # what was written is what is read
    for b, n in enumerate(lengths.tolist()):
        key, value = (torch.cat((t[b : b + 1, :, :n], new[b : b + 1]), 2) for t, new in ((raw_keys, k), (values, v)))
        truth, truth_lse = xformer_fast.attention(
            *(t.double() for t in (q[b : b + 1], key, value)), causal=True, return_lse=True,
            rope=xformer_fast.Rope(angles.double().cos(), angles.double().sin()), **options, backend="reference",
        )  # fmt: skip
        naive, naive_lse = xformer_fast.attention(
            q[b : b + 1], key, value, causal=True, rope=rope, **options, return_lse=True, backend="reference"
        )
        check_close(out[b : b + 1], truth, naive, dtype=dtype)
        check_close(lse[b : b + 1], truth_lse, naive_lse, dtype=dtype, magnitude=1.0)


def test_no_key_gives_zeros_or_the_sink(backend):
    q, keys, values, _, _ = inputs(tokens=3)
    lengths = torch.tensor([0, 2])
    out, lse = xformer_fast.decode_attention(q, keys, values, lengths, return_lse=True, backend=backend)
    assert not out[0].any() and not out[1, :, 0].any() and out[1, :, 1:].all()
    assert (lse[0] == -torch.inf).all() and lse[1, :, 1:].isfinite().all()
    sinks = torch.randn(4)
    _, lse = xformer_fast.decode_attention(q, keys, values, lengths, sinks=sinks, return_lse=True, backend=backend)
    torch.testing.assert_close(lse[0], sinks[:, None].expand(4, 3))


def test_zero_sizes(backend):
    for batch, tokens in ((0, 1), (2, 0)):
        q, keys, values, k, v = inputs(batch=batch, tokens=tokens)
        lengths = torch.zeros(batch, dtype=torch.int32)
        out = xformer_fast.decode_attention(q, keys, values, lengths, new_key=k, new_value=v, backend=backend)
        assert out.shape == q.shape


def test_one_or_no_key_of_room(backend):
    """A bias of one or of no distance, and the table of no sequence: strides that say nothing."""
    q, _, _, k, v = inputs()
    bias, lengths = xformer_fast.T5Bias(torch.randn(32, 4), bidirectional=False), torch.zeros(2, dtype=torch.int32)
    room = torch.empty(2, 2, 1, 16), torch.empty(2, 2, 1, 16)
    options = {"relative_bias": bias, "backend": backend}
    out = xformer_fast.decode_attention(q, *room, lengths, new_key=k, new_value=v, **options)
    torch.testing.assert_close(out, v.repeat_interleave(2, 1))
    no_page = torch.zeros(2, 0, dtype=torch.int32)
    assert not xformer_fast.decode_attention(q, *room, lengths, block_table=no_page, **options).any()
    no_sequence = torch.zeros(0, 6, dtype=torch.int32)[:, ::2]
    out = xformer_fast.decode_attention(q[:0], *room, lengths[:0], block_table=no_sequence, backend=backend)
    assert out.shape == (0, 4, 1, 16)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_number_of_threads(dtype):
    q, keys, values, _, _ = inputs(batch=2, tokens=2, capacity=5000, dim=64, dtype=dtype)
    lengths, threads = torch.tensor([5000, 1300]), torch.get_num_threads()
    outs = []
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        outs.append(xformer_fast.decode_attention(q, keys, values, lengths, backend="cpu", return_lse=True))
    torch.set_num_threads(threads)
    for out, lse in outs[1:]:
        assert torch.equal(out, outs[0][0]) and torch.equal(lse, outs[0][1])


def test_memory_order_and_expanded_caches(backend):
    q, keys, values, _, _ = inputs()
    transposed = q.transpose(1, 2).contiguous().transpose(1, 2).expand(2, 4, 1, 16)
    lengths = torch.tensor([3, 40])
    one = xformer_fast.decode_attention(transposed, keys[:1].expand(2, -1, -1, -1), values, lengths, backend=backend)
    two = xformer_fast.decode_attention(q, keys[:1].repeat(2, 1, 1, 1), values, lengths, backend=backend)
    assert torch.equal(one, two)


def test_autocast(backend):
    q, keys, values, k, v = inputs(dtype=torch.float32)
    lengths = torch.tensor([3, 10])
    expected = xformer_fast.decode_attention(
        q.bfloat16(), keys.bfloat16(), values.bfloat16(), lengths, new_key=k.bfloat16(), new_value=v.bfloat16(),
        backend=backend,
    )  # fmt: skip
    with torch.autocast("cpu", torch.bfloat16):
        out = xformer_fast.decode_attention(
            q, keys.bfloat16(), values.bfloat16(), lengths, new_key=k, new_value=v, backend=backend
        )
    assert torch.equal(out, expected)


# ---- bad input

Q, KEYS, VALUES, K, V = inputs(tokens=2)
LENGTHS = torch.tensor([3, 10], dtype=torch.int32)
PAGED = torch.randn(8, 2, 4, 16)
META = torch.empty(4, 41, device="meta")
TABLE = torch.arange(8, dtype=torch.int32).reshape(2, 4)
LEARNED = torch.ones(50, 8, requires_grad=True)


def call(query=Q, key_cache=KEYS, value_cache=VALUES, cache_lengths=LENGTHS, **options):
    return xformer_fast.decode_attention(query, key_cache, value_cache, cache_lengths, **options)


def paged(**options):
    return call(**{"key_cache": PAGED.clone(), "value_cache": PAGED.clone(), "block_table": TABLE} | options)


new = {"new_key": K, "new_value": V}


@pytest.mark.parametrize(
    "wrong,words",
    [
        (lambda b: call(query=None, backend=b), "query must be a torch.Tensor"),
        (lambda b: call(query=Q[0], backend=b), "query must have four dimensions"),
        (lambda b: call(query=Q[:, :3], backend=b), "must divide the query's 3"),
        (lambda b: call(query=Q[..., :8], backend=b), "head_dim"),
        (lambda b: call(query=Q.half(), backend=b), "query is torch.float16"),
        (lambda b: call(query=Q.int(), backend=b), "query must be float32"),
        (lambda b: call(query=Q[:1], backend=b), "key_cache has batch 2"),
        (lambda b: call(key_cache=KEYS[:, :, :9], backend=b), "must agree"),
        (lambda b: call(key_cache=KEYS.half(), backend=b), "value_cache is torch.float32"),
        (lambda b: call(key_cache=KEYS.mT.contiguous().mT, backend=b), "unit last stride"),
        (lambda b: call(cache_lengths=LENGTHS.float(), backend=b), "cache_lengths must be int32 or int64"),
        (lambda b: call(cache_lengths=LENGTHS[:1], backend=b), "cache_lengths must have shape"),
        (lambda b: call(cache_lengths=torch.tensor([3, 41]), backend=b), r"cache_lengths\[1\] is 41"),
        (lambda b: call(cache_lengths=torch.tensor([-1, 3]), backend=b), r"cache_lengths\[0\] is -1"),
        (lambda b: call(cache_lengths=torch.tensor([3, 39]), **new, backend=b), r"cache_lengths\[1\] is 39.*0..38"),
        (lambda b: call(new_key=K, backend=b), "given together"),
        (lambda b: call(new_key=K[:, :, :1], new_value=V, backend=b), "new_key must be"),
        (lambda b: call(new_key=K, new_value=V[..., :3], backend=b), "new_value must be"),
        (lambda b: call(new_key=K.half(), new_value=V, backend=b), "new_key is torch.float16"),
        (lambda b: call(key_cache=KEYS[:1].expand_as(KEYS), **new, backend=b), "expanded"),
        (lambda b: paged(block_table=TABLE.long(), backend=b), "block_table must be int32"),
        (lambda b: paged(block_table=TABLE[:1], backend=b), "block_table must be int32"),
        (lambda b: paged(cache_lengths=torch.tensor([3, 17]), backend=b), r"cache_lengths\[1\] is 17"),
        (lambda b: paged(block_table=TABLE + 3, backend=b), r"block_table\[1, 1\] is 8, must lie in 0..7"),
        (lambda b: paged(block_table=TABLE - 1, **new, backend=b), r"block_table\[0, 0\] is -1"),
        (lambda b: call(window=(1, 2, 3), backend=b), "window"),
        (lambda b: call(softcap=-1.0, backend=b), "softcap"),
        (lambda b: call(scale=float("nan"), backend=b), "scale must be finite"),
        (lambda b: call(sinks=torch.zeros(3), backend=b), "sinks must be"),
        (lambda b: call(alibi_slopes=torch.zeros(3), backend=b), "alibi_slopes must be"),
        (lambda b: call(rope=3, backend=b), "rope must be"),
        (lambda b: call(rope=xformer_fast.Rope(torch.ones(99, 9), torch.ones(99, 9)), backend=b), "rope rotates 18"),
        (lambda b: call(rope=xformer_fast.Rope(torch.ones(9, 8), torch.ones(9, 8)), backend=b), "must lie in 0..8"),
        (lambda b: call(relative_bias=3, backend=b), "relative_bias must be"),
        (lambda b: call(relative_bias=xformer_fast.T5Bias(torch.ones(32, 3)), backend=b), "3 heads"),
        (lambda b: call(relative_bias=xformer_fast.DistanceBias(torch.ones(4, 40)), backend=b), r"capacity - 1 = 41"),
        (lambda b: call(relative_bias=xformer_fast.DistanceBias(META), backend=b), "relative_bias: values is on meta"),
        (lambda b: call(relative_bias=xformer_fast.T5Bias(META.mT), backend=b), "relative_bias: table is on meta"),
        (lambda b: call(relative_bias=xformer_fast.T5Bias(META.mT.int()), backend=b), "table must be a float tensor"),
        (lambda b: call(rope=xformer_fast.Rope(META.mT, META.mT), **new, backend=b), "rope: cos is on meta"),
        (lambda b: call(query=Q.clone().requires_grad_(), backend=b), "query requires grad"),
        (lambda b: call(**{**new, "new_key": K.clone().requires_grad_()}, backend=b), "new_key requires grad"),
        (lambda b: call(rope=xformer_fast.Rope(LEARNED, LEARNED.detach()), backend=b), "rope.cos requires grad"),
        (lambda b: call(rope=xformer_fast.Rope(LEARNED.detach(), LEARNED), backend=b), "rope.sin requires grad"),
        (lambda b: call(backend="nope"), "backend must be one of"),
    ],
)
def test_bad_input(backend, wrong, words):
    before = KEYS.clone(), VALUES.clone()
    with pytest.raises((ValueError, TypeError), match=words):
        wrong(backend)
    assert torch.equal(KEYS, before[0]) and torch.equal(VALUES, before[1])  # nothing was written


def test_requires_grad_is_fine_without_grad_mode(backend):
    with torch.no_grad():
        assert not call(query=Q.clone().requires_grad_(), backend=backend).requires_grad


@needs_kernels
def test_forward_mode_ad_is_refused():
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(Q, torch.ones_like(Q))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            call(query=dual, backend="cpu")


def test_explain():
    text = xformer_fast.explain("decode_attention", Q, KEYS, VALUES, LENGTHS)
    assert "decode_attention" in text and "runs this call" in text
    assert "decode_attention" in xformer_fast.info()


# ---- the operators as torch sees them


@needs_kernels
def test_opcheck():
    operators = torch.ops.xformer_fast
    slopes, sinks, bias = torch.rand(4), torch.randn(4), torch.randn(4, 2 + 40 - 1)
    torch.library.opcheck(
        operators.decode_attention_cpu.default,
        (Q, KEYS, VALUES, LENGTHS, None, slopes, bias, sinks, 0, 0.25, 5.0, 7),
    )
    torch.library.opcheck(
        operators.decode_attention_cpu.default, (Q, PAGED, PAGED, LENGTHS, TABLE, None, None, None, 0, 0.25, 0.0, -1)
    )
    for caches, table in (((KEYS, VALUES), None), ((PAGED, PAGED * 2), TABLE)):
        arguments = (*(t.clone() for t in caches), K, V, LENGTHS, table)
        torch.library.opcheck(operators.kv_cache_append_cpu.default, arguments)


@needs_kernels
def test_compile():
    def step(q, keys, values, lengths, k, v, rope, bias):
        out = xformer_fast.decode_attention(
            q, keys, values, lengths, new_key=k, new_value=v, rope=rope, relative_bias=bias, window=(20, 0)
        )
        return out + xformer_fast.decode_attention(q, keys, values, lengths + q.shape[2])

    angles = torch.arange(200)[:, None] * torch.rand(8)
    rope = xformer_fast.Rope(angles.cos(), angles.sin())
    bias = xformer_fast.T5Bias(torch.randn(32, 4), bidirectional=False)
    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for tokens, capacity in ((2, 40), (3, 57), (5, 64)):
        q, keys, values, k, v = inputs(tokens=tokens, capacity=capacity)
        copies = keys.clone(), values.clone()
        lengths = torch.tensor([3, 17])
        torch.testing.assert_close(
            compiled(q, keys, values, lengths, k, v, rope, bias), step(q, *copies, lengths, k, v, rope, bias)
        )
        assert torch.equal(keys, copies[0]) and torch.equal(values, copies[1])


@needs_kernels
def test_writing_is_seen_by_autograd():
    weight = torch.randn(2, 4, 40, 16, requires_grad=True)
    keys = KEYS.clone()
    product = (weight[:, :2] * keys).sum()
    with torch.no_grad():
        call(key_cache=keys, value_cache=VALUES.clone(), **new, backend="cpu")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_arguments_are_copies():
    case = draw(3, torch.float32)
    assert arguments(case)["key_cache"].data_ptr() != case.tensors["key_cache"].data_ptr()
