"""Softmax attention, gradient of a bias of distance: dS summed along its diagonals j - p_i, without atomics.

Tiles are square. A program owns one diagonal of tiles of one (batch, head): they all hold the same distances at the
same places, so it adds them up as they are, and only then sums the one tile along its own diagonals, by rotating row r
by r.
A tile of size n holds 2n - 1 distances, half of which its neighbour holds too: two vectors a (batch, head), one for
distances from the tile's own first on and one for those below, are added by torch, and so are batches. Memory is a few
numbers a distance; the same call gives the same bits. Of tiles outside the window those that hold a global key count.
"""

import triton
import triton.language as tl

from .attention_global import any_global
from .attention_scores import LENGTHS, base_of, head_terms, place_of, statistics_of, tile_gradient
from .common import load_tile


@triton.jit(do_not_specialize=[*LENGTHS, "count"])
def attention_distance_gradient_kernel(
    grad_out, query, key, value, statistics, upper, lower, terms, heads, group, rows_q, rows_k, max_rows_q, max_rows_k,
    count, scale, window_left, window_right,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, TOP_LEFT: tl.constexpr,
):  # fmt: skip
    BLOCK: tl.constexpr = BLOCK_M
    diagonals = tl.cdiv(max_rows_q, BLOCK) + tl.cdiv(max_rows_k, BLOCK) - 1
    stream = tl.program_id(0) // diagonals
    diagonal = tl.program_id(0) % diagonals - tl.cdiv(max_rows_q, BLOCK) + 1  # key tile minus query tile
    batch, head, first_q, length_q, first_k, _length_k, key_limit, shift = place_of(
        stream, heads, rows_q, rows_k, terms, TOP_LEFT
    )
    kv_head = head // group
    query_base = base_of(query, batch, head, first_q)
    grad_out_base = base_of(grad_out, batch, head, first_q)
    key_base = base_of(key, batch, kv_head, first_k)
    value_base = base_of(value, batch, kv_head, first_k)
    lse_base = statistics_of(statistics, batch, head, stream, first_q, terms)
    own = head_terms(terms, batch, head)

    distance = diagonal * BLOCK - shift  # of a tile's first query and first key
    begin = tl.maximum(0, -diagonal)
    end = tl.minimum(tl.cdiv(length_q, BLOCK), tl.cdiv(key_limit, BLOCK) - diagonal)
    outside = False
    if window_left is not None:
        outside = outside | (distance + BLOCK <= -window_left)
    if window_right is not None:
        outside = outside | (distance - BLOCK >= window_right)
    if terms.global_slots is None:
        end = tl.where(outside, begin, end)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for tile in range(begin, end):
        start_m, start_n = tile * BLOCK, (tile + diagonal) * BLOCK
        rows, columns = start_m + tl.arange(0, BLOCK), start_n + tl.arange(0, BLOCK)
        seen = True
        if terms.global_slots is not None:
            seen = not outside or any_global(columns, key_limit, own)
        if seen:
            query_tile = load_tile(query_base, query.strides[2], start_m, length_q, HEAD_DIM, BLOCK, BLOCK_D, True)
            grad_out_tile = load_tile(
                grad_out_base, grad_out.strides[2], start_m, length_q, HEAD_DIM_V, BLOCK, BLOCK_DV, True
            )
            key_tile = load_tile(key_base, key.strides[2], start_n, key_limit, HEAD_DIM, BLOCK, BLOCK_D, True)
            value_tile = load_tile(value_base, value.strides[2], start_n, key_limit, HEAD_DIM_V, BLOCK, BLOCK_DV, True)
            lse = tl.load(lse_base + rows)
            delta = tl.load(lse_base + statistics.delta + rows)
            lse_error = tl.load(lse_base + 2 * statistics.delta + rows)
            acc += tile_gradient(
                query_tile, grad_out_tile, key_tile, value_tile, lse, delta, lse_error, rows, columns, start_n,
                key_limit, length_q, shift, scale, own, window_left, window_right, stream, terms, ALIGNED=True,
            )  # fmt: skip

    row, k = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)
    rotated = tl.gather(acc, (row + k[None, :]) % BLOCK, 1)  # [row][k] is distance k, or k - BLOCK past the end
    wraps = row + k[None, :] >= BLOCK
    place = distance + terms.distance_offset + k
    base = stream.to(tl.int64) * count
    at = upper + base + place
    tl.store(at, tl.sum(tl.where(wraps, 0.0, rotated), 0), mask=(place >= 0) & (place < count))
    place -= BLOCK
    at = lower + base + place
    tl.store(at, tl.sum(tl.where(wraps, rotated, 0.0), 0), mask=(place >= 0) & (place < count))


def distance_gradient(problem, bias, views, statistics):
    """Of a (Hq, distances) float32 bias; `views` are those of grad_out, query, key and value."""
    if bias.numel() == 0 or problem.rows_k == 0:
        return bias.new_zeros(bias.shape)
    tile = problem.tile("grad_distance")
    block = tile.block_m
    streams, count = problem.batch * problem.heads, bias.shape[1]
    diagonals = triton.cdiv(problem.max_rows_q, block) + triton.cdiv(problem.max_rows_k, block) - 1
    upper, lower = (bias.new_zeros((streams, count)) for _ in range(2))
    attention_distance_gradient_kernel[(streams * diagonals,)](
        *views, statistics, upper, lower, problem.terms, problem.heads, problem.group, problem.rows_q, problem.rows_k,
        problem.max_rows_q, problem.max_rows_k, count, problem.score_scale, problem.window_left, problem.window_right,
        **problem.constants(tile),
    )  # fmt: skip
    return upper.add_(lower).view(problem.batch, problem.heads, count).sum(0)
