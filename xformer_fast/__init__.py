"""Fused attention for PyTorch: kernels for GPUs (Triton) and CPUs (SIMD C++), forward and backward, drop-in.

>>> import torch, xformer_fast
>>> q = torch.randn(1, 8, 256, 64)
>>> xformer_fast.attention(q, q, q, causal=True).shape
torch.Size([1, 8, 256, 64])
"""

from . import reference
from .dispatch import BackendUnavailable
from .feature_maps import FavorPlus
from .information import explain, info
from .ops.attention import attention, scaled_dot_product_attention, varlen_attention
from .ops.linear_attention import linear_attention, linear_attention_step
from .positions import DistanceBias, Rope, T5Bias, alibi_slopes

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailable",
    "DistanceBias",
    "FavorPlus",
    "PatchReport",
    "Rope",
    "T5Bias",
    "alibi_slopes",
    "attention",
    "explain",
    "info",
    "linear_attention",
    "linear_attention_step",
    "patch",
    "reference",
    "register_transformers",
    "scaled_dot_product_attention",
    "unpatch",
    "varlen_attention",
]


def __getattr__(name: str):
    if name in ("PatchReport", "patch", "register_transformers", "unpatch"):  # host libraries are imported when used
        from . import integrations

        return getattr(integrations, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
