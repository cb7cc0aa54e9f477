"""Global keys of softmax attention: gathered into blocks of their own, beside those of the window.

A pass over them is one more pass over blocks of keys, of which a query sees what its window does not hold, so that none
counts twice. Their indices come as (1 or B, G) int32, ascending, -1 where there is no key. Where a kernel meets keys in
their order, `slots` (1 or B, Sk) says which are global.
"""

import torch
import triton
import triton.language as tl


def unique_keys(global_keys: torch.Tensor, rows_k: int) -> torch.Tensor:
    """(G,) or (B, G) indices in the form that the kernels take: what repeats or lies outside becomes -1."""
    keys = global_keys.reshape(-1, global_keys.shape[-1])
    keys = keys.masked_fill((keys < 0) | (keys >= rows_k), -1).int().sort(-1).values
    repeated = torch.zeros_like(keys, dtype=torch.bool)
    repeated[:, 1:] = keys[:, 1:] == keys[:, :-1]
    return keys.masked_fill(repeated, -1)


def slots_of(keys: torch.Tensor, rows_k: int) -> torch.Tensor:
    """The place of each key in `keys`, -1 for those that are not global; one column more than there are keys."""
    slots = keys.new_full((keys.shape[0], rows_k + 1), -1)
    places = torch.arange(keys.shape[1], dtype=torch.int32, device=keys.device).expand_as(keys)
    return slots.scatter_(1, torch.where(keys < 0, rows_k, keys).long(), places)


@triton.jit
def global_columns(block, batch, key_limit, terms, BLOCK_N: tl.constexpr):
    """The keys of a block; what is no key lies past the key limit."""
    places = block * BLOCK_N + tl.arange(0, BLOCK_N)
    base = terms.global_keys + batch.to(tl.int64) * terms.global_stride
    columns = tl.load(base + places, mask=places < terms.global_count, other=-1)
    return tl.where((columns >= 0) & (columns < key_limit), columns, 1 << 30)


@triton.jit
def is_beside_window(rows, columns, shift, key_limit, left, right, terms):
    """Whether a query sees a key that its window does not hold, if it is global."""
    distance = columns - rows - shift
    beside = distance != distance
    if left is not None:
        beside = distance < -left
    if terms.global_after is not None:
        beside = beside | (distance > right)
    return beside & (columns < key_limit)


@triton.jit
def is_global(columns, key_limit, own):
    """Of keys in their order; `own`: the terms of a head."""
    return tl.load(own[5] + columns, mask=columns < key_limit, other=-1) >= 0


@triton.jit
def any_global(columns, key_limit, own):
    return tl.max(is_global(columns, key_limit, own).to(tl.int32), 0) > 0


@triton.jit
def gather_tile(base, row_stride, rows, there, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """[rows, BLOCK] of a row-major matrix `WIDTH` wide; zeros past WIDTH and for rows that are not there."""
    columns = tl.arange(0, BLOCK)
    pointers = base + rows.to(tl.int64)[:, None] * row_stride + columns[None, :]
    return tl.load(pointers, mask=there[:, None] & (columns < WIDTH)[None, :], other=0.0)


@triton.jit
def gathered_dropout(values, rows, columns, stream, terms):
    """`dropout` at any columns; rows and columns broadcast against the values."""
    if terms.dropout_seed is None:
        return values
    else:
        rows, columns = tl.broadcast(rows, columns)
        zero = tl.zeros_like(columns)
        w0, w1, w2, w3 = tl.philox(tl.load(terms.dropout_seed), columns // 4, rows, zero + stream, zero)
        word = columns % 4
        bits = tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3))
        return tl.where(bits >= tl.cast(terms.dropout_threshold, tl.uint32), values, 0.0)
