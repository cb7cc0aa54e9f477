"""Neighborhood attention, forward: softmax(scale · q_i·k_j + bias[j - i]) · v_j over the keys j near each query i.

Hassani et al., "Neighborhood Attention Transformer" (2023). A program owns a tile of queries of one head and dilation
group (8 x 8 of them where the kernel is square) and walks the box of their keys with an online softmax; the tile's
shape is the one whose box is smallest. Programs of the heads of one tile are neighbours: their rows lie side by side.
"""

import triton
import triton.language as tl

from ..ops.window_operator import in_order_of
from .common import LOG2E, dot, launch_context, row_products
from .neighborhood_tiles import (
    SIZES,
    Problem,
    are_inside,
    base_of,
    bias_part,
    box_of,
    in_box,
    lanes_of,
    load_rows,
    place_of,
    scores,
    see,
    store_rows,
    view,
)


@triton.jit(do_not_specialize=[*SIZES, "table_rows"])
def neighborhood_forward_kernel(
    query, key, value, out, table, table_rows, scale, side0, side1, side2, batch, heads, group,
    KERNEL: tl.constexpr, DILATION: tl.constexpr, CAUSAL: tl.constexpr, AXES: tl.constexpr, TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):  # fmt: skip
    sides = (side0, side1, side2)
    batch, head, places, lengths, first = place_of(tl.program_id(0), heads, sides, batch, DILATION, TILE)
    if not are_inside(first, lengths, AXES):
        return
    kv_head = head // group
    key_base, value_base = base_of(key, batch, kv_head, places), base_of(value, batch, kv_head, places)
    lanes = lanes_of(first, TILE)
    inside = are_inside(lanes, lengths, AXES)
    of_queries = bias_part(lanes, KERNEL, AXES)[:, None]
    query_base = base_of(query, batch, head, places)
    query_tile = load_rows(query, query_base, lanes, inside, DILATION, AXES, HEAD_DIM, BLOCK_D)
    LANES: tl.constexpr = TILE[0] * TILE[1] * TILE[2]
    acc = tl.zeros([LANES, BLOCK_DV], tl.float32)
    row_max = tl.full([LANES], float("-inf"), tl.float32)
    row_sum = tl.zeros([LANES], tl.float32)
    box, total = box_of(first, lengths, KERNEL, CAUSAL, AXES, TILE, False)
    for start in range(0, total, BLOCK):
        keys = in_box(start, box, AXES, BLOCK)
        valid = start + tl.arange(0, BLOCK) < total
        key_tile = load_rows(key, key_base, keys, valid, DILATION, AXES, HEAD_DIM, BLOCK_D)
        s = scores(
            row_products(query_tile, key_tile), scale, table, head, table_rows, of_queries,
            bias_part(keys, KERNEL, AXES)[None, :], see(lanes, keys, lengths, KERNEL, CAUSAL, AXES, False), KERNEL,
        )  # fmt: skip
        new_max = tl.maximum(row_max, tl.max(s, 1))
        finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp2(s - finite_max[:, None])
        correction = tl.exp2(row_max - finite_max)
        row_sum = row_sum * correction + tl.sum(weights, 1)
        row_max = new_max
        value_tile = load_rows(value, value_base, keys, valid, DILATION, AXES, HEAD_DIM_V, BLOCK_DV)
        acc = dot(weights.to(value_tile.dtype), value_tile, acc * correction[:, None])
    acc *= tl.where(row_sum == 0.0, 0.0, 1.0 / tl.where(row_sum == 0.0, 1.0, row_sum))[:, None]
    out_base = base_of(out, batch, head, places)
    store_rows(out, out_base, lanes, inside, acc, DILATION, AXES, HEAD_DIM_V, BLOCK_DV)


def forward(query, key, value, table, kernel, dilation, causal, scale):
    """See the operator's schema."""
    out = in_order_of(query, value.shape[-1])
    if out.numel() == 0:
        return out
    problem = Problem(query, key, value, table, kernel, dilation, causal, scale)
    tile = problem.tile("forward")
    with launch_context(query):
        neighborhood_forward_kernel[(problem.tiles(tile, problem.heads),)](
            view(query), view(key), view(value), view(out), problem.table, problem.table_rows,
            problem.scale * LOG2E.value, *problem.sizes, **problem.constants(tile),
        )  # fmt: skip
    return out
