"""Linear attention in Triton, forward, and the walk over chunks that the backward shares.

    o_i = scale φ(q_i)·S_i / (scale φ(q_i)·z_i + eps),   S_i = Σ_j decay^(p_i - j) φ(k_j) v_jᵀ + decay^(p_i + 1) S_0

Positions are cut into chunks of CHUNK; a program owns a head, a segment of its chunks and BLOCK_V channels of the
value, and carries S [D, BLOCK_V] in float32. The state of a chunk that starts at p0 is taken at time m = clamp(p0, 0,
limit): it stands still before the first key and after the last, so that queries outside the keys, key lengths and the
final state need no case of their own. Weights from the state to query i are decay^(p_i + 1 - m), from key j to the
next state decay^(m' - 1 - j). The same kernel walks backward for the gradient of the value: keys and queries change
places.

Where heads are few a sequence is cut into segments: `linear_state_kernel` sums each one's state, `linear_prefix_kernel`
runs over them, and every segment then starts from its own; not causal, the same two kernels give the whole state. The
cut depends on the shape alone. Not here: the "softmax" map, applied in torch around the kernels, since blocks of
channels do not see whole rows; one state for the query heads of a group. No GPU has run or timed any of it;
compiled for sm_90, the causal walk spills a few registers at head dim 256 and in float32.
"""

import torch
import triton
import triton.language as tl

from ..ops.attention_operator import in_order_of
from ..ops.linear_attention_operator import denominator_shape, state_shapes
from .attention_scores import base_of, sequence, view
from .common import block_width, dot, launch_context

IDENTITY, ELU, RELU, SQUARE_RELU, EXP, SOFTMAX = range(6)
MANY_PROGRAMS = 512  # below it, sequences are cut
LEAST_CHUNKS = 4  # of a segment
NUMBERS = ["rows_q", "rows_k", "segments", "chunks", "heads", "group"]


@triton.jit
def phi(x, MAP: tl.constexpr):
    x = x.to(tl.float32)
    if MAP == 1:
        x = tl.where(x > 0, x + 1.0, tl.exp(tl.minimum(x, 0.0)))
    elif MAP == 2:
        x = tl.maximum(x, 0.0)
    elif MAP == 3:
        x = tl.maximum(x, 0.0) * tl.maximum(x, 0.0)
    elif MAP == 4:
        x = tl.exp(x)
    return x


