"""Windowed attention, forward: softmax(scale Q Kᵀ + biases) V inside each window; of cosines with a logit scale.

Liu et al., "Swin Transformer" (2021) and "Swin Transformer V2" (2022); Tu et al., "MaxViT" (2022) for the grid.

Windows of up to 64 tokens (`window_forward_kernel`): a program owns a head and a run of windows. A window's scores are
one tile of 16, 32 or 64 queries and keys, its softmax needs no second look; the head's bias stays in registers for the
whole run, and the rows of the next window are on their way while this one is computed. Larger windows
(`window_large_forward_kernel`): a program owns BLOCK_M queries of a window and walks its keys with an online softmax.
Channels of the value past a piece are further products of the same weights, or, there, further programs.
"""

import triton
import triton.language as tl

from ..ops.window_operator import in_order_of
from .common import dot, launch_context
from .window_tiles import (
    NUMBERS,
    Cut,
    Problem,
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
    view,
)


@triton.jit(do_not_specialize=NUMBERS)
def window_forward_kernel(
    query, key, value, out, bias, logit_scale, count0, count1, count2, shift0, shift1, shift2, total, heads, share,
    scale,
    TOKENS: tl.constexpr, PADDED: tl.constexpr, WINDOW: tl.constexpr, GRID: tl.constexpr, WIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    COSINE: tl.constexpr = logit_scale is not None
    cut = Cut((count0, count1, count2), (shift0, shift1, shift2))
    head, first = tl.program_id(0) % heads, tl.program_id(0) // heads * share
    i, j = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    added = bias_tile(bias, head, i, j, TOKENS, PADDED)
    factor = scale_of(scale, logit_scale, head)
    place = place_of(first, cut, WINDOW)
    for _ in range(first, tl.minimum(first + share, total)):
        query_rows = rows_of(query, place, head, i, cut, WINDOW, GRID, WIDE)
        key_rows = rows_of(key, place, head, j, cut, WINDOW, GRID, WIDE)
        value_rows = rows_of(value, place, head, j, cut, WINDOW, GRID, WIDE)
        out_rows = rows_of(out, place, head, i, cut, WINDOW, GRID, WIDE)
        inverse_q = inverse_norms(query_rows, i, TOKENS, PADDED, HEAD_DIM, BLOCK_D, COSINE)
        inverse_k = inverse_norms(key_rows, j, TOKENS, PADDED, HEAD_DIM, BLOCK_D, COSINE)
        s, _, _ = products(query_rows, key_rows, i, j, TOKENS, PADDED, HEAD_DIM, BLOCK_D)
        s = cosines(s, inverse_q, inverse_k, COSINE)
        s = scores(s, factor, added, i, j, edges_of(place, cut, WINDOW), cut, WINDOW)  # [BLOCK_M, BLOCK_N]
        weights = tl.exp2(s - tl.max(s, 1)[:, None])
        inverse = 1.0 / tl.sum(weights, 1)
        for column in tl.static_range(0, HEAD_DIM_V, BLOCK_DV):
            tile = load_piece(value_rows, j, column, TOKENS, PADDED, HEAD_DIM_V, BLOCK_DV)
            acc = dot(weights.to(tile.dtype), tile) * inverse[:, None]
            store_piece(out_rows, i, column, acc, TOKENS, HEAD_DIM_V, BLOCK_DV)
        place = next_place(place, cut, WINDOW)


@triton.jit(do_not_specialize=NUMBERS)
def window_large_forward_kernel(
    query, key, value, out, bias, logit_scale, count0, count1, count2, shift0, shift1, shift2, heads, scale,
    TOKENS: tl.constexpr, PADDED: tl.constexpr, WINDOW: tl.constexpr, GRID: tl.constexpr, WIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    COSINE: tl.constexpr = logit_scale is not None
    cut = Cut((count0, count1, count2), (shift0, shift1, shift2))
    head, rest = tl.program_id(0) % heads, tl.program_id(0) // heads
    i = rest % tl.cdiv(TOKENS, BLOCK_M) * BLOCK_M + tl.arange(0, BLOCK_M)
    rest = rest // tl.cdiv(TOKENS, BLOCK_M)
    column = rest % tl.cdiv(HEAD_DIM_V, BLOCK_DV) * BLOCK_DV
    place = place_of(rest // tl.cdiv(HEAD_DIM_V, BLOCK_DV), cut, WINDOW)
    edges = edges_of(place, cut, WINDOW)
    query_rows = rows_of(query, place, head, i, cut, WINDOW, GRID, WIDE)
    inverse_q = inverse_norms(query_rows, i, TOKENS, PADDED, HEAD_DIM, BLOCK_D, COSINE)
    factor = scale_of(scale, logit_scale, head)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, TOKENS, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        key_rows = rows_of(key, place, head, j, cut, WINDOW, GRID, WIDE)
        value_rows = rows_of(value, place, head, j, cut, WINDOW, GRID, WIDE)
        inverse_k = inverse_norms(key_rows, j, TOKENS, PADDED, HEAD_DIM, BLOCK_D, COSINE)
        s, _, _ = products(query_rows, key_rows, i, j, TOKENS, PADDED, HEAD_DIM, BLOCK_D)
        s = cosines(s, inverse_q, inverse_k, COSINE)
        s = scores(s, factor, bias_tile(bias, head, i, j, TOKENS, PADDED), i, j, edges, cut, WINDOW)
        new_max = tl.maximum(row_max, tl.max(s, 1))
        finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)  # no key of the query's region yet
        weights = tl.exp2(s - finite_max[:, None])
        correction = tl.exp2(row_max - finite_max)
        row_sum = row_sum * correction + tl.sum(weights, 1)
        row_max = new_max
        tile = load_piece(value_rows, j, column, TOKENS, PADDED, HEAD_DIM_V, BLOCK_DV)
        acc = dot(weights.to(tile.dtype), tile, acc * correction[:, None])
    out_rows = rows_of(out, place, head, i, cut, WINDOW, GRID, WIDE)
    store_piece(out_rows, i, column, acc / row_sum[:, None], TOKENS, HEAD_DIM_V, BLOCK_DV)


def forward(query, key, value, table, bias, logit_scale, window, shift, grid, scale):
    """See the operator's schema."""
    out = in_order_of(query, value.shape[-1])
    if out.numel() == 0:
        return out
    problem = Problem("forward", query, value, table, bias, logit_scale, window, shift, grid, scale)
    tile, maps = problem.tile("forward"), [view(t) for t in (query, key, value, out)]
    constants = problem.constants(tile, *maps)
    with launch_context(query):
        arguments = *maps, problem.dense_bias(), logit_scale, *problem.cut
        if problem.large:
            blocks = triton.cdiv(problem.tokens, tile.block_m) * triton.cdiv(problem.dim_v, constants["BLOCK_DV"])
            window_large_forward_kernel[(problem.windows * blocks * problem.heads,)](
                *arguments, problem.heads, scale, **constants
            )  # fmt: skip
        else:
            share = problem.share(1)
            programs = triton.cdiv(problem.windows, share) * problem.heads
            window_forward_kernel[(programs,)](
                *arguments, problem.windows, problem.heads, share, scale, **constants
            )  # fmt: skip
    return out
