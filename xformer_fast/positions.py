"""Position schemes handed to the attention ops: rotary embeddings (rope.py), ALiBi slopes, biases of the distance."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops import checks
from .rope import Rope

__all__ = ["DistanceBias", "Rope", "T5Bias", "alibi_slopes", "sinusoids"]


def sinusoids(places: Tensor, dim: int, *, halves: bool = False) -> Tensor:
    """sin and cos of places (...) at dim / 2 frequencies, (..., dim) float32; computed in float64.

    Channels 2k and 2k + 1 are sin and cos of place · 10000^(-2k / dim): Vaswani et al., "Attention Is All You Need"
    (2017). halves: tensor2tensor's and fairseq's form, all sines before all cosines, at frequencies from 1 to 1/10000.

    >>> import torch
    >>> from xformer_fast.positions import sinusoids
    >>> sinusoids(torch.arange(3), 8)[0]
    tensor([0., 1., 0., 1., 0., 1., 0., 1.])
    """
    steps = torch.arange(dim // 2, dtype=torch.float64, device=places.device) / (dim // 2 - 1 if halves else dim / 2)
    angles = places[..., None] * 10000.0**-steps
    return torch.stack((angles.sin(), angles.cos()), -2 if halves else -1).flatten(-2).float()


def alibi_slopes(num_heads: int) -> Tensor:
    """The slopes (num_heads,) float32 of Press et al., "Train Short, Test Long" (2021), for any number of heads.

    A power of two n has the geometric sequence from 2^(-8/n); another number takes those of the power of two below,
    then every other one of the next power's.

    >>> import xformer_fast
    >>> slopes = xformer_fast.alibi_slopes(8)
    """
    checks.check_int("num_heads", num_heads)
    if num_heads < 1:
        raise ValueError(f"num_heads must be at least 1, got {num_heads}")

    def geometric(n):
        return [2.0 ** (-8.0 * (h + 1) / n) for h in range(n)]

    below = 2 ** math.floor(math.log2(num_heads))
    slopes = geometric(below)
    if below < num_heads:
        slopes += geometric(2 * below)[0::2][: num_heads - below]
    return torch.tensor(slopes)


class DistanceBias:
    """Any bias of head and distance, handed to `relative_bias=`.

    values: (Hq, Sq + Sk - 1); entry [h, j - i + Sq - 1] is added to head h's score of query i and key j. Its gradient
    is the sum of the scores' gradients along each diagonal.
    """

    def __init__(self, values: Tensor):
        checks.check_float("values", values)
        if values.dim() != 2:
            raise ValueError(f"values must be (Hq, Sq + Sk - 1), got shape {tuple(values.shape)}")
        self.values = values

    @property
    def num_heads(self) -> int:
        return self.values.shape[0]

    def values_for(self, len_q, len_k, *, top_left=False) -> Tensor:
        if self.values.shape[1] != max(len_q + len_k - 1, 0):
            raise ValueError(
                f"relative_bias: values must have Sq + Sk - 1 = {len_q + len_k - 1} columns, got {self.values.shape[1]}"
            )
        return self.values


class T5Bias:
    """T5's relative position bias, handed to `relative_bias=`.

    table: (num_buckets, Hq), as `relative_attention_bias.weight` in Hugging Face's T5. bidirectional: half the buckets
    for keys after the query (an encoder); a decoder gives all of them to keys before it. Distances beyond max_distance
    share the last bucket.

    Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer" (2020).
    """

    def __init__(self, table: Tensor, *, bidirectional=True, max_distance=128):
        checks.check_float("table", table)
        checks.check_number("max_distance", max_distance)
        least = 4 if bidirectional else 2
        if table.dim() != 2 or table.shape[0] < least:
            raise ValueError(f"table must be (num_buckets, Hq) with at least {least} buckets, got {tuple(table.shape)}")
        if max_distance <= table.shape[0] // least:
            raise ValueError(
                f"max_distance must exceed the {table.shape[0] // least} exact buckets, got {max_distance}"
            )
        self.table, self.bidirectional, self.max_distance = table, bidirectional, max_distance

    def buckets(self, distance: Tensor) -> Tensor:
        """The bucket of each key position minus query position."""
        count = self.table.shape[0]
        if self.bidirectional:
            count //= 2
            base, past = torch.where(distance > 0, count, 0), distance.abs()
        else:
            base, past = torch.zeros_like(distance), (-distance).clamp(min=0)
        exact = count // 2
        scaled = torch.log(past.clamp(min=1).float() / exact) / math.log(self.max_distance / exact) * (count - exact)
        return base + torch.where(past < exact, past, (exact + scaled.long()).clamp(max=count - 1))

    @property
    def num_heads(self) -> int:
        return self.table.shape[1]

    def values_for(self, len_q, len_k, *, top_left=False) -> Tensor:
        """The bias as a vector of distances, (Hq, Sq + Sk - 1); see DistanceBias."""
        first = 1 - len_q - (0 if top_left else len_k - len_q)
        distance = torch.arange(first, first + max(len_q + len_k - 1, 0), device=self.table.device)
        return F.embedding(self.buckets(distance), self.table).T  # its gradient sums in one order, indexing's does not
