"""Swin, V1 and V2, against transformers' of the same weights."""

import pytest
import torch
from families import images
from hosts import assert_near, transformers_model

from xformer_fast.models import Swin

SIZES = {"image_size": 32, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4, "num_labels": 5}


@torch.no_grad()
@pytest.mark.parametrize(("height", "width"), [(32, 32), (44, 60)])  # the last map is one window, or 6 × 8 and padded
@pytest.mark.parametrize("name", ["SwinForImageClassification", "Swinv2ForImageClassification"])
def test_logits(name, height, width):
    pytest.importorskip("transformers")
    host = transformers_model(name, **SIZES | {"image_size": 32 if height == 32 else 64})
    image = images(2, height, width)
    assert_near(Swin.from_transformers(host).eval()(image), host(image).logits)


@torch.no_grad()
def test_v2_windows_are_no_larger_than_the_map():
    pytest.importorskip("transformers")
    host = transformers_model("Swinv2ForImageClassification", **SIZES | {"window_size": 8})
    model = Swin.from_transformers(host).eval()
    assert [stage.layers[1].mixer.branch[0].mixer.window_size for stage in model.stages] == [(8, 8), (4, 4)]
    assert_near(model(images(2)), host(images(2)).logits)


def test_errors():
    with pytest.raises(ValueError, match="version must be 1 or 2, got 3"):
        Swin(5, version=3)
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="its config has use_absolute_embeddings=True"):
        Swin.from_transformers(transformers_model("SwinForImageClassification", **SIZES, use_absolute_embeddings=True))
