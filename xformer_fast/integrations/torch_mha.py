"""torch.nn.MultiheadAttention, and through it nn.Transformer, its layers, and whatever else is built from it.

A module whose class has MultiheadAttention's own forward is swapped for one that projects in the layout it is given,
without copies, and calls `xformer_fast.attention`:

* attn_mask and key_padding_mask: a bool one is inverted (there True hides), a float one is added. key_padding_mask
  stays (B, 1, 1, Sk); only beside a dense attn_mask does it become part of a dense mask.
* is_causal says that attn_mask is the causal mask, and is believed: the kernel then never reads attn_mask. torch, too,
  believes it where there is no key_padding_mask.
* kdim, vdim, bias=False, add_bias_kv, add_zero_attn, batch_first, unbatched inputs and dropout are as in torch.

Left to the module's own forward, call by call: need_weights=True (torch's default: weights are never formed here),
nested tensors, and is_causal without attn_mask, which torch refuses.

In eval, without gradients, a TransformerEncoderLayer runs one fused operator that never calls its self_attn, and a
TransformerEncoder turns padded batches into nested tensors. Both are swapped for classes that answer those checks with
no, where they hold an attention that is patched.

Different from torch, by intent: a query that may attend to nothing gives a zero vector (through out_proj), not NaN; and
padded positions of an encoder's output hold what the layers compute there, as in training, where torch's nested tensors
leave zeros.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.attention import attention
from . import PatchReport
from .common import hide, no_kernel, original, restore, swap, swapped


def _recipe(cls: type, backend: str | None) -> dict:
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if need_weights or query.is_nested or (is_causal and attn_mask is None):
            return cls.forward(
                self, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        return _forward(self, query, key, value, key_padding_mask, attn_mask, is_causal, backend), None

    return {"forward": forward}


def _forward(module, query, key, value, key_padding_mask, attn_mask, is_causal, backend) -> Tensor:
    if query.dim() == 2:
        row = query[None]
        row_key = row if key is query else key[None]
        row_value = row_key if value is key else value[None]
        key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        return _batched(module, row, row_key, row_value, key_padding_mask, attn_mask, is_causal, backend, True)[0]
    return _batched(module, query, key, value, key_padding_mask, attn_mask, is_causal, backend, module.batch_first)


def _batched(module, query, key, value, key_padding_mask, attn_mask, is_causal, backend, batch_first) -> Tensor:
    along = 1 if batch_first else 0  # the dimension of positions
    q, k, v = _project(module, query, key, value)
    extra = 0  # keys behind the input's, which no mask hides
    if module.bias_k is not None:
        k, v = (
            torch.cat((x, bias.to(x.dtype).expand_as(x.narrow(along, 0, 1))), along)
            for x, bias in ((k, module.bias_k), (v, module.bias_v))
        )
        extra += 1
    if module.add_zero_attn:
        k, v = (torch.cat((x, torch.zeros_like(x.narrow(along, 0, 1))), along) for x in (k, v))
        extra += 1
    q, k, v = (x.unflatten(-1, (module.num_heads, module.head_dim)) for x in (q, k, v))
    q, k, v = (x.transpose(1, 2) if batch_first else x.permute(1, 2, 0, 3) for x in (q, k, v))

    causal = is_causal and not (extra and key_padding_mask is not None)
    mask = None if causal else _attending(attn_mask, extra)
    if mask is not None and mask.dim() == 3:
        mask = mask.unflatten(0, (-1, module.num_heads))
    if key_padding_mask is not None:
        padding = _attending(key_padding_mask, extra)[:, None, None, :]
        mask = padding if mask is None else hide(mask, padding)
    dropout_p = module.dropout if module.training else 0.0
    causal = "top_left" if causal else False
    out = attention(q, k, v, mask=mask, causal=causal, dropout_p=dropout_p, backend=backend)
    out = out.transpose(1, 2) if batch_first else out.permute(2, 0, 1, 3)
    return F.linear(out.flatten(2), module.out_proj.weight, module.out_proj.bias)


def _project(module, query, key, value) -> list[Tensor]:
    """One product for inputs that are the same tensor."""
    if module.in_proj_weight is None:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        biases = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
        return [F.linear(*args) for args in zip((query, key, value), weights, biases, strict=True)]
    sizes = [1, 1, 1]
    inputs = [query, key, value]
    if key is value:
        sizes, inputs = ([3], [query]) if query is key else ([1, 2], [query, key])
    width, begin, projected = module.embed_dim, 0, []
    for x, count in zip(inputs, sizes, strict=True):
        rows = slice(begin * width, (begin + count) * width)
        bias = None if module.in_proj_bias is None else module.in_proj_bias[rows]
        projected += F.linear(x, module.in_proj_weight[rows], bias).chunk(count, -1)
        begin += count
    return projected


def _attending(mask: Tensor | None, extra: int) -> Tensor | None:
    """torch's mask as ours: bool inverted, `extra` visible keys behind."""
    if mask is None:
        return None
    is_bool = mask.dtype == torch.bool
    mask = ~mask if is_bool else mask
    return F.pad(mask, (0, extra), value=is_bool) if extra else mask


def _layer_recipe(cls: type, backend: str | None) -> dict:
    """A TransformerEncoderLayer; the attribute serves its fast path's check alone."""
    return {"activation_relu_or_gelu": property(lambda self: 0)}


def _encoder_recipe(cls: type, backend: str | None) -> dict:
    return {"use_nested_tensor": property(lambda self: False)}


_RECIPES = (_recipe, _layer_recipe, _encoder_recipe)


def patch_model(model: nn.Module, backend: str | None, report: PatchReport):
    patched = set()
    for name, module in model.named_modules():
        if not isinstance(module, nn.MultiheadAttention):
            continue
        if original(module).forward is not nn.MultiheadAttention.forward:
            report.skipped[name] = f"{type(module).__name__} has a forward of its own"
        elif reason := no_kernel(module.out_proj.weight, backend):
            report.skipped[name] = reason
        else:
            swap(module, _recipe, backend)
            patched.add(module)
            report.replaced.append(name)
    for module in model.modules():
        for kind, recipe in ((nn.TransformerEncoderLayer, _layer_recipe), (nn.TransformerEncoder, _encoder_recipe)):
            if isinstance(module, kind) and not patched.isdisjoint(module.modules()):
                swap(module, recipe, None)


def unpatch_model(model: nn.Module):
    for module in model.modules():
        if any(swapped(module, recipe) for recipe in _RECIPES):
            restore(module)
