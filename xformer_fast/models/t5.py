"""T5: an encoder-decoder, pre-norm, with RMSNorm, biases of the distance for positions, and unscaled scores.

Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer" (2020). Its version
1.1 has activation="geglu_tanh" and a head of its own, tied=False.
"""

from torch import Tensor, nn

from ..checkpoints import expect, renamed
from ..layers import Attention, Cache, FeedForward, Stack, T5Positions, TransformerLayer

NAMES = {  # of a T5ForConditionalGeneration
    "shared.*": "embed.*",
    "*.embed_tokens.*": None,  # both are shared
    "*.block.0.layer.0.SelfAttention.relative_attention_bias.*": "*_positions.table.*",
    "*.block.*.layer.0.SelfAttention.q.*": "*.*.mixer.branch.query.*",
    "*.block.*.layer.0.SelfAttention.k.*": "*.*.mixer.branch.key.*",
    "*.block.*.layer.0.SelfAttention.v.*": "*.*.mixer.branch.value.*",
    "*.block.*.layer.0.SelfAttention.o.*": "*.*.mixer.branch.out.*",
    "*.block.*.layer.0.layer_norm.*": "*.*.mixer.norm.*",
    "decoder.block.*.layer.1.EncDecAttention.q.*": "decoder.*.cross.branch.query.*",
    "decoder.block.*.layer.1.EncDecAttention.k.*": "decoder.*.cross.branch.key.*",
    "decoder.block.*.layer.1.EncDecAttention.v.*": "decoder.*.cross.branch.value.*",
    "decoder.block.*.layer.1.EncDecAttention.o.*": "decoder.*.cross.branch.out.*",
    "decoder.block.*.layer.1.layer_norm.*": "decoder.*.cross.norm.*",
    "encoder.block.*.layer.1.layer_norm.*": "encoder.*.feed_forward.norm.*",
    "decoder.block.*.layer.2.layer_norm.*": "decoder.*.feed_forward.norm.*",
    "*.final_layer_norm.*": "*_norm.*",
    "lm_head.*": "head.*",
} | {
    f"{stack}.block.*.layer.{place}.DenseReluDense.{theirs}.*": f"{stack}.*.feed_forward.branch.{ours}.*"
    for stack, place in (("encoder", 1), ("decoder", 2))
    for theirs, ours in (("wi", "up"), ("wi_0", "gate"), ("wi_1", "up"), ("wo", "down"))
}


class T5(nn.Module):
    """source (B, S) and target (B, T) tokens -> logits (B, T, vocab_size) of the next target tokens.

    tied: the head is the embedding, and x is scaled down for it. attention: arguments of every `Attention`: mixer,
    backend, ...

    >>> import torch
    >>> from xformer_fast.models import T5
    >>> model = T5(100, dim=64, depth=2, num_heads=4, hidden=128)
    >>> model(torch.randint(100, (2, 12)), torch.randint(100, (2, 5)), source_lengths=torch.tensor([12, 7])).shape
    torch.Size([2, 5, 100])
    """

    def __init__(
        self, vocab_size: int, *, dim: int = 512, depth: int = 6, decoder_depth: int | None = None, num_heads: int = 8,
        head_dim: int | None = None, hidden: int = 2048, activation="relu", tied=True, num_buckets=32, max_distance=128,
        norm_eps=1e-6, dropout=0.0, **attention,
    ):  # fmt: skip
        super().__init__()

        def attend():
            return Attention(dim, num_heads, head_dim=head_dim, bias=False, scale=1.0, **attention)

        def layers(count: int, decoder: bool) -> Stack:
            return Stack(
                TransformerLayer(
                    dim,
                    attend(),
                    FeedForward(dim, hidden, activation, bias=False, dropout=dropout),
                    cross=attend() if decoder else None,
                    norm="rms",
                    norm_eps=norm_eps,
                    dropout=dropout,
                )
                for _ in range(count)
            )

        buckets = {"num_buckets": num_buckets, "max_distance": max_distance}
        self.embed, self.dropout = nn.Embedding(vocab_size, dim), nn.Dropout(dropout)
        self.encoder_positions = T5Positions(num_heads, bidirectional=True, **buckets)
        self.decoder_positions = T5Positions(num_heads, bidirectional=False, **buckets)
        self.encoder, self.decoder = layers(depth, False), layers(decoder_depth or depth, True)
        self.encoder_norm, self.decoder_norm = nn.RMSNorm(dim, eps=norm_eps), nn.RMSNorm(dim, eps=norm_eps)
        self.head = nn.Linear(dim, vocab_size, bias=False)
        nn.init.normal_(self.embed.weight)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):  # queries are made small in place of the scores
                unscaled = module.out_features // num_heads if name.endswith("query") else 1
                nn.init.normal_(module.weight, std=(module.in_features * unscaled) ** -0.5)
        for positions in (self.encoder_positions, self.decoder_positions):
            nn.init.normal_(positions.table.weight, std=dim**-0.5)
        if tied:
            self.head.weight = self.embed.weight
        self.head_scale = dim**-0.5 if tied else 1.0

    def encode(self, source: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        """(B, S) -> the memory (B, S, dim). lengths: (B,) where rows are padded behind."""
        x = self.encoder(self.dropout(self.embed(source)), key_lengths=lengths, **self.encoder_positions.options())
        return self.dropout(self.encoder_norm(x))

    def decode(
        self, target: Tensor, memory: Tensor, *, memory_lengths=None, lengths=None, cache: Cache | None = None
    ) -> Tensor:
        """Logits of the tokens after each of target; with a cache, of `new_cache`, target is the new tokens alone."""
        x = self.decoder(
            self.dropout(self.embed(target)), memory, memory_lengths=memory_lengths, cache=cache, causal=True,
            key_lengths=lengths, **self.decoder_positions.options(),
        )  # fmt: skip
        return self.head(self.dropout(self.decoder_norm(x)) * self.head_scale)

    def forward(self, source: Tensor, target: Tensor, *, source_lengths: Tensor | None = None) -> Tensor:
        return self.decode(target, self.encode(source, lengths=source_lengths), memory_lengths=source_lengths)

    def new_cache(self, batch: int, capacity: int) -> Cache:
        return self.decoder.new_cache(batch, capacity)

    @classmethod
    def from_transformers(cls, host: nn.Module, **choices) -> "T5":
        """The weights of a transformers T5ForConditionalGeneration."""
        c = host.config
        expect(c, dense_act_fn="gelu_new" if c.is_gated_act else "relu")
        model = cls(
            c.vocab_size, dim=c.d_model, depth=c.num_layers, decoder_depth=c.num_decoder_layers, num_heads=c.num_heads,
            head_dim=c.d_kv, hidden=c.d_ff, activation="geglu_tanh" if c.is_gated_act else "relu",
            tied=c.scale_decoder_outputs, num_buckets=c.relative_attention_num_buckets,
            max_distance=c.relative_attention_max_distance, norm_eps=c.layer_norm_epsilon, **choices,
        )  # fmt: skip
        model.load_state_dict(renamed(host.state_dict(), NAMES))
        return model
