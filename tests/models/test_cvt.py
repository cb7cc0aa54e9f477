"""CvT against transformers' of the same weights."""

import pytest
import torch
from families import images
from hosts import assert_near, transformers_model

from xformer_fast.models import CvT

pytest.importorskip("transformers")

SIZES = {"embed_dim": (16, 24, 32), "num_heads": (1, 3, 4), "depth": (1, 2, 3), "num_labels": 5}


@torch.no_grad()
def test_logits():
    host = transformers_model("CvtForImageClassification", **SIZES)
    image = images(2, 40, 56)
    assert_near(CvT.from_transformers(host).eval()(image), host(image).logits)


def test_stages_that_differ_are_refused():
    host = transformers_model("CvtForImageClassification", **SIZES, stride_kv=(2, 2, 1))
    with pytest.raises(ValueError, match=r"its config has stride_kv=\(2, 2, 1\)"):
        CvT.from_transformers(host)
