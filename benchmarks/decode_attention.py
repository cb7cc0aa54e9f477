"""Benchmark cases of decoding from a KV cache, and who is timed beside it."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from .attention import AttentionCase
from .naive import naive_formula, structure
from .op import Op, Work
from .peers import Peer, Prepared


@dataclass(frozen=True)
class DecodeCase:
    """`tokens` queries a sequence over `length` cached keys, the tokens' own included; page_size 0: contiguous."""

    name: str
    batch: int
    heads: int
    heads_kv: int
    length: int
    head_dim: int
    tokens: int = 1
    page_size: int = 0
    devices: tuple[str, ...] = ("cpu",)
    modes: tuple[str, ...] = ("fwd",)
    quick: bool = False

    @property
    def shape(self) -> str:
        heads = f"{self.heads}/{self.heads_kv}" if self.heads != self.heads_kv else f"{self.heads}"
        return f"({self.batch}, {heads}, {self.tokens}x{self.length}, {self.head_dim})"

    @property
    def as_attention(self) -> AttentionCase:
        return AttentionCase(
            self.name, self.batch, self.heads, self.tokens, self.head_dim, heads_kv=self.heads_kv,
            seqlen_k=self.length, causal=self.tokens > 1,
        )  # fmt: skip


_GPU = {"devices": ("cuda",)}
_CASES = (
    DecodeCase("decode_8192_d128", 1, 32, 8, 8192, 128, quick=True),
    DecodeCase("decode_4096_d64", 1, 8, 8, 4096, 64),
    DecodeCase("decode_b8_1024_d128", 8, 32, 8, 1024, 128),
    DecodeCase("decode_mqa_8192_d128", 1, 32, 1, 8192, 128),
    DecodeCase("speculative_8_8192_d128", 1, 32, 8, 8192, 128, tokens=8),
    DecodeCase("paged_16_8192_d128", 1, 32, 8, 8192, 128, page_size=16),
    DecodeCase("overhead_128_d64", 1, 8, 8, 128, 64, quick=True),
    DecodeCase("decode_b1_32k_d128", 1, 32, 8, 32768, 128, **_GPU),
    DecodeCase("decode_b16_8k_d128", 16, 32, 8, 8192, 128, quick=True, **_GPU),
    DecodeCase("decode_b64_4k_d128", 64, 32, 8, 4096, 128, **_GPU),
    DecodeCase("speculative_8_b16_8k_d128", 16, 32, 8, 8192, 128, tokens=8, **_GPU),
    DecodeCase("paged_16_b16_8k_d128", 16, 32, 8, 8192, 128, page_size=16, **_GPU),
    DecodeCase("paged_256_b16_8k_d128", 16, 32, 8, 8192, 128, page_size=256, **_GPU),
)


def _inputs(case: DecodeCase, dtype: torch.dtype, device="cpu") -> dict[str, Any]:
    generator = torch.Generator(device).manual_seed(zlib.crc32(case.name.encode()))

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    rows, keys = case.batch, case.length
    pages = -(-case.length // case.page_size) if case.page_size else 0
    if case.page_size:
        rows, keys = case.batch * pages, case.page_size
    inputs: dict[str, Any] = {
        "query": normal(case.batch, case.heads, case.tokens, case.head_dim),
        "key_cache": normal(rows, case.heads_kv, keys, case.head_dim),
        "value_cache": normal(rows, case.heads_kv, keys, case.head_dim),
        "cache_lengths": torch.full((case.batch,), case.length, dtype=torch.int32, device=device),
    }
    if case.page_size:
        order = torch.randperm(rows, generator=generator, device=device)
        inputs["block_table"] = order.to(torch.int32).view(case.batch, pages)
    return inputs


def dense(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same call for `attention`: query, key, value; pages are gathered."""
    key, value = inputs["key_cache"], inputs["value_cache"]
    if "block_table" in inputs:
        table, length = inputs["block_table"].long(), int(inputs["cache_lengths"][0])
        key, value = (t[table].transpose(1, 2).flatten(2, 3)[:, :, :length] for t in (key, value))
    query = inputs["query"]
    return {"query": query, "key": key, "value": value, **({"causal": True} if query.shape[2] > 1 else {})}


def _naive(inputs: dict[str, Any]) -> torch.Tensor:
    inputs = dense(inputs)
    query, key, value = (inputs[name] for name in ("query", "key", "value"))
    return naive_formula(query, key, value, None, structure(query, key, causal=True))


def _work(case: DecodeCase, element: int) -> Work:
    pairs = case.batch * case.heads * (case.tokens * case.length - case.tokens * (case.tokens - 1) // 2)
    queries = case.batch * case.heads * case.tokens * case.head_dim
    keys = case.batch * case.heads_kv * case.length * case.head_dim
    return Work(4.0 * pairs * case.head_dim, element * 2.0 * (queries + keys))


def _parts(inputs: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """One part a sequence."""
    per_sequence = ["query", "cache_lengths", "block_table"]
    per_sequence += [] if "block_table" in inputs else ["key_cache", "value_cache"]
    for b in range(inputs["query"].shape[0]):
        one = (slice(b, b + 1),)
        yield {n: x[one] if n in per_sequence else x for n, x in inputs.items()}, {"query": one, "out": one}


class AsAttention(Peer):
    """A peer of `attention`, with the cache as its keys and values."""

    def __init__(self, peer: Peer):
        self.peer, self.name, self.materialises = peer, peer.name, peer.materialises

    @property
    def version(self) -> str:
        return self.peer.version

    def why_not(self, case, dtype, mode, device):
        if case.page_size:
            return "reads no paged cache"
        return self.peer.why_not(case.as_attention, dtype, mode, device)

    def prepare(self, case, inputs):
        return self.peer.prepare(case.as_attention, dense(inputs))


class Naive(Peer):
    name = "naive"
    materialises = True

    def prepare(self, case, inputs):
        return Prepared(functools.partial(_naive, inputs))


class GroupedSDPA(Peer):
    """SDPA with the query heads of a KV head as queries of one head, so that it reads each key once."""

    name = "sdpa-grouped"

    def why_not(self, case, dtype, mode, device):
        if case.page_size:
            return "reads no paged cache"
        return None if case.heads != case.heads_kv else "there is one query head a KV head"

    def prepare(self, case, inputs):
        query, key, value = inputs["query"], inputs["key_cache"], inputs["value_cache"]
        folded = query.shape[0], case.heads_kv, -1, case.head_dim
        mask = structure(query, key, causal=True)
        if mask is not None:
            mask = mask.repeat(case.heads // case.heads_kv, 1)

        def call():
            return F.scaled_dot_product_attention(query.reshape(folded), key, value, mask).reshape(query.shape)

        return Prepared(call)


def _peers(device: str) -> list[Peer]:
    from .cpu_peers import OnnxRuntime, OpenVino, Zentorch
    from .peers import SDPA, Flex

    shared: list[Peer] = [SDPA(), SDPA("flash"), SDPA("math"), Flex()]
    shared += [OpenVino(), OnnxRuntime(), Zentorch()] if device == "cpu" else [SDPA("efficient"), SDPA("cudnn")]
    return [Naive(), GroupedSDPA(), *map(AsAttention, shared)]


DECODE = Op(
    cases=_CASES,
    inputs=_inputs,
    differentiable=(),
    work=_work,
    score_elements=lambda case: case.batch * case.heads * case.tokens * case.length,
    parts=_parts,
    tail=lambda inputs, rows: inputs,
    naive=_naive,
    peers=_peers,
)
