"""`attention` and `varlen_attention` against the formula in float64: random calls, gradients, instruction sets."""

import pytest
import torch
from attention_cases import (
    arrange,
    check,
    check_rows_of_least_numbers,
    draw,
    evaluate,
    on_backend,
    truth_and_naive,
    unwritten_memory_is_nan,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from marks import needs_kernels

import xformer_fast
from xformer_fast import build_info, dispatch, reference
from xformer_fast.testing import check_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def dtype_of(seed: int) -> torch.dtype:
    return DTYPES[seed % 3]


@pytest.fixture
def kernels_agree(monkeypatch):
    """Checks a case on every instruction set against one float64 evaluation, and that the sets see the same layout."""

    def agree(case):
        truth, naive = truth_and_naive(case)
        for isa in build_info.usable_isa_levels():
            monkeypatch.setenv("XFORMER_FAST_ISA", isa)
            with unwritten_memory_is_nan():
                results = evaluate(case, on_backend("cpu", packed=case.packed))
            check(case, results, truth, naive, isa)

    return agree


@needs_kernels
@pytest.mark.parametrize("seed", range(300))
def test_random_calls(seed, kernels_agree):
    kernels_agree(draw(seed, dtype_of(seed)))


@needs_kernels
@pytest.mark.parametrize("seed", range(1000, 1008))
def test_random_long_calls(seed, kernels_agree):
    kernels_agree(draw(seed, dtype_of(seed), long=True, rate=0.2))


@needs_kernels
@pytest.mark.parametrize("seed", range(66))
def test_random_packed_calls(seed, kernels_agree):
    kernels_agree(draw(seed, dtype_of(seed), packed=True))


@needs_kernels
@pytest.mark.parametrize("dim,dim_v", [(512, 512), (257, 40), (40, 511), (320, 8)])
def test_wide_heads(dim, dim_v, kernels_agree):
    case = draw(dim, dtype_of(dim), options=["causal", "key_lengths"])
    for name, last in (("query", dim), ("key", dim), ("value", dim_v)):
        shape = (*case.tensors[name].shape[:-1], last)
        case.tensors[name] = arrange(shape, case.dtype, "transposed")
    case.grad_out = torch.randn(*case.tensors["query"].shape[:-1], dim_v).to(case.dtype)
    kernels_agree(case)


LAYOUT = st.sampled_from(
    ["contiguous", "transposed", "packed", "sequence_first", "expanded_heads", "strided", "offset"]
)


@needs_kernels
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(*(st.integers(1, most) for most in (2, 3, 70, 140, 70, 70))),
    group=st.integers(1, 3),
    layouts=st.tuples(LAYOUT, LAYOUT, LAYOUT),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape_and_layout(kernels_agree, seed, shape, group, layouts, dtype):
    batch, kv_heads, len_q, len_k, dim, dim_v = shape
    case = draw(seed, dtype, options=["causal", "window", "softcap", "return_lse", "scale"])
    shapes = (batch, group * kv_heads, len_q, dim), (batch, kv_heads, len_k, dim), (batch, kv_heads, len_k, dim_v)
    for name, size, layout in zip(("query", "key", "value"), shapes, layouts, strict=True):
        case.tensors[name] = arrange(size, dtype, layout)
    case.grad_out = torch.randn(*shapes[0][:3], dim_v).to(dtype)
    case.grad_lse = torch.randn(shapes[0][:3]) if case.options.get("return_lse") else None
    kernels_agree(case)


@needs_kernels
@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_invariances(data):
    """Properties that need no reference: means of values, shifts of scores, order of keys, independence of the rest."""
    batch, heads, len_q, len_k, dim = (data.draw(st.integers(1, most)) for most in (3, 4, 40, 90, 48))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    q, k, v = torch.randn(batch, heads, len_q, dim), *torch.randn(2, batch, heads, len_k, dim).unbind()
    out = xformer_fast.attention(q, k, v, backend="cpu")
    assert (out <= v.amax(2, keepdim=True) + 1e-5).all() and (out >= v.amin(2, keepdim=True) - 1e-5).all()
    order = torch.randperm(len_k)
    torch.testing.assert_close(xformer_fast.attention(q, k[:, :, order], v[:, :, order], backend="cpu"), out)
    shifted = xformer_fast.attention(q, k, v, mask=torch.randn(batch, heads, len_q, 1), backend="cpu")
    torch.testing.assert_close(shifted, out)
    alone = xformer_fast.attention(q[-1:], k[-1:], v[-1:], backend="cpu")
    torch.testing.assert_close(alone, out[-1:])
    constant = torch.ones(batch, heads, len_k, 3)
    torch.testing.assert_close(
        xformer_fast.attention(q, k, constant, backend="cpu"), torch.ones(batch, heads, len_q, 3)
    )


# ---- the formula itself, written out element by element


def test_reference_is_the_contract():
    torch.manual_seed(0)
    heads, len_q, len_k, dim = 4, 5, 7, 6
    q, k, v = (torch.randn(1, n, s, dim).double() for n, s in ((heads, len_q), (2, len_k), (2, len_k)))
    slopes, sinks, values = torch.rand(heads).double(), torch.randn(heads).double(), torch.randn(heads, 11).double()
    added, seed = torch.randn(len_q, len_k).double(), torch.tensor([12345])
    keep = reference.dropout_mask(seed, 0.3, 1, heads, len_q, len_k)
    for causal, window, length in ((True, (2, 5), 6), ("top_left", (3, 1), 7), (False, (-1, 0), 3)):
        out, lse = reference.attention(
            q, k, v, mask=added, causal=causal, window=window, key_lengths=torch.tensor([length]), alibi_slopes=slopes,
            relative_bias=xformer_fast.DistanceBias(values), sinks=sinks, scale=0.7, softcap=2.0, dropout_p=0.3,
            dropout_seed=seed, return_lse=True,
        )  # fmt: skip
        for h in range(heads):
            for i in range(len_q):
                p = i if causal == "top_left" else i + len_k - len_q
                total, row = sinks[h].exp(), torch.zeros(dim).double()
                for j in range(length):
                    inside = (window[0] < 0 or p - window[0] <= j) and j <= p + window[1] and (not causal or j <= p)
                    if not inside:
                        continue
                    s = 2.0 * torch.tanh(q[0, h, i] @ k[0, h // 2, j] * 0.7 / 2.0)
                    s = s - slopes[h] * abs(p - j) + values[h, j - i + len_q - 1] + added[i, j]
                    total = total + s.exp()
                    row = row + s.exp() * keep[0, h, i, j] / 0.7 * v[0, h // 2, j]
                torch.testing.assert_close(out[0, h, i], row / total)
                torch.testing.assert_close(lse[0, h, i], total.log())


def test_philox_known_answers():
    """The vectors of Random123's kat_vectors for philox4x32-10, whose counters have a zero last word here."""
    words = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]  # counter 0, key 0
    for word, expected in enumerate(words):
        for p, kept in ((expected / 2**32, True), ((expected + 1) / 2**32, False)):
            mask = reference.dropout_mask(torch.tensor([0]), p, 1, 1, 1, 4)
            assert mask[0, 0, 0, word].item() is kept


def test_dropout_rate_and_independence():
    mask = reference.dropout_mask(torch.tensor([7]), 0.25, 2, 3, 64, 203)
    assert abs(mask.float().mean().item() - 0.75) < 0.01
    assert len({row.numpy().tobytes() for row in mask.flatten(0, 2)}) == 2 * 3 * 64
    later = reference.dropout_mask(torch.tensor([7]), 0.25, 1, 3, 64, 203, first_batch=1)
    assert torch.equal(later[0], mask[1])


# ---- edges, on every backend

ISAS = build_info.usable_isa_levels() if dispatch.build_problem() is None else []


@pytest.fixture(params=[*(f"cpu-{isa}" for isa in ISAS), "reference"])
def backend(request, monkeypatch):
    name, _, isa = request.param.partition("-")
    if isa:
        monkeypatch.setenv("XFORMER_FAST_ISA", isa)
    with unwritten_memory_is_nan():
        yield name


def leaves(*shapes, dtype=torch.float32):
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_a_key(backend, dtype):
    """More queries than keys under causal: the first rows see nothing."""
    q, k, v = leaves((2, 2, 9, 16), (2, 2, 4, 16), (2, 2, 4, 16), dtype=dtype)
    out, lse = xformer_fast.attention(q, k, v, causal=True, return_lse=True, backend=backend)
    assert not out[:, :, :5].any() and (lse[:, :, :5] == -torch.inf).all() and lse[:, :, 5:].isfinite().all()
    grads = torch.autograd.grad((out, lse), (q, k, v), (torch.randn_like(out), torch.randn_like(lse)))
    assert all(g.isfinite().all() for g in grads) and not grads[0][:, :, :5].any()


def test_rows_without_a_key_have_the_sink_as_lse(backend):
    q, k, v = leaves((2, 2, 9, 16), (2, 2, 4, 16), (2, 2, 4, 16))
    sinks = torch.tensor([0.5, -2.0], requires_grad=True)
    out, lse = xformer_fast.attention(q, k, v, causal=True, sinks=sinks, return_lse=True, backend=backend)
    assert not out[:, :, :5].any()
    torch.testing.assert_close(lse[:, :, :5], sinks[None, :, None].expand(2, -1, 5))
    (grad,) = torch.autograd.grad(lse[:, :, :5].sum(), sinks)
    torch.testing.assert_close(grad, torch.full((2,), 10.0))


def test_a_sink_of_minus_infinity_is_no_sink(backend):
    q, k, v = leaves((1, 2, 9, 16), (1, 2, 4, 16), (1, 2, 4, 16))
    sinks = torch.full((2,), -torch.inf, requires_grad=True)
    out, lse = xformer_fast.attention(q, k, v, causal=True, sinks=sinks, return_lse=True, backend=backend)
    plain, plain_lse = xformer_fast.attention(q, k, v, causal=True, return_lse=True, backend=backend)
    torch.testing.assert_close(out, plain)
    torch.testing.assert_close(lse, plain_lse)
    grads = torch.autograd.grad(out.sum(), (q, k, v, sinks))
    assert all(g.isfinite().all() for g in grads) and not grads[3].any()


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_fully_masked_rows(backend, kind):
    q, k, v = leaves((1, 2, 6, 8), (1, 2, 70, 8), (1, 2, 70, 8))
    keep = torch.rand(1, 1, 6, 70) < 0.5
    keep[:, :, 2] = False
    mask = keep if kind == "bool" else torch.zeros(keep.shape).masked_fill(~keep, -torch.inf).requires_grad_()
    out, lse = xformer_fast.attention(q, k, v, mask=mask, return_lse=True, backend=backend)
    assert not out[:, :, 2].any() and (lse[:, :, 2] == -torch.inf).all()
    inputs = (q, k, v) if kind == "bool" else (q, k, v, mask)
    grads = torch.autograd.grad((out, lse), inputs, (torch.randn_like(out), torch.randn_like(lse)))
    assert all(g.isfinite().all() for g in grads)
    assert not grads[0][:, :, 2].any()
    if kind == "float":
        assert not grads[3][~keep].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(70, 1), (1, 1), (2, 4, 70, 1), (2, 1, 1, 1)], ids=str)
def test_gradient_of_a_mask_of_the_row_is_summed_before_it_is_rounded(backend, shape, dtype):
    torch.manual_seed(0)
    tensors = [torch.randn(2, heads, length, 16).to(dtype) for heads, length in ((4, 70), (2, 900), (2, 900))]
    mask = torch.randn(shape).to(dtype)
    grad_out, grad_lse = 40 * torch.randn(2, 4, 70, 16), torch.randn(2, 4, 70)  # what comes through out cancels

    def gradient(convert, backend):
        leaf = convert(mask).requires_grad_()
        out, lse = xformer_fast.attention(
            *map(convert, tensors), mask=leaf, causal=True, return_lse=True, backend=backend
        )
        grads = grad_out.to(out.dtype), grad_lse.to(lse.dtype)
        return torch.autograd.grad((out, lse), leaf, grads)[0]

    exact, naive = gradient(torch.Tensor.double, "reference"), gradient(lambda t: t, "reference")
    check_close(gradient(lambda t: t, backend), exact, naive, magnitude=80.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_padding_never_reaches_a_result(backend, dtype, causal):
    """NaN and infinity behind key_lengths, 0 included: the bits that zeros there give, gradients of padding zero."""
    torch.manual_seed(1)
    lengths = torch.tensor([0, 3, 50, 33], dtype=torch.int32)
    q, k, v = (torch.randn(4, 2, 50, 24).to(dtype) for _ in range(3))
    results = []
    for poison in (0.0, torch.nan, torch.inf):
        key, value = k.clone(), v.clone()
        for b, length in enumerate(lengths):
            key[b, :, length:], value[b, :, length:] = poison, poison
        inputs = [t.clone().requires_grad_() for t in (q, key, value)]
        out = xformer_fast.attention(*inputs, key_lengths=lengths, causal=causal, backend=backend)
        results.append((out, *torch.autograd.grad(out, inputs, torch.ones_like(out))))
    for other in results[1:]:
        for got, expected in zip(other, results[0], strict=True):
            assert torch.equal(got, expected)
    out, _, grad_key, grad_value = results[0]
    assert not out[0].any()
    for b, length in enumerate(lengths):
        assert not grad_key[b, :, length:].any() and not grad_value[b, :, length:].any()


def test_key_lengths_never_move_positions(backend):
    q, k, v = leaves((1, 1, 4, 8), (1, 1, 10, 8), (1, 1, 10, 8))
    out = xformer_fast.attention(q, k, v, causal=True, key_lengths=torch.tensor([7]), backend=backend)
    keep = (torch.arange(10) <= torch.arange(4)[:, None] + 6) & (torch.arange(10) < 7)
    torch.testing.assert_close(out, xformer_fast.attention(q, k, v, mask=keep, backend=backend))


@pytest.mark.parametrize("shape", [(0, 2, 5, 7, 8), (2, 2, 0, 7, 8), (2, 2, 5, 0, 8), (2, 2, 0, 0, 8), (0, 1, 0, 0, 1)])
def test_zero_sizes(backend, shape):
    batch, heads, len_q, len_k, dim = shape
    q, k, v = leaves((batch, heads, len_q, dim), (batch, heads, len_k, dim), (batch, heads, len_k, dim + 1))
    slopes, sinks, mask = leaves((heads,), (heads,), (batch, 1, len_q, len_k))
    out, lse = xformer_fast.attention(
        q, k, v, mask=mask, alibi_slopes=slopes, causal=True, return_lse=True, backend=backend
    )
    assert out.shape == (batch, heads, len_q, dim + 1) and lse.shape == (batch, heads, len_q)
    assert not out.any() and (lse == -torch.inf).all()
    inputs = (q, k, v, mask, slopes)
    for tensor, grad in zip(
        inputs, torch.autograd.grad((out, lse), inputs, (out + 1, torch.ones_like(lse))), strict=True
    ):
        assert grad.shape == tensor.shape and not grad.any()
    out, lse = xformer_fast.attention(q, k, v, sinks=sinks, return_lse=True, backend=backend)
    assert not out.any()
    torch.testing.assert_close(lse, sinks[None, :, None].expand_as(lse))


def test_zero_sized_packed(backend):
    zero, cu = torch.zeros(0, 2, 8), torch.zeros(1, dtype=torch.int32)
    assert xformer_fast.varlen_attention(zero, zero, zero, cu, cu, 0, 0, backend=backend).shape == (0, 2, 8)
    q, cu_q = torch.randn(5, 2, 8, requires_grad=True), torch.tensor([0, 0, 5, 5], dtype=torch.int32)
    out, lse = xformer_fast.varlen_attention(
        q, zero, zero, cu_q, torch.zeros(4, dtype=torch.int32), 5, 0, return_lse=True, backend=backend
    )
    assert not out.any() and lse.shape == (2, 5) and (lse == -torch.inf).all()
    (grad,) = torch.autograd.grad(out.sum(), q)
    assert not grad.any()


def test_top_left_is_torchs_rule(backend):
    q, k, v = leaves((2, 2, 6, 8), (2, 2, 11, 8), (2, 2, 11, 8))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(xformer_fast.attention(q, k, v, causal="top_left", backend=backend), expected)
    corner = xformer_fast.attention(q, k, v, causal=True, backend=backend)
    torch.testing.assert_close(corner[:, :, -1], xformer_fast.attention(q[:, :, -1:], k, v, backend=backend)[:, :, 0])


@pytest.mark.parametrize(
    "kinds", [(False, "top_left", True), (True, "top_left", False), ("top_left", True, "top_left")]
)
def test_a_kind_of_causal_is_not_that_of_the_call_before(kinds):
    """Calls that are alike but for it, more queries than keys and fewer."""
    for len_q, len_k in ((5, 9), (9, 5)):
        q, k, v = torch.randn(1, 2, len_q, 16), *torch.randn(2, 1, 2, len_k, 16).unbind()
        for causal in kinds * 2:
            out = xformer_fast.attention(q, k, v, causal=causal)
            torch.testing.assert_close(out, reference.attention(q, k, v, causal=causal))


def test_huge_windows_are_no_limit(backend):
    q, k, v = leaves((1, 1, 20, 8), (1, 1, 30, 8), (1, 1, 30, 8))
    expected = xformer_fast.attention(q, k, v, backend=backend)
    for side in (10**6, 2**31, 2**62, 2**63 - 1):
        torch.testing.assert_close(xformer_fast.attention(q, k, v, window=(side, side), backend=backend), expected)


@pytest.mark.parametrize("scale", [0.0, -1.5, 10.0])
def test_any_scale(backend, scale):
    q, k, v = leaves((1, 2, 20, 8), (1, 2, 70, 8), (1, 2, 70, 8))
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    results = []
    for inputs in ((q, k, v), exact):
        name = backend if inputs is not exact else "reference"
        out = xformer_fast.attention(*inputs, scale=scale, backend=name)
        results.append((out, *torch.autograd.grad(out, inputs, torch.ones_like(out))))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-4)


def test_scores_beyond_the_range_of_exp(backend):
    q, k, v = leaves((1, 1, 8, 16), (1, 1, 40, 16), (1, 1, 40, 16))
    for shift in (-3000.0, 3000.0):
        out, lse = xformer_fast.attention(q, k, v, mask=torch.full((8, 40), shift), return_lse=True, backend=backend)
        plain, plain_lse = xformer_fast.attention(q, k, v, return_lse=True, backend=backend)
        torch.testing.assert_close(out, plain, rtol=2e-3, atol=1e-3)
        torch.testing.assert_close(lse, plain_lse + shift)
        grads = torch.autograd.grad(out.sum() + lse.sum(), (q, k, v))
        assert all(g.isfinite().all() for g in grads)
    out = xformer_fast.attention(q * 1e4, k, v, backend=backend)  # one-hot weights
    winner = (q @ k.mT).argmax(-1)
    torch.testing.assert_close(out[0, 0], v[0, 0, winner[0, 0]])


def test_nan_stays_in_its_row(backend):
    q, k, v = torch.randn(3, 1, 2, 30, 8).unbind()
    clean = xformer_fast.attention(q, k, v, backend=backend)
    q = q.clone()
    q[0, 1, 5, 3] = torch.nan
    out = xformer_fast.attention(q, k, v, backend=backend)
    assert out[0, 1, 5].isnan().all()
    out[0, 1, 5] = clean[0, 1, 5]
    assert torch.equal(out, clean)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_drops_the_same_elements_everywhere(backend, p):
    """Uniform scores and one-hot values show each weight: its zeros are those of `reference.dropout_mask`."""
    batch, heads, len_q, len_k = 2, 3, 37, 61
    q, k = torch.zeros(batch, heads, len_q, 8), torch.zeros(batch, heads, len_k, 8)
    v = torch.eye(len_k).expand(batch, heads, len_k, len_k)
    torch.manual_seed(5)
    out = xformer_fast.attention(q, k, v, dropout_p=p, backend=backend)
    torch.manual_seed(5)
    kept = reference.dropout_mask(reference.draw_seed("cpu"), p, batch, heads, len_q, len_k)
    assert torch.equal(out != 0, kept)
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], 1 / len_k / (1 - p)))
    packed = [t.transpose(1, 2).flatten(0, 1) for t in (q, k, v)]
    cu_q, cu_k = (torch.arange(0, 2 * n + 1, n, dtype=torch.int32) for n in (len_q, len_k))
    torch.manual_seed(5)
    varlen = xformer_fast.varlen_attention(*packed, cu_q, cu_k, len_q, len_k, dropout_p=p, backend=backend)
    torch.testing.assert_close(varlen, out.transpose(1, 2).flatten(0, 1))


