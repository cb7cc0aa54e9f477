"""Position schemes handed to the attention ops: rotary embeddings, ALiBi slopes, biases of the distance."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference


class Rope:
    """Rotary position embedding, handed to `rope=`: the op rotates query and key by it.

    cos, sin: (P, R/2) tables by position, R <= head_dim (the first R channels turn, "partial rotary").
    interleaved: pairs are neighbours (GPT-J); otherwise channel k pairs with k + R/2 (NeoX, LLaMA).
    query_positions, key_positions: int tensors (S,), (B, S), or (axes, B, S) with `sections`; by default query i stands
    at p_i (see `attention`) and key j at j.
    sections: with (axes, B, S) positions, how many of the R/2 angles follow each axis (M-RoPE, 2-D axial); sums to R/2.

    Su et al., "RoFormer" (2021).

    >>> import torch, xformer_fast
    >>> angle = torch.arange(128)[:, None] * 10000.0 ** (-torch.arange(0, 64, 2) / 64)
    >>> rope = xformer_fast.Rope(angle.cos(), angle.sin())
    """

    def __init__(self, cos, sin, *, interleaved=False, query_positions=None, key_positions=None, sections=None):
        if cos.dim() != 2 or cos.shape != sin.shape:
            raise ValueError(f"cos and sin must both be (P, R/2), got {tuple(cos.shape)} and {tuple(sin.shape)}")
        if sections is not None and sum(sections) != cos.shape[1]:
            raise ValueError(f"sections must sum to R/2 = {cos.shape[1]}, got {tuple(sections)}")
        for name, positions in (("query_positions", query_positions), ("key_positions", key_positions)):
            if positions is None:
                continue
            if positions.dim() not in (1, 2, 3):
                raise ValueError(f"{name} must be (S,), (B, S) or (axes, B, S), got shape {tuple(positions.shape)}")
            if positions.dim() == 3 and (sections is None or len(sections) != positions.shape[0]):
                raise ValueError(f"{name} of shape (axes, B, S) needs sections, one number of angles an axis")
        self.cos, self.sin, self.interleaved, self.sections = cos, sin, interleaved, sections
        self.query_positions, self.key_positions = query_positions, key_positions

    def rotate(self, query: Tensor, key: Tensor, *, top_left=False) -> tuple[Tensor, Tensor]:
        """query (B, Hq, Sq, D) and key (B, Hkv, Sk, D), rotated."""
        self.check(query.shape[-1])
        len_q, len_k = query.shape[2], key.shape[2]
        shift = 0 if top_left else len_k - len_q
        query_positions, key_positions = self.query_positions, self.key_positions
        if query_positions is None:
            if shift < 0:
                raise ValueError(
                    f"rope: with {len_q} queries and {len_k} keys the first query stands before position 0; "
                    "give Rope query_positions"
                )
            query_positions = self._consecutive("queries", shift, len_q, query.device)
        else:
            self._check_positions("query_positions", query_positions, query.shape[0], len_q)
        if key_positions is None:
            key_positions = self._consecutive("keys", 0, len_k, key.device)
        else:
            self._check_positions("key_positions", key_positions, key.shape[0], len_k)
        return self._turn(query, query_positions), self._turn(key, key_positions)

    def rotate_packed(self, query, key, cu_seqlens_q, cu_seqlens_k, *, top_left=False) -> tuple[Tensor, Tensor]:
        """query (Tq, Hq, D) and key (Tk, Hkv, D) of packed sequences; positions, if given, are (T,)."""
        self.check(query.shape[-1])
        query_positions, key_positions = self.query_positions, self.key_positions
        if query_positions is None:
            query_positions = packed_positions(cu_seqlens_q, query.shape[0])
            if not top_left:
                shifts = cu_seqlens_k.diff() - cu_seqlens_q.diff()
                query_positions = query_positions + shifts[packed_sequences(cu_seqlens_q, query.shape[0])]
        if key_positions is None:
            key_positions = packed_positions(cu_seqlens_k, key.shape[0])
        self._check_positions("query_positions", query_positions, 1, query.shape[0])
        self._check_positions("key_positions", key_positions, 1, key.shape[0])
        return tuple(
            self._turn(t.transpose(0, 1)[None], positions)[0].transpose(0, 1)
            for t, positions in ((query, query_positions), (key, key_positions))
        )

    def rotate_tokens(self, query: Tensor, key: Tensor | None, first: Tensor) -> tuple[Tensor, Tensor | None]:
        """query (B, Hq, T, D) and key (B, Hkv, T, D), or None, rotated: token t of sequence b stands at first[b] + t.

        Positions given to Rope come first; query_positions serve the keys too unless key_positions are given.
        """
        self.check(query.shape[-1])
        batch, tokens = query.shape[0], query.shape[2]
        query_positions, key_positions = self.query_positions, self.key_positions
        if query_positions is None:
            first = first.long().clamp(min=0)  # a token before position 0 sees no key
            query_positions = first[:, None] + torch.arange(tokens, device=first.device)
        key_positions = query_positions if key_positions is None else key_positions
        self._check_positions("query_positions", query_positions, batch, tokens)
        if key is not None:
            self._check_positions("key_positions", key_positions, batch, tokens)
            key = self._turn(key, key_positions)
        return self._turn(query, query_positions), key

    def check(self, head_dim: int):
        if 2 * self.cos.shape[1] > head_dim:
            raise ValueError(f"rope rotates {2 * self.cos.shape[1]} channels, but head_dim is {head_dim}")

    def _consecutive(self, rows: str, first, count, device) -> Tensor:
        if first + count > self.cos.shape[0]:
            raise ValueError(f"rope: tables of {self.cos.shape[0]} positions are too short for {first + count} {rows}")
        return torch.arange(first, first + count, device=device)

    def _check_positions(self, name: str, positions: Tensor, batch, length):
        if positions.shape[-1] != length or (positions.dim() > 1 and positions.shape[-2] not in (1, batch)):
            raise ValueError(
                f"rope: {name} must be for {length} rows of {batch} sequences, got {tuple(positions.shape)}"
            )
        if positions.device.type != "cpu" or torch.compiler.is_compiling() or not positions.numel():
            return  # a look at the values would synchronise, or break the graph
        least, most = (x.item() for x in positions.aminmax())
        if least < 0 or most >= self.cos.shape[0]:
            raise ValueError(
                f"rope: {name} must lie in 0..{self.cos.shape[0] - 1}, the tables' rows, got {least}..{most}"
            )

    def _turn(self, x: Tensor, positions: Tensor) -> Tensor:
        cos, sin = (self._rows(table.to(x.device), positions) for table in (self.cos, self.sin))
        return reference.apply_rope(x, cos, sin, interleaved=self.interleaved)

    def _rows(self, table: Tensor, positions: Tensor) -> Tensor:
        if positions.dim() < 3:
            rows = table[positions]  # (S, R/2) or (B, S, R/2)
        else:
            parts = table.split(list(self.sections), dim=1)
            rows = torch.cat([part[axis] for part, axis in zip(parts, positions, strict=True)], -1)
        return rows if rows.dim() == 2 else rows[:, None]


def packed_positions(cu_seqlens: Tensor, total: int) -> Tensor:
    """Each packed row's index inside its own sequence, (T,) int64."""
    return torch.arange(total, device=cu_seqlens.device) - cu_seqlens[packed_sequences(cu_seqlens, total)]


