"""What attention's forward and backward kernels share: problem description, scores, visible blocks, tile sizes.

A score, in units of log2: s = cap(q·k · scale) - slope·|p_i - j| + bias[j - p_i] + row_bias[j / map_columns] +
column_bias[j % map_columns] + mask, with p_i = i + shift; every exponential is then one exp2. A key j is visible to
query i if p_i - left <= j <= p_i + right and j < key_limit; causal attention is the case right = 0. Global keys, which
are visible beside the window, are a pass of their own (attention_global.py). A term that is absent is None, and its
code is compiled out. Lengths and windows are run-time numbers that Triton does not specialise on: a new length does not
recompile.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .attention_global import gather_tile, gathered_dropout, global_columns, is_beside_window, is_global, unique_keys
from .common import INTERPRET, LOG2E, architecture, block_width, dot, keep_bits, load_tile, tanh

# Passes over blocks of keys: seen whole by every query, in part, global keys outside the window, in part or global.
WHOLE, EDGE, GLOBAL, EDGE_OR_GLOBAL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
LEAST = tl.constexpr(-(2.0**126))
LENGTHS = ["rows_q", "rows_k", "max_rows_q", "max_rows_k", "window_left", "window_right"]  # never specialised on


class View(NamedTuple):
    """A tensor of rows of unit-stride channels: (batch, head, row) strides; batch stride 0 if sequences are packed."""

    ptr: Any
    strides: Any


class Terms(NamedTuple):
    """Pointers and numbers of the optional terms, None where absent."""

    mask: Any  # boolean masks as uint8
    mask_strides: Any  # (batch, head, query, key), 0 where broadcast
    key_lengths: Any
    cu_seqlens_q: Any
    cu_seqlens_k: Any
    alibi_slopes: Any
    alibi_batch_stride: Any
    distance_bias: Any  # (head, distance)
    distance_stride: Any
    distance_offset: Any  # of distance 0
    row_bias: Any  # (batch, head, query, row of the map)
    row_bias_strides: Any
    column_bias: Any
    column_bias_strides: Any
    map_columns: Any
    sinks: Any
    global_keys: Any  # (batch, place), see attention_global.py
    global_stride: Any
    global_count: Any
    global_after: Any  # 1: those after the window are visible too
    global_slots: Any  # (batch, key), for the backward
    slots_stride: Any
    dropout_seed: Any
    dropout_threshold: Any  # 32 random bits keep an element if they are >= it
    dropout_scale: Any  # of what is kept
    softcap: Any  # in log2 units


@triton.jit
def base_of(tensor, batch, head, first_row):
    """Where the rows of a head begin in a View."""
    strides = tensor.strides
    return tensor.ptr + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1] + first_row * strides[2]


@triton.jit
def sequence(batch, cu_seqlens, rows):
    """(first row, length) of a sequence; `rows`: the length, or that of the packed tensor, which no sequence leaves."""
    if cu_seqlens is None:
        return tl.full([], 0, tl.int64), rows
    else:
        begin = tl.minimum(tl.maximum(tl.load(cu_seqlens + batch), 0), rows)
        end = tl.minimum(tl.maximum(tl.load(cu_seqlens + batch + 1), begin), rows)
        return begin.to(tl.int64), (end - begin).to(tl.int32)


@triton.jit
def key_limit_of(batch, key_lengths, length):
    """Keys at or past it are never read."""
    if key_lengths is None:
        return length
    else:
        return tl.minimum(tl.maximum(tl.load(key_lengths + batch), 0), length).to(tl.int32)


@triton.jit
def visible_blocks(first, last, shift, limit, left, right, BLOCK: tl.constexpr):
    """The blocks of columns that the rows first..last see: (full_begin, full_count, begin, before, after, edge_count).

    Row i sees columns i + shift - left .. i + shift + right, below `limit`. full_count blocks from full_begin are seen
    whole by every row; edge_count others are seen in part: `before` of them from block `begin`, the rest from `after`.
    To ask which rows see a column, swap left and right and negate shift.
    """
    begin = 0
    full_begin = 0
    end = limit
    full_end = limit
    if right is not None:
        end = tl.maximum(tl.minimum(end, last + shift + right + 1), 0)
        full_end = tl.maximum(tl.minimum(full_end, first + shift + right + 1), 0)
    if left is not None:
        begin = tl.maximum(first + shift - left, 0) // BLOCK
        full_begin = tl.cdiv(tl.maximum(last + shift - left, 0), BLOCK)
    end = tl.cdiv(end, BLOCK)
    after = tl.maximum(full_end // BLOCK, full_begin)
    before = tl.maximum(tl.minimum(full_begin, end) - begin, 0)
    return full_begin, after - full_begin, begin, before, after, before + tl.maximum(end - after, 0)


@triton.jit
def block_count(blocks, terms, PASS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Blocks of keys in a pass."""
    if PASS == GLOBAL:
        return tl.cdiv(terms.global_count, BLOCK_N)
    else:
        return blocks[5] if PASS == EDGE else blocks[1]


