"""Softmax attention, gradients of a bias that is decomposed over a map: dS summed over the columns of each row of the
map, and over the rows of each of its columns, without atomics.

A program owns some queries and some columns of the map and walks its rows, one tile of keys each: the sum along the
keys of a tile is that row's, the sum of the tiles is the columns'. Where a map is wider than a tile, torch adds up what
the programs of different columns found for a row. Rows out of every query's sight are skipped.
"""

import torch
import triton
import triton.language as tl

from .attention_global import any_global
from .attention_scores import LENGTHS, base_of, head_terms, place_of, statistics_of, tile_gradient
from .common import block_width, load_tile


@triton.jit(do_not_specialize=LENGTHS)
def attention_decomposed_gradient_kernel(
    grad_out, query, key, value, statistics, grad_rows, grad_columns, terms, heads, group, rows_q, rows_k, map_rows,
    scale, window_left, window_right,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, TOP_LEFT: tl.constexpr,
):  # fmt: skip
    """grad_rows is (batch, head, tile of columns, query, row), grad_columns (batch, head, query, column)."""
    blocks_m, tiles = tl.cdiv(rows_q, BLOCK_M), tl.cdiv(terms.map_columns, BLOCK_N)
    start_m = (tl.program_id(0) % blocks_m) * BLOCK_M
    tile, stream = tl.program_id(0) // blocks_m % tiles, tl.program_id(0) // blocks_m // tiles
    batch, head, _, length_q, _, _, key_limit, shift = place_of(stream, heads, rows_q, rows_k, terms, TOP_LEFT)
    kv_head = head // group
    query_base = base_of(query, batch, head, 0)
    grad_out_base = base_of(grad_out, batch, head, 0)
    key_base = base_of(key, batch, kv_head, 0)
    value_base = base_of(value, batch, kv_head, 0)
    own = head_terms(terms, batch, head)

    rows = start_m + tl.arange(0, BLOCK_M)
    last = tl.minimum(start_m + BLOCK_M, length_q) - 1
    query_tile = load_tile(query_base, query.strides[2], start_m, length_q, HEAD_DIM, BLOCK_M, BLOCK_D, True)
    grad_out_tile = load_tile(
        grad_out_base, grad_out.strides[2], start_m, length_q, HEAD_DIM_V, BLOCK_M, BLOCK_DV, True
    )
    lse_base = statistics_of(statistics, batch, head, stream, 0, terms)
    lse = tl.load(lse_base + rows)
    delta = tl.load(lse_base + statistics.delta + rows)
    lse_error = tl.load(lse_base + 2 * statistics.delta + rows)
    out = grad_rows + ((stream * tiles + tile).to(tl.int64) * rows_q + rows) * map_rows
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for map_row in range(0, tl.cdiv(key_limit, terms.map_columns)):
        start_n = map_row * terms.map_columns + tile * BLOCK_N
        end_n = tl.minimum((map_row + 1) * terms.map_columns, key_limit)
        columns = start_n + tl.arange(0, BLOCK_N)
        seen = start_n < end_n
        if window_left is not None:
            seen = seen & (end_n > start_m + shift - window_left)
        if window_right is not None:
            seen = seen & (start_n <= last + shift + window_right)
        if terms.global_slots is not None:
            seen = seen | any_global(columns, end_n, own)
        if seen:
            key_tile = load_tile(key_base, key.strides[2], start_n, end_n, HEAD_DIM, BLOCK_N, BLOCK_D, True)
            value_tile = load_tile(value_base, value.strides[2], start_n, end_n, HEAD_DIM_V, BLOCK_N, BLOCK_DV, True)
            grad_scores = tile_gradient(
                query_tile, grad_out_tile, key_tile, value_tile, lse, delta, lse_error, rows, columns, start_n, end_n,
                length_q, shift, scale, own, window_left, window_right, stream, terms, ALIGNED=False,
            )  # fmt: skip
            acc += grad_scores
            tl.store(out + map_row, tl.sum(grad_scores, 1), mask=rows < length_q)
    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row = stream.to(tl.int64) * rows_q + rows
    pointers = grad_columns + row[:, None] * terms.map_columns + column[None, :]
    tl.store(pointers, acc, mask=(rows < length_q)[:, None] & (column < terms.map_columns)[None, :])


def decomposed_gradient(problem, rel_h, rel_w, views, statistics):
    """Of float32 (B, Hq, Sq, H) and (B, Hq, Sq, W); `views` are those of grad_out, query, key and value."""
    (batch, heads, rows_q, map_rows), map_columns = rel_h.shape, rel_w.shape[3]
    if problem.rows_k == 0:
        return rel_h.new_zeros(rel_h.shape), rel_w.new_zeros(rel_w.shape)
    tile = problem.tile("grad_mask")
    tile = tile._replace(block_n=min(tile.block_n, block_width(map_columns)))
    tiles = triton.cdiv(map_columns, tile.block_n)
    grad_rows = torch.zeros((batch, heads, tiles, rows_q, map_rows), dtype=torch.float32, device=rel_h.device)
    grad_columns = torch.empty(rel_w.shape, dtype=torch.float32, device=rel_w.device)
    attention_decomposed_gradient_kernel[(triton.cdiv(rows_q, tile.block_m) * tiles * batch * heads,)](
        *views, statistics, grad_rows, grad_columns, problem.terms, heads, problem.group, rows_q, problem.rows_k,
        map_rows, problem.score_scale, problem.window_left, problem.window_right, **problem.constants(tile),
    )  # fmt: skip
    return grad_rows.squeeze(2) if tiles == 1 else grad_rows.sum(2), grad_columns
