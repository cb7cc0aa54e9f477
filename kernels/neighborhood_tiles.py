"""What neighborhood attention's forward and backward kernels share: who sees whom, tiles, rows, problem description.

Maps have three axes, leading ones of side 1 where there are fewer. Places of an axis DILATION apart are a dilation
group, a map of its own: a program owns a block TILE of places of one group, its lanes, and walks the box that holds all
that they see, in blocks of the box's places. Along an axis, what a place sees is an interval whose ends grow with the
place, so that the box of a tile begins where its first place's does and ends where its last place's does. Who sees whom
is told from the intervals of every place; no mask is read. Scores are in units of log2.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .common import INTERPRET, LOG2E, architecture, block_width

SIZES = ["side0", "side1", "side2", "batch", "heads", "group"]  # never specialised on


class MapView(NamedTuple):
    """A tensor of rows of unit-stride channels: (batch, axis, axis, axis, head) strides."""

    ptr: Any
    strides: Any


@triton.jit
def keys_of(i, length, KERNEL: tl.constexpr, CAUSAL: tl.constexpr):
    """[first, last) of the keys that query i of an axis sees."""
    if CAUSAL:
        return tl.maximum(i - KERNEL + 1, 0), i + 1
    else:
        first = tl.maximum(tl.minimum(i - KERNEL // 2, length - KERNEL), 0)
        return first, first + KERNEL


@triton.jit
def queries_of(j, length, KERNEL: tl.constexpr, CAUSAL: tl.constexpr):
    """[first, last) of the queries that see key j of an axis."""
    if CAUSAL:
        return j, tl.minimum(j + KERNEL, length)
    else:
        first = tl.where(j < KERNEL, 0, j - KERNEL + 1 + KERNEL // 2)
        return first, tl.where(j >= length - KERNEL, length, j + KERNEL // 2 + 1)


@triton.jit
def neighbours(place, length, KERNEL: tl.constexpr, CAUSAL: tl.constexpr, OF_KEYS: tl.constexpr):
    if OF_KEYS:
        return queries_of(place, length, KERNEL, CAUSAL)
    else:
        return keys_of(place, length, KERNEL, CAUSAL)


@triton.jit
def group_of(index, sides, DILATION: tl.constexpr):
    """(first places, lengths along each axis) of a dilation group."""
    g0 = index // (DILATION[1] * DILATION[2])
    g1 = index // DILATION[2] % DILATION[1]
    g2 = index % DILATION[2]
    lengths = (
        tl.cdiv(sides[0] - g0, DILATION[0]), tl.cdiv(sides[1] - g1, DILATION[1]), tl.cdiv(sides[2] - g2, DILATION[2])
    )  # fmt: skip
    return (g0, g1, g2), lengths


@triton.jit
def tile_of(index, sides, DILATION: tl.constexpr, TILE: tl.constexpr):
    """First place of a tile; every group has as many tiles as the longest, some of them past its end."""
    n1 = tl.cdiv(tl.cdiv(sides[1], DILATION[1]), TILE[1])
    n2 = tl.cdiv(tl.cdiv(sides[2], DILATION[2]), TILE[2])
    return index // (n1 * n2) * TILE[0], index // n2 % n1 * TILE[1], index % n2 * TILE[2]


@triton.jit
def place_of(program, heads, sides, batch, DILATION: tl.constexpr, TILE: tl.constexpr):
    """(batch, head, dilation group, its lengths, first place of the tile) of a program."""
    head, rest = program % heads, program // heads
    GROUPS: tl.constexpr = DILATION[0] * DILATION[1] * DILATION[2]
    index, rest = rest % (batch * GROUPS), rest // (batch * GROUPS)
    group, lengths = group_of(index % GROUPS, sides, DILATION)
    return index // GROUPS, head, group, lengths, tile_of(rest, sides, DILATION, TILE)


@triton.jit
def lanes_of(first, TILE: tl.constexpr):
    """The places of a tile, three vectors."""
    lane = tl.arange(0, TILE[0] * TILE[1] * TILE[2])
    return first[0] + lane // (TILE[1] * TILE[2]), first[1] + lane // TILE[2] % TILE[1], first[2] + lane % TILE[2]


@triton.jit
def are_inside(places, lengths, AXES: tl.constexpr):
    inside = places[2] < lengths[2]
    if AXES > 1:
        inside = inside & (places[1] < lengths[1])
    if AXES > 2:
        inside = inside & (places[0] < lengths[0])
    return inside


@triton.jit
def are_not_before(places, AXES: tl.constexpr):
    inside = places[2] >= 0
    if AXES > 1:
        inside = inside & (places[1] >= 0)
    if AXES > 2:
        inside = inside & (places[0] >= 0)
    return inside


@triton.jit
def box_axis(
    first, length, KERNEL: tl.constexpr, CAUSAL: tl.constexpr, TILE: tl.constexpr, OF_KEYS: tl.constexpr
):  # fmt: skip
    begin, _ = neighbours(first, length, KERNEL, CAUSAL, OF_KEYS)
    _, end = neighbours(tl.minimum(first + TILE, length) - 1, length, KERNEL, CAUSAL, OF_KEYS)
    return begin, end - begin


@triton.jit
def box_of(
    first, lengths, KERNEL: tl.constexpr, CAUSAL: tl.constexpr, AXES: tl.constexpr, TILE: tl.constexpr,
    OF_KEYS: tl.constexpr,
):  # fmt: skip
    """((first place, places) along the axes) of all that a tile sees, and their number."""
    box2 = box_axis(first[2], lengths[2], KERNEL[2], CAUSAL[2], TILE[2], OF_KEYS)
    box0, box1, total = (0, 1), (0, 1), box2[1]
    if AXES > 1:
        box1 = box_axis(first[1], lengths[1], KERNEL[1], CAUSAL[1], TILE[1], OF_KEYS)
        total *= box1[1]
    if AXES > 2:
        box0 = box_axis(first[0], lengths[0], KERNEL[0], CAUSAL[0], TILE[0], OF_KEYS)
        total *= box0[1]
    return (box0, box1, box2), total


@triton.jit
def in_box(start, box, AXES: tl.constexpr, BLOCK: tl.constexpr):
    """The places start.. of a box, in order; those past its last one lie past its end, where nothing is seen."""
    place = start + tl.arange(0, BLOCK)
    zero = tl.zeros_like(place)
    if AXES == 1:
        return zero, zero, box[2][0] + place
    elif AXES == 2:
        return zero, box[1][0] + place // box[2][1], box[2][0] + place % box[2][1]
    else:
        line = place // box[2][1]
        return box[0][0] + line // box[1][1], box[1][0] + line % box[1][1], box[2][0] + place % box[2][1]


@triton.jit
def sees_along(
    lanes, places, length, KERNEL: tl.constexpr, CAUSAL: tl.constexpr, OF_KEYS: tl.constexpr
):  # fmt: skip
    first, last = neighbours(lanes, length, KERNEL, CAUSAL, OF_KEYS)
    return (places[None, :] >= first[:, None]) & (places[None, :] < last[:, None])


@triton.jit
def see(
    lanes, places, lengths, KERNEL: tl.constexpr, CAUSAL: tl.constexpr, AXES: tl.constexpr, OF_KEYS: tl.constexpr
):  # fmt: skip
    """[lanes, places]: whether a lane sees a place."""
    seen = sees_along(lanes[2], places[2], lengths[2], KERNEL[2], CAUSAL[2], OF_KEYS)
    if AXES > 1:
        seen = seen & sees_along(lanes[1], places[1], lengths[1], KERNEL[1], CAUSAL[1], OF_KEYS)
    if AXES > 2:
        seen = seen & sees_along(lanes[0], places[0], lengths[0], KERNEL[0], CAUSAL[0], OF_KEYS)
    return seen


@triton.jit
def base_of(view, batch, head, group):
    """The row of a head at the first place of a dilation group."""
    strides = view.strides
    at = batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[4]
    for axis in tl.static_range(3):
        at += tl.cast(group[axis], tl.int64) * strides[1 + axis]
    return view.ptr + at


@triton.jit
def row_pointers(view, base, places, DILATION: tl.constexpr, AXES: tl.constexpr):
    rows = base + (places[2] * DILATION[2]).to(tl.int64) * view.strides[3]
    if AXES > 1:
        rows += (places[1] * DILATION[1]).to(tl.int64) * view.strides[2]
    if AXES > 2:
        rows += (places[0] * DILATION[0]).to(tl.int64) * view.strides[1]
    return rows


@triton.jit
def load_rows(
    view, base, places, inside, DILATION: tl.constexpr, AXES: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """[places, BLOCK], zeros outside."""
    columns = tl.arange(0, BLOCK)
    pointers = row_pointers(view, base, places, DILATION, AXES)[:, None] + columns[None, :]
    if WIDTH != BLOCK:
        return tl.load(pointers, mask=inside[:, None] & (columns < WIDTH)[None, :], other=0.0)
    else:
        return tl.load(pointers, mask=inside[:, None], other=0.0)


@triton.jit
def store_rows(
    view, base, places, inside, rows, DILATION: tl.constexpr, AXES: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK)
    pointers = row_pointers(view, base, places, DILATION, AXES)[:, None] + columns[None, :]
    tl.store(pointers, rows.to(base.dtype.element_ty), mask=inside[:, None] & (columns < WIDTH)[None, :])


@triton.jit
def statistic_offsets(places, group, sides, DILATION: tl.constexpr, AXES: tl.constexpr):
    """Where a place stands in the flattened map."""
    at = (places[2] * DILATION[2] + group[2]).to(tl.int64)
    if AXES > 1:
        at += (places[1] * DILATION[1] + group[1]).to(tl.int64) * sides[2]
    if AXES > 2:
        at += (places[0] * DILATION[0] + group[0]).to(tl.int64) * sides[1] * sides[2]
    return at


@triton.jit
def bias_part(places, KERNEL: tl.constexpr, AXES: tl.constexpr):
    """Row of the table, the part of a key; a query's is taken off."""
    part = places[2]
    if AXES > 1:
        part += places[1] * (2 * KERNEL[2] - 1)
    if AXES > 2:
        part += places[0] * ((2 * KERNEL[1] - 1) * (2 * KERNEL[2] - 1))
    return part


