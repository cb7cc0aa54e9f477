"""Fused attention for PyTorch: kernels for GPUs (Triton) and CPUs (SIMD C++), forward and backward, drop-in.

>>> import torch, xformer_fast
>>> q = torch.randn(1, 8, 256, 64)
>>> xformer_fast.attention(q, q, q, causal=True).shape
torch.Size([1, 8, 256, 64])
"""

from . import reference
from .cache import KVCache
from .dispatch import BackendUnavailable
from .feature_maps import FavorPlus
from .information import explain, info
from .ops.attention import attention, scaled_dot_product_attention, varlen_attention
from .ops.decode_attention import decode_attention
from .ops.linear_attention import linear_attention, linear_attention_step
from .ops.neighborhood_attention import neighborhood_attention
from .ops.rope import apply_rope
from .ops.window_attention import window_attention
from .positions import DistanceBias, T5Bias, alibi_slopes
from .rope import Rope, rope_frequencies, rope_tables

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailable",
    "DistanceBias",
    "FavorPlus",
    "KVCache",
    "PatchReport",
    "Rope",
    "T5Bias",
    "alibi_slopes",
    "apply_rope",
    "attention",
    "decode_attention",
    "explain",
    "info",
    "linear_attention",
    "linear_attention_step",
    "neighborhood_attention",
    "patch",
    "patched",
    "reference",
    "register_transformers",
    "rope_frequencies",
    "rope_tables",
    "scaled_dot_product_attention",
    "unpatch",
    "varlen_attention",
    "window_attention",
]


def __getattr__(name: str):
    if name in (
        "PatchReport",
        "patch",
        "patched",
        "register_transformers",
        "unpatch",
    ):  # host libraries are imported when used
        from . import integrations

        return getattr(integrations, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
