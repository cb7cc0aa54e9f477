"""The mixers that `layers.Attention` knows by name: modules over the ops, in the layout of a projection's heads.

    mixer(query (B, *space, H, D), key and value (B, *space, Hkv, D), **options) -> (B, *space, H, D)

Each is made of num_heads, head_dim and constants; options come with each call. Both are arguments of the op, and an
option comes before a constant. What an op does not take (a mask beside windows) is its error. Mixers that can generate
have `new_cache` and `decode`, too.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cache import KVCache
from .ops.attention import attention
from .ops.linear_attention import linear_attention
from .ops.neighborhood_attention import neighborhood_attention
from .ops.window_attention import window_attention
from .positions import sinusoids


class SoftmaxMixer(nn.Module):
    """`attention` among all places. Options: mask, causal, window, key_lengths, rope, alibi_slopes, relative_bias, ...

    window: (left, right) of a local layer. attention_dropout: of the weights, in training.
    """

    def __init__(
        self, num_heads: int, head_dim: int, *, scale=None, softcap=None, window=None, attention_dropout=0.0,
        backend=None,
    ):  # fmt: skip
        super().__init__()
        self.constants = {"scale": scale, "softcap": softcap, "window": window, "backend": backend}
        self.attention_dropout = attention_dropout

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **options) -> Tensor:
        dropout_p = self.attention_dropout if self.training else 0.0
        out = attention(*_sequences(query, key, value), dropout_p=dropout_p, **(self.constants | options))
        return out.transpose(1, 2).unflatten(1, query.shape[1:-2])

    def new_cache(self, batch: int, num_kv_heads: int, head_dim: int, capacity: int, like: Tensor) -> KVCache:
        return KVCache(batch, num_kv_heads, head_dim, capacity, dtype=like.dtype, device=like.device)

    def decode(self, query, key, value, cache: KVCache, *, key_lengths=None, causal=True, **options) -> Tensor:
        """Attends from new tokens to the cache and themselves; of row b, the first key_lengths[b] stay in the cache."""
        out = cache.attend(*_sequences(query, key, value), **(self.constants | options))
        for row, length in enumerate(() if key_lengths is None else key_lengths.tolist()):
            cache.truncate(row, cache.length(row) - query.shape[1] + length)
        return out.transpose(1, 2)


class LinearMixer(nn.Module):
    """`linear_attention`, at a cost linear in the places. Options: causal, key_lengths."""

    def __init__(self, num_heads: int, head_dim: int, *, feature_map="elu", normalize=True, scale=1.0, backend=None):
        super().__init__()
        self.constants = {"feature_map": feature_map, "normalize": normalize, "scale": scale, "backend": backend}

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **options) -> Tensor:
        out = linear_attention(*_sequences(query, key, value), **(self.constants | options))
        return out.transpose(1, 2).unflatten(1, query.shape[1:-2])

    def new_cache(self, batch: int, num_kv_heads: int, head_dim: int, capacity: int, like: Tensor) -> "LinearState":
        return LinearState()

    def decode(self, query, key, value, cache: "LinearState", **options) -> Tensor:
        """Goes on from the cache's state; of row b, the first key_lengths[b] tokens enter it."""
        going_on = {"causal": True, "initial_state": cache.state, "return_state": True}
        out, cache.state = linear_attention(*_sequences(query, key, value), **(self.constants | options | going_on))
        return out.transpose(1, 2)


class LinearState:
    """The running sums of a causal linear mixer: what it keeps in place of keys and values."""

    def __init__(self):
        self.state: tuple[Tensor, Tensor] | None = None

    def reorder(self, rows: Tensor):
        if self.state is not None:  # nothing before the first step
            self.state = tuple(x[rows] for x in self.state)


class WindowMixer(nn.Module):
    """`window_attention`: Swin's windows or, with partition="grid", MaxViT's grids. Options: bias.

    The map may have any sides: `Attention` pads it with zeros before the projections. window_size: one side for maps,
    or a tuple with a side an axis. relative_bias: a learned bias of the relative place. cosine: Swin-V2's cosine
    attention with a learned logit scale.
    """

    def __init__(
        self, num_heads: int, head_dim: int, *, window_size, shift=0, partition="window", relative_bias=True,
        cosine=False, scale=None, backend=None,
    ):  # fmt: skip
        super().__init__()
        self.window_size = _per_axis(window_size)
        self.constants = {"shift": shift, "partition": partition, "scale": scale, "backend": backend}
        self.relative_bias_table = _relative_table(self.window_size, num_heads) if relative_bias else None
        self.logit_scale = nn.Parameter(torch.full((num_heads,), math.log(10.0))) if cosine else None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **options) -> Tensor:
        logit_scale = None if self.logit_scale is None else self.logit_scale.clamp(max=math.log(100.0)).exp()
        learned = {"relative_bias_table": self.relative_bias_table, "logit_scale": logit_scale}
        return window_attention(query, key, value, self.window_size, **(self.constants | learned | options))