def packed_sequences(cu_seqlens: Tensor, total: int) -> Tensor:
    """The sequence each packed row belongs to, (T,) int64; offsets that end too early leave their rest to the last."""
    rows = torch.arange(total, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    sequences = torch.searchsorted(cu_seqlens[1:].contiguous(), rows, right=True)
    return sequences.clamp(max=cu_seqlens.shape[0] - 2)


def alibi_slopes(num_heads: int) -> Tensor:
    """The slopes (num_heads,) float32 of Press et al., "Train Short, Test Long" (2021), for any number of heads.

    A power of two n has the geometric sequence from 2^(-8/n); another number takes those of the power of two below,
    then every other one of the next power's.

    >>> import xformer_fast
    >>> slopes = xformer_fast.alibi_slopes(8)
    """
    if num_heads < 1:
        raise ValueError(f"num_heads must be at least 1, got {num_heads}")

    def geometric(n):
        return [2.0 ** (-8.0 * (h + 1) / n) for h in range(n)]

    below = 2 ** math.floor(math.log2(num_heads))
    slopes = geometric(below)
    if below < num_heads:
        slopes += geometric(2 * below)[0::2][: num_heads - below]
    return torch.tensor(slopes)


class DistanceBias:
    """Any bias of head and distance, handed to `relative_bias=`.

    values: (Hq, Sq + Sk - 1); entry [h, j - i + Sq - 1] is added to head h's score of query i and key j. Its gradient
    is the sum of the scores' gradients along each diagonal.
    """

    def __init__(self, values: Tensor):
        if values.dim() != 2:
            raise ValueError(f"values must be (Hq, Sq + Sk - 1), got shape {tuple(values.shape)}")
        self.values = values

    @property
    def num_heads(self) -> int:
        return self.values.shape[0]

    def values_for(self, len_q, len_k, *, top_left=False) -> Tensor:
        if self.values.shape[1] != max(len_q + len_k - 1, 0):
            raise ValueError(
                f"relative_bias: values must have Sq + Sk - 1 = {len_q + len_k - 1} columns, got {self.values.shape[1]}"
            )
        return self.values


class T5Bias:
    """T5's relative position bias, handed to `relative_bias=`.

    table: (num_buckets, Hq), as `relative_attention_bias.weight` in Hugging Face's T5. bidirectional: half the buckets
    for keys after the query (an encoder); a decoder gives all of them to keys before it. Distances beyond max_distance
    share the last bucket.

    Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer" (2020).
    """

    def __init__(self, table: Tensor, *, bidirectional=True, max_distance=128):
        least = 4 if bidirectional else 2
        if table.dim() != 2 or table.shape[0] < least:
            raise ValueError(f"table must be (num_buckets, Hq) with at least {least} buckets, got {tuple(table.shape)}")
        if max_distance <= table.shape[0] // least:
            raise ValueError(
                f"max_distance must exceed the {table.shape[0] // least} exact buckets, got {max_distance}"
            )
        self.table, self.bidirectional, self.max_distance = table, bidirectional, max_distance

    def buckets(self, distance: Tensor) -> Tensor:
        """The bucket of each key position minus query position."""
        count = self.table.shape[0]
        if self.bidirectional:
            count //= 2
            base, past = torch.where(distance > 0, count, 0), distance.abs()
        else:
            base, past = torch.zeros_like(distance), (-distance).clamp(min=0)
        exact = count // 2
        scaled = torch.log(past.clamp(min=1).float() / exact) / math.log(self.max_distance / exact) * (count - exact)
        return base + torch.where(past < exact, past, (exact + scaled.long()).clamp(max=count - 1))

    @property
    def num_heads(self) -> int:
        return self.table.shape[1]

    def values_for(self, len_q, len_k, *, top_left=False) -> Tensor:
        """The bias as a vector of distances, (Hq, Sq + Sk - 1); see DistanceBias."""
        first = 1 - len_q - (0 if top_left else len_k - len_q)
        distance = torch.arange(first, first + max(len_q + len_k - 1, 0), device=self.table.device)
        return F.embedding(self.buckets(distance), self.table).T  # its gradient sums in one order, indexing's does not
