"""Decoding: attention of few new tokens over a long cache, split over its keys; and the writing of new tokens.

Forward. The query heads of a KV head and the tokens of a call are the rows of one tile, so that a key is read once for
all of them: row m is head m // T of the group, token m % T, padded to what a matrix instruction takes. A program owns
BLOCK_M rows and one of `splits` equal ranges of a sequence's keys, and leaves (maximum, sum, unscaled output) of its
online softmax; a second kernel merges the ranges in order (Dao et al., "Flash-Decoding", 2023). The number of splits
comes from shapes and the number of multiprocessors, never from lengths, which stay on the device.

A paged cache is read through its block table, one page number a key; entries are clamped to the pages there are, so
that a bad table never reads outside. Not here: a mask, gradients, dropout.
"""

import functools

import torch
import triton
import triton.language as tl

from ..ops.attention_operator import in_order_of
from .attention_scores import view
from .common import INTERPRET, LOG2E, block_width, dot, launch_context, row_products, tanh

NUMBERS = ["tokens", "capacity", "pages", "appended", "window_left", "distance_head", "table_row"]
_MOST_SPLITS = 64
_LEAST_SPLIT = 256  # keys


@triton.jit
def _row_of_key(block_table, keys, batch, table_row, pages, page_stride, row_stride, PAGE: tl.constexpr):
    """Offsets of keys of one sequence: rows of its own part of the cache, or of the pages that its table names."""
    if PAGE == 0:
        offsets = batch.to(tl.int64) * page_stride + keys.to(tl.int64) * row_stride
    else:
        page = tl.load(block_table + batch.to(tl.int64) * table_row + keys // PAGE)
        page = tl.minimum(tl.maximum(page, 0), pages - 1)
        offsets = page.to(tl.int64) * page_stride + (keys % PAGE).to(tl.int64) * row_stride
    return offsets


@triton.jit(do_not_specialize=NUMBERS)
def decode_split_kernel(
    query, key, value, cache_lengths, block_table, alibi_slopes, distance_bias, partial_out, partial_max, partial_sum,
    tokens, capacity, pages, appended, window_left, alibi_batch, alibi_head, distance_head, table_row, scale, softcap,
    HEADS_KV: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    unit = tl.program_id(0)  # a KV head of a sequence; the other axes of a grid end at 65,535
    split, splits = tl.program_id(1), tl.num_programs(1)
    batch, kv_head = unit // HEADS_KV, unit % HEADS_KV
    rows = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < GROUP * tokens
    head, token = kv_head * GROUP + rows // tokens, rows % tokens
    length = tl.load(cache_lengths + batch).to(tl.int32) + appended
    length = tl.minimum(tl.maximum(length, 0), capacity)
    position = length - tokens + token  # [BLOCK_M]

    channels, channels_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    offsets = batch.to(tl.int64) * query.strides[0] + head.to(tl.int64) * query.strides[1]
    offsets += token.to(tl.int64) * query.strides[2]
    query_tile = tl.load(
        query.ptr + offsets[:, None] + channels[None, :], mask=inside[:, None] & (channels < HEAD_DIM)[None, :],
        other=0.0,
    )  # fmt: skip
    if alibi_slopes is not None:
        slope = tl.load(alibi_slopes + batch * alibi_batch + head * alibi_head, mask=inside, other=0.0)

    first = tl.maximum(length - tokens - window_left, 0)
    blocks = tl.cdiv(tl.cdiv(length - first, BLOCK_N), splits)
    start = first + split * blocks * BLOCK_N
    end = tl.minimum(start + blocks * BLOCK_N, length)
    key_head = key.ptr + kv_head.to(tl.int64) * key.strides[1]
    value_head = value.ptr + kv_head.to(tl.int64) * value.strides[1]
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for start_n in range(start, end, BLOCK_N):
        keys = start_n + tl.arange(0, BLOCK_N)
        there = keys < end
        keys = tl.where(there, keys, start_n)  # their page is in use
        key_rows = _row_of_key(block_table, keys, batch, table_row, pages, key.strides[0], key.strides[2], PAGE)
        key_tile = tl.load(
            key_head + key_rows[:, None] + channels[None, :], mask=there[:, None] & (channels < HEAD_DIM)[None, :],
            other=0.0,
        )  # fmt: skip
        s = row_products(query_tile, key_tile) * scale  # [BLOCK_M, BLOCK_N]
        if softcap is not None:
            s = tanh(s / softcap) * softcap
        distance = keys[None, :] - position[:, None]
        if alibi_slopes is not None:
            s += slope[:, None] * distance
        visible = there[None, :] & (distance <= 0) & (distance >= -window_left) & inside[:, None]
        if distance_bias is not None:
            entry = head[:, None].to(tl.int64) * distance_head + distance + (capacity - 1)
            s += tl.load(distance_bias + entry, mask=visible, other=0.0)
        s = tl.where(visible, s * LOG2E, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(s, 1))
        finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp2(s - finite_max[:, None])
        correction = tl.exp2(row_max - finite_max)
        row_sum = row_sum * correction + tl.sum(weights, 1)
        row_max = new_max
        value_rows = _row_of_key(block_table, keys, batch, table_row, pages, value.strides[0], value.strides[2], PAGE)
        value_tile = tl.load(
            value_head + value_rows[:, None] + channels_v[None, :],
            mask=there[:, None] & (channels_v < HEAD_DIM_V)[None, :], other=0.0,
        )  # fmt: skip
        acc = dot(weights.to(value_tile.dtype), value_tile, acc * correction[:, None])

    # [split, batch, head, token]: statistics, and the output of HEAD_DIM_V channels
    place = (split * (tl.num_programs(0) * GROUP) + batch * (HEADS_KV * GROUP) + head).to(tl.int64) * tokens + token
    tl.store(partial_max + place, row_max, mask=inside)
    tl.store(partial_sum + place, row_sum, mask=inside)
    tl.store(
        partial_out + place[:, None] * HEAD_DIM_V + channels_v[None, :], acc,
        mask=inside[:, None] & (channels_v < HEAD_DIM_V)[None, :],
    )  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "rows", "splits"])
