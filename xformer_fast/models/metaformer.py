"""MetaFormer: four stages of transformer layers with any mixer at all; with average pooling, it is PoolFormer.

Yu et al., "MetaFormer is Actually What You Need for Vision" (2022).
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoints import expect, renamed
from ..frontends import ChannelsFirst
from ..layers import Attention, FeedForward, Stack, TransformerLayer, init_weights
from ..mixers import MIXERS

NAMES = {  # of a PoolFormerForImageClassification
    "poolformer.encoder.patch_embeddings.*.projection.*": "stages.*.0.0.*",
    "poolformer.encoder.block.*.*.before_norm.*": "stages.*.1.*.mixer.norm.0.*",
    "poolformer.encoder.block.*.*.layer_scale_1": "stages.*.1.*.mixer.layer_scale",
    "poolformer.encoder.block.*.*.after_norm.*": "stages.*.1.*.feed_forward.norm.0.*",
    "poolformer.encoder.block.*.*.output.conv1.*": "stages.*.1.*.feed_forward.branch.up.*",
    "poolformer.encoder.block.*.*.output.conv2.*": "stages.*.1.*.feed_forward.branch.down.*",
    "poolformer.encoder.block.*.*.layer_scale_2": "stages.*.1.*.feed_forward.layer_scale",
    "norm.*": "norm.0.*",
    "classifier.*": "head.*",
}


class Pooling(nn.Module):
    """PoolFormer's mixer: the mean of a place's neighbours on the map, less the place itself."""

    def __init__(self, kernel: int = 3):
        super().__init__()
        self.kernel = kernel

    def forward(self, x: Tensor) -> Tensor:
        first = x.movedim(-1, 1)
        return F.avg_pool2d(first, self.kernel, 1, self.kernel // 2, count_include_pad=False).movedim(1, -1) - x


def group_norm(dim: int) -> nn.Module:
    """A norm over all channels and places of an image."""
    return ChannelsFirst(nn.GroupNorm(1, dim))


class MetaFormer(nn.Module):
    """image (B, channels, H, W) -> logits (B, num_classes).

    dims, depths, mixers: one a stage. A mixer is "pooling", a name that `Attention` knows, "identity", or a function
    that makes a module on maps (B, H, W, dim) out of dim. patches: patch, stride and padding of the convolution before
    each stage. attention: arguments of every `Attention`, which has heads of head_dim channels.

    >>> import torch
    >>> from xformer_fast.models import MetaFormer
    >>> small = {"dims": (32, 64), "depths": (1, 2), "patches": ((7, 4, 2), (3, 2, 1))}
    >>> image = torch.randn(2, 3, 64, 96)
    >>> MetaFormer(10, mixers=("pooling", "softmax"), **small)(image).shape
    torch.Size([2, 10])
    """

    def __init__(
        self, num_classes: int, *, channels: int = 3, dims=(64, 128, 320, 512), depths=(2, 2, 6, 2),
        mixers: Sequence[str | Callable[[int], nn.Module]] = ("pooling",) * 4,
        patches=((7, 4, 2), (3, 2, 1), (3, 2, 1), (3, 2, 1)), mlp_ratio: float = 4.0, pool: int = 3, head_dim: int = 32,
        layer_scale: float | None = 1e-5, dropout=0.0, drop_path=0.0, **attention,
    ):  # fmt: skip
        super().__init__()
        rates = iter(torch.linspace(0, drop_path, sum(depths)).tolist())

        def make(mixer: str | Callable[[int], nn.Module], dim: int) -> nn.Module:
            if mixer in MIXERS:
                return Attention(dim, dim // head_dim, mixer=mixer, **attention)
            if callable(mixer):
                return mixer(dim)
            simple = {"pooling": lambda: Pooling(pool), "identity": nn.Identity}
            if mixer not in simple:
                known = ", ".join([*simple, *MIXERS])
                raise ValueError(f"mixers must be of {known} or functions of dim, got {mixer!r}")
            return simple[mixer]()

        self.stages = nn.Sequential()
        for dim, depth, mixer, (patch, stride, padding) in zip(dims, depths, mixers, patches, strict=True):
            layers = Stack(
                TransformerLayer(
                    dim,
                    make(mixer, dim),
                    FeedForward(dim, int(mlp_ratio * dim), "gelu"),
                    norm=group_norm,
                    layer_scale=layer_scale,
                    dropout=dropout,
                    drop_path=next(rates),
                )
                for _ in range(depth)
            )
            embedding = ChannelsFirst(nn.Conv2d(channels, dim, patch, stride, padding))
            self.stages.append(nn.Sequential(embedding, layers))
            channels = dim
        self.norm, self.head = group_norm(dim), nn.Linear(dim, num_classes)
        self.apply(init_weights)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.norm(self.stages(image.movedim(1, -1))).mean((1, 2)))

    @classmethod
    def from_transformers(cls, host: nn.Module) -> "MetaFormer":
        """The weights of a transformers PoolFormerForImageClassification."""
        c = host.config
        expect(c, hidden_act="gelu")
        model = cls(
            c.num_labels, channels=c.num_channels, dims=c.hidden_sizes, depths=c.depths, mlp_ratio=c.mlp_ratio,
            mixers=["pooling"] * len(c.depths), patches=list(zip(c.patch_sizes, c.strides, c.padding, strict=True)),
            pool=c.pool_size, layer_scale=c.layer_scale_init_value if c.use_layer_scale else None,
        )  # fmt: skip
        state = renamed(host.state_dict(), NAMES)
        for name, weight in state.items():
            if ".feed_forward.branch." in name and weight.dim() == 4:  # a 1×1 convolution
                state[name] = weight.flatten(1)
        model.load_state_dict(state)
        return model
