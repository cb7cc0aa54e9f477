"""Branchformer: an encoder of speech whose layers run attention and a gated convolution side by side, and merge them.

Peng et al., "Branchformer: Parallel MLP-Attention Architectures to Capture Local and Global Context for Speech
Recognition and Understanding" (2022).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..frontends import Conv2dSubsampling, zero_padding
from ..layers import Attention, Residual, Stack, make_positions


class ConvolutionalGatingMLP(nn.Module):
    """cgMLP: Z = GELU(x U); of its halves A and B, A · depthwise(norm(B)); then V. Padding stays outside."""

    def __init__(self, dim: int, hidden: int, kernel: int, *, dropout: float = 0.0):
        super().__init__()
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden // 2, dim)
        self.norm = nn.LayerNorm(hidden // 2)
        self.depthwise = nn.Conv1d(hidden // 2, hidden // 2, kernel, padding=kernel // 2, groups=hidden // 2)
        self.dropout = nn.Dropout(dropout)
        nn.init.normal_(self.depthwise.weight, std=1e-6)  # at first, the gate lets everything through
        nn.init.ones_(self.depthwise.bias)

    def forward(self, x: Tensor, *, key_lengths: Tensor | None = None) -> Tensor:
        content, gate = F.gelu(self.up(x)).chunk(2, -1)
        gate = self.depthwise(zero_padding(self.norm(gate), key_lengths).mT).mT
        return self.down(self.dropout(content * gate))


class Branches(nn.Module):
    """merge([attention(norm(x)), mlp(norm(x))]): two branches, concatenated and projected."""

    def __init__(self, dim: int, attention: nn.Module, mlp: nn.Module, *, dropout: float = 0.0):
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(dim), attention
        self.mlp_norm, self.mlp = nn.LayerNorm(dim), mlp
        self.merge, self.dropout = nn.Linear(2 * dim, dim), nn.Dropout(dropout)

    def forward(self, x: Tensor, *, key_lengths: Tensor | None = None, **options) -> Tensor:
        attended = self.dropout(self.attention(self.attention_norm(x), key_lengths=key_lengths, **options))
        gated = self.dropout(self.mlp(self.mlp_norm(x), key_lengths=key_lengths))
        return self.merge(torch.cat((attended, gated), -1))


class Branchformer(nn.Module):
    """features (B, frames, features) -> logits (B, about frames / 4, vocab_size), for a CTC loss.

    positions: "relative", Transformer-XL's, or any of `layers.make_positions`. attention: arguments of every
    `Attention`: mixer, backend, ...

    >>> import torch
    >>> from xformer_fast.models import Branchformer
    >>> model = Branchformer(80, 100, dim=64, depth=2, num_heads=4, hidden=128)
    >>> lengths = torch.tensor([50, 31])
    >>> model(torch.randn(2, 50, 80), lengths=lengths).shape, model.frontend.lengths(lengths)
    (torch.Size([2, 13, 100]), tensor([13,  8]))
    """

    def __init__(
        self, features: int, vocab_size: int, *, dim: int = 256, depth: int = 24, num_heads: int = 4,
        hidden: int = 2048, kernel: int = 31, max_length: int = 6000, positions="relative", dropout=0.0, **attention,
    ):  # fmt: skip
        super().__init__()
        if positions == "relative":
            positions, attention = "none", {"mixer": "relative"} | attention

        def branches() -> Branches:
            mlp = ConvolutionalGatingMLP(dim, hidden, kernel, dropout=dropout)
            return Branches(dim, Attention(dim, num_heads, **attention), mlp, dropout=dropout)

        self.frontend, self.dropout = Conv2dSubsampling(features, dim), nn.Dropout(dropout)
        self.positions = make_positions(
            positions, dim=dim, num_heads=num_heads, max_length=max_length, bidirectional=True
        )
        self.layers = Stack(Residual(dim, branches(), norm_first=False, dropout=dropout) for _ in range(depth))
        self.head = nn.Linear(dim, vocab_size)

    def forward(self, features: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        """lengths: (B,) frames before the padding; what stands behind them changes nothing before."""
        x = self.positions(self.dropout(self.frontend(features, lengths)))
        lengths = None if lengths is None else self.frontend.lengths(lengths)
        return self.head(self.layers(x, key_lengths=lengths, **self.positions.options()))
