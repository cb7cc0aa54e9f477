"""timm models, patched against unpatched: small random ones of each kind of attention that timm has."""

import copy
import importlib

import pytest
import torch
from host_models import check_autocast, check_close, check_equal, check_life, disturb, import_timm, twins

timm = import_timm()

from model_list import MODELS as MODELS_OF_THE_LIST  # noqa: E402
from timm.layers import Attention, AttentionRope  # noqa: E402

import xformer_fast  # noqa: E402
from xformer_fast.integrations import follow, follow_attention, follow_windows  # noqa: E402

VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 4, "num_classes": 5}
SWIN = {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)}
MODELS = {  # name -> class, arguments, attention modules
    "vit": ("VisionTransformer", VIT, 2),
    "vit_norms_odd": ("VisionTransformer", VIT | {"img_size": 20, "qk_norm": True, "reg_tokens": 3}, 2),
    "vit_pool": ("VisionTransformer", VIT | {"global_pool": "map"}, 3),
    "vit_parallel": ("VisionTransformer", VIT | {"block_fn": "parallel_scaling"}, 2),
    "beit": ("Beit", VIT | {"use_abs_pos_emb": False, "use_rel_pos_bias": True}, 2),
    "beit_shared": ("Beit", VIT | {"use_shared_rel_pos_bias": True}, 2),
    "eva": ("Eva", VIT | {"embed_dim": 32, "use_rot_pos_emb": True, "qkv_fused": False}, 2),
    "relpos": ("VisionTransformerRelPos", VIT, 2),
    "swin": ("SwinTransformer", SWIN | {"num_classes": 5}, 4),
    "cait": ("Cait", VIT, 2),
    "hiera": ("Hiera", {"img_size": (64, 64), "embed_dim": 16, "num_heads": 1, "stages": (1, 1, 1, 1)}, 4),
}

FILES = {
    "VisionTransformer": "vision_transformer",
    "VisionTransformerRelPos": "vision_transformer_relpos",
    "SwinTransformer": "swin_transformer",
}
_WHOLE, _SHIFTED = ("window", (0, 0)), ("window", (1, 1))
WINDOWED = {  # name in the list -> size of the image, the windows of its layers
    "timm_swin": ((32, 48), [_WHOLE, _SHIFTED] * 2),
    "timm_swinv2": ((32, 48), [_WHOLE, _SHIFTED] * 2),
    "timm_maxvit": ((64, 64), [_WHOLE, ("grid", (0, 0))] * 2),
}
ONE_STAGE = {"vit": {"depth": 1}, "swin": {"depths": (2,), "num_heads": (2,)}}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(name, changes=()):
    kind, options, _ = MODELS[name]
    module = importlib.import_module(f"timm.models.{FILES.get(kind, kind.lower())}")
    options = options | dict(changes)
    if "block_fn" in options:
        options["block_fn"] = module.ParallelScalingBlock
    torch.manual_seed(0)
    return disturb(getattr(module, kind)(**options)).eval()


def images(name):
    size = MODELS[name][1]["img_size"]
    torch.manual_seed(1)
    return torch.randn(2, 3, *(size if isinstance(size, tuple) else (size, size)))


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients(name):
    model = build(name)
    patched = copy.deepcopy(model)
    report = xformer_fast.patch(patched)
    assert report.count == MODELS[name][2], str(report)
    check_equal(model, patched, lambda model: model(images(name)))
    check_close(model.train(), patched.train(), lambda model: model(images(name)))


@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"gated": True, "scale_norm": True}, {"attn_head_dim": 5}])
@pytest.mark.parametrize("kind", [Attention, AttentionRope])
@pytest.mark.parametrize("given", ["nothing", "bool", "float", "causal"])
def test_masks(kind, options, given):
    torch.manual_seed(0)
    norms = {"norm_layer": torch.nn.LayerNorm} if {"qk_norm", "scale_norm"} & options.keys() else {}
    reference, patched = twins(disturb(kind(24, num_heads=4, **options, **norms)), 1)
    x = torch.randn(2, 11, 24)
    keep = (torch.rand(2, 1, 11, 11) < 0.6) | torch.eye(11, dtype=torch.bool)
    arguments = {
        "nothing": {},
        "bool": {"attn_mask": keep},
        "float": {"attn_mask": torch.randn(4, 11, 11)},
        "causal": {"is_causal": True},
    }[given]
    check_equal(reference, patched, lambda model: model(x, **arguments))


@pytest.mark.parametrize("name", ["vit", "swin", "beit"])
def test_life(name):
    reference, patched = twins(build(name))
    assert str(patched) == str(reference)
    check_life(reference, patched, lambda model: model(images(name)))


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_autocast(name):
    check_autocast(*twins(build(name)), lambda model: model(images(name)))


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_compile(name):
    reference, patched = twins(build(name, ONE_STAGE[name]))
    compiled = torch.compile(patched, fullgraph=True, backend="eager")
    x = images(name)
    out, expected = compiled(x), reference(x)
    assert (out - expected).abs().max() <= 1e-4 * expected.abs().max()
    for result in (out, expected):
        result.square().sum().backward()
    for ours, theirs in zip(patched.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=0, atol=2e-3 * float(theirs.grad.abs().max()) + 1e-4)


