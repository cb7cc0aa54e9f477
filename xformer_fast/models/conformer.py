"""Conformer: an encoder of speech whose layers put a convolution behind attention, between two half feed-forwards.

Gulati et al., "Conformer: Convolution-augmented Transformer for Speech Recognition" (2020).
"""

import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoints import expect, renamed
from ..frontends import Conv2dSubsampling, zero_padding
from ..layers import Attention, FeedForward, Residual, Stack, make_positions

NAMES = {  # of a Wav2Vec2ConformerEncoder, whose layers are these
    "layers.*.ffn1_layer_norm.*": "layers.*.first.norm.*",
    "layers.*.ffn1.intermediate_dense.*": "layers.*.first.branch.up.*",
    "layers.*.ffn1.output_dense.*": "layers.*.first.branch.down.*",
    "layers.*.self_attn_layer_norm.*": "layers.*.mixer.norm.*",
    "layers.*.self_attn.linear_q.*": "layers.*.mixer.branch.query.*",
    "layers.*.self_attn.linear_k.*": "layers.*.mixer.branch.key.*",
    "layers.*.self_attn.linear_v.*": "layers.*.mixer.branch.value.*",
    "layers.*.self_attn.linear_out.*": "layers.*.mixer.branch.out.*",
    "layers.*.self_attn.linear_pos.*": "layers.*.mixer.branch.mixer.place.*",
    "layers.*.self_attn.pos_bias_u": "layers.*.mixer.branch.mixer.content_bias",
    "layers.*.self_attn.pos_bias_v": "layers.*.mixer.branch.mixer.place_bias",
    "layers.*.conv_module.layer_norm.*": "layers.*.convolution.norm.*",
    "layers.*.conv_module.pointwise_conv1.*": "layers.*.convolution.branch.widen.*",
    "layers.*.conv_module.depthwise_conv.*": "layers.*.convolution.branch.depthwise.*",
    "layers.*.conv_module.batch_norm.*": "layers.*.convolution.branch.norm.*",
    "layers.*.conv_module.pointwise_conv2.*": "layers.*.convolution.branch.narrow.*",
    "layers.*.ffn2_layer_norm.*": "layers.*.last.norm.*",
    "layers.*.ffn2.intermediate_dense.*": "layers.*.last.branch.up.*",
    "layers.*.ffn2.output_dense.*": "layers.*.last.branch.down.*",
    "layers.*.final_layer_norm.*": "layers.*.norm.*",
    "layer_norm.*": None,  # wav2vec 2.0's own
    "pos_conv_embed.conv.bias": None,
    "pos_conv_embed.conv.parametrizations.weight.*": None,
}


class ConvolutionModule(nn.Module):
    """Pointwise, GLU, depthwise over time, batch norm, Swish, pointwise (section 2.2). Padding stays outside."""

    def __init__(self, dim: int, kernel: int):
        super().__init__()
        self.widen = nn.Conv1d(dim, 2 * dim, 1, bias=False)
        self.depthwise = nn.Conv1d(dim, dim, kernel, padding=kernel // 2, groups=dim, bias=False)
        self.norm = nn.BatchNorm1d(dim)
        self.narrow = nn.Conv1d(dim, dim, 1, bias=False)

    def forward(self, x: Tensor, *, key_lengths: Tensor | None = None) -> Tensor:
        x = zero_padding(F.glu(self.widen(x.mT), dim=1).mT, key_lengths).mT
        return self.narrow(F.silu(self.norm(self.depthwise(x)))).mT


class ConformerLayer(nn.Module):
    """x + FF/2, + attention, + convolution, + FF/2, norm (section 2.4), each pre-norm."""

    def __init__(self, dim: int, attention: nn.Module, hidden: int, kernel: int, *, dropout: float = 0.0):
        super().__init__()

        def half_step():
            return Residual(dim, FeedForward(dim, hidden, "silu", dropout=dropout), weight=0.5, dropout=dropout)

        self.first = half_step()
        self.mixer = Residual(dim, attention, dropout=dropout)
        self.convolution = Residual(dim, ConvolutionModule(dim, kernel), dropout=dropout)
        self.last = half_step()
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, *, key_lengths: Tensor | None = None, **options) -> Tensor:
        x = self.mixer(self.first(x), key_lengths=key_lengths, **options)
        return self.norm(self.last(self.convolution(x, key_lengths=key_lengths)))


class Conformer(nn.Module):
    """features (B, frames, features) -> logits (B, about frames / 4, vocab_size), for a CTC loss.

    positions: "relative", Transformer-XL's, or any of `layers.make_positions`. attention: arguments of every
    `Attention`: mixer, backend, ...

    >>> import torch
    >>> from xformer_fast.models import Conformer
    >>> model = Conformer(80, 100, dim=64, depth=2, num_heads=4, hidden=128)
    >>> lengths = torch.tensor([50, 31])
    >>> model(torch.randn(2, 50, 80), lengths=lengths).shape, model.frontend.lengths(lengths)
    (torch.Size([2, 13, 100]), tensor([13,  8]))
    """

    def __init__(
        self, features: int, vocab_size: int, *, dim: int = 256, depth: int = 16, num_heads: int = 4,
        hidden: int = 1024, kernel: int = 31, max_length: int = 6000, positions="relative", dropout=0.0, **attention,
    ):  # fmt: skip
        super().__init__()
        if positions == "relative":
            positions, attention = "none", {"mixer": "relative"} | attention
        self.frontend, self.dropout = Conv2dSubsampling(features, dim), nn.Dropout(dropout)
        self.positions = make_positions(
            positions, dim=dim, num_heads=num_heads, max_length=max_length, bidirectional=True
        )
        self.layers = Stack(
            ConformerLayer(dim, Attention(dim, num_heads, **attention), hidden, kernel, dropout=dropout)
            for _ in range(depth)
        )
        self.head = nn.Linear(dim, vocab_size)

    def forward(self, features: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        """lengths: (B,) frames before the padding; what stands behind them changes nothing before."""
        x = self.positions(self.dropout(self.frontend(features, lengths)))
        lengths = None if lengths is None else self.frontend.lengths(lengths)
        return self.head(self.layers(x, key_lengths=lengths, **self.positions.options()))

    def load_transformers(self, host: nn.Module):
        """Takes the layers of a transformers Wav2Vec2ConformerEncoder."""
        expect(host.config, hidden_act="swish", position_embeddings_type="relative")
        missing, unexpected = self.load_state_dict(renamed(host.state_dict(), NAMES), strict=False)
        wrong = [name for name in missing if name.startswith("layers.")]
        if wrong or unexpected:
            raise ValueError(f"the two differ in {', '.join([*wrong, *unexpected])}")
