"""What the kernels of windowed attention share: where a window's rows are, products of rows, scores, tile sizes.

A window is known by its number, a token by its place inside the window, row-major; cyclic shift, partition and reverse
are the addresses of rows. Rows longer than a piece are walked in pieces, so that no head dim needs a tile of its own.
Cosine attention divides products of rows by the rows' norms, in float32: the gradient of the logit scale is a sum of
many terms that cancel.

NOTES
  - 49 tokens pad to 64. A matrix instruction takes 16 rows by 8 columns, 16 deep: 49 queries are four steps of 16
    however they lie and 49 keys seven of 8, so that a tile of 64 x 64 computes 8/7 of what the instructions have to.
    Packing windows into a tile gains nothing: a step of 16 queries that spans two windows multiplies the keys of both
    (two windows on the diagonal of 128 x 128 are twice the work), and the 49th query alone, in vector form, costs more
    than its step. What padding costs hides behind memory: rows past the window are not read, a program takes a run of
    windows, for which the bias stays in registers, and the rows of the next window travel while this one is computed.
    Windows of at most 16 or 32 tokens have tiles and programs of that size.
  - Instructions a thread and window (49 tokens, D 32, bfloat16, sm_90, counted in the machine code): forward 423,
    shifted 528; backward 792 and 906. Rows have 32-bit addresses inside a map (64-bit between maps, and where a map is
    that large) and the next window of a run is found by carrying: divisions and 64-bit products were half of it.
  - Triton lays products that feed other products out along rows alone, 16 to a warp, and more warps repeat each other's
    work. A warp for every 16 queries, then; what does not fit its registers (float32, backward) takes smaller tiles.
No GPU has run or timed any of it. Past 32 channels the backward spills a few registers.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .common import LOG2E, block_width, dot

LEAST_NORM = tl.constexpr(1e-12)
MOST = 64  # queries or keys of a tile
# Never specialised on: another map compiles nothing. Triton does that to numbers alone, not inside a tuple.
NUMBERS = ["count0", "count1", "count2", "shift0", "shift1", "shift2", "total", "heads", "share"]


class Map(NamedTuple):
    """A (B, *space, H, D) tensor of unit-stride channels."""

    ptr: Any
    strides: Any  # batch, heads, the axes of space


class Cut(NamedTuple):
    """How maps are cut into windows, three axes, of which as many count as WINDOW has."""

    counts: Any  # windows of a map along each axis
    shift: Any  # along each axis; None where nothing is shifted


@triton.jit
def place_of(window, cut, WINDOW: tl.constexpr):
    """(batch, index along each axis) of a window."""
    index = ()
    for x in tl.static_range(len(WINDOW) - 1, -1, -1):
        along = (window % cut.counts[x],)
        index = along + index
        window = window // cut.counts[x]
    return window, index


@triton.jit
def next_place(place, cut, WINDOW: tl.constexpr):
    """That of the window after it, without a division."""
    batch, index = place
    following = ()
    carry = 1
    for x in tl.static_range(len(WINDOW) - 1, -1, -1):
        along = index[x] + carry
        carry = tl.where(along == cut.counts[x], 1, 0)
        along = (tl.where(carry == 1, 0, along),)
        following = along + following
    return batch + carry, following


@triton.jit
def edges_of(place, cut, WINDOW: tl.constexpr):
    """Bit x: the window holds the wrap of axis x."""
    edges = 0
    if cut.shift[0] is not None:
        for x in tl.static_range(len(WINDOW)):
            last = place[1][x] == cut.counts[x] - 1
            edges += tl.where(last & (cut.shift[x] > 0), 1 << x, 0)
    return edges


@triton.jit
def along_axis(tokens, x: tl.constexpr, WINDOW: tl.constexpr):
    """The place of tokens along axis x of their window."""
    for i in tl.static_range(x + 1, len(WINDOW)):
        tokens = tokens // WINDOW[i]
    if x > 0:
        tokens = tokens % WINDOW[x]
    return tokens


@triton.jit
def regions(tokens, edges, cut, WINDOW: tl.constexpr):
    """Bit x: past the wrap of axis x, if the window holds it. Tokens see those of their own region."""
    region = tokens * 0
    for x in tl.static_range(len(WINDOW)):
        region += tl.where(along_axis(tokens, x, WINDOW) >= WINDOW[x] - cut.shift[x], 1 << x, 0)
    return region & edges


@triton.jit
def rows_of(tensor, place, head, tokens, cut, WINDOW: tl.constexpr, GRID: tl.constexpr, WIDE: tl.constexpr):
    """Pointers to the rows of a window's tokens."""
    batch, index = place
    rows = tensor.ptr + (batch.to(tl.int64) * tensor.strides[0] + head.to(tl.int64) * tensor.strides[1])
    for x in tl.static_range(len(WINDOW)):
        place_x = along_axis(tokens, x, WINDOW)
        if GRID:
            place_x = place_x * cut.counts[x] + index[x]
        else:
            place_x += index[x] * WINDOW[x]
        if cut.shift[0] is not None:
            place_x += cut.shift[x]
            side = cut.counts[x] * WINDOW[x]
            place_x -= tl.where(place_x >= side, side, 0)
        rows += (place_x.to(tl.int64) if WIDE else place_x) * tensor.strides[2 + x]
    return rows