@triton.jit
def block_at(i, blocks, PASS: tl.constexpr):
    """The i-th of the blocks seen whole, or in part."""
    full_begin, _, begin, before, after, _ = blocks
    if PASS == EDGE:
        return tl.where(i < before, begin + i, after - before + i)
    else:
        return full_begin + i


@triton.jit
def columns_at(i, blocks, batch, key_limit, terms, PASS: tl.constexpr, BLOCK_N: tl.constexpr):
    """(first key, keys) of the i-th block of keys in a pass; global keys have no first one."""
    start_n = block_at(i, blocks, PASS) * BLOCK_N
    columns = start_n + tl.arange(0, BLOCK_N)
    if PASS == GLOBAL:
        columns = global_columns(i, batch, key_limit, terms, BLOCK_N)
    return start_n, columns


@triton.jit
def load_keys(
    base, stride, start_n, columns, key_limit, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr,
    PASS: tl.constexpr,
):  # fmt: skip
    """Rows of key or value at what columns_at has returned."""
    if PASS == GLOBAL:
        return gather_tile(base, stride, columns, columns < key_limit, WIDTH, BLOCK)
    else:
        return load_tile(base, stride, start_n, key_limit, WIDTH, BLOCK_N, BLOCK, PASS == EDGE)


@triton.jit
def is_visible(rows, columns, shift, key_limit, left, right):
    visible = columns < key_limit
    if right is not None:
        visible = visible & (columns <= rows + shift + right)
    if left is not None:
        visible = visible & (columns >= rows + shift - left)
    return visible


@triton.jit
def visible_in_pass(rows, columns, shift, key_limit, left, right, own, terms, PASS: tl.constexpr):
    """Which pairs of a block count in a pass that does not see it whole."""
    if PASS == GLOBAL:
        return is_beside_window(rows, columns, shift, key_limit, left, right, terms)
    else:
        visible = is_visible(rows, columns, shift, key_limit, left, right)
        if PASS == EDGE_OR_GLOBAL and terms.global_slots is not None:
            beside = is_beside_window(rows, columns, shift, key_limit, left, right, terms)
            visible = visible | (beside & is_global(columns, key_limit, own))
        return visible


@triton.jit
def tile_gradient(
    query, grad_out, key, value, lse, delta, lse_error, rows, columns, start_n, key_limit, length_q, shift, scale, own,
    left, right, stream, terms, ALIGNED: tl.constexpr,
):  # fmt: skip
    """dS [rows, columns] of keys from start_n on, before the soft cap, for biases. ALIGNED: start_n % 4 is 0."""
    s, _ = scores(
        dot(query, tl.trans(key)), rows[:, None], columns[None, :], length_q, key_limit, shift, scale, own, left, right,
        terms, EDGE_OR_GLOBAL,
    )  # fmt: skip
    grad_weights = dot(grad_out, tl.trans(value))
    if terms.dropout_seed is not None:
        if ALIGNED:
            grad_weights = dropout(grad_weights, rows, start_n, stream, terms, columns.shape[0], TRANSPOSED=False)
        else:
            grad_weights = gathered_dropout(grad_weights, rows[:, None], columns[None, :], stream, terms)
        grad_weights *= terms.dropout_scale
    return tl.exp2(s - lse[:, None] - lse_error[:, None]) * (grad_weights - delta[:, None])


@triton.jit
def place_of(stream, heads, rows_q, rows_k, terms, TOP_LEFT: tl.constexpr):
    """(batch, head, first_q, length_q, first_k, length_k, key_limit, shift): where one (batch, head)'s rows are."""
    batch, head = stream // heads, stream % heads
    first_q, length_q = sequence(batch, terms.cu_seqlens_q, rows_q)
    first_k, length_k = sequence(batch, terms.cu_seqlens_k, rows_k)
    shift = 0 if TOP_LEFT else length_k - length_q
    return batch, head, first_q, length_q, first_k, length_k, key_limit_of(batch, terms.key_lengths, length_k), shift


