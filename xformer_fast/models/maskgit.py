"""MaskGIT: an encoder that guesses the masked tokens of an image, and makes an image by guessing in a few rounds.

Chang et al., "MaskGIT: Masked Generative Image Transformer" (2022). The tokens are those of an image tokeniser (a
VQGAN); a class token stands before them. Layers are BERT's: post-norm, learned positions, GELU.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import Attention, FeedForward, Stack, TransformerLayer, init_weights, make_positions


def cosine_schedule(ratio: Tensor | float, count: int) -> Tensor:
    """How many of `count` tokens are masked at a ratio of the way from all to none: ceil(cos(ratio π / 2) count)."""
    return (torch.as_tensor(ratio, dtype=torch.float64).mul(math.pi / 2).cos() * count - 1e-9).ceil().long()


class MaskGIT(nn.Module):
    """tokens (B, S), masked where they are `model.mask`, and classes (B,) -> logits (B, S, vocab_size).

    positions: see `layers.make_positions`. attention: arguments of every `Attention`: mixer, backend, ...

    >>> import torch
    >>> from xformer_fast.models import MaskGIT
    >>> model = MaskGIT(100, 10, length=16, dim=64, depth=2, num_heads=4)
    >>> classes, tokens = torch.tensor([3, 7]), torch.randint(100, (2, 16))
    >>> masked = model.hide(tokens)
    >>> model.loss(model(masked, classes), masked, tokens).shape
    torch.Size([])
    >>> model.eval().generate(classes, steps=4).shape
    torch.Size([2, 16])
    """

    def __init__(
        self, vocab_size: int = 1024, num_classes: int = 1000, *, length: int = 256, dim: int = 768, depth: int = 24,
        num_heads: int = 8, hidden: int | None = None, positions="learned", norm_eps=1e-12, dropout=0.0, **attention,
    ):  # fmt: skip
        super().__init__()
        self.length, self.mask = length, vocab_size
        self.embed, self.classes = nn.Embedding(vocab_size + 1, dim), nn.Embedding(num_classes, dim)
        self.positions = make_positions(
            positions, dim=dim, num_heads=num_heads, max_length=length + 1, bidirectional=True
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
        self.transform, self.transform_norm = nn.Linear(dim, dim), nn.LayerNorm(dim, eps=norm_eps)
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        self.apply(init_weights)

    def forward(self, tokens: Tensor, classes: Tensor) -> Tensor:
        x = torch.cat((self.classes(classes)[:, None], self.embed(tokens)), 1)
        x = self.layers(self.dropout(self.norm(self.positions(x))), **self.positions.options())
        x = self.transform_norm(F.gelu(self.transform(x[:, 1:])))
        return F.linear(x, self.embed.weight[: self.mask], self.bias)

    def hide(self, tokens: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """tokens (B, S) with random ones masked, of each row a number by the cosine of a random ratio (section 3.1)."""
        device = tokens.device
        ratios = torch.rand(tokens.shape[0], 1, device=device, generator=generator)
        ranks = torch.rand(tokens.shape, device=device, generator=generator).argsort(1).argsort(1)
        return tokens.masked_fill(ranks < cosine_schedule(ratios, tokens.shape[1]), self.mask)

    def loss(self, logits: Tensor, masked: Tensor, tokens: Tensor, *, label_smoothing: float = 0.1) -> Tensor:
        """Cross entropy of the tokens that `masked`, of `hide`, does not show (equation 1)."""
        hidden = masked == self.mask
        return F.cross_entropy(logits[hidden], tokens[hidden], label_smoothing=label_smoothing)

    @torch.no_grad()
    def generate(
        self, classes: Tensor, *, steps: int = 8, temperature: float = 4.5, tokens: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:  # fmt: skip
        """Tokens (B, length) of images of the classes (B,), in `steps` calls (section 3.2).

        Each round draws a token for every masked place, keeps the surest, and masks the others again: fewer from round
        to round, by the cosine. tokens: (B, length) of which those masked are made, to edit an image; None: all.
        temperature: of the noise on how sure a token is; it falls to 0 on the way. 0: none.
        """
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        if tokens is None:
            tokens = torch.full((classes.shape[0], self.length), self.mask, device=classes.device)
        unknown = (tokens == self.mask).sum(1, keepdim=True)
        for step in range(1, steps + 1):
            masked, ratio = tokens == self.mask, step / steps
            probabilities = self(tokens, classes).float().softmax(-1)
            drawn = torch.multinomial(probabilities.flatten(0, 1), 1, generator=generator).view_as(tokens)
            sure = probabilities.gather(2, drawn[..., None])[..., 0].log()
            noise = torch.rand(sure.shape, device=sure.device, generator=generator)
            sure = sure - temperature * (1 - ratio) * (-noise.log()).log()  # Gumbel noise
            tokens = torch.where(masked, drawn, tokens)
            ranks = sure.masked_fill(~masked, math.inf).argsort(1).argsort(1)
            tokens = tokens.masked_fill(ranks < cosine_schedule(ratio, unknown), self.mask)
        return tokens
