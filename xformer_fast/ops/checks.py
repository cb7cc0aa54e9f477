"""Argument checks that ops share: ValueError or TypeError, naming the argument, what it was and what it must be."""

import itertools

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from .. import dispatch

NO_FORWARD_AD = '{}: forward-mode AD is not implemented by the kernels; use backend="reference"'
LARGEST = torch.finfo(torch.float32).max  # of numbers that kernels take
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensors(**tensors):
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")


def check_qkv(query: Tensor, key: Tensor, value: Tensor, layout: str):
    """Types, devices and agreeing sizes of query, key and value; `layout` is "(B, H, S, D)" or "(T, H, D)"."""
    check_tensors(query=query, key=key, value=value)
    q, k, v, dims = query.shape, key.shape, value.shape, layout.count(",") + 1
    dtype, device = query.dtype, query.device
    alike = len(q) == len(k) == len(v) == dims and dtype == key.dtype == value.dtype
    if not (alike and dtype in FLOATS and device == key.device == value.device):
        for name, tensor, shape in (("query", query, q), ("key", key, k), ("value", value, v)):
            if len(shape) != dims:
                raise ValueError(f"{name} must be {layout}, got shape {tuple(shape)}")
            check_dtype(name, tensor, dtype)
            check_device(name, tensor, device)
    if dims == 4:
        for name, shape in (("key", k), ("value", v)):
            if shape[0] != q[0]:
                raise ValueError(f"{name} has batch {shape[0]}, query has {q[0]}: they must be equal")
    heads, sequence = 1, (2 if dims == 4 else 0)
    if k[heads] != v[heads]:
        raise ValueError(f"value has {v[heads]} heads, key has {k[heads]}: they must be equal")
    if q[heads] < 1 or k[heads] < 1 or q[heads] % k[heads]:
        raise ValueError(f"key has {k[heads]} heads; they must divide the query's {q[heads]}")
    if q[-1] != k[-1]:
        raise ValueError(f"key has head_dim {k[-1]}, query has {q[-1]}: they must be equal")
    if q[-1] < 1 or v[-1] < 1:
        raise ValueError(f"query and value must have head_dim >= 1, got {q[-1]} and {v[-1]}")
    if k[sequence] != v[sequence]:
        raise ValueError(f"value has {v[sequence]} keys, key has {k[sequence]}: they must be equal")


def check_dtype(name: str, tensor: Tensor, dtype: torch.dtype, whose="query is"):
    """Autocast, which would make float types equal, leaves float64 as it is."""
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")
    if tensor.dtype == dtype:
        return
    if torch.float64 in (tensor.dtype, dtype) or not torch.is_autocast_enabled(tensor.device.type):
        raise TypeError(
            f"{name} is {tensor.dtype}, {whose} {dtype}: they must be equal (under autocast too, where one is float64)"
        )


def check_causal(causal):
    if not (causal is True or causal is False or causal == "top_left"):
        raise ValueError(f'causal must be False, True or "top_left", got {causal!r}')


def check_window(window) -> tuple | None:
    """The window, with a side past any sequence as -1: kernels may add sides to positions."""
    if window is None:
        return None
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise ValueError(f"window must be None or (left, right), got {window!r}")
    for side in window:
        if isinstance(side, bool) or not isinstance(side, (int, torch.SymInt)):
            raise TypeError(f"window must hold two ints, got {window!r}")
        if side < -1:
            raise ValueError(f"window must hold lengths >= 0, or -1 for no limit, got {window!r}")
    return tuple(-1 if side > 2**30 else side for side in window)


def check_lengths(name: str, lengths, batch, device):
    check_tensors(**{name: lengths})
    if lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {lengths.dtype}")
    if lengths.dim() != 1 or lengths.shape[0] != batch:
        raise ValueError(f"{name} must have shape ({batch},), got {tuple(lengths.shape)}")
    check_device(name, lengths, device)


def check_global_keys(keys, batch, device):
    if isinstance(keys, (int, torch.SymInt)) and not isinstance(keys, bool):
        if keys < 0:
            raise ValueError(f"global_keys must be a count >= 0 or a tensor of indices, got {keys}")
        return
    if not isinstance(keys, Tensor):
        raise TypeError(f"global_keys must be an int (a count) or a torch.Tensor of indices, got {type(keys).__name__}")
    if keys.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"global_keys must be int32 or int64, got {keys.dtype}")
    if keys.dim() not in (1, 2) or (keys.dim() == 2 and keys.shape[0] != batch):
        raise ValueError(f"global_keys must be (G,) or ({batch}, G), got {tuple(keys.shape)}")
    check_device("global_keys", keys, device)


def check_global_key_values(keys: Tensor, len_k: int):
    wrong = ((keys < -1) | (keys >= len_k)).nonzero()
    if len(wrong):
        place = tuple(wrong[0].tolist())
        index = keys[place].item()
        raise ValueError(f"global_keys{list(place)} is {index}, must lie in 0..{len_k - 1}, or be -1 for no key")


