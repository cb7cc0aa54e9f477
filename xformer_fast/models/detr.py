"""DETR: an encoder over a convolutional map, and a decoder that turns learned queries into boxes, all at once.

Carion et al., "End-to-End Object Detection with Transformers" (2020). Post-norm; 2-D sinusoids and the queries'
positions are added where queries and keys are made, in every layer. `matching_loss` is its loss: boxes and objects are
paired by the cheapest assignment, which SciPy finds.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoints import expect, renamed
from ..frontends import perceptron
from ..layers import Attention, FeedForward, Stack, TransformerLayer
from ..positions import sinusoids

_RESNET = "model.backbone.model."
NAMES = (  # of a DetrForObjectDetection with a backbone of transformers' own
    {
        _RESNET + "embedder.embedder.convolution.*": "backbone.stem.0.*",
        _RESNET + "embedder.embedder.normalization.*": "backbone.stem.1.*",
        _RESNET + "encoder.stages.*.layers.*.shortcut.convolution.*": "backbone.stages.*.*.shortcut.0.*",
        _RESNET + "encoder.stages.*.layers.*.shortcut.normalization.*": "backbone.stages.*.*.shortcut.1.*",
        _RESNET + "encoder.stages.*.layers.*.layer.*.convolution.*": "backbone.stages.*.*.branch.*.0.*",
        _RESNET + "encoder.stages.*.layers.*.layer.*.normalization.*": "backbone.stages.*.*.branch.*.1.*",
        "model.query_position_embeddings.*": "queries.*",
        "model.input_projection.*": "projection.*",
        "model.*.layers.*.encoder_attn_layer_norm.*": "*.*.cross.norm.*",
        "model.*.layers.*.self_attn_layer_norm.*": "*.*.mixer.norm.*",
        "model.*.layers.*.mlp.fc1.*": "*.*.feed_forward.branch.up.*",
        "model.*.layers.*.mlp.fc2.*": "*.*.feed_forward.branch.down.*",
        "model.*.layers.*.final_layer_norm.*": "*.*.feed_forward.norm.*",
        "model.decoder.layernorm.*": "decoder_norm.*",
        "class_labels_classifier.*": "class_head.*",
    }
    | {
        f"model.*.layers.*.{theirs}.{letter}_proj.*": f"*.*.{ours}.branch.{part}.*"
        for theirs, ours in (("self_attn", "mixer"), ("encoder_attn", "cross"))
        for letter, part in {"q": "query", "k": "key", "v": "value", "o": "out"}.items()
    }
    | {f"bbox_predictor.layers.{i}.*": f"box_head.{2 * i}.*" for i in range(3)}
)


class FrozenBatchNorm(nn.Module):
    """A batch norm of (B, C, H, W) whose statistics and factors stay as they were loaded."""

    def __init__(self, dim: int):
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((dim,), value))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)


def convolution(channels: int, dim: int, kernel: int, stride: int = 1) -> nn.Sequential:
    convolve = nn.Conv2d(channels, dim, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(convolve, FrozenBatchNorm(dim), nn.ReLU())


class Bottleneck(nn.Module):
    """ResNet's block: 1×1, 3×3 of the stride, 1×1, beside a shortcut."""

    def __init__(self, channels: int, dim: int, stride: int):
        super().__init__()
        changes = channels != dim or stride != 1
        self.shortcut = convolution(channels, dim, 1, stride)[:2] if changes else nn.Identity()
        inner = dim // 4
        self.branch = nn.Sequential(
            convolution(channels, inner, 1), convolution(inner, inner, 3, stride), convolution(inner, dim, 1)[:2]
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.shortcut(x) + self.branch(x))


class ResNet(nn.Module):
    """image (B, channels, H, W) -> (B, H / 32, W / 32, dim): He et al., "Deep Residual Learning" (2016); ResNet-50."""

    def __init__(self, channels: int = 3, *, stem: int = 64, dims=(256, 512, 1024, 2048), depths=(3, 4, 6, 3)):
        super().__init__()
        self.dim, self.stem, channels = dims[-1], convolution(channels, stem, 7, 2), stem
        self.stages = nn.Sequential()
        for i, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            strides = [1 if i == 0 else 2] + [1] * (depth - 1)
            widths = [channels] + [dim] * (depth - 1)
            self.stages.append(nn.Sequential(*(Bottleneck(w, dim, s) for w, s in zip(widths, strides, strict=True))))
            channels = dim

    def forward(self, image: Tensor) -> Tensor:
        return self.stages(F.max_pool2d(self.stem(image), 3, 2, 1)).movedim(1, -1)


