"""Benchmark cases of softmax attention."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .cpu_peers import OnnxRuntime, OpenVino, Zentorch
from .naive import naive_attention
from .op import MODES, Op, Work
from .peers import SDPA, Flex, Naive, Peer, SDPAChunks


@dataclass(frozen=True)
class AttentionCase:
    """Softmax attention of query (batch, heads, seqlen_q, head_dim) over seqlen_k keys; options as in the public op."""

    name: str
    batch: int
    heads: int
    seqlen_q: int
    head_dim: int
    heads_kv: int = 0  # 0: as many as heads
    seqlen_k: int = 0  # 0: as seqlen_q
    causal: bool = False
    window: tuple[int, int] | None = None
    global_keys: int = 0  # the first keys, seen beside the window
    padded: bool = False  # key_lengths spread evenly over [seqlen_k / 4, seqlen_k]
    alibi: bool = False
    bias: bool = (
        False  # float mask (1, heads, seqlen_q, seqlen_k) that is learned: its gradient is part of a training step
    )
    devices: tuple[str, ...] = ("cpu",)
    modes: tuple[str, ...] = MODES
    quick: bool = False

    def __post_init__(self):
        object.__setattr__(self, "heads_kv", self.heads_kv or self.heads)
        object.__setattr__(self, "seqlen_k", self.seqlen_k or self.seqlen_q)

    @property
    def shape(self) -> str:
        heads = f"{self.heads}/{self.heads_kv}" if self.heads != self.heads_kv else f"{self.heads}"
        length = f"{self.seqlen_q}x{self.seqlen_k}" if self.seqlen_q != self.seqlen_k else f"{self.seqlen_q}"
        return f"({self.batch}, {heads}, {length}, {self.head_dim})"

    @property
    def key_lengths(self) -> list[int] | None:
        if not self.padded:
            return None
        low = max(1, self.seqlen_k // 4)
        return [low + (self.seqlen_k - low) * (b + 1) // self.batch for b in range(self.batch)]

    def kept_pairs(self) -> int:
        """Number of (query, key) pairs of one head, summed over the batch, that no mask, window or length removes."""
        position = torch.arange(self.seqlen_q) + (self.seqlen_k - self.seqlen_q)
        left, right = self.window or (-1, -1)
        first = (position - left).clamp(min=0) if left >= 0 else torch.zeros_like(position)
        last = position + right if right >= 0 else torch.full_like(position, self.seqlen_k - 1)
        if self.causal:
            last = torch.minimum(last, position)
        lengths = self.key_lengths or [self.seqlen_k] * self.batch
        inside = sum(int((last.clamp(max=n - 1) - first + 1).clamp(min=0).sum()) for n in lengths)
        key = torch.arange(self.global_keys)
        beside = (key < first[:, None]) | ((key > last[:, None]) & (not self.causal))
        return inside + sum(int((beside & (key < n)).sum()) for n in lengths)


_BOTH_DEVICES = ("cpu", "cuda")

_ATTENTION_CPU = (
    AttentionCase("full_2048_d64", 1, 8, 2048, 64, quick=True),
    AttentionCase("full_4096_d64", 1, 8, 4096, 64),
    AttentionCase("causal_1024_d64", 1, 8, 1024, 64, causal=True, quick=True),
    AttentionCase("full_2048_d128", 1, 8, 2048, 128),
    AttentionCase("causal_gqa_1024_d128", 1, 32, 1024, 128, heads_kv=8, causal=True, quick=True),
    AttentionCase("causal_gqa_2048_d128", 1, 32, 2048, 128, heads_kv=8, causal=True),
    AttentionCase("bert_padded_128", 8, 12, 128, 64, padded=True, quick=True),
    AttentionCase("bert_512", 16, 12, 512, 64),
    AttentionCase("vit_197", 8, 12, 197, 64, quick=True),
    AttentionCase("swin_bias_49", 64, 3, 49, 32, bias=True, quick=True),
    AttentionCase("window_256_4096", 1, 8, 4096, 64, causal=True, window=(255, 0)),
    AttentionCase("longformer_512_4096", 1, 12, 4096, 64, window=(256, 256), global_keys=2),
    AttentionCase("alibi_2048", 1, 8, 2048, 64, alibi=True),
    AttentionCase("cross_1024x77_d40", 2, 8, 1024, 40, seqlen_k=77),
    AttentionCase("decode_8192_d128", 1, 32, 1, 128, heads_kv=8, seqlen_k=8192, causal=True, modes=("fwd",)),
    AttentionCase("overhead_16", 1, 8, 16, 64, devices=_BOTH_DEVICES, quick=True),
)


def _attention_gpu() -> Iterator[AttentionCase]:
    gpu = {"devices": ("cuda",)}
    for head_dim, heads in ((64, 32), (128, 16), (256, 8)):
        for seqlen in (1024, 2048, 4096, 8192, 16384, 32768):
            for causal in (False, True):
                name = f"{'causal' if causal else 'full'}_{seqlen // 1024}k_d{head_dim}"
                batch = max(1, 16384 // seqlen)
                # One length a head dim is enough for a quick look.
                quick = seqlen == 4096 and head_dim != 256
                yield AttentionCase(name, batch, heads, seqlen, head_dim, causal=causal, quick=quick, **gpu)
    for seqlen in (2048, 8192, 32768):
        batch = max(1, 8192 // seqlen)
        yield AttentionCase(
            f"causal_gqa_{seqlen // 1024}k_d128", batch, 64, seqlen, 128, heads_kv=8, causal=True, **gpu
        )
    yield AttentionCase("bias_1k_d64", 8, 16, 1024, 64, bias=True, **gpu)
    yield AttentionCase("bias_4k_d64", 1, 16, 4096, 64, bias=True, quick=True, **gpu)
    yield AttentionCase("alibi_4k_d64", 2, 32, 4096, 64, causal=True, alibi=True, **gpu)
    yield AttentionCase("padded_512_d64", 64, 16, 512, 64, padded=True, quick=True, **gpu)
    for seqlen in (8192, 32768):
        name, batch = f"window_1024_{seqlen // 1024}k_d128", 32768 // seqlen
        yield AttentionCase(name, batch, 16, seqlen, 128, causal=True, window=(1023, 0), quick=seqlen == 8192, **gpu)
    longformer = {"window": (256, 256), "global_keys": 2}
    yield AttentionCase("longformer_512_4k_d64", 8, 12, 4096, 64, quick=True, **longformer, **gpu)
    for batch, seqlen in ((1, 32768), (16, 8192), (64, 4096)):
        name = f"decode_b{batch}_{seqlen // 1024}k_d128"
        decode = {"heads_kv": 8, "seqlen_k": seqlen, "causal": True, "modes": ("fwd",)}
        yield AttentionCase(name, batch, 32, 1, 128, quick=batch == 16, **decode, **gpu)


def sweep_cases(lengths=(1024, 2048, 4096, 8192, 16384), *, heads=2, head_dim=64) -> tuple[AttentionCase, ...]:
    """A training step at growing length: time and peak memory against length."""
    return tuple(
        AttentionCase(f"length_{n}", 1, heads, n, head_dim, devices=_BOTH_DEVICES, modes=("both",)) for n in lengths
    )


def _attention_inputs(case: AttentionCase, dtype: torch.dtype, device="cpu") -> dict[str, Any]:
    generator = torch.Generator(device).manual_seed(zlib.crc32(case.name.encode()))

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    inputs: dict[str, Any] = {
        "query": normal(case.batch, case.heads, case.seqlen_q, case.head_dim),
        "key": normal(case.batch, case.heads_kv, case.seqlen_k, case.head_dim),
        "value": normal(case.batch, case.heads_kv, case.seqlen_k, case.head_dim),
    }
    if case.causal:
        inputs["causal"] = True
    if case.window:
        inputs["window"] = case.window
    if case.global_keys:
        inputs["global_keys"] = case.global_keys
    if case.padded:
        inputs["key_lengths"] = torch.tensor(case.key_lengths, dtype=torch.int32, device=device)
    if case.alibi:
        slopes = torch.pow(2.0, -8.0 / case.heads * torch.arange(1, case.heads + 1))
        inputs["alibi_slopes"] = slopes.to(device)
    if case.bias:
        inputs["mask"] = normal(1, case.heads, case.seqlen_q, case.seqlen_k)
    return inputs


def _attention_work(case: AttentionCase, element: int) -> Work:
    queries = case.batch * case.heads * case.seqlen_q * case.head_dim
    keys = case.batch * case.heads_kv * case.seqlen_k * case.head_dim
    bias = case.heads * case.seqlen_q * case.seqlen_k if case.bias else 0
    return Work(4.0 * case.heads * case.kept_pairs() * case.head_dim, element * (2.0 * queries + 2.0 * keys + bias))


def _attention_score_elements(case: AttentionCase) -> int:
    return case.batch * case.heads * case.seqlen_q * case.seqlen_k


def _attention_parts(inputs: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Cuts a problem into one part a KV head, so that a float64 check of a large case fits into memory.

    Yields (the part's inputs, for each argument, and for "out", the index that its gradient or result fills)."""
    query, key = inputs["query"], inputs["key"]
    group = query.shape[1] // key.shape[1]
    for b in range(query.shape[0]):
        for h in range(key.shape[1]):
            batch, heads = slice(b, b + 1), slice(h * group, (h + 1) * group)
            index: dict[str, Any] = {name: (batch, heads) for name in ("query", "out")}
            index |= {name: (batch, slice(h, h + 1)) for name in ("key", "value")}
            if "mask" in inputs:
                mask = inputs["mask"]
                index["mask"] = tuple(
                    i if n > 1 else slice(None) for i, n in zip((batch, heads), mask.shape, strict=False)
                )
            if "alibi_slopes" in inputs:
                index["alibi_slopes"] = (heads,) if inputs["alibi_slopes"].dim() == 1 else (batch, heads)
            if "key_lengths" in inputs:
                index["key_lengths"] = (batch,)
            yield {name: x[index[name]] if name in index else x for name, x in inputs.items()}, index


def _attention_tail(inputs: dict[str, Any], rows: int) -> dict[str, Any]:
    """The same problem (or its results) for the last `rows` queries, whose positions count from the end of the keys."""
    per_query = [name for name in ("query", "mask", "out") if name in inputs and inputs[name].shape[-2] > 1]
    return inputs | {name: inputs[name][..., -rows:, :] for name in per_query}


def _peers(device: str) -> list[Peer]:
    """Every peer of softmax attention that could be asked on this device type."""
    peers: list[Peer] = [Naive(), Naive(compiled=True), SDPA(), SDPA("flash"), SDPA("math"), SDPAChunks(), Flex()]
    if device == "cpu":
        return [*peers, OpenVino(), OnnxRuntime(), Zentorch()]
    return [*peers, SDPA("efficient"), SDPA("cudnn")]


ATTENTION = Op(
    cases=_ATTENTION_CPU + tuple(_attention_gpu()),
    inputs=_attention_inputs,
    differentiable=("query", "key", "value", "mask"),
    work=_attention_work,
    score_elements=_attention_score_elements,
    parts=_attention_parts,
    tail=_attention_tail,
    naive=naive_attention,
    peers=_peers,
)
