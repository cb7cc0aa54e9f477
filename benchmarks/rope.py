"""Benchmark cases of rotary position embedding, and who else rotates.

`clone` is no peer but the bound: it copies x and rotates nothing, so it is given the formula's result to be judged by,
and its time is what reading x and writing as much costs at least.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .op import MODES, Op, Work
from .peers import Peer, Prepared


@dataclass(frozen=True)
class RopeCase:
    """Rotation of x (batch, heads, seqlen, head_dim) at positions 0..seqlen-1; `rotary` channels of head_dim turn."""

    name: str
    batch: int
    heads: int
    seqlen: int
    head_dim: int
    rotary: int = 0  # 0: all
    interleaved: bool = False
    devices: tuple[str, ...] = ("cpu",)
    modes: tuple[str, ...] = MODES
    quick: bool = False

    @property
    def shape(self) -> str:
        return f"({self.batch}, {self.heads}, {self.seqlen}, {self.head_dim})"


_CASES = (
    RopeCase("rope_2048_d128", 1, 32, 2048, 128, quick=True),
    RopeCase("rope_2048_d64", 1, 8, 2048, 64),
    RopeCase("interleaved_2048_d128", 1, 32, 2048, 128, interleaved=True),
    RopeCase("partial_2048_d128", 1, 32, 2048, 128, rotary=64),
    RopeCase("token_d128", 1, 32, 1, 128, modes=("fwd",), quick=True),
    RopeCase("gpu_4k_d128", 4, 32, 4096, 128, devices=("cuda",), quick=True),
    RopeCase("gpu_interleaved_4k_d128", 4, 32, 4096, 128, interleaved=True, devices=("cuda",), quick=True),
    RopeCase("gpu_4k_d64", 8, 32, 4096, 64, devices=("cuda",)),
)


@dataclass(frozen=True)
class RopeWork(Work):
    def of(self, mode: str) -> Work:  # backward is the rotation back
        steps = 2.0 if mode == "both" else 1.0
        return Work(self.flops * steps, self.bytes * steps)


def _inputs(case: RopeCase, dtype: torch.dtype, device="cpu") -> dict[str, Any]:
    from xformer_fast import rope_frequencies, rope_tables

    generator = torch.Generator(device).manual_seed(zlib.crc32(case.name.encode()))
    shape = case.batch, case.heads, case.seqlen, case.head_dim
    inv_freq, _ = rope_frequencies(case.rotary or case.head_dim)
    cos, sin = (table.to(device) for table in rope_tables(inv_freq, case.seqlen))
    inputs = {"x": torch.randn(shape, generator=generator, device=device).to(dtype), "cos": cos, "sin": sin}
    return {**inputs, "interleaved": True} if case.interleaved else inputs


def _work(case: RopeCase, element: int) -> Work:
    channels = case.batch * case.heads * case.seqlen * case.head_dim
    rotary = case.rotary or case.head_dim
    return RopeWork(3.0 * channels * rotary / case.head_dim, 2.0 * element * channels + 4.0 * case.seqlen * rotary)


def _parts(inputs: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """One part a head."""
    for h in range(inputs["x"].shape[1]):
        head = (slice(None), slice(h, h + 1))
        yield inputs | {"x": inputs["x"][head]}, {"x": head, "out": head}


def _tail(inputs: dict[str, Any], rows: int) -> dict[str, Any]:
    return inputs | {n: inputs[n][..., -rows:, :] for n in ("x", "cos", "sin", "out") if n in inputs}


# ---- the forms in which models write it


def halves(x, cos, sin, interleaved=False):
    """Each half, or each of two neighbours, on its own, in float32: what torch.compile does best with."""
    rotary = 2 * cos.shape[-1]
    head, tail = x[..., :rotary].float(), x[..., rotary:]
    if interleaved:
        a, b = head[..., ::2], head[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    else:
        a, b = head.chunk(2, -1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    return torch.cat((turned.to(x.dtype), tail), -1) if tail.shape[-1] else turned.to(x.dtype)


def rotate_half(x, cos, sin, *, upcast=False):
    """Hugging Face's form, with cos and sin twice as wide; in x's dtype there, or in float32."""
    rotary = cos.shape[-1]
    head, tail = x[..., :rotary], x[..., rotary:]
    head = head.float() if upcast else head
    a, b = head.chunk(2, -1)
    turned = (head * cos + torch.cat((-b, a), -1) * sin).to(x.dtype)
    return torch.cat((turned, tail), -1) if tail.shape[-1] else turned


class Form(Peer):
    """One of the forms, eager or compiled."""

    def __init__(self, name: str, *, half: bool, compiled: bool):
        self.name, self.half, self.compiled = name, half, compiled

    def why_not(self, case, dtype, mode, device):
        return "Hugging Face's form knows no interleaved pairs" if self.half and case.interleaved else None

    def prepare(self, case, inputs):
        function = functools.partial(rotate_half, upcast=self.compiled) if self.half else halves
        if self.half:
            x, dtype = inputs["x"], torch.float32 if self.compiled else inputs["x"].dtype
            tables = [torch.cat((inputs[name],) * 2, -1).to(dtype) for name in ("cos", "sin")]
            arguments = (x, *tables)
        else:
            arguments = tuple(inputs.values())
        return Prepared(
            functools.partial(torch.compile(function, dynamic=False) if self.compiled else function, *arguments)
        )


class Clone(Peer):
    name = "clone"

    def why_not(self, case, dtype, mode, device):
        return None if mode == "fwd" else "a copy has no backward of its own"

    def prepare(self, case, inputs):
        expected = halves(**inputs)
        return Prepared(inputs["x"].clone, output=lambda result: expected)


class Liger(Peer):
    """Liger's Triton kernel, which rotates query and key in place of their copies: here the key is one head."""

    name = "liger"

    @property
    def version(self) -> str:
        return importlib.metadata.version("liger-kernel")

    def why_not(self, case, dtype, mode, device):
        if device != "cuda" or importlib.util.find_spec("liger_kernel") is None:
            return "liger-kernel is not installed, or there is no GPU"
        return "rotates halves of the whole head" if case.interleaved or case.rotary else None

    def prepare(self, case, inputs):
        from liger_kernel.transformers.rope import liger_rotary_pos_emb

        x = inputs["x"]
        tables = [torch.cat((inputs[name],) * 2, -1)[None].to(x.dtype) for name in ("cos", "sin")]
        key = x.detach()[:, :1].clone()
        return Prepared(lambda: liger_rotary_pos_emb(x, key, *tables)[0])


def _peers(device: str) -> list[Peer]:
    return [
        Form("naive", half=False, compiled=False),
        Form("rotate-half", half=True, compiled=False),
        Form("rotate-half-compiled", half=True, compiled=True),
        Form("halves-compiled", half=False, compiled=True),
        Clone(),
        Liger(),
    ]


ROPE = Op(
    cases=_CASES,
    inputs=_inputs,
    differentiable=("x",),
    work=_work,
    score_elements=lambda case: case.batch * case.heads * case.seqlen * case.head_dim,
    parts=_parts,
    tail=_tail,
    naive=lambda inputs: halves(**inputs),
    peers=_peers,
)