def map_sinusoids(inside: Tensor, dim: int) -> Tensor:
    """inside (B, H, W) bool, True on the image -> (B, H, W, dim): half of the channels for row and column each.

    Places are counted from 1 within the image, which is 2π high and wide.
    """
    counts = (inside.cumsum(axis) for axis in (1, 2))
    places = (n / (n.amax(axis, keepdim=True) + 1e-6) * 2 * math.pi for axis, n in zip((1, 2), counts, strict=True))
    return torch.cat([sinusoids(place, dim // 2) for place in places], -1)


class DETR(nn.Module):
    """image (B, 3, H, W) -> logits (B, num_queries, num_classes + 1), boxes (B, num_queries, 4).

    The last class is "no object"; boxes are centre x, centre y, width, height, in parts of the image. backbone: a
    module that maps images to (B, H', W', backbone.dim); a ResNet-50 if None. attention: arguments of every
    `Attention`: mixer, backend, ... `matching_loss` needs SciPy, of the extra `vision`.

    >>> import torch
    >>> from xformer_fast.models import DETR
    >>> from xformer_fast.models.detr import ResNet, matching_loss
    >>> backbone = ResNet(stem=16, dims=(16, 32), depths=(1, 1))
    >>> model = DETR(5, backbone=backbone, dim=64, depth=2, num_heads=4, hidden=128, num_queries=10)
    >>> logits, boxes = model(torch.randn(2, 3, 64, 96))
    >>> logits.shape, boxes.shape
    (torch.Size([2, 10, 6]), torch.Size([2, 10, 4]))
    >>> objects = [(torch.tensor([3]), torch.rand(1, 4)), (torch.tensor([0, 4]), torch.rand(2, 4))]
    >>> matching_loss(logits, boxes, objects).shape
    torch.Size([])
    """

    def __init__(
        self, num_classes: int, *, backbone: nn.Module | None = None, dim: int = 256, depth: int = 6,
        decoder_depth: int | None = None, num_heads: int = 8, hidden: int = 2048, num_queries: int = 100, dropout=0.0,
        **attention,
    ):  # fmt: skip
        super().__init__()

        def layers(count: int, decoder: bool) -> Stack:
            return Stack(
                TransformerLayer(
                    dim,
                    Attention(dim, num_heads, **attention),
                    FeedForward(dim, hidden, "relu", dropout=dropout),
                    cross=Attention(dim, num_heads, **attention) if decoder else None,
                    norm_first=False,
                    dropout=dropout,
                )
                for _ in range(count)
            )

        self.backbone = ResNet() if backbone is None else backbone
        self.projection = nn.Linear(self.backbone.dim, dim)
        self.queries, self.dropout = nn.Embedding(num_queries, dim), nn.Dropout(dropout)
        self.encoder, self.decoder = layers(depth, False), layers(decoder_depth or depth, True)
        for parameter in (p for stack in (self.encoder, self.decoder) for p in stack.parameters() if p.dim() > 1):
            nn.init.xavier_uniform_(parameter)
        self.decoder_norm = nn.LayerNorm(dim)
        self.class_head, self.box_head = nn.Linear(dim, num_classes + 1), perceptron(dim, dim, dim, 4)

    def forward(self, image: Tensor, mask: Tensor | None = None, *, all_layers: bool = False) -> tuple[Tensor, Tensor]:
        """mask: (B, H, W) bool, True on the images where they are padded to one size.

        all_layers: logits and boxes of every decoder layer, stacked in front, for a loss of each (section 3.2).
        """
        x = self.projection(self.backbone(image))
        inside, keys = torch.ones(x.shape[:3], dtype=torch.bool, device=x.device), None
        if mask is not None:
            inside = F.interpolate(mask[:, None].float(), x.shape[1:3])[:, 0].bool()
            keys = inside.flatten(1)[:, None, None]
        place = map_sinusoids(inside, x.shape[3]).flatten(1, 2).to(x.dtype)
        memory = self.encoder(self.dropout(x.flatten(1, 2)), position=place, mask=keys)
        query = self.queries.weight.expand(x.shape[0], -1, -1)
        x, outputs = torch.zeros_like(query), []
        for layer in self.decoder:
            x = layer(x, memory, position=query, memory_position=place, memory_mask=keys)
            outputs.append(x)
        x = self.decoder_norm(torch.stack(outputs) if all_layers else x)
        return self.class_head(x), self.box_head(x).sigmoid()

    @classmethod
    def from_transformers(cls, host: nn.Module, **choices) -> "DETR":
        """The weights of a transformers DetrForObjectDetection on a ResNet of transformers' own, not timm's."""
        c, r = host.config, host.config.backbone_config
        expect(c, activation_function="relu", position_embedding_type="sine", encoder_ffn_dim=c.decoder_ffn_dim)
        expect(c, encoder_attention_heads=c.decoder_attention_heads)
        expect(r, model_type="resnet", layer_type="bottleneck", hidden_act="relu")
        expect(r, downsample_in_first_stage=False, downsample_in_bottleneck=False)
        model = cls(
            c.num_labels, dim=c.d_model, depth=c.encoder_layers, decoder_depth=c.decoder_layers,
            num_heads=c.encoder_attention_heads, hidden=c.encoder_ffn_dim, num_queries=c.num_queries,
            backbone=ResNet(r.num_channels, stem=r.embedding_size, dims=r.hidden_sizes, depths=r.depths), **choices,
        )  # fmt: skip
        state = renamed(host.state_dict(), NAMES)
        state["projection.weight"] = state["projection.weight"].flatten(1)  # a 1×1 convolution
        model.load_state_dict(state)
        return model


# ---- the loss


def corners(boxes: Tensor) -> Tensor:
    """(..., 4): centre x, centre y, width, height -> left, top, right, bottom."""
    centre, size = boxes.split(2, -1)
    return torch.cat((centre - size / 2, centre + size / 2), -1)


def generalized_iou(a: Tensor, b: Tensor) -> Tensor:
    """Of boxes by their corners, broadcast: Rezatofighi et al., "Generalized Intersection over Union" (2019)."""

    def area(first: Tensor, last: Tensor) -> Tensor:
        return (last - first).clamp(min=0).prod(-1)

    (a0, a1), (b0, b1) = a.split(2, -1), b.split(2, -1)
    both = area(torch.maximum(a0, b0), torch.minimum(a1, b1))
    either, hull = area(a0, a1) + area(b0, b1) - both, area(torch.minimum(a0, b0), torch.maximum(a1, b1))
    return both / either - (hull - either) / hull


@torch.no_grad()
def match(
    logits: Tensor, boxes: Tensor, labels: Tensor, targets: Tensor, *, weights: tuple[float, float, float] = (1, 5, 2)
) -> tuple[Tensor, Tensor]:
    """The queries of one image and the objects, in pairs of the least total cost (equation 1 and appendix A.2).

    logits (Q, num_classes + 1), boxes (Q, 4); labels (N,), targets (N, 4). weights: of the class's probability, the
    boxes' distance, their generalized IoU. Returns two index vectors of min(Q, N).
    """
    from scipy.optimize import linear_sum_assignment

    distance = torch.cdist(boxes.float(), targets.float(), p=1)
    overlap = generalized_iou(corners(boxes)[:, None], corners(targets))
    cost = weights[1] * distance - weights[0] * logits.softmax(-1)[:, labels] - weights[2] * overlap
    return tuple(torch.as_tensor(index, device=logits.device) for index in linear_sum_assignment(cost.float().cpu()))


def matching_loss(
    logits: Tensor, boxes: Tensor, objects: list[tuple[Tensor, Tensor]], *,
    weights: tuple[float, float, float] = (1, 5, 2), empty_weight: float = 0.1,
) -> Tensor:  # fmt: skip
    """Cross entropy of all queries, and box losses of those that are matched with an object (equation 2).

    logits (B, Q, num_classes + 1) and boxes (B, Q, 4) are a `DETR`'s; objects: labels (N,) and boxes (N, 4) of each
    image. weights: see `match`. empty_weight: of the queries without an object in the cross entropy.
    """
    pairs = [match(*image, *there, weights=weights) for *image, there in zip(logits, boxes, objects, strict=True)]
    labels = logits.new_full(logits.shape[:2], logits.shape[2] - 1, dtype=torch.int64)
    for row, (queries, found), (classes, _) in zip(labels, pairs, objects, strict=True):
        row[queries] = classes[found]
    class_weights = logits.new_ones(logits.shape[2])
    class_weights[-1] = empty_weight
    entropy = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), class_weights)
    ours = torch.cat([row[queries] for row, (queries, _) in zip(boxes, pairs, strict=True)])
    theirs = torch.cat([there[found] for (_, there), (_, found) in zip(objects, pairs, strict=True)])
    count = max(sum(len(classes) for classes, _ in objects), 1)
    distance = (ours - theirs).abs().sum() / count
    overlap = (1 - generalized_iou(corners(ours), corners(theirs))).sum() / count
    return weights[0] * entropy + weights[1] * distance + weights[2] * overlap
