"""What the Triton kernels share: matrix products, tile loads and stores, tanh, dropout bits, launch context.

All offsets of rows are 64-bit, so a tensor may exceed 2^31 elements. A head dim that is no power of two is padded with
zeros to the next one inside a tile, never in memory.
"""

import contextlib
import functools

import torch
import triton
import triton.language as tl

INTERPRET = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: kernels run in numpy, on CPU tensors

LOG2E = tl.constexpr(1.4426950408889634)
_INTERPRET = tl.constexpr(INTERPRET)
_FLOAT32_DOT = tl.constexpr("ieee" if torch.version.hip else "tf32x3")  # three TF32 products: float32 accuracy


@triton.jit
def dot(a, b, acc=None):
    """acc + a @ b, accumulated in float32."""
    if _INTERPRET and a.dtype == tl.bfloat16:  # the interpreter holds bfloat16 as raw 16-bit integers
        result = tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    elif a.dtype == tl.float32:
        result = tl.dot(a, b, acc, input_precision=_FLOAT32_DOT)
    else:
        result = tl.dot(a, b, acc)
    return result


@triton.jit
def row_products(a, b):
    """a @ bᵀ, rows of channels. A tensor core truncates every partial sum within one product: past 128 channels of
    float32 that breaks the error rule, so 64 at a time are multiplied, and added in between by ordinary additions.
    It costs up to 130 bytes of stack a thread."""
    if a.dtype == tl.float32 and a.shape[1] > 128:
        # Of every four channels one: neighbours are a thread's own, and the order of the pieces is free.
        a02, a13 = tl.split(tl.reshape(a, [a.shape[0], a.shape[1] // 2, 2]))
        b02, b13 = tl.split(tl.reshape(b, [b.shape[0], b.shape[1] // 2, 2]))
        a0, a2 = tl.split(tl.reshape(a02, [a.shape[0], a.shape[1] // 4, 2]))
        b0, b2 = tl.split(tl.reshape(b02, [b.shape[0], b.shape[1] // 4, 2]))
        a1, a3 = tl.split(tl.reshape(a13, [a.shape[0], a.shape[1] // 4, 2]))
        b1, b3 = tl.split(tl.reshape(b13, [b.shape[0], b.shape[1] // 4, 2]))
        result = dot(a1, tl.trans(b1), dot(a0, tl.trans(b0)))
        result = dot(a3, tl.trans(b3), dot(a2, tl.trans(b2), result))
    else:
        result = dot(a, tl.trans(b))
    return result


@triton.jit
def tanh(x):
    """Within a few float32 roundings, near 0 as well: a Taylor polynomial there, exponentials elsewhere."""
    a = tl.abs(x)
    x2 = x * x
    near = a * (1.0 + x2 * (-1.0 / 3.0 + x2 * (2.0 / 15.0 + x2 * (-17.0 / 315.0 + x2 * (62.0 / 2835.0)))))
    t = tl.exp2(a * (-2.0 * LOG2E))
    result = tl.where(a < 0.25, near, (1.0 - t) / (1.0 + t))
    return tl.where(x < 0, -result, result)


@triton.jit
def load_tile(
    base, row_stride, first_row, row_limit, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    CHECK_ROWS: tl.constexpr,
):  # fmt: skip
    """[ROWS, BLOCK] of a row-major matrix `WIDTH` wide; zeros past WIDTH and, with CHECK_ROWS, past row_limit."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    origin = base + tl.cast(first_row, tl.int64) * row_stride  # a scalar: what a loop moves
    pointers = origin + rows.to(tl.int64)[:, None] * row_stride + columns[None, :]
    if CHECK_ROWS and WIDTH != BLOCK:
        tile = tl.load(pointers, mask=(rows < row_limit - first_row)[:, None] & (columns < WIDTH)[None, :], other=0.0)
    elif CHECK_ROWS:
        tile = tl.load(pointers, mask=(rows < row_limit - first_row)[:, None], other=0.0)
    elif WIDTH != BLOCK:
        tile = tl.load(pointers, mask=(columns < WIDTH)[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def store_tile(
    base, row_stride, first_row, row_limit, tile, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    rows, columns = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    pointers = base + first_row.to(tl.int64) * row_stride + rows.to(tl.int64)[:, None] * row_stride + columns[None, :]
    inside = (rows < row_limit - first_row)[:, None]
    if WIDTH != BLOCK:
        inside = inside & (columns < WIDTH)[None, :]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def keep_bits(seed_ptr, threshold, stream, rows, first_column, BLOCK_N: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Dropout's keep bits of [rows, first_column + 0..BLOCK_N), or of its transpose; first_column % 4 == 0.

    Bit (i, j) of stream s is word j % 4 of Philox4x32-10 at counter (j // 4, i, s, 0), kept if >= threshold: it depends
    on the indices alone, never on the tiling.
    """
    seed = tl.load(seed_ptr)
    quads = first_column // 4 + tl.arange(0, BLOCK_N // 4)
    if TRANSPOSED:
        c0, c1 = tl.broadcast(quads[:, None], rows[None, :])
    else:
        c0, c1 = tl.broadcast(quads[None, :], rows[:, None])
    zero = tl.zeros_like(c0)
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, zero + stream, zero)
    limit = tl.cast(threshold, tl.uint32)
    even = tl.join(w0 >= limit, w2 >= limit)
    odd = tl.join(w1 >= limit, w3 >= limit)
    bits = tl.join(even, odd)  # [.., .., 2, 2]: word 2 * third index + last index
    if TRANSPOSED:
        return bits.permute(0, 2, 3, 1).reshape(BLOCK_N, rows.shape[0])
    else:
        return bits.reshape(rows.shape[0], BLOCK_N)


def block_width(width: int) -> int:
    """The tile width that holds `width` channels: a power of two, at least what one matrix instruction takes."""
    return max(16, triton.next_power_of_2(width))


def launch_context(tensor: torch.Tensor):
    """Triton launches on the current device; make it the tensor's."""
    return contextlib.nullcontext() if INTERPRET else torch.cuda.device(tensor.device)


@functools.cache
def architecture(device: torch.device) -> str:
    """The row of a tuning table: sm80 (A100), sm90 (Hopper, Blackwell), sm86 (99 KiB of shared memory: all others)."""
    if torch.version.hip:
        return "sm86"
    capability = torch.cuda.get_device_capability(device)
    if capability == (8, 0):
        return "sm80"
    return "sm90" if (9, 0) <= capability < (12, 0) else "sm86"
