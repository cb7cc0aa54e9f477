"""The plain formula in a case's own dtype, as one would write it in torch: the yardstick for errors and the first peer.

`structure(...)` turns everything a dense mask can say (causal, window, global keys, lengths, ALiBi) into one additive
tensor of the smallest broadcastable shape, for the peers that know nothing else.
"""

from __future__ import annotations

from typing import Any

import torch


def positions(query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of queries (seqlen_q, 1) and keys (seqlen_k): the last query meets the last key."""
    seqlen_q, seqlen_k = query.shape[-2], key.shape[-2]
    i = torch.arange(seqlen_q, device=query.device) + (seqlen_k - seqlen_q)
    return i[:, None], torch.arange(seqlen_k, device=query.device)


def keep_mask(query, key, *, causal=False, window=None, global_keys=0, key_lengths=None) -> torch.Tensor | None:
    """Boolean, broadcastable to (batch, heads, seqlen_q, seqlen_k); None when every pair is kept."""
    i, j = positions(query, key)
    left, right = window or (-1, -1)
    seen = j < global_keys
    kept = []
    if causal and query.shape[-2] > 1:
        kept.append(j <= i)
    if left >= 0:
        kept.append(seen | (j >= i - left))
    if right >= 0:
        kept.append(seen | (j <= i + right))
    keep = None
    for mask in kept:
        keep = mask if keep is None else keep & mask
    if key_lengths is not None:
        padding = (j < key_lengths[:, None])[:, None, None, :]
        keep = padding if keep is None else keep & padding
    return keep


def structure(query, key, *, alibi_slopes=None, **options) -> torch.Tensor | None:
    """The constant additive mask of these options in the query's dtype, or None."""
    keep = keep_mask(query, key, **options)
    bias = None
    if alibi_slopes is not None:
        i, j = positions(query, key)
        slopes = alibi_slopes if alibi_slopes.dim() == 2 else alibi_slopes[None]
        bias = (-slopes[:, :, None, None] * (i - j).abs()).to(query.dtype)
    if keep is None:
        return bias
    if bias is None:
        bias = torch.zeros(keep.shape, dtype=query.dtype, device=query.device)
    return bias.masked_fill(~keep, float("-inf"))


def split_options(inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, dict]:
    """query, key, value, mask, and the options that `structure` understands."""
    options = {name: x for name, x in inputs.items() if name not in ("query", "key", "value", "mask")}
    return inputs["query"], inputs["key"], inputs["value"], inputs.get("mask"), options


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b; float16 on a CPU goes through float32, since torch's float16 product there is some 500 times slower."""
    if a.dtype is torch.float16 and a.device.type == "cpu":
        return (a.float() @ b.float()).half()
    return a @ b


def naive_formula(query, key, value, mask, bias) -> torch.Tensor:
    """softmax(q k^T / sqrt(D) + mask + bias) v, every intermediate in memory, KV heads repeated."""
    group = query.shape[1] // key.shape[1]
    if group > 1:
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = matmul(query, key.transpose(-1, -2)) * query.shape[-1] ** -0.5
    if mask is not None:
        scores = scores + mask
    if bias is not None:
        scores = scores + bias
    return matmul(torch.softmax(scores, -1), value)


def naive_attention(inputs: dict[str, Any]) -> torch.Tensor:
    query, key, value, mask, options = split_options(inputs)
    return naive_formula(query, key, value, mask, structure(query, key, **options))
