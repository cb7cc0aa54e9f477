"""The original Transformer: an encoder-decoder, post-norm, with sinusoids and ReLU.

Vaswani et al., "Attention Is All You Need" (2017).
"""

from torch import Tensor, nn

from ..checkpoints import renamed
from ..layers import Attention, Cache, FeedForward, Stack, TransformerLayer, make_positions

_PARTS = ("query", "key", "value")
NAMES = {  # of a torch.nn.Transformer; its packed projections hold query, key and value
    "*.layers.*.self_attn.in_proj_*": tuple(f"*.*.mixer.branch.{part}.*" for part in _PARTS),
    "*.layers.*.self_attn.out_proj.*": "*.*.mixer.branch.out.*",
    "*.layers.*.multihead_attn.in_proj_*": tuple(f"*.*.cross.branch.{part}.*" for part in _PARTS),
    "*.layers.*.multihead_attn.out_proj.*": "*.*.cross.branch.out.*",
    "*.layers.*.linear1.*": "*.*.feed_forward.branch.up.*",
    "*.layers.*.linear2.*": "*.*.feed_forward.branch.down.*",
    "*.layers.*.norm1.*": "*.*.mixer.norm.*",
    "encoder.layers.*.norm2.*": "encoder.*.feed_forward.norm.*",
    "decoder.layers.*.norm2.*": "decoder.*.cross.norm.*",
    "decoder.layers.*.norm3.*": "decoder.*.feed_forward.norm.*",
}


class Transformer(nn.Module):
    """source (B, S) and target (B, T) tokens -> logits (B, T, vocab_size) of the next target tokens.

    One embedding serves both sides and the head (section 3.4). positions: see `layers.make_positions`. attention:
    arguments of every `Attention`: mixer, backend, ...

    >>> import torch
    >>> from xformer_fast.models import Transformer
    >>> model = Transformer(100, dim=64, depth=2, num_heads=4, hidden=128)
    >>> model(torch.randint(100, (2, 12)), torch.randint(100, (2, 5)), source_lengths=torch.tensor([12, 7])).shape
    torch.Size([2, 5, 100])
    """

    def __init__(
        self, vocab_size: int, *, dim: int = 512, depth: int = 6, num_heads: int = 8, hidden: int = 2048,
        max_length: int = 1024, positions="sinusoidal", norm_eps=1e-5, dropout=0.0, **attention,
    ):  # fmt: skip
        super().__init__()

        def layers(decoder: bool) -> Stack:
            return Stack(
                TransformerLayer(
                    dim,
                    Attention(dim, num_heads, **attention),
                    FeedForward(dim, hidden, "relu"),
                    cross=Attention(dim, num_heads, **attention) if decoder else None,
                    norm_eps=norm_eps,
                    norm_first=False,
                    dropout=dropout,
                )
                for _ in range(depth)
            )

        places = {"dim": dim, "num_heads": num_heads, "max_length": max_length}
        self.embed, self.dropout, self.scale = nn.Embedding(vocab_size, dim), nn.Dropout(dropout), dim**0.5
        self.source_positions = make_positions(positions, bidirectional=True, **places)
        self.target_positions = make_positions(positions, bidirectional=False, **places)
        self.encoder, self.decoder = layers(False), layers(True)
        self.head = nn.Linear(dim, vocab_size, bias=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        nn.init.normal_(self.embed.weight, std=dim**-0.5)
        self.head.weight = self.embed.weight

    def encode(self, source: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        """(B, S) -> the memory (B, S, dim). lengths: (B,) where rows are padded behind."""
        x = self.dropout(self.source_positions(self.embed(source) * self.scale))
        return self.encoder(x, key_lengths=lengths, **self.source_positions.options())

    def decode(
        self, target: Tensor, memory: Tensor, *, memory_lengths=None, lengths=None, cache: Cache | None = None
    ) -> Tensor:
        """Logits of the tokens after each of target; with a cache, of `new_cache`, target is the new tokens alone."""
        start = 0 if cache is None else cache.lengths
        x = self.decoder(
            self.dropout(self.target_positions(self.embed(target) * self.scale, start)), memory,
            memory_lengths=memory_lengths, cache=cache, causal=True, key_lengths=lengths,
            **self.target_positions.options(),
        )  # fmt: skip
        return self.head(x)

    def forward(self, source: Tensor, target: Tensor, *, source_lengths: Tensor | None = None) -> Tensor:
        return self.decode(target, self.encode(source, lengths=source_lengths), memory_lengths=source_lengths)

    def new_cache(self, batch: int, capacity: int) -> Cache:
        return self.decoder.new_cache(batch, capacity)

    def load_torch(self, host: nn.Transformer):
        """Takes the layers of a torch.nn.Transformer that is post-norm, with no norms behind its stacks."""
        missing, unexpected = self.load_state_dict(renamed(host.state_dict(), NAMES), strict=False)
        wrong = [name for name in missing if not name.startswith(("embed.", "head.", "source_", "target_"))]
        if wrong or unexpected:
            raise ValueError(f"the two differ in {', '.join([*wrong, *unexpected])}")
