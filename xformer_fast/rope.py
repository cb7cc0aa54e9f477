"""Rotary position embedding for models: frequencies and their scalings, tables of cosines and sines, `Rope`."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .ops import checks
from .ops import rope as rope_op


def rope_frequencies(
    rotary_dim: int,
    *,
    base: float = 10000.0,
    scaling: Mapping | None = None,
    seq_len: int | None = None,
    max_position_embeddings: int | None = None,
) -> tuple[Tensor, float]:
    """The angle a position adds to each pair of channels, and the factor that cosines and sines are multiplied by.

    Unscaled, pair k turns by base^(-2k / rotary_dim) a position: Su et al., "RoFormer" (2021).

    Args:
        rotary_dim: R, the number of channels that turn (head_dim, or its part under partial rotary).
        base: RoPE's theta; a `rope_theta` in `scaling` takes its place.
        scaling: a Hugging Face config's `rope_parameters` (`rope_scaling` before): a dict whose `rope_type` (or `type`)
            chooses, with the keys that transformers' ROPE_INIT_FUNCTIONS reads:
            "default"       nothing else.
            "linear"        factor. Frequencies are divided by it (kaiokendev, 2023).
            "dynamic"       factor. A larger base once seq_len exceeds max_position_embeddings (NTK-aware, bloc97 2023).
            "yarn"          factor, original_max_position_embeddings; attention_factor, beta_fast (32), beta_slow (1),
                            mscale, mscale_all_dim, truncate (True). Peng et al., "YaRN" (2023).
            "llama3"        factor, low_freq_factor, high_freq_factor, original_max_position_embeddings. Llama 3.1.
            "longrope"      short_factor, long_factor (R/2 numbers each), original_max_position_embeddings; factor,
                            attention_factor. Ding et al., "LongRoPE" (2024).
            "proportional"  partial_rotary_factor, factor (1). Of R/2 pairs (R is head_dim here) that share turns, the
                            rest stand still.
            Where `factor` may be missing (yarn, longrope), it is max_position_embeddings over the original.
        seq_len: the sequence length, for the two scalings that depend on it: "dynamic" (default: no longer than
            max_position_embeddings) and "longrope" (default: short).
        max_position_embeddings: the config's, where a scaling needs it.

    Returns:
        inv_freq (R/2,) float64, so that angles stay exact at position 1,000,000; the attention factor, a float.

    >>> import xformer_fast
    >>> inv_freq, factor = xformer_fast.rope_frequencies(128, scaling={"rope_type": "linear", "factor": 4.0})
    >>> inv_freq[0].item(), factor
    (0.25, 1.0)
    """
    checks.check_int("rotary_dim", rotary_dim)
    if rotary_dim < 2 or rotary_dim % 2:
        raise ValueError(f"rotary_dim must be even and at least 2, got {rotary_dim}")
    scaling = dict(scaling or {})
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in _SCALINGS:
        raise ValueError(f"scaling: rope_type must be one of {', '.join(_SCALINGS)}, got {kind!r}")
    base = scaling.get("rope_theta") or base
    checks.check_number("base", base)
    if not 0 < base < math.inf:
        raise ValueError(f"base must be positive and finite, got {base}")
    base = float(base)
    scaling |= {"seq_len": seq_len, "max_position_embeddings": max_position_embeddings}
    return _SCALINGS[kind](rotary_dim, base, _Keys(kind, scaling))


class _Keys(dict):
    """The scaling's numbers; a missing one is an error that names it."""

    def __init__(self, kind: str, values: dict):
        super().__init__({name: value for name, value in values.items() if value is not None})
        self.kind = kind

    def __missing__(self, name: str):
        where = "an argument" if name in ("seq_len", "max_position_embeddings") else "scaling"
        raise ValueError(f"{where}: rope_type {self.kind!r} needs {name}")

    def extension(self) -> float:
        """How much longer the context is than the one trained on."""
        given = self.get("factor")
        return given or self["max_position_embeddings"] / self["original_max_position_embeddings"]


def _plain(rotary_dim: int, base: float) -> Tensor:
    return base ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)


def _default(rotary_dim: int, base: float, keys: _Keys):
    return _plain(rotary_dim, base), 1.0


def _linear(rotary_dim: int, base: float, keys: _Keys):
    return _plain(rotary_dim, base) / keys["factor"], 1.0


