"""AST: an encoder over overlapping patches of a spectrogram, pre-norm, with learned positions and GELU.

Gong et al., "AST: Audio Spectrogram Transformer" (2021): a DeiT, with its class and distillation tokens.
"""

import torch
from torch import Tensor, nn

from ..checkpoints import expect, renamed
from ..frontends import PatchEmbedding
from ..layers import Attention, FeedForward, Stack, TransformerLayer, init_weights, make_positions

NAMES = {  # of an ASTForAudioClassification
    "audio_spectrogram_transformer.embeddings.cls_token": "class_token",
    "audio_spectrogram_transformer.embeddings.distillation_token": "distillation_token",
    "audio_spectrogram_transformer.embeddings.position_embeddings": "positions.table.weight",
    "audio_spectrogram_transformer.embeddings.patch_embeddings.projection.*": "patches.projection.*",
    "audio_spectrogram_transformer.layers.*.layernorm_before.*": "layers.*.mixer.norm.*",
    "audio_spectrogram_transformer.layers.*.attention.q_proj.*": "layers.*.mixer.branch.query.*",
    "audio_spectrogram_transformer.layers.*.attention.k_proj.*": "layers.*.mixer.branch.key.*",
    "audio_spectrogram_transformer.layers.*.attention.v_proj.*": "layers.*.mixer.branch.value.*",
    "audio_spectrogram_transformer.layers.*.attention.o_proj.*": "layers.*.mixer.branch.out.*",
    "audio_spectrogram_transformer.layers.*.layernorm_after.*": "layers.*.feed_forward.norm.*",
    "audio_spectrogram_transformer.layers.*.mlp.fc1.*": "layers.*.feed_forward.branch.up.*",
    "audio_spectrogram_transformer.layers.*.mlp.fc2.*": "layers.*.feed_forward.branch.down.*",
    "audio_spectrogram_transformer.layernorm.*": "norm.*",
    "classifier.layernorm.*": "head.0.*",
    "classifier.dense.*": "head.1.*",
}


class AST(nn.Module):
    """spectrogram (B, frames, mel_bins) -> logits (B, num_classes).

    stride: of the patches, over frequency and over time. positions: see `layers.make_positions`. attention: arguments
    of every `Attention`: mixer, backend, ...

    >>> import torch
    >>> from xformer_fast.models import AST
    >>> AST(10, mel_bins=32, frames=64, dim=64, depth=2, num_heads=4)(torch.randn(2, 64, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self, num_classes: int, *, mel_bins: int = 128, frames: int = 1024, patch: int = 16, stride=(10, 10),
        dim: int = 768, depth: int = 12, num_heads: int = 12, hidden: int | None = None, positions="learned",
        norm_eps=1e-12, dropout=0.0, **attention,
    ):  # fmt: skip
        super().__init__()
        self.patches = PatchEmbedding(1, dim, patch, stride)
        self.class_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.distillation_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        tokens = 2 + ((mel_bins - patch) // stride[0] + 1) * ((frames - patch) // stride[1] + 1)
        self.positions = make_positions(positions, dim=dim, num_heads=num_heads, max_length=tokens, bidirectional=True)
        self.dropout = nn.Dropout(dropout)
        self.layers = Stack(
            TransformerLayer(
                dim,
                Attention(dim, num_heads, **attention),
                FeedForward(dim, hidden or 4 * dim, "gelu"),
                norm_eps=norm_eps,
                dropout=dropout,
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self.head = nn.Sequential(nn.LayerNorm(dim, eps=norm_eps), nn.Linear(dim, num_classes))
        self.apply(init_weights)

    def forward(self, spectrogram: Tensor) -> Tensor:
        patches = self.patches(spectrogram.mT[:, None]).flatten(1, 2)
        first = (token.expand(patches.shape[0], -1, -1) for token in (self.class_token, self.distillation_token))
        x = self.dropout(self.positions(torch.cat((*first, patches), 1)))
        x = self.norm(self.layers(x, **self.positions.options()))
        return self.head((x[:, 0] + x[:, 1]) / 2)

    @classmethod
    def from_transformers(cls, host: nn.Module, **choices) -> "AST":
        """The weights of a transformers ASTForAudioClassification."""
        c = host.config
        expect(c, hidden_act="gelu")
        model = cls(
            c.num_labels, mel_bins=c.num_mel_bins, frames=c.max_length, patch=c.patch_size,
            stride=(c.frequency_stride, c.time_stride), dim=c.hidden_size, depth=c.num_hidden_layers,
            num_heads=c.num_attention_heads, hidden=c.intermediate_size, norm_eps=c.layer_norm_eps,
            bias=c.qkv_bias, out_bias=True, **choices,
        )  # fmt: skip
        state = renamed(host.state_dict(), NAMES)
        state["positions.table.weight"] = state["positions.table.weight"][0]
        model.load_state_dict(state)
        return model