@triton.jit
def scores(products, scale, table, head, rows, of_queries, of_keys, seen, KERNEL: tl.constexpr):
    """From q·k: exponents of two, -inf where nothing is seen. of_queries and of_keys, `bias_part`s, broadcast."""
    s = products * scale
    if table is not None:
        zero_distance = ((KERNEL[0] - 1) * (2 * KERNEL[1] - 1) + KERNEL[1] - 1) * (2 * KERNEL[2] - 1) + KERNEL[2] - 1
        pointers = table + head.to(tl.int64) * rows + (of_keys - of_queries + zero_distance)
        s += tl.load(pointers, mask=seen, other=0.0) * LOG2E
    return tl.where(seen, s, float("-inf"))


class Tile(NamedTuple):
    lanes: int  # places of a program's tile
    block: int  # places of the box in a step
    num_warps: int
    num_stages: int


# (kernel, larger head dim up to, architecture) -> tile, for 16-bit inputs. Lanes of "grad_key" are keys, of
# the others queries.
TILES = {
    ("forward", 64, "sm80"): Tile(64, 64, 4, 2),
    ("forward", 128, "sm80"): Tile(64, 64, 4, 2),
    ("forward", 256, "sm80"): Tile(64, 32, 8, 1),
    ("forward", 64, "sm86"): Tile(64, 64, 4, 2),
    ("forward", 128, "sm86"): Tile(64, 32, 4, 2),
    ("forward", 256, "sm86"): Tile(64, 32, 8, 1),
    ("forward", 64, "sm90"): Tile(64, 64, 4, 2),
    ("forward", 128, "sm90"): Tile(64, 64, 4, 2),
    ("forward", 256, "sm90"): Tile(64, 32, 8, 1),
    ("grad_query", 64, "sm80"): Tile(64, 64, 8, 2),
    ("grad_query", 128, "sm80"): Tile(64, 32, 4, 2),
    ("grad_query", 256, "sm80"): Tile(64, 16, 8, 1),
    ("grad_query", 64, "sm86"): Tile(64, 32, 4, 2),
    ("grad_query", 128, "sm86"): Tile(64, 32, 8, 1),
    ("grad_query", 256, "sm86"): Tile(32, 16, 8, 1),
    ("grad_query", 64, "sm90"): Tile(64, 64, 4, 2),
    ("grad_query", 128, "sm90"): Tile(64, 64, 8, 2),
    ("grad_query", 256, "sm90"): Tile(32, 16, 8, 1),
    ("grad_key", 64, "sm80"): Tile(64, 32, 8, 1),
    ("grad_key", 128, "sm80"): Tile(64, 32, 8, 1),
    ("grad_key", 256, "sm80"): Tile(32, 32, 8, 1),
    ("grad_key", 64, "sm86"): Tile(64, 32, 8, 1),
    ("grad_key", 128, "sm86"): Tile(64, 32, 8, 1),
    ("grad_key", 256, "sm86"): Tile(32, 16, 8, 1),
    ("grad_key", 64, "sm90"): Tile(64, 64, 8, 2),
    ("grad_key", 128, "sm90"): Tile(64, 32, 8, 1),
    ("grad_key", 256, "sm90"): Tile(32, 32, 8, 1),
    ("grad_table", 64, "sm80"): Tile(64, 64, 8, 1),
    ("grad_table", 128, "sm80"): Tile(64, 32, 8, 1),
    ("grad_table", 256, "sm80"): Tile(32, 16, 8, 1),
    ("grad_table", 64, "sm86"): Tile(64, 64, 8, 1),
    ("grad_table", 128, "sm86"): Tile(64, 32, 8, 1),
    ("grad_table", 256, "sm86"): Tile(32, 16, 8, 1),
    ("grad_table", 64, "sm90"): Tile(64, 64, 8, 1),
    ("grad_table", 128, "sm90"): Tile(64, 64, 8, 1),
    ("grad_table", 256, "sm90"): Tile(64, 32, 8, 1),
}
# The same for float32 inputs, on every architecture.
FLOAT32_TILES = {
    ("forward", 64): Tile(32, 32, 8, 1),
    ("forward", 128): Tile(16, 32, 8, 1),
    ("forward", 256): Tile(16, 16, 8, 1),
    ("grad_query", 64): Tile(32, 16, 8, 1),
    ("grad_query", 128): Tile(16, 32, 8, 1),
    ("grad_query", 256): Tile(16, 32, 8, 1),
    ("grad_key", 64): Tile(32, 16, 8, 1),
    ("grad_key", 128): Tile(16, 16, 8, 1),
    ("grad_key", 256): Tile(16, 16, 8, 1),
    ("grad_table", 64): Tile(16, 32, 8, 1),
    ("grad_table", 128): Tile(16, 32, 8, 1),
    ("grad_table", 256): Tile(16, 32, 4, 1),
}
INTERPRETER_TILE = Tile(16, 32, 1, 1)