def check_decomposed_bias(bias, batch, heads, len_q, len_k, device):
    if not isinstance(bias, (tuple, list)) or len(bias) != 2:
        raise TypeError(f"decomposed_bias must be a pair (rel_h, rel_w), got {type(bias).__name__}")
    for name, rel in (("rel_h", bias[0]), ("rel_w", bias[1])):
        name = f"decomposed_bias: {name}"
        check_float(name, rel)
        check_device(name, rel, device)
        if rel.dim() != 4 or rel.shape[:3] != (batch, heads, len_q):
            raise ValueError(f"{name} must be ({batch}, {heads}, {len_q}, H or W), got {tuple(rel.shape)}")
    rows, columns = bias[0].shape[3], bias[1].shape[3]
    if rows * columns != len_k:
        raise ValueError(f"decomposed_bias is of {rows} x {columns} keys: the product must be {len_k}, those of key")


def check_length_values(name: str, lengths: Tensor, limits: list[int]):
    for b, (length, limit) in enumerate(zip(lengths.tolist(), limits, strict=True)):
        if not 0 <= length <= limit:
            raise ValueError(f"{name}[{b}] is {length}, must lie in 0..{limit}")


def check_offset_values(name: str, offsets: Tensor, total: int, longest: int) -> list[int]:
    """The lengths of the packed sequences."""
    values = offsets.tolist()
    lengths = [b - a for a, b in itertools.pairwise(values)]
    if values[0] != 0 or min(lengths, default=0) < 0 or values[-1] != total:
        raise ValueError(f"{name} must start at 0, not decrease, and end at {total}, the packed rows, got {values}")
    if max(lengths, default=0) > longest:
        promise = name.replace("cu_seqlens", "max_seqlen")
        raise ValueError(f"{promise} is {longest}, must be at least the longest sequence, {max(lengths)}")
    return lengths


def values_are_readable(tensor: Tensor) -> bool:
    """Whether values may be looked at: without a graph break, and waiting for a GPU only if XFORMER_FAST_CHECK=1."""
    readable = tensor.is_cpu or (dispatch.CHECK and tensor.is_cuda)
    return readable and type(tensor) is Tensor and not torch.compiler.is_compiling()


def check_device(name: str, tensor: Tensor, device):
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, query on {device}: they must share a device")


def check_float(name: str, tensor):
    check_tensors(**{name: tensor})
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name} must be a float tensor, got {tensor.dtype}")


def check_mask(mask, batch, heads, len_q, len_k, device):
    check_tensors(mask=mask)
    if mask.dtype != torch.bool and mask.dtype not in FLOATS:
        raise TypeError(f"mask must be bool (True attends) or float (added), got {mask.dtype}")
    check_device("mask", mask, device)
    full = (batch, heads, len_q, len_k)
    if mask.dim() > 4 or any(m != 1 and m != n for m, n in zip(mask.shape[::-1], full[::-1], strict=False)):
        raise ValueError(f"mask of shape {tuple(mask.shape)} must broadcast to (B, Hq, Sq, Sk) = {tuple(full)}")


def check_slopes(slopes, batch, heads, device):
    check_float("alibi_slopes", slopes)
    check_device("alibi_slopes", slopes, device)
    if slopes.shape != (heads,) and slopes.shape != (batch, heads):
        raise ValueError(f"alibi_slopes must be ({heads},) or ({batch}, {heads}), got {tuple(slopes.shape)}")


def check_sinks(sinks, heads, device):
    check_float("sinks", sinks)
    check_device("sinks", sinks, device)
    if sinks.shape != (heads,):
        raise ValueError(f"sinks must be ({heads},), got {tuple(sinks.shape)}")


def check_relative_bias(bias, heads, device) -> Tensor | None:
    """The tensor of a bias: a DistanceBias's values, a T5Bias's table; None for another object with `values_for`."""
    if not hasattr(bias, "values_for"):
        raise TypeError(f"relative_bias must be a T5Bias or DistanceBias, got {type(bias).__name__}")
    if bias.num_heads != heads:
        raise ValueError(f"relative_bias has {bias.num_heads} heads, query has {heads}")
    for name in ("values", "table"):
        tensor = getattr(bias, name, None)
        if isinstance(tensor, Tensor):
            check_float(f"relative_bias: {name}", tensor)
            check_device(f"relative_bias: {name}", tensor, device)
            return tensor
    return None


def check_numbers(scale, softcap, dropout_p):
    if scale is not None:
        check_number("scale", scale)
        if not -LARGEST <= scale <= LARGEST:
            raise ValueError(f"scale must be finite in float32, got {scale}")
    if softcap is not None:
        check_number("softcap", softcap)
        if not 0 <= softcap <= LARGEST:
            raise ValueError(f"softcap must be positive and finite in float32 (0 or None: none), got {softcap}")
    check_number("dropout_p", dropout_p)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must lie in [0, 1), got {dropout_p}")


def check_number(name: str, number):
    if isinstance(number, bool) or not isinstance(number, (float, int, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{name} must be a number, got {type(number).__name__}")


def check_int(name: str, number):
    if isinstance(number, bool) or not isinstance(number, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {number!r}")


def as_value_error(error: RuntimeError) -> Exception:
    """What to raise for an operator's error: values are checked inside operators, which know RuntimeError alone."""
    _, ours, message = str(error).split("\n")[0].partition("xformer_fast: ")
    return ValueError(message) if ours and not message.startswith("out of memory") else error


def forward_ad_is_on() -> bool:
    return forward_ad._current_level >= 0


def refuse_forward_ad(op: str, *tensors):
    """A registered operator would return zero tangents without a word."""
    if not forward_ad_is_on():
        return
    if any(isinstance(t, Tensor) and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError(NO_FORWARD_AD.format(op))