def _dynamic(rotary_dim: int, base: float, keys: _Keys):
    if rotary_dim == 2:
        raise ValueError("scaling: rope_type 'dynamic' needs rotary_dim above 2")
    trained, factor = keys["max_position_embeddings"], keys["factor"]
    length = max(keys.get("seq_len", trained), trained)
    growth = factor * length / trained - (factor - 1)
    return _plain(rotary_dim, base * growth ** (rotary_dim / (rotary_dim - 2))), 1.0


def _yarn(rotary_dim: int, base: float, keys: _Keys):
    factor, trained = keys.extension(), keys["original_max_position_embeddings"]

    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    attention_factor = keys.get("attention_factor")
    if attention_factor is None:
        mscale, mscale_all_dim = keys.get("mscale"), keys.get("mscale_all_dim")
        both = mscale and mscale_all_dim
        attention_factor = magnitude(mscale) / magnitude(mscale_all_dim) if both else magnitude(1.0)

    def pair_turning(times: float) -> float:
        """The (fractional) pair that turns so many times over the trained length."""
        return rotary_dim * math.log(trained / (times * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair_turning(keys.get("beta_fast") or 32), pair_turning(keys.get("beta_slow") or 1)
    if keys.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    high += 0.001 * (low == high)
    ramp = ((torch.arange(rotary_dim // 2, dtype=torch.float64) - low) / (high - low)).clamp(0, 1)
    inv_freq = _plain(rotary_dim, base)
    return inv_freq / factor * ramp + inv_freq * (1 - ramp), float(attention_factor)


def _llama3(rotary_dim: int, base: float, keys: _Keys):
    factor, low, high = keys["factor"], keys["low_freq_factor"], keys["high_freq_factor"]
    inv_freq = _plain(rotary_dim, base)
    turns = keys["original_max_position_embeddings"] * inv_freq / (2 * math.pi)  # over the trained length
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # 0: divided by factor; 1: as it is
    return inv_freq * (kept + (1 - kept) / factor), 1.0


def _longrope(rotary_dim: int, base: float, keys: _Keys):
    trained, attention_factor = keys["original_max_position_embeddings"], keys.get("attention_factor")
    if attention_factor is None:
        factor = keys.extension()
        attention_factor = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(trained))
    name = "long_factor" if keys.get("seq_len", 0) > trained else "short_factor"
    stretch = torch.tensor(keys[name], dtype=torch.float64)
    if stretch.shape != (rotary_dim // 2,):
        raise ValueError(f"scaling: {name} must hold rotary_dim / 2 = {rotary_dim // 2} numbers, got {len(keys[name])}")
    return _plain(rotary_dim, base) / stretch, float(attention_factor)


def _proportional(head_dim: int, base: float, keys: _Keys):
    turning = int(keys.get("partial_rotary_factor", 1.0) * head_dim // 2)
    inv_freq = _plain(head_dim, base) / keys.get("factor", 1.0)
    inv_freq[turning:] = 0
    return inv_freq, 1.0


_SCALINGS: dict[str, Callable] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
    "proportional": _proportional,
}


def rope_tables(
    inv_freq: Tensor, positions_or_length: Tensor | int, *, factor: float = 1.0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """cos and sin (P, R/2) of every position's angles, times the attention factor; computed in float64.

    inv_freq: (R/2,), from `rope_frequencies`. positions_or_length: P, for positions 0..P-1, or a tensor of positions
    (of any shape, and whole numbers or not), whose shape the tables then begin with.

    >>> import torch, xformer_fast
    >>> inv_freq, factor = xformer_fast.rope_frequencies(64)
    >>> cos, sin = xformer_fast.rope_tables(inv_freq, torch.tensor([0, 1_000_000]), factor=factor)
    >>> cos.shape, round(cos[1, 0].item(), 6)
    (torch.Size([2, 32]), 0.936752)
    """
    checks.check_tensors(inv_freq=inv_freq)
    positions = positions_or_length
    if not isinstance(positions, Tensor):
        checks.check_int("positions_or_length", positions)
        if positions < 0:
            raise ValueError(f"positions_or_length must be a length >= 0 or a tensor of positions, got {positions}")
        positions = torch.arange(positions, device=inv_freq.device)
    angles = positions.to(inv_freq.device, torch.float64)[..., None] * inv_freq.double()
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


class Rope:
    """Rotary position embedding, handed to `rope=`: the op rotates query and key by it.

    cos, sin: (P, R/2) tables by position (`rope_tables`), R <= head_dim (the first R channels turn, "partial rotary").
    interleaved: pairs are neighbours (GPT-J); otherwise channel k pairs with k + R/2 (NeoX, LLaMA).
    query_positions, key_positions: int tensors (S,), (B, S), or (axes, B, S) with `sections`; by default query i stands
    at p_i (see `attention`) and key j at j. Where that is before position 0, at -p, a query turns back by row p.
    sections: with (axes, B, S) positions, how many of the R/2 angles follow each axis (M-RoPE, 2-D axial); sums to R/2.
    Tables and positions must be on the query's device: a call moves nothing.

    Query and key are rotated once, in one pass before the attention kernel, whose backward keeps the rotated copies in
    place of the originals. Su et al., "RoFormer" (2021).

    >>> import torch, xformer_fast
    >>> inv_freq, factor = xformer_fast.rope_frequencies(64)
    >>> rope = xformer_fast.Rope(*xformer_fast.rope_tables(inv_freq, 128, factor=factor))
    >>> q = torch.randn(1, 4, 100, 64)
    >>> out = xformer_fast.attention(q, q, q, causal=True, rope=rope)
    """

    def __init__(self, cos, sin, *, interleaved=False, query_positions=None, key_positions=None, sections=None):
        rope_op.check_tables(cos, sin, sections)
        for name, positions in (("query_positions", query_positions), ("key_positions", key_positions)):
            if positions is not None:
                rope_op.check_positions(name, positions, sections)
        self.cos, self.sin, self.interleaved, self.sections = cos, sin, interleaved, sections
        self.query_positions, self.key_positions = query_positions, key_positions

    def rotate(
        self, query: Tensor, key: Tensor, *, top_left=False, reach: int | None = None, backend=None
    ) -> tuple[Tensor, Tensor]:
        """query (B, Hq, Sq, D) and key (B, Hkv, Sk, D), rotated.

        A query more than `reach` before position 0 sees no key (None: any may see one): how it turns does not matter.
        """
        self.check(query.shape[-1])
        batch, len_q, len_k = query.shape[0], query.shape[2], key.shape[2]
        shift = 0 if top_left else len_k - len_q
        if self.key_positions is not None:
            rope_op.check_positions("key_positions", self.key_positions, self.sections, batch, len_k)
        else:
            self._check_rows(len_k, "keys")
        if self.query_positions is not None:
            rope_op.check_positions("query_positions", self.query_positions, self.sections, batch, len_q)
        elif shift < 0:
            reach = 0 if len_k == 0 else -shift if reach is None else min(reach, -shift)
            self._check_mirror(reach)
            positions = torch.arange(shift, len_k, device=query.device).clamp(min=-reach)
            if reach:
                return self._rotate_mirrored(query, key, positions, self.key_positions, backend)
            return self._rotate(query, key, positions, self.key_positions, 0, backend)
        else:
            self._check_rows(shift + len_q, "queries")
        return self._rotate(query, key, self.query_positions, self.key_positions, shift, backend)

    def rotate_packed(
        self, query, key, cu_seqlens_q, cu_seqlens_k, *, top_left=False, reach: int | None = None, backend=None
    ) -> tuple[Tensor, Tensor]:
        """query (Tq, Hq, D) and key (Tk, Hkv, D) of packed sequences; positions, if given, are (T,); reach as there."""
        self.check(query.shape[-1])
        query_positions, key_positions = self.query_positions, self.key_positions
        shifted = query_positions is None and not top_left and cu_seqlens_q is not cu_seqlens_k
        if query_positions is None:
            query_positions = packed_positions(cu_seqlens_q, query.shape[0])
        if key_positions is None:
            key_positions = packed_positions(cu_seqlens_k, key.shape[0])
        if shifted:
            lengths_k, sequences = cu_seqlens_k.diff(), packed_sequences(cu_seqlens_q, query.shape[0])
            query_positions = query_positions + (lengths_k - cu_seqlens_q.diff())[sequences]
            if reach is not None:
                query_positions = query_positions.clamp(min=-reach)
        rope_op.check_positions("query_positions", query_positions, self.sections, 1, query.shape[0])
        rope_op.check_positions("key_positions", key_positions, self.sections, 1, key.shape[0])
        if shifted and reach != 0:
            query_positions = query_positions.masked_fill(lengths_k[sequences] == 0, 0)  # no key at all to see
            mirrored = True
            if query_positions.numel() and checks.values_are_readable(query_positions):
                least, most = (p.item() for p in query_positions.aminmax())
                self._check_mirror(-least)
                mirrored = least < 0 and most < self.cos.shape[0]  # past the tables: an error
            if mirrored:
                return self._rotate_mirrored(query, key, query_positions, key_positions, backend)
        return self._rotate(query, key, query_positions, key_positions, 0, backend)

    def rotate_tokens(self, query: Tensor, key: Tensor | None, first: Tensor, *, backend=None):
        """query (B, Hq, T, D) and key (B, Hkv, T, D), or None, rotated: token t of sequence b stands at first[b] + t.

        Positions given to Rope come first; query_positions serve the keys too unless key_positions are given.
        """
        self.check(query.shape[-1])
        batch, tokens = query.shape[0], query.shape[2]
        query_positions, key_positions = self.query_positions, self.key_positions
        if query_positions is None:
            query_positions = first.long()[:, None] + torch.arange(tokens, device=first.device)
            query_positions = query_positions.clamp(min=0)  # a token before position 0 sees no key
        key_positions = query_positions if key_positions is None else key_positions
        rope_op.check_positions("query_positions", query_positions, self.sections, batch, tokens)
        rope_op.check_positions("key_positions", key_positions, self.sections, batch, tokens)
        return self._rotate(query, key, query_positions, key_positions, 0, backend)

    def check(self, head_dim: int):
        if 2 * self.cos.shape[1] > head_dim:
            raise ValueError(f"rope rotates {2 * self.cos.shape[1]} channels, but head_dim is {head_dim}")

    def _check_rows(self, rows, what: str):
        if rows > self.cos.shape[0]:
            raise ValueError(f"rope: tables of {self.cos.shape[0]} positions are too short for {rows} {what}")

    def _check_mirror(self, before):
        if before >= self.cos.shape[0]:
            raise ValueError(
                f"rope: tables of {self.cos.shape[0]} positions are too short for a query {before} before the first key"
            )

    def _rotate_mirrored(self, query, key, query_positions, key_positions, backend) -> tuple[Tensor, Tensor]:
        """Query positions (S,) may be negative: the cosines of -p are those of p, its sines their opposite."""
        cos, sin = (table if table.device == query.device else table.to(query.device) for table in (self.cos, self.sin))
        rows = query_positions.abs()
        if not rows.is_cpu:  # as kernels, that stay in memory
            rows = rows.clamp(max=cos.shape[0] - 1)
        sign = torch.where(query_positions < 0, -1.0, 1.0).to(sin.dtype)
        mirrored = Rope(cos[rows], sin[rows] * sign[:, None], interleaved=self.interleaved)
        query, _ = mirrored._rotate(query, None, None, None, 0, backend)
        names, options = ("key_positions",), (cos, sin, self.sections, self.interleaved)
        call = rope_op.Call((key,), (key_positions,), (0,), *options, names=names)
        return query, *rope_op.rotate(call, backend)

    def _rotate(self, query, key, query_positions, key_positions, query_first, backend) -> tuple[Tensor, Tensor | None]:
        names, positions = ("query_positions", "key_positions"), (query_positions, key_positions)
        for name, tensor in zip(("cos", "sin", *names), (self.cos, self.sin, *positions), strict=True):
            if tensor is not None:
                checks.check_device(f"rope: {name}", tensor, query.device)
        count = 1 if key is None else 2
        call = rope_op.Call(
            (query, key)[:count], positions[:count], (query_first, 0)[:count], self.cos, self.sin, self.sections,
            self.interleaved, names=names[:count],
        )  # fmt: skip
        rotated = rope_op.rotate(call, backend)
        return rotated if count == 2 else (*rotated, None)


def packed_positions(cu_seqlens: Tensor, total: int) -> Tensor:
    """Each packed row's index inside its own sequence, (T,) int64."""
    return torch.arange(total, device=cu_seqlens.device) - cu_seqlens[packed_sequences(cu_seqlens, total)]


def packed_sequences(cu_seqlens: Tensor, total: int) -> Tensor:
    """The sequence each packed row belongs to, (T,) int64; offsets that end too early leave their rest to the last."""
    rows = torch.arange(total, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    sequences = torch.searchsorted(cu_seqlens[1:].contiguous(), rows, right=True)
    return sequences.clamp(max=cu_seqlens.shape[0] - 2)
