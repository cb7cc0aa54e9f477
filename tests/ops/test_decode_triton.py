"""The Triton kernels of decoding in Triton's interpreter, on the CPU: TRITON_INTERPRET=1 pytest <this file>.

Shapes are small, and bfloat16, which the interpreter holds as integers, is left to a GPU.
"""

import os

import pytest
import torch
from attention_cases import unwritten_memory_is_nan
from decode_cases import check, draw, evaluate, truth_and_naive

import xformer_fast

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("TRITON_INTERPRET=1 is not set", allow_module_level=True)


def on_triton(**keywords):
    return xformer_fast.decode_attention(**keywords, backend="triton")


@pytest.mark.parametrize("seed", range(40))
def test_random_calls(seed):
    case = draw(seed, (torch.float32, torch.float16)[seed % 2], small=True, rate=0.35)
    with unwritten_memory_is_nan():
        result = evaluate(case, on_triton)
    check(case, result, *truth_and_naive(case), "triton")


@pytest.mark.parametrize("splits", [1, 2, 5])
def test_any_number_of_splits(splits, monkeypatch):
    from xformer_fast.kernels import decode

    monkeypatch.setattr(decode, "split_count", lambda *shape: splits)
    torch.manual_seed(splits)
    q, keys, values = torch.randn(2, 4, 3, 32), torch.randn(2, 2, 70, 32), torch.randn(2, 2, 70, 16)
    lengths, sinks = torch.tensor([70, 5]), torch.randn(4)
    for options in ({}, {"sinks": sinks}, {"window": (20, 0)}):
        out, lse = on_triton(
            query=q, key_cache=keys, value_cache=values, cache_lengths=lengths, return_lse=True, **options
        )
        expected = xformer_fast.decode_attention(
            q, keys, values, lengths, return_lse=True, backend="reference", **options
        )
        torch.testing.assert_close((out, lse), expected)


def test_bad_values_stay_in_memory():
    """On a GPU values are not checked: lengths are clamped to the capacity, pages to those there are."""
    operators, q, keys = torch.ops.xformer_fast, torch.randn(2, 2, 1, 16), torch.randn(3, 2, 8, 16)
    table = torch.tensor([[-5, 99], [1, 2]], dtype=torch.int32)
    lengths = torch.tensor([1000, -4])
    out, _ = operators.decode_attention_triton(q, keys, keys, lengths, table, None, None, None, 0, 0.25, 0.0, -1)
    assert out.isfinite().all() and not out[1].any()
    before = keys.clone()
    operators.kv_cache_append_triton(keys, keys.clone(), q, q, torch.tensor([16, -1]), table)
    assert torch.equal(keys, before)