@triton.jit
def inside(tokens, columns, TOKENS: tl.constexpr, WIDTH: tl.constexpr):
    return (tokens < TOKENS)[:, None] & (columns < WIDTH)[None, :]


@triton.jit
def load_piece(
    rows, tokens, first_column, TOKENS: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """[tokens, BLOCK] of the rows from a column on, zeros outside."""
    columns = first_column + tl.arange(0, BLOCK)
    pointers = rows[:, None] + columns[None, :]
    if TOKENS == PADDED and WIDTH % BLOCK == 0:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=inside(tokens, columns, TOKENS, WIDTH), other=0.0)


@triton.jit
def store_piece(rows, tokens, first_column, tile, TOKENS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    columns = first_column + tl.arange(0, BLOCK)
    pointers = rows[:, None] + columns[None, :]
    tl.store(pointers, tile.to(rows.dtype.element_ty), mask=inside(tokens, columns, TOKENS, WIDTH))


@triton.jit
def inverse_norms(
    rows, tokens, TOKENS: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    COSINE: tl.constexpr,
):  # fmt: skip
    """1 / |row|, at most 1 / LEAST_NORM; 1 without COSINE."""
    if COSINE:
        squares = tl.zeros([tokens.shape[0]], tl.float32)
        for first in tl.static_range(0, WIDTH, BLOCK):
            piece = load_piece(rows, tokens, first, TOKENS, PADDED, WIDTH, BLOCK).to(tl.float32)
            squares += tl.sum(piece * piece, 1)
        return 1.0 / tl.maximum(tl.sqrt(squares), LEAST_NORM)
    else:
        return 1.0


@triton.jit
def products(
    a_rows, b_rows, a_tokens, b_tokens, TOKENS: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A·Bᵀ of rows, and the last pieces of A and B."""
    result = tl.zeros([a_tokens.shape[0], b_tokens.shape[0]], tl.float32)
    for first in tl.static_range(0, WIDTH, BLOCK):
        a = load_piece(a_rows, a_tokens, first, TOKENS, PADDED, WIDTH, BLOCK)
        b = load_piece(b_rows, b_tokens, first, TOKENS, PADDED, WIDTH, BLOCK)
        result = dot(a, tl.trans(b), result)
    return result, a, b


@triton.jit
def cosines(products, inverse_q, inverse_k, COSINE: tl.constexpr):
    """The products themselves without COSINE."""
    if COSINE:
        return products * inverse_q[:, None] * inverse_k[None, :]
    else:
        return products


@triton.jit
def unit(piece, inverse, COSINE: tl.constexpr):
    """A piece of rows of unit length; without COSINE, of the rows as they are."""
    if COSINE:
        return (piece.to(tl.float32) * inverse[:, None]).to(piece.dtype)
    else:
        return piece


@triton.jit
def through_norm(grad, unit, inverse, radial, factor, COSINE: tl.constexpr):
    """factor times the gradient of x, from that of x / |x|: what of it lies along `unit`, `radial`, does not pass.

    |x| that is held at its least is no function of x: all passes.
    """
    if COSINE:
        passes = tl.where(inverse * LEAST_NORM > 0.9999, 0.0, 1.0)
        radial = radial[:, None] * passes[:, None]
        return (grad - unit.to(tl.float32) * radial) * (factor * inverse)[:, None]
    else:
        return grad * factor


@triton.jit
def scale_of(scale, logit_scale, head):
    if logit_scale is None:
        return scale
    else:
        return tl.load(logit_scale + head)


@triton.jit
def bias_tile(bias, head, tokens_q, tokens_k, TOKENS: tl.constexpr, PADDED: tl.constexpr):
    """[queries, keys] of a head's bias, -inf at keys past the window; what broadcasts to it where there is none."""
    if bias is None:
        if TOKENS == PADDED:
            return 0.0
        else:
            return tl.where(tokens_k < TOKENS, 0.0, float("-inf"))[None, :]
    else:
        first = bias + head.to(tl.int64) * (PADDED * PADDED)
        return tl.load(first + tokens_q[:, None] * PADDED + tokens_k[None, :])


@triton.jit
def scores(cosines, scale, bias, tokens_q, tokens_k, edges, cut, WINDOW: tl.constexpr):
    """In units of log2, -inf where a query does not see a key."""
    s = cosines * (scale * LOG2E) + bias
    if cut.shift[0] is not None:
        region_q = regions(tokens_q, edges, cut, WINDOW)
        region_k = regions(tokens_k, edges, cut, WINDOW)
        s = tl.where(region_q[:, None] == region_k[None, :], s, float("-inf"))
    return s


@triton.jit
def table_row(tokens_q, tokens_k, WINDOW: tl.constexpr):
    """The row of the relative bias table, in Swin's order."""
    row = 0
    for x in tl.static_range(len(WINDOW)):
        distance = along_axis(tokens_q, x, WINDOW) - along_axis(tokens_k, x, WINDOW)
        row = row * (2 * WINDOW[x] - 1) + distance + (WINDOW[x] - 1)
    return row


@triton.jit(do_not_specialize=NUMBERS)
def window_bias_kernel(
    table, bias, out, heads, TOKENS: tl.constexpr, PADDED: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr
):
    """A head's bias, dense and in units of log2: table and bias added; zeros past the queries, -inf past the keys."""
    head, tile = tl.program_id(0) % heads, tl.program_id(0) // heads
    i = (tile // (PADDED // BLOCK) * BLOCK + tl.arange(0, BLOCK))[:, None]
    j = (tile % (PADDED // BLOCK) * BLOCK + tl.arange(0, BLOCK))[None, :]
    valid = (i < TOKENS) & (j < TOKENS)
    s = tl.where(j < TOKENS, 0.0, float("-inf"))
    if table is not None:
        s += tl.load(table + table_row(i, j, WINDOW) * heads + head, mask=valid, other=0.0) * LOG2E
    if bias is not None:
        s += tl.load(bias + head.to(tl.int64) * (TOKENS * TOKENS) + i * TOKENS + j, mask=valid, other=0.0) * LOG2E
    tl.store(out + head.to(tl.int64) * (PADDED * PADDED) + i * PADDED + j, s)


class Tile(NamedTuple):
    block_m: int  # queries
    block_n: int  # keys
    piece: int  # channels at a time, at most
    num_warps: int
    num_stages: int


# (kernel, tokens up to, larger head dim up to) -> tile, for 16-bit inputs; 0 tokens: larger windows than the others.
TILES = {
    ("forward", 16, 64): Tile(16, 16, 64, 1, 3),
    ("forward", 16, 256): Tile(16, 16, 64, 1, 1),
    ("forward", 32, 64): Tile(32, 32, 64, 2, 3),
    ("forward", 32, 256): Tile(32, 32, 64, 2, 1),
    ("forward", 64, 64): Tile(64, 64, 64, 4, 2),
    ("forward", 64, 256): Tile(64, 64, 64, 4, 1),
    ("forward", 0, 64): Tile(64, 64, 64, 4, 2),
    ("forward", 0, 256): Tile(64, 64, 64, 4, 1),
    ("backward", 16, 64): Tile(16, 16, 64, 1, 2),
    ("backward", 16, 256): Tile(16, 16, 64, 1, 1),
    ("backward", 32, 64): Tile(32, 32, 64, 2, 2),
    ("backward", 32, 256): Tile(32, 32, 64, 2, 1),
    ("backward", 64, 32): Tile(64, 64, 32, 4, 2),
    ("backward", 64, 256): Tile(64, 64, 64, 4, 1),
    ("grad_query", 0, 64): Tile(64, 32, 64, 4, 2),
    ("grad_query", 0, 256): Tile(64, 64, 64, 4, 1),
    ("grad_key", 0, 64): Tile(64, 64, 64, 4, 2),
    ("grad_key", 0, 256): Tile(64, 64, 64, 4, 1),
    ("grad_bias", 0, 256): Tile(64, 64, 64, 4, 1),
}
# The same for float32 inputs.
FLOAT32_TILES = {
    ("forward", 16, 256): Tile(16, 16, 32, 1, 1),
    ("forward", 32, 256): Tile(32, 32, 32, 2, 1),
    ("forward", 64, 256): Tile(64, 64, 32, 4, 1),
    ("forward", 0, 256): Tile(32, 32, 32, 2, 1),
    ("backward", 16, 256): Tile(16, 16, 32, 1, 1),
    ("backward", 32, 256): Tile(32, 32, 32, 2, 1),
    ("grad_query", 0, 256): Tile(32, 32, 32, 2, 1),
    ("grad_key", 0, 256): Tile(32, 32, 32, 2, 1),
    ("grad_bias", 0, 256): Tile(32, 32, 32, 2, 1),
}
PROGRAMS = 2048  # aimed at, where several windows are a program's share: a few waves of any GPU


class Problem:
    """What every launch of one call needs, read from the operator's arguments."""

    def __init__(self, kernel, query, value, table, bias, logit_scale, window, shift, grid, scale):
        self.query, self.heads, self.dim, self.dim_v = query, query.shape[-2], query.shape[-1], value.shape[-1]
        self.window, self.tokens = tuple(window), math.prod(window)
        counts = tuple(side // w for side, w in zip(query.shape[1:-2], window, strict=True))
        self.windows = query.shape[0] * math.prod(counts)
        absent = (1,) * (3 - len(window))
        self.cut = (*counts, *absent, *((*shift, *absent) if any(shift) else (None,) * 3))
        self.grid, self.scale, self.logit_scale, self.table, self.bias = grid, scale, logit_scale, table, bias
        self.tiles = FLOAT32_TILES if query.dtype == torch.float32 else TILES
        held = sorted(n for name, n, _ in self.tiles if name == kernel and n >= self.tokens)
        self.large, self.padded = not held, held[0] if held else triton.cdiv(self.tokens, MOST) * MOST

    def tile(self, kernel: str) -> Tile:
        tokens, dim = 0 if self.large else self.padded, max(self.dim, self.dim_v)
        most = min(d for name, n, d in self.tiles if (name, n) == (kernel, tokens) and d >= dim)
        return self.tiles[kernel, tokens, most]

    def dense_bias(self):
        """(H, padded, padded) in units of log2, or None."""
        if self.table is None and self.bias is None:
            return None
        out = self.query.new_empty((self.heads, self.padded, self.padded), dtype=torch.float32)
        block = min(self.padded, MOST)
        window_bias_kernel[(self.heads * (self.padded // block) ** 2,)](
            self.table, self.bias, out, self.heads, TOKENS=self.tokens, PADDED=self.padded, WINDOW=self.window,
            BLOCK=block,
        )  # fmt: skip
        return out

    def radials(self):
        """(windows, H, padded): what of each query's gradient lies along it, before the logit scale."""
        return self.query.new_empty((self.windows, self.heads, self.padded), dtype=torch.float32)

    def share(self, least: int, tiles: int = 1) -> int:
        """Windows of a program that takes one of `tiles` tiles of several."""
        return max(least, triton.cdiv(self.windows * self.heads * tiles, PROGRAMS))

    def constants(self, tile: Tile, *maps: Map) -> dict:
        """The compile-time arguments that every kernel of a call takes."""
        sides = self.query.shape[1:-2]
        reach = (sum((n - 1) * s for n, s in zip(sides, m.strides[2:], strict=True)) for m in maps)
        return {
            "WIDE": max(reach) >= 2**31,  # offsets inside a map need 64 bits
            "TOKENS": self.tokens, "PADDED": self.padded, "WINDOW": self.window, "GRID": self.grid,
            "HEAD_DIM": self.dim, "HEAD_DIM_V": self.dim_v, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n,
            "BLOCK_D": min(tile.piece, block_width(self.dim)), "BLOCK_DV": min(tile.piece, block_width(self.dim_v)),
            "num_warps": tile.num_warps, "num_stages": tile.num_stages,
        }  # fmt: skip


def view(tensor: torch.Tensor) -> Map:
    """Copied if its channels are not adjacent."""
    if tensor.stride(-1) != 1:
        tensor = tensor.contiguous()
    batch, *space, heads, _ = tensor.stride()
    return Map(tensor, (batch, heads, *space))
