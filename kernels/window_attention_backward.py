"""Windowed attention, backward: gradients of query, key, value, table, bias and logit scale; no atomics.

With P the weights, made anew from query and key, and factor the scale or the head's logit scale:
    dV = Pᵀ·dO,   dS = P * (dO·Vᵀ - rowsum(P * dO·Vᵀ)),   dQ = factor · dS·K,   dK = factor · dSᵀ·Q,   dbias = Σ dS.
Cosine attention has q/|q| and k/|k| in the place of Q and K. What of a gradient lies along its row does not pass the
norm; it is factor · rowsum(dS * cos), columns for keys, and the sum of dS * cos is the gradient of the logit scale.

Windows of up to 64 tokens (`window_backward_kernel`): a program owns a head and a run of windows, whole, so that the
gradient of every row is its own, and adds up the run's dS in registers. Larger ones: window_attention_large.py. Either
way programs leave partial sums, which torch adds and `window_table_gradient_kernel` gathers along the table's rows: the
same call gives the same bits.
"""

import torch
import triton
import triton.language as tl

from ..ops.window_operator import in_order_of
from .common import dot, launch_context
from .window_attention_large import large_backward
from .window_tiles import (
    MOST,
    NUMBERS,
    Cut,
    Problem,
    along_axis,
    bias_tile,
    cosines,
    edges_of,
    inverse_norms,
    load_piece,
    next_place,
    place_of,
    products,
    rows_of,
    scale_of,
    scores,
    store_piece,
    through_norm,
    unit,
    view,
)

TABLE_ROWS = 16  # of a program that gathers the table's gradient
LEAST_SHARE = 4  # windows of a program whose sum of dS is written: what it reads for them is then five times as much


