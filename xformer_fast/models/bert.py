"""BERT: an encoder, post-norm, with learned positions and GELU, trained on masked tokens and next sentences.

Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding" (2019).
"""

import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoints import expect, renamed
from ..layers import Attention, FeedForward, Stack, TransformerLayer, init_weights, make_positions

NAMES = {  # of a BertForPreTraining
    "bert.embeddings.word_embeddings.*": "embed.*",
    "bert.embeddings.position_embeddings.*": "positions.table.*",
    "bert.embeddings.token_type_embeddings.*": "segments.*",
    "bert.embeddings.LayerNorm.*": "norm.*",
    "bert.encoder.layer.*.attention.self.*.*": "layers.*.mixer.branch.*.*",
    "bert.encoder.layer.*.attention.output.dense.*": "layers.*.mixer.branch.out.*",
    "bert.encoder.layer.*.attention.output.LayerNorm.*": "layers.*.mixer.norm.*",
    "bert.encoder.layer.*.intermediate.dense.*": "layers.*.feed_forward.branch.up.*",
    "bert.encoder.layer.*.output.dense.*": "layers.*.feed_forward.branch.down.*",
    "bert.encoder.layer.*.output.LayerNorm.*": "layers.*.feed_forward.norm.*",
    "bert.pooler.dense.*": "pooler.*",
    "cls.predictions.transform.dense.*": "token_transform.*",
    "cls.predictions.transform.LayerNorm.*": "token_norm.*",
    "cls.predictions.decoder.*": "token_head.*",
    "cls.predictions.bias": None,  # the decoder's
    "cls.seq_relationship.*": "sentence_head.*",
}


class BERT(nn.Module):
    """tokens (B, S) -> logits (B, S, vocab_size) of the masked tokens, and (B, 2): does the second sentence follow?

    positions: see `layers.make_positions`. attention: arguments of every `Attention`: mixer, backend, ...

    >>> import torch
    >>> from xformer_fast.models import BERT
    >>> model = BERT(100, dim=64, depth=2, num_heads=4)
    >>> masked, follows = model(torch.randint(100, (2, 12)), lengths=torch.tensor([12, 7]))
    >>> masked.shape, follows.shape
    (torch.Size([2, 12, 100]), torch.Size([2, 2]))
    """

    def __init__(
        self, vocab_size: int, *, dim: int = 768, depth: int = 12, num_heads: int = 12, hidden: int | None = None,
        max_length: int = 512, num_segments: int = 2, positions="learned", norm_eps=1e-12, dropout=0.0, **attention,
    ):  # fmt: skip
        super().__init__()
        self.embed, self.segments = nn.Embedding(vocab_size, dim), nn.Embedding(num_segments, dim)
        self.positions = make_positions(
            positions, dim=dim, num_heads=num_heads, max_length=max_length, bidirectional=True
        )
        self.norm, self.dropout = nn.LayerNorm(dim, eps=norm_eps), nn.Dropout(dropout)
        self.layers = Stack(
            TransformerLayer(
                dim,
                Attention(dim, num_heads, **attention),
                FeedForward(dim, hidden or 4 * dim, "gelu"),
                norm_eps=norm_eps,
                norm_first=False,
                dropout=dropout,
            )
            for _ in range(depth)
        )
        self.token_transform, self.token_norm = nn.Linear(dim, dim), nn.LayerNorm(dim, eps=norm_eps)
        self.token_head = nn.Linear(dim, vocab_size)
        self.pooler, self.sentence_head = nn.Linear(dim, dim), nn.Linear(dim, 2)
        self.apply(init_weights)
        self.token_head.weight = self.embed.weight

    def encode(self, tokens: Tensor, segments: Tensor | None = None, *, lengths: Tensor | None = None) -> Tensor:
        """(B, S, dim). segments: (B, S), the sentence of each token, or None: all of the first."""
        x = self.embed(tokens) + (self.segments.weight[0] if segments is None else self.segments(segments))
        x = self.dropout(self.norm(self.positions(x)))
        return self.layers(x, key_lengths=lengths, **self.positions.options())

    def forward(
        self, tokens: Tensor, segments: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        x = self.encode(tokens, segments, lengths=lengths)
        masked = self.token_head(self.token_norm(F.gelu(self.token_transform(x))))
        return masked, self.sentence_head(self.pooler(x[:, 0]).tanh())

    @classmethod
    def from_transformers(cls, host: nn.Module, **choices) -> "BERT":
        """The weights of a transformers BertForPreTraining."""
        c = host.config
        expect(c, hidden_act="gelu", is_decoder=False)
        model = cls(
            c.vocab_size, dim=c.hidden_size, depth=c.num_hidden_layers, num_heads=c.num_attention_heads,
            hidden=c.intermediate_size, max_length=c.max_position_embeddings, num_segments=c.type_vocab_size,
            norm_eps=c.layer_norm_eps, **choices,
        )  # fmt: skip
        model.load_state_dict(renamed(host.state_dict(), NAMES))
        return model
