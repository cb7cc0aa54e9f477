"""Who is timed beside xformer_fast: naive attention, each backend of torch's SDPA, compiled FlexAttention, and others.

A peer has a name, `why_not(case, dtype, mode, device) -> reason or None`, and `prepare(case, inputs) -> Prepared`.
What a peer needs besides the call (dense masks, its own layout, compilation) happens in `prepare`, outside the clock.
A peer that raises while it runs a case is reported with its error, never dropped.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .naive import keep_mask, naive_formula, split_options, structure


class CannotRun(Exception):
    """This peer has nothing for the case; the message says why."""


@dataclass
class Prepared:
    call: Callable[[], Any]
    output: Callable[[Any], torch.Tensor] = lambda result: result  # what call() returns -> (B, Hq, Sq, Dv) tensor
    context: Callable[[], Any] = contextlib.nullcontext  # entered around a series of calls, outside the clock


class Peer:
    name: str
    materialises = False  # holds scores of the whole problem in memory

    @property
    def version(self) -> str:
        return torch.__version__

    def why_not(self, case, dtype: torch.dtype, mode: str, device: str) -> str | None:
        return None

    def prepare(self, case, inputs: dict[str, Any]) -> Prepared:
        raise NotImplementedError


class XformerFast(Peer):
    """The package itself: with the backend that it chooses, or with a named one."""

    def __init__(self, op: str, backend: str | None = None, caller: Callable[..., Any] | None = None):
        self.op, self.backend, self.caller = op, backend, caller
        self.name = f"xformer_fast:{backend}" if backend else "xformer_fast"

    @property
    def version(self) -> str:
        import xformer_fast

        return xformer_fast.__version__

    def prepare(self, case, inputs):
        import xformer_fast

        if self.caller is None:
            return Prepared(functools.partial(getattr(xformer_fast, self.op), backend=self.backend, **inputs))
        return Prepared(functools.partial(self.caller, xformer_fast, inputs, backend=self.backend))


class Naive(Peer):
    name = "naive"

    materialises = True

    def __init__(self, *, compiled: bool = False):
        self.compiled = compiled
        if compiled:
            self.name = "naive-compiled"

    def prepare(self, case, inputs):
        query, key, value, mask, options = split_options(inputs)
        bias = structure(query, key, **options)
        function = torch.compile(naive_formula, dynamic=False) if self.compiled else naive_formula
        return Prepared(functools.partial(function, query, key, value, mask, bias))


_SDPA_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


class SDPA(Peer):
    """torch's scaled_dot_product_attention: its own choice of backend, or a forced one."""

    def __init__(self, backend: str | None = None):
        self.backend = backend
        self.name = f"sdpa-{backend}" if backend else "sdpa"
        self.materialises = backend == "math"

    def why_not(self, case, dtype, mode, device):
        if device == "cpu" and self.backend in ("efficient", "cudnn"):
            return f"SDPA's {self.backend} backend is for CUDA"
        if device == "cpu" and self.backend == "math" and dtype is torch.float16:
            return "torch's float16 matrix product on a CPU runs at 0.3 GFLOP/s"
        return None

    def prepare(self, case, inputs):
        query, key, value, mask, options = split_options(inputs)
        options = dict(options)
        square = query.shape[-2] == key.shape[-2]
        is_causal = bool(options.get("causal")) and square and mask is None and len(options) == 1
        bias = None if is_causal else structure(query, key, **options)
        gqa = query.shape[1] != key.shape[1]

        def call():
            attn_mask = mask if bias is None else bias if mask is None else mask + bias
            return F.scaled_dot_product_attention(query, key, value, attn_mask, is_causal=is_causal, enable_gqa=gqa)

        if self.backend is None:
            return Prepared(call)
        with sdpa_kernel(_SDPA_BACKENDS[self.backend]):
            try:
                call()
            except RuntimeError as error:
                if "No available kernel" not in str(error):
                    raise
                raise CannotRun(f"SDPA's {self.backend} backend has no kernel for this case") from None
        return Prepared(call, context=lambda: sdpa_kernel(_SDPA_BACKENDS[self.backend]))