def tile_shape(lanes: int, kernel: tuple[int, ...], axes: int) -> tuple[int, ...]:
    """The block of `lanes` places that sees fewest in all; by the kernel alone: a new map compiles nothing."""
    shapes = [(1 << a, 1 << b, lanes >> a + b) for a in range(9) for b in range(9) if lanes >> a + b]
    shapes = [shape for shape in shapes if all(t == 1 for t in shape[: 3 - axes])]
    return min(shapes, key=lambda shape: (math.prod(k + t - 1 for k, t in zip(kernel, shape, strict=True)), -shape[2]))


class Problem:
    """What every launch of one call needs, read from the operator's arguments."""

    def __init__(self, query, key, value, table, kernel, dilation, causal, scale):
        self.axes = query.dim() - 3
        lead = (1,) * (3 - self.axes)
        self.sides, self.kernel, self.dilation = (
            lead + tuple(numbers) for numbers in (query.shape[1:-2], kernel, dilation)
        )
        self.causal = (False,) * (3 - self.axes) + tuple(map(bool, causal))
        self.batch, self.heads, self.heads_kv = query.shape[0], query.shape[-2], key.shape[-2]
        self.head_dim, self.head_dim_v = query.shape[-1], value.shape[-1]
        self.head_dim_bucket = max(64, block_width(self.head_dim), block_width(self.head_dim_v))
        self.device, self.dtype = query.device, query.dtype
        self.scale = scale
        self.table = None if table is None else table.t().contiguous()
        self.table_rows = 0 if table is None else table.shape[0]
        self.sizes = *self.sides, self.batch, self.heads, self.heads // self.heads_kv

    def tile(self, kernel: str) -> Tile:
        if INTERPRET:
            return INTERPRETER_TILE
        if self.dtype == torch.float32:
            return FLOAT32_TILES[kernel, self.head_dim_bucket]
        tile = TILES[kernel, self.head_dim_bucket, architecture(self.device)]
        if self.table is not None and kernel != "grad_table":  # the addresses of a block's biases are registers too
            tile = tile._replace(block=max(16, tile.block // 2))
        return tile

    def tiles(self, tile: Tile, heads: int) -> int:
        """Of all maps."""
        shape = tile_shape(tile.lanes, self.kernel, self.axes)
        places = zip(self.sides, self.dilation, shape, strict=True)
        counts = (triton.cdiv(triton.cdiv(side, step), t) for side, step, t in places)
        return self.batch * heads * math.prod(self.dilation) * math.prod(counts)

    def constants(self, tile: Tile) -> dict:
        """The compile-time arguments that every kernel of a call takes."""
        return {
            "KERNEL": self.kernel, "DILATION": self.dilation, "CAUSAL": self.causal, "AXES": self.axes,
            "TILE": tile_shape(tile.lanes, self.kernel, self.axes), "BLOCK": tile.block,
            "HEAD_DIM": self.head_dim, "HEAD_DIM_V": self.head_dim_v,
            "BLOCK_D": block_width(self.head_dim), "BLOCK_DV": block_width(self.head_dim_v),
            "num_warps": tile.num_warps, "num_stages": tile.num_stages,
        }  # fmt: skip


def view(tensor: torch.Tensor) -> MapView:
    """Of a (B, *space, H, D) tensor; copied if its channels are not adjacent."""
    if tensor.stride(-1) != 1:
        tensor = tensor.contiguous()
    batch, *axes, head, _ = tensor.stride()
    return MapView(tensor, (batch, *(0,) * (3 - len(axes)), *axes, head))
