"""DETR against transformers' of the same weights, its loss too; the assignment against all there are."""

from itertools import permutations

import pytest
import torch
from families import images, shown
from hosts import HEADS, WIDTH, assert_near, transformers_model

from xformer_fast.models import DETR
from xformer_fast.models.detr import ResNet, corners, generalized_iou, match, matching_loss

OBJECTS = [
    (torch.tensor([3]), torch.tensor([[0.5, 0.5, 0.25, 0.5]])),
    (torch.tensor([0, 4, 0]), torch.tensor([[0.2, 0.3, 0.1, 0.1], [0.7, 0.6, 0.4, 0.3], [0.5, 0.2, 0.2, 0.2]])),
    (torch.tensor([], dtype=torch.int64), torch.zeros(0, 4)),
    (torch.tensor([1, 2]), torch.tensor([[0.4, 0.4, 0.3, 0.6], [0.6, 0.5, 0.2, 0.9]])),
]


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
def test_logits_boxes_loss(masked):
    transformers = pytest.importorskip("transformers")
    resnet = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 2], "out_features": ["stage2"]}
    host = transformers_model(
        "DetrForObjectDetection", backbone_config=transformers.ResNetConfig(**resnet), d_model=WIDTH, encoder_layers=2,
        decoder_layers=2, encoder_attention_heads=HEADS, decoder_attention_heads=HEADS, encoder_ffn_dim=48,
        decoder_ffn_dim=48, num_queries=6, num_labels=5,
    )  # fmt: skip
    model, image = DETR.from_transformers(host).eval(), images(4, 64, 96)
    mask = shown(64, 96) if masked else None
    labels = [{"class_labels": classes, "boxes": boxes} for classes, boxes in OBJECTS]
    out = host(image, pixel_mask=mask if mask is None else mask.long(), labels=labels)
    logits, boxes = model(image, mask)
    assert_near(logits, out.logits)
    assert_near(boxes, out.pred_boxes)
    assert_near(matching_loss(logits, boxes, OBJECTS), out.loss)
    every_logits, every_boxes = model(image, mask, all_layers=True)
    assert torch.equal(every_logits[-1], logits) and torch.equal(every_boxes[-1], boxes) and len(every_logits) == 2
    model.decoder = model.decoder[:1]
    assert torch.equal(every_logits[0], model(image, mask)[0])


def test_the_assignment_is_the_cheapest():
    generator = torch.Generator().manual_seed(0)
    logits, boxes = torch.randn(4, 6, generator=generator), torch.rand(4, 4, generator=generator) / 2 + 0.1
    labels, targets = OBJECTS[1]

    def cost(query, found):
        a, b = corners(boxes[query]), corners(targets[found])
        both = (torch.minimum(a[2:], b[2:]) - torch.maximum(a[:2], b[:2])).clamp(min=0).prod()
        either = boxes[query, 2:].prod() + targets[found, 2:].prod() - both
        hull = (torch.maximum(a[2:], b[2:]) - torch.minimum(a[:2], b[:2])).prod()
        overlap = both / either - 1 + either / hull
        return 5 * (boxes[query] - targets[found]).abs().sum() - logits[query].softmax(0)[labels[found]] - 2 * overlap

    queries, found = match(logits, boxes, labels, targets)
    ours = sum(cost(q, n) for q, n in zip(queries, found, strict=True))
    torch.testing.assert_close(ours, min(sum(map(cost, chosen, range(3))) for chosen in permutations(range(4), 3)))


def test_generalized_iou():
    box = torch.tensor([0.0, 0.0, 2.0, 1.0])
    others = torch.tensor([[0.0, 0.0, 2.0, 1.0], [1.0, 0.0, 3.0, 1.0], [3.0, 0.0, 4.0, 1.0], [0.0, 1.0, 2.0, 3.0]])
    torch.testing.assert_close(generalized_iou(box, others), torch.tensor([1.0, 1 / 3, -1 / 4, 0.0]))
    torch.testing.assert_close(corners(torch.tensor([1.0, 0.5, 2.0, 1.0])), box)


def test_frozen_norms_do_not_learn():
    model = ResNet(stem=8, dims=(16, 32), depths=(1, 1)).train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(images(2)).sum().backward()
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert all(parameter.dim() == 4 for parameter in model.parameters())
    assert model(images(2)).shape == (2, 4, 4, 32) and model.dim == 32