class SDPAChunks(Peer):
    """A causal window as SDPA over chunks: each chunk of `window` queries sees its own keys and the chunk's before."""

    name = "sdpa-chunks"

    def why_not(self, case, dtype, mode, device):
        if not case.window or not case.causal or case.global_keys or case.padded or case.alibi or case.bias:
            return "only for a causal window and nothing else"
        if case.seqlen_q != case.seqlen_k or case.seqlen_q % (case.window[0] + 1) or case.heads != case.heads_kv:
            return "needs as many queries as keys, a length that the window divides, and as many KV heads as heads"
        return None

    def prepare(self, case, inputs):
        query, key, value = inputs["query"], inputs["key"], inputs["value"]
        width = case.window[0] + 1
        chunks = case.seqlen_q // width
        i = torch.arange(width, device=query.device)[:, None]
        j = torch.arange(2 * width, device=query.device)  # key j of chunk c stands at (c - 1) * width + j
        keep = ((j > i) & (j <= i + width)).repeat(chunks, 1, 1)
        keep[0, :, :width] = False
        bias = torch.zeros(keep.shape, dtype=query.dtype, device=query.device).masked_fill(~keep, float("-inf"))[None]

        def pairs(x):  # (batch * heads, chunks, 2 * width, head_dim), a view of the padded keys
            return F.pad(x, (0, 0, width, 0)).flatten(0, 1).unfold(1, 2 * width, width).transpose(2, 3)

        def call():
            folded = query.reshape(-1, chunks, width, query.shape[-1])
            return F.scaled_dot_product_attention(folded, pairs(key), pairs(value), bias).reshape(query.shape)

        return Prepared(call)


class Flex(Peer):
    """Compiled flex_attention: causal, window and lengths as a block mask, ALiBi and bias as a score modification."""

    name = "flex"

    def why_not(self, case, dtype, mode, device):
        if device == "cpu" and mode != "fwd":
            return "FlexAttention has no backward on a CPU"
        return None

    def prepare(self, case, inputs):
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        query, key, value, mask, options = split_options(inputs)
        slopes = options.pop("alibi_slopes", None)
        shift = case.seqlen_k - case.seqlen_q

        def score_mod(score, b, h, i, j):
            if slopes is not None:
                score = score - slopes[h] * (i + shift - j).abs()
            if mask is not None:
                score = score + mask[0, h, i, j]
            return score

        block_mask = None
        if keep_mask(query, key, **options) is not None:
            lengths, (left, right) = options.get("key_lengths"), options.get("window") or (-1, -1)
            global_keys = options.get("global_keys", 0)

            def mask_mod(b, h, i, j):
                keep = j >= 0
                if left >= 0:
                    keep = keep & (j >= i + shift - left)
                if right >= 0:
                    keep = keep & (j <= i + shift + right)
                if global_keys:
                    keep = keep | (j < global_keys)
                if options.get("causal"):
                    keep = keep & (j <= i + shift)
                if lengths is not None:
                    keep = keep & (j < lengths[b])
                return keep

            batch = None if lengths is None else case.batch
            block_mask = create_block_mask(
                mask_mod, batch, None, case.seqlen_q, case.seqlen_k, device=query.device.type
            )

        def donate_nothing():  # `bwd` runs one graph many times, which donated buffers forbid
            return torch._functorch.config.patch(donated_buffer=False)

        compiled = torch.compile(flex_attention, dynamic=False)
        modified = score_mod if slopes is not None or mask is not None else None
        call = functools.partial(
            compiled, query, key, value, modified, block_mask, enable_gqa=case.heads != case.heads_kv
        )
        return Prepared(call, context=donate_nothing)
