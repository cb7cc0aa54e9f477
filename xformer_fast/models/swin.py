"""Swin: four stages of windowed attention on ever coarser maps, the windows of every other layer shifted by a half.

Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows" (2021). version=2: Liu et al.,
"Swin Transformer V2: Scaling Up Capacity and Resolution" (2022), with cosine attention, norms behind the branches, and
a bias that a small network makes of the relative place.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoints import expect, renamed
from ..frontends import PatchEmbedding
from ..layers import Attention, FeedForward, Stack, TransformerLayer, init_weights
from ..mixers import WindowMixer

_COMMON = {
    "embeddings.patch_embeddings.projection.*": "patches.0.projection.*",
    "embeddings.norm.*": "patches.1.*",
    "encoder.layers.*.downsample.reduction.*": "stages.*.merge.reduction.*",
    "encoder.layers.*.downsample.norm.*": "stages.*.merge.norm.*",
    "layernorm.*": "norm.*",
}
_LAYER = {
    "layernorm_before.*": "mixer.norm.*",
    "attention.q_proj.*": "mixer.branch.query.*",
    "attention.k_proj.*": "mixer.branch.key.*",
    "attention.v_proj.*": "mixer.branch.value.*",
    "attention.o_proj.*": "mixer.branch.out.*",
    "attention.relative_position_bias.*": "mixer.branch.mixer.relative_bias_table",
    "layernorm_after.*": "feed_forward.norm.*",
    "mlp.fc1.*": "feed_forward.branch.up.*",
    "mlp.fc2.*": "feed_forward.branch.down.*",
}
_LAYER2 = {
    "attention.self.continuous_position_bias_mlp.*.*": "mixer.branch.0.mixer.network.*.*",
    "attention.self.logit_scale": "mixer.branch.0.mixer.logit_scale",
    "attention.self.*.*": "mixer.branch.0.*.*",
    "attention.output.dense.*": "mixer.branch.0.out.*",
    "layernorm_before.*": "mixer.branch.1.*",
    "intermediate.dense.*": "feed_forward.branch.0.up.*",
    "output.dense.*": "feed_forward.branch.0.down.*",
    "layernorm_after.*": "feed_forward.branch.1.*",
}
NAMES = {  # of a SwinForImageClassification or a Swinv2ForImageClassification
    f"{host}.{theirs}": ours
    for host, layer in (("swin", _LAYER), ("swinv2", _LAYER2))
    for theirs, ours in (
        _COMMON | {f"encoder.layers.*.blocks.*.{old}": f"stages.*.layers.*.{new}" for old, new in layer.items()}
    ).items()
} | {"classifier.*": "head.*"}


class ShiftedWindows(WindowMixer):
    """Windows that are not shifted on a map that is no larger than one, as in Swin's code."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **options) -> Tensor:
        if any(side == window for side, window in zip(query.shape[1:3], self.window_size, strict=True)):
            options = options | {"shift": 0}
        return super().forward(query, key, value, **options)


class ContinuousWindows(ShiftedWindows):
    """Swin V2's: cosine attention, and 16 · sigmoid(network(log-spaced relative place)) for a bias."""

    def __init__(self, num_heads: int, head_dim: int, *, window_size, **options):
        super().__init__(num_heads, head_dim, window_size=window_size, relative_bias=False, cosine=True, **options)
        sides = (torch.arange(1 - window, window) / max(window - 1, 1) for window in self.window_size)
        places = 8 * torch.stack(torch.meshgrid(*sides, indexing="ij"), -1).flatten(0, 1)
        self.register_buffer("places", places.sign() * (places.abs() + 1).log2() / 3, persistent=False)
        self.network = nn.Sequential(nn.Linear(2, 512), nn.ReLU(), nn.Linear(512, num_heads, bias=False))

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return super().forward(query, key, value, relative_bias_table=16 * self.network(self.places).sigmoid())


class PatchMerging(nn.Module):
    """(B, H, W, C) -> (B, H / 2, W / 2, 2C): four neighbours become one, behind (V2: before) a norm."""

    def __init__(self, dim: int, *, norm_first: bool):
        super().__init__()
        self.norm_first = norm_first
        self.norm = nn.LayerNorm(4 * dim if norm_first else 2 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        x = torch.cat([x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)], -1)
        return self.reduction(self.norm(x)) if self.norm_first else self.norm(self.reduction(x))


