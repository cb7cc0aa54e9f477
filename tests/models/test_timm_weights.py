"""MaxViT against timm's of the same weights."""

from dataclasses import replace

import torch
from families import images
from host_models import disturb, import_timm
from hosts import assert_near

import_timm()

from timm.models.maxxvit import MaxxVit, model_cfgs  # noqa: E402

from xformer_fast.models import MaxViT  # noqa: E402


@torch.no_grad()
def test_maxvit():
    published = model_cfgs["maxvit_tiny_tf"]
    config = replace(
        published, embed_dim=(32, 64), depths=(1, 2), block_type=("M", "M"), stem_width=16, head_hidden_size=64,
        transformer_cfg=replace(published.transformer_cfg, dim_head=16, window_size=(4, 4), grid_size=(4, 4)),
    )  # fmt: skip
    torch.manual_seed(0)
    host = disturb(MaxxVit(config, img_size=64, num_classes=5)).eval()
    image = images(2, 64, 96)
    assert_near(MaxViT.from_timm(host).eval()(image), host(image))
