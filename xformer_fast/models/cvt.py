"""CvT: three stages of attention whose queries, keys and values come from depthwise convolutions over the map.

Wu et al., "CvT: Introducing Convolutions to Vision Transformers" (2021). No positions; a class token in the last stage.
"""

import math

import torch
from torch import Tensor, nn

from ..checkpoints import expect, renamed
from ..frontends import ChannelsFirst
from ..layers import Attention, FeedForward, Stack, TransformerLayer, init_weights

_PARTS = ("query", "key", "value")
NAMES = {  # of a CvtForImageClassification
    f"cvt.encoder.stages.*.{theirs}": f"stages.*.{ours}"
    for theirs, ours in (
        {
            "embedding.convolution_embeddings.projection.*": "embedding.0.0.*",
            "embedding.convolution_embeddings.normalization.*": "embedding.1.*",
            "cls_token": "class_token",
            "layers.*.layernorm_before.*": "layers.*.mixer.norm.*",
            "layers.*.attention.output.dense.*": "layers.*.mixer.branch.out.*",
            "layers.*.layernorm_after.*": "layers.*.feed_forward.norm.*",
            "layers.*.intermediate.dense.*": "layers.*.feed_forward.branch.up.*",
            "layers.*.output.dense.*": "layers.*.feed_forward.branch.down.*",
        }
        | {
            f"layers.*.attention.attention.{theirs.format(part)}.*": f"layers.*.mixer.branch.{ours.format(part)}.*"
            for part in _PARTS
            for theirs, ours in {
                "convolution_projection_{}.convolution_projection.convolution": "convolutions.{}.0",
                "convolution_projection_{}.convolution_projection.normalization": "convolutions.{}.1",
                "projection_{}": "{}",
            }.items()
        }
    ).items()
} | {"layernorm.*": "norm.*", "classifier.*": "head.*"}


class ConvolutionalAttention(Attention):
    """Attention behind 3×3 convolutions, of a stride for keys and values: there are fewer of them than queries."""

    def __init__(self, dim: int, num_heads: int, *, kernel: int = 3, stride: int = 2, **attention):
        super().__init__(dim, num_heads, **attention)
        self.convolutions = nn.ModuleDict(
            {
                part: ChannelsFirst(
                    nn.Conv2d(dim, dim, kernel, 1 if part == "query" else stride, kernel // 2, groups=dim, bias=False),
                    nn.BatchNorm2d(dim),
                )
                for part in _PARTS
            }
        )

    def forward(self, x: Tensor, *, space: tuple[int, int]) -> Tensor:
        """x (B, S, C): tokens that are not convolved, then the H·W places of a map; space: (H, W)."""
        places = math.prod(space)
        tokens, image = x.split((x.shape[1] - places, places), 1)
        query, key, value = (
            torch.cat((tokens, self.convolutions[part](image.unflatten(1, space)).flatten(1, 2)), 1) for part in _PARTS
        )
        query, key, value = (self._heads(y) for y in (self.query(query), self.key(key), self.value(value)))
        if self.prefix is not None:
            key, value, _ = self.prefix(key, value, {})
        return self.out(self.mixer(query, key, value).flatten(-2))


class Stage(nn.Module):
    """A strided convolution, then layers; behind them (B, H', W', dim) and, where there is one, the class token."""

    def __init__(self, embedding: nn.Module, layers: Stack, class_token: nn.Parameter | None):
        super().__init__()
        self.embedding, self.layers, self.class_token = embedding, layers, class_token

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The map, and the class token (B, 1, dim), or none (B, 0, dim)."""
        x = self.embedding(x)
        space, x = x.shape[1:3], x.flatten(1, 2)
        if self.class_token is not None:
            x = torch.cat((self.class_token.expand(x.shape[0], -1, -1), x), 1)
        tokens, x = self.layers(x, space=space).split((x.shape[1] - math.prod(space), math.prod(space)), 1)
        return x.unflatten(1, space), tokens


class CvT(nn.Module):
    """image (B, channels, H, W) -> logits (B, num_classes).

    dims, depths, num_heads, patches: one a stage; patches are patch, stride and padding of the convolution before it.
    attention: arguments of every `Attention`: mixer, backend, ...

    >>> import torch
    >>> from xformer_fast.models import CvT
    >>> model = CvT(10, dims=(16, 32), depths=(1, 2), num_heads=(1, 2), patches=((7, 4, 2), (3, 2, 1)))
    >>> model(torch.randn(2, 3, 64, 96)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self, num_classes: int, *, channels: int = 3, dims=(64, 192, 384), depths=(1, 2, 10), num_heads=(1, 3, 6),
        patches=((7, 4, 2), (3, 2, 1), (3, 2, 1)), mlp_ratio: float = 4.0, kernel: int = 3, stride: int = 2,
        dropout=0.0, drop_path=0.0, **attention,
    ):  # fmt: skip
        super().__init__()
        rates = iter(torch.linspace(0, drop_path, sum(depths)).tolist())
        attention = {"kernel": kernel, "stride": stride} | attention
        self.stages = nn.ModuleList()
        for dim, depth, heads, (patch, step, padding) in zip(dims, depths, num_heads, patches, strict=True):
            embedding = nn.Sequential(ChannelsFirst(nn.Conv2d(channels, dim, patch, step, padding)), nn.LayerNorm(dim))
            layers = Stack(
                TransformerLayer(
                    dim,
                    ConvolutionalAttention(dim, heads, scale=dim**-0.5, **attention),
                    FeedForward(dim, int(mlp_ratio * dim), "gelu"),
                    dropout=dropout,
                    drop_path=next(rates),
                )
                for _ in range(depth)
            )
            last = len(self.stages) == len(dims) - 1
            token = nn.Parameter(torch.randn(1, 1, dim) * 0.02) if last else None
            self.stages.append(Stage(embedding, layers, token))
            channels = dim
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, num_classes)
        self.apply(init_weights)

    def forward(self, image: Tensor) -> Tensor:
        x = image.movedim(1, -1)
        for stage in self.stages:
            x, tokens = stage(x)
        return self.head(self.norm(tokens[:, 0]))

    @classmethod
    def from_transformers(cls, host: nn.Module, **choices) -> "CvT":
        """The weights of a transformers CvtForImageClassification."""
        c, stages = host.config, len(host.config.depth)
        first = {name: getattr(c, name)[0] for name in ("mlp_ratio", "kernel_qkv", "stride_kv", "qkv_bias")}
        padding = first["kernel_qkv"] // 2
        everywhere = first | {"stride_q": 1, "padding_q": padding, "padding_kv": padding}
        expect(c, **{name: [value] * stages for name, value in everywhere.items()})
        expect(c, cls_token=[False] * (stages - 1) + [True], qkv_projection_method=["dw_bn"] * stages)
        model = cls(
            c.num_labels, channels=c.num_channels, dims=c.embed_dim, depths=c.depth, num_heads=c.num_heads,
            patches=list(zip(c.patch_sizes, c.patch_stride, c.patch_padding, strict=True)),
            mlp_ratio=first["mlp_ratio"], kernel=first["kernel_qkv"], stride=first["stride_kv"],
            bias=first["qkv_bias"], out_bias=True, **choices,
        )  # fmt: skip
        model.load_state_dict(renamed(host.state_dict(), NAMES))
        return model
