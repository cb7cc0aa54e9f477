"""Windowed attention, backward, for windows larger than a tile; the formulas are in window_attention_backward.py.

Three kernels, each making the scores of its tiles anew, each result owned by one program:
    query gradient: a program owns BLOCK_M queries of a window and walks its keys twice, first for the statistics of the
        softmax (lse, and rowsum(P * dO·Vᵀ)), which it also writes for the other kernels, then for dQ;
    key gradient: a program owns BLOCK_N keys of a window and walks its queries, for dK and dV;
    bias gradient: a program owns a tile of the bias and walks a run of windows. Only when asked for.
Channels past a piece are further programs.
"""

import torch
import triton
import triton.language as tl

from .common import dot
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
    through_norm,
    unit,
)


@triton.jit
def _tile(
    grad_out_rows, query_rows, key_rows, value_rows, inverse_q, inverse_k, bias, factor, head, i, j, edges, cut,
    TOKENS: tl.constexpr, PADDED: tl.constexpr, WINDOW: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, COSINE: tl.constexpr,
):  # fmt: skip
    """(scores, cosines, dO·Vᵀ) of a tile of a window."""
    cosine, _, _ = products(query_rows, key_rows, i, j, TOKENS, PADDED, HEAD_DIM, BLOCK_D)
    cosine = cosines(cosine, inverse_q, inverse_k, COSINE)
    grad_weights, _, _ = products(grad_out_rows, value_rows, i, j, TOKENS, PADDED, HEAD_DIM_V, BLOCK_DV)
    s = scores(cosine, factor, bias_tile(bias, head, i, j, TOKENS, PADDED), i, j, edges, cut, WINDOW)
    return s, cosine, grad_weights


@triton.jit(do_not_specialize=NUMBERS)
def window_query_gradient_kernel(
    grad_out, query, key, value, grad, bias, logit_scale, statistics, radials, count0, count1, count2, shift0, shift1,
    shift2, heads, scale,
    TOKENS: tl.constexpr, PADDED: tl.constexpr, WINDOW: tl.constexpr, GRID: tl.constexpr, WIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    COSINE: tl.constexpr = logit_scale is not None
    cut = Cut((count0, count1, count2), (shift0, shift1, shift2))
    head, rest = tl.program_id(0) % heads, tl.program_id(0) // heads
    block, rest = rest % tl.cdiv(TOKENS, BLOCK_M), rest // tl.cdiv(TOKENS, BLOCK_M)
    piece, window = rest % tl.cdiv(HEAD_DIM, BLOCK_D), rest // tl.cdiv(HEAD_DIM, BLOCK_D)
    i = block * BLOCK_M + tl.arange(0, BLOCK_M)
    place = place_of(window, cut, WINDOW)
    edges = edges_of(place, cut, WINDOW)
    query_rows = rows_of(query, place, head, i, cut, WINDOW, GRID, WIDE)
    grad_out_rows = rows_of(grad_out, place, head, i, cut, WINDOW, GRID, WIDE)
    inverse_q = inverse_norms(query_rows, i, TOKENS, PADDED, HEAD_DIM, BLOCK_D, COSINE)
    factor = scale_of(scale, logit_scale, head)

    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    delta = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, TOKENS, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        key_rows = rows_of(key, place, head, j, cut, WINDOW, GRID, WIDE)
        value_rows = rows_of(value, place, head, j, cut, WINDOW, GRID, WIDE)
        inverse_k = inverse_norms(key_rows, j, TOKENS, PADDED, HEAD_DIM, BLOCK_D, COSINE)
        s, _, grad_weights = _tile(
            grad_out_rows, query_rows, key_rows, value_rows, inverse_q, inverse_k, bias, factor, head, i, j, edges, cut,
            TOKENS, PADDED, WINDOW, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, COSINE,
        )  # fmt: skip
        new_max = tl.maximum(row_max, tl.max(s, 1))
        finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)  # no key of the query's region yet
        weights = tl.exp2(s - finite_max[:, None])
        correction = tl.exp2(row_max - finite_max)
        row_sum = row_sum * correction + tl.sum(weights, 1)
        delta = delta * correction + tl.sum(weights * grad_weights, 1)
        row_max = new_max
    lse = row_max + tl.log2(row_sum)
    delta = delta / row_sum
    statistics += (window.to(tl.int64) * heads + head) * (2 * PADDED)
    if piece == 0:
        tl.store(statistics + i, lse)
        tl.store(statistics + PADDED + i, delta)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    radial = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, TOKENS, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        key_rows = rows_of(key, place, head, j, cut, WINDOW, GRID, WIDE)
        value_rows = rows_of(value, place, head, j, cut, WINDOW, GRID, WIDE)
        inverse_k = inverse_norms(key_rows, j, TOKENS, PADDED, HEAD_DIM, BLOCK_D, COSINE)
        s, cosine, grad_weights = _tile(
            grad_out_rows, query_rows, key_rows, value_rows, inverse_q, inverse_k, bias, factor, head, i, j, edges, cut,
            TOKENS, PADDED, WINDOW, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, COSINE,
        )  # fmt: skip
        grad_scores = tl.exp2(s - lse[:, None]) * (grad_weights - delta[:, None])
        if COSINE:
            radial += tl.sum(grad_scores * cosine, 1)
        tile = load_piece(key_rows, j, piece * BLOCK_D, TOKENS, PADDED, HEAD_DIM, BLOCK_D)
        acc = dot(grad_scores.to(tile.dtype), unit(tile, inverse_k, COSINE), acc)
    if radials is not None:
        tl.store(radials + (window.to(tl.int64) * heads + head) * PADDED + i, radial, mask=piece == 0)
    tile = load_piece(query_rows, i, piece * BLOCK_D, TOKENS, PADDED, HEAD_DIM, BLOCK_D)
    acc = through_norm(acc, unit(tile, inverse_q, COSINE), inverse_q, radial, factor, COSINE)
    store_piece(
        rows_of(grad, place, head, i, cut, WINDOW, GRID, WIDE), i, piece * BLOCK_D, acc, TOKENS, HEAD_DIM, BLOCK_D
    )


