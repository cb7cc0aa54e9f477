"""MetaFormer with pooling against transformers' PoolFormer of the same weights."""

import pytest
import torch
from families import images
from hosts import assert_near, transformers_model
from torch import nn

from xformer_fast.models import MetaFormer


@torch.no_grad()
@pytest.mark.parametrize("layer_scale", [True, False])
def test_logits(layer_scale):
    pytest.importorskip("transformers")
    host = transformers_model(
        "PoolFormerForImageClassification", hidden_sizes=[8, 8, 16, 16], depths=[1, 2, 1, 1], num_labels=5,
        use_layer_scale=layer_scale,
    )  # fmt: skip
    image = images(2, 64, 96)
    assert_near(MetaFormer.from_transformers(host).eval()(image), host(image).logits)


def test_mixers():
    small = {"dims": (8, 16), "depths": (1, 1), "patches": ((7, 4, 2), (3, 2, 1))}
    model = MetaFormer(5, mixers=("identity", lambda dim: nn.Linear(dim, dim)), **small)
    mixers = [stage[1][0].mixer.branch for stage in model.stages]
    assert [type(mixer) for mixer in mixers] == [nn.Identity, nn.Linear] and mixers[1].in_features == 16
    with pytest.raises(ValueError, match=r"mixers must be of pooling, identity, softmax, .* got 'quadratic'"):
        MetaFormer(5, mixers=("pooling", "quadratic"), **small)
