"""Softmax attention, gradient of a float mask: dS summed over the axes along which the mask was broadcast.

A program owns a tile of the mask's own elements and walks everything that read it: (batch, head) pairs, and query or
key blocks where those axes are broadcast. A small mask is read by many pairs: they are split over programs, by shape
alone, into parts which torch then sums. No atomics: the same call gives the same bits.
"""

import torch
import triton
import triton.language as tl

from .attention_global import any_global
from .attention_scores import LENGTHS, base_of, head_terms, key_limit_of, tile_gradient, visible_blocks
from .common import load_tile

PROGRAMS = 1024  # as many as keep any GPU busy; fewer mask tiles than that are split


@triton.jit(do_not_specialize=[*LENGTHS, "pairs", "splits"])
def attention_mask_gradient_kernel(
    grad_out, query, key, value, statistics, grad_ptr, terms, group, mask_batches, mask_heads, heads, pairs,
    splits, rows_q, rows_k, scale, window_left, window_right,
    ONE_HEAD: tl.constexpr, ONE_ROW: tl.constexpr, ONE_COLUMN: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, TOP_LEFT: tl.constexpr,
):  # fmt: skip
    tiles_n = 1 if ONE_COLUMN else tl.cdiv(rows_k, BLOCK_N)
    tiles_m = 1 if ONE_ROW else tl.cdiv(rows_q, BLOCK_M)
    tile_n, rest = tl.program_id(0) % tiles_n, tl.program_id(0) // tiles_n
    tile_m, rest = rest % tiles_m, rest // tiles_m
    plane, split = rest % (mask_batches * mask_heads), rest // (mask_batches * mask_heads)
    mask_batch, mask_head = plane // mask_heads, plane % mask_heads
    pair_heads = heads if ONE_HEAD else 1

    first_row = tile_m * BLOCK_M
    end_row = rows_q if ONE_ROW else first_row + 1
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    share = tl.cdiv(pairs, splits)
    for pair in range(split * share, tl.minimum((split + 1) * share, pairs)):
        batch, head = mask_batch + pair // pair_heads, mask_head + pair % pair_heads
        stream = batch * heads + head
        key_limit = key_limit_of(batch, terms.key_lengths, rows_k)
        shift = 0 if TOP_LEFT else rows_k - rows_q
        kv_head = head // group
        query_base = base_of(query, batch, head, 0)
        grad_out_base = base_of(grad_out, batch, head, 0)
        key_base = base_of(key, batch, kv_head, 0)
        value_base = base_of(value, batch, kv_head, 0)
        lse_base = statistics.ptr + stream.to(tl.int64) * statistics.stride
        own = head_terms(terms, batch, head)
        if terms.global_slots is not None:
            columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
            has_global = any_global(columns, key_limit, own)
        for start_m in range(first_row, end_row, BLOCK_M):
            rows = start_m + tl.arange(0, BLOCK_M)
            last = tl.minimum(start_m + BLOCK_M, rows_q) - 1
            blocks = visible_blocks(start_m, last, shift, key_limit, window_left, window_right, BLOCK_N)
            begin = blocks[2]
            end = begin + blocks[1] + blocks[5]
            if not ONE_COLUMN:
                begin = tl.maximum(begin, tile_n)
                end = tl.minimum(end, tile_n + 1)
            if terms.global_slots is not None:  # a mask with a gradient has all keys: the tile is one of theirs
                begin = tl.where(has_global, tile_n, begin)
                end = tl.where(has_global, tile_n + 1, end)
            query_tile = load_tile(query_base, query.strides[2], start_m, rows_q, HEAD_DIM, BLOCK_M, BLOCK_D, True)
            grad_out_tile = load_tile(
                grad_out_base, grad_out.strides[2], start_m, rows_q, HEAD_DIM_V, BLOCK_M, BLOCK_DV, True
            )
            lse = tl.load(lse_base + rows)
            delta = tl.load(lse_base + statistics.delta + rows)
            lse_error = tl.load(lse_base + 2 * statistics.delta + rows)
            for block in range(begin, end):
                start_n = block * BLOCK_N
                columns = start_n + tl.arange(0, BLOCK_N)
                key_tile = load_tile(key_base, key.strides[2], start_n, key_limit, HEAD_DIM, BLOCK_N, BLOCK_D, True)
                value_tile = load_tile(
                    value_base, value.strides[2], start_n, key_limit, HEAD_DIM_V, BLOCK_N, BLOCK_DV, True
                )
                acc += tile_gradient(
                    query_tile, grad_out_tile, key_tile, value_tile, lse, delta, lse_error, rows, columns, start_n,
                    key_limit, rows_q, shift, scale, own, window_left, window_right, stream, terms, ALIGNED=True,
                )  # fmt: skip

    mask_rows = 1 if ONE_ROW else rows_q
    mask_columns = 1 if ONE_COLUMN else rows_k
    row = tile_m * BLOCK_M + tl.arange(0, 1 if ONE_ROW else BLOCK_M)[:, None]
    column = tile_n * BLOCK_N + tl.arange(0, 1 if ONE_COLUMN else BLOCK_N)[None, :]
    if ONE_ROW:
        acc = tl.sum(acc, 0, keep_dims=True)
    if ONE_COLUMN:
        acc = tl.sum(acc, 1, keep_dims=True)
    matrix = (split * mask_batches * mask_heads + plane).to(tl.int64) * mask_rows
    pointers = grad_ptr + (matrix + row) * mask_columns + column
    tl.store(pointers, acc.to(grad_ptr.dtype.element_ty), mask=(row < mask_rows) & (column < mask_columns))


def mask_gradient(problem, mask, views, statistics):
    """Of a (B or 1, Hq or 1, Sq or 1, Sk or 1) float mask; `views` are those of grad_out, query, key and value."""
    if mask.numel() == 0 or problem.rows_k == 0:
        return mask.new_zeros(mask.shape)
    tile = problem.tile("grad_mask")
    mask_batches, mask_heads, mask_rows, mask_columns = mask.shape
    pairs = problem.batch * problem.heads // (mask_batches * mask_heads)
    tiles_m, tiles_n = triton.cdiv(mask_rows, tile.block_m), triton.cdiv(mask_columns, tile.block_n)
    programs = mask_batches * mask_heads * tiles_m * tiles_n
    splits = min(pairs, max(1, PROGRAMS // programs))
    grad = mask.new_empty((splits, *mask.shape), dtype=mask.dtype if splits == 1 else torch.float32)
    attention_mask_gradient_kernel[(programs * splits,)](
        *views, statistics, grad, problem.terms, problem.group, mask_batches, mask_heads, problem.heads, pairs, splits,
        problem.rows_q, problem.rows_k, problem.score_scale, problem.window_left, problem.window_right,
        ONE_HEAD=mask_heads == 1, ONE_ROW=mask_rows == 1, ONE_COLUMN=mask_columns == 1, **problem.constants(tile),
    )  # fmt: skip
    return grad[0] if splits == 1 else grad.sum(0).to(mask.dtype)
