"""What holds for every family: backends agree, gradients too; it compiles without a break, trains, drops, is saved."""

import copy
import io

import pytest
import torch
from families import CASES, FAMILIES, make
from marks import needs_kernels

from xformer_fast.testing import check_close
from xformer_fast.tuning import add_adapters, add_prefixes, add_prompts


def gradients(name, model):
    model.zero_grad()
    FAMILIES[name].loss(*FAMILIES[name].run(model)).backward()
    return {key: p.grad.cpu() for key, p in model.named_parameters() if key not in FAMILIES[name].unused}


@pytest.mark.parametrize(
    ("backend", "device"),
    [pytest.param("cpu", "cpu", marks=needs_kernels), pytest.param("triton", "cuda", marks=pytest.mark.gpu)],
)
@pytest.mark.parametrize(("name", "mixer"), CASES)
def test_backends_agree(name, mixer, backend, device, monkeypatch):
    """Outputs and all gradients, by the error rule: the reference backend in float64 is the truth."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    fused, naive = (make(name, mixer, backend=chosen).to(device) for chosen in (backend, "reference"))
    naive.load_state_dict(fused.state_dict())
    exact = copy.deepcopy(naive).double()
    for ours, theirs, truth in zip(*(FAMILIES[name].run(m) for m in (fused, naive, exact)), strict=True):
        check_close(ours, truth, theirs)
    ours, theirs, truth = (gradients(name, m) for m in (fused, naive, exact))
    largest = max(g.abs().max().item() for g in truth.values())  # a key's bias has a gradient of zero, by cancellation
    for key, gradient in ours.items():
        check_close(gradient, truth[key], theirs[key], key, magnitude=largest)


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_compiles_without_a_break(name):
    """One graph, which serves another length, too."""
    torch._dynamo.reset()
    family, graphs = FAMILIES[name], []
    model, inputs = make(name, **family.shallow), [family.inputs(length) for length in (11, 14)]
    for first, second in zip(*((*args, *options.values()) for args, options in inputs), strict=True):
        for axis, sides in enumerate(zip(first.shape, second.shape, strict=True)):
            if sides[0] != sides[1]:
                torch._dynamo.mark_dynamic(first, axis)

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for args, options in inputs:
        torch.testing.assert_close(compiled(*args, **options), model(*args, **options))
    assert len(graphs) == 1


@pytest.mark.parametrize("name", FAMILIES)
def test_trains(name):
    """A batch is learned by heart, with dropout on the way."""
    torch.manual_seed(0)
    family = FAMILIES[name]
    model = family.make(**family.training).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        loss = family.loss(*family.run(model))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < 0.6 * losses[0], losses


NO_PREFIXES = {"swin", "maxvit", "convnext", "replknet", "conformer", "branchformer", "sam"}
NO_PROMPTS = {"swin", "maxvit", "metaformer", "convnext", "replknet", "detr", "sam"}


@pytest.mark.parametrize("add", [add_prefixes, add_prompts, add_adapters])
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_added_learns(name, add):
    """Prefixes, prompts and adapters have a part in the results of every family that can take them."""
    model = make(name)
    before = {key for key, _ in model.named_parameters()}

    def learn():
        add(model)
        return {key: g for key, g in gradients(name, model).items() if key not in before}

    if name in {add_prefixes: NO_PREFIXES, add_prompts: NO_PROMPTS, add_adapters: {"replknet"}}[add]:
        with pytest.raises(ValueError):
            learn()
        return
    added = learn()
    assert added and all(g.abs().max() > 0 for key, g in added.items() if ".reduce." not in key)


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_saved_copied_cast(name):
    model, run = make(name), FAMILIES[name].run
    expected = run(model)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded = FAMILIES[name].make().eval()
    loaded.load_state_dict(torch.load(file))
    for twin in (loaded, copy.deepcopy(model)):
        for ours, theirs in zip(run(twin), expected, strict=True):
            assert torch.equal(ours, theirs)
    for ours, theirs in zip(run(model.bfloat16()), expected, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours - theirs).abs().max() <= 0.05 * theirs.abs().max()


def test_training_compiles():
    torch._dynamo.reset()
    model = make("gpt", depth=1)
    expected = gradients("gpt", model)
    model.compile(fullgraph=True, backend="aot_eager")
    for key, gradient in gradients("gpt", model).items():
        torch.testing.assert_close(gradient, expected[key])
