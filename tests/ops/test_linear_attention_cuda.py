"""The CUDA C++ kernels of linear attention on an emulated device, on the CPU: make test-cuda."""

import pytest
import torch
from test_linear_attention import Case, on_backend

import xformer_fast
from xformer_fast import dispatch, reference
from xformer_fast.testing import check_close

if dispatch.cuda_problem("linear_attention_cuda") or not dispatch.emulates_cuda("linear_attention_cuda"):
    pytest.skip("no emulated device (make test-cuda)", allow_module_level=True)

from tests.cuda_emulation import plugin as device

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


class WithoutDecayGradient(Case):
    """A decay that requires grad is for other backends; and in float16 the naive formula has no 1 / eps above 65504."""

    def __init__(self, seed: int, dtype: torch.dtype):
        super().__init__(seed, dtype)
        if dtype == torch.float16:
            self.options["eps"] = max(self.options["eps"], 1e-3)

    def differentiated(self):
        return [name for name in super().differentiated() if name != "decay"]


def compare(case: Case):
    truth, naive = case.evaluate(reference.linear_attention, torch.float64), case.evaluate(reference.linear_attention)
    case.check(on_backend("cuda"), truth, naive, "cuda, emulated")


@pytest.mark.parametrize("seed", range(90))
def test_random_calls(seed):
    device.set_order(seed)
    compare(WithoutDecayGradient(seed, DTYPES[seed % 3]))


@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_segments(causal, decay, dtype):
    """Long enough to be cut in two; key lengths, more queries than keys, states in and out."""
    if decay and not causal:
        pytest.skip("decay is causal")
    torch.manual_seed(0)
    case = WithoutDecayGradient(0, dtype)
    case.packed = False
    case.tensors = {n: torch.randn(1, 2, s, 5).to(dtype) for n, s in (("query", 600), ("key", 540), ("value", 540))}
    case.tensors |= {"kv": torch.rand(1, 2, 5, 5), "z": torch.rand(1, 2, 5)}
    case.options = {"causal": causal, "key_lengths": torch.tensor([503])}
    if decay:
        case.tensors["decay"] = torch.tensor([0.99, 0.9995])
    compare(case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dims", [(64, 64), (3, 100), (128, 128), (100, 5), (130, 250)], ids=str)
def test_head_dims(dims, dtype):
    """Normalised in float32 alone, and with a large eps: else the first rows' gradients, of few keys, are cancellation,
    and of half inputs that of the output as it was stored."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(1, heads, 75, d).to(dtype) for heads, d in ((2, dims[0]), (1, dims[0]), (1, dims[1])))
    small, results = {"normalize": False, "scale": 1 / (75 * dims[0])}, []
    for function, raised in (
        (on_backend("cuda"), dtype),
        (reference.linear_attention, torch.float64),
        (reference.linear_attention, dtype),
    ):
        leaves = [t.to(raised).requires_grad_() for t in (q, k, v)]
        options = {"causal": True, "eps": 3.0} if dtype == torch.float32 else {"causal": True, **small}
        out = function(query=leaves[0], key=leaves[1], value=leaves[2], **options)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for ours, truth, naive in zip(*results, strict=True):
        check_close(ours, truth, naive, dtype=dtype)


@pytest.mark.parametrize("causal", [False, True])
def test_no_gradient_flows_from_queries_without_keys(causal):
    """1 / eps does not fit float16."""
    leaves = [torch.randn(1, 1, s, 8).half().requires_grad_() for s in (30, 10, 10)]
    out = xformer_fast.linear_attention(*leaves, causal=causal, key_lengths=torch.tensor([0]), backend="cuda")
    for tensor in (out, *torch.autograd.grad(out.sum(), leaves)):
        assert not tensor.any()
    out = xformer_fast.linear_attention(*leaves, causal=causal, backend="cuda")
    for grad in torch.autograd.grad(out.sum(), leaves):
        assert grad.isfinite().all()


def test_a_decay_that_requires_grad_is_refused():
    q, decay = torch.randn(1, 2, 8, 4), torch.tensor([0.9, 0.8], requires_grad=True)
    with pytest.raises(xformer_fast.BackendUnavailable, match="decay requires grad"):
        xformer_fast.linear_attention(q, q, q, causal=True, decay=decay, backend="cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_in_every_order(dtype):
    leaves = [torch.randn(1, 2, 90, 8).to(dtype).requires_grad_() for _ in range(3)]
    results = []
    for seed in range(3):
        device.set_order(seed)
        out = xformer_fast.linear_attention(*leaves, causal=True, backend="cuda")
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("causal", [False, True])
def test_a_float16_state_may_exceed_float16(causal):
    """Sums of φ(k) vᵀ of 70,000 and more, of values that do not: every output and gradient is as small as they are."""
    torch.manual_seed(0)
    tensors = [torch.rand(1, 1, 200, 8), torch.rand(1, 1, 200, 8), 1000 + 50 * torch.rand(1, 1, 200, 8)]
    results = []
    for function, dtype in ((on_backend("cuda"), torch.float16), (reference.linear_attention, torch.float64)):
        q, k, v = (t.half().to(dtype).requires_grad_() for t in tensors)
        out, (state, _) = function(query=q, key=k, value=v, causal=causal, return_state=True)
        assert state.max() > 7e4
        results.append([out, *torch.autograd.grad(out.sum(), (q, k, v))])
    (ours, *grads), (exact, *exact_grads) = results
    assert (ours - exact).abs().max() <= 2 * 2**-11 * exact.abs().max()
    assert all(grad.isfinite().all() for grad in grads)
    assert (grads[2] - exact_grads[2]).abs().max() <= 4 * 2**-11 * exact_grads[2].abs().max()
