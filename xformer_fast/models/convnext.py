"""ConvNeXt: four stages of blocks in which a 7×7 depthwise convolution mixes places, and a feed-forward channels.

Liu et al., "A ConvNet for the 2020s" (2022). Its block is one residual: mixer, norm, feed-forward.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..checkpoints import expect, renamed
from ..frontends import ChannelsFirst
from ..layers import FeedForward, Residual, init_weights

NAMES = {  # of a ConvNextForImageClassification
    "convnext.embeddings.patch_embeddings.*": "stages.0.0.0.0.*",
    "convnext.embeddings.layernorm.*": "stages.0.0.1.*",
    "convnext.encoder.stages.*.downsampling_layer.0.*": "stages.*.0.0.*",
    "convnext.encoder.stages.*.downsampling_layer.1.*": "stages.*.0.1.0.*",
    "convnext.encoder.stages.*.layers.*.layer_scale_parameter": "stages.*.1.*.layer_scale",
    "convnext.encoder.stages.*.layers.*.dwconv.*": "stages.*.1.*.branch.0.0.*",
    "convnext.encoder.stages.*.layers.*.layernorm.*": "stages.*.1.*.branch.1.*",
    "convnext.encoder.stages.*.layers.*.pwconv1.*": "stages.*.1.*.branch.2.up.*",
    "convnext.encoder.stages.*.layers.*.pwconv2.*": "stages.*.1.*.branch.2.down.*",
    "convnext.layernorm.*": "norm.*",
    "classifier.*": "head.*",
}


def depthwise(dim: int, kernel: int = 7) -> nn.Module:
    """Each channel with its neighbours, kernel × kernel of them."""
    return ChannelsFirst(nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim))


class ConvNeXt(nn.Module):
    """image (B, channels, H, W) -> logits (B, num_classes).

    dims, depths: one a stage. mixer: makes the mixer of every block, a module on maps (B, H, W, dim), out of dim.
    norm_eps: of the last norm.

    >>> import torch
    >>> from xformer_fast.layers import Attention
    >>> from xformer_fast.models import ConvNeXt
    >>> image = torch.randn(2, 3, 64, 96)
    >>> ConvNeXt(10, dims=(16, 32), depths=(1, 2))(image).shape
    torch.Size([2, 10])
    >>> def windows(dim):
    ...     return Attention(dim, dim // 8, mixer="window", window_size=4)
    >>> ConvNeXt(10, dims=(16, 32), depths=(1, 2), mixer=windows)(image).shape
    torch.Size([2, 10])
    """

    def __init__(
        self, num_classes: int, *, channels: int = 3, patch: int = 4, dims=(96, 192, 384, 768), depths=(3, 3, 9, 3),
        mixer: Callable[[int], nn.Module] = depthwise, layer_scale: float | None = 1e-6, norm_eps=1e-6, dropout=0.0,
        drop_path=0.0,
    ):  # fmt: skip
        super().__init__()
        rates = iter(torch.linspace(0, drop_path, sum(depths)).tolist())
        self.stages = nn.Sequential()
        for i, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            if i == 0:
                parts = ChannelsFirst(nn.Conv2d(channels, dim, patch, patch)), nn.LayerNorm(dim, eps=1e-6)
            else:
                parts = nn.LayerNorm(dims[i - 1], eps=1e-6), ChannelsFirst(nn.Conv2d(dims[i - 1], dim, 2, 2))
            blocks = (
                Residual(
                    dim,
                    nn.Sequential(mixer(dim), nn.LayerNorm(dim, eps=1e-6), FeedForward(dim, 4 * dim, "gelu")),
                    norm=None,
                    layer_scale=layer_scale,
                    dropout=dropout,
                    drop_path=next(rates),
                )
                for _ in range(depth)
            )
            self.stages.append(nn.Sequential(nn.Sequential(*parts), nn.Sequential(*blocks)))
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self.head = nn.Linear(dim, num_classes)
        self.apply(init_weights)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.norm(self.stages(image.movedim(1, -1)).mean((1, 2))))

    @classmethod
    def from_transformers(cls, host: nn.Module) -> "ConvNeXt":
        """The weights of a transformers ConvNextForImageClassification."""
        c = host.config
        expect(c, hidden_act="gelu", num_stages=len(c.depths))
        model = cls(
            c.num_labels, channels=c.num_channels, patch=c.patch_size, dims=c.hidden_sizes, depths=c.depths,
            layer_scale=c.layer_scale_init_value or None, norm_eps=c.layer_norm_eps,
        )  # fmt: skip
        model.load_state_dict(renamed(host.state_dict(), NAMES))
        return model
