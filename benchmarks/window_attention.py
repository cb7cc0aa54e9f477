"""Benchmark cases of windowed attention (Swin, Swin-V2, MaxViT), from the packed projection to the map, and its peers.

The others do what the models do in torch: roll, partition, attend with a dense bias and mask, reverse, roll back. The
mask is made outside the clock; so is the bias where no gradient is asked for. `naive` and `sdpa` are the attention of
timm's Swin without and with its fused_attn, in eager mode and compiled.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from xformer_fast import reference

from .naive import matmul
from .op import Op, Work
from .peers import Peer, Prepared


@dataclass(frozen=True)
class WindowCase:
    name: str
    batch: int
    side: int
    heads: int
    window: int = 7
    head_dim: int = 32
    shift: int = 0
    cosine: bool = False
    partition: str = "window"
    devices: tuple[str, ...] = ("cpu",)
    modes: tuple[str, ...] = ("fwd", "bwd", "both")
    quick: bool = False

    @property
    def shape(self) -> str:
        return f"({self.batch}, {self.side}x{self.side}, {self.heads}, {self.head_dim}), {self.window}x{self.window}"


_GPU = {"devices": ("cuda",)}
_CASES = (
    WindowCase("swin_stage1_shift", 8, 56, 3, shift=3, quick=True),
    WindowCase("swin_stage1", 8, 56, 3),
    WindowCase("swin_stage2_shift", 8, 28, 6, shift=3),
    WindowCase("swin_stage3_shift", 8, 14, 12, shift=3),
    WindowCase("swin_stage4", 8, 7, 24),
    WindowCase("swin_v2_stage1_shift", 8, 64, 3, window=8, shift=4, cosine=True),
    WindowCase("swin_v2_stage3_shift", 8, 16, 12, window=8, shift=4, cosine=True),
    WindowCase("maxvit_window", 8, 56, 2, partition="window"),
    WindowCase("maxvit_grid", 8, 56, 2, partition="grid"),
    WindowCase("swin_stage1_b128_shift", 128, 56, 3, shift=3, quick=True, **_GPU),
    WindowCase("swin_stage1_b128", 128, 56, 3, **_GPU),
    WindowCase("swin_stage2_b128_shift", 128, 28, 6, shift=3, **_GPU),
    WindowCase("swin_stage3_b128_shift", 128, 14, 12, shift=3, **_GPU),
    WindowCase("swin_stage4_b128", 128, 7, 24, **_GPU),
    WindowCase("swin_v2_stage1_b128_shift", 128, 64, 3, window=8, shift=4, cosine=True, quick=True, **_GPU),
    WindowCase("swin_v2_stage3_b128_shift", 128, 16, 12, window=8, shift=4, cosine=True, **_GPU),
    WindowCase("swin_v2_384_stage1_b8_shift", 8, 96, 3, window=24, shift=12, cosine=True, **_GPU),
    WindowCase("maxvit_window_b128", 128, 56, 2, **_GPU),
    WindowCase("maxvit_grid_b128", 128, 56, 2, partition="grid", **_GPU),
)


def _inputs(case: WindowCase, dtype: torch.dtype, device="cpu") -> dict[str, Any]:
    generator = torch.Generator(device).manual_seed(zlib.crc32(case.name.encode()))

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    query, key, value = normal(case.batch, case.side, case.side, 3, case.heads, case.head_dim).unbind(3)
    inputs: dict[str, Any] = {"query": query, "key": key, "value": value, "window_size": case.window}
    if case.cosine:  # Swin-V2 computes its bias, of up to 16, from a small network
        inputs["bias"] = 16 * torch.sigmoid(normal(case.heads, case.window**2, case.window**2))
        inputs["logit_scale"] = normal(case.heads).exp() * 10
    else:
        inputs["relative_bias_table"] = normal((2 * case.window - 1) ** 2, case.heads)
    return inputs | {"shift": case.shift, "partition": case.partition}


def window_mask(inputs: dict[str, Any]) -> torch.Tensor | None:
    """(windows, 1, tokens, tokens), 0 or -inf, in the query's dtype; None where nothing was rolled."""
    query, window, shift = inputs["query"], inputs["window_size"], inputs["shift"]
    if not shift:
        return None
    sides, sizes, shifts = tuple(query.shape[1:3]), (window, window), (shift, shift)
    region = reference.split_windows(reference.wrapped_regions(sides, sizes, shifts, query.device), sizes, False)
    region = region[0, :, 0, :, 0]
    mask = torch.zeros(region.shape[0], 1, window**2, window**2, dtype=query.dtype, device=query.device)
    return mask.masked_fill((region[:, :, None] != region[:, None])[:, None], float("-inf"))


