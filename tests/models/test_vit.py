"""ViT and DeiT against transformers' of the same weights; with a linear mixer, its cost is linear in the pixels."""

import pytest
import torch
from families import images
from hosts import HEADS, WIDTH, assert_near, transformers_model
from marks import needs_kernels
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from xformer_fast.models import ViT

SIZES = {
    "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS, "intermediate_size": 48,
    "image_size": 24, "patch_size": 8, "num_labels": 5,
}  # fmt: skip


@torch.no_grad()
def test_logits():
    pytest.importorskip("transformers")
    host = transformers_model("ViTForImageClassification", **SIZES)
    image = images(3, 24, 24)
    assert_near(ViT.from_transformers(host).eval()(image), host(image).logits)


@torch.no_grad()
def test_distilled():
    pytest.importorskip("transformers")
    host = transformers_model("DeiTForImageClassificationWithTeacher", **SIZES)
    out = host(images(3, 24, 24))
    ours = ViT.from_transformers(host).eval()(images(3, 24, 24))
    for logits, theirs in zip(ours, (out.cls_logits, out.distillation_logits), strict=True):
        assert_near(logits, theirs)


class Recorder(TorchDispatchMode):
    """The largest tensor that any operator returns, in elements, and the operators of the package."""

    def __init__(self):
        super().__init__()
        self.largest, self.operators = 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.largest = max(self.largest, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)), 0)
        if function.namespace == "xformer_fast":
            self.operators.add(function._schema.name.split("::")[1])
        return out


def run(side, **choices):
    torch.manual_seed(0)
    model = ViT(5, image_size=side, patch=4, dim=16, depth=1, num_heads=2, **choices)
    with Recorder() as recorder:
        model(images(1, side, side)).square().sum().backward()
    return recorder


@needs_kernels
def test_linear_in_pixels():
    """Four times the pixels make tensors of four times the size; no operator but the linear one mixes places."""
    small, large = (run(side, mixer="linear", backend="cpu") for side in (64, 128))
    assert large.operators == {"linear_attention_cpu", "linear_attention_cpu_backward"}
    assert large.largest <= 4 * small.largest < 32**4
    quadratic = run(128, mixer="softmax", backend="reference")
    assert quadratic.largest >= 32**4  # a naive mixer is seen: tokens by tokens


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"image must be \(B, channels, \*\(24, 32\)\), got shape \(1, 3, 24, 24\)"):
        ViT(5, image_size=(24, 32), patch=8, dim=32, depth=1, num_heads=4)(images(1, 24, 24))
