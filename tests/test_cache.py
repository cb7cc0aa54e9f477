"""`KVCache`: a sequence generated token by token equals attention of the whole, contiguous and paged."""

import pytest
import torch

import xformer_fast
from xformer_fast import KVCache
from xformer_fast.testing import check_close


def sequence(batch, length, dtype=torch.float32, heads=4, kv_heads=2, dim=32):
    torch.manual_seed(0)
    return [torch.randn(batch, h, length, dim).to(dtype) for h in (heads, kv_heads, kv_heads)]


def part(tensors, *where):
    return [t[where[0], :, where[1]] for t in tensors]


OPTIONS = {
    "plain": {},
    "window": {"window": (9, 0), "softcap": 10.0},
    "alibi": {"alibi_slopes": torch.rand(4), "sinks": torch.randn(4)},
    "t5": {"relative_bias": xformer_fast.T5Bias(torch.randn(32, 4), bidirectional=False)},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("page_size", [None, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_generation_equals_attention_of_the_whole(page_size, dtype, options):
    whole = sequence(2, 40, dtype)
    angles = torch.arange(64)[:, None] * 10000.0 ** (-torch.arange(0, 32, 2) / 32)
    options = {**OPTIONS[options], "rope": xformer_fast.Rope(angles.cos(), angles.sin())}
    cache = KVCache(2, 2, 32, 50, page_size=page_size, dtype=dtype)
    steps = [slice(0, 23), slice(23, 24), slice(24, 28), slice(28, 40)]
    out = torch.cat([cache.attend(*part(whole, slice(None), s), **options) for s in steps], 2)
    exact = {**options, "rope": xformer_fast.Rope(angles.double().cos(), angles.double().sin())}
    truth = xformer_fast.attention(*(t.double() for t in whole), causal=True, **exact, backend="reference")
    naive = xformer_fast.attention(*whole, causal=True, **options, backend="reference")
    check_close(out, truth, naive)
    assert cache.lengths.tolist() == [40, 40] and cache.length(1) == 40


@pytest.mark.parametrize("name", ["distance", "positions"])
@pytest.mark.parametrize("tokens", [8, 20])  # through decode_attention either way: attention takes these otherwise
def test_prompts_with_options_that_attention_takes_otherwise(tokens, name):
    """A DistanceBias is as long as the cache's capacity; query_positions of a Rope serve the new keys too."""
    query, key, value = sequence(2, tokens)
    angles = torch.arange(64)[:, None] * 10000.0 ** (-torch.arange(0, 32, 2) / 32)
    places, bias = 3 + 2 * torch.arange(tokens), torch.randn(4, tokens + 29)
    made = {
        "distance": {"relative_bias": xformer_fast.DistanceBias(bias)},
        "positions": {"rope": xformer_fast.Rope(angles.cos(), angles.sin(), query_positions=places)},
    }[name]
    both = {
        "distance": {"relative_bias": xformer_fast.DistanceBias(bias[:, 30 - tokens : 29 + tokens])},
        "positions": {
            "rope": xformer_fast.Rope(angles.cos(), angles.sin(), query_positions=places, key_positions=places)
        },
    }[name]
    cache = KVCache(2, 2, 32, 30)
    out = cache.attend(query, key, value, **made)
    torch.testing.assert_close(out, xformer_fast.attention(query, key, value, causal=True, **both))


@pytest.mark.parametrize("page_size", [None, 8])
def test_sequences_come_and_go(page_size):
    """Three sequences of different lengths, one ended and another begun in its place: each sees its own keys alone."""
    cache = KVCache(3, 2, 32, 40, page_size=page_size, num_pages=None if page_size is None else 9)
    old, new = sequence(3, 30), [t.flip(0, 2) for t in sequence(3, 30)]
    for row, length in ((0, 5), (1, 20), (2, 12)):
        cache.attend(*part(old, slice(row, row + 1), slice(0, length)), rows=[row])
    cache.free(1)
    with pytest.raises(ValueError, match="row 1 is not in use"):
        cache.attend(*part(old, slice(1, 2), slice(0, 1)), rows=[1])
    both = [torch.stack((t[0, :, 5:6], t[2, :, 12:13])) for t in old]
    out = cache.attend(*both)  # the rows in use, in order
    assert cache.lengths.tolist() == [6, 0, 13]
    assert cache.add() == 1
    cache.attend(*part(new, slice(1, 2), slice(0, 17)), rows=[1])
    step = [torch.stack((t[2, :, 13:14], n[1, :, 17:18], t[0, :, 6:7])) for t, n in zip(old, new, strict=True)]
    out = cache.attend(*step, rows=[2, 1, 0])  # in any order
    for i, (source, row, length) in enumerate(((old, 2, 14), (new, 1, 18), (old, 0, 7))):
        whole = xformer_fast.attention(*part(source, slice(row, row + 1), slice(0, length)), causal=True)
        torch.testing.assert_close(out[i], whole[0, :, -1:])
    if page_size is not None:
        assert cache.free_pages == 9 - 1 - 3 - 2


def test_truncate_forgets():
    whole = sequence(1, 20)
    cache = KVCache(1, 2, 32, 32, page_size=4)
    first = cache.attend(*part(whole, slice(None), slice(0, 18)))
    cache.truncate(0, 9)
    assert cache.free_pages == 8 - 3
    torch.testing.assert_close(cache.attend(*part(whole, slice(None), slice(9, 18))), first[:, :, 9:])


def test_rows_reordered():
    """Each row goes on from another's keys, and from its own length."""
    whole = sequence(3, 20)
    cache = KVCache(3, 2, 32, 20)
    cache.attend(*part(whole, slice(None), slice(0, 9)))
    cache.truncate(2, 5)
    cache.reorder(torch.tensor([2, 0, 2]))
    assert cache.lengths.tolist() == [5, 9, 5] and [cache.length(row) for row in range(3)] == [5, 9, 5]
    step = [torch.stack((t[2, :, 5:6], t[0, :, 9:10], t[1, :, 5:6])) for t in whole]
    out = cache.attend(*step)
    for row, (source, length) in enumerate(((2, 6), (0, 10), (2, 5))):
        query, key, value = part(whole, slice(source, source + 1), slice(0, length))
        if row == 2:  # its new token is another's
            query, key, value = (torch.cat((t, s[2:]), 2) for t, s in zip((query, key, value), step, strict=True))
        expected = xformer_fast.attention(query, key, value, causal=True)[0, :, -1:]
        torch.testing.assert_close(out[row], expected)
    for kept, rows, words in (
        (cache, [0, 1], "rows must name one of 3 rows each, got shape"),
        (cache, [0, 1, 3], "row 3 is not in use"),
        (KVCache(1, 2, 32, 16, page_size=4), [0], "a paged cache cannot be reordered"),
    ):
        with pytest.raises(ValueError, match=words):
            kept.reorder(torch.tensor(rows))


def test_rows_not_in_use_stay_empty_when_reordered():
    whole = sequence(3, 10)
    cache = KVCache(3, 2, 32, 20)
    cache.attend(*part(whole, slice(None), slice(0, 9)))
    cache.free(2)
    for unused in (1, 2, 7):  # what row 2 names says nothing
        cache.reorder(torch.tensor([1, 0, unused]))
        assert cache.lengths.tolist() == [9, 9, 0] and cache.length(2) == 0
    with pytest.raises(ValueError, match="row 2 is not in use"):
        cache.reorder(torch.tensor([2, 0, 1]))
    assert cache.add() == 2 and cache.length(2) == 0
    out = cache.attend(*part(whole, slice(2, 3), slice(0, 1)), rows=[2])
    expected = xformer_fast.attention(*part(whole, slice(2, 3), slice(0, 1)), causal=True)
    torch.testing.assert_close(out, expected)
    out = cache.attend(*part(whole, slice(0, 1), slice(9, 10)), rows=[1])  # row 0's, after three exchanges
    torch.testing.assert_close(
        out[0], xformer_fast.attention(*part(whole, slice(0, 1), slice(0, 10)), causal=True)[0, :, 9:]
    )


@pytest.mark.parametrize("page_size", [None, 8])
@pytest.mark.parametrize("tokens", [1, 20])
def test_no_rows(page_size, tokens):
    cache, nothing = KVCache(2, 2, 32, 40, page_size=page_size), part(sequence(2, tokens), slice(0, 0), slice(None))
    assert cache.attend(*nothing, rows=[]).shape == (0, 4, tokens, 32)
    cache.free(0)
    cache.free(1)
    assert cache.attend(*nothing).shape == (0, 4, tokens, 32)
    assert cache.lengths.tolist() == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [8, 20])  # through decode_attention, through attention
def test_autocast_leaves_the_dtype_to_the_cache(tokens, dtype):
    whole = sequence(2, tokens, dtype)
    query, key, value = whole[0].bfloat16(), whole[1].float(), whole[2]
    caches = [KVCache(2, 2, 32, 40, dtype=dtype) for _ in range(2)]
    with torch.autocast("cpu", torch.bfloat16):
        out = caches[0].attend(query, key, value)
    expected = caches[1].attend(query.to(dtype), key.to(dtype), value)
    assert out.dtype == dtype and torch.equal(out, expected) and torch.equal(caches[0].key, caches[1].key)


def test_errors():
    cache = KVCache(2, 2, 32, 16, page_size=4, num_pages=5)
    whole = sequence(2, 20)
    cases = [
        (lambda: KVCache(0, 2, 32, 16), "batch must be at least 1"),
        (lambda: KVCache(1, 2, 32, 16, dtype=torch.float64), "dtype must be"),
        (lambda: KVCache(1, 2, 32, 16, num_pages=3), "give page_size too"),
        (lambda: KVCache(1, 2, 32, 16, page_size=0), "page_size must be at least 1"),
        (lambda: cache.attend(*whole), "exceed its capacity, 16"),
        (lambda: cache.attend(*part(whole, slice(None), slice(0, 12))), "5 free pages, this step needs 6"),
        (lambda: cache.attend(*part(whole, slice(0, 1), slice(0, 2))), "B = 2 rows"),
        (lambda: cache.attend(*part(whole, slice(None), slice(0, 2)), rows=[1, 1]), "must differ"),
        (lambda: cache.attend(*part(whole, slice(0, 1), slice(0, 2)), rows=[2]), "row 2 is not in use"),
        (lambda: cache.add(), "all 2 rows are in use"),
        (lambda: cache.truncate(0, 1), "length must lie in 0..0"),
    ]
    for wrong, words in cases:
        with pytest.raises((ValueError, TypeError), match=words):
            wrong()
    assert cache.lengths.tolist() == [0, 0] and cache.free_pages == 5
    cache.attend(*part(whole, slice(None), slice(0, 6)))
    assert cache.free_pages == 1


@pytest.mark.parametrize("tokens", [8, 20])  # through decode_attention, through attention
def test_prompts_of_any_length_are_checked_alike(tokens):
    query, key, value = sequence(1, tokens)
    cache = KVCache(1, 2, 32, 40)
    for name, tensors in {
        "query": (query.clone().requires_grad_(), key, value),
        "new_key": (query, key.clone().requires_grad_(), value),
        "new_value": (query, key, value.clone().requires_grad_()),
    }.items():
        with pytest.raises(ValueError, match=f"{name} requires grad"):
            cache.attend(*tensors)
    slopes = torch.rand(4, requires_grad=True)
    with pytest.raises(ValueError, match="alibi_slopes requires grad"):
        cache.attend(query, key, value, alibi_slopes=slopes)
    with pytest.raises(ValueError, match="new_key must be"):
        cache.attend(query, key[:, :1], value[:, :1])
    with pytest.raises(TypeError, match="dropout_p"):
        cache.attend(query, key, value, dropout_p=0.5)
    with pytest.raises(TypeError, match=r"query is torch.float32, the caches are torch.bfloat16"):
        KVCache(1, 2, 32, 40, dtype=torch.bfloat16).attend(query, key, value)
    assert cache.length(0) == 0 and not cache.key.any() and not cache.key.requires_grad
    with torch.no_grad():
        out = cache.attend(query.requires_grad_(), key, value, alibi_slopes=slopes, backend="reference")
    assert out.shape == query.shape and cache.length(0) == tokens