def window_bias(inputs: dict[str, Any], index: torch.Tensor) -> torch.Tensor:
    """(heads, tokens, tokens), gathered from the table where there is one."""
    if "bias" in inputs:
        return inputs["bias"]
    return inputs["relative_bias_table"][index.view(-1)].view(*index.shape, -1).permute(2, 0, 1)


def model_formula(inputs: dict[str, Any], mask, bias, index, *, fused: bool) -> torch.Tensor:
    """What the models write; `fused`: by torch's scaled_dot_product_attention. bias None: gathered here."""
    query, key, value = (inputs[name] for name in ("query", "key", "value"))
    batch, height, width, heads, dim = query.shape
    w, shift, grid = inputs["window_size"], inputs["shift"], inputs["partition"] == "grid"
    rows, columns = height // w, width // w

    def split(x):
        x = torch.roll(x, (-shift, -shift), (1, 2)) if shift else x
        if grid:
            x = x.view(batch, w, rows, w, columns, heads, dim).permute(0, 2, 4, 5, 1, 3, 6)
        else:
            x = x.view(batch, rows, w, columns, w, heads, dim).permute(0, 1, 3, 5, 2, 4, 6)
        return x.reshape(batch * rows * columns, heads, w * w, dim)

    query, key, value = split(query), split(key), split(value)
    scale = dim**-0.5
    if "logit_scale" in inputs:
        query = F.normalize(query, dim=-1) * inputs["logit_scale"][:, None, None]
        key, scale = F.normalize(key, dim=-1), 1.0
    bias = window_bias(inputs, index)[None] if bias is None else bias
    if mask is not None and bias.shape[0] == 1:
        bias = (bias + mask).repeat(batch, 1, 1, 1)
    if fused:
        out = F.scaled_dot_product_attention(query, key, value, bias, scale=scale)
    else:
        out = matmul(torch.softmax(matmul(query, key.transpose(-1, -2)) * scale + bias, -1), value)
    out = out.view(batch, rows, columns, heads, w, w, dim)
    out = out.permute(0, 4, 1, 5, 2, 3, 6) if grid else out.permute(0, 1, 4, 2, 5, 3, 6)
    out = out.reshape(batch, height, width, heads, dim)
    return torch.roll(out, (shift, shift), (1, 2)) if shift else out


def _index(inputs: dict[str, Any]) -> torch.Tensor:
    return reference.relative_index((inputs["window_size"],) * 2, inputs["query"].device)


def _naive(inputs: dict[str, Any]) -> torch.Tensor:
    return model_formula(inputs, window_mask(inputs), None, _index(inputs), fused=False)


def _work(case: WindowCase, element: int) -> Work:
    rows = case.batch * case.side**2 * case.heads
    return Work(4.0 * rows * case.window**2 * case.head_dim, element * 4.0 * rows * case.head_dim)


def _parts(inputs: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """One part a head."""
    for h in range(inputs["query"].shape[-2]):
        one = slice(h, h + 1)
        index: dict[str, Any] = {n: (..., one, slice(None)) for n in ("query", "key", "value", "out")}
        index |= {"relative_bias_table": (..., one), "bias": (one,), "logit_scale": (one,)}
        yield {n: x[index[n]] if n in index else x for n, x in inputs.items()}, index


class ModelPath(Peer):
    """The models' own sequence of torch operations."""

    def __init__(self, *, fused: bool, compiled: bool):
        self.fused, self.compiled, self.materialises = fused, compiled, not fused
        self.name = ("sdpa" if fused else "naive") + ("-compiled" if compiled else "")

    def prepare(self, case, inputs):
        mask, index, bias = window_mask(inputs), _index(inputs), None
        if not any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs.values()):
            bias = window_bias(inputs, index)[None].contiguous()
            bias = bias if mask is None else (bias + mask).repeat(case.batch, 1, 1, 1)
        function = torch.compile(model_formula, dynamic=False) if self.compiled else model_formula
        return Prepared(lambda: function(inputs, mask, bias, index, fused=self.fused))


WINDOW = Op(
    cases=_CASES,
    inputs=_inputs,
    differentiable=("query", "key", "value", "relative_bias_table", "bias", "logit_scale"),
    work=_work,
    score_elements=lambda case: case.batch * case.heads * case.side**2 * case.window**2,
    parts=_parts,
    tail=lambda inputs, rows: inputs,
    naive=_naive,
    peers=lambda device: [ModelPath(fused=f, compiled=c) for f in (False, True) for c in (False, True)],
)
