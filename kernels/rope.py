"""Rotary position embedding: pairs of channels (a, b) turn to (a cos - b sin, b cos + a sin), in one pass.

A program owns BLOCK_S positions of one sequence and a group of heads: it reads the positions' rows of cos and sin once,
then walks its heads. Rows are read and written along the channels, so that a warp's accesses are contiguous, 16 bytes a
thread where strides allow. The inverse (and so the backward pass) is the same kernel with -sin. Arithmetic is float32.

Neighbouring pairs (GPT-J) are loaded as one tile and split in registers. Channels past the rotary ones are copied, or
left alone in place. Positions are clamped to the tables' rows: a wrong one stays in memory. No GPU has run this file.
"""

import torch
import triton
import triton.language as tl

from ..ops.attention_operator import in_order_of
from .common import launch_context

HEADS = 8  # of a program: a table row is read once for so many
TILE = 4096  # channels of a program's tile, about


@triton.jit
def _table_rows(
    positions, axis_stride, batch_stride, row_stride, first, batch, rows, columns, length, table_rows,
    SECTIONS: tl.constexpr,
):  # fmt: skip
    """The table row of each (position, angle): [BLOCK_S, 1], or [BLOCK_S, BLOCK_P] where angles follow several axes."""
    if positions is None:
        return (first + rows)[:, None]
    else:
        row = tl.minimum(rows, length - 1).to(tl.int64)
        places = positions + batch * batch_stride + row[:, None] * row_stride
        if SECTIONS is not None:
            axis = tl.zeros_like(columns)
            end = 0
            for i in tl.static_range(len(SECTIONS) - 1):
                end += SECTIONS[i]
                axis += tl.where(columns >= end, 1, 0)
            places += axis.to(tl.int64)[None, :] * axis_stride
        return tl.minimum(tl.maximum(tl.load(places).to(tl.int64), 0), table_rows - 1)


@triton.jit(do_not_specialize=["first", "length", "table_rows"])
def rope_kernel(
    x, out, cos, sin, positions, x_batch, x_head, x_row, out_batch, out_head, out_row, cos_row, sin_row, axis_stride,
    batch_stride, row_stride, first, heads, length, table_rows,
    PAIRS: tl.constexpr, TAIL: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_T: tl.constexpr,
    HEADS: tl.constexpr, SECTIONS: tl.constexpr, INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    groups, blocks = tl.cdiv(heads, HEADS), tl.cdiv(length, BLOCK_S)
    group = tl.program_id(0) % groups
    start = tl.program_id(0) // groups % blocks * BLOCK_S
    batch = (tl.program_id(0) // groups // blocks).to(tl.int64)
    rows, columns = start + tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_P)
    inside = (rows < length)[:, None]
    turning = inside & (columns < PAIRS)[None, :]
    row = _table_rows(
        positions, axis_stride, batch_stride, row_stride, first, batch, rows, columns, length, table_rows, SECTIONS
    )
    c = tl.load(cos + row.to(tl.int64) * cos_row + columns[None, :], mask=turning, other=0.0)  # [BLOCK_S, BLOCK_P]
    s = tl.load(sin + row.to(tl.int64) * sin_row + columns[None, :], mask=turning, other=0.0)
    if INVERSE:
        s = -s
    offsets = rows.to(tl.int64)[:, None]
    wide = tl.arange(0, 2 * BLOCK_P)[None, :]
    rest = tl.arange(0, BLOCK_T)[None, :]
    for head in range(group * HEADS, tl.minimum(group * HEADS + HEADS, heads)):
        x_base = x + batch * x_batch + tl.cast(head, tl.int64) * x_head + offsets * x_row
        out_base = out + batch * out_batch + tl.cast(head, tl.int64) * out_head + offsets * out_row
        if INTERLEAVED:
            both = inside & (wide < 2 * PAIRS)
            tile = tl.load(x_base + wide, mask=both, other=0.0).to(tl.float32)
            a, b = tl.split(tl.reshape(tile, [BLOCK_S, BLOCK_P, 2]))
            turned = tl.reshape(tl.join(a * c - b * s, b * c + a * s), [BLOCK_S, 2 * BLOCK_P])
            tl.store(out_base + wide, turned.to(out.dtype.element_ty), mask=both)
        else:
            a = tl.load(x_base + columns[None, :], mask=turning, other=0.0).to(tl.float32)
            b = tl.load(x_base + PAIRS + columns[None, :], mask=turning, other=0.0).to(tl.float32)
            tl.store(out_base + columns[None, :], (a * c - b * s).to(out.dtype.element_ty), mask=turning)
            tl.store(out_base + PAIRS + columns[None, :], (b * c + a * s).to(out.dtype.element_ty), mask=turning)
        if TAIL:
            passing = inside & (rest < TAIL)
            kept = tl.load(x_base + 2 * PAIRS + rest, mask=passing)
            tl.store(out_base + 2 * PAIRS + rest, kept, mask=passing)


def _launch(x, out, cos, sin, positions, first, sections, interleaved, inverse):
    if x.numel() == 0:
        return
    packed = x.dim() == 3  # (T, H, D)
    batch, heads, length = (1, x.shape[1], x.shape[0]) if packed else x.shape[:3]
    strides = [(0, t.stride(1), t.stride(0)) if packed else t.stride()[:3] for t in (x, out)]
    steps = (0, 0, 0)
    if positions is not None:
        dims, step = positions.dim(), positions.stride()
        steps = (step[0] if dims > 2 else 0, step[-2] if dims > 1 and positions.shape[-2] > 1 else 0, step[-1])
    axes = positions is not None and positions.dim() > 2
    pairs, dim = cos.shape[1], x.shape[-1]
    tail = 0 if out is x else dim - 2 * pairs
    block_p = triton.next_power_of_2(max(pairs, 1))
    block_s = max(1, min(64, TILE // (2 * block_p)))
    grid = (batch * triton.cdiv(length, block_s) * triton.cdiv(heads, HEADS),)
    with launch_context(x):
        rope_kernel[grid](
            x, out, cos, sin, positions, *strides[0], *strides[1], cos.stride(0), sin.stride(0), *steps, first, heads,
            length, cos.shape[0], PAIRS=pairs, TAIL=tail, BLOCK_S=block_s, BLOCK_P=block_p,
            BLOCK_T=triton.next_power_of_2(max(tail, 1)), HEADS=HEADS, SECTIONS=tuple(sections) if axes else None,
            INTERLEAVED=interleaved, INVERSE=inverse,
        )  # fmt: skip


def rotate(x, cos, sin, *options) -> torch.Tensor:
    """See the schemas in ops/rope_operator.py."""
    out = in_order_of(x, x.shape[-1])
    _launch(_unit_rows(x), out, _unit_rows(cos), _unit_rows(sin), *options)
    return out


def rotate_pair(query, key, cos, sin, query_positions, key_positions, query_first, key_first, *options):
    return (
        rotate(query, cos, sin, query_positions, query_first, *options),
        rotate(key, cos, sin, key_positions, key_first, *options),
    )


def rotate_in_place(x, cos, sin, *options) -> None:
    _launch(x, x, _unit_rows(cos), _unit_rows(sin), *options)


def _unit_rows(t: torch.Tensor) -> torch.Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()
