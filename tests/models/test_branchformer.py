"""Branchformer against its paper, part by part, in float64: Peng et al. (2022), section 3."""

import math

import host_models
import pytest
import torch
import torch.nn.functional as F
from hosts import HEADS, VOCAB, WIDTH, assert_near

from xformer_fast.models import Branchformer


def norm(x, layer):
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    return (x - mean) / (variance + layer.eps).sqrt() * layer.weight + layer.bias


def linear(x, layer):
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


def relative_attention(x, attention):
    """The attention branch: multi-head self-attention with relative positions, as in Transformer-XL, equation by head:
    softmax(((q_i + u)·k_j + (q_i + v)·W r(i - j)) / sqrt(d)) v_j."""
    mixer, length = attention.mixer, x.shape[0]
    query, key, value = (
        linear(x, layer).unflatten(-1, (HEADS, -1)) for layer in (attention.query, attention.key, attention.value)
    )
    out = torch.empty_like(query)
    for head in range(HEADS):
        for i in range(length):
            scores = []
            for j in range(length):
                angles = [(i - j) / 10000 ** (2 * k / WIDTH) for k in range(WIDTH // 2)]
                wave = torch.tensor([f(a) for a in angles for f in (math.sin, math.cos)], dtype=x.dtype)
                place = linear(wave, mixer.place).unflatten(-1, (HEADS, -1))[head]
                content = (query[i, head] + mixer.content_bias[head]) @ key[j, head]
                scores.append(content + (query[i, head] + mixer.place_bias[head]) @ place)
            weights = (torch.stack(scores) / (WIDTH // HEADS) ** 0.5).softmax(0)
            out[i, head] = weights @ value[:, head]
    return linear(out.flatten(1), attention.out)


def gated_mlp(x, mlp):
    """The cgMLP branch: channel projection and GELU, the convolutional spatial gating unit (halves; the second is
    normalised, convolved over time channel by channel, and gates the first), channel projection."""
    hidden = linear(x, mlp.up)
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
    content, gate = hidden[:, : hidden.shape[1] // 2], norm(hidden[:, hidden.shape[1] // 2 :], mlp.norm)
    kernel, length = mlp.depthwise.weight[:, 0], x.shape[0]  # (channels, taps)
    taps = kernel.shape[1]
    padded = F.pad(gate, (0, 0, taps // 2, taps // 2))
    gate = sum(padded[t : t + length] * kernel[:, t] for t in range(taps)) + mlp.depthwise.bias
    return linear(content * gate, mlp.down)


def layer_of_the_paper(x, layer):
    """Both branches read the same input, each behind its norm; concatenation and a projection merge them; residual and
    final norm."""
    branches = layer.branch
    attended = relative_attention(norm(x, branches.attention_norm), branches.attention)
    gated = gated_mlp(norm(x, branches.mlp_norm), branches.mlp)
    return norm(x + linear(torch.cat((attended, gated), -1), branches.merge), layer.norm)


@torch.no_grad()
@pytest.mark.parametrize("backend", ["reference", None])
def test_layers_are_the_papers(backend):
    torch.manual_seed(0)
    model = Branchformer(16, VOCAB, dim=WIDTH, depth=2, num_heads=HEADS, hidden=48, kernel=5, backend=backend).eval()
    host_models.disturb(model)
    x = torch.randn(2, 9, WIDTH)
    ours = model.layers(x)
    model.double()
    theirs = x.double()
    for layer in model.layers:
        theirs = torch.stack([layer_of_the_paper(row, layer) for row in theirs])
    assert_near(ours, theirs)
