"""The CUDA C++ kernels of decoding on an emulated device, on the CPU: make test-cuda."""

import pytest
import torch
from attention_cases import unwritten_memory_is_nan
from decode_cases import check, draw, evaluate, truth_and_naive

import xformer_fast
from xformer_fast import dispatch
from xformer_fast.testing import check_close

if dispatch.cuda_problem("decode_attention_cuda") or not dispatch.emulates_cuda("decode_attention_cuda"):
    pytest.skip("no emulated device (make test-cuda)", allow_module_level=True)

from tests.cuda_emulation import plugin as device

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def on_cuda(**keywords):
    return xformer_fast.decode_attention(**keywords, backend="cuda")


@pytest.mark.parametrize("seed", range(75))
def test_random_calls(seed):
    case = draw(seed, DTYPES[seed % 3], small=seed % 5 > 0, rate=0.35)
    device.set_order(seed)
    with unwritten_memory_is_nan():
        result = evaluate(case, on_cuda)
    check(case, result, *truth_and_naive(case), "cuda, emulated")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (72, 100), (256, 256), (160, 5)], ids=str)
def test_head_dims_over_splits(dims, dtype):
    """One sequence of 900 keys is cut into ranges; with it a short one, and more rows than a tile has."""
    torch.manual_seed(0)
    dim, dim_v = dims
    query = torch.randn(2, 6, 5, dim).to(dtype)
    key, value = torch.randn(2, 1, 1000, dim).to(dtype), torch.randn(2, 1, 1000, dim_v).to(dtype)
    options = {"cache_lengths": torch.tensor([900, 7]), "sinks": torch.randn(6), "alibi_slopes": torch.rand(6) * 0.01}
    sides = []
    for backend, raised in (("cuda", dtype), ("reference", torch.float64), ("reference", dtype)):
        tensors = (t.to(raised) for t in (query, key, value))
        sides.append(xformer_fast.decode_attention(*tensors, **options, return_lse=True, backend=backend))
    for name, *results in zip(("out", "lse"), *sides, strict=True):
        check_close(*results, name, dtype=dtype)


def test_bad_values_stay_in_memory():
    """On a GPU values are not checked: lengths are held to the capacity, pages to those there are."""
    operators, q, keys = torch.ops.xformer_fast, torch.randn(2, 2, 1, 16), torch.randn(3, 2, 8, 16)
    table = torch.tensor([[-5, 99], [1, 2]], dtype=torch.int32)
    lengths = torch.tensor([1000, -4])
    out, _ = operators.decode_attention_cuda(q, keys, keys, lengths, table, None, None, None, 0, 0.25, 0.0, -1)
    assert out.isfinite().all() and not out[1].any()
    before = keys.clone()
    operators.kv_cache_append_cuda(keys, keys.clone(), q, q, torch.tensor([16, -1]), table)
    assert torch.equal(keys, before)
