"""Softmax attention, forward: out = softmax(cap(Q·Kᵀ · scale) + biases + mask) · V and lse, in one pass over the keys.

A program owns BLOCK_M queries of one head and walks the key blocks that they see, keeping a running maximum and sum
(online softmax: Milakov and Gimelshein 2018; FlashAttention-2: Dao 2023). Blocks that every query sees whole take a
loop without position tests; blocks outside causal limit, window and key length are never read. Programs of one head are
neighbours, so that its keys stay in L2, and those with the most keys start first. Global keys, gathered, are a third
loop, of what is outside the window. A sink is a running sum that starts
at exp(sink). Where a gradient wants it, the residual keeps what rounding takes from out, and EXACT multiplies half-
precision weights as two numbers each.

Not here: splitting the keys of one query over programs, which few queries over a long cache need.
"""

import torch
import triton
import triton.language as tl

from ..ops.attention_operator import empty_residual, in_order_of
from .attention_scores import (
    LENGTHS,
    WHOLE,
    Problem,
    base_of,
    block_count,
    columns_at,
    dropout_of_pass,
    head_terms,
    load_keys,
    lse_in_log2,
    place_of,
    scores,
    view,
    visible_blocks,
    visible_in_pass,
)
from .common import LOG2E, dot, launch_context, load_tile, row_products, store_tile


