"""The Triton kernels of decoding on a GPU: random calls under the error rule, bfloat16 included."""

import pytest
import torch
from decode_cases import check, draw, evaluate, truth_and_naive

import xformer_fast

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def on_triton(**keywords):
    rope = keywords.get("rope")
    if rope is not None:
        keywords["rope"] = xformer_fast.Rope(rope.cos.cuda(), rope.sin.cuda(), interleaved=rope.interleaved)
    bias = keywords.get("relative_bias")
    if isinstance(bias, xformer_fast.DistanceBias):
        keywords["relative_bias"] = xformer_fast.DistanceBias(bias.values.cuda())
    elif bias is not None:
        keywords["relative_bias"] = xformer_fast.T5Bias(bias.table.cuda(), bidirectional=bias.bidirectional)
    return xformer_fast.decode_attention(**keywords, backend="triton")


@pytest.mark.parametrize("seed", range(90))
def test_random_calls(seed, record_property):
    record_property("proves", "decode_attention/triton")
    case = draw(seed, DTYPES[seed % 3])
    check(case, evaluate(case, on_triton, device="cuda"), *truth_and_naive(case), "triton")


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_every_time(dtype, record_property):
    record_property("proves", "decode_attention/triton")
    q, keys, values = (torch.randn(2, h, s, 128, device="cuda").to(dtype) for h, s in ((8, 1), (2, 4096), (2, 4096)))
    lengths = torch.tensor([4096, 1000], device="cuda")
    first = xformer_fast.decode_attention(q, keys, values, lengths, backend="triton")
    for _ in range(5):
        assert torch.equal(first, xformer_fast.decode_attention(q, keys, values, lengths, backend="triton"))