@triton.jit(do_not_specialize=NUMBERS)
def window_key_gradient_kernel(
    grad_out, query, key, value, grad_key, grad_value, bias, logit_scale, statistics, count0, count1, count2, shift0,
    shift1, shift2, heads, scale,
    TOKENS: tl.constexpr, PADDED: tl.constexpr, WINDOW: tl.constexpr, GRID: tl.constexpr, WIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    COSINE: tl.constexpr = logit_scale is not None
    cut = Cut((count0, count1, count2), (shift0, shift1, shift2))
    PIECES: tl.constexpr = max(tl.cdiv(HEAD_DIM, BLOCK_D), tl.cdiv(HEAD_DIM_V, BLOCK_DV))
    head, rest = tl.program_id(0) % heads, tl.program_id(0) // heads
    block, rest = rest % tl.cdiv(TOKENS, BLOCK_N), rest // tl.cdiv(TOKENS, BLOCK_N)
    piece, window = rest % PIECES, rest // PIECES
    j = block * BLOCK_N + tl.arange(0, BLOCK_N)
    place = place_of(window, cut, WINDOW)
    edges = edges_of(place, cut, WINDOW)
    key_rows = rows_of(key, place, head, j, cut, WINDOW, GRID, WIDE)
    value_rows = rows_of(value, place, head, j, cut, WINDOW, GRID, WIDE)
    inverse_k = inverse_norms(key_rows, j, TOKENS, PADDED, HEAD_DIM, BLOCK_D, COSINE)
    factor = scale_of(scale, logit_scale, head)
    statistics += (window.to(tl.int64) * heads + head) * (2 * PADDED)
    acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    acc_v = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    radial = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, TOKENS, BLOCK_M):
        i = start + tl.arange(0, BLOCK_M)
        query_rows = rows_of(query, place, head, i, cut, WINDOW, GRID, WIDE)
        grad_out_rows = rows_of(grad_out, place, head, i, cut, WINDOW, GRID, WIDE)
        inverse_q = inverse_norms(query_rows, i, TOKENS, PADDED, HEAD_DIM, BLOCK_D, COSINE)
        s, cosine, grad_weights = _tile(
            grad_out_rows, query_rows, key_rows, value_rows, inverse_q, inverse_k, bias, factor, head, i, j, edges, cut,
            TOKENS, PADDED, WINDOW, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, COSINE,
        )  # fmt: skip
        weights = tl.exp2(s - tl.load(statistics + i)[:, None])
        grad_scores = weights * (grad_weights - tl.load(statistics + PADDED + i)[:, None])
        if COSINE:
            radial += tl.sum(grad_scores * cosine, 0)
        tile = load_piece(grad_out_rows, i, piece * BLOCK_DV, TOKENS, PADDED, HEAD_DIM_V, BLOCK_DV)
        acc_v = dot(tl.trans(weights.to(tile.dtype)), tile, acc_v)
        tile = load_piece(query_rows, i, piece * BLOCK_D, TOKENS, PADDED, HEAD_DIM, BLOCK_D)
        acc = dot(tl.trans(grad_scores.to(tile.dtype)), unit(tile, inverse_q, COSINE), acc)
    store_piece(
        rows_of(grad_value, place, head, j, cut, WINDOW, GRID, WIDE), j, piece * BLOCK_DV, acc_v, TOKENS, HEAD_DIM_V,
        BLOCK_DV,
    )  # fmt: skip
    tile = load_piece(key_rows, j, piece * BLOCK_D, TOKENS, PADDED, HEAD_DIM, BLOCK_D)
    acc = through_norm(acc, unit(tile, inverse_k, COSINE), inverse_k, radial, factor, COSINE)
    store_piece(
        rows_of(grad_key, place, head, j, cut, WINDOW, GRID, WIDE), j, piece * BLOCK_D, acc, TOKENS, HEAD_DIM, BLOCK_D
    )


