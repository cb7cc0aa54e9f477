"""Benchmark cases of attention with T5's learned relative position bias: its table's gradient is part of a step.

The op is `xformer_fast.attention(..., relative_bias=T5Bias(table))`, which never holds a bias of Sq x Sk. The others
gather the table to a dense bias, as Hugging Face's T5 does, and autograd scatters its gradient back.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from xformer_fast import T5Bias

from .attention import ATTENTION, AttentionCase
from .naive import naive_formula
from .op import Op
from .peers import Peer, Prepared

BUCKETS = 32
_GPU = {"devices": ("cuda",)}
_CASES = (
    AttentionCase("t5_1024_d64", 1, 8, 1024, 64, quick=True),
    AttentionCase("t5_4096_d64", 1, 8, 4096, 64),
    AttentionCase("t5_512_b8_d64", 8, 12, 512, 64),
    AttentionCase("t5_1k_b8_d64", 8, 16, 1024, 64, quick=True, **_GPU),
    AttentionCase("t5_4k_d64", 2, 16, 4096, 64, **_GPU),
)


def _inputs(case: AttentionCase, dtype: torch.dtype, device="cpu") -> dict[str, Any]:
    table = torch.randn(BUCKETS, case.heads, generator=torch.Generator().manual_seed(2))
    return ATTENTION.inputs(case, dtype, device) | {"table": table.to(device=device, dtype=dtype)}


def _call(module, inputs: dict[str, Any], **keywords) -> torch.Tensor:
    rest = {name: x for name, x in inputs.items() if name != "table"}
    return module.attention(**rest, relative_bias=T5Bias(inputs["table"]), **keywords)


def _dense(inputs: dict[str, Any]) -> torch.Tensor:
    """The bias of every pair, (1, heads, seqlen_q, seqlen_k), differentiable in the table."""
    table, (len_q, len_k) = inputs["table"], (inputs[name].shape[2] for name in ("query", "key"))
    distance = (
        torch.arange(len_k, device=table.device) - torch.arange(len_k - len_q, len_k, device=table.device)[:, None]
    )
    return F.embedding(T5Bias(table).buckets(distance), table).permute(2, 0, 1)[None]


def _naive(inputs: dict[str, Any]) -> torch.Tensor:
    return naive_formula(inputs["query"], inputs["key"], inputs["value"], _dense(inputs), None)


def _parts(inputs: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    group = inputs["query"].shape[1] // inputs["key"].shape[1]
    rest = {name: x for name, x in inputs.items() if name != "table"}
    for part, index in ATTENTION.parts(rest):
        first = index["key"][1].start * group
        heads = (slice(None), slice(first, first + group))
        yield part | {"table": inputs["table"][heads]}, index | {"table": heads}


class NaiveT5(Peer):
    materialises = True

    def __init__(self, *, compiled: bool = False):
        self.compiled, self.name = compiled, "naive-compiled" if compiled else "naive"

    def prepare(self, case, inputs):
        function = torch.compile(_naive, dynamic=False) if self.compiled else _naive
        return Prepared(lambda: function(inputs))


class SDPAT5(Peer):
    """SDPA with the dense bias; one that requires grad takes its math path."""

    name = "sdpa"
    materialises = True

    def prepare(self, case, inputs):
        query, key, value = (inputs[name] for name in ("query", "key", "value"))
        return Prepared(lambda: F.scaled_dot_product_attention(query, key, value, _dense(inputs)))


class FlexT5(Peer):
    """Compiled flex_attention, the bucket computed for every score."""

    name = "flex"

    def why_not(self, case, dtype, mode, device):
        return "FlexAttention has no backward on a CPU" if device == "cpu" and mode != "fwd" else None

    def prepare(self, case, inputs):
        from torch.nn.attention.flex_attention import flex_attention

        query, key, value, table = (inputs[name] for name in ("query", "key", "value", "table"))
        shift = case.seqlen_k - case.seqlen_q
        distance = torch.arange(1 - case.seqlen_k, case.seqlen_q, device=table.device)
        bucket = T5Bias(table).buckets(distance)

        def score_mod(score, b, h, i, j):
            return score + table[bucket[j - i - shift + case.seqlen_k - 1], h]

        compiled = torch.compile(flex_attention, dynamic=False)
        return Prepared(lambda: compiled(query, key, value, score_mod))


T5_ATTENTION = Op(
    cases=_CASES,
    inputs=_inputs,
    differentiable=("query", "key", "value", "table"),
    work=ATTENTION.work,
    score_elements=ATTENTION.score_elements,
    parts=_parts,
    tail=ATTENTION.tail,
    naive=_naive,
    peers=lambda device: [NaiveT5(), NaiveT5(compiled=True), SDPAT5(), FlexT5()],
    call=_call,
)