@triton.jit
def load_rows(tensor, base, rows, inside, first_column, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """[rows, BLOCK], zeros outside."""
    columns = first_column + tl.arange(0, BLOCK)
    pointers = base + rows.to(tl.int64)[:, None] * tensor.strides[2] + columns[None, :]
    return tl.load(pointers, mask=inside[:, None] & (columns < WIDTH)[None, :], other=0.0)


@triton.jit
def load_phi(
    tensor, base, rows, inside, first_column, WIDTH: tl.constexpr, BLOCK: tl.constexpr, MAP: tl.constexpr
):  # fmt: skip
    """φ of them, in float32, zeros outside all the same."""
    columns = first_column + tl.arange(0, BLOCK)
    x = phi(load_rows(tensor, base, rows, inside, first_column, WIDTH, BLOCK), MAP)
    return tl.where(inside[:, None] & (columns < WIDTH)[None, :], x, 0.0)


@triton.jit
def store_rows(tensor, base, rows, inside, first_column, x, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    columns = first_column + tl.arange(0, BLOCK)
    pointers = base + rows.to(tl.int64)[:, None] * tensor.strides[2] + columns[None, :]
    tl.store(pointers, x.to(base.dtype.element_ty), mask=inside[:, None] & (columns < WIDTH)[None, :])


@triton.jit
def add_product(a, b, acc, SPLIT: tl.constexpr):
    """acc + aᵀ b for a float32 a. SPLIT: what rounding a to half loses is a product of its own."""
    high = a.to(b.dtype)
    acc = dot(tl.trans(high), b, acc)
    if SPLIT and b.dtype != tl.float32:
        acc = dot(tl.trans((a - high.to(tl.float32)).to(b.dtype)), b, acc)
    return acc


@triton.jit
def state_product(a, state):
    """a @ state, of a float32 state that is rounded to a's type. A sum over a long sequence may not fit float16: its
    columns are then divided by powers of two, which changes no digit, and what they give is multiplied by them."""
    if a.dtype == tl.float16:
        power = tl.ceil(tl.log2(tl.maximum(tl.max(tl.abs(state), 0), 1.0) / 32768.0))
        factor = tl.exp2(tl.maximum(power, 0.0))
        return dot(a, (state / factor[None, :]).to(a.dtype)) * factor[None, :]
    else:
        return dot(a, state.to(a.dtype))


@triton.jit
def load_vector(pointer, rows, inside):
    return tl.load(pointer + rows, mask=inside, other=0.0)


@triton.jit
def shape_of(batch, cu_seqlens, key_lengths, rows_q, rows_k):
    """(first row, queries, key limit, shift) of a sequence."""
    first, length = sequence(batch, cu_seqlens, rows_q)
    if cu_seqlens is None:
        limit, shift = rows_k, rows_k - rows_q
    else:
        limit, shift = length, length * 0
    if key_lengths is not None:
        limit = tl.minimum(limit, tl.maximum(tl.load(key_lengths + batch).to(tl.int32), 0))
    return first, length, limit, shift


@triton.jit
def first_chunk(shift, CHUNK: tl.constexpr):
    return -tl.cdiv(tl.maximum(-shift, 0), CHUNK)


@triton.jit
def time_of(chunk, limit, CHUNK: tl.constexpr):
    return tl.minimum(tl.maximum(chunk * CHUNK, 0), limit)


@triton.jit
def rate_of(decay, head):
    """log2 of the head's decay; 0 without."""
    if decay is None:
        return 0.0
    else:
        return tl.log2(tl.load(decay + head))


@triton.jit
def weights_of(positions, rate, now, later):
    """To the next state from each key, and to each query from the state; how much of the state itself is kept."""
    to_state = tl.exp2(rate * tl.maximum(later - 1 - positions, 0).to(tl.float32))
    from_state = tl.exp2(rate * (positions + 1 - now).to(tl.float32))
    return to_state, from_state, tl.exp2(rate * (later - now).to(tl.float32))


@triton.jit
def state_pointers(
    kv, stream, first_column, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr
):
    """Pointers into (.., D, DV) and which of them are inside."""
    rows, columns = tl.arange(0, BLOCK_D), first_column + tl.arange(0, BLOCK_V)
    pointers = kv + stream.to(tl.int64) * (D * DV) + rows[:, None] * DV + columns[None, :]
    return pointers, (rows < D)[:, None] & (columns < DV)[None, :]


@triton.jit(do_not_specialize=NUMBERS)
def linear_state_kernel(
    b, c, b_scale, b_weight, kv, z, cu_seqlens, key_lengths, decay, rows_q, rows_k, heads, group, segments, chunks,
    D: tl.constexpr, DV: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    MAP: tl.constexpr, CAUSAL: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """What each segment adds: Σ φ(b) cᵀ, Σ φ(b). BACKWARD: b, c are queries and output gradients, else keys, values.

    b_scale multiplies rows of c, b_weight the rows of φ(b) that z sums (None: 1).
    """
    stream, segment = tl.program_id(0) // segments, tl.program_id(0) % segments
    first_v = tl.program_id(1) * BLOCK_V
    batch, head = stream // heads, stream % heads
    first, length_q, limit, shift = shape_of(batch, cu_seqlens, key_lengths, rows_q, rows_k)
    b_head = head if BACKWARD else head // group
    b_base, c_base = base_of(b, batch, b_head, first), base_of(c, batch, b_head, first)
    vectors = stream.to(tl.int64) * rows_q if cu_seqlens is None else head.to(tl.int64) * rows_q + first
    rate = rate_of(decay, head)
    state, total = tl.zeros([BLOCK_D, BLOCK_V], tl.float32), tl.zeros([BLOCK_D], tl.float32)
    start = (first_chunk(shift, CHUNK) if CAUSAL else 0) + segment * chunks
    for step in range(chunks):
        chunk = start + (chunks - 1 - step if BACKWARD else step)
        positions = chunk * CHUNK + tl.arange(0, CHUNK)
        rows = positions - shift if BACKWARD and CAUSAL else positions
        inside = (rows >= 0) & (rows < (length_q if BACKWARD else limit))
        phi_b = load_phi(b, b_base, rows, inside, 0, D, BLOCK_D, MAP)
        tile_c = load_rows(c, c_base, rows, inside, first_v, DV, BLOCK_V)
        z_weight = inside.to(tl.float32)
        if BACKWARD:
            tile_c = (tile_c * load_vector(b_scale + vectors, rows, inside)[:, None]).to(c_base.dtype.element_ty)
            z_weight = load_vector(b_weight + vectors, rows, inside)
        if decay is not None:
            now, later = time_of(chunk, limit, CHUNK), time_of(chunk + 1, limit, CHUNK)
            to_state, from_state, keep = weights_of(positions, rate, now, later)
            phi_b *= (from_state if BACKWARD else to_state)[:, None]
            state *= keep
            total *= keep
        state = add_product(phi_b, tile_c, state, decay is not None)
        total += tl.sum(phi_b * z_weight[:, None], 0)
    pointers, whole = state_pointers(kv, tl.program_id(0), first_v, D, DV, BLOCK_D, BLOCK_V)
    tl.store(pointers, state, mask=whole)
    columns = tl.arange(0, BLOCK_D)
    if first_v == 0:
        tl.store(z + tl.program_id(0).to(tl.int64) * D + columns, total, mask=columns < D)


@triton.jit(do_not_specialize=[*NUMBERS, "size"])
def linear_prefix_kernel(
    states, initial, final, cu_seqlens, key_lengths, decay, size, rows_q, rows_k, heads, segments, chunks,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, CAUSAL: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """states[stream, segment], `size` numbers: what each adds becomes what each starts from; final: after the last."""
    stream, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    batch, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    _, _, limit, shift = shape_of(batch, cu_seqlens, key_lengths, rows_q, rows_k)
    rate = rate_of(decay, head)
    run = tl.zeros([BLOCK], tl.float32)
    if initial is not None:
        run = tl.load(initial + stream * size + at, mask=inside, other=0.0)
    for step in range(segments):
        segment = segments - 1 - step if BACKWARD else step
        pointers = states + (stream * segments + segment) * size + at
        added = tl.load(pointers, mask=inside, other=0.0)
        tl.store(pointers, run, mask=inside)
        if decay is not None:
            chunk = first_chunk(shift, CHUNK) + segment * chunks
            elapsed = time_of(chunk + chunks, limit, CHUNK) - time_of(chunk, limit, CHUNK)
            run *= tl.exp2(rate * elapsed.to(tl.float32))
        run += added
    tl.store(final + stream * size + at, run, mask=inside)


@triton.jit(do_not_specialize=[*NUMBERS, "scale", "eps"])
def linear_walk_kernel(
    a, b, c, b_scale, out, denominator, start_kv, start_z, final_kv, final_z, cu_seqlens, key_lengths, decay,
    scale, eps, rows_q, rows_k, heads, group, segments, chunks,
    D: tl.constexpr, DV: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    MAP: tl.constexpr, CAUSAL: tl.constexpr, NORMALIZE: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """out_a = Σ_b w_ab (φ(a)·φ(b)) c_b: a, b, c are query, key, value, or (BACKWARD) key, query, output gradient."""
    stream, segment = tl.program_id(0) // segments, tl.program_id(0) % segments
    first_v = tl.program_id(1) * BLOCK_V
    batch, head = stream // heads, stream % heads
    first, length_q, limit, shift = shape_of(batch, cu_seqlens, key_lengths, rows_q, rows_k)
    a_head, b_head = (head // group, head) if BACKWARD else (head, head // group)
    a_base = base_of(a, batch, a_head, first)
    b_base, c_base = base_of(b, batch, b_head, first), base_of(c, batch, b_head, first)
    out_base = base_of(out, batch, head, first)
    vectors = stream.to(tl.int64) * rows_q if cu_seqlens is None else head.to(tl.int64) * rows_q + first
    rate = rate_of(decay, head)
    columns = tl.arange(0, BLOCK_D)
    state, total = tl.zeros([BLOCK_D, BLOCK_V], tl.float32), tl.zeros([BLOCK_D], tl.float32)
    if start_kv is not None:
        slot = tl.program_id(0) if CAUSAL else stream
        pointers, whole = state_pointers(start_kv, slot, first_v, D, DV, BLOCK_D, BLOCK_V)
        state = tl.load(pointers, mask=whole, other=0.0)
        total = tl.load(start_z + slot.to(tl.int64) * D + columns, mask=columns < D, other=0.0)
    dtype = a_base.dtype.element_ty
    start = (first_chunk(shift, CHUNK) if CAUSAL else 0) + segment * chunks
    for step in range(chunks):
        chunk = start + (chunks - 1 - step if BACKWARD else step)
        positions = chunk * CHUNK + tl.arange(0, CHUNK)
        rows_of_queries = positions - shift if CAUSAL else positions
        is_key = (positions >= 0) & (positions < limit)
        is_query = (rows_of_queries >= 0) & (rows_of_queries < length_q)
        now, later = time_of(chunk, limit, CHUNK), time_of(chunk + 1, limit, CHUNK)
        to_state, from_state, keep = weights_of(positions, rate, now, later)
        if BACKWARD:
            a_rows, a_inside, b_rows, b_inside = positions, is_key, rows_of_queries, is_query
            a_weight, b_weight = to_state, from_state
        else:
            a_rows, a_inside, b_rows, b_inside = rows_of_queries, is_query, positions, is_key
            a_weight, b_weight = from_state, to_state
        phi_a = load_phi(a, a_base, a_rows, a_inside, 0, D, BLOCK_D, MAP)
        weighted = phi_a
        if decay is not None:
            weighted = phi_a * tl.where(a_inside, a_weight, 0.0)[:, None]
        acc = state_product(weighted.to(dtype), state)
        sums = tl.sum(weighted * total[None, :], 1)
        if CAUSAL:
            phi_b = load_phi(b, b_base, b_rows, b_inside, 0, D, BLOCK_D, MAP)
            tile_c = load_rows(c, c_base, b_rows, b_inside, first_v, DV, BLOCK_V)
            if BACKWARD:
                tile_c = (tile_c * load_vector(b_scale + vectors, b_rows, b_inside)[:, None]).to(dtype)
            scores = dot(phi_a.to(dtype), tl.trans(phi_b.to(dtype)))  # [CHUNK of a, CHUNK of b]
            distance = positions[:, None] - positions[None, :]
            if BACKWARD:
                distance = -distance
            if decay is not None:
                scores *= tl.exp2(rate * tl.maximum(distance, 0).to(tl.float32))
            scores = tl.where(distance >= 0, scores, 0.0)
            sums += tl.sum(scores, 1)
            acc = dot(scores.to(dtype), tile_c, acc)
            if decay is not None:
                phi_b *= tl.where(b_inside, b_weight, 0.0)[:, None]
                state *= keep
                total *= keep
            state = add_product(phi_b, tile_c, state, decay is not None)
            total += tl.sum(phi_b, 0)
        if not BACKWARD:
            if NORMALIZE:
                sums = scale * sums + eps
                acc *= tl.where(sums == 0.0, 0.0, scale / tl.where(sums == 0.0, 1.0, sums))[:, None]
            else:
                sums = tl.full([CHUNK], 1.0, tl.float32)
                acc *= scale
            if first_v == 0:
                tl.store(denominator + vectors + a_rows, sums, mask=a_inside)
        store_rows(out, out_base, a_rows, a_inside, first_v, acc, DV, BLOCK_V)
    if final_kv is not None and segment == (0 if BACKWARD else segments - 1):
        pointers, whole = state_pointers(final_kv, stream, first_v, D, DV, BLOCK_D, BLOCK_V)
        tl.store(pointers, state, mask=whole)
        if first_v == 0 and final_z is not None:
            tl.store(final_z + stream.to(tl.int64) * D + columns, total, mask=columns < D)


class Problem:
    """Sizes, cuts and constants of a call, for forward and backward alike."""

    def __init__(self, query, key, value, key_lengths, cu_seqlens, decay, feature_map, causal):
        self.packed = query.dim() == 3
        self.heads, self.group = query.shape[1], query.shape[1] // key.shape[1]
        self.batch = cu_seqlens.shape[0] - 1 if self.packed else query.shape[0]
        self.rows_q, self.rows_k = (query.shape[0],) * 2 if self.packed else (query.shape[2], key.shape[2])
        self.streams = self.batch * self.heads
        self.lengths, self.cu_seqlens, self.decay = key_lengths, cu_seqlens, decay
        self.dim, self.dim_v, self.causal = query.shape[-1], value.shape[-1], causal
        wide = max(block_width(self.dim), block_width(self.dim_v))
        self.chunk = 64 if wide <= 64 and query.dtype != torch.float32 else 32
        self.device = query.device
        self.map = feature_map
        self.sequence = cu_seqlens, key_lengths, decay

    def cut(self, rows: int, blocks: int) -> tuple[int, int]:
        """(segments, chunks of a segment) for walks over `rows` positions."""
        chunks = max(1, triton.cdiv(rows, self.chunk))
        segments = min(triton.cdiv(MANY_PROGRAMS, max(1, self.streams * blocks)), max(1, chunks // LEAST_CHUNKS))
        return segments, triton.cdiv(chunks, segments)

    @property
    def positions(self) -> int:
        """From the first query or key to the last key, in whole chunks on both sides of position 0."""
        before = max(0, self.rows_q - self.rows_k)
        return triton.cdiv(before, self.chunk) * self.chunk + self.rows_k

    def block(self, carried: int, width: int) -> int:
        """Channels of `width` that a program carries beside all of `carried`."""
        most = 64 if block_width(carried) <= 64 else 32 if block_width(carried) <= 128 else 16
        return min(most, block_width(width))

    def new_states(self, segments: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        shape = self.streams * segments, self.dim
        return tuple(torch.empty(s, dtype=torch.float32, device=self.device) for s in ((*shape, self.dim_v), shape))

    def constants(self, block_v: int) -> dict:
        blocks = {"D": self.dim, "DV": self.dim_v, "CHUNK": self.chunk, "BLOCK_D": block_width(self.dim)}
        blocks |= {"BLOCK_V": block_v, "MAP": self.map, "CAUSAL": self.causal}
        return blocks | {"num_warps": 8 if self.causal else 4, "num_stages": 2 if block_width(self.dim) <= 128 else 1}

    def sums(self, b, c, b_scale, b_weight, initial, segments, chunks, *, backward: bool):
        """States by segment, as each starts, and the whole: ((kv, z), (kv, z))."""
        states, final = self.new_states(segments), self.new_states()
        block_v = self.block(self.dim, self.dim_v)
        numbers = self.rows_q, self.rows_k, self.heads
        linear_state_kernel[(self.streams * segments, triton.cdiv(self.dim_v, block_v))](
            view(b), view(c), b_scale, b_weight, *states, *self.sequence, *numbers, self.group, segments, chunks,
            BACKWARD=backward, **self.constants(block_v),
        )  # fmt: skip
        for state, start, end in zip(states, initial or (None, None), final, strict=True):
            size = end[0].numel()
            linear_prefix_kernel[(self.streams, triton.cdiv(size, 1024))](
                state, start, end, *self.sequence, size, *numbers, segments, chunks, CHUNK=self.chunk, BLOCK=1024,
                CAUSAL=self.causal, BACKWARD=backward,
            )  # fmt: skip
        return states, final


def forward(
    query, key, value, key_lengths, cu_seqlens, decay, initial_kv, initial_z, feature_map, causal, normalize, eps,
    scale, return_state,
):  # fmt: skip
    """(out, kv, z, denominator): see the operator's schema."""
    if feature_map == SOFTMAX:
        query, key, feature_map = torch.softmax(query, -1), torch.softmax(key, -1), IDENTITY
    problem = Problem(query, key, value, key_lengths, cu_seqlens, decay, feature_map, causal)
    out = in_order_of(query, value.shape[-1])
    denominator = query.new_empty(denominator_shape(query), dtype=torch.float32)
    shapes = state_shapes(query, value, cu_seqlens) if return_state else ((0,), (0,))
    kv, z = (query.new_empty(shape, dtype=torch.float32) for shape in shapes)
    if problem.streams == 0:
        return out, kv, z, denominator
    initial = None if initial_kv is None else (initial_kv, initial_z)
    block_v = problem.block(problem.dim, problem.dim_v)
    blocks_v = triton.cdiv(problem.dim_v, block_v)
    segments, chunks = problem.cut(problem.positions if causal else problem.rows_k, blocks_v)
    with launch_context(query):
        start, final = initial or (None, None), (kv, z) if return_state else (None, None)
        if not causal or segments > 1:
            states, whole = problem.sums(key, value, None, None, initial, segments, chunks, backward=False)
            start = states if causal else whole
        if not causal:
            segments, chunks = problem.cut(problem.rows_q, blocks_v)
            for result, state in zip((kv, z), whole, strict=True):
                if return_state:
                    result.copy_(state.view_as(result))
            final = None, None
        linear_walk_kernel[(problem.streams * segments, blocks_v)](
            view(query), view(key), view(value), None, view(out), denominator, *start, *final, *problem.sequence, scale,
            eps, problem.rows_q, problem.rows_k, problem.heads, problem.group, segments, chunks, NORMALIZE=normalize,
            BACKWARD=False, **problem.constants(block_v),
        )  # fmt: skip
    return out, kv, z, denominator
