"""Benchmark cases of linear attention, and its peers: eager and compiled torch, in the forms that people write.

On a GPU also flash-linear-attention's chunked kernel, where installed (causal, unnormalised). Softmax attention at
growing lengths, for comparison, is `--op attention --case length_`.
"""

from __future__ import annotations

import functools
import importlib.util
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from xformer_fast import reference

from .op import MODES, Op, Work
from .peers import Peer, Prepared

CHUNK = 128


@dataclass(frozen=True)
class LinearCase:
    """elu + 1 over (batch, heads, seqlen, head_dim), queries as many as keys."""

    name: str
    batch: int
    heads: int
    seqlen: int
    head_dim: int
    causal: bool = False
    normalize: bool = True
    devices: tuple[str, ...] = ("cpu",)
    modes: tuple[str, ...] = MODES
    quick: bool = False

    @property
    def shape(self) -> str:
        return f"({self.batch}, {self.heads}, {self.seqlen}, {self.head_dim})"


_CPU = (
    LinearCase("full_8k_d64", 1, 8, 8192, 64, quick=True),
    LinearCase("causal_8k_d64", 1, 8, 8192, 64, causal=True, quick=True),
    LinearCase("full_2k_b4_d64", 4, 16, 2048, 64),
    LinearCase("causal_2k_b4_d64", 4, 16, 2048, 64, causal=True),
    LinearCase("causal_8k_d128", 1, 8, 8192, 128, causal=True),
)
_LENGTHS = tuple(
    LinearCase(f"length_{n // 1024}k", 1, 4, n, 64, causal=True, devices=("cpu", "cuda"), modes=("fwd",))
    for n in (1024, 8192, 65536, 262144)
)
_GPU = (
    *tuple(
        LinearCase(
            f"{'causal' if causal else 'full'}_8k_d{dim}",
            2,
            heads,
            8192,
            dim,
            causal=causal,
            devices=("cuda",),
            quick=dim == 128,
        )
        for dim, heads in ((64, 32), (128, 16), (256, 8))
        for causal in (False, True)
    ),
    LinearCase("plain_8k_d128", 2, 16, 8192, 128, causal=True, normalize=False, devices=("cuda",), quick=True),
)


def _inputs(case: LinearCase, dtype: torch.dtype, device="cpu") -> dict[str, Any]:
    generator = torch.Generator(device).manual_seed(zlib.crc32(case.name.encode()))
    shape = case.batch, case.heads, case.seqlen, case.head_dim
    tensors = {n: torch.randn(shape, generator=generator, device=device).to(dtype) for n in ("query", "key", "value")}
    return tensors | {"causal": case.causal, "normalize": case.normalize}


def _work(case: LinearCase, element: int) -> Work:
    """Two products with the state a token; causal half of two more within a chunk, which takes the place of one."""
    tokens = case.batch * case.heads * case.seqlen
    return Work((6.0 if case.causal else 4.0) * tokens * case.head_dim**2, 4.0 * element * tokens * case.head_dim)


def _parts(inputs: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """One part a head."""
    names = ("query", "key", "value")
    for b in range(inputs["query"].shape[0]):
        for h in range(inputs["query"].shape[1]):
            index = dict.fromkeys((*names, "out"), (slice(b, b + 1), slice(h, h + 1)))
            yield {n: x[index[n]] if n in names else x for n, x in inputs.items()}, index


def _tail(inputs: dict[str, Any], rows: int) -> dict[str, Any]:
    return inputs | {n: inputs[n][..., -rows:, :] for n in ("query", "out") if n in inputs}


def _naive(inputs: dict[str, Any]) -> torch.Tensor:
    return reference.linear_attention(**inputs)


# ---- the forms that torch users write


def _divide(out, total, normalize):
    return out / (total + 1e-6) if normalize else out


def whole(query, key, value, normalize):
    """Not causal: two products."""
    query, key = F.elu(query) + 1, F.elu(key) + 1
    return _divide(query @ (key.mT @ value), (query * key.sum(-2, keepdim=True)).sum(-1, keepdim=True), normalize)


def chunk_loop(query, key, value, normalize):
    """Causal: a loop over chunks that carries the state."""
    query, key = F.elu(query) + 1, F.elu(key) + 1
    seen = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=query.device).tril()
    kv = torch.zeros_like(key[..., :1, :].mT * value[..., :1, :])
    z, rows = torch.zeros_like(key[..., :1, :]), []
    for q, k, v in zip(query.split(CHUNK, 2), key.split(CHUNK, 2), value.split(CHUNK, 2), strict=True):
        scores = (q @ k.mT).masked_fill(~seen[: q.shape[2], : q.shape[2]], 0)
        total = (q * z).sum(-1, keepdim=True) + scores.sum(-1, keepdim=True)
        rows.append(_divide(q @ kv + scores @ v, total, normalize))
        kv, z = kv + k.mT @ v, z + k.sum(2, keepdim=True)
    return torch.cat(rows, 2)


