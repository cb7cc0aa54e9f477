"""Longformer's attention, and LED's: a window along the sequence and tokens that see everything and are seen by all.

A module is recognised by the two methods that multiply bands, `_sliding_chunks_query_key_matmul` and
`_sliding_chunks_matmul_attn_probs_value`. Its window and its global keys become one call of `attention` in place of
chunks and diagonals; the rows of the global tokens, which have projections of their own, a second one.
"""

import torch
from torch import Tensor, nn

from ..ops.attention import attention
from . import PatchReport
from .common import no_kernel, original, restore, swap, swapped

_BANDS = ("_sliding_chunks_query_key_matmul", "_sliding_chunks_matmul_attn_probs_value")


def _recipe(cls: type, backend: str | None) -> dict:
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        is_index_masked: Tensor | None = None,
        is_index_global_attn: Tensor | None = None,
        is_global_attn: bool | None = None,
        output_attentions: bool = False,
    ):
        if output_attentions:
            return cls.forward(
                self, hidden_states, attention_mask, is_index_masked, is_index_global_attn, is_global_attn, True
            )
        seen = None if is_index_masked is None else ~is_index_masked
        chosen = _indices(is_index_global_attn) if is_global_attn else None
        out = _attend(
            self, hidden_states, "", seen, backend, window=(self.one_sided_attn_window_size,) * 2, global_keys=chosen
        )
        if seen is not None:
            out = out.masked_fill(~seen[..., None], 0)
        if chosen is not None:
            row, place = (chosen >= 0).nonzero(as_tuple=True)
            rows = hidden_states[torch.arange(len(hidden_states), device=chosen.device)[:, None], chosen.clamp(min=0)]
            out = out.index_put(
                (row, chosen[row, place]), _attend(self, rows, "_global", seen, backend, hidden_states)[row, place]
            )
        return (out,)

    return {"forward": forward}


def _attend(
    module, rows: Tensor, kind: str, seen: Tensor | None, backend, keys: Tensor | None = None, **options
) -> Tensor:
    """Attention of rows (B, n, C) to keys, or to themselves, by the projections of that kind; seen (B, Sk)."""
    keys = rows if keys is None else keys
    query, key, value = (
        getattr(module, name + kind)(x).unflatten(-1, (module.num_heads, module.head_dim)).transpose(1, 2)
        for name, x in (("query", rows), ("key", keys), ("value", keys))
    )
    options["mask"] = None if seen is None else seen[:, None, None, :]
    dropout_p = module.dropout if module.training else 0.0
    return attention(query, key, value, dropout_p=dropout_p, backend=backend, **options).transpose(1, 2).flatten(2)


def _indices(chosen: Tensor) -> Tensor:
    """(B, S) bool -> (B, G), where it is True, in order; -1 behind the last of a row."""
    count = chosen.sum(1)
    order = chosen.int().argsort(dim=1, descending=True, stable=True)[:, : int(count.max())]
    return order.where(torch.arange(order.shape[1], device=order.device) < count[:, None], -1)


def is_banded(cls: type) -> bool:
    return all(hasattr(cls, name) for name in _BANDS)


def patch_model(model: nn.Module, backend: str | None, report: PatchReport):
    for name, module in model.named_modules():
        if not is_banded(original(module)):
            continue
        if reason := no_kernel(next(module.parameters(), None), backend):
            report.skipped[name] = reason
        else:
            swap(module, _recipe, backend)
            report.replaced.append(name)


def unpatch_model(model: nn.Module):
    for module in model.modules():
        if swapped(module, _recipe):
            restore(module)
