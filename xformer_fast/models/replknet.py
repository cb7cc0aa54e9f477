"""RepLKNet: four stages whose mixers are depthwise convolutions of up to 31×31, trained beside a small one.

Ding et al., "Scaling Up Your Kernels to 31x31: Revisiting Large Kernel Design in CNNs" (2022). After training, `merge`
folds the small kernels and the norms into the large kernels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..frontends import ChannelsFirst
from ..layers import Stack, TransformerLayer


def convolution(channels: int, dim: int, kernel: int = 1, *, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution without bias that keeps the map's sides (over the stride), and a batch norm."""
    return nn.Sequential(
        nn.Conv2d(channels, dim, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(dim)
    )


class LargeKernel(nn.Module):
    """A depthwise convolution of a large kernel and one of a small, a norm behind each, summed; (B, C, H, W)."""

    def __init__(self, dim: int, kernel: int, small: int):
        super().__init__()
        self.large, self.small = (convolution(dim, dim, size, groups=dim) for size in (kernel, small))

    def forward(self, x: Tensor) -> Tensor:
        return self.large(x) if self.small is None else self.large(x) + self.small(x)

    @torch.no_grad()
    def merge(self):
        """Becomes one convolution with a bias, of the same outputs in eval mode."""
        weights, biases = zip(*(_folded(*branch) for branch in (self.large, self.small)), strict=True)
        margin = (weights[0].shape[-1] - weights[1].shape[-1]) // 2
        old, self.small = self.large[0], None
        self.large = nn.Conv2d(old.in_channels, old.out_channels, old.kernel_size, 1, old.padding, groups=old.groups)
        self.large.weight.copy_(weights[0] + F.pad(weights[1], [margin] * 4))
        self.large.bias.copy_(sum(biases))
        self.large.to(weights[0])


def _folded(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that equals these two in eval mode."""
    factor = norm.weight / (norm.running_var + norm.eps).sqrt()
    return convolution.weight * factor[:, None, None, None], norm.bias - norm.running_mean * factor


def replk_mixer(dim: int, kernel: int, small: int) -> nn.Module:
    """The RepLK block: 1×1, ReLU, the large kernel, ReLU, 1×1."""
    return ChannelsFirst(
        convolution(dim, dim), nn.ReLU(), LargeKernel(dim, kernel, small), nn.ReLU(), convolution(dim, dim)
    )


def conv_feed_forward(dim: int, hidden: int) -> nn.Module:
    """The ConvFFN block: 1×1, GELU, 1×1."""
    return ChannelsFirst(convolution(dim, hidden), nn.GELU(), convolution(hidden, dim))


def batch_norm(dim: int) -> nn.Module:
    return ChannelsFirst(nn.BatchNorm2d(dim))


class RepLKNet(nn.Module):
    """image (B, channels, H, W) -> logits (B, num_classes).

    dims, depths, kernels: one a stage. small: the kernel trained beside the large ones.

    >>> import torch
    >>> from xformer_fast.models import RepLKNet
    >>> model = RepLKNet(10, dims=(16, 32), depths=(1, 2), kernels=(13, 7), small=3).eval()
    >>> image = torch.randn(2, 3, 64, 96)
    >>> logits = model(image)
    >>> model.merge()
    >>> (model(image) - logits).abs().max() < 1e-5
    tensor(True)
    """

    def __init__(
        self, num_classes: int, *, channels: int = 3, dims=(128, 256, 512, 1024), depths=(2, 2, 18, 2),
        kernels=(31, 29, 27, 13), small: int = 5, mlp_ratio: float = 4.0, dropout=0.0, drop_path=0.0,
    ):  # fmt: skip
        super().__init__()
        rates = iter(torch.linspace(0, drop_path, sum(depths)).tolist())
        self.stem = ChannelsFirst(
            convolution(channels, dims[0], 3, stride=2), nn.ReLU(),
            convolution(dims[0], dims[0], 3, groups=dims[0]), nn.ReLU(),
            convolution(dims[0], dims[0]), nn.ReLU(),
            convolution(dims[0], dims[0], 3, stride=2, groups=dims[0]), nn.ReLU(),
        )  # fmt: skip
        self.stages = nn.Sequential()
        for i, (dim, depth, kernel) in enumerate(zip(dims, depths, kernels, strict=True)):
            transition = () if i == 0 else (
                convolution(dims[i - 1], dim), nn.ReLU(), convolution(dim, dim, 3, stride=2, groups=dim), nn.ReLU()
            )  # fmt: skip
            layers = Stack(
                TransformerLayer(
                    dim,
                    replk_mixer(dim, kernel, small),
                    conv_feed_forward(dim, int(mlp_ratio * dim)),
                    norm=batch_norm,
                    dropout=dropout,
                    drop_path=next(rates),
                )
                for _ in range(depth)
            )
            self.stages.append(nn.Sequential(ChannelsFirst(*transition), layers))
        self.norm, self.head = batch_norm(dim), nn.Linear(dim, num_classes)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stages(self.stem(image.movedim(1, -1)))
        return self.head(self.norm(x).mean((1, 2)))

    def merge(self):
        """Folds the small kernels into the large ones: less work, the same outputs in eval mode; not for training."""
        for module in self.modules():
            if isinstance(module, LargeKernel):
                module.merge()