class Stage(nn.Module):
    """Layers, and a merging of patches for the next stage or None."""

    def __init__(self, layers: Stack, merge: PatchMerging | None):
        super().__init__()
        self.layers, self.merge = layers, merge

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(x)
        return x if self.merge is None else self.merge(x)


class Swin(nn.Module):
    """image (B, channels, H, W) -> logits (B, num_classes); H and W any multiples of the patch.

    dim: of the first stage, each next one has twice as many. depths, num_heads: one a stage. window_size: one, or one a
    stage. attention: arguments of every `Attention`; another mixer than "window" sees the whole map, or what its own
    arguments say, such as mixer="neighborhood", kernel_size=7.

    >>> import torch
    >>> from xformer_fast.models import Swin
    >>> model = Swin(10, dim=32, depths=(2, 2), num_heads=(2, 4), window_size=4)
    >>> model(torch.randn(2, 3, 64, 96)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self, num_classes: int, *, channels: int = 3, patch: int = 4, dim: int = 96, depths=(2, 2, 6, 2),
        num_heads=(3, 6, 12, 24), window_size: int | Sequence[int] = 7, mlp_ratio: float = 4.0, version: int = 1,
        mixer="window", norm_eps=1e-5, dropout=0.0, drop_path=0.0, **attention,
    ):  # fmt: skip
        super().__init__()
        if version not in (1, 2):
            raise ValueError(f"version must be 1 or 2, got {version}")
        windows = [window_size] * len(depths) if isinstance(window_size, int) else window_size
        rates = iter(torch.linspace(0, drop_path, sum(depths)).tolist())

        def layer(width: int, heads: int, window: int, shift: int) -> TransformerLayer:
            options = {"mixer": mixer} | attention
            if mixer == "window":
                options |= {"mixer": ShiftedWindows if version == 1 else ContinuousWindows}
                options |= {"window_size": window, "shift": shift}
            attend = Attention(width, heads, **options)
            feed_forward = FeedForward(width, int(mlp_ratio * width), "gelu")
            residual = {"norm_eps": norm_eps, "dropout": dropout, "drop_path": next(rates)}
            if version == 2:
                attend.key = nn.Linear(width, width, bias=False)
                attend, feed_forward = (
                    nn.Sequential(branch, nn.LayerNorm(width, eps=norm_eps)) for branch in (attend, feed_forward)
                )
                residual |= {"norm": None}
            return TransformerLayer(width, attend, feed_forward, **residual)

        self.patches = nn.Sequential(PatchEmbedding(channels, dim, patch), nn.LayerNorm(dim))
        self.dropout = nn.Dropout(dropout)
        self.stages = nn.Sequential()
        for i, (depth, heads, window) in enumerate(zip(depths, num_heads, windows, strict=True)):
            layers = Stack(layer(dim * 2**i, heads, window, j % 2 * (window // 2)) for j in range(depth))
            last = i == len(depths) - 1
            self.stages.append(Stage(layers, None if last else PatchMerging(dim * 2**i, norm_first=version == 1)))
        self.norm = nn.LayerNorm(dim * 2**i, eps=norm_eps)
        self.head = nn.Linear(dim * 2**i, num_classes)
        self.apply(init_weights)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stages(self.dropout(self.patches(image)))
        return self.head(self.norm(x).mean((1, 2)))

    @classmethod
    def from_transformers(cls, host: nn.Module, **choices) -> "Swin":
        """The weights of a transformers SwinForImageClassification or Swinv2ForImageClassification."""
        c, version = host.config, 2 if host.config.model_type == "swinv2" else 1
        expect(c, hidden_act="gelu", use_absolute_embeddings=False)
        windows = [c.window_size] * len(c.depths)
        if version == 2:
            expect(c, pretrained_window_sizes=[0] * len(c.pretrained_window_sizes))
            windows = [min(window, c.image_size // c.patch_size // 2**i) for i, window in enumerate(windows)]
        model = cls(
            c.num_labels, channels=c.num_channels, patch=c.patch_size, dim=c.embed_dim, depths=c.depths,
            num_heads=c.num_heads, window_size=windows, mlp_ratio=c.mlp_ratio, version=version,
            norm_eps=c.layer_norm_eps, bias=c.qkv_bias, out_bias=True, **choices,
        )  # fmt: skip
        state = renamed(host.state_dict(), NAMES)
        model.load_state_dict({k: x.flatten() if k.endswith("logit_scale") else x for k, x in state.items()})
        return model
