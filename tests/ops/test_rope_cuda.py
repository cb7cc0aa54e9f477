"""The CUDA C++ RoPE kernel on an emulated device, on the CPU: make test-cuda."""

import pytest
import torch
from attention_cases import unwritten_memory_is_nan
from rope_cases import compare, draw, evaluate, on_backend, tables

import xformer_fast
from xformer_fast import Rope, dispatch, reference
from xformer_fast.ops import rope as rope_op

if dispatch.cuda_problem("rope_cuda") or not dispatch.emulates_cuda("rope_cuda"):
    pytest.skip("no emulated device (make test-cuda)", allow_module_level=True)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("seed", range(90))
def test_random_calls(seed):
    case = draw(seed, DTYPES[seed % 3])
    with unwritten_memory_is_nan():
        results = evaluate(case, on_backend("cuda"))
    compare(case, results, "cuda, emulated")


@pytest.mark.parametrize("interleaved", [False, True])
def test_in_place(interleaved):
    x, (cos, sin) = torch.randn(2, 3, 21, 24), tables(20)
    expected = reference.apply_rope(x, cos, sin, interleaved=interleaved)
    assert xformer_fast.apply_rope(x, cos, sin, interleaved=interleaved, inplace=True, backend="cuda") is x
    torch.testing.assert_close(x, expected)


def test_query_and_key_dense_and_packed():
    q, k, (cos, sin) = torch.randn(2, 4, 7, 24), torch.randn(2, 2, 19, 24), tables(16)
    rope, cu = Rope(cos, sin), torch.tensor([0, 3, 7], dtype=torch.int32)
    packed = q[0].transpose(0, 1)
    for ours, expected in (
        (rope.rotate(q, k, backend="cuda"), rope.rotate(q, k, backend="reference")),
        (rope.rotate_packed(packed, packed, cu, cu, backend="cuda"),
         rope.rotate_packed(packed, packed, cu, cu, backend="reference")),
    ):  # fmt: skip
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_more_than_2_to_the_31_elements():
    """Rows 2^26 elements apart. Pages that nobody touches cost nothing."""
    rows, apart, dim = 40, 2**26, 8
    memory = torch.empty((rows - 1) * apart + 64, dtype=torch.float16)
    x = memory.as_strided((1, 1, rows, dim), (0, 0, apart, 1)).copy_(torch.randn(1, 1, rows, dim))
    cos, sin = tables(dim)
    torch.testing.assert_close(xformer_fast.apply_rope(x, cos, sin, backend="cuda"), reference.apply_rope(x, cos, sin))


def test_positions_outside_the_tables_stay_in_memory():
    x, (cos, sin) = torch.randn(1, 1, 4, 8), tables(8, 10)
    places = torch.tensor([-5, 0, 9, 100])
    call = rope_op.Call((x,), (places,), (0,), cos, sin)
    (out,) = rope_op.rotate(call, "cuda")
    torch.testing.assert_close(out, reference.apply_rope(x, cos, sin, positions=places.clamp(0, 9)))