@triton.jit
def head_terms(terms, batch, head):
    """What of the terms belongs to one head: (mask pointer, ALiBi slope, pointers to distance 0 of its bias, to its
    numbers of map rows and of map columns, to the places of global keys)."""
    mask, slope, bias, row_bias, column_bias, slots = 0, 0.0, 0, 0, 0, 0
    if terms.mask is not None:
        strides = terms.mask_strides
        mask = terms.mask + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]
    if terms.alibi_slopes is not None:
        slope = tl.load(terms.alibi_slopes + batch * terms.alibi_batch_stride + head).to(tl.float32)
    if terms.distance_bias is not None:
        bias = terms.distance_bias + head.to(tl.int64) * terms.distance_stride + terms.distance_offset
    if terms.row_bias is not None:
        of_rows, of_columns = terms.row_bias_strides, terms.column_bias_strides
        row_bias = terms.row_bias + batch.to(tl.int64) * of_rows[0] + head.to(tl.int64) * of_rows[1]
        column_bias = terms.column_bias + batch.to(tl.int64) * of_columns[0] + head.to(tl.int64) * of_columns[1]
    if terms.global_slots is not None:
        slots = terms.global_slots + batch.to(tl.int64) * terms.slots_stride
    return mask, slope, bias, row_bias, column_bias, slots


@triton.jit
def scores(products, rows, columns, length_q, key_limit, shift, scale, own, left, right, terms, PASS: tl.constexpr):
    """(scores in log2 units, -inf where masked; tanh of the soft cap, else the products).

    `products` are q·k; `rows` and `columns` broadcast against them in either orientation. `scale` includes log2(e), or
    1/softcap where a cap follows.
    """
    mask, slope, bias, row_bias, column_bias, _ = own
    bent = products
    s = products * scale
    if terms.softcap is not None:
        bent = tanh(s)
        s = bent * terms.softcap
    if terms.alibi_slopes is not None:
        s -= (slope * LOG2E) * tl.abs(rows + shift - columns).to(tl.float32)
    if terms.distance_bias is not None:
        inside = (rows < length_q) & (columns < key_limit)
        s += tl.load(bias + (columns - rows - shift), mask=inside, other=0.0) * LOG2E
    if terms.row_bias is not None:
        inside = (rows < length_q) & (columns < key_limit)
        map_row, map_column = columns // terms.map_columns, columns % terms.map_columns
        s += tl.load(row_bias + rows.to(tl.int64) * terms.row_bias_strides[2] + map_row, mask=inside, other=0.0) * LOG2E
        of_column = column_bias + rows.to(tl.int64) * terms.column_bias_strides[2] + map_column
        s += tl.load(of_column, mask=inside, other=0.0) * LOG2E
    if terms.mask is not None:
        strides = terms.mask_strides
        pointers = mask + rows.to(tl.int64) * strides[2] + columns.to(tl.int64) * strides[3]
        added = tl.load(pointers, mask=(rows < length_q) & (columns < key_limit), other=0)
        if terms.mask.dtype.element_ty == tl.uint8:
            s = tl.where(added != 0, s, float("-inf"))
        else:
            added = added.to(tl.float32)
            # A type's least number is not -inf: a row of nothing else weighs its keys alike. Below -1e20 all is one
            # power of two, which lse takes to the backward and back without a rounding.
            s += tl.where(added < -1e20, tl.where(added == float("-inf"), added, LEAST), added * LOG2E)
    if PASS != WHOLE:
        visible = visible_in_pass(rows, columns, shift, key_limit, left, right, own, terms, PASS)
        s = tl.where(visible, s, float("-inf"))
    return s, bent


@triton.jit
def score_gradient(grad_scores, bent, terms):
    """Through the soft cap; the factor `scale` is left to the caller."""
    if terms.softcap is not None:
        return grad_scores * (1.0 - bent * bent)
    else:
        return grad_scores


