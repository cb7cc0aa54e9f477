"""Speech-Transformer: an encoder of speech features behind strided convolutions, and a decoder of text; pre-norm.

Dong et al., "Speech-Transformer: A No-Recurrence Sequence-to-Sequence Model for Speech Recognition" (2018). fairseq's
S2T, which transformers calls Speech2Text, is one with gated convolutions over time and its own form of sinusoids.
"""

from torch import Tensor, nn

from ..checkpoints import expect, renamed
from ..frontends import Conv1dSubsampling, Conv2dSubsampling
from ..layers import (
    Attention,
    Cache,
    FeedForward,
    SinusoidalPositions,
    Stack,
    TransformerLayer,
    init_weights,
    make_positions,
)

NAMES = {  # of a Speech2TextForConditionalGeneration
    "model.encoder.conv.conv_layers.*.*": "frontend.convolutions.*.*",
    "model.*.layers.*.self_attn.q_proj.*": "*.*.mixer.branch.query.*",
    "model.*.layers.*.self_attn.k_proj.*": "*.*.mixer.branch.key.*",
    "model.*.layers.*.self_attn.v_proj.*": "*.*.mixer.branch.value.*",
    "model.*.layers.*.self_attn.out_proj.*": "*.*.mixer.branch.out.*",
    "model.*.layers.*.self_attn_layer_norm.*": "*.*.mixer.norm.*",
    "model.*.layers.*.encoder_attn.q_proj.*": "*.*.cross.branch.query.*",
    "model.*.layers.*.encoder_attn.k_proj.*": "*.*.cross.branch.key.*",
    "model.*.layers.*.encoder_attn.v_proj.*": "*.*.cross.branch.value.*",
    "model.*.layers.*.encoder_attn.out_proj.*": "*.*.cross.branch.out.*",
    "model.*.layers.*.encoder_attn_layer_norm.*": "*.*.cross.norm.*",
    "model.*.layers.*.fc1.*": "*.*.feed_forward.branch.up.*",
    "model.*.layers.*.fc2.*": "*.*.feed_forward.branch.down.*",
    "model.*.layers.*.final_layer_norm.*": "*.*.feed_forward.norm.*",
    "model.*.layer_norm.*": "*_norm.*",
    "model.decoder.embed_tokens.*": "embed.*",
    "lm_head.*": "head.*",
}


class SpeechTransformer(nn.Module):
    """features (B, frames, features) and target tokens (B, T) -> logits (B, T, vocab_size) of the next tokens.

    frontend: makes x of the features, about four times shorter; Conv2dSubsampling by default. positions: see
    `layers.make_positions`. attention: arguments of every `Attention`: mixer, backend, ...

    >>> import torch
    >>> from xformer_fast.models import SpeechTransformer
    >>> model = SpeechTransformer(80, 100, dim=64, depth=2, decoder_depth=1, num_heads=4, hidden=128)
    >>> model(torch.randn(2, 50, 80), torch.randint(100, (2, 5)), lengths=torch.tensor([50, 31])).shape
    torch.Size([2, 5, 100])
    """

    def __init__(
        self, features: int, vocab_size: int, *, dim: int = 256, depth: int = 12, decoder_depth: int = 6,
        num_heads: int = 4, hidden: int = 2048, frontend: nn.Module | None = None, max_length: int = 6000,
        positions="sinusoidal", dropout=0.0, **attention,
    ):  # fmt: skip
        super().__init__()

        def layers(count: int, decoder: bool) -> Stack:
            return Stack(
                TransformerLayer(
                    dim,
                    Attention(dim, num_heads, **attention),
                    FeedForward(dim, hidden, "relu", dropout=dropout),
                    cross=Attention(dim, num_heads, **attention) if decoder else None,
                    dropout=dropout,
                )
                for _ in range(count)
            )

        places = {"dim": dim, "num_heads": num_heads, "max_length": max_length}
        self.frontend = frontend or Conv2dSubsampling(features, dim)
        self.encoder_positions = make_positions(positions, bidirectional=True, **places)
        self.decoder_positions = make_positions(positions, bidirectional=False, **places)
        self.embed, self.dropout, self.scale = nn.Embedding(vocab_size, dim), nn.Dropout(dropout), dim**0.5
        self.encoder, self.decoder = layers(depth, False), layers(decoder_depth, True)
        self.encoder_norm, self.decoder_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocab_size, bias=False)
        self.apply(init_weights)
        self.head.weight = self.embed.weight

    def encode(self, features: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        """(B, frames, features) -> the memory (B, about frames / 4, dim). lengths: (B,) frames before the padding;
        those of the memory are `frontend.lengths(lengths)`."""
        x = self.dropout(self.encoder_positions(self.frontend(features, lengths) * self.scale))
        lengths = None if lengths is None else self.frontend.lengths(lengths)
        return self.encoder_norm(self.encoder(x, key_lengths=lengths, **self.encoder_positions.options()))

    def decode(
        self, target: Tensor, memory: Tensor, *, memory_lengths=None, lengths=None, cache: Cache | None = None
    ) -> Tensor:
        """Logits of the tokens after each of target; with a cache, of `new_cache`, target is the new tokens alone."""
        start = 0 if cache is None else cache.lengths
        x = self.decoder(
            self.dropout(self.decoder_positions(self.embed(target) * self.scale, start)), memory,
            memory_lengths=memory_lengths, cache=cache, causal=True, key_lengths=lengths,
            **self.decoder_positions.options(),
        )  # fmt: skip
        return self.head(self.decoder_norm(x))

    def forward(self, features: Tensor, target: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        memory_lengths = None if lengths is None else self.frontend.lengths(lengths)
        return self.decode(target, self.encode(features, lengths=lengths), memory_lengths=memory_lengths)

    def new_cache(self, batch: int, capacity: int) -> Cache:
        return self.decoder.new_cache(batch, capacity)

    @classmethod
    def from_transformers(cls, host: nn.Module, **choices) -> "SpeechTransformer":
        """The weights of a transformers Speech2TextForConditionalGeneration."""
        c = host.config
        expect(c, activation_function="relu", scale_embedding=True)
        features = c.input_feat_per_channel * c.input_channels
        model = cls(
            features, c.vocab_size, dim=c.d_model, depth=c.encoder_layers, decoder_depth=c.decoder_layers,
            num_heads=c.encoder_attention_heads, hidden=c.encoder_ffn_dim,
            frontend=Conv1dSubsampling(features, c.d_model, channels=c.conv_channels, kernels=c.conv_kernel_sizes),
            positions=SinusoidalPositions(c.d_model, halves=True, first=c.pad_token_id + 1), **choices,
        )  # fmt: skip
        model.load_state_dict(renamed(host.state_dict(), NAMES))
        return model
