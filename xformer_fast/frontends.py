"""What stands around layers: convolutions that make x, (B, S, C) or (B, H, W, C), or work on it; small heads."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def zero_padding(x: Tensor, lengths: Tensor | None) -> Tensor:
    """x (B, S, C) with zeros from lengths[b] on."""
    if lengths is None:
        return x
    inside = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
    return x.masked_fill(~inside[..., None], 0)


class PatchEmbedding(nn.Module):
    """(B, channels, H, W) -> (B, H', W', dim): one vector a patch, of patches that touch or, with a stride, overlap."""

    def __init__(self, channels: int, dim: int, patch: int, stride: int | tuple[int, int] | None = None):
        super().__init__()
        self.projection = nn.Conv2d(channels, dim, patch, stride or patch)

    def forward(self, image: Tensor) -> Tensor:
        return self.projection(image).permute(0, 2, 3, 1)


class ChannelsFirst(nn.Sequential):
    """Modules of (B, C, H, W), a convolution and a batch norm say, one after another on a map (B, H, W, C).

    >>> import torch
    >>> from xformer_fast.frontends import ChannelsFirst
    >>> from xformer_fast.layers import FeedForward, TransformerLayer
    >>> depthwise = ChannelsFirst(torch.nn.Conv2d(64, 64, 7, padding=3, groups=64))
    >>> TransformerLayer(64, depthwise, FeedForward(64, 256))(torch.randn(2, 14, 14, 64)).shape
    torch.Size([2, 14, 14, 64])
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(-1, 1)).movedim(1, -1)


class Conv1dSubsampling(nn.Module):
    """(B, T, features) -> (B, about T / 4, dim): gated convolutions of stride 2 over time.

    Synnaeve et al., "End-to-end ASR: from Supervised to Semi-Supervised Learning with Modern Architectures" (2019).
    As in fairseq, padding is zeroed before the first of them alone.
    """

    def __init__(self, features: int, dim: int, *, channels: int = 1024, kernels: tuple[int, ...] = (5, 5)):
        super().__init__()
        widths = [features, *[channels // 2] * (len(kernels) - 1)]
        outputs = [*[channels] * (len(kernels) - 1), 2 * dim]
        self.convolutions = nn.ModuleList(
            nn.Conv1d(*sizes, stride=2, padding=sizes[-1] // 2) for sizes in zip(widths, outputs, kernels, strict=True)
        )

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        x = zero_padding(x, lengths).mT
        for convolution in self.convolutions:
            x = F.glu(convolution(x), dim=1)
        return x.mT

    def lengths(self, lengths: Tensor) -> Tensor:
        """How many of the frames behind the convolutions come from the first `lengths` before them."""
        for _ in self.convolutions:
            lengths = (lengths - 1) // 2 + 1
        return lengths


class Conv2dSubsampling(nn.Module):
    """(B, T, features) -> (B, about T / 4, dim): two 3×3 convolutions of stride 2 over time and frequency.

    Dong et al., "Speech-Transformer" (2018); the front end of Conformer and Branchformer, too. Padding is zeroed before
    each of them: what it holds, and how much there is, changes nothing before it.
    """

    def __init__(self, features: int, dim: int):
        super().__init__()
        self.convolutions = nn.ModuleList([nn.Conv2d(1, dim, 3, 2, 1), nn.Conv2d(dim, dim, 3, 2, 1)])
        self.projection = nn.Linear(dim * ((features + 3) // 4), dim)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        first, second = self.convolutions
        x = F.relu(first(zero_padding(x, lengths)[:, None])).transpose(1, 2)  # (B, about T / 2, dim, F)
        x = zero_padding(x.flatten(2), None if lengths is None else (lengths + 1) // 2).view_as(x)
        x = F.relu(second(x.transpose(1, 2)))
        return self.projection(x.transpose(1, 2).flatten(2))

    def lengths(self, lengths: Tensor) -> Tensor:
        """How many of the frames behind the convolutions come from the first `lengths` before them."""
        return (lengths + 3) // 4


def perceptron(*widths: int) -> nn.Sequential:
    """Linear layers of these widths with ReLU between them: the small heads of DETR and SAM."""
    layers = [nn.Linear(*pair) for pair in pairwise(widths)]
    return nn.Sequential(*(module for layer in layers[:-1] for module in (layer, nn.ReLU())), layers[-1])
