"""ConvNeXt against transformers' of the same weights."""

import pytest
import torch
from families import images
from hosts import assert_near, transformers_model

from xformer_fast.models import ConvNeXt

pytest.importorskip("transformers")


@torch.no_grad()
@pytest.mark.parametrize("layer_scale", [1e-6, 0.0])
def test_logits(layer_scale):
    host = transformers_model(
        "ConvNextForImageClassification", hidden_sizes=[8, 8, 16, 16], depths=[1, 2, 1, 1], num_labels=5,
        layer_scale_init_value=layer_scale,
    )  # fmt: skip
    image = images(2, 64, 96)
    assert_near(ConvNeXt.from_transformers(host).eval()(image), host(image).logits)
