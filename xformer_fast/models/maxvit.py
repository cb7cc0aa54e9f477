"""MaxViT: blocks of a convolution, attention in windows, and attention in grids, on four ever coarser maps.

Tu et al., "MaxViT: Multi-Axis Vision Transformer" (2022). The convolution is MobileNet's, with squeeze and excitation.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoints import renamed
from ..frontends import ChannelsFirst
from ..layers import Attention, FeedForward, TransformerLayer, drop_samples, init_weights

NAMES = (  # of timm's MaxxVit, the variants maxvit_*_tf_*
    {
        "stem.conv1.*": "stem.0.*",
        "stem.norm1.*": "stem.1.*",
        "stem.conv2.*": "stem.3.*",
        "head.norm.*": "head.0.*",
        "head.pre_logits.fc.*": "head.1.*",
        "head.fc.*": "head.3.*",
    }
    | {
        f"stages.*.blocks.*.conv.{theirs}.*": f"stages.*.*.convolution.{ours}.*"
        for theirs, ours in {
            "shortcut.expand": "shortcut.1", "pre_norm": "branch.0", "conv1_1x1": "branch.1", "norm1": "branch.2",
            "conv2_kxk": "branch.4", "norm2": "branch.5", "se.fc1": "branch.7.squeeze", "se.fc2": "branch.7.excite",
            "conv3_1x1": "branch.8",
        }.items()
    }
    | {
        f"stages.*.blocks.*.attn_{kind}.{theirs}": tuple(f"stages.*.*.{layer}.{name}" for name in ours)
        for kind, layer in (("block", "windows"), ("grid", "grids"))
        for theirs, ours in {
            "norm1.*": ["mixer.norm.*"],
            "attn.qkv.*": [f"mixer.branch.{part}.*" for part in ("query", "key", "value")],
            "attn.rel_pos.*": ["mixer.branch.mixer.relative_bias_table"],
            "attn.proj.*": ["mixer.branch.out.*"],
            "norm2.*": ["feed_forward.norm.*"],
            "mlp.fc1.*": ["feed_forward.branch.up.*"],
            "mlp.fc2.*": ["feed_forward.branch.down.*"],
        }.items()
    }
)  # fmt: skip


class SameConv2d(nn.Conv2d):
    """Pads as TensorFlow does: sides become ceil(side / stride), and an odd zero goes behind."""

    def forward(self, x: Tensor) -> Tensor:
        margins = [k - (side % s or s) for side, k, s in zip(x.shape[2:], self.kernel_size, self.stride, strict=True)]
        return super().forward(F.pad(x, [n for m in reversed(margins) for n in (m // 2, m - m // 2)]))


class SqueezeExcitation(nn.Module):
    """A gate a channel, out of the means of all channels: Hu et al., "Squeeze-and-Excitation Networks" (2018)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(dim, hidden, 1), nn.Conv2d(hidden, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.excite(F.silu(self.squeeze(x.mean((2, 3), keepdim=True)))).sigmoid()


class InvertedBottleneck(nn.Module):
    """MBConv, pre-norm: norm, 1×1, depthwise 3×3 of a stride, gate, 1×1; beside a shortcut. (B, C, H, W)."""

    def __init__(self, channels: int, dim: int, stride: int, drop_path: float):
        super().__init__()
        self.drop_path, hidden = drop_path, 4 * dim
        expand = nn.Conv2d(channels, dim, 1) if channels != dim else nn.Identity()
        self.shortcut = nn.Sequential(nn.AvgPool2d(2, ceil_mode=True), expand) if stride == 2 else nn.Identity()
        self.branch = nn.Sequential(
            nn.BatchNorm2d(channels, eps=1e-3),
            nn.Conv2d(channels, hidden, 1, bias=False), nn.BatchNorm2d(hidden, eps=1e-3), nn.GELU("tanh"),
            SameConv2d(hidden, hidden, 3, stride, groups=hidden, bias=False), nn.BatchNorm2d(hidden, eps=1e-3),
            nn.GELU("tanh"),
            SqueezeExcitation(hidden, dim // 4),
            nn.Conv2d(hidden, dim, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        y = self.branch(x)
        return self.shortcut(x) + (drop_samples(y, self.drop_path) if self.training else y)


class Block(nn.Module):
    """Convolution, then a layer of attention in windows and one in grids, on maps (B, H, W, C)."""

    def __init__(self, convolution: InvertedBottleneck, windows: TransformerLayer, grids: TransformerLayer):
        super().__init__()
        self.convolution, self.windows, self.grids = convolution, windows, grids

    def forward(self, x: Tensor) -> Tensor:
        x = self.convolution(x.movedim(-1, 1)).movedim(1, -1)
        return self.grids(self.windows(x))


class MaxViT(nn.Module):
    """image (B, channels, H, W) -> logits (B, num_classes).

    dims, depths: one a stage. window_size: side of the windows and of the grids (the image's by 32, in the paper).
    attention: arguments of every `Attention`; another mixer than "window" sees the whole map twice a block.

    >>> import torch
    >>> from xformer_fast.models import MaxViT
    >>> MaxViT(10, dims=(32, 64), depths=(1, 2), stem=16, window_size=4)(torch.randn(2, 3, 64, 96)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self, num_classes: int, *, channels: int = 3, stem: int = 64, dims=(64, 128, 256, 512), depths=(2, 2, 5, 2),
        head_dim: int = 32, window_size: int = 7, mixer="window", norm_eps=1e-5, dropout=0.0, drop_path=0.0,
        **attention,
    ):  # fmt: skip
        super().__init__()
        rates = iter(torch.linspace(0, drop_path, sum(depths)).tolist())

        def layer(dim: int, partition: str, rate: float) -> TransformerLayer:
            options = {"window_size": window_size, "partition": partition} if mixer == "window" else {}
            return TransformerLayer(
                dim,
                Attention(dim, dim // head_dim, mixer=mixer, **options, **attention),
                FeedForward(dim, 4 * dim, "gelu_tanh"),
                norm_eps=norm_eps,
                dropout=dropout,
                drop_path=rate,
            )

        self.stem = ChannelsFirst(
            SameConv2d(channels, stem, 3, 2), nn.BatchNorm2d(stem, eps=1e-3), nn.GELU("tanh"), SameConv2d(stem, stem, 3)
        )
        self.stages, channels = nn.Sequential(), stem
        for dim, depth in zip(dims, depths, strict=True):
            stage = nn.Sequential()
            for i in range(depth):
                rate = next(rates)
                convolution = InvertedBottleneck(channels, dim, 2 if i == 0 else 1, rate)
                stage.append(Block(convolution, layer(dim, "window", rate), layer(dim, "grid", rate)))
                channels = dim
            self.stages.append(stage)
        self.head = nn.Sequential(
            nn.LayerNorm(dim, eps=norm_eps), nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, num_classes)
        )
        self.apply(init_weights)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(image.movedim(1, -1))).mean((1, 2)))

    @classmethod
    def from_timm(cls, host: nn.Module, **choices) -> "MaxViT":
        """The weights of a timm MaxxVit of a variant maxvit_*_tf_*, at its image size."""
        layer = host.stages[0].blocks[0].attn_block
        (window,) = set(layer.partition_size)
        model = cls(
            host.num_classes, channels=host.in_chans, stem=host.stem.conv1.out_channels,
            dims=[stage.blocks[0].conv.conv3_1x1.out_channels for stage in host.stages],
            depths=[len(stage.blocks) for stage in host.stages], head_dim=layer.attn.dim_head, window_size=window,
            norm_eps=layer.norm1.eps, **choices,
        )  # fmt: skip
        state = renamed(host.state_dict(), NAMES)
        for name, table in state.items():
            if name.endswith("relative_bias_table"):  # (H, 2w - 1, 2w - 1), of distances that run the other way
                state[name] = table.flatten(1).flip(1).T
        model.load_state_dict(state)
        return model
