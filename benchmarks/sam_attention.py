"""Benchmark cases of attention with decomposed relative positions, as SAM's image encoder has: a global block's map of
64 x 64, and the 25 windows of 14 x 14 that such a map is padded and cut into.

The op is `xformer_fast.attention(..., decomposed_bias=(rel_h, rel_w))`, which never holds a bias of Sq x Sk. The others
add the two up to a dense bias, as Hugging Face's SAM does: they come from the query, so that no call can reuse it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from .attention import ATTENTION, AttentionCase
from .naive import naive_formula
from .op import Op, Work
from .peers import Peer, Prepared

MAP = ("rel_h", "rel_w")
_GPU = {"devices": ("cuda",)}
_CASES = (
    AttentionCase("sam_64x64_d64", 1, 12, 64 * 64, 64, quick=True),
    AttentionCase("sam_14x14_d64", 25, 12, 14 * 14, 64, quick=True),
    AttentionCase("sam_64x64_b4_d64", 4, 16, 64 * 64, 64, quick=True, **_GPU),
    AttentionCase("sam_14x14_b100_d64", 100, 16, 14 * 14, 64, **_GPU),
)


def side(case: AttentionCase) -> int:
    """Of the square map."""
    return math.isqrt(case.seqlen_k)


def _inputs(case: AttentionCase, dtype: torch.dtype, device="cpu") -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    shape = case.batch, case.heads, case.seqlen_q, side(case)
    rel = {name: torch.randn(shape, generator=generator).to(device=device, dtype=dtype) for name in MAP}
    return ATTENTION.inputs(case, dtype, device) | rel


def _split(inputs: dict[str, Any]) -> tuple[dict[str, Any], tuple[torch.Tensor, torch.Tensor]]:
    return {name: x for name, x in inputs.items() if name not in MAP}, (inputs["rel_h"], inputs["rel_w"])


def _call(module, inputs: dict[str, Any], **keywords) -> torch.Tensor:
    rest, rel = _split(inputs)
    return module.attention(**rest, decomposed_bias=rel, **keywords)


def _dense(inputs: dict[str, Any]) -> torch.Tensor:
    """The bias of every pair, (batch, heads, seqlen_q, seqlen_k)."""
    _, (rel_h, rel_w) = _split(inputs)
    return (rel_h[..., :, None] + rel_w[..., None, :]).flatten(3)


def _naive(inputs: dict[str, Any]) -> torch.Tensor:
    return naive_formula(inputs["query"], inputs["key"], inputs["value"], _dense(inputs), None)


def _work(case: AttentionCase, element: int) -> Work:
    plain = ATTENTION.work(case, element)
    return Work(plain.flops, plain.bytes + 2.0 * element * case.batch * case.heads * case.seqlen_q * side(case))


def _parts(inputs: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    rest, _ = _split(inputs)
    for part, index in ATTENTION.parts(rest):
        index = index | dict.fromkeys(MAP, index["query"])
        yield part | {name: inputs[name][index[name]] for name in MAP}, index


def _tail(inputs: dict[str, Any], rows: int) -> dict[str, Any]:
    present = [name for name in MAP if name in inputs]
    return ATTENTION.tail(inputs, rows) | {name: inputs[name][..., -rows:, :] for name in present}


class NaiveSAM(Peer):
    materialises = True

    def __init__(self, *, compiled: bool = False):
        self.compiled, self.name = compiled, "naive-compiled" if compiled else "naive"

    def prepare(self, case, inputs):
        function = torch.compile(_naive, dynamic=False) if self.compiled else _naive
        return Prepared(lambda: function(inputs))


class SDPASAM(Peer):
    """SDPA with the dense bias; one that requires grad takes its math path."""

    name = "sdpa"
    materialises = True

    def prepare(self, case, inputs):
        query, key, value = (inputs[name] for name in ("query", "key", "value"))
        return Prepared(lambda: F.scaled_dot_product_attention(query, key, value, _dense(inputs)))


class FlexSAM(Peer):
    """Compiled flex_attention, both numbers gathered for every score."""

    name = "flex"

    def why_not(self, case, dtype, mode, device):
        return "FlexAttention has no backward on a CPU" if device == "cpu" and mode != "fwd" else None

    def prepare(self, case, inputs):
        from torch.nn.attention.flex_attention import flex_attention

        query, key, value, rel_h, rel_w = (inputs[name] for name in ("query", "key", "value", *MAP))
        width = side(case)

        def score_mod(score, b, h, i, j):
            return score + rel_h[b, h, i, j // width] + rel_w[b, h, i, j % width]

        compiled = torch.compile(flex_attention, dynamic=False)
        return Prepared(lambda: compiled(query, key, value, score_mod))


SAM_ATTENTION = Op(
    cases=_CASES,
    inputs=_inputs,
    differentiable=("query", "key", "value", *MAP),
    work=_work,
    score_elements=ATTENTION.score_elements,
    parts=_parts,
    tail=_tail,
    naive=_naive,
    peers=lambda device: [NaiveSAM(), NaiveSAM(compiled=True), SDPASAM(), FlexSAM()],
    call=_call,
)