def chunk_cumsum(query, key, value, normalize):
    """Causal: every chunk's state at once, by a cumulative sum."""
    query, key = F.elu(query) + 1, F.elu(key) + 1
    q, k, v = (t.unflatten(2, (-1, CHUNK)) for t in (query, key, value))
    seen = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=query.device).tril()
    kv, z = k.mT @ v, k.sum(3, keepdim=True)
    kv, z = (t.float().cumsum(2).to(t.dtype) - t for t in (kv, z))
    scores = (q @ k.mT).masked_fill(~seen, 0)
    total = (q * z).sum(-1, keepdim=True) + scores.sum(-1, keepdim=True)
    return _divide(q @ kv + scores @ v, total, normalize).flatten(2, 3)


class Torch(Peer):
    def __init__(self, name: str, function, *, causal: bool, compiled: bool = False):
        self.name, self.function = f"{name}-compiled" if compiled else name, function
        self.causal, self.compiled = causal, compiled

    def why_not(self, case, dtype, mode, device):
        if case.causal != self.causal:
            return "the form is for causal cases" if self.causal else "the form is for cases that are not causal"
        if device == "cpu" and dtype is torch.float16:
            return "torch's float16 matrix product on a CPU runs at 0.3 GFLOP/s"
        if self.causal and case.seqlen % CHUNK:
            return f"the length must divide by {CHUNK}"
        if self.compiled and case.seqlen > 16384:
            return "a loop of that many chunks takes minutes to compile, and cumulative sums take that much memory"
        return None

    def prepare(self, case, inputs):
        function = torch.compile(self.function, dynamic=False) if self.compiled else self.function
        return Prepared(functools.partial(function, *(inputs[n] for n in ("query", "key", "value", "normalize"))))


class FlashLinearAttention(Peer):
    """flash-linear-attention's chunked kernel: causal, map outside, no normaliser in the kernel."""

    name = "fla"

    def why_not(self, case, dtype, mode, device):
        if device != "cuda" or importlib.util.find_spec("fla") is None:
            return "flash-linear-attention needs a GPU and is an optional package"
        return None if case.causal and not case.normalize else "fla has causal, unnormalised kernels"

    def prepare(self, case, inputs):
        from fla.ops.linear_attn import chunk_linear_attn

        query, key, value = (inputs[n].transpose(1, 2) for n in ("query", "key", "value"))

        def call():
            out, _ = chunk_linear_attn(F.elu(query) + 1, F.elu(key) + 1, value, scale=1.0, normalize=False)
            return out.transpose(1, 2)

        return Prepared(call)


def peers(device: str) -> list[Peer]:
    torch_forms = [
        Torch("eager", whole, causal=False), Torch("eager", whole, causal=False, compiled=True),
        Torch("chunk-loop", chunk_loop, causal=True), Torch("chunk-cumsum", chunk_cumsum, causal=True),
        Torch("chunk-cumsum", chunk_cumsum, causal=True, compiled=True),
    ]  # fmt: skip
    if device == "cuda":
        return [*torch_forms, FlashLinearAttention()]
    return torch_forms


LINEAR_ATTENTION = Op(
    cases=_CPU + _LENGTHS + _GPU,
    inputs=_inputs,
    differentiable=("query", "key", "value"),
    work=_work,
    score_elements=lambda case: case.batch * case.heads * case.seqlen**2,
    parts=_parts,
    tail=_tail,
    naive=_naive,
    peers=peers,
)
