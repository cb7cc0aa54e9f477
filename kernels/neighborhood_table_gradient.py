"""Neighborhood attention, gradient of the table of relative biases: dS summed over all pairs of a distance, no atomics.

In every tile of queries the same lane and the same distance of a key from the tile's first query are the same row of
the table. A program owns a block of those distances of one head, walks tiles of queries and adds up dS
[lanes, distances] as it is; only then are the sums, a few numbers a row of the table, gathered and summed by
torch. Few programs are split over the tiles, by shape alone, into parts which torch sums too.
"""

import math

import torch
import triton
import triton.language as tl

from .common import LOG2E, dot
from .neighborhood_tiles import (
    SIZES,
    are_inside,
    are_not_before,
    base_of,
    bias_part,
    box_of,
    group_of,
    lanes_of,
    load_rows,
    scores,
    see,
    statistic_offsets,
    tile_of,
    tile_shape,
)

PROGRAMS = 1024  # as many as keep any GPU busy


@triton.jit(do_not_specialize=[*SIZES, "table_rows", "tiles", "splits"])
def neighborhood_table_gradient_kernel(
    grad_out, query, key, value, statistics, sums, table, table_rows, tiles, splits, scale, side0, side1, side2,
    batch, heads, group,
    KERNEL: tl.constexpr, DILATION: tl.constexpr, CAUSAL: tl.constexpr, AXES: tl.constexpr, TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """sums [split, head, lane, distance]; `tiles`: of the batch, a head."""
    sides = (side0, side1, side2)
    E0: tl.constexpr = 2 * KERNEL[0] + TILE[0] - 2
    E1: tl.constexpr = 2 * KERNEL[1] + TILE[1] - 2
    E2: tl.constexpr = 2 * KERNEL[2] + TILE[2] - 2
    BLOCKS: tl.constexpr = (E0 * E1 * E2 + BLOCK - 1) // BLOCK
    LANES: tl.constexpr = TILE[0] * TILE[1] * TILE[2]
    GROUPS: tl.constexpr = DILATION[0] * DILATION[1] * DILATION[2]
    LEAD: tl.constexpr = 3 - AXES  # the axis along which distances are told apart first
    INNER: tl.constexpr = E1 * E2 if AXES == 3 else (E2 if AXES == 2 else 1)

    block, rest = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS
    head, split = rest % heads, rest // heads
    distance = block * BLOCK + tl.arange(0, BLOCK)
    distances = (
        distance // (E1 * E2) - (KERNEL[0] - 1), distance // E2 % E1 - (KERNEL[1] - 1), distance % E2 - (KERNEL[2] - 1)
    )  # fmt: skip
    lead_first = block * BLOCK // INNER - (KERNEL[LEAD] - 1)
    lead_last = (block * BLOCK + BLOCK - 1) // INNER - (KERNEL[LEAD] - 1)
    map_rows = side0.to(tl.int64) * side1 * side2
    acc = tl.zeros([LANES, BLOCK], tl.float32)
    for index in range(split * tiles // splits, (split + 1) * tiles // splits):
        sample = index // GROUPS % batch
        places, lengths = group_of(index % GROUPS, sides, DILATION)
        first = tile_of(index // (GROUPS * batch), sides, DILATION, TILE)
        box, _ = box_of(first, lengths, KERNEL, CAUSAL, AXES, TILE, False)
        begin, count = box[LEAD]
        if (first[LEAD] + lead_first < begin + count) & (first[LEAD] + lead_last >= begin):
            lanes = lanes_of(first, TILE)
            inside = are_inside(lanes, lengths, AXES)
            keys = first[0] + distances[0], first[1] + distances[1], first[2] + distances[2]
            on_map = are_inside(keys, lengths, AXES) & are_not_before(keys, AXES)
            seen = see(lanes, keys, lengths, KERNEL, CAUSAL, AXES, False) & inside[:, None] & on_map[None, :]
            query_base, grad_out_base = base_of(query, sample, head, places), base_of(grad_out, sample, head, places)
            key_base = base_of(key, sample, head // group, places)
            value_base = base_of(value, sample, head // group, places)
            query_tile = load_rows(query, query_base, lanes, inside, DILATION, AXES, HEAD_DIM, BLOCK_D)
            key_tile = load_rows(key, key_base, keys, on_map, DILATION, AXES, HEAD_DIM, BLOCK_D)
            s = scores(
                dot(query_tile, tl.trans(key_tile)), scale, table, head, table_rows,
                bias_part(lanes, KERNEL, AXES)[:, None], bias_part(keys, KERNEL, AXES)[None, :], seen, KERNEL,
            )  # fmt: skip
            at = statistics + (sample * heads + head) * map_rows
            at += statistic_offsets(lanes, places, sides, DILATION, AXES)
            lse = tl.load(at, mask=inside, other=float("inf"))
            delta = tl.load(at + batch * heads * map_rows, mask=inside, other=0.0)
            grad_out_tile = load_rows(grad_out, grad_out_base, lanes, inside, DILATION, AXES, HEAD_DIM_V, BLOCK_DV)
            value_tile = load_rows(value, value_base, keys, on_map, DILATION, AXES, HEAD_DIM_V, BLOCK_DV)
            acc += tl.exp2(s - lse[:, None]) * (dot(grad_out_tile, tl.trans(value_tile)) - delta[:, None])
    lane = tl.arange(0, LANES)
    at = (((split * heads + head) * LANES).to(tl.int64) + lane)[:, None] * (E0 * E1 * E2) + distance[None, :]
    tl.store(sums + at, acc, mask=(distance < E0 * E1 * E2)[None, :])


def table_gradient(problem, views, statistics):
    """(rows, H) float32; `views` are those of grad_out, query, key and value."""
    tile = problem.tile("grad_table")
    shape = tile_shape(tile.lanes, problem.kernel, problem.axes)
    extents = [2 * k + t - 2 for k, t in zip(problem.kernel, shape, strict=True)]
    distances = math.prod(extents)
    programs, tiles = problem.heads * triton.cdiv(distances, tile.block), problem.tiles(tile, 1)
    splits = max(1, min(tiles, PROGRAMS // programs))
    sums = statistics.new_empty((splits, problem.heads, tile.lanes * distances))
    neighborhood_table_gradient_kernel[(programs * splits,)](
        *views, statistics, sums, problem.table, problem.table_rows, tiles, splits, problem.scale * LOG2E.value,
        *problem.sizes, **problem.constants(tile),
    )  # fmt: skip
    return sums.sum(0)[:, distance_of_rows(problem.kernel, shape, extents, sums.device)].sum(-1).t().contiguous()


def distance_of_rows(kernel, shape, extents, device) -> torch.Tensor:
    """(rows, lanes): where the flattened sums [lane, distance] hold a row of the table."""
    index = torch.zeros((), dtype=torch.int64, device=device)
    lane = torch.arange(math.prod(shape), device=device).view(shape)
    for axis, (k, t, extent) in enumerate(zip(kernel, shape, extents, strict=True)):
        row = torch.arange(2 * k - 1, device=device).view(-1, *(1,) * (2 - axis), 1, 1, 1)
        step = torch.arange(t, device=device).view(t, *(1,) * (2 - axis))
        index = index * extent + row + step
    return (index + lane * math.prod(extents)).flatten(0, 2).flatten(1)
