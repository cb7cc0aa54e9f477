"""The Triton kernels of linear attention in Triton's interpreter, on the CPU: TRITON_INTERPRET=1 pytest <this file>."""

import os

import pytest
import torch
from test_linear_attention import Case, on_backend

import xformer_fast
from xformer_fast import reference
from xformer_fast.testing import check_close

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("TRITON_INTERPRET=1 is not set", allow_module_level=True)


@pytest.mark.parametrize("seed", range(28))
def test_random_calls(seed):
    case = Case(seed, torch.float16 if seed % 4 == 3 else torch.float32, small=True)
    truth, naive = case.evaluate(reference.linear_attention, torch.float64), case.evaluate(reference.linear_attention)
    case.check(on_backend("triton"), truth, naive, "triton, interpreted")


@pytest.mark.parametrize("causal", [False, True])
def test_segments(causal):
    """Long enough to be cut in two; key lengths, more queries than keys."""
    torch.manual_seed(0)
    case = Case(0, torch.float32)
    case.packed = False
    case.tensors = {n: torch.randn(1, 2, s, 5) for n, s in (("query", 600), ("key", 540), ("value", 540))}
    case.tensors |= {"kv": torch.rand(1, 2, 5, 5), "z": torch.rand(1, 2, 5)}
    case.options = {"causal": causal, "key_lengths": torch.tensor([503])}
    truth, naive = case.evaluate(reference.linear_attention, torch.float64), case.evaluate(reference.linear_attention)
    case.check(on_backend("triton"), truth, naive, "triton, interpreted")


@pytest.mark.parametrize("dims", [(1, 1), (3, 100), (100, 5), (130, 130)], ids=str)
def test_head_dims(dims):
    torch.manual_seed(1)
    q, k, v = (torch.randn(1, 1, 40, d).requires_grad_() for d in (dims[0], dims[0], dims[1]))
    results = []
    for function, dtype in (
        (on_backend("triton"), None),
        (reference.linear_attention, torch.float64),
        (reference.linear_attention, None),
    ):
        leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (q, k, v)]
        out = function(query=leaves[0], key=leaves[1], value=leaves[2], causal=True, eps=0.1)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for ours, truth, naive in zip(*results, strict=True):
        check_close(ours, truth, naive)


@pytest.mark.parametrize("causal", [False, True])
def test_a_float16_state_may_exceed_float16(causal):
    """Sums of φ(k) vᵀ of 70,000 and more, of values that do not: every output and gradient is as small as they are."""
    torch.manual_seed(0)
    tensors = [torch.rand(1, 1, 80, 8), torch.rand(1, 1, 80, 8), 1000 + 50 * torch.rand(1, 1, 80, 8)]
    results = []
    for function, dtype in ((on_backend("triton"), torch.float16), (reference.linear_attention, torch.float64)):
        q, k, v = (t.half().to(dtype).requires_grad_() for t in tensors)
        out, (state, _) = function(query=q, key=k, value=v, causal=causal, return_state=True)
        assert state.max() > 7e4
        results.append([out, *torch.autograd.grad(out.sum(), (q, k, v))])
    (ours, *grads), (exact, *exact_grads) = results
    assert (ours - exact).abs().max() <= 2 * 2**-11 * exact.abs().max()
    assert all(grad.isfinite().all() for grad in grads)
    assert (grads[2] - exact_grads[2]).abs().max() <= 4 * 2**-11 * exact_grads[2].abs().max()


def test_the_same_call_gives_the_same_bits():
    leaves = [torch.randn(1, 2, 90, 8, requires_grad=True) for _ in range(3)]
    first, second = (
        torch.autograd.grad(
            xformer_fast.linear_attention(*leaves, causal=True, backend="triton").square().sum(), leaves
        )
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
