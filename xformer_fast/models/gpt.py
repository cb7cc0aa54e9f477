"""GPT-2: a decoder, pre-norm, with learned positions and GELU. Radford et al. (2019)."""

from torch import Tensor, nn

from ..checkpoints import expect, renamed
from ..layers import Attention, Cache, FeedForward, Stack, TransformerLayer, init_weights, make_positions

NAMES = {  # of a GPT2LMHeadModel
    "transformer.wte.*": "embed.*",
    "transformer.wpe.*": "positions.table.*",
    "transformer.h.*.ln_1.*": "layers.*.mixer.norm.*",
    "transformer.h.*.attn.c_attn.*": (
        "layers.*.mixer.branch.query.*",
        "layers.*.mixer.branch.key.*",
        "layers.*.mixer.branch.value.*",
    ),
    "transformer.h.*.attn.c_proj.*": "layers.*.mixer.branch.out.*",
    "transformer.h.*.ln_2.*": "layers.*.feed_forward.norm.*",
    "transformer.h.*.mlp.c_fc.*": "layers.*.feed_forward.branch.up.*",
    "transformer.h.*.mlp.c_proj.*": "layers.*.feed_forward.branch.down.*",
    "transformer.ln_f.*": "norm.*",
    "lm_head.*": "head.*",
}


class GPT(nn.Module):
    """tokens (B, S) -> logits (B, S, vocab_size) of the next ones.

    positions: see `layers.make_positions`. attention: arguments of every `Attention`: mixer, backend, num_kv_heads, ...

    >>> import torch
    >>> from xformer_fast.models import GPT
    >>> GPT(100, dim=64, depth=2, num_heads=4)(torch.randint(100, (1, 12))).shape
    torch.Size([1, 12, 100])
    """

    def __init__(
        self, vocab_size: int, *, dim: int = 768, depth: int = 12, num_heads: int = 12, hidden: int | None = None,
        max_length: int = 1024, positions="learned", activation="gelu_tanh", norm_eps=1e-5, dropout=0.0, **attention,
    ):  # fmt: skip
        super().__init__()
        self.embed = nn.Embedding(vocab_size, dim)
        self.positions = make_positions(
            positions, dim=dim, num_heads=num_heads, max_length=max_length, bidirectional=False
        )
        self.dropout = nn.Dropout(dropout)
        self.layers = Stack(
            TransformerLayer(
                dim,
                Attention(dim, num_heads, **attention),
                FeedForward(dim, hidden or 4 * dim, activation),
                norm_eps=norm_eps,
                dropout=dropout,
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self.head = nn.Linear(dim, vocab_size, bias=False)
        self.apply(init_weights)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor, *, lengths: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """lengths: (B,) where rows are padded behind. cache: of `new_cache`; tokens are then the new ones alone."""
        x = self.positions(self.embed(tokens), 0 if cache is None else cache.lengths)
        x = self.layers(self.dropout(x), cache=cache, causal=True, key_lengths=lengths, **self.positions.options())
        return self.head(self.norm(x))

    def new_cache(self, batch: int, capacity: int) -> Cache:
        return self.layers.new_cache(batch, capacity)

    @classmethod
    def from_transformers(cls, host: nn.Module, **choices) -> "GPT":
        """The weights of a transformers GPT2LMHeadModel."""
        c = host.config
        expect(c, activation_function="gelu_new", scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False)
        model = cls(
            c.vocab_size, dim=c.n_embd, depth=c.n_layer, num_heads=c.n_head, hidden=c.n_inner,
            max_length=c.n_positions, norm_eps=c.layer_norm_epsilon, **choices,
        )  # fmt: skip
        state = {  # its linear layers hold their weights transposed
            name: tensor.mT if ".c_" in name and tensor.dim() == 2 else tensor
            for name, tensor in host.state_dict().items()
        }
        model.load_state_dict(renamed(state, NAMES))
        return model
