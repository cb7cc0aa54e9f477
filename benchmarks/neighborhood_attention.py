"""Benchmark cases of neighborhood attention, from the packed projection to the map, and its peers.

The others: attention under a dense mask, by hand (naive) and by torch's SDPA; neighbours gathered by index (gather);
compiled FlexAttention with the neighbourhood as a block mask, which NATTEN itself falls back to. Masks and indices are
made outside the clock. The cases map_<side> show the time of a token as the map grows.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from xformer_fast import reference

from . import measure
from .naive import matmul
from .op import MODES, Op, Work
from .peers import Peer, Prepared


@dataclass(frozen=True)
class NeighborhoodCase:
    name: str
    space: tuple[int, ...]
    kernel: tuple[int, ...]
    batch: int = 1
    heads: int = 4
    head_dim: int = 32
    dilation: int = 1
    causal: bool = False
    bias: bool = False  # a table of relative biases, learned
    devices: tuple[str, ...] = ("cpu",)
    modes: tuple[str, ...] = MODES
    quick: bool = False

    @property
    def shape(self) -> str:
        space, kernel = ("x".join(map(str, sizes)) for sizes in (self.space, self.kernel))
        return f"({self.batch}, {space}, {self.heads}, {self.head_dim}), {kernel}"

    @property
    def tokens(self) -> int:
        return math.prod(self.space)

    def kept_pairs(self) -> int:
        """Of one head, over the batch."""
        pairs = self.batch
        for side, k in zip(self.space, self.kernel, strict=True):
            lengths = [len(range(g, side, self.dilation)) for g in range(self.dilation)]
            pairs *= sum(length * k - (k * (k - 1) // 2 if self.causal else 0) for length in lengths)
        return pairs


MOST_FLEX_TOKENS = 1 << 14
_BOTH = {"devices": ("cpu", "cuda")}
_GPU = {"devices": ("cuda",)}
_SIDES = (32, 64, 128, 256)
_CASES = (
    NeighborhoodCase("nat_56_k7", (56, 56), (7, 7), batch=4, quick=True),
    NeighborhoodCase("nat_56_k7_bias", (56, 56), (7, 7), batch=4, bias=True),
    NeighborhoodCase("nat_56_k7_dilation2", (56, 56), (7, 7), batch=4, dilation=2),
    NeighborhoodCase("nat_112_k7", (112, 112), (7, 7)),
    NeighborhoodCase("sequence_4096_k63", (4096,), (63,), heads=8, head_dim=64, quick=True),
    NeighborhoodCase("sequence_4096_k63_causal", (4096,), (63,), heads=8, head_dim=64, causal=True),
    NeighborhoodCase("video_8x28x28_k377", (8, 28, 28), (3, 7, 7)),
    NeighborhoodCase("nat_56_k7_b64", (56, 56), (7, 7), batch=64, quick=True, **_GPU),
    NeighborhoodCase("nat_56_k7_b64_bias", (56, 56), (7, 7), batch=64, bias=True, **_GPU),
    NeighborhoodCase("nat_56_k7_b64_dilation4", (56, 56), (7, 7), batch=64, dilation=4, **_GPU),
    NeighborhoodCase("sequence_16k_k255_causal", (16384,), (255,), 4, 16, 64, causal=True, quick=True, **_GPU),
    NeighborhoodCase("video_16x32x32_k377", (16, 32, 32), (3, 7, 7), 4, 8, 64, **_GPU),
    *(NeighborhoodCase(f"map_{n}", (n, n), (7, 7), heads=2, modes=("fwd", "both"), **_BOTH) for n in _SIDES),
)


def _inputs(case: NeighborhoodCase, dtype: torch.dtype, device="cpu") -> dict[str, Any]:
    generator = torch.Generator(device).manual_seed(zlib.crc32(case.name.encode()))

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    query, key, value = normal(case.batch, *case.space, 3, case.heads, case.head_dim).unbind(-3)
    inputs: dict[str, Any] = {"query": query, "key": key, "value": value, "kernel_size": case.kernel}
    if case.bias:
        inputs["relative_bias_table"] = normal(math.prod(2 * k - 1 for k in case.kernel), case.heads)
    return inputs | {"dilation": case.dilation, "causal": case.causal}


def _work(case: NeighborhoodCase, element: int) -> Work:
    rows = case.batch * case.tokens * case.heads * case.head_dim
    return Work(4.0 * case.heads * case.kept_pairs() * case.head_dim, element * 4.0 * rows)


def _parts(inputs: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """One part a head of a sample."""
    for b in range(inputs["query"].shape[0]):
        for h in range(inputs["query"].shape[-2]):
            one, head = slice(b, b + 1), slice(h, h + 1)
            index: dict[str, Any] = {n: (one, ..., head, slice(None)) for n in ("query", "key", "value", "out")}
            index["relative_bias_table"] = (slice(None), head)
            yield {n: x[index[n]] if n in index else x for n, x in inputs.items()}, index


def _tail(inputs: dict[str, Any], rows: int) -> dict[str, Any]:
    """The last `rows` heads."""
    return inputs | {
        n: x[:, -rows:] if n == "relative_bias_table" else x[..., -rows:, :]
        for n, x in inputs.items()
        if isinstance(x, torch.Tensor)
    }


# ---- the formula over gathered neighbours


def gather_indices(space, kernel, dilation, causal, device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For each query and the prod(kernel) keys of its window: key, row of the bias table, whether it is seen."""
    key, row = (torch.zeros(1, 1, dtype=torch.int64, device=device) for _ in range(2))
    seen = torch.ones(1, 1, dtype=torch.bool, device=device)
    for side, k in zip(space, kernel, strict=True):
        place = torch.arange(side, device=device)
        i, length = place // dilation, (side - place % dilation + dilation - 1) // dilation
        first = i - k + 1 if causal else (i - k // 2).clamp(min=0).minimum(length - k)
        j = first[:, None] + torch.arange(k, device=device)
        keys = (j.clamp(min=0) * dilation + place[:, None] % dilation, (j - i[:, None] + k - 1), j >= 0)
        units = side, 2 * k - 1
        key, row = (
            (total[:, None, :, None] * unit + along[:, None, :]).flatten(2).flatten(0, 1)
            for total, unit, along in zip((key, row), units, keys[:2], strict=True)
        )
        seen = (seen[:, None, :, None] & keys[2][:, None, :]).flatten(2).flatten(0, 1)
    return key, row, seen


def gathered(query, key, value, table, indices) -> torch.Tensor:
    """softmax over the gathered neighbours of each query: what one writes without a kernel and without a dense mask."""
    axes, space = query.dim() - 3, query.shape[1:-2]
    at, rows, seen = indices
    query, key, value = (x.flatten(1, axes).transpose(1, 2) for x in (query, key, value))  # (B, H, N, D)
    keys, values = (F.embedding(at, x.permute(2, 0, 1, 3).flatten(1)) for x in (key, value))  # (N, K, B * H * D)
    keys, values = (x.unflatten(2, (*query.shape[:2], -1)).permute(2, 3, 0, 1, 4) for x in (keys, values))
    scores = matmul(query[..., None, :], keys.transpose(-1, -2)).squeeze(-2) * query.shape[-1] ** -0.5
    if table is not None:
        scores = scores + F.embedding(rows, table).permute(2, 0, 1)
    weights = torch.softmax(scores.masked_fill(~seen, float("-inf")), -1)
    return matmul(weights[..., None, :], values).squeeze(-2).transpose(1, 2).unflatten(1, space)


def _indices(inputs: dict[str, Any]):
    query = inputs["query"]
    return gather_indices(query.shape[1:-2], inputs["kernel_size"], inputs["dilation"], inputs["causal"], query.device)


def _gathered(inputs: dict[str, Any]) -> torch.Tensor:
    return gathered(
        *(inputs[n] for n in ("query", "key", "value")), inputs.get("relative_bias_table"), _indices(inputs)
    )


def _call(module, inputs: dict[str, Any], **keywords) -> torch.Tensor:
    """`reference` holds all pairs of a map: the truth is the same formula over gathered neighbours."""
    return _gathered(inputs) if module is reference else module.neighborhood_attention(**inputs, **keywords)


# ---- peers


class Gather(Peer):
    name = "gather"
    materialises = True

    def prepare(self, case, inputs):
        tensors = (inputs[n] for n in ("query", "key", "value"))
        return Prepared(functools.partial(gathered, *tensors, inputs.get("relative_bias_table"), _indices(inputs)))


def flattened(inputs: dict[str, Any]) -> list[torch.Tensor]:
    """query, key and value as (B, H, N, D) views."""
    axes = inputs["query"].dim() - 3
    return [inputs[n].flatten(1, axes).transpose(1, 2) for n in ("query", "key", "value")]


def on_map(inputs: dict[str, Any], out: torch.Tensor) -> torch.Tensor:
    return out.transpose(1, 2).unflatten(1, inputs["query"].shape[1:-2])


class DenseMask(Peer):
    """Attention over the flattened map; the bias, where there is one, is gathered into the mask at each call."""

    def __init__(self, *, fused: bool):
        self.fused, self.name = fused, "sdpa" if fused else "naive"

    def why_not(self, case, dtype, mode, device):
        if self.fused and device == "cpu" and dtype is torch.float16:
            return "torch's float16 matrix product on a CPU runs at 0.3 GFLOP/s"
        pairs, heads = case.tokens**2, case.heads if case.bias else 1
        need = pairs * (10 + dtype.itemsize * 2 * heads)  # indices; the mask and its gradient
        if not self.fused:
            need += 5 * pairs * case.batch * case.heads * dtype.itemsize
        if need > 0.5 * measure.available_memory(device):
            return f"would take about {need / 2**30:.0f} GiB"
        return None

    def prepare(self, case, inputs):
        space, device = case.space, inputs["query"].device
        options = ((option,) * len(space) for option in (case.dilation, case.causal))
        seen, rows = reference.neighborhoods(space, case.kernel, *options, device)
        hidden = torch.zeros(seen.shape, dtype=inputs["query"].dtype, device=device).masked_fill(~seen, float("-inf"))

        def call():
            query, key, value = flattened(inputs)
            mask = hidden
            if case.bias:
                mask = mask + F.embedding(rows, inputs["relative_bias_table"]).permute(2, 0, 1)
            if self.fused:
                return on_map(inputs, F.scaled_dot_product_attention(query, key, value, mask))
            scores = matmul(query, key.transpose(-1, -2)) * query.shape[-1] ** -0.5
            return on_map(inputs, matmul(torch.softmax(scores + mask, -1), value))

        return Prepared(call)


class FlexNeighborhood(Peer):
    """Compiled flex_attention: the neighbourhood is a block mask, the bias a score modification."""

    name = "flex"

    def why_not(self, case, dtype, mode, device):
        if device == "cpu" and mode != "fwd":
            return "FlexAttention has no backward on a CPU"
        if case.tokens > MOST_FLEX_TOKENS:
            return "its block mask is made from all pairs of tokens"
        return None

    def prepare(self, case, inputs):
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        table, step = inputs.get("relative_bias_table"), case.dilation

        def axes_of(q, k):
            """(side, kernel, query's place, key's place) of each axis."""
            for side, kernel in reversed(list(zip(case.space, case.kernel, strict=True))):
                yield side, kernel, q % side, k % side
                q, k = q // side, k // side

        def mask_mod(b, h, q, k):
            seen = q >= 0
            for side, kernel, i, j in axes_of(q, k):
                group, length = i % step, (side - i % step + step - 1) // step
                seen = seen & (j % step == group)
                i, j = i // step, j // step
                if case.causal:
                    seen = seen & (j <= i) & (j > i - kernel)
                else:
                    first = torch.minimum((i - kernel // 2).clamp(min=0), length - kernel)
                    seen = seen & (j >= first) & (j < first + kernel)
            return seen

        def score_mod(score, b, h, q, k):
            row, unit = q * 0, 1
            for _, kernel, i, j in axes_of(q, k):
                row = row + (j // step - i // step + kernel - 1).clamp(0, 2 * kernel - 2) * unit
                unit *= 2 * kernel - 1
            return score + table[row, h]

        device = inputs["query"].device.type
        block_mask = torch.compile(create_block_mask)(mask_mod, None, None, case.tokens, case.tokens, device=device)
        compiled = torch.compile(flex_attention, dynamic=False)
        modified = score_mod if case.bias else None

        def donate_nothing():  # `bwd` runs one graph many times, which donated buffers forbid
            return torch._functorch.config.patch(donated_buffer=False)

        return Prepared(
            lambda: on_map(inputs, compiled(*flattened(inputs), modified, block_mask)), context=donate_nothing
        )


NEIGHBORHOOD = Op(
    cases=_CASES,
    inputs=_inputs,
    differentiable=("query", "key", "value", "relative_bias_table"),
    work=_work,
    score_elements=lambda case: case.batch * case.heads * case.tokens * math.prod(case.kernel) * case.head_dim,
    parts=_parts,
    tail=_tail,
    naive=_gathered,
    peers=lambda device: [DenseMask(fused=False), DenseMask(fused=True), Gather(), FlexNeighborhood()],
    call=_call,
)
