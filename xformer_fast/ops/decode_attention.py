"""Attention of new tokens over a KV cache: `decode_attention`, its two operators, its table of backends.

Writing and reading are operators of their own: `xformer_fast::kv_cache_append_<backend>` changes the caches, and
`xformer_fast::decode_attention_<backend>` reads them. Neither has a gradient.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import reference
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
from . import checks
from .attention_operator import in_order_of

APPEND_SCHEMA = (
    "(Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor new_key, Tensor new_value, Tensor cache_lengths, "
    "Tensor? block_table) -> ()"
)
DECODE_SCHEMA = (
    "(Tensor query, Tensor key_cache, Tensor value_cache, Tensor cache_lengths, Tensor? block_table, "
    "Tensor? alibi_slopes, Tensor? distance_bias, Tensor? sinks, SymInt appended, float scale, float softcap, "
    "SymInt window_left) -> (Tensor, Tensor)"
)
_LIBRARY = torch.library.Library("xformer_fast", "FRAGMENT")


@dataclass(slots=True)
class Call:
    """A checked call: what the user gave, in one value."""

    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    cache_lengths: Tensor
    new_key: Tensor | None
    new_value: Tensor | None
    block_table: Tensor | None
    window: tuple[int, int] | None = None
    rope: Rope | None = None
    alibi_slopes: Tensor | None = None
    relative_bias: T5Bias | DistanceBias | None = None
    sinks: Tensor | None = None
    scale: float | None = None
    softcap: float | None = None
    return_lse: bool = False

    @property
    def capacity(self):
        """The keys a sequence can hold."""
        return self.key_cache.shape[2] * (1 if self.block_table is None else self.block_table.shape[1])


def decode_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_lengths: Tensor,
    *,
    new_key: Tensor | None = None,
    new_value: Tensor | None = None,
    block_table: Tensor | None = None,
    window: tuple[int, int] | None = None,
    rope: Rope | None = None,
    alibi_slopes: Tensor | None = None,
    relative_bias: T5Bias | DistanceBias | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
):
    """Causal attention of T new tokens a sequence over a KV cache, each sequence with a length of its own.

    Split over the cache, so that one sequence uses every core: Dao et al., "Flash-Decoding" (2023). Paged caches: Kwon
    et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention" (2023). For inference: it
    has no gradient.

    Args:
        query: (B, Hq, T, D) float32, bfloat16, float16 (float64: reference formula); T = 1 in plain decoding, a few in
            speculative decoding, any number is right.
        key_cache, value_cache: (B, Hkv, capacity, D) and (B, Hkv, capacity, Dv) with a unit last stride, or with
            `block_table` (pages, Hkv, page_size, D) and (pages, Hkv, page_size, Dv). Cached keys are already rotated.
        cache_lengths: (B,) int32 or int64, the keys of each sequence before this call; not changed. What the caches
            hold past them never reaches a result.
        new_key, new_value: (B, Hkv, T, D) and (B, Hkv, T, Dv). Token t of sequence b stands at cache_lengths[b] + t and
            is written there, key rotated first if there is `rope`. Without them it stands at cache_lengths[b] - T + t.
        block_table: (B, max_pages) int32; key j of sequence b is row j % page_size of page
            block_table[b, j // page_size]. Entries past the last key are not read.
        window: (left, right) keeps the left keys before a token; none to its right are seen.
        rope: rotates query and new_key at the tokens' positions, or at the positions given to Rope.
        alibi_slopes: (Hq,) or (B, Hq); adds -slope · (p - j) for a token at p.
        relative_bias: T5Bias, or DistanceBias with values (Hq, T + capacity - 1), whose entry [h, capacity - 1 + j - p]
            is added.
        sinks: (Hq,); one more logit a head in the softmax denominator.
        scale, softcap: as in `attention`.
        return_lse: also return the log of the softmax denominator, (B, Hq, T) float32.
        backend: "cpu", "triton", "cuda" or "reference"; None takes the first that supports the call
            (`xformer_fast.explain`).

    Returns:
        (B, Hq, T, Dv) in the query's dtype and memory order; with return_lse a pair. A token without a key gives zeros.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value, or requires grad in grad mode.
        BackendUnavailable: the backend asked for cannot run this call.

    >>> import torch, xformer_fast
    >>> keys, values, lengths = torch.zeros(2, 4, 64, 32), torch.zeros(2, 4, 64, 32), torch.tensor([5, 9])
    >>> q, k, v = torch.randn(2, 8, 1, 32), torch.randn(2, 4, 1, 32), torch.randn(2, 4, 1, 32)
    >>> xformer_fast.decode_attention(q, keys, values, lengths, new_key=k, new_value=v).shape
    torch.Size([2, 8, 1, 32])
    """
    call = checked(
        query, key_cache, value_cache, cache_lengths, new_key, new_value, block_table, window, rope, alibi_slopes,
        relative_bias, sinks, scale, softcap, return_lse,
    )  # fmt: skip
    return TABLE.run(call, backend)


def explain(*args, **options) -> dict[str, str]:
    """Backend -> why it would not be chosen for `decode_attention(...)`; "" if nothing bars it."""
    bound = inspect.signature(decode_attention).bind(*args, **options)
    bound.apply_defaults()
    backend = bound.arguments.pop("backend")
    return TABLE.reasons(checked(*bound.arguments.values()), backend)


def checked(*arguments, **options) -> Call:
    """The fields of a `Call`, checked but for the values of lengths and pages."""
    call = Call(*arguments, **options)
    query, key_cache, value_cache = call.query, call.key_cache, call.value_cache
    _check_caches(query, key_cache, value_cache)
    batch, heads, tokens, _ = query.shape
    if call.block_table is not None:
        table = call.block_table
        checks.check_tensors(block_table=table)
        if table.dtype != torch.int32 or table.dim() != 2 or table.shape[0] != batch:
            raise ValueError(f"block_table must be int32 ({batch}, max_pages), got {table.dtype} {tuple(table.shape)}")
        checks.check_device("block_table", table, query.device)
        if key_cache.shape[2] < 1:
            raise ValueError("key_cache must have a page_size of at least 1")
    elif key_cache.shape[0] != batch:
        raise ValueError(f"key_cache has batch {key_cache.shape[0]}, query has {batch}: they must be equal")
    checks.check_lengths("cache_lengths", call.cache_lengths, batch, query.device)
    if (call.new_key is None) != (call.new_value is None):
        raise ValueError("new_key and new_value must be given together")
    if call.new_key is not None:
        _check_new(call)
    call.window = checks.check_window(call.window)
    checks.check_numbers(call.scale, call.softcap, 0.0)
    values = None
    if call.alibi_slopes is not None:
        checks.check_slopes(call.alibi_slopes, batch, heads, query.device)
    if call.sinks is not None:
        checks.check_sinks(call.sinks, heads, query.device)
    if call.rope is not None:
        if not hasattr(call.rope, "rotate_tokens"):
            raise TypeError(f"rope must be an xformer_fast.Rope, got {type(call.rope).__name__}")
        call.rope.check(query.shape[-1])
    if call.relative_bias is not None:
        values = checks.check_relative_bias(call.relative_bias, heads, query.device)
        if isinstance(call.relative_bias, DistanceBias) and values.shape[1] != tokens + call.capacity - 1:
            wanted = tokens + call.capacity - 1
            raise ValueError(
                f"relative_bias must have values (Hq, T + capacity - 1 = {wanted}), got {tuple(values.shape)}"
            )
    if torch.is_grad_enabled():
        named = dict(
            query=query, key_cache=key_cache, value_cache=value_cache, new_key=call.new_key, new_value=call.new_value,
            alibi_slopes=call.alibi_slopes, relative_bias=values, sinks=call.sinks,
        )  # fmt: skip
        if call.rope is not None:
            named |= {"rope.cos": call.rope.cos, "rope.sin": call.rope.sin}
        for name, tensor in named.items():
            if tensor is not None and tensor.requires_grad:
                raise ValueError(
                    f"{name} requires grad, and decode_attention has no gradient: call it under torch.no_grad()"
                )
    return call


def _check_caches(query, key_cache, value_cache):
    checks.check_tensors(query=query, key_cache=key_cache, value_cache=value_cache)
    for name, tensor in (("query", query), ("key_cache", key_cache), ("value_cache", value_cache)):
        if tensor.dim() != 4:
            raise ValueError(f"{name} must have four dimensions, got shape {tuple(tensor.shape)}")
        if tensor.dtype not in checks.FLOATS:
            raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")
        checks.check_device(name, tensor, query.device)
    if key_cache.dtype != value_cache.dtype:
        raise TypeError(f"value_cache is {value_cache.dtype}, key_cache is {key_cache.dtype}: they must be equal")
    checks.check_dtype("query", query, key_cache.dtype, "the caches are")
    k, v = key_cache.shape, value_cache.shape
    if k[:3] != v[:3]:
        raise ValueError(f"key_cache and value_cache must agree but for the last dimension, got {tuple(k)}, {tuple(v)}")
    if query.shape[1] < 1 or k[1] < 1 or query.shape[1] % k[1]:
        raise ValueError(f"key_cache has {k[1]} heads; they must divide the query's {query.shape[1]}")
    if query.shape[3] != k[3]:
        raise ValueError(f"key_cache has head_dim {k[3]}, query has {query.shape[3]}: they must be equal")
    if k[3] < 1 or v[3] < 1:
        raise ValueError(f"key_cache and value_cache must have head_dim >= 1, got {k[3]} and {v[3]}")
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        if cache.stride(3) != 1:
            raise ValueError(f"{name} must have a unit last stride, got strides {cache.stride()}")


def _check_new(call: Call):
    batch, tokens, heads = call.query.shape[0], call.query.shape[2], call.key_cache.shape[1]
    for name, tensor, cache in (
        ("new_key", call.new_key, call.key_cache),
        ("new_value", call.new_value, call.value_cache),
    ):
        checks.check_tensors(**{name: tensor})
        if tensor.shape != (batch, heads, tokens, cache.shape[3]):
            wanted = (batch, heads, tokens, cache.shape[3])
            raise ValueError(f"{name} must be (B, Hkv, T, D) = {wanted}, got {tuple(tensor.shape)}")
        checks.check_dtype(name, tensor, cache.dtype, "the caches are")
        checks.check_device(name, tensor, call.query.device)
        if any(stride == 0 and size > 1 for stride, size in zip(cache.stride(), cache.shape, strict=True)):
            raise ValueError(f"{name} cannot be written: its cache is an expanded tensor, strides {cache.stride()}")


def check_values(call: Call):
    """What the CPU kernel checks itself: values of lengths and of the block table."""
    if not checks.values_are_readable(call.cache_lengths):
        return
    appended = 0 if call.new_key is None else call.query.shape[2]
    limits = [call.capacity - appended] * call.query.shape[0]
    checks.check_length_values("cache_lengths", call.cache_lengths, limits)
    if call.block_table is None:
        return
    pages, _, page_size, _ = call.key_cache.shape
    for b, length in enumerate(call.cache_lengths.tolist()):
        for i, page in enumerate(call.block_table[b, : -(-(length + appended) // page_size)].tolist()):
            if not 0 <= page < pages:
                raise ValueError(f"block_table[{b}, {i}] is {page}, must lie in 0..{pages - 1}")


def _in_cache_dtype(call: Call):
    """Query and new tokens in the dtype of the cache; they differ under autocast alone."""
    dtype = call.key_cache.dtype
    return tuple(
        t if t is None or t.dtype == dtype else t.to(dtype) for t in (call.query, call.new_key, call.new_value)
    )


def run_reference(call: Call):
    check_values(call)
    query, new_key, new_value = _in_cache_dtype(call)
    names = ("block_table", "window", "rope", "alibi_slopes", "relative_bias", "sinks", "scale", "softcap")
    return reference.decode_attention(
        query,
        call.key_cache,
        call.value_cache,
        call.cache_lengths,
        new_key=new_key,
        new_value=new_value,
        return_lse=call.return_lse,
        **{name: getattr(call, name) for name in names},
    )


def kernel_runner(append: Callable, decode: Callable) -> Callable[[Call], Tensor | tuple[Tensor, Tensor]]:
    """Runs a checked call on a pair of operators; rotation and the bias's vector are composed before them."""

    def run(call: Call):
        checks.refuse_forward_ad("decode_attention", call.query, call.key_cache, call.value_cache, call.new_key)
        query, new_key, new_value = _in_cache_dtype(call)
        tokens = query.shape[2]
        appended = 0 if new_key is None else tokens
        lengths, table, slopes, sinks = call.cache_lengths, call.block_table, call.alibi_slopes, call.sinks
        if call.rope is not None:
            query, new_key = call.rope.rotate_tokens(query, new_key, lengths if appended else lengths - tokens)
        bias = None
        if call.relative_bias is not None:
            bias = call.relative_bias.values_for(tokens, call.capacity).float().contiguous()
        if table is not None and table.stride(1) != 1:
            table = table.contiguous()
        if new_key is not None:
            _run(append, call.key_cache, call.value_cache, new_key, new_value, lengths, table)
            if not torch.compiler.is_compiling() and not call.key_cache.is_inference():
                torch.autograd.graph.increment_version((call.key_cache, call.value_cache))
        out, lse = _run(
            decode,
            query,
            call.key_cache,
            call.value_cache,
            lengths,
            table,
            None if slopes is None else slopes.float(),
            bias,
            None if sinks is None else sinks.float().contiguous(),
            appended,
            query.shape[-1] ** -0.5 if call.scale is None else float(call.scale),
            float(call.softcap or 0.0),
            -1 if call.window is None else call.window[0],
        )
        return (out, lse) if call.return_lse else out

    return run


def _run(operator: Callable, *arguments):
    if torch.compiler.is_compiling():
        return operator(*arguments)
    try:
        return operator(*arguments)
    except RuntimeError as error:
        raise checks.as_value_error(error) from None


def _decode_fake(query, key_cache, value_cache, *options):
    return in_order_of(query, value_cache.shape[3]), query.new_empty(query.shape[:3], dtype=torch.float32)


def _register(backend: str) -> Callable[[Call], Tensor | tuple[Tensor, Tensor]]:
    append = getattr(torch.ops.xformer_fast, f"kv_cache_append_{backend}").default
    decode = getattr(torch.ops.xformer_fast, f"decode_attention_{backend}").default
    torch.library.register_fake(append, lambda *arguments: None, lib=_LIBRARY)
    torch.library.register_fake(decode, _decode_fake, lib=_LIBRARY)
    return kernel_runner(append, decode)


def _triton_runner() -> Callable:
    def append(*arguments):
        from ..kernels import decode as kernels

        return kernels.append(*arguments)

    def decode(*arguments):
        from ..kernels import decode as kernels

        return kernels.forward(*arguments)

    for name, schema, function in (
        ("kv_cache_append_triton", APPEND_SCHEMA, append),
        ("decode_attention_triton", DECODE_SCHEMA, decode),
    ):
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        for key in ("CUDA", "CPU") if triton_problem() is None else ("CUDA",):
            _LIBRARY.impl(name, function, key)
    return _register("triton")


def _cpu_unsupported(call: Call) -> str | None:
    if call.query.device.type != "cpu":
        return f"tensors are on {call.query.device}, not on the CPU"
    return kernel_limits(call.key_cache, call.value_cache, 512)


def _triton_unsupported(call: Call) -> str | None:
    return triton_unsupported(call.query.device) or kernel_limits(call.key_cache, call.value_cache, 256)


def _triton_unproven(call: Call) -> str | None:
    return triton_unproven("decode_attention", call.query.device)


def _cuda_unsupported(call: Call) -> str | None:
    return cuda_unsupported("decode_attention_cuda", call.query.device) or kernel_limits(
        call.key_cache, call.value_cache, 256
    )


def _cuda_unproven(call: Call) -> str | None:
    return cuda_unproven("decode_attention", call.query.device)


def _cuda_problem() -> str | None:
    return cuda_problem("decode_attention_cuda")


TABLE = Table(
    "decode_attention",
    [
        Backend("triton", _triton_runner(), triton_problem, _triton_unsupported, _triton_unproven),
        Backend(
            "cuda",
            _register("cuda") if _cuda_problem() is None else run_reference,
            _cuda_problem,
            _cuda_unsupported,
            _cuda_unproven,
        ),
        Backend("cpu", _register("cpu") if build_problem() is None else run_reference, build_problem, _cpu_unsupported),
        Backend("reference", run_reference, lambda: None, lambda call: None),
    ],
    check_values,
)