class NeighborhoodMixer(nn.Module):
    """`neighborhood_attention`: each place attends to the kernel_size nearest along each axis (NATTEN's).

    kernel_size: one number for maps, or a tuple with one an axis. relative_bias: a learned bias of the relative place.
    """

    def __init__(
        self, num_heads: int, head_dim: int, *, kernel_size, dilation=1, causal=False, relative_bias=True, scale=None,
        backend=None,
    ):  # fmt: skip
        super().__init__()
        self.kernel_size = _per_axis(kernel_size)
        self.constants = {"dilation": dilation, "causal": causal, "scale": scale, "backend": backend}
        self.relative_bias_table = _relative_table(self.kernel_size, num_heads) if relative_bias else None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **options) -> Tensor:
        learned = {"relative_bias_table": self.relative_bias_table}
        return neighborhood_attention(query, key, value, self.kernel_size, **(self.constants | learned | options))


class RelativeMixer(nn.Module):
    """`attention` with scores (q_i + u)·k_j + (q_i + v)·W r(i - j), r the sinusoids of the distance; u, v, W learned.

    Dai et al., "Transformer-XL" (2019), section 3.3; the mixer of Conformer and Branchformer. The second term is made
    here and handed to the op as a mask of S×S numbers a head: unlike other positions it depends on the query itself.
    Options: key_lengths.
    """

    def __init__(self, num_heads: int, head_dim: int, *, attention_dropout=0.0, backend=None):
        super().__init__()
        self.place = nn.Linear(num_heads * head_dim, num_heads * head_dim, bias=False)
        self.content_bias = nn.Parameter(torch.zeros(num_heads, head_dim))
        self.place_bias = nn.Parameter(torch.zeros(num_heads, head_dim))
        self.attention_dropout, self.backend = attention_dropout, backend

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *, key_lengths: Tensor | None = None) -> Tensor:
        length, head_dim = query.shape[1], query.shape[-1]
        distances = torch.arange(length - 1, -length, -1, device=query.device)
        places = self.place(sinusoids(distances, self.place.in_features).to(query.dtype)).unflatten(-1, (-1, head_dim))
        by_distance = (query + self.place_bias).transpose(1, 2) @ places.permute(1, 2, 0)  # (B, H, S, 2S - 1)
        # Column c is the distance S - 1 - c. Rows one longer, cut anew at rows one shorter: row i is shifted by i.
        shifted = F.pad(by_distance, (1, 0)).flatten(-2)[..., length:].unflatten(-1, (length, -1))[..., :length]
        out = attention(
            *_sequences(query + self.content_bias, key, value), mask=shifted * head_dim**-0.5, key_lengths=key_lengths,
            dropout_p=self.attention_dropout if self.training else 0.0, backend=self.backend,
        )  # fmt: skip
        return out.transpose(1, 2)


MIXERS = {
    "softmax": SoftmaxMixer,
    "linear": LinearMixer,
    "window": WindowMixer,
    "neighborhood": NeighborhoodMixer,
    "relative": RelativeMixer,
}


def _sequences(*tensors: Tensor) -> list[Tensor]:
    """(B, *space, H, D) -> (B, H, S, D), the layout of the sequence ops, without a copy."""
    return [x.flatten(1, -3).transpose(1, 2) for x in tensors]


def pad_to_multiple(x: Tensor, multiple: tuple[int, ...]) -> Tensor:
    """Zeros behind each axis of a map (B, *space, C), up to a multiple."""
    missing = [-side % m for side, m in zip(x.shape[1:-1], multiple, strict=True)]
    if not any(missing):
        return x
    return F.pad(x, (0, 0, *(n for miss in reversed(missing) for n in (0, miss))))


def _per_axis(size: int | tuple[int, ...]) -> tuple[int, ...]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _relative_table(sizes: tuple[int, ...], num_heads: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(math.prod(2 * size - 1 for size in sizes), num_heads) * 0.02)
