"""Softmax attention: `attention`, `scaled_dot_product_attention`, `varlen_attention`, and their table of backends."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import dispatch, reference
from ..dispatch import (
    Backend,
    Table,
    build_problem,
    cuda_problem,
    cuda_unproven,
    cuda_unsupported,
    kernel_limits,
    triton_problem,
    triton_unproven,
    triton_unsupported,
)
from ..positions import DistanceBias, Rope, T5Bias
from . import attention_operator as operator
from . import checks


@dataclass(slots=True)
class Call:
    """A checked call: what the user gave, in one value."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    causal: bool | str
    window: tuple[int, int] | None
    key_lengths: Tensor | None
    rope: Rope | None
    alibi_slopes: Tensor | None
    relative_bias: T5Bias | DistanceBias | None
    sinks: Tensor | None
    scale: float | None
    softcap: float | None
    dropout_p: float
    return_lse: bool
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0
    global_keys: int | Tensor | None = None
    decomposed_bias: tuple[Tensor, Tensor] | None = None
    plain: bool = False  # query, key, value, scale and causal say all
    by_default: bool = False  # no backend was named


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool | str = False,
    window: tuple[int, int] | None = None,
    global_keys: int | Tensor | None = None,
    key_lengths: Tensor | None = None,
    rope: Rope | None = None,
    alibi_slopes: Tensor | None = None,
    relative_bias: T5Bias | DistanceBias | None = None,
    decomposed_bias: tuple[Tensor, Tensor] | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str | None = None,
):
    """softmax(Q K^T · scale + biases, masked) · V in linear memory, forward and backward.

    Vaswani et al., "Attention Is All You Need" (2017); tiled as in Dao et al., "FlashAttention" (2022).

    Args:
        query: (B, Hq, Sq, D) float32, bfloat16, float16 (or float64: reference formula). Any strides; rows with a unit
            last stride are read in place, so a (B, S, H, D) tensor is passed as `x.transpose(1, 2)` at no cost.
        key, value: (B, Hkv, Sk, D) and (B, Hkv, Sk, Dv) of the same dtype; Hkv divides Hq, and query head h reads
            KV head h // (Hq / Hkv).
        mask: bool (True attends) or float (added; may require grad), broadcastable to (B, Hq, Sq, Sk).
        causal: True keeps keys j <= p_i with p_i = i + Sk - Sq (the last query meets the last key); "top_left" uses
            p_i = i, torch's rule, here and wherever p_i is named below.
        window: (left, right) keeps p_i - left <= j <= p_i + right; -1 is no limit.
        global_keys: keys that every query sees beside its window: a count n (the first n keys), or int32 or int64
            indices, (G,) or (B, G). -1 in a row is no key, for rows of fewer than G. A key that is named twice, or is
            inside the window too, counts once. Causal limit, key_lengths and masks still bind. Time and memory grow by
            that of G keys. Global tokens whose queries see every key (Beltagy et al., "Longformer", 2020) take a second
            call without a window: models project them apart.
        key_lengths: (B,) int32 or int64; keys at or past it are padding and never reach a result. Never moves p_i.
        rope: rotates query (at p_i) and key (at j) inside the op.
        alibi_slopes: (Hq,) or (B, Hq); adds -slope · |p_i - j|. May require grad.
        relative_bias: T5Bias or DistanceBias, a bias of head and distance j - p_i, with gradient.
        decomposed_bias: (rel_h, rel_w), (B, Hq, Sq, H) and (B, Hq, Sq, W), where the keys are a map of H x W, row by
            row: adds rel_h[..., j // W] + rel_w[..., j % W]. May require grad. The decomposed relative positions of Li
            et al., "MViTv2" (2022), also SAM's.
        sinks: (Hq,); one more logit a head in the softmax denominator. May require grad.
        scale: multiplies Q K^T; default 1/sqrt(D).
        softcap: s becomes softcap · tanh(s / softcap), before biases.
        dropout_p: drops attention weights and scales the rest by 1/(1 - p). Which ones depends on the seed, drawn by
            torch.randint, and on the element's index alone, so that every backend drops the same.
        return_lse: also return the log of the softmax denominator, (B, Hq, Sq) float32 (float64 for float64),
            differentiable.
        backend: "cpu", "triton", "cuda" or "reference"; None takes the first that supports the call
            (`xformer_fast.explain`).

    Returns:
        (B, Hq, Sq, Dv) in the query's dtype and memory order; with return_lse a pair. A query with no key left gives
        zeros and an lse of -inf (or its sink).

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value; the message names it.
        BackendUnavailable: the backend asked for cannot run this call.

    >>> import torch, xformer_fast
    >>> q, k, v = torch.randn(3, 2, 8, 128, 64).unbind()
    >>> xformer_fast.attention(q, k, v, causal=True, window=(63, 0), global_keys=4).shape
    torch.Size([2, 8, 128, 64])
    """
    plain = (
        mask is window is global_keys is key_lengths is rope is alibi_slopes is relative_bias is decomposed_bias
        is sinks is softcap is None and type(dropout_p) in (float, int) and dropout_p == 0
    )  # fmt: skip
    if plain and backend is None and (result := _run_as_before(query, key, value, causal, scale)) is not None:
        return (result[0], result[1][0]) if return_lse else result[0]
    call = _dense_call(
        query, key, value, mask, causal, window, global_keys, key_lengths, rope, alibi_slopes, relative_bias,
        decomposed_bias, sinks, scale, softcap, dropout_p, return_lse,
    )  # fmt: skip
    call.plain, call.by_default = plain, backend is None and not dispatch.DEFAULT
    return TABLE.run(call, backend)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    backend: str | None = None,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` on the kernels of `attention`: same signature, same rules.

    query (..., Hq, Sq, D), key and value (..., Hkv, Sk, D or Dv) of two to five dimensions, batch and heads broadcast
    as torch broadcasts them; is_causal is top-left and may be given beside attn_mask (both apply); a float32 mask may
    stand beside half inputs; a query that attends to nothing gives zeros, as does dropout_p = 1. `enable_gqa` lets Hkv
    divide Hq, for key and value apart; axis -3 is the heads' then, of three dimensions too. `backend` is `attention`'s.

    >>> import torch, xformer_fast
    >>> q = torch.randn(2, 8, 16, 64)
    >>> xformer_fast.scaled_dot_product_attention(q, q, q, is_causal=True).shape
    torch.Size([2, 8, 16, 64])
    """
    checks.check_tensors(query=query, key=key, value=value)
    q, k, v, dims, lead = query, key, value, 4, query.shape[:-2]
    if len(lead) != 2 or not lead == key.shape[:-2] == value.shape[:-2]:
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            if not 2 <= tensor.dim() <= 5:
                raise ValueError(f"{name} must have two to five dimensions, got shape {tuple(tensor.shape)}")
        dims = max(query.dim(), key.dim(), value.dim())
        q, k, v, lead = _broadcast_heads(query, key, value, dims, enable_gqa)
    mask = attn_mask
    if mask is not None:
        checks.check_tensors(attn_mask=mask)
        if mask.dim() > dims:
            raise ValueError(f"attn_mask of shape {tuple(mask.shape)} has more dimensions than the inputs' {dims}")
        if dims == 3 and mask.dim() == 3 and not enable_gqa:
            mask = mask[:, None]
        elif dims == 5 and mask.dim() >= 4:
            mask = mask.expand(*lead[:2] if mask.dim() == 5 else lead[1:2], *mask.shape[-3:])
            mask = (mask if mask.dim() == 5 else mask.expand(lead[0], *mask.shape)).flatten(0, 1)
    causal = "top_left" if is_causal else False
    all_dropped = dropout_p == 1
    dropout_p = 0.0 if all_dropped else dropout_p
    out = attention(q, k, v, mask=mask, causal=causal, dropout_p=dropout_p, scale=scale, backend=backend)
    if all_dropped:
        out = torch.dropout(out, 1.0, True)
    return out if out.shape[:-2] == lead else out.reshape(*lead, *out.shape[-2:])


def _broadcast_heads(query, key, value, dims: int, enable_gqa: bool):
    """Brings two- to five-dimensional inputs to (B, H, S, D); also returns the leading shape of the result."""
    tensors = [t.reshape((1,) * (dims - t.dim()) + t.shape) for t in (query, key, value)]
    if dims == 2:
        return *(t[None, None] for t in tensors), ()
    if dims == 3 and not enable_gqa:
        batch = _broadcast("batch", *(t.shape[:1] for t in tensors))
        return *(t.expand(*batch, -1, -1)[:, None] for t in tensors), batch
    heads = tensors[0].shape[-3]
    batch = _broadcast("batch", *(t.shape[:-3] for t in tensors))
    if enable_gqa:
        counts = [t.shape[-3] for t in tensors[1:]]
        if 0 in counts or any(heads % count for count in counts):
            raise ValueError(f"enable_gqa: key and value heads {counts} must divide {heads}")
        common = max(counts)
        common = heads if any(common % count for count in counts) else common
        tensors[1:] = [
            t if count == common else t.repeat_interleave(common // count, -3)
            for t, count in zip(tensors[1:], counts, strict=True)
        ]
    else:
        (heads,) = _broadcast(
            "heads (enable_gqa lets fewer key heads serve the query's)", *(t.shape[-3:-2] for t in tensors)
        )
        tensors[0] = tensors[0].expand(*(-1,) * (dims - 3), heads, -1, -1)
        if tensors[1].shape[-3] != tensors[2].shape[-3]:
            tensors[1:] = [t.expand(*(-1,) * (dims - 3), heads, -1, -1) for t in tensors[1:]]
    tensors = [t.expand(*batch, -1, -1, -1) for t in tensors]
    if dims != 4:
        tensors = [t.flatten(0, 1) if dims == 5 else t[None] for t in tensors]
    return *tensors, (*batch, heads)


def _broadcast(what: str, *shapes) -> tuple[int, ...]:
    try:
        return torch.broadcast_shapes(*shapes)
    except RuntimeError:
        q, k, v = (tuple(shape) for shape in shapes)
        raise ValueError(f"query, key and value must broadcast in {what}, got {q}, {k} and {v}") from None


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool | str = False,
    window: tuple[int, int] | None = None,
    key_lengths: Tensor | None = None,
    rope: Rope | None = None,
    alibi_slopes: Tensor | None = None,
    relative_bias: T5Bias | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str | None = None,
):
    """`attention` of packed sequences, each with itself alone and with positions of its own.

    Args:
        query: (Tq, Hq, D), the sequences one behind the other. key, value: (Tk, Hkv, D) and (Tk, Hkv, Dv).
        cu_seqlens_q, cu_seqlens_k: (B + 1,) int32 offsets of the sequences, from 0 to Tq and to Tk, never decreasing.
        max_seqlen_q, max_seqlen_k: at least the longest sequence's length.
        relative_bias: T5Bias only (a DistanceBias has one length).
        The rest as in `attention`; p_i = i + len_k - len_q inside each sequence.

    Returns:
        (Tq, Hq, Dv); with return_lse also (Hq, Tq).

    >>> import torch, xformer_fast
    >>> x, cu = torch.randn(30, 4, 32), torch.tensor([0, 10, 30], dtype=torch.int32)
    >>> xformer_fast.varlen_attention(x, x, x, cu, cu, 20, 20, causal=True).shape
    torch.Size([30, 4, 32])
    """
    call = _packed_call(
        query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, window, key_lengths, rope,
        alibi_slopes, relative_bias, sinks, scale, softcap, dropout_p, return_lse,
    )  # fmt: skip
    return TABLE.run(call, backend)


def explain(function: Callable, *args, **options) -> dict[str, str]:
    """Backend -> why it would not be chosen for `attention(...)` or `varlen_attention(...)`; "" if nothing bars it."""
    bound = inspect.signature(function).bind(*args, **options)
    bound.apply_defaults()
    backend = bound.arguments.pop("backend")
    build = _dense_call if function is attention else _packed_call
    return TABLE.reasons(build(*bound.arguments.values()), backend)


def _dense_call(
    query, key, value, mask, causal, window, global_keys, key_lengths, rope, alibi_slopes, relative_bias,
    decomposed_bias, *rest,
) -> Call:  # fmt: skip
    checks.check_qkv(query, key, value, "(B, H, S, D)")
    batch, heads, len_q, _ = query.shape
    len_k = key.shape[2]
    if mask is not None:
        checks.check_mask(mask, batch, heads, len_q, len_k, query.device)
    call = Call(query, key, value, mask, causal, window, key_lengths, rope, alibi_slopes, relative_bias, *rest)
    call.max_seqlen_q, call.max_seqlen_k = len_q, len_k
    if global_keys is not None:
        checks.check_global_keys(global_keys, batch, query.device)
        call.global_keys = global_keys
    if decomposed_bias is not None:
        checks.check_decomposed_bias(decomposed_bias, batch, heads, len_q, len_k, query.device)
        call.decomposed_bias = tuple(decomposed_bias)
    _check_options(call, batch, heads)
    return call


def _packed_call(
    query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, window, *options
) -> Call:
    checks.check_qkv(query, key, value, "(T, H, D)")
    checks.check_tensors(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    for name, offsets in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if offsets.dtype != torch.int32:
            raise TypeError(f"{name} must be int32, got {offsets.dtype}")
        if offsets.dim() != 1 or offsets.shape[0] < 1 or offsets.shape != cu_seqlens_q.shape:
            raise ValueError(f"{name} must have shape (B + 1,), like cu_seqlens_q, got {tuple(offsets.shape)}")
        checks.check_device(name, offsets, query.device)
    for name, length in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if isinstance(length, bool) or not isinstance(length, (int, torch.SymInt)) or length < 0:
            raise ValueError(f"{name} must be an int >= 0, got {length!r}")
    call = Call(query, key, value, None, causal, window, *options)
    call.cu_seqlens_q, call.cu_seqlens_k = cu_seqlens_q, cu_seqlens_k
    call.max_seqlen_q, call.max_seqlen_k = max_seqlen_q, max_seqlen_k
    if isinstance(call.relative_bias, DistanceBias):
        raise TypeError("relative_bias must be a T5Bias for packed sequences: a DistanceBias fits one length only")
    _check_options(call, cu_seqlens_q.shape[0] - 1, query.shape[1])
    return call


def _check_options(call: Call, batch, heads):
    device = call.query.device
    checks.check_causal(call.causal)
    call.window = checks.check_window(call.window)
    checks.check_numbers(call.scale, call.softcap, call.dropout_p)
    if call.key_lengths is not None:
        checks.check_lengths("key_lengths", call.key_lengths, batch, device)
    if call.alibi_slopes is not None:
        checks.check_slopes(call.alibi_slopes, batch, heads, device)
    if call.sinks is not None:
        checks.check_sinks(call.sinks, heads, device)
    if call.rope is not None:
        if not hasattr(call.rope, "rotate"):
            raise TypeError(f"rope must be an xformer_fast.Rope, got {type(call.rope).__name__}")
        call.rope.check(call.query.shape[-1])
    if call.relative_bias is not None:
        checks.check_relative_bias(call.relative_bias, heads, device)


def run_reference(call: Call):
    check_values(call)
    shared = ("causal", "window", "key_lengths", "alibi_slopes", "relative_bias", "sinks", "scale", "softcap")
    options = {name: getattr(call, name) for name in (*shared, "dropout_p", "return_lse")}
    if call.cu_seqlens_q is None:
        options |= {name: getattr(call, name) for name in ("mask", "rope", "global_keys", "decomposed_bias")}
        return reference.attention(call.query, call.key, call.value, **options)
    query, key = call.query, call.key
    if call.rope is not None:
        query, key = _rotate_packed(call, "reference")
    return reference.varlen_attention(query, key, call.value, call.cu_seqlens_q, call.cu_seqlens_k, **options)


def check_values(call: Call):
    """What the CPU kernels check themselves: values of lengths and offsets."""
    limits = [call.key.shape[2]] * call.key.shape[0] if call.cu_seqlens_q is None else None
    if limits is None and checks.values_are_readable(call.cu_seqlens_k):
        checks.check_offset_values("cu_seqlens_q", call.cu_seqlens_q, call.query.shape[0], call.max_seqlen_q)
        limits = checks.check_offset_values("cu_seqlens_k", call.cu_seqlens_k, call.key.shape[0], call.max_seqlen_k)
    if limits is not None and call.key_lengths is not None and checks.values_are_readable(call.key_lengths):
        checks.check_length_values("key_lengths", call.key_lengths, limits)
    if isinstance(call.global_keys, Tensor) and checks.values_are_readable(call.global_keys):
        checks.check_global_key_values(call.global_keys, call.key.shape[2])


def _rotate_packed(call: Call, backend: str | None = None):
    return call.rope.rotate_packed(
        call.query, call.key, call.cu_seqlens_q, call.cu_seqlens_k, top_left=call.causal == "top_left",
        reach=reference.reach_before_keys(call.causal, call.window, None), backend=backend,
    )  # fmt: skip


def kernel_runner(kernels: operator.Operator) -> Callable[[Call], Tensor | tuple[Tensor, Tensor]]:
    """Runs a checked call on a registered operator: what kernels do not take is composed before it."""

    def run(call: Call):
        query, key, value, mask = call.query, call.key, call.value, call.mask
        rel_h, rel_w = call.decomposed_bias or (None, None)
        checks.refuse_forward_ad("attention", query, key, value, mask, call.alibi_slopes, call.sinks, rel_h, rel_w)
        top_left = call.causal == "top_left"
        causal = operator.TOP_LEFT if top_left else operator.BOTTOM_RIGHT if call.causal else operator.NOT_CAUSAL
        scale = query.shape[-1] ** -0.5 if call.scale is None else float(call.scale)
        if kernels.plain is not None and call.plain and not _is_watched():
            if call.by_default:
                _remember(call, kernels.plain)
            out, lse = _run_plain(kernels.plain, query, key, value, scale, causal)
            return (out, lse[0]) if call.return_lse else out
        if call.rope is not None:
            if call.cu_seqlens_q is None:
                reach = reference.reach_before_keys(causal, call.window, call.global_keys)
                query, key = call.rope.rotate(query, key, top_left=top_left, reach=reach)
            else:
                check_values(call)  # positions are made of offsets
                query, key = _rotate_packed(call)
        distance_bias = None
        if call.relative_bias is not None:
            lengths = call.max_seqlen_q, call.max_seqlen_k
            distance_bias = call.relative_bias.values_for(*lengths, top_left=top_left).float().contiguous()
            checks.refuse_forward_ad("attention", distance_bias)
        if mask is not None:
            mask = mask.reshape((1,) * (4 - mask.dim()) + mask.shape) if mask.dim() < 4 else mask
            if mask.dtype == torch.float64:
                mask = mask.float()
            if mask.requires_grad and mask.shape[3] != key.shape[2]:
                # A bias of the row alone: its gradient is a sum over keys, which autograd takes, of float32 terms.
                mask = mask.float().expand(-1, -1, -1, key.shape[2])
        slopes, sinks, global_keys = call.alibi_slopes, call.sinks, call.global_keys
        if global_keys is not None and not isinstance(global_keys, Tensor):
            count = torch.sym_min(global_keys, key.shape[2])
            global_keys = torch.arange(count, dtype=torch.int32, device=query.device)
        left, right = (-1, -1) if call.window is None else call.window
        sums = _any_requires_grad((mask, slopes, distance_bias, sinks, rel_h, rel_w))
        arguments = (
            query,
            key,
            value,
            mask,
            call.key_lengths,
            call.cu_seqlens_q,
            call.cu_seqlens_k,
            None if slopes is None else slopes.float(),
            distance_bias,
            None if sinks is None else sinks.float().contiguous(),
            reference.draw_seed(query.device) if call.dropout_p > 0 else None,
            global_keys,
            None if rel_h is None else rel_h.float(),
            None if rel_w is None else rel_w.float(),
            call.max_seqlen_q,
            call.max_seqlen_k,
            scale,
            float(call.softcap or 0.0),
            float(call.dropout_p),
            causal,
            left,
            right,
            sums or sinks is not None or call.dropout_p > 0,
            sums,
        )
        if torch.compiler.is_compiling():
            out, lse, _ = kernels.forward(*arguments)
        else:
            out, lse, _ = _run_eagerly(kernels, arguments, sums or _any_requires_grad((query, key, value)))
        return (out, lse[0]) if call.return_lse else out

    return run


def _is_watched() -> bool:
    """Does anything but plain autograd look at calls of operators? It gets to see the one operator of all calls."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_any_autocast_enabled()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
    )


# Calls without options that were checked and run by a plain operator, by all that the checks and the choice of a
# backend look at. At the smallest shapes these cost as much as the work.
_PASSED: dict[tuple, operator.PlainOperator] = {}
_MOST_PASSED = 4096
_OWN_TYPES = (Tensor, torch.nn.Parameter)  # no other type's sizes are known to be numbers


def _seen_as(query, key, value) -> tuple | None:
    if not (type(query) in _OWN_TYPES and type(key) in _OWN_TYPES and type(value) in _OWN_TYPES):
        return None
    shapes, dtypes = (query.shape, key.shape, value.shape), (query.dtype, key.dtype, value.dtype)
    return shapes, dtypes, query.device, key.device, value.device


def _remember(call: Call, plain: operator.PlainOperator):
    seen = _seen_as(call.query, call.key, call.value)
    if seen is not None:
        if len(_PASSED) >= _MOST_PASSED:
            _PASSED.clear()
        _PASSED[seen] = plain


def _run_as_before(query, key, value, causal, scale) -> tuple[Tensor, Tensor] | None:
    """out and lse of a call without options that is like one that passed; None: it has to go the whole way."""
    if _is_watched() or not _PASSED or dispatch.DEFAULT or dispatch.CHECK or checks.forward_ad_is_on():
        return None
    plain = _PASSED.get(_seen_as(query, key, value))
    if plain is None or not (causal is True or causal is False):
        return None
    if scale is None:
        scale = query.shape[-1] ** -0.5
    elif type(scale) is not float or not -checks.LARGEST <= scale <= checks.LARGEST:
        return None
    return _run_plain(plain, query, key, value, scale, operator.BOTTOM_RIGHT if causal else operator.NOT_CAUSAL)


def _run_plain(plain: operator.PlainOperator, query, key, value, scale, causal) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return plain.eager.apply(query, key, value, scale, causal)
    with torch._C._AutoDispatchBelowAutograd():
        return plain.forward(query, key, value, scale, causal)


def _run_eagerly(kernels: operator.Operator, arguments, requires_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    try:
        if torch._C._are_functorch_transforms_active():
            return operator.apply_twin(kernels.transformed, *arguments)
        if requires_grad and torch.is_grad_enabled():
            if torch.is_autocast_enabled(arguments[0].device.type):
                return kernels.forward(*arguments)
            return kernels.eager.apply(*arguments)
        with torch._C._AutoDispatchBelowAutograd():  # spares the operator's autograd wrapper, which is Python
            return kernels.forward(*arguments[:-2], False, False)
    except RuntimeError as error:
        raise checks.as_value_error(error) from None


def _any_requires_grad(arguments) -> bool:
    return any(isinstance(x, Tensor) and x.requires_grad for x in arguments)


def _cpu_unsupported(call: Call) -> str | None:
    if not call.query.is_cpu:
        return f"tensors are on {call.query.device}, not on the CPU"
    return kernel_limits(call.query, call.value, 512)


def _triton_unsupported(call: Call) -> str | None:
    return triton_unsupported(call.query.device) or kernel_limits(call.query, call.value, 256)


def _triton_unproven(call: Call) -> str | None:
    return triton_unproven("attention", call.query.device)


def _triton_runner() -> Callable:
    def forward(*arguments):
        from ..kernels import attention as kernels

        return kernels.forward(*arguments)

    def backward(*arguments):
        from ..kernels import attention_backward as kernels

        return kernels.backward(*arguments)

    keys = ("CUDA", "CPU") if triton_problem() is None else ("CUDA",)
    operator.define("triton", forward, backward, keys)
    return kernel_runner(operator.register("triton"))


def _cuda_unsupported(call: Call) -> str | None:
    for name in ("global_keys", "decomposed_bias"):
        if getattr(call, name) is not None:
            return f"{name} is not in the CUDA kernels"
    return cuda_unsupported("attention_cuda", call.query.device) or kernel_limits(call.query, call.value, 256)


def _cuda_unproven(call: Call) -> str | None:
    return cuda_unproven("attention", call.query.device)


def _cuda_problem() -> str | None:
    return cuda_problem("attention_cuda")


def _cuda_runner() -> Callable:
    return kernel_runner(operator.register("cuda")) if _cuda_problem() is None else run_reference


def _cpu_runner() -> Callable:
    return kernel_runner(operator.register("cpu")) if build_problem() is None else run_reference


TABLE = Table(
    "attention",
    [
        Backend("triton", _triton_runner(), triton_problem, _triton_unsupported, _triton_unproven),
        Backend("cuda", _cuda_runner(), _cuda_problem, _cuda_unsupported, _cuda_unproven),
        Backend("cpu", _cpu_runner(), build_problem, _cpu_unsupported),
        Backend("reference", run_reference, lambda: None, lambda call: None),
    ],
    check_values,
)