@triton.jit
def dropout(values, rows, first_column, stream, terms, BLOCK_N: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Zeros what is dropped; what is kept is not scaled here."""
    if terms.dropout_seed is None:
        return values
    else:
        keep = keep_bits(terms.dropout_seed, terms.dropout_threshold, stream, rows, first_column, BLOCK_N, TRANSPOSED)
        return tl.where(keep, values, 0.0)


@triton.jit
def dropout_of_pass(
    values, rows, columns, first_column, stream, terms, BLOCK_N: tl.constexpr, TRANSPOSED: tl.constexpr,
    PASS: tl.constexpr,
):  # fmt: skip
    if PASS == GLOBAL:
        if TRANSPOSED:
            return gathered_dropout(values, rows[None, :], columns[:, None], stream, terms)
        else:
            return gathered_dropout(values, rows[:, None], columns[None, :], stream, terms)
    else:
        return dropout(values, rows, first_column, stream, terms, BLOCK_N, TRANSPOSED)


@triton.jit
def lse_in_log2(lse):
    """In the units of scores, rounded alike by forward and backward; +inf for a row without keys: no weights."""
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)


class Statistics(NamedTuple):
    """Of every query lse (log2 units), delta, and what rounding took from lse; each sequence's rows in whole blocks."""

    ptr: Any
    delta: Any  # from a row's lse to its delta, and from there to the error of lse
    stride: Any  # from a head to the next; packed sequences share a head's rows
    padding: Any  # between packed sequences


@triton.jit
def statistics_of(statistics, batch, head, stream, first_q, terms):
    if terms.cu_seqlens_q is None:
        return statistics.ptr + stream.to(tl.int64) * statistics.stride
    else:
        return statistics.ptr + head.to(tl.int64) * statistics.stride + first_q + batch * statistics.padding


class Tile(NamedTuple):
    block_m: int  # queries
    block_n: int  # keys
    num_warps: int
    num_stages: int


# (kernel, larger head dim up to, architecture) -> tile, for 16-bit inputs. Without a grad_value row, grad_key computes
# both gradients at once. Query blocks of the other gradients divide those of grad_query, which pads what they read;
# tiles of grad_distance are square.
TILES = {
    ("forward", 64, "sm80"): Tile(128, 64, 4, 3),
    ("forward", 128, "sm80"): Tile(128, 64, 8, 3),
    ("forward", 256, "sm80"): Tile(64, 64, 8, 2),
    ("forward", 64, "sm86"): Tile(128, 64, 4, 2),
    ("forward", 128, "sm86"): Tile(128, 32, 8, 2),
    ("forward", 256, "sm86"): Tile(64, 32, 8, 2),
    ("forward", 64, "sm90"): Tile(128, 128, 8, 2),
    ("forward", 128, "sm90"): Tile(128, 128, 8, 2),
    ("forward", 256, "sm90"): Tile(128, 64, 8, 2),
    ("grad_query", 64, "sm80"): Tile(128, 64, 8, 2),
    ("grad_query", 128, "sm80"): Tile(128, 32, 8, 2),
    ("grad_query", 256, "sm80"): Tile(64, 32, 8, 2),
    ("grad_query", 64, "sm86"): Tile(64, 64, 4, 2),
    ("grad_query", 128, "sm86"): Tile(64, 32, 4, 2),
    ("grad_query", 256, "sm86"): Tile(32, 32, 8, 1),
    ("grad_query", 64, "sm90"): Tile(128, 64, 8, 2),
    ("grad_query", 128, "sm90"): Tile(128, 64, 8, 2),
    ("grad_query", 256, "sm90"): Tile(128, 32, 8, 2),
    ("grad_key", 64, "sm80"): Tile(32, 128, 8, 2),
    ("grad_key", 128, "sm80"): Tile(32, 64, 8, 2),
    ("grad_key", 256, "sm80"): Tile(32, 64, 8, 2),
    ("grad_key", 64, "sm86"): Tile(32, 64, 4, 2),
    ("grad_key", 128, "sm86"): Tile(32, 64, 8, 2),
    ("grad_key", 256, "sm86"): Tile(16, 64, 8, 2),
    ("grad_key", 64, "sm90"): Tile(64, 128, 8, 2),
    ("grad_key", 128, "sm90"): Tile(32, 128, 8, 2),
    ("grad_key", 256, "sm90"): Tile(32, 128, 8, 2),
    ("grad_value", 256, "sm80"): Tile(32, 64, 8, 2),
    ("grad_value", 256, "sm86"): Tile(16, 64, 8, 2),
    ("grad_value", 256, "sm90"): Tile(64, 128, 8, 2),
    ("grad_mask", 64, "sm80"): Tile(64, 64, 4, 1),
    ("grad_mask", 128, "sm80"): Tile(64, 64, 4, 1),
    ("grad_mask", 256, "sm80"): Tile(64, 32, 4, 1),
    ("grad_mask", 64, "sm86"): Tile(64, 64, 4, 1),
    ("grad_mask", 128, "sm86"): Tile(64, 32, 4, 1),
    ("grad_mask", 256, "sm86"): Tile(32, 32, 4, 1),
    ("grad_mask", 64, "sm90"): Tile(64, 64, 4, 1),
    ("grad_mask", 128, "sm90"): Tile(64, 64, 4, 1),
    ("grad_mask", 256, "sm90"): Tile(64, 64, 8, 1),
    ("grad_distance", 64, "sm80"): Tile(64, 64, 8, 1),
    ("grad_distance", 128, "sm80"): Tile(32, 32, 4, 1),
    ("grad_distance", 256, "sm80"): Tile(32, 32, 8, 1),
    ("grad_distance", 64, "sm86"): Tile(32, 32, 4, 1),
    ("grad_distance", 128, "sm86"): Tile(32, 32, 8, 1),
    ("grad_distance", 256, "sm86"): Tile(16, 16, 4, 1),
    ("grad_distance", 64, "sm90"): Tile(64, 64, 8, 1),
    ("grad_distance", 128, "sm90"): Tile(64, 64, 8, 1),
    ("grad_distance", 256, "sm90"): Tile(64, 64, 8, 1),
}
# The same for float32 inputs, on every architecture.
FLOAT32_TILES = {
    ("forward", 64): Tile(64, 32, 8, 2),
    ("forward", 128): Tile(32, 32, 8, 1),
    ("forward", 256): Tile(16, 16, 8, 1),
    ("grad_query", 64): Tile(64, 16, 8, 1),
    ("grad_query", 128): Tile(32, 16, 8, 1),
    ("grad_query", 256): Tile(16, 16, 8, 1),
    ("grad_key", 64): Tile(16, 64, 8, 1),
    ("grad_key", 128): Tile(16, 32, 8, 1),
    ("grad_key", 256): Tile(16, 16, 8, 1),
    ("grad_value", 128): Tile(16, 32, 8, 1),
    ("grad_value", 256): Tile(16, 16, 8, 1),
    ("grad_mask", 64): Tile(32, 32, 8, 1),
    ("grad_mask", 128): Tile(32, 16, 8, 1),
    ("grad_mask", 256): Tile(16, 16, 8, 1),
    ("grad_distance", 64): Tile(32, 32, 8, 1),
    ("grad_distance", 128): Tile(16, 16, 8, 1),
    ("grad_distance", 256): Tile(16, 16, 8, 1),
}
INTERPRETER_TILE = Tile(32, 16, 1, 1)


class Problem:
    """What every launch of one call needs: sizes, terms and numbers, read from the operator's arguments."""

    def __init__(
        self, query, key, value, mask, key_lengths, cu_seqlens_q, cu_seqlens_k, alibi_slopes, distance_bias, sinks,
        dropout_seed, global_keys, rel_h, rel_w, max_seqlen_q, max_seqlen_k, scale, softcap, dropout_p, causal,
        window_left, window_right,
    ):  # fmt: skip
        packed = cu_seqlens_q is not None
        self.device, self.dtype = query.device, query.dtype
        self.batch = cu_seqlens_q.shape[0] - 1 if packed else query.shape[0]
        self.rows_q, self.rows_k = (t.shape[0 if packed else 2] for t in (query, key))
        self.max_rows_q = min(max_seqlen_q, self.rows_q) if packed else self.rows_q
        self.max_rows_k = min(max_seqlen_k, self.rows_k) if packed else self.rows_k
        self.heads, self.heads_kv = query.shape[1], key.shape[1]
        self.group = self.heads // max(self.heads_kv, 1)
        self.head_dim, self.head_dim_v = query.shape[-1], value.shape[-1]
        self.head_dim_bucket = max(64, block_width(self.head_dim), block_width(self.head_dim_v))
        self.lse_shape = (2, self.heads, self.rows_q) if packed else (2, *query.shape[:3])  # with what rounding took
        self.scale = scale
        self.score_scale = scale / softcap if softcap else scale * LOG2E.value
        self.top_left = causal == 2
        longest = self.rows_q + self.rows_k  # as good as no limit, and safe to add to a position
        self.window_left = min(window_left, longest) if window_left >= 0 else None
        self.window_right = min(window_right, longest) if window_right >= 0 else None
        if causal:
            self.window_right = 0
        self.plain = scale > 0 and not softcap and all(t is None for t in (mask, alibi_slopes, distance_bias, rel_h))
        if rel_h is not None:
            rel_h, rel_w = (rel if rel.stride(-1) == 1 else rel.contiguous() for rel in (rel_h, rel_w))
        after = not causal and self.window_right is not None
        if global_keys is not None and (global_keys.numel() == 0 or not (after or self.window_left is not None)):
            global_keys = None  # no window to be beside of
        if global_keys is not None:
            global_keys = unique_keys(global_keys, self.rows_k)
        dropped = dropout_p > 0
        self.terms = Terms(
            mask=mask.view(torch.uint8) if mask is not None and mask.dtype == torch.bool else mask,
            mask_strides=None if mask is None else broadcast_strides(mask),
            key_lengths=key_lengths,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            alibi_slopes=None if alibi_slopes is None else alibi_slopes.contiguous(),
            alibi_batch_stride=None if alibi_slopes is None else (alibi_slopes.dim() - 1) * self.heads,
            distance_bias=distance_bias,
            distance_stride=None if distance_bias is None else distance_bias.shape[1],
            distance_offset=None if distance_bias is None else (max_seqlen_q if self.top_left else max_seqlen_k) - 1,
            row_bias=rel_h,
            row_bias_strides=None if rel_h is None else rel_h.stride()[:3],
            column_bias=rel_w,
            column_bias_strides=None if rel_w is None else rel_w.stride()[:3],
            map_columns=None if rel_w is None else rel_w.shape[3],
            sinks=sinks,
            global_keys=global_keys,
            global_stride=None if global_keys is None else batch_stride(global_keys),
            global_count=None if global_keys is None else global_keys.shape[1],
            global_after=1 if after else None,
            global_slots=None,
            slots_stride=None,
            dropout_seed=dropout_seed if dropped else None,
            dropout_threshold=min(int(dropout_p * 2**32), 2**32 - 1) if dropped else None,
            dropout_scale=(1 / (1 - dropout_p) if dropout_p < 1 else 0.0) if dropped else 1.0,
            softcap=softcap * LOG2E.value if softcap else None,
        )

    def tile(self, kernel: str) -> Tile | None:
        if INTERPRET:
            if kernel == "grad_distance":
                return INTERPRETER_TILE._replace(block_m=INTERPRETER_TILE.block_n)
            return None if kernel == "grad_value" and self.head_dim_bucket < 256 else INTERPRETER_TILE
        if self.dtype == torch.float32:
            tile = FLOAT32_TILES.get((kernel, self.head_dim_bucket))
        else:
            tile = TILES.get((kernel, self.head_dim_bucket, architecture(self.device)))
        if tile is not None and self.terms.row_bias is not None:  # two gathered numbers a score take registers
            smaller = {"forward": "block_n", "grad_query": "block_n", "grad_key": "block_m", "grad_value": "block_m"}
            if side := smaller.get(kernel):
                tile = tile._replace(**{side: max(16, getattr(tile, side) // 2)})
        if kernel == "grad_value" and (self.terms.mask is not None or self.terms.distance_bias is not None):
            tile = tile and tile._replace(block_m=min(tile.block_m, 32))  # a loaded tile passes through shared memory
        return tile

    def key_gradient_tiles(self) -> list[tuple[Tile, dict]]:
        """Launches of the key-gradient kernel: one for both sums, or one each where the table has a grad_value row."""
        tile, value_tile = self.tile("grad_key"), self.tile("grad_value")
        if value_tile is None:
            return [(tile, {"KEY": True, "VALUE": True})]
        return [(tile, {"KEY": True, "VALUE": False}), (value_tile, {"KEY": False, "VALUE": True})]

    def constants(self, tile: Tile) -> dict:
        """The compile-time arguments that every kernel of a call takes."""
        return {
            "HEAD_DIM": self.head_dim, "HEAD_DIM_V": self.head_dim_v, "TOP_LEFT": self.top_left,
            "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n,
            "BLOCK_D": block_width(self.head_dim), "BLOCK_DV": block_width(self.head_dim_v),
            "num_warps": tile.num_warps, "num_stages": tile.num_stages,
        }  # fmt: skip


def view(tensor: torch.Tensor) -> View:
    """Of a (B, H, S, D) tensor, or of a packed (T, H, D) one; copied if its channels are not adjacent."""
    if tensor.stride(-1) != 1:
        tensor = tensor.contiguous()
    strides = tensor.stride()
    return View(tensor, strides[:3] if len(strides) == 4 else (0, strides[1], strides[0]))


def batch_stride(table: torch.Tensor) -> int:
    """Of a table with a row a batch, or one row for all."""
    return table.stride(0) if table.shape[0] > 1 else 0


def broadcast_strides(mask: torch.Tensor) -> tuple:
    return tuple(0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True))
