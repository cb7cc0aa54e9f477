"""SAM against transformers' of the same weights: points, boxes, masks, one mask and several."""

import pytest
import torch
from families import images, make, prompts
from hosts import HEADS, WIDTH, assert_near, transformers_model

from xformer_fast.models import SAM
from xformer_fast.models.sam import DecomposedMixer


@torch.no_grad()
@pytest.mark.parametrize("given", ["points", "boxes", "both", "masks"])
@pytest.mark.parametrize("single", [False, True])
def test_masks_and_scores(given, single):
    pytest.importorskip("transformers")
    host = transformers_model(
        "SamModel",
        vision_config={
            "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS, "image_size": 48, "mlp_dim": 48,
            "patch_size": 8, "window_size": 4, "global_attn_indexes": [1], "output_channels": 16, "num_pos_feats": 8,
        },
        prompt_encoder_config={"hidden_size": 16, "image_size": 48, "patch_size": 8, "mask_input_channels": 8},
        mask_decoder_config={"hidden_size": 16, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 24},
    )  # fmt: skip
    model, image = SAM.from_transformers(host).eval(), images(2, 48, 48)
    points, labels, boxes, masks = prompts(2)
    chosen = {
        "points": {"points": points, "labels": labels},
        "boxes": {"boxes": boxes},
        "both": {"points": points, "labels": labels, "boxes": boxes},
        "masks": {"boxes": boxes, "masks": masks},
    }[given]
    out = host(image, multimask_output=not single, **{f"input_{name}": x for name, x in chosen.items()})
    assert_near(model.encode(image).movedim(-1, 1), host.get_image_embeddings(image))
    for ours, theirs in zip(model(image, single=single, **chosen), (out.pred_masks, out.iou_scores), strict=True):
        assert_near(ours, theirs)


@torch.no_grad()
def test_prompts_do_not_see_each_other():
    model, image = make("sam"), images(2, 48, 48)
    points, labels, boxes, _ = prompts(2)
    features = model.encode(image)
    masks, scores = model.decode(features, points, labels, boxes)
    for i in range(2):
        alone = model.decode(features, points[:, i : i + 1], labels[:, i : i + 1], boxes[:, i : i + 1])
        torch.testing.assert_close(alone[0], masks[:, i : i + 1])
        torch.testing.assert_close(alone[1], scores[:, i : i + 1])


def test_errors():
    model, image = make("sam"), images(1, 48, 48)
    points, labels, *_ = prompts(1)
    with pytest.raises(ValueError, match="a prompt must have points or boxes"):
        model(image)
    with pytest.raises(ValueError, match="points and labels must be given together"):
        model(image, points)
    with pytest.raises(ValueError, match=r"image must be \(B, channels, 48, 48\), got shape \(1, 3, 48, 40\)"):
        model(image[..., :40], points, labels)
    mixer = DecomposedMixer(2, 8, sides=(4, 6), windowed=False)
    with pytest.raises(ValueError, match=r"the map must have sides \(4, 6\), got \(8, 6\)"):
        mixer(*torch.randn(3, 1, 8, 6, 2, 8))
