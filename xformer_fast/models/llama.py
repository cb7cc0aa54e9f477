"""LLaMA: a decoder, pre-norm, with RMSNorm, rotary positions, SwiGLU and grouped heads. Touvron et al. (2023)."""

from torch import Tensor, nn

from ..checkpoints import expect, renamed
from ..layers import (
    Attention,
    Cache,
    FeedForward,
    RotaryPositions,
    Stack,
    TransformerLayer,
    init_weights,
    make_positions,
)

NAMES = {  # of a LlamaForCausalLM
    "model.embed_tokens.*": "embed.*",
    "model.layers.*.input_layernorm.*": "layers.*.mixer.norm.*",
    "model.layers.*.self_attn.q_proj.*": "layers.*.mixer.branch.query.*",
    "model.layers.*.self_attn.k_proj.*": "layers.*.mixer.branch.key.*",
    "model.layers.*.self_attn.v_proj.*": "layers.*.mixer.branch.value.*",
    "model.layers.*.self_attn.o_proj.*": "layers.*.mixer.branch.out.*",
    "model.layers.*.post_attention_layernorm.*": "layers.*.feed_forward.norm.*",
    "model.layers.*.mlp.gate_proj.*": "layers.*.feed_forward.branch.gate.*",
    "model.layers.*.mlp.up_proj.*": "layers.*.feed_forward.branch.up.*",
    "model.layers.*.mlp.down_proj.*": "layers.*.feed_forward.branch.down.*",
    "model.norm.*": "norm.*",
    "lm_head.*": "head.*",
}


class LLaMA(nn.Module):
    """tokens (B, S) -> logits (B, S, vocab_size) of the next ones.

    positions: see `layers.make_positions`. tied: the head is the embedding. attention: arguments of every `Attention`:
    mixer, backend, num_kv_heads, head_dim, ...

    >>> import torch
    >>> from xformer_fast.models import LLaMA
    >>> LLaMA(100, dim=64, depth=2, num_heads=4, num_kv_heads=2, hidden=128)(torch.randint(100, (1, 12))).shape
    torch.Size([1, 12, 100])
    """

    def __init__(
        self, vocab_size: int, *, dim: int = 4096, depth: int = 32, num_heads: int = 32, hidden: int = 11008,
        max_length: int = 2048, positions="rope", norm_eps=1e-6, tied=False, bias=False, head_dim=None, **attention,
    ):  # fmt: skip
        super().__init__()
        self.embed = nn.Embedding(vocab_size, dim)
        self.positions = make_positions(
            positions, dim=dim, num_heads=num_heads, head_dim=head_dim, max_length=max_length, bidirectional=False
        )
        self.layers = Stack(
            TransformerLayer(
                dim,
                Attention(dim, num_heads, bias=bias, head_dim=head_dim, **attention),
                FeedForward(dim, hidden, "swiglu", bias=False),
                norm="rms",
                norm_eps=norm_eps,
            )
            for _ in range(depth)
        )
        self.norm = nn.RMSNorm(dim, eps=norm_eps)
        self.head = nn.Linear(dim, vocab_size, bias=False)
        self.apply(init_weights)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor, *, lengths: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """lengths: (B,) where rows are padded behind. cache: of `new_cache`; tokens are then the new ones alone."""
        x = self.positions(self.embed(tokens), 0 if cache is None else cache.lengths)
        x = self.layers(x, cache=cache, causal=True, key_lengths=lengths, **self.positions.options())
        return self.head(self.norm(x))

    def new_cache(self, batch: int, capacity: int) -> Cache:
        return self.layers.new_cache(batch, capacity)

    @classmethod
    def from_transformers(cls, host: nn.Module, **choices) -> "LLaMA":
        """The weights of a transformers LlamaForCausalLM."""
        c = host.config
        expect(c, hidden_act="silu", mlp_bias=False)
        rope = RotaryPositions(c.head_dim, c.max_position_embeddings, scaling=c.rope_parameters)
        model = cls(
            c.vocab_size, dim=c.hidden_size, depth=c.num_hidden_layers, num_heads=c.num_attention_heads,
            num_kv_heads=c.num_key_value_heads, head_dim=c.head_dim, hidden=c.intermediate_size, positions=rope,
            norm_eps=c.rms_norm_eps, tied=c.tie_word_embeddings, bias=c.attention_bias, **choices,
        )  # fmt: skip
        model.load_state_dict(renamed(host.state_dict(), NAMES))
        return model
