"""Patched models against their unpatched twins: what the tests of all host libraries share."""

import copy
import pickle

import pytest
import torch

import xformer_fast


def prepare_timm():
    """Before timm is imported: a torchvision without kernels for this torch does not load; timm needs none of them."""
    try:
        import torchvision  # noqa: F401
    except ModuleNotFoundError:
        pass
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)


_KEPT = []  # a library's operators go with it


def import_timm():
    """timm, or the test file is skipped."""
    prepare_timm()
    return pytest.importorskip("timm")


def disturb(model):
    """Moves the parameters off their initial values, and the statistics of batch norms, frozen ones too: zero biases
    hide mistakes, small weights make scores flat."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * (0.15 if parameter.dim() > 1 else 0.3))
        for norm in (module for module in model.modules() if getattr(module, "running_var", None) is not None):
            for name, buffer in norm.named_buffers():
                if buffer.is_floating_point():
                    noise = torch.rand(buffer.shape, generator=generator)
                    buffer.add_(noise if name in ("running_var", "weight") else noise - 0.5)
    return model


def twins(model, count=None):
    """model and a patched deep copy; `count` is how many modules patch must replace, None: any number but none."""
    patched = copy.deepcopy(model)
    report = xformer_fast.patch(patched)
    assert not report.skipped and (report.count == count if count is not None else report.count > 0), str(report)
    return model, patched


def outputs_and_gradients(model, run):
    model.zero_grad()
    out = run(model)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    (out * weights).sum().backward()
    return out.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check_equal(reference, patched, run, out_tolerance=1e-4, grad_tolerance=2e-3):
    """Outputs of run(model), relative to the largest, and every parameter's gradient; returns the largest errors."""
    expected, expected_grads = outputs_and_gradients(reference, run)
    out, grads = outputs_and_gradients(patched, run)
    out_error = float((out - expected).abs().max() / expected.abs().max())
    assert out_error <= out_tolerance
    assert grads.keys() == expected_grads.keys()
    largest, grad_error = max(g.abs().max() for g in expected_grads.values()), 0.0
    for name, expected in expected_grads.items():  # a key bias has no gradient but rounding: hence the floor
        size = max(expected.abs().max(), 1e-3 * largest)
        error = float((grads[name] - expected).abs().max() / size)
        assert error <= grad_tolerance, f"{name}: {error:.2e} of {size:.2e}"
        grad_error = max(grad_error, error)
    return out_error, grad_error


def check_autocast(reference, patched, run):
    """Under bfloat16 autocast: outputs and gradients at most twice as far from float32 ones as the host's own are."""

    def half(model):
        with torch.autocast("cpu", torch.bfloat16):
            return run(model).float()

    exact, ours, theirs = (
        outputs_and_gradients(m, f) for m, f in ((reference, run), (patched, half), (reference, half))
    )
    for a, b, truth in ((ours[0], theirs[0], exact[0]), *((ours[1][n], theirs[1][n], exact[1][n]) for n in exact[1])):
        allowed = 2 * (b - truth).abs().max() + 1e-2 * truth.abs().max()
        assert (a - truth).abs().max() <= allowed


@torch.no_grad()
def check_close(reference, patched, run, tolerance=1e-4):
    expected = run(reference)
    assert (run(patched) - expected).abs().max() <= tolerance * expected.abs().max()


@torch.no_grad()
def check_life(reference, patched, run):
    """Copies and pickles stay patched, state_dict is the host's, unpatch leaves nothing.

    torch pickles no parametrized modules.
    """
    assert patched.state_dict().keys() == reference.state_dict().keys()
    reference.load_state_dict(patched.state_dict())
    expected = run(patched)
    twins = [copy.deepcopy(patched)]
    if not any(hasattr(module, "parametrizations") for module in reference.modules()):
        twins.append(pickle.loads(pickle.dumps(patched)))
    for twin in twins:
        assert [type(m) for m in twin.modules()] == [type(m) for m in patched.modules()]
        assert torch.equal(run(twin), expected)
        xformer_fast.unpatch(twin)
        assert [type(m) for m in twin.modules()] == [type(m) for m in reference.modules()]
        assert torch.equal(run(twin), run(reference))
        for ours, theirs in zip(twin.modules(), reference.modules(), strict=True):
            assert ours.__dict__.keys() == theirs.__dict__.keys()