@triton.jit(do_not_specialize=NUMBERS)
def window_backward_kernel(
    grad_out, query, key, value, grad_query, grad_key, grad_value, bias, logit_scale, bias_sums, radials, count0,
    count1, count2, shift0, shift1, shift2, total, heads, share, scale,
    TOKENS: tl.constexpr, PADDED: tl.constexpr, WINDOW: tl.constexpr, GRID: tl.constexpr, WIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    COSINE: tl.constexpr = logit_scale is not None
    cut = Cut((count0, count1, count2), (shift0, shift1, shift2))
    head, chunk = tl.program_id(0) % heads, tl.program_id(0) // heads
    first = chunk * share
    i, j = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    added = bias_tile(bias, head, i, j, TOKENS, PADDED)
    factor = scale_of(scale, logit_scale, head)
    bias_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    place = place_of(first, cut, WINDOW)
    for window in range(first, tl.minimum(first + share, total)):
        query_rows = rows_of(query, place, head, i, cut, WINDOW, GRID, WIDE)
        key_rows = rows_of(key, place, head, j, cut, WINDOW, GRID, WIDE)
        value_rows = rows_of(value, place, head, j, cut, WINDOW, GRID, WIDE)
        grad_out_rows = rows_of(grad_out, place, head, i, cut, WINDOW, GRID, WIDE)
        inverse_q = inverse_norms(query_rows, i, TOKENS, PADDED, HEAD_DIM, BLOCK_D, COSINE)
        inverse_k = inverse_norms(key_rows, j, TOKENS, PADDED, HEAD_DIM, BLOCK_D, COSINE)
        s, query_piece, key_piece = products(query_rows, key_rows, i, j, TOKENS, PADDED, HEAD_DIM, BLOCK_D)
        grad_weights, grad_out_piece, _ = products(
            grad_out_rows, value_rows, i, j, TOKENS, PADDED, HEAD_DIM_V, BLOCK_DV
        )
        cosine = cosines(s, inverse_q, inverse_k, COSINE)
        s = scores(cosine, factor, added, i, j, edges_of(place, cut, WINDOW), cut, WINDOW)  # [BLOCK_M, BLOCK_N]
        weights = tl.exp2(s - tl.max(s, 1)[:, None])
        weights *= (1.0 / tl.sum(weights, 1))[:, None]
        radial_q = 0.0
        radial_k = 0.0
        grad_scores = weights * grad_weights
        delta = tl.sum(grad_scores, 1)
        if COSINE:
            radial_q = tl.sum(grad_scores * cosine, 1) - delta * tl.sum(weights * cosine, 1)
            if radials is not None:
                tl.store(radials + (tl.cast(window, tl.int64) * heads + head) * PADDED + i, radial_q)
        grad_scores -= weights * delta[:, None]
        if bias_sums is not None:
            bias_sum += grad_scores
        if COSINE and HEAD_DIM > BLOCK_D:
            radial_k = tl.sum(grad_scores * cosine, 0)

        weights = weights.to(query_piece.dtype)
        grad_value_rows = rows_of(grad_value, place, head, j, cut, WINDOW, GRID, WIDE)
        for column in tl.static_range(0, HEAD_DIM_V, BLOCK_DV):
            if HEAD_DIM_V > BLOCK_DV:
                grad_out_piece = load_piece(grad_out_rows, i, column, TOKENS, PADDED, HEAD_DIM_V, BLOCK_DV)
            grad = dot(tl.trans(weights), grad_out_piece)
            store_piece(grad_value_rows, j, column, grad, TOKENS, HEAD_DIM_V, BLOCK_DV)
        grad_scores = grad_scores.to(query_piece.dtype)
        grad_query_rows = rows_of(grad_query, place, head, i, cut, WINDOW, GRID, WIDE)
        grad_key_rows = rows_of(grad_key, place, head, j, cut, WINDOW, GRID, WIDE)
        for column in tl.static_range(0, HEAD_DIM, BLOCK_D):
            if COSINE or HEAD_DIM > BLOCK_D:  # read again rather than held
                query_piece = load_piece(query_rows, i, column, TOKENS, PADDED, HEAD_DIM, BLOCK_D)
                key_piece = load_piece(key_rows, j, column, TOKENS, PADDED, HEAD_DIM, BLOCK_D)
            unit_q, unit_k = unit(query_piece, inverse_q, COSINE), unit(key_piece, inverse_k, COSINE)
            grad = through_norm(dot(grad_scores, unit_k), unit_q, inverse_q, radial_q, factor, COSINE)
            store_piece(grad_query_rows, i, column, grad, TOKENS, HEAD_DIM, BLOCK_D)
            grad = dot(tl.trans(grad_scores), unit_q)
            if COSINE and HEAD_DIM <= BLOCK_D:
                radial_k = tl.sum(grad * unit_k.to(tl.float32), 1)  # dearer as a sum over queries
            grad = through_norm(grad, unit_k, inverse_k, radial_k, factor, COSINE)
            store_piece(grad_key_rows, j, column, grad, TOKENS, HEAD_DIM, BLOCK_D)
        place = next_place(place, cut, WINDOW)
    if bias_sums is not None:
        first_sum = bias_sums + (chunk * heads + head).to(tl.int64) * (PADDED * PADDED)
        tl.store(first_sum + i[:, None] * PADDED + j[None, :], bias_sum)


@triton.jit(do_not_specialize=NUMBERS)
def window_table_gradient_kernel(
    dense, grad, heads, TABLE: tl.constexpr, TOKENS: tl.constexpr, PADDED: tl.constexpr, WINDOW: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows of the table for a head: each the sum of `dense` over all pairs of tokens that are so far apart."""
    head, first_row = tl.program_id(0) % heads, tl.program_id(0) // heads * ROWS
    rows = first_row + tl.arange(0, ROWS)
    first = dense + head.to(tl.int64) * (PADDED * PADDED)
    acc = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, TOKENS, BLOCK):
        j = start + tl.arange(0, BLOCK)
        valid = (rows < TABLE)[:, None] & (j < TOKENS)[None, :]
        i = tl.zeros([ROWS, BLOCK], tl.int32)
        rest = rows
        unit = 1
        for x in tl.static_range(len(WINDOW) - 1, -1, -1):
            distance = rest % (2 * WINDOW[x] - 1) - (WINDOW[x] - 1)
            t = along_axis(j, x, WINDOW)[None, :] + distance[:, None]
            valid = valid & (t >= 0) & (t < WINDOW[x])
            i += t * unit
            unit = unit * WINDOW[x]
            rest = rest // (2 * WINDOW[x] - 1)
        acc += tl.load(first + i * PADDED + j[None, :], mask=valid, other=0.0)
    tl.store(grad + rows * heads + head, tl.sum(acc, 1), mask=rows < TABLE)


def backward(
    grad_out, query, key, value, table, bias, logit_scale, window, shift, grid, scale, need_table, need_bias, need_scale
):
    """Gradients of query, key, value, table, bias and logit_scale: see the operator's schema."""
    problem = Problem("backward", query, value, table, bias, logit_scale, window, shift, grid, scale)
    grads = [in_order_of(t, t.shape[-1]) for t in (query, key, value)]
    learned = [
        query.new_zeros(like.shape if need else (0,), dtype=torch.float32)
        for like, need in ((table, need_table), (bias, need_bias), (logit_scale, need_scale))
    ]
    if grads[0].numel() == 0:
        return *grads, *learned
    maps = [view(t) for t in (grad_out, query, key, value, *grads)]
    with launch_context(query):
        if problem.large:
            dense, radials = large_backward(problem, maps, need_table or need_bias, need_scale)
        else:
            dense, radials = whole_backward(problem, maps, need_table or need_bias, need_scale)
        if need_table:
            rows, block = table.shape[0], min(problem.padded, MOST)
            window_table_gradient_kernel[(triton.cdiv(rows, TABLE_ROWS) * problem.heads,)](
                dense, learned[0], problem.heads, TABLE=rows, TOKENS=problem.tokens, PADDED=problem.padded,
                WINDOW=problem.window, ROWS=TABLE_ROWS, BLOCK=block,
            )  # fmt: skip
    if need_bias:
        learned[1] = dense[:, : problem.tokens, : problem.tokens].contiguous()
    if need_scale:
        learned[2] = radials[..., : problem.tokens].sum((0, 2))
    return *grads, *learned


def whole_backward(problem: Problem, maps, need_dense: bool, need_scale: bool):
    """Fills the gradients; returns (H, padded, padded) dS summed over windows and rowsum(dS * cos), or None."""
    tile = problem.tile("backward")
    if problem.logit_scale is not None:  # holds the cosines too: rows fetched ahead would spill
        tile = tile._replace(num_stages=1)
    share = problem.share(LEAST_SHARE if need_dense else 1)
    chunks, heads, padded = triton.cdiv(problem.windows, share), problem.heads, problem.padded
    new = maps[0].ptr.new_empty
    bias_sums = new((chunks, heads, padded, padded), dtype=torch.float32) if need_dense else None
    radials = problem.radials() if need_scale else None
    window_backward_kernel[(chunks * heads,)](
        *maps, problem.dense_bias(), problem.logit_scale, bias_sums, radials, *problem.cut,
        problem.windows, heads, share, problem.scale, **problem.constants(tile, *maps),
    )  # fmt: skip
    return None if bias_sums is None else bias_sums.sum(0), radials