@triton.jit
def _attend(
    acc, row_max, row_sum, query, key_base, value_base, key_stride, value_stride, rows, blocks, length_q, key_limit,
    shift, scale, own, left, right, batch, stream, terms,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, PLAIN: tl.constexpr, EXACT: tl.constexpr, PASS: tl.constexpr,
):  # fmt: skip
    """The online softmax over the blocks of keys of a pass."""
    for i in range(block_count(blocks, terms, PASS, BLOCK_N)):
        start_n, columns = columns_at(i, blocks, batch, key_limit, terms, PASS, BLOCK_N)
        key = load_keys(key_base, key_stride, start_n, columns, key_limit, HEAD_DIM, BLOCK_N, BLOCK_D, PASS)
        products = row_products(query, key)  # [BLOCK_M, BLOCK_N]
        if PLAIN:  # scale > 0 and no other term: the maximum comes before the scale, which then joins an FMA
            if PASS != WHOLE:
                visible = visible_in_pass(
                    rows[:, None], columns[None, :], shift, key_limit, left, right, own, terms, PASS
                )
                products = tl.where(visible, products, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(products, 1) * scale)
        else:
            s, _ = scores(
                products, rows[:, None], columns[None, :], length_q, key_limit, shift, scale, own, left, right, terms,
                PASS,
            )  # fmt: skip
            new_max = tl.maximum(row_max, tl.max(s, 1))
        finite_max = new_max
        if PASS != WHOLE or terms.mask is not None:
            finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        if PLAIN:
            weights = tl.exp2(products * scale - finite_max[:, None])
        else:
            weights = tl.exp2(s - finite_max[:, None])
        correction = tl.exp2(row_max - finite_max)
        row_sum = row_sum * correction + tl.sum(weights, 1)
        row_max = new_max
        weights = dropout_of_pass(weights, rows, columns, start_n, stream, terms, BLOCK_N, False, PASS)
        value = load_keys(value_base, value_stride, start_n, columns, key_limit, HEAD_DIM_V, BLOCK_N, BLOCK_DV, PASS)
        rounded = weights.to(value.dtype)
        acc = dot(rounded, value, acc * correction[:, None])  # [BLOCK_M, BLOCK_DV]
        if EXACT:
            acc = dot((weights - rounded.to(tl.float32)).to(value.dtype), value, acc)
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=LENGTHS)
def attention_forward_kernel(
    query, key, value, out, residual, lse_ptr, terms, heads, group, rows_q, rows_k, max_rows_q, scale, window_left,
    window_right,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, TOP_LEFT: tl.constexpr, PLAIN: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    blocks_m = tl.cdiv(max_rows_q, BLOCK_M)
    stream = tl.program_id(0) // blocks_m
    start_m = (blocks_m - 1 - tl.program_id(0) % blocks_m) * BLOCK_M
    batch, head, first_q, length_q, first_k, _, key_limit, shift = place_of(
        stream, heads, rows_q, rows_k, terms, TOP_LEFT
    )
    if start_m >= length_q:
        return

    kv_head = head // group
    query_base = base_of(query, batch, head, first_q)
    key_base = base_of(key, batch, kv_head, first_k)
    value_base = base_of(value, batch, kv_head, first_k)
    out_base = base_of(out, batch, head, first_q)
    own = head_terms(terms, batch, head)

    rows = start_m + tl.arange(0, BLOCK_M)
    last = tl.minimum(start_m + BLOCK_M, length_q) - 1
    query_tile = load_tile(query_base, query.strides[2], start_m, length_q, HEAD_DIM, BLOCK_M, BLOCK_D, True)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    if terms.sinks is not None:
        sink = tl.load(terms.sinks + head) * LOG2E
        row_max = tl.zeros([BLOCK_M], tl.float32) + sink
        row_sum += tl.where(sink == float("-inf"), 0.0, 1.0)
    blocks = visible_blocks(start_m, last, shift, key_limit, window_left, window_right, BLOCK_N)
    for PASS in tl.static_range(2 if terms.global_keys is None else 3):
        acc, row_max, row_sum = _attend(
            acc, row_max, row_sum, query_tile, key_base, value_base, key.strides[2], value.strides[2], rows, blocks,
            length_q, key_limit, shift, scale, own, window_left, window_right, batch, stream, terms,
            HEAD_DIM, HEAD_DIM_V, BLOCK_N, BLOCK_D, BLOCK_DV, PLAIN, EXACT, PASS,
        )  # fmt: skip

    empty = row_sum == 0.0
    divisor = tl.where(empty, 1.0, row_sum)
    lse = tl.where(empty, float("-inf"), (row_max + tl.log2(divisor)) / LOG2E)
    acc *= (terms.dropout_scale / divisor)[:, None]
    store_tile(out_base, out.strides[2], start_m, length_q, acc, HEAD_DIM_V, BLOCK_M, BLOCK_DV)
    if residual is not None:
        residual_base = base_of(residual, batch, head, first_q)
        error = acc - acc.to(out.ptr.dtype.element_ty).to(tl.float32)
        store_tile(residual_base, residual.strides[2], start_m, length_q, error, HEAD_DIM_V, BLOCK_M, BLOCK_DV)
    lse_base = lse_ptr + (stream if terms.cu_seqlens_q is None else head).to(tl.int64) * rows_q + first_q
    tl.store(lse_base + rows, lse, mask=rows < length_q)
    error = (row_max - lse_in_log2(lse)) + tl.log2(divisor)
    streams = tl.num_programs(0) // blocks_m if terms.cu_seqlens_q is None else heads
    error_base = lse_base + streams.to(tl.int64) * rows_q
    tl.store(error_base + rows, tl.where(tl.abs(error) < float("inf"), error, 0.0), mask=rows < length_q)


def forward(query, key, value, *terms):
    """(out, lse, residual): see the operator's schema."""
    *terms, save_residual, exact_weights = terms
    problem = Problem(query, key, value, *terms)
    out = in_order_of(query, problem.head_dim_v)
    residual = empty_residual(query, problem.head_dim_v, save_residual)
    lse = query.new_empty(problem.lse_shape, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse, residual
    tile, exact = problem.tile("forward"), exact_weights and query.dtype != torch.float32
    if exact:  # twice the weights in registers
        tile = tile._replace(block_n=max(16, tile.block_n // 2))
    grid = (triton.cdiv(problem.max_rows_q, tile.block_m) * problem.batch * problem.heads,)
    with launch_context(query):
        attention_forward_kernel[grid](
            view(query), view(key), view(value), view(out), view(residual) if residual.numel() else None, lse,
            problem.terms, problem.heads, problem.group, problem.rows_q, problem.rows_k, problem.max_rows_q,
            problem.score_scale, problem.window_left, problem.window_right, PLAIN=problem.plain,
            EXACT=exact, **problem.constants(tile),
        )  # fmt: skip
    return out, lse, residual
