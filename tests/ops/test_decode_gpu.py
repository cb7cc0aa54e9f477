"""The kernels of decoding on a GPU: random calls under the error rule, bfloat16 included."""

import functools

import pytest
import torch
from decode_cases import check, draw, evaluate, truth_and_naive

import xformer_fast
from xformer_fast import dispatch

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["triton", "cuda"], autouse=True)
def backend(request, record_property):
    """The backend under test; the recorded property is what `make gpu-proof` takes as evidence for it."""
    if request.param == "cuda" and (missing := dispatch.cuda_problem("decode_attention_cuda")):
        pytest.skip(missing)
    record_property("proves", f"decode_attention/{request.param}")
    return request.param


def on_gpu(backend, **keywords):
    rope = keywords.get("rope")
    if rope is not None:
        keywords["rope"] = xformer_fast.Rope(rope.cos.cuda(), rope.sin.cuda(), interleaved=rope.interleaved)
    bias = keywords.get("relative_bias")
    if isinstance(bias, xformer_fast.DistanceBias):
        keywords["relative_bias"] = xformer_fast.DistanceBias(bias.values.cuda())
    elif bias is not None:
        keywords["relative_bias"] = xformer_fast.T5Bias(bias.table.cuda(), bidirectional=bias.bidirectional)
    return xformer_fast.decode_attention(**keywords, backend=backend)


@pytest.mark.parametrize("seed", range(90))
def test_random_calls(backend, seed):
    case = draw(seed, DTYPES[seed % 3])
    function = functools.partial(on_gpu, backend)
    check(case, evaluate(case, function, device="cuda"), *truth_and_naive(case), backend)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_every_time(backend, dtype):
    q, keys, values = (torch.randn(2, h, s, 128, device="cuda").to(dtype) for h, s in ((8, 1), (2, 4096), (2, 4096)))
    lengths = torch.tensor([4096, 1000], device="cuda")
    first = xformer_fast.decode_attention(q, keys, values, lengths, backend=backend)
    for _ in range(5):
        assert torch.equal(first, xformer_fast.decode_attention(q, keys, values, lengths, backend=backend))
