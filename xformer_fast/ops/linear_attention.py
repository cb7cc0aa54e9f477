"""Linear attention: `linear_attention`, `linear_attention_step`, and their table of backends."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import feature_maps, reference
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
from ..feature_maps import FeatureMap
from . import checks
from . import linear_attention_operator as operator
from .attention import _any_requires_grad
from .attention_operator import apply_twin

State = tuple[Tensor, Tensor]


@dataclass(slots=True)
class Call:
    """A checked call: what the user gave, in one value."""

    query: Tensor
    key: Tensor
    value: Tensor
    feature_map: FeatureMap
    causal: bool
    normalize: bool
    eps: float
    decay: Tensor | None
    scale: float
    key_lengths: Tensor | None
    cu_seqlens: Tensor | None
    initial_state: State | None
    return_state: bool


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    feature_map: FeatureMap = "elu",
    causal: bool = False,
    normalize: bool = True,
    eps: float = 1e-6,
    decay: Tensor | None = None,
    scale: float = 1.0,
    key_lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: State | None = None,
    return_state: bool = False,
    backend: str | None = None,
):
    """φ(q_i)·Σ_j φ(k_j)ᵀ v_j / (φ(q_i)·Σ_j φ(k_j) + eps), in time linear in the sequence and without an S×S matrix.

    Katharopoulos et al., "Transformers are RNNs" (2020); decay as in Sun et al., "Retentive Network" (2023).

    Args:
        query: (B, Hq, Sq, D) float32, bfloat16, float16 (or float64: reference formula), or packed (T, Hq, D) with
            cu_seqlens. Any strides; rows with a unit last stride are read in place.
        key, value: (B, Hkv, Sk, D) and (B, Hkv, Sk, Dv), or packed; Hkv divides Hq, and query head h reads KV head
            h // (Hq / Hkv).
        feature_map: φ. "elu" (elu + 1), "relu", "identity", "square_relu", "exp", "softmax" (over D) are fused into the
            kernels; "taylor" (φ(q)·φ(k) = 1 + x + x²/2, x = q·k; D at most 32), a `FavorPlus`, a callable or a pair
            (φ_q, φ_k) of callables run before them, in torch.
        causal: sums over j <= p_i, p_i = i + Sk - Sq (the last query meets the last key), else over every key.
        normalize: divide by the sum of weights. "elu", "exp", "softmax", "taylor" and `FavorPlus` keep it positive.
            "relu" and "square_relu" can make it zero, "identity" and callables zero or negative, which gives large or
            meaningless rows: pass normalize=False there (or an eps that fits). Exactly zero gives a row of zeros.
        eps: added to the denominator, >= 0.
        decay: (Hq,) float32 in (0, 1], causal only; may require grad. The term of key j at query i weighs
            decay^(p_i - j), an initial state decay^(p_i + 1), in numerator and denominator alike.
        scale: multiplies φ(q)·φ(k) in both.
        key_lengths: (B,) int32 or int64; keys at or past it are padding and never reach a result. Never moves p_i.
        cu_seqlens: (B + 1,) int32 offsets of packed sequences, from 0 to T, of queries and keys alike.
        initial_state: (kv (B, Hq, Dφ, Dv), z (B, Hq, Dφ)) float32, what keys before these have left; may require grad.
        return_state: also return the state after the last key (key_lengths[b] or Sk), differentiable. Handing it on
            as initial_state continues a sequence where it was cut.
        backend: "cpu", "triton", "cuda" or "reference"; None takes the first that supports the call
            (`xformer_fast.explain`).

    Returns:
        (B, Hq, Sq, Dv) in the query's dtype and memory order, or packed (T, Hq, Dv); with return_state also
        (kv, z), float32. A query that sees no key and no state gives zeros.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value; the message names it.
        BackendUnavailable: the backend asked for cannot run this call.

    >>> import torch, xformer_fast
    >>> q, k, v = torch.randn(3, 2, 8, 128, 64).unbind()
    >>> out, state = xformer_fast.linear_attention(q, k, v, causal=True, return_state=True)
    >>> out.shape, state[0].shape
    (torch.Size([2, 8, 128, 64]), torch.Size([2, 8, 64, 64]))
    """
    call = _checked(
        query, key, value, feature_map, causal, normalize, eps, decay, scale, key_lengths, cu_seqlens, initial_state,
        return_state,
    )  # fmt: skip
    return TABLE.run(call, backend)


def linear_attention_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: State | None = None,
    *,
    feature_map: FeatureMap = "elu",
    normalize: bool = True,
    eps: float = 1e-6,
    decay: Tensor | None = None,
    scale: float = 1.0,
    backend: str | None = None,
) -> tuple[Tensor, State]:
    """The next token (or few tokens) of causal `linear_attention`: constant time and a state of constant size.

    Args:
        query: (B, Hq, T, D), T new tokens, 1 in plain decoding. key, value: (B, Hkv, T, D) and (B, Hkv, T, Dv).
        state: what the last call returned; None at the beginning of a sequence. It is not modified.
        The rest as in `linear_attention`.

    Returns:
        (B, Hq, T, Dv) and the new state (kv (B, Hq, Dφ, Dv), z (B, Hq, Dφ)).

    >>> import torch, xformer_fast
    >>> state = None
    >>> for q, k, v in torch.randn(5, 3, 1, 2, 1, 16):
    ...     out, state = xformer_fast.linear_attention_step(q, k, v, state)
    """
    checks.check_qkv(query, key, value, "(B, H, S, D)")
    if query.shape[2] != key.shape[2]:
        raise ValueError(f"key has {key.shape[2]} new tokens, query has {query.shape[2]}: they must be equal")
    return linear_attention(
        query, key, value, feature_map=feature_map, causal=True, normalize=normalize, eps=eps, decay=decay, scale=scale,
        initial_state=state, return_state=True, backend=backend,
    )  # fmt: skip


def explain(*args, **options) -> dict[str, str]:
    """Backend -> why it would not be chosen for `linear_attention(...)`; "" if nothing bars it."""
    bound = inspect.signature(linear_attention).bind(*args, **options)
    bound.apply_defaults()
    backend = bound.arguments.pop("backend")
    return TABLE.reasons(_checked(*bound.arguments.values()), backend)


def _checked(query, key, value, *options) -> Call:
    call = Call(query, key, value, *options)
    packed = call.cu_seqlens is not None
    checks.check_qkv(query, key, value, "(T, H, D)" if packed else "(B, H, S, D)")
    device, heads = query.device, query.shape[1]
    if packed:
        _check_offsets(call.cu_seqlens, query, key)
        batch = call.cu_seqlens.shape[0] - 1
    else:
        batch = query.shape[0]
    for name in ("causal", "normalize", "return_state"):
        if not isinstance(getattr(call, name), bool):
            raise TypeError(f"{name} must be True or False, got {getattr(call, name)!r}")
    for name, number in (("eps", call.eps), ("scale", call.scale)):
        if isinstance(number, bool) or not isinstance(number, (int, float, torch.SymFloat, torch.SymInt)):
            raise TypeError(f"{name} must be a number, got {type(number).__name__}")
    if not 0 <= call.eps < float("inf"):
        raise ValueError(f"eps must be finite and >= 0, got {call.eps}")
    if not -checks.LARGEST <= call.scale <= checks.LARGEST:
        raise ValueError(f"scale must be finite in float32, got {call.scale}")
    feature_maps.check(call.feature_map, query.shape[-1])
    if call.key_lengths is not None:
        checks.check_lengths("key_lengths", call.key_lengths, batch, device)
    if call.decay is not None:
        checks.check_float("decay", call.decay)
        checks.check_device("decay", call.decay, device)
        if call.decay.shape != (heads,):
            raise ValueError(f"decay must have shape ({heads},), got {tuple(call.decay.shape)}")
        if not call.causal:
            raise ValueError("decay needs causal=True: without an order of positions it has no meaning")
    if call.initial_state is not None:
        _check_state(call, batch, heads)
    return call


def _check_offsets(cu_seqlens, query, key):
    checks.check_tensors(cu_seqlens=cu_seqlens)
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"cu_seqlens must be int32, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens must have shape (B + 1,), got {tuple(cu_seqlens.shape)}")
    checks.check_device("cu_seqlens", cu_seqlens, query.device)
    if query.shape[0] != key.shape[0]:
        raise ValueError(f"key has {key.shape[0]} packed rows, query has {query.shape[0]}: cu_seqlens serves both")


def _check_state(call: Call, batch, heads):
    state = call.initial_state
    if not isinstance(state, (tuple, list)) or len(state) != 2:
        raise TypeError(f"initial_state must be a pair (kv, z), got {type(state).__name__}")
    kv, z = state
    known = call.query.shape[-1] if isinstance(call.feature_map, str) and call.feature_map != "taylor" else None
    for name, tensor, dims in (("initial_state[0]", kv, 4), ("initial_state[1]", z, 3)):
        checks.check_float(name, tensor)
        checks.check_device(name, tensor, call.query.device)
        if tensor.dim() != dims or tuple(tensor.shape[:2]) != (batch, heads):
            shape = "(B, Hq, Dφ, Dv)" if dims == 4 else "(B, Hq, Dφ)"
            raise ValueError(f"{name} must be {shape} with B, Hq = {batch}, {heads}, got {tuple(tensor.shape)}")
    features = z.shape[2] if known is None else known
    if kv.shape[2:] != (features, call.value.shape[-1]) or z.shape[2] != features:
        raise ValueError(
            f"initial_state must have Dφ = {features} and Dv = {call.value.shape[-1]}, got {tuple(kv.shape)} and "
            f"{tuple(z.shape)}"
        )


def check_values(call: Call):
    """What the CPU kernels check themselves: values of lengths, offsets and decay."""
    limits = None
    if call.cu_seqlens is None:
        limits = [call.key.shape[2]] * call.key.shape[0]
    elif checks.values_are_readable(call.cu_seqlens):
        limits = checks.check_offset_values("cu_seqlens", call.cu_seqlens, call.key.shape[0], call.key.shape[0])
    if limits is not None and call.key_lengths is not None and checks.values_are_readable(call.key_lengths):
        checks.check_length_values("key_lengths", call.key_lengths, limits)
    if call.decay is not None and checks.values_are_readable(call.decay):
        _check_decay_values(call.decay)


def run_reference(call: Call):
    check_values(call)
    names = [name for name in Call.__dataclass_fields__ if name not in ("query", "key", "value")]
    return reference.linear_attention(call.query, call.key, call.value, **{name: getattr(call, name) for name in names})


def _check_decay_values(decay: Tensor):
    for h, rate in enumerate(decay.tolist()):
        if not 0 < rate <= 1:
            raise ValueError(f"decay[{h}] is {rate}, must lie in (0, 1]")


def kernel_runner(forward: Callable, twin: type, fused=feature_maps.FUSED) -> Callable:
    """Runs a checked call on a registered operator: a map that kernels do not have (`fused`) is applied before it."""

    def run(call: Call):
        query, key, state = call.query, call.key, call.initial_state
        checks.refuse_forward_ad("linear_attention", query, key, call.value, call.decay, *(state or ()))
        feature_map = call.feature_map
        if feature_map not in fused:
            query, key = _apply_map(call)
            feature_map = "identity"
        arguments = (
            query,
            key,
            call.value,
            call.key_lengths,
            call.cu_seqlens,
            None if call.decay is None else call.decay.float().contiguous(),
            None if state is None else state[0].float().contiguous(),
            None if state is None else state[1].float().contiguous(),
            feature_maps.FUSED.index(feature_map),
            call.causal,
            call.normalize,
            float(call.eps),
            float(call.scale),
            call.return_state,
        )
        if torch.compiler.is_compiling():
            out, kv, z, _ = forward(*arguments)
        else:
            out, kv, z, _ = _run_eagerly(forward, twin, arguments)
        return (out, (kv, z)) if call.return_state else out

    return run


def _run_eagerly(forward: Callable, twin: type, arguments):
    try:
        if torch._C._are_functorch_transforms_active():
            return apply_twin(twin, *arguments)
        if torch.is_grad_enabled() and _any_requires_grad(arguments):
            return forward(*arguments)
        with torch._C._AutoDispatchBelowAutograd():  # spares the operator's autograd wrapper, which is Python
            return forward(*arguments)
    except RuntimeError as error:
        raise checks.as_value_error(error) from None


def _apply_map(call: Call) -> tuple[Tensor, Tensor]:
    """φ(query), φ(key) by torch; padding is cleared first, since a NaN there would reach gradients through φ."""
    key = call.key
    if call.key_lengths is not None:
        key = key.masked_fill(~_inside(call)[..., None], 0)
    phi_q, phi_k = feature_maps.apply(call.feature_map, call.query, key)
    for name, phi, x in (("query", phi_q, call.query), ("key", phi_k, key)):
        if not isinstance(phi, Tensor) or phi.shape[:-1] != x.shape[:-1] or phi.shape[-1] != phi_k.shape[-1]:
            got = tuple(phi.shape) if isinstance(phi, Tensor) else type(phi).__name__
            raise ValueError(f"feature_map must keep all but the last axis of {name}, {tuple(x.shape)}, got {got}")
    if call.initial_state is not None and call.initial_state[1].shape[-1] != phi_k.shape[-1]:
        raise ValueError(
            f"initial_state has Dφ = {call.initial_state[1].shape[-1]}, feature_map gives {phi_k.shape[-1]}"
        )
    return phi_q.to(call.query.dtype), phi_k.to(key.dtype)


def _inside(call: Call) -> Tensor:
    """Which keys are no padding: (B, 1, Sk), or packed (T, 1)."""
    lengths, key = call.key_lengths, call.key
    if call.cu_seqlens is None:
        return (torch.arange(key.shape[2], device=key.device) < lengths[:, None])[:, None]
    row = torch.arange(key.shape[0], device=key.device)
    sequence = torch.searchsorted(call.cu_seqlens[1:].contiguous(), row, right=True)
    return (row - call.cu_seqlens[sequence] < lengths[sequence])[:, None]


def _cpu_unsupported(call: Call) -> str | None:
    if call.query.device.type != "cpu":
        return f"tensors are on {call.query.device}, not on the CPU"
    return kernel_limits(call.query, call.value, 512)


def _triton_unsupported(call: Call) -> str | None:
    return triton_unsupported(call.query.device) or _gpu_limits(call)


def _gpu_limits(call: Call) -> str | None:
    if call.feature_map == "taylor" and call.query.shape[-1] > 15:
        return "taylor has 1 + D + D² features; at most 256 fit the kernels"
    if isinstance(call.feature_map, feature_maps.FavorPlus) and call.feature_map.num_features > 256:
        return "at most 256 features fit the kernels"
    return kernel_limits(call.query, call.value, 256)


def _triton_unproven(call: Call) -> str | None:
    return triton_unproven("linear_attention", call.query.device)


def _triton_runner() -> Callable:
    def forward(*arguments):
        from ..kernels import linear_attention as kernels

        return kernels.forward(*arguments)

    def backward(*arguments):
        from ..kernels import linear_attention_backward as kernels

        return kernels.backward(*arguments)

    keys = ("CUDA", "CPU") if triton_problem() is None else ("CUDA",)
    operator.define("triton", forward, backward, keys)
    return kernel_runner(*operator.register("triton"))


def _cuda_unsupported(call: Call) -> str | None:
    if call.decay is not None and call.decay.requires_grad and torch.is_grad_enabled():
        return "decay requires grad, for which the CUDA kernels have no gradient"
    return cuda_unsupported("linear_attention_cuda", call.query.device) or _gpu_limits(call)


def _cuda_unproven(call: Call) -> str | None:
    return cuda_unproven("linear_attention", call.query.device)


def _cuda_problem() -> str | None:
    return cuda_problem("linear_attention_cuda")


def _cuda_runner() -> Callable:
    if _cuda_problem() is not None:
        return run_reference
    return kernel_runner(*operator.register("cuda"), [name for name in feature_maps.FUSED if name != "softmax"])


def _cpu_runner() -> Callable:
    return kernel_runner(*operator.register("cpu")) if build_problem() is None else run_reference


TABLE = Table(
    "linear_attention",
    [
        Backend("triton", _triton_runner(), triton_problem, _triton_unsupported, _triton_unproven),
        Backend("cuda", _cuda_runner(), _cuda_problem, _cuda_unsupported, _cuda_unproven),
        Backend("cpu", _cpu_runner(), build_problem, _cpu_unsupported),
        Backend("reference", run_reference, lambda: None, lambda call: None),
    ],
    check_values,
)