def test_defaults_of_keyword_only_arguments_stay():
    class Scaled(Attention):
        def forward(self, x, *, scale=0.5):
            q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)

    x = torch.randn(2, 11, 24, generator=torch.Generator().manual_seed(1))
    check_equal(*twins(disturb(Scaled(24, num_heads=4)), 1), lambda model: model(x))


def test_dropout_reaches_the_op():
    patched = twins(Attention(24, num_heads=4, attn_drop=0.5), 1)[1]
    x = torch.randn(2, 11, 24)
    assert not torch.equal(patched(x), patched(x))
    patched.eval()
    assert torch.equal(patched(x), patched(x))


def test_backends_and_the_switch(monkeypatch):
    seen = []
    run = xformer_fast.ops.attention.attention

    def attention(*args, backend=None, **options):
        seen.append(backend)
        return run(*args, backend=backend, **options)

    monkeypatch.setattr(xformer_fast.ops.attention, "attention", attention)
    model = build("vit")
    x = images("vit")
    model(x)
    assert not seen
    with xformer_fast.patched(model, backend="reference"):
        model(x)
    assert seen == ["reference"] * 2
    model(x)
    assert len(seen) == 2


@pytest.mark.parametrize("name", WINDOWED)
def test_windows_are_fused(name, monkeypatch):
    """The shifted ones too, by attention that is off by default (Swin), has no sdpa (Swin-V2), or a grid (MaxViT)."""
    seen = []

    def window_attention(query, key, value, window, **options):
        seen.append((options["partition"], options.get("shift", (0, 0))))
        return xformer_fast.window_attention(query, key, value, window, **options)

    monkeypatch.setattr(follow_windows, "window_attention", window_attention)
    model = MODELS_OF_THE_LIST[name].build()
    xformer_fast.patch(model)
    with torch.no_grad():
        model(torch.randn(2, 3, *WINDOWED[name][0]))
    assert seen == WINDOWED[name][1]


def test_positions_of_pooled_maps_stay_apart(monkeypatch):
    """MViT's: queries and keys lie on maps of different sizes."""
    from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg

    seen = []

    def attention(**options):
        seen.append(options)
        return xformer_fast.attention(**options)

    monkeypatch.setattr(follow_attention, "attention", attention)
    torch.manual_seed(0)
    cfg = MultiScaleVitCfg(depths=(1, 1), embed_dim=16, num_heads=2)
    model = disturb(MultiScaleVit(cfg, img_size=64, num_classes=5)).eval()
    reference, patched = twins(model, 2)
    check_equal(reference, patched, lambda model: model(torch.ones(1, 3, 64, 64).cumsum(-1).sin()))
    assert len(seen) == 2 and all(call["mask"] is None and "decomposed_bias" in call for call in seen)


def test_a_padded_map_that_was_rolled_first_is_told():
    follow.tell_once.cache_clear()
    model = MODELS_OF_THE_LIST["timm_swin"].build()
    xformer_fast.patch(model)
    with pytest.warns(UserWarning, match="SwinTransformerBlock: windows are cut as its host does, since pad"):
        model(torch.randn(1, 3, 36, 44))


@pytest.mark.parametrize("name", ["timm_swinv2", "timm_maxvit"])
def test_life_of_windows(name):
    reference, patched = twins(MODELS_OF_THE_LIST[name].build())
    check_life(reference, patched, next(iter(MODELS_OF_THE_LIST[name].cases().values())))


def test_what_computes_its_scores_itself_is_told():
    from timm.models.mobilevit import LinearSelfAttention

    report = xformer_fast.patch(torch.nn.ModuleList([LinearSelfAttention(8), LinearSelfAttention(8)]))
    assert report.count == 0 and all("followed" in report.skipped[name] for name in "01")


def test_what_is_named_otherwise_is_told():
    report = xformer_fast.patch(build("cait"))  # class attention is replaced, talking heads are not
    assert report.count == 2 and [*report.skipped] == ["blocks.0.attn", "blocks.1.attn"]
    for file, kind, sizes in (
        ("convit", "GPSA", (32,)),
        ("shvit", "SHSA", (32, 8, 16)),
        ("efficientvit_mit", "LiteMLA", (32, 32)),
    ):
        cls = getattr(importlib.import_module(f"timm.models.{file}"), kind)
        assert [*xformer_fast.patch(torch.nn.ModuleList([cls(*sizes)])).skipped] == ["0"], kind


def test_what_holds_attention_is_not_told_beside_it():
    from timm.models.xcit import Xcit

    report = xformer_fast.patch(Xcit(img_size=32, embed_dim=16, depth=1, num_heads=2))
    assert report.count == 3 and not report.skipped