def decode_merge_kernel(
    partial_out, partial_max, partial_sum, sinks, out, lse, tokens, rows, splits,
    HEADS: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Row `program` of (batch, head, token): the splits in the order of their keys, then the sink."""
    row = tl.program_id(0).to(tl.int64)
    head, token = row // tokens % HEADS, row % tokens
    channels = tl.arange(0, BLOCK_DV)
    inside = channels < HEAD_DIM_V
    row_max, row_sum = float("-inf"), 0.0
    acc = tl.zeros([BLOCK_DV], tl.float32)
    if sinks is not None:
        row_max = tl.load(sinks + head) * LOG2E
        row_sum = tl.where(row_max == float("-inf"), 0.0, 1.0)
    for split in range(splits):
        place = split * tl.cast(rows, tl.int64) + row
        split_max = tl.load(partial_max + place)
        new_max = tl.maximum(row_max, split_max)
        finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        correction, weight = tl.exp2(row_max - finite_max), tl.exp2(split_max - finite_max)
        row_sum = row_sum * correction + tl.load(partial_sum + place) * weight
        acc = acc * correction + tl.load(partial_out + place * HEAD_DIM_V + channels, mask=inside, other=0.0) * weight
        row_max = new_max
    empty = row_sum == 0.0
    divisor = tl.where(empty, 1.0, row_sum)
    tl.store(lse + row, tl.where(empty, float("-inf"), (row_max + tl.log2(divisor)) / LOG2E))
    offsets = row // tokens // HEADS * out.strides[0] + head * out.strides[1] + token * out.strides[2]
    tl.store(out.ptr + offsets + channels, (acc / divisor).to(out.ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens", "capacity", "pages", "table_row"])
def kv_cache_append_kernel(
    key_cache, value_cache, new_key, new_value, cache_lengths, block_table, tokens, capacity, pages, table_row,
    HEADS_KV: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """One new token of one KV head; a token past the capacity is not written."""
    token, unit = tl.program_id(0) % tokens, tl.program_id(0) // tokens
    batch, head = unit // HEADS_KV, unit % HEADS_KV
    place = tl.load(cache_lengths + batch).to(tl.int32) + token
    if place < 0 or place >= capacity:
        return
    channels, channels_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    rows = _row_of_key(block_table, place, batch, table_row, pages, key_cache.strides[0], key_cache.strides[2], PAGE)
    head, token = head.to(tl.int64), token.to(tl.int64)
    source = batch.to(tl.int64) * new_key.strides[0] + head * new_key.strides[1] + token * new_key.strides[2]
    row = tl.load(new_key.ptr + source + channels, mask=channels < HEAD_DIM)
    tl.store(key_cache.ptr + rows + head * key_cache.strides[1] + channels, row, mask=channels < HEAD_DIM)
    strides = value_cache.strides
    rows = _row_of_key(block_table, place, batch, table_row, pages, strides[0], strides[2], PAGE)
    source = batch.to(tl.int64) * new_value.strides[0] + head * new_value.strides[1] + token * new_value.strides[2]
    row = tl.load(new_value.ptr + source + channels_v, mask=channels_v < HEAD_DIM_V)
    tl.store(value_cache.ptr + rows + head * strides[1] + channels_v, row, mask=channels_v < HEAD_DIM_V)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return 2 if INTERPRET else torch.cuda.get_device_properties(device).multi_processor_count


def _paging(cache: torch.Tensor, block_table: torch.Tensor | None) -> tuple[int, int, int]:
    """Keys a sequence can hold, page size (0: not paged), stride of the table."""
    if block_table is None:
        return cache.shape[2], 0, 0
    return cache.shape[2] * block_table.shape[1], cache.shape[2], block_table.stride(0)


def append(key_cache, value_cache, new_key, new_value, cache_lengths, block_table):
    """Writes into the caches: see the operator's schema."""
    batch, heads, tokens, head_dim = new_key.shape
    head_dim_v = new_value.shape[3]
    if batch * tokens == 0:
        return
    capacity, page, table_row = _paging(key_cache, block_table)
    with launch_context(new_key):
        kv_cache_append_kernel[(batch * heads * tokens,)](
            view(key_cache), view(value_cache), view(new_key), view(new_value), cache_lengths, block_table, tokens,
            capacity, key_cache.shape[0], table_row, HEADS_KV=heads, HEAD_DIM=head_dim, HEAD_DIM_V=head_dim_v,
            PAGE=page, BLOCK_D=triton.next_power_of_2(head_dim), BLOCK_DV=triton.next_power_of_2(head_dim_v),
            num_warps=1,
        )  # fmt: skip


def split_count(units: int, capacity: int, device: torch.device) -> int:
    """Ranges that a sequence's keys are cut into: two programs a multiprocessor, if ranges stay long enough."""
    wanted = -(-2 * multiprocessors(device) // units)
    least = 32 if INTERPRET else _LEAST_SPLIT
    return max(1, min(wanted, -(-capacity // least), _MOST_SPLITS))


def forward(
    query, key_cache, value_cache, cache_lengths, block_table, alibi_slopes, distance_bias, sinks, appended, scale,
    softcap, window_left,
):  # fmt: skip
    """(out, lse): see the operator's schema."""
    batch, heads, tokens, head_dim = query.shape
    heads_kv, head_dim_v = key_cache.shape[1], value_cache.shape[3]
    out = in_order_of(query, head_dim_v)
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    capacity, page, table_row = _paging(key_cache, block_table)
    group, rows = heads // heads_kv, batch * heads * tokens
    block_m = min(64, max(16, triton.next_power_of_2(group * tokens)))
    wide = max(block_width(head_dim), block_width(head_dim_v)) > 128
    block_n = 16 if INTERPRET else 32 if wide or query.dtype == torch.float32 else 64
    row_blocks = triton.cdiv(group * tokens, block_m)
    splits = split_count(batch * heads_kv * row_blocks, capacity, query.device)
    partial_out = query.new_empty(splits, rows, head_dim_v, dtype=torch.float32)
    partial_max, partial_sum = query.new_empty(2, splits, rows, dtype=torch.float32).unbind()
    slope_strides = (0, 0) if alibi_slopes is None else (0, *alibi_slopes.stride())[-2:]
    with launch_context(query):
        decode_split_kernel[(batch * heads_kv, splits, row_blocks)](
            view(query), view(key_cache), view(value_cache), cache_lengths, block_table, alibi_slopes, distance_bias,
            partial_out, partial_max, partial_sum, tokens, capacity, key_cache.shape[0], appended,
            2**30 if window_left < 0 else window_left, *slope_strides,
            0 if distance_bias is None else distance_bias.stride(0), table_row, scale, softcap or None,
            HEADS_KV=heads_kv, GROUP=group, HEAD_DIM=head_dim, HEAD_DIM_V=head_dim_v, PAGE=page, BLOCK_M=block_m,
            BLOCK_N=block_n, BLOCK_D=block_width(head_dim), BLOCK_DV=block_width(head_dim_v), num_warps=4,
            num_stages=2 if wide else 3,
        )  # fmt: skip
        decode_merge_kernel[(rows,)](
            partial_out, partial_max, partial_sum, sinks, view(out), lse, tokens, rows, splits, HEADS=heads,
            HEAD_DIM_V=head_dim_v, BLOCK_DV=block_width(head_dim_v), num_warps=4 if head_dim_v > 64 else 1,
        )  # fmt: skip
    return out, lse
