"""RepLKNet against its paper, part by part, in float64: Ding et al. (2022), section 4.1; merged against unmerged."""

import copy

import host_models
import pytest
import torch
from families import images
from hosts import assert_near

from xformer_fast.models import RepLKNet


def norm(x, layer):
    """A batch norm in eval mode; x is (C, H, W)."""
    factor = layer.weight / (layer.running_var + layer.eps).sqrt()
    return (x - layer.running_mean[:, None, None]) * factor[:, None, None] + layer.bias[:, None, None]


def convolve(x, weight, stride=1):
    """A sum over the kernel's places of the map, shifted and weighed: 1×1 mixes channels, k×k is depthwise or the
    stem's."""
    kernel = weight.shape[-1]
    height, width = x.shape[1:]
    padded = torch.zeros(x.shape[0], height + kernel - 1, width + kernel - 1, dtype=x.dtype)
    padded[:, kernel // 2 : kernel // 2 + height, kernel // 2 : kernel // 2 + width] = x
    out = 0
    for i in range(kernel):
        for j in range(kernel):
            shifted = padded[:, i : i + height : stride, j : j + width : stride]
            taps, depthwise = weight[:, :, i, j], weight.shape[1] == 1
            out = out + (taps[..., None] * shifted if depthwise else torch.einsum("oc,chw->ohw", taps, shifted))
    return out


def convolution_norm(x, layers, stride=1):
    return norm(convolve(x, layers[0].weight, stride), layers[1])


def block_of_the_paper(x, layer):
    """RepLK Block: norm, 1×1, the large depthwise convolution with the small one parallel to it, 1×1, shortcut; ReLU
    behind the first two. ConvFFN: norm, 1×1, GELU, 1×1, shortcut. "we use BN before and after" (figure 2)."""
    first, _, kernels, _, last = layer.mixer.branch
    y = convolution_norm(norm(x, layer.mixer.norm[0]), first).clamp(min=0)
    y = (convolution_norm(y, kernels.large) + convolution_norm(y, kernels.small)).clamp(min=0)
    x = x + convolution_norm(y, last)
    up, _, down = layer.feed_forward.branch
    y = convolution_norm(norm(x, layer.feed_forward.norm[0]), up)
    y = y * 0.5 * (1 + torch.erf(y / 2**0.5))
    return x + convolution_norm(y, down)


def network_of_the_paper(x, model):
    """Stem: 3×3 of stride 2, depthwise 3×3, 1×1, depthwise 3×3 of stride 2. Transitions: 1×1, depthwise 3×3 of stride
    2. ReLU behind each."""
    for layers, stride in zip(model.stem[::2], (2, 1, 1, 2), strict=True):
        x = convolution_norm(x, layers, stride).clamp(min=0)
    for transition, layers in model.stages:
        for convolution, stride in zip(transition[::2], (1, 2), strict=False):
            x = convolution_norm(x, convolution, stride).clamp(min=0)
        for layer in layers:
            x = block_of_the_paper(x, layer)
    return model.head.weight @ norm(x, model.norm[0]).mean((1, 2)) + model.head.bias


def small():
    torch.manual_seed(0)
    return host_models.disturb(RepLKNet(5, dims=(4, 8), depths=(1, 2), kernels=(9, 7), small=3)).eval()


@torch.no_grad()
def test_network_is_the_papers():
    model, image = small(), images(2, 36, 28)
    ours = model(image)
    model.double()
    assert_near(ours, torch.stack([network_of_the_paper(x, model) for x in image.double()]))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_merged_is_the_same(dtype):
    """Section 3, guideline 3: the small kernels "can be merged into the large kernel"."""
    model, image = small().to(dtype), images(2, 36, 28).to(dtype)
    merged = copy.deepcopy(model)
    merged.merge()
    count = sum(p.numel() for p in merged.parameters())
    assert count < sum(p.numel() for p in model.parameters())
    torch.testing.assert_close(merged(image), model(image))
    kernels = merged.stages[1][1][0].mixer.branch[2]
    assert kernels.large.weight.shape == (8, 1, 7, 7) and kernels.large.weight.dtype == dtype