@triton.jit(do_not_specialize=NUMBERS)
def window_bias_gradient_kernel(
    grad_out, query, key, value, bias, logit_scale, statistics, sums, count0, count1, count2, shift0, shift1, shift2,
    total, heads, share, scale,
    TOKENS: tl.constexpr, PADDED: tl.constexpr, WINDOW: tl.constexpr, GRID: tl.constexpr, WIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    COSINE: tl.constexpr = logit_scale is not None
    cut = Cut((count0, count1, count2), (shift0, shift1, shift2))
    head, rest = tl.program_id(0) % heads, tl.program_id(0) // heads
    block_n, rest = rest % (PADDED // BLOCK_N), rest // (PADDED // BLOCK_N)
    block_m, chunk = rest % (PADDED // BLOCK_M), rest // (PADDED // BLOCK_M)
    i, j = block_m * BLOCK_M + tl.arange(0, BLOCK_M), block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    factor = scale_of(scale, logit_scale, head)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    place = place_of(chunk * share, cut, WINDOW)
    for window in range(chunk * share, tl.minimum((chunk + 1) * share, total)):
        grad_out_rows = rows_of(grad_out, place, head, i, cut, WINDOW, GRID, WIDE)
        query_rows = rows_of(query, place, head, i, cut, WINDOW, GRID, WIDE)
        key_rows = rows_of(key, place, head, j, cut, WINDOW, GRID, WIDE)
        value_rows = rows_of(value, place, head, j, cut, WINDOW, GRID, WIDE)
        inverse_q = inverse_norms(query_rows, i, TOKENS, PADDED, HEAD_DIM, BLOCK_D, COSINE)
        inverse_k = inverse_norms(key_rows, j, TOKENS, PADDED, HEAD_DIM, BLOCK_D, COSINE)
        edges = edges_of(place, cut, WINDOW)
        s, _, grad_weights = _tile(
            grad_out_rows, query_rows, key_rows, value_rows, inverse_q, inverse_k, bias, factor, head, i, j, edges, cut,
            TOKENS, PADDED, WINDOW, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, COSINE,
        )  # fmt: skip
        own = statistics + (tl.cast(window, tl.int64) * heads + head) * (2 * PADDED) + i
        acc += tl.exp2(s - tl.load(own)[:, None]) * (grad_weights - tl.load(own + PADDED)[:, None])
        place = next_place(place, cut, WINDOW)
    first_sum = sums + (chunk * heads + head).to(tl.int64) * (PADDED * PADDED)
    tl.store(first_sum + i[:, None] * PADDED + j[None, :], acc)


def large_backward(problem: Problem, maps, need_dense: bool, need_scale: bool):
    """Fills the gradients; returns (H, padded, padded) dS summed over windows and rowsum(dS * cos), or None."""
    inputs, (grad_query, grad_key, grad_value) = maps[:4], maps[4:]
    heads, windows, padded = problem.heads, problem.windows, problem.padded
    bias, new = problem.dense_bias(), inputs[0].ptr.new_empty
    statistics = new((windows, heads, 2, padded), dtype=torch.float32)

    tile = problem.tile("grad_query")
    constants, blocks = problem.constants(tile, *maps), triton.cdiv(problem.tokens, tile.block_m)
    pieces = triton.cdiv(problem.dim, constants["BLOCK_D"])
    radials = problem.radials() if need_scale else None
    window_query_gradient_kernel[(windows * pieces * blocks * heads,)](
        *inputs, grad_query, bias, problem.logit_scale, statistics, radials, *problem.cut, heads, problem.scale,
        **constants,
    )  # fmt: skip

    tile = problem.tile("grad_key")
    constants, blocks = problem.constants(tile, *maps), triton.cdiv(problem.tokens, tile.block_n)
    pieces = max(triton.cdiv(problem.dim, constants["BLOCK_D"]), triton.cdiv(problem.dim_v, constants["BLOCK_DV"]))
    window_key_gradient_kernel[(windows * pieces * blocks * heads,)](
        *inputs, grad_key, grad_value, bias, problem.logit_scale, statistics, *problem.cut, heads, problem.scale,
        **constants,
    )  # fmt: skip

    sums = None
    if need_dense:
        tile = problem.tile("grad_bias")
        tiles = (padded // tile.block_m) * (padded // tile.block_n)
        share = problem.share(1, tiles)
        chunks = triton.cdiv(windows, share)
        sums = new((chunks, heads, padded, padded), dtype=torch.float32)
        window_bias_gradient_kernel[(chunks * tiles * heads,)](
            *inputs, bias, problem.logit_scale, statistics, sums, *problem.cut, windows, heads, share, problem.scale,
            **problem.constants(tile, *maps),
        )  # fmt: skip
    return None if sums is None else sums.sum(0), radials
