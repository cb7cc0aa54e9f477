"""Feature maps of linear attention: the named ones, Performer's random features, and pairs of callables.

Linear attention replaces exp(q·k) by φ(q)·φ(k). Kernels fuse the names of FUSED; "taylor", a `FavorPlus` object and
callables are applied here, in torch, and the identity-map kernel runs on their results.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

FUSED = ("identity", "elu", "relu", "square_relu", "exp", "softmax")  # in the order of the kernels' numbers
MOST_TAYLOR_DIM = 32


def taylor(x: Tensor) -> Tensor:
    """φ(q)·φ(k) = 1 + q·k + (q·k)²/2, to second order: 1 + D + D² features (Arora et al., "Based", 2024)."""
    products = (x[..., :, None] * x[..., None, :]).flatten(-2) * math.sqrt(0.5)
    return torch.cat((torch.ones_like(x[..., :1]), x, products), -1)


_NAMED: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "elu": lambda x: F.elu(x) + 1,  # Katharopoulos et al., "Transformers are RNNs" (2020)
    "relu": torch.relu,
    "square_relu": lambda x: torch.relu(x).square(),
    "exp": torch.exp,
    "softmax": lambda x: torch.softmax(x, -1),
    "taylor": taylor,
}


class FavorPlus:
    """Performer's positive orthogonal random features: φ(q)·φ(k) estimates exp(q·k / sqrt(D)) without bias.

    φ(x) = exp(Ω x' - |x'|²/2) / sqrt(m), x' = x / D^(1/4), Ω (m, D) of Gaussian rows, orthogonal in blocks of D
    (Choromanski et al., "Rethinking Attention with Performers", 2021). No stabiliser is subtracted: it would depend on
    other positions. The softmax scale is inside.

    Args:
        head_dim: D of query and key. num_features: m, at most what kernels take as a head dim.
        seed: of the projection's own generator; the same seed draws the same projection on every device.

    >>> import torch, xformer_fast
    >>> x = torch.randn(1, 2, 32, 16)
    >>> features = xformer_fast.FavorPlus(16, 64, seed=1)
    >>> xformer_fast.linear_attention(x, x, x, feature_map=features).shape
    torch.Size([1, 2, 32, 16])
    """

    def __init__(self, head_dim: int, num_features: int, *, seed: int = 0, device=None, dtype=torch.float32):
        if head_dim < 1 or num_features < 1:
            raise ValueError(f"head_dim and num_features must be at least 1, got {head_dim} and {num_features}")
        self.head_dim, self.num_features = head_dim, num_features
        self.projection = torch.empty(num_features, head_dim, dtype=dtype, device=device)
        self._seed = seed
        self.redraw(seed)

    def redraw(self, seed: int | None = None) -> "FavorPlus":
        """Draws another projection in place: of `seed`, or of the seed after the last one."""
        self._seed = self._seed + 1 if seed is None else seed
        generator = torch.Generator().manual_seed(self._seed)
        dim, rows = self.head_dim, self.num_features
        blocks = [
            torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64)).Q.T
            for _ in range(-(-rows // dim))
        ]
        norms = torch.randn(rows, dim, generator=generator, dtype=torch.float64).norm(dim=1, keepdim=True)
        self.projection.copy_(torch.cat(blocks)[:rows] * norms)
        return self

    def __call__(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        x_ = x.to(wide) * self.head_dim**-0.25
        exponent = x_ @ self.projection.to(wide).T - x_.square().sum(-1, keepdim=True) / 2
        return (exponent.exp() * self.num_features**-0.5).to(x.dtype)


FeatureMap = (
    str | FavorPlus | Callable[[Tensor], Tensor] | tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
)


def check(feature_map, head_dim):
    if isinstance(feature_map, str):
        if feature_map not in _NAMED:
            raise ValueError(f"feature_map must be one of {', '.join(_NAMED)}, or a callable, got {feature_map!r}")
        if feature_map == "taylor" and head_dim > MOST_TAYLOR_DIM:
            raise ValueError(f'feature_map "taylor" takes a head_dim of at most {MOST_TAYLOR_DIM}, got {head_dim}')
    elif isinstance(feature_map, FavorPlus):
        if feature_map.head_dim != head_dim:
            raise ValueError(f"feature_map was made for head_dim {feature_map.head_dim}, query has {head_dim}")
    elif isinstance(feature_map, tuple):
        if len(feature_map) != 2 or not all(callable(part) for part in feature_map):
            raise TypeError(f"feature_map must be a pair of callables (of query, of key), got {feature_map!r}")
    elif not callable(feature_map):
        raise TypeError(f"feature_map must be a name, a FavorPlus or a callable, got {type(feature_map).__name__}")


def apply(feature_map: FeatureMap, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """(φ(query), φ(key))."""
    of_query, of_key = feature_map if isinstance(feature_map, tuple) else (feature_map, feature_map)
    of_query, of_key = (_NAMED[part] if isinstance(part, str) else part for part in (of_query, of_key))
    return of_query(query), of_key(key)