def test_each_call_draws_new_dropout(backend):
    q = torch.randn(1, 1, 16, 8)
    torch.manual_seed(0)
    first, second = (xformer_fast.attention(q, q, q, dropout_p=0.5, backend=backend) for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(first, xformer_fast.attention(q, q, q, dropout_p=0.5, backend=backend))


@needs_kernels
def test_results_have_the_memory_order_of_the_query(isa):
    for layout, transposed in (("contiguous", False), ("transposed", True), ("packed", True)):
        q, k, v = (arrange((2, 3, 20, 16), torch.float32, layout).requires_grad_() for _ in range(3))
        out = xformer_fast.attention(q, k, v, backend="cpu")
        assert out.transpose(1, 2).is_contiguous() is transposed and out.is_contiguous() is not transposed
        out.sum().backward()


# ---- what the kernels promise beyond the numbers


@needs_kernels
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("seed", range(40, 58))
def test_any_number_of_threads_gives_the_same_bits(isa, seed, packed):
    case = draw(seed, dtype_of(seed), packed=packed, rate=0.4)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            results.append(evaluate(case, on_backend("cpu", packed=packed)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for name, result in other.items():
            assert torch.equal(result.nan_to_num(), results[0][name].nan_to_num()), f"{name}\n{case}"


@needs_kernels
def test_memory_is_linear_in_length():
    """Neither direction, nor a broadcast mask, allocates anything of size Sq x Sk."""
    length = 3000
    q, k, v = leaves(*((1, 1, length, 8),) * 3)
    mask = torch.zeros(1, 1, 1, length, requires_grad=True)
    with torch.profiler.profile(profile_memory=True) as profile:
        xformer_fast.attention(
            q, k, v, mask=mask, alibi_slopes=torch.ones(1), causal=True, backend="cpu"
        ).sum().backward()
    most = max(event.self_cpu_memory_usage for event in profile.events())
    assert most < length * length


@needs_kernels
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_offsets_beyond_32_bits(isa, axis):
    """Batches, heads or rows 2^31 elements apart; pages that nobody touches cost no memory."""
    apart, shape = 2**31 + 64, [1, 2, 5, 16]
    shape[axis] = 2
    strides = [160, 80, 16, 1]
    strides[axis] = apart
    wide = torch.empty(apart + 4096, dtype=torch.bfloat16).as_strided(shape, strides)
    wide.copy_(torch.randn(shape))
    mask_shape = [*shape[:3], shape[2]]
    wide_mask = torch.empty(apart + 4096, dtype=torch.bool).as_strided(mask_shape, strides)
    wide_mask.copy_(torch.rand(mask_shape) < 0.8)
    results = []
    for x, mask in ((wide, wide_mask), (wide.contiguous(), wide_mask.contiguous())):
        leaf = x.detach().requires_grad_()
        out = xformer_fast.attention(leaf, leaf, leaf, mask=mask, backend="cpu")
        results.append((out, torch.autograd.grad(out, leaf, torch.ones_like(out))[0]))
    for far, near in zip(*results, strict=True):
        assert torch.equal(far, near)


def test_position_one_million():
    """A long cache met by a few queries: window, ALiBi and rope far from the origin keep their accuracy."""
    torch.manual_seed(0)
    length = 1_000_000
    q, k = torch.randn(1, 1, 3, 8), torch.randn(1, 1, length, 8)
    slopes = torch.tensor([0.3])
    out = xformer_fast.attention(q, k, k, causal=True, window=(100, 0), alibi_slopes=slopes)
    near = xformer_fast.attention(q, k[:, :, -200:], k[:, :, -200:], causal=True, window=(100, 0), alibi_slopes=slopes)
    exact = reference.attention(
        *(t.double() for t in (q, k[:, :, -200:], k[:, :, -200:])), causal=True, window=(100, 0), alibi_slopes=slopes
    )
    naive = reference.attention(q, k[:, :, -200:], k[:, :, -200:], causal=True, window=(100, 0), alibi_slopes=slopes)
    check_close(out, exact, naive)
    check_close(near, exact, naive)


# ---- torch's signature


SDPA_SHAPES = [
    ((7, 8), (9, 8), (9, 8)),
    ((3, 7, 8), (3, 9, 8), (3, 9, 5)),
    ((3, 7, 8), (1, 9, 8), (1, 9, 8)),
    ((2, 4, 7, 8), (2, 4, 9, 8), (2, 4, 9, 12)),
    ((2, 4, 7, 8), (1, 4, 9, 8), (1, 4, 9, 8)),
    ((2, 4, 7, 8), (2, 1, 9, 8), (2, 1, 9, 8)),
    ((1, 4, 7, 8), (2, 4, 9, 8), (2, 4, 9, 8)),
    ((2, 1, 7, 8), (2, 4, 9, 8), (2, 4, 9, 8)),
    ((2, 3, 4, 7, 8), (2, 3, 4, 9, 8), (2, 3, 4, 9, 8)),
    ((2, 3, 4, 7, 8), (1, 3, 4, 9, 8), (2, 1, 4, 9, 8)),
    ((4, 7, 8), (2, 4, 9, 8), (2, 4, 9, 8)),
    ((2, 4, 7, 8), (4, 9, 8), (4, 9, 8)),
]


@pytest.mark.parametrize("shapes", SDPA_SHAPES, ids=str)
@pytest.mark.parametrize("mode", ["plain", "causal", "mask", "row_mask", "float_mask", "scale"])
def test_torch_signature(shapes, mode):
    torch.manual_seed(0)
    q, k, v = (torch.randn(shape, requires_grad=True) for shape in shapes)
    dims, len_q, len_k = max(map(len, shapes)), shapes[0][-2], shapes[1][-2]
    lead = torch.broadcast_shapes(*(s[:-2] for s in shapes))
    options = {
        "plain": {},
        "causal": {"is_causal": True},
        "mask": {"attn_mask": torch.rand(*lead, len_q, len_k) < 0.7},
        "row_mask": {"attn_mask": (torch.rand(len_q, len_k) < 0.7) | torch.eye(len_q, len_k).bool()},
        "float_mask": {"attn_mask": torch.randn(*lead[:-1], *[1] * (dims > 2), len_q, len_k)},
        "scale": {"scale": 0.3},
    }[mode]
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)
    out = xformer_fast.scaled_dot_product_attention(q, k, v, **options)
    torch.testing.assert_close(out, expected.nan_to_num())
    weight = torch.randn_like(out)
    if not expected.isnan().any():
        for got, wanted in zip(*(torch.autograd.grad(o, (q, k, v), weight) for o in (out, expected)), strict=True):
            torch.testing.assert_close(got, wanted)


def test_torch_signature_mask_and_causal_together():
    q, k, v = torch.randn(3, 2, 4, 9, 8).unbind()
    mask = torch.rand(2, 1, 9, 9) < 0.6
    both = mask & torch.ones(9, 9).tril().bool()
    out = xformer_fast.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=True)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=both).nan_to_num()
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("heads", [(8, 2, 2), (8, 1, 1), (6, 3, 3), (8, 4, 2), (4, 4, 4)], ids=str)
def test_torch_signature_gqa(heads):
    q, k, v = (torch.randn(2, n, s, 16) for n, s in zip(heads, (7, 11, 11), strict=True))
    full_k, full_v = (t.repeat_interleave(heads[0] // t.shape[1], 1) for t in (k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(q, full_k, full_v)
    torch.testing.assert_close(xformer_fast.scaled_dot_product_attention(q, k, v, enable_gqa=True), expected)


@pytest.mark.parametrize("heads", [(6, 2, 2), (6, 2, 3), (6, 3, 2), (12, 4, 6), (6, 6, 1)], ids=str)
@pytest.mark.parametrize("lead", [(), (2,), (1,), (2, 3)], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_torch_signature_gqa_is_torchs(heads, lead, masked):
    """Heads of key and value that differ, and three dimensions, the first of which are heads then."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(*lead, n, s, 8, requires_grad=True) for n, s in zip(heads, (5, 4, 4), strict=True))
    mask = torch.randn(heads[0], 5, 4) if masked else None
    results = []
    for function in (xformer_fast.scaled_dot_product_attention, torch.nn.functional.scaled_dot_product_attention):
        out = function(q, k, v, attn_mask=mask, enable_gqa=True)
        results.append((out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out).cumsum(-1))))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_torch_signature_float32_mask_beside_bfloat16():
    q, k, v = torch.randn(3, 2, 4, 9, 8).bfloat16().unbind()
    out = xformer_fast.scaled_dot_product_attention(q, k, v, attn_mask=torch.randn(9, 9))
    assert out.dtype == torch.bfloat16


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [12, 40])  # of which the shorter is attended as decoding is
def test_rows_of_least_numbers(dtype, length, monkeypatch):
    for isa in ISAS:
        monkeypatch.setenv("XFORMER_FAST_ISA", isa)
        check_rows_of_least_numbers("cpu", dtype, length)


@needs_kernels
def test_large_scores_without_options():
    """Of equal keys each has its share of the weight, in the backward too, however large the scores."""
    query, key = torch.full((1, 1, 20, 1), 1e5), torch.ones(1, 1, 4, 1)
    value = torch.randn(1, 1, 4, 1, requires_grad=True)
    xformer_fast.attention(query, key, value, scale=1.0).sum().backward()
    torch.testing.assert_close(value.grad, torch.full((1, 1, 4, 1), 5.0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(2, 4, 9, 8), (9, 8)], ids=str)
def test_torch_signature_all_dropped(shape):
    q, k, v = (torch.randn(shape, requires_grad=True) for _ in range(3))
    out = xformer_fast.scaled_dot_product_attention(q, k, v, dropout_p=1.0, is_causal=True)
    assert torch.equal(out, torch.nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=1.0, is_causal=True))
    assert torch.equal(out, torch.zeros(shape))
    for gradient in torch.autograd.grad(out, (q, k, v), torch.ones(shape)):
        assert torch.equal(gradient, torch.zeros(shape))
    with pytest.raises(ValueError, match="dropout_p must lie"):
        xformer_fast.scaled_dot_product_attention(q, k, v, dropout_p=1.5)


def test_torch_signature_is_torchs():
    """Positional order and defaults, as code written for torch calls it."""
    q = torch.randn(1, 2, 5, 8)
    expected = torch.nn.functional.scaled_dot_product_attention(q, q, q, None, 0.0, True, scale=0.2)
    torch.testing.assert_close(xformer_fast.scaled_dot_product_attention(q, q, q, None, 0.0, True, scale=0.2), expected)
