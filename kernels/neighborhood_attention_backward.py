"""Neighborhood attention, backward: gradients of query, key, value and the table of relative biases; no atomics.

Nothing but the inputs is kept from the forward. With P = softmax(scores):
    dV = Pᵀ·dO,   dS = P * (dO·Vᵀ - rowsum(P * dO·Vᵀ)),   dQ = scale · dS·K,   dK = scale · dSᵀ·Q,   dtable[r] = Σ dS
Three kernels, each result owned by one program, so that sums have one order:
    query gradient: a tile of queries walks the box of its keys twice, first for lse (log2 units) and rowsum(P * dO·Vᵀ),
        which it writes for the others, then for dQ;
    key gradient: a tile of keys walks the box of the queries that see it, over all heads of their GQA group;
    table gradient (neighborhood_table_gradient.py): only when asked for.
"""

import torch
import triton
import triton.language as tl

from ..ops.window_operator import in_order_of
from .common import LOG2E, dot, launch_context, row_products
from .neighborhood_table_gradient import table_gradient
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
    statistic_offsets,
    store_rows,
    view,
)


@triton.jit
def _scores_and_gradients(
    start, box, total, query_tile, grad_out_tile, lanes, lengths, key, value, key_base, value_base, table, table_rows,
    head, scale,
    KERNEL: tl.constexpr, DILATION: tl.constexpr, CAUSAL: tl.constexpr, AXES: tl.constexpr, HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """(scores, dO·Vᵀ, key rows) of a block of the box of a tile of queries."""
    keys = in_box(start, box, AXES, BLOCK)
    valid = start + tl.arange(0, BLOCK) < total
    key_tile = load_rows(key, key_base, keys, valid, DILATION, AXES, HEAD_DIM, BLOCK_D)
    value_tile = load_rows(value, value_base, keys, valid, DILATION, AXES, HEAD_DIM_V, BLOCK_DV)
    s = scores(
        row_products(query_tile, key_tile), scale, table, head, table_rows, bias_part(lanes, KERNEL, AXES)[:, None],
        bias_part(keys, KERNEL, AXES)[None, :], see(lanes, keys, lengths, KERNEL, CAUSAL, AXES, False), KERNEL,
    )  # fmt: skip
    return s, row_products(grad_out_tile, value_tile), key_tile


@triton.jit(do_not_specialize=[*SIZES, "table_rows"])
def neighborhood_query_gradient_kernel(
    grad_out, query, key, value, statistics, grad_query, table, table_rows, scale, output_scale, side0, side1, side2,
    batch, heads, group,
    KERNEL: tl.constexpr, DILATION: tl.constexpr, CAUSAL: tl.constexpr, AXES: tl.constexpr, TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):  # fmt: skip
    sides = (side0, side1, side2)
    map_rows = side0.to(tl.int64) * side1 * side2
    to_delta = batch * heads * map_rows
    batch, head, places, lengths, first = place_of(tl.program_id(0), heads, sides, batch, DILATION, TILE)
    if not are_inside(first, lengths, AXES):
        return
    kv_head = head // group
    key_base, value_base = base_of(key, batch, kv_head, places), base_of(value, batch, kv_head, places)
    query_base, grad_out_base = base_of(query, batch, head, places), base_of(grad_out, batch, head, places)
    lanes = lanes_of(first, TILE)
    inside = are_inside(lanes, lengths, AXES)
    query_tile = load_rows(query, query_base, lanes, inside, DILATION, AXES, HEAD_DIM, BLOCK_D)
    grad_out_tile = load_rows(grad_out, grad_out_base, lanes, inside, DILATION, AXES, HEAD_DIM_V, BLOCK_DV)
    LANES: tl.constexpr = TILE[0] * TILE[1] * TILE[2]
    row_max = tl.full([LANES], float("-inf"), tl.float32)
    row_sum = tl.zeros([LANES], tl.float32)
    delta = tl.zeros([LANES], tl.float32)
    box, total = box_of(first, lengths, KERNEL, CAUSAL, AXES, TILE, False)
    for start in range(0, total, BLOCK):
        s, grad_weights, _ = _scores_and_gradients(
            start, box, total, query_tile, grad_out_tile, lanes, lengths, key, value, key_base, value_base, table,
            table_rows, head, scale,
            KERNEL, DILATION, CAUSAL, AXES, HEAD_DIM, HEAD_DIM_V, BLOCK, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
        new_max = tl.maximum(row_max, tl.max(s, 1))
        finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp2(s - finite_max[:, None])
        correction = tl.exp2(row_max - finite_max)
        row_sum = row_sum * correction + tl.sum(weights, 1)
        delta = delta * correction + tl.sum(weights * grad_weights, 1)
        row_max = new_max
    empty = row_sum == 0.0
    row_sum = tl.where(empty, 1.0, row_sum)
    lse = tl.where(empty, float("inf"), row_max + tl.log2(row_sum))
    delta /= row_sum
    at = statistics + (batch * heads + head) * map_rows + statistic_offsets(lanes, places, sides, DILATION, AXES)
    tl.store(at, lse, mask=inside)
    tl.store(at + to_delta, delta, mask=inside)

    acc = tl.zeros([LANES, BLOCK_D], tl.float32)
    for start in range(0, total, BLOCK):
        s, grad_weights, key_tile = _scores_and_gradients(
            start, box, total, query_tile, grad_out_tile, lanes, lengths, key, value, key_base, value_base, table,
            table_rows, head, scale,
            KERNEL, DILATION, CAUSAL, AXES, HEAD_DIM, HEAD_DIM_V, BLOCK, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
        grad_scores = tl.exp2(s - lse[:, None]) * (grad_weights - delta[:, None])
        acc = dot(grad_scores.to(key_tile.dtype), key_tile, acc)
    grad_base = base_of(grad_query, batch, head, places)
    store_rows(grad_query, grad_base, lanes, inside, acc * output_scale, DILATION, AXES, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=[*SIZES, "table_rows"])
def neighborhood_key_gradient_kernel(
    grad_out, query, key, value, statistics, grad_key, grad_value, table, table_rows, scale, output_scale, side0, side1,
    side2, batch, heads, group,
    KERNEL: tl.constexpr, DILATION: tl.constexpr, CAUSAL: tl.constexpr, AXES: tl.constexpr, TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):  # fmt: skip
    sides = (side0, side1, side2)
    map_rows = side0.to(tl.int64) * side1 * side2
    to_delta = batch * heads * map_rows
    batch, kv_head, places, lengths, first = place_of(tl.program_id(0), heads // group, sides, batch, DILATION, TILE)
    if not are_inside(first, lengths, AXES):
        return
    key_base, value_base = base_of(key, batch, kv_head, places), base_of(value, batch, kv_head, places)
    lanes = lanes_of(first, TILE)
    inside = are_inside(lanes, lengths, AXES)
    of_keys = bias_part(lanes, KERNEL, AXES)[:, None]
    key_tile = load_rows(key, key_base, lanes, inside, DILATION, AXES, HEAD_DIM, BLOCK_D)
    value_tile = load_rows(value, value_base, lanes, inside, DILATION, AXES, HEAD_DIM_V, BLOCK_DV)
    LANES: tl.constexpr = TILE[0] * TILE[1] * TILE[2]
    key_acc = tl.zeros([LANES, BLOCK_D], tl.float32)
    value_acc = tl.zeros([LANES, BLOCK_DV], tl.float32)
    box, total = box_of(first, lengths, KERNEL, CAUSAL, AXES, TILE, True)
    blocks = tl.cdiv(total, BLOCK)
    for step in range(group * blocks):
        head, start = kv_head * group + step // blocks, step % blocks * BLOCK
        queries = in_box(start, box, AXES, BLOCK)
        valid = start + tl.arange(0, BLOCK) < total
        query_base, grad_out_base = base_of(query, batch, head, places), base_of(grad_out, batch, head, places)
        query_tile = load_rows(query, query_base, queries, valid, DILATION, AXES, HEAD_DIM, BLOCK_D)
        grad_out_tile = load_rows(grad_out, grad_out_base, queries, valid, DILATION, AXES, HEAD_DIM_V, BLOCK_DV)
        at = statistics + (batch * heads + head) * map_rows + statistic_offsets(queries, places, sides, DILATION, AXES)
        lse = tl.load(at, mask=valid, other=float("inf"))
        delta = tl.load(at + to_delta, mask=valid, other=0.0)
        s = scores(
            row_products(key_tile, query_tile), scale, table, head, table_rows,
            bias_part(queries, KERNEL, AXES)[None, :], of_keys,
            see(lanes, queries, lengths, KERNEL, CAUSAL, AXES, True), KERNEL,
        )  # fmt: skip
        weights = tl.exp2(s - lse[None, :])  # [keys, queries]
        value_acc = dot(weights.to(grad_out_tile.dtype), grad_out_tile, value_acc)
        grad_scores = weights * (row_products(value_tile, grad_out_tile) - delta[None, :])
        key_acc = dot(grad_scores.to(query_tile.dtype), query_tile, key_acc)
    key_base, value_base = base_of(grad_key, batch, kv_head, places), base_of(grad_value, batch, kv_head, places)
    store_rows(grad_key, key_base, lanes, inside, key_acc * output_scale, DILATION, AXES, HEAD_DIM, BLOCK_D)
    store_rows(grad_value, value_base, lanes, inside, value_acc, DILATION, AXES, HEAD_DIM_V, BLOCK_DV)


def backward(grad_out, query, key, value, table, kernel, dilation, causal, scale, need_table_grad):
    """Gradients of query, key, value and the table: see the operator's schema."""
    grads = [in_order_of(t, t.shape[-1]) for t in (query, key, value)]
    if query.numel() == 0:
        return *grads, table.new_zeros(table.shape) if need_table_grad else query.new_empty(0, dtype=torch.float32)
    problem = Problem(query, key, value, table, kernel, dilation, causal, scale)
    statistics = query.new_empty((2, problem.batch, problem.heads, *problem.sides), dtype=torch.float32)
    views = [view(t) for t in (grad_out, query, key, value)]
    numbers = problem.table, problem.table_rows, problem.scale * LOG2E.value, problem.scale, *problem.sizes
    with launch_context(query):
        tile = problem.tile("grad_query")
        neighborhood_query_gradient_kernel[(problem.tiles(tile, problem.heads),)](
            *views, statistics, view(grads[0]), *numbers, **problem.constants(tile)
        )
        tile = problem.tile("grad_key")
        neighborhood_key_gradient_kernel[(problem.tiles(tile, problem.heads_kv),)](
            *views, statistics, *map(view, grads[1:]), *numbers, **problem.constants(tile)
        )
        if need_table_grad:
            return *grads, table_gradient(problem, views, statistics)
    return *grads, statistics.new_empty(0)
