"""Softmax attention, backward: gradients of query, key, value, mask, slopes, biases, sinks; no atomics.

With P = exp(s - lse), kept and scaled by dropout where it applies, and delta_i = dO_i·O_i - dlse_i (O before rounding,
if the forward has saved the residual):
    dV = Pᵀ·dO,   dS = P * (dO·Vᵀ - delta),   dQ = scale · dS·K,   dK = scale · dSᵀ·Q   (soft cap: dS times 1 - tanh²)
    dmask = dS summed over the mask's broadcast axes,   dslope = -Σ dS·|p_i - j|,   dsink = -Σ exp(sink - lse)·delta
Three kernels, each recomputing the scores, each result owned by one program, so that sums have one order:
    query gradient: a program owns BLOCK_M queries and walks their visible keys. It goes first, and also writes, for the
        others, two numbers a query: lse in log2 units (+inf where P is 0: no key, or padding) and delta;
    key gradient: a program owns BLOCK_N keys and walks the queries that see them, over all heads of their GQA group;
        at large head dims dK and dV are two launches, as one program cannot hold both sums in registers;
    mask, distance and map gradients (attention_{mask,distance,decomposed}_gradient.py): only when asked for.
Global keys are a third loop of the query gradient. What they gather from the queries beside whose window they lie is
summed before the key gradient, which starts from it: a program owns a block of them and a share of the queries.
"""

import functools

import torch
import triton
import triton.language as tl

from ..ops.attention_operator import in_order_of
from .attention_decomposed_gradient import decomposed_gradient
from .attention_distance_gradient import distance_gradient
from .attention_global import gather_tile, global_columns, slots_of
from .attention_mask_gradient import mask_gradient
from .attention_scores import (
    EDGE,
    GLOBAL,
    LENGTHS,
    WHOLE,
    Problem,
    Statistics,
    base_of,
    batch_stride,
    block_at,
    block_count,
    columns_at,
    dropout_of_pass,
    head_terms,
    load_keys,
    lse_in_log2,
    place_of,
    score_gradient,
    scores,
    statistics_of,
    view,
    visible_blocks,
)
from .common import LOG2E, dot, launch_context, load_tile, row_products, store_tile

GLOBAL_SHARE = 512  # queries that one program sums over for a block of global keys


@triton.jit
def _query_gradient(
    acc, slope_sum, query, grad_out, lse, delta, lse_error, key_base, value_base, key_stride, value_stride, rows,
    blocks, length_q, key_limit, shift, scale, own, left, right, batch, stream, terms,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, SLOPE_GRADIENT: tl.constexpr, PASS: tl.constexpr,
):  # fmt: skip
    """Adds dS·K (and the slope's terms, a row each) over the blocks of keys of a pass."""
    for i in range(block_count(blocks, terms, PASS, BLOCK_N)):
        start_n, columns = columns_at(i, blocks, batch, key_limit, terms, PASS, BLOCK_N)
        key = load_keys(key_base, key_stride, start_n, columns, key_limit, HEAD_DIM, BLOCK_N, BLOCK_D, PASS)
        value = load_keys(value_base, value_stride, start_n, columns, key_limit, HEAD_DIM_V, BLOCK_N, BLOCK_DV, PASS)
        s, bent = scores(
            row_products(query, key), rows[:, None], columns[None, :], length_q, key_limit, shift, scale, own, left,
            right, terms, PASS,
        )  # fmt: skip
        weights = tl.exp2(s - lse[:, None] - lse_error[:, None])  # [BLOCK_M, BLOCK_N]
        grad_weights = row_products(grad_out, value)
        if terms.dropout_seed is not None:
            grad_weights = dropout_of_pass(grad_weights, rows, columns, start_n, stream, terms, BLOCK_N, False, PASS)
            grad_weights *= terms.dropout_scale
        grad_scores = weights * (grad_weights - delta[:, None])
        if SLOPE_GRADIENT:
            distance = tl.abs(rows[:, None] + shift - columns[None, :]).to(tl.float32)
            slope_sum -= tl.sum(grad_scores * distance, 1)
        grad_scores = score_gradient(grad_scores, bent, terms)
        acc = dot(grad_scores.to(key.dtype), key, acc)
    return acc, slope_sum


@triton.jit(do_not_specialize=LENGTHS)
def attention_query_gradient_kernel(
    grad_out, grad_lse_ptr, query, key, value, out, residual, lse_ptr, statistics, grad_query, slope_parts, sink_parts,
    terms, heads, group, rows_q, rows_k, max_rows_q, scale, output_scale, window_left, window_right,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, TOP_LEFT: tl.constexpr,
):  # fmt: skip
    blocks_m = tl.cdiv(max_rows_q, BLOCK_M)
    stream = tl.program_id(0) // blocks_m
    block = blocks_m - 1 - tl.program_id(0) % blocks_m
    start_m = block * BLOCK_M
    batch, head, first_q, length_q, first_k, _, key_limit, shift = place_of(
        stream, heads, rows_q, rows_k, terms, TOP_LEFT
    )
    if start_m >= length_q:
        return

    kv_head = head // group
    query_base = base_of(query, batch, head, first_q)
    key_base = base_of(key, batch, kv_head, first_k)
    value_base = base_of(value, batch, kv_head, first_k)
    out_base = base_of(out, batch, head, first_q)
    grad_out_base = base_of(grad_out, batch, head, first_q)
    grad_base = base_of(grad_query, batch, head, first_q)
    lse_offset = (stream if terms.cu_seqlens_q is None else head).to(tl.int64) * rows_q + first_q
    own = head_terms(terms, batch, head)

    rows = start_m + tl.arange(0, BLOCK_M)
    last = tl.minimum(start_m + BLOCK_M, length_q) - 1
    grad_out_tile = load_tile(
        grad_out_base, grad_out.strides[2], start_m, length_q, HEAD_DIM_V, BLOCK_M, BLOCK_DV, True
    )
    out_tile = load_tile(out_base, out.strides[2], start_m, length_q, HEAD_DIM_V, BLOCK_M, BLOCK_DV, True)
    out_tile = out_tile.to(tl.float32)
    if residual is not None:
        residual_base = base_of(residual, batch, head, first_q)
        out_tile += load_tile(
            residual_base, residual.strides[2], start_m, length_q, HEAD_DIM_V, BLOCK_M, BLOCK_DV, True
        ).to(tl.float32)
    delta = tl.sum(grad_out_tile.to(tl.float32) * out_tile, 1)
    if grad_lse_ptr is not None:
        delta -= tl.load(grad_lse_ptr + lse_offset + rows, mask=rows < length_q, other=0.0)
    lse = lse_in_log2(tl.load(lse_ptr + lse_offset + rows, mask=rows < length_q, other=float("-inf")))
    streams = tl.num_programs(0) // blocks_m if terms.cu_seqlens_q is None else heads
    error_offset = lse_offset + streams.to(tl.int64) * rows_q
    lse_error = tl.load(lse_ptr + error_offset + rows, mask=rows < length_q, other=0.0)
    statistics_base = statistics_of(statistics, batch, head, stream, first_q, terms)
    tl.store(statistics_base + rows, lse)
    tl.store(statistics_base + statistics.delta + rows, delta)
    tl.store(statistics_base + 2 * statistics.delta + rows, lse_error)
    part = stream.to(tl.int64) * blocks_m + block
    if sink_parts is not None:
        sink_share = tl.exp2(tl.load(terms.sinks + head) * LOG2E - lse - lse_error)
        tl.store(sink_parts + part, -tl.sum(sink_share * delta, 0))

    query_tile = load_tile(query_base, query.strides[2], start_m, length_q, HEAD_DIM, BLOCK_M, BLOCK_D, True)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    slope_sum = tl.zeros([BLOCK_M], tl.float32)
    SLOPE_GRADIENT: tl.constexpr = slope_parts is not None
    blocks = visible_blocks(start_m, last, shift, key_limit, window_left, window_right, BLOCK_N)
    for PASS in tl.static_range(2 if terms.global_keys is None else 3):
        acc, slope_sum = _query_gradient(
            acc, slope_sum, query_tile, grad_out_tile, lse, delta, lse_error, key_base, value_base, key.strides[2],
            value.strides[2], rows, blocks, length_q, key_limit, shift, scale, own, window_left, window_right,
            batch, stream, terms, HEAD_DIM, HEAD_DIM_V, BLOCK_N, BLOCK_D, BLOCK_DV, SLOPE_GRADIENT, PASS,
        )  # fmt: skip
    store_tile(grad_base, grad_query.strides[2], start_m, length_q, acc * output_scale, HEAD_DIM, BLOCK_M, BLOCK_D)
    if SLOPE_GRADIENT:
        tl.store(slope_parts + part, tl.sum(slope_sum, 0))


@triton.jit
def _key_gradient(
    grad_key, grad_value, key, value, query, grad_out, statistics, columns, start_n, blocks, batch, kv_head, heads,
    group, first_q, length_q, key_limit, shift, scale, left, right, terms,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, PASS: tl.constexpr,
):  # fmt: skip
    """Adds dSᵀ·Q (KEY) and Pᵀ·dO (VALUE) over the query blocks of the group that see all of the keys, or (EDGE) some.

    With global keys, whole blocks of queries are those of `blocks` and are not seen whole. One flat loop over heads and
    blocks: nested ones keep the addresses of every loop in registers at once.
    """
    count = blocks[5] if PASS == EDGE else blocks[1]
    for step in range(group * count):
        head = kv_head * group + step // tl.maximum(count, 1)
        start_m = block_at(step % tl.maximum(count, 1), blocks, PASS) * BLOCK_M
        stream = batch * heads + head
        rows = start_m + tl.arange(0, BLOCK_M)
        query_base = base_of(query, batch, head, first_q)
        grad_out_base = base_of(grad_out, batch, head, first_q)
        CHECK: tl.constexpr = PASS != WHOLE
        query_tile = load_tile(query_base, query.strides[2], start_m, length_q, HEAD_DIM, BLOCK_M, BLOCK_D, CHECK)
        grad_out_tile = load_tile(
            grad_out_base, grad_out.strides[2], start_m, length_q, HEAD_DIM_V, BLOCK_M, BLOCK_DV, CHECK
        )
        lse_base = statistics_of(statistics, batch, head, stream, first_q, terms) + start_m
        lse = tl.load(lse_base + tl.arange(0, BLOCK_M))
        delta = tl.load(lse_base + statistics.delta + tl.arange(0, BLOCK_M)) if KEY else lse
        lse_error = tl.load(lse_base + 2 * statistics.delta + tl.arange(0, BLOCK_M))
        own = head_terms(terms, batch, head)
        s, bent = scores(
            row_products(key, query_tile), rows[None, :], columns[:, None], length_q, key_limit, shift, scale, own,
            left, right, terms, PASS,
        )  # fmt: skip
        weights = tl.exp2(s - lse[None, :] - lse_error[None, :])  # [BLOCK_N, BLOCK_M]
        if VALUE:
            kept = dropout_of_pass(weights, rows, columns, start_n, stream, terms, BLOCK_N, True, PASS)
            grad_value = dot(kept.to(grad_out_tile.dtype), grad_out_tile, grad_value)
        if KEY:
            grad_weights = row_products(value, grad_out_tile)
            if terms.dropout_seed is not None:
                grad_weights = dropout_of_pass(grad_weights, rows, columns, start_n, stream, terms, BLOCK_N, True, PASS)
                grad_weights *= terms.dropout_scale
            grad_scores = score_gradient(weights * (grad_weights - delta[None, :]), bent, terms)
            grad_key = dot(grad_scores.to(query_tile.dtype), query_tile, grad_key)
    return grad_key, grad_value


@triton.jit(do_not_specialize=LENGTHS)
def attention_key_gradient_kernel(
    grad_out, query, key, value, statistics, grad_key, grad_value, global_key, global_value, terms, heads, group,
    rows_q, rows_k, max_rows_k, scale, output_scale, window_left, window_right,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, TOP_LEFT: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    blocks_n = tl.cdiv(max_rows_k, BLOCK_N)
    start_n = (tl.program_id(0) % blocks_n) * BLOCK_N
    batch, kv_head, first_q, length_q, first_k, length_k, key_limit, shift = place_of(
        tl.program_id(0) // blocks_n, heads // group, rows_q, rows_k, terms, TOP_LEFT
    )
    if start_n >= length_k:
        return

    key_base = base_of(key, batch, kv_head, first_k)
    value_base = base_of(value, batch, kv_head, first_k)
    grad_key_base = base_of(grad_key, batch, kv_head, first_k)
    grad_value_base = base_of(grad_value, batch, kv_head, first_k)
    columns = start_n + tl.arange(0, BLOCK_N)
    key_acc, value_acc = 0.0, 0.0
    if KEY:
        key_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if VALUE:
        value_acc = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    if terms.global_slots is not None:
        slots = terms.global_slots + batch.to(tl.int64) * terms.slots_stride + columns
        slots = tl.load(slots, mask=columns < key_limit, other=-1)
        if KEY:
            global_base = base_of(global_key, batch, kv_head, 0)
            key_acc = gather_tile(global_base, global_key.strides[2], slots, slots >= 0, HEAD_DIM, BLOCK_D)
        if VALUE:
            global_base = base_of(global_value, batch, kv_head, 0)
            value_acc = gather_tile(global_base, global_value.strides[2], slots, slots >= 0, HEAD_DIM_V, BLOCK_DV)
    key_tile = load_tile(key_base, key.strides[2], start_n, key_limit, HEAD_DIM, BLOCK_N, BLOCK_D, True)
    value_tile = load_tile(value_base, value.strides[2], start_n, key_limit, HEAD_DIM_V, BLOCK_N, BLOCK_DV, True)
    last = tl.minimum(start_n + BLOCK_N, key_limit) - 1
    query_limit = tl.where(start_n < key_limit, length_q, 0)
    blocks = visible_blocks(start_n, last, -shift, query_limit, window_right, window_left, BLOCK_M)
    for PASS in tl.static_range(2):
        key_acc, value_acc = _key_gradient(
            key_acc, value_acc, key_tile, value_tile, query, grad_out, statistics, columns, start_n, blocks, batch,
            kv_head, heads, group, first_q, length_q, key_limit, shift, scale, window_left, window_right, terms,
            HEAD_DIM, HEAD_DIM_V, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, KEY, VALUE, PASS,
        )  # fmt: skip
    read = (columns < key_limit)[:, None]  # what padding keys gathered is thrown away
    if KEY:
        key_acc = tl.where(read, key_acc * output_scale, 0.0)
        store_tile(grad_key_base, grad_key.strides[2], start_n, length_k, key_acc, HEAD_DIM, BLOCK_N, BLOCK_D)
    if VALUE:
        value_acc = tl.where(read, value_acc * terms.dropout_scale, 0.0)
        store_tile(grad_value_base, grad_value.strides[2], start_n, length_k, value_acc, HEAD_DIM_V, BLOCK_N, BLOCK_DV)


@triton.jit(do_not_specialize=LENGTHS)
def attention_global_key_gradient_kernel(
    grad_out, query, key, value, statistics, grad_key, grad_value, terms, heads, group, rows_q, rows_k, scale,
    window_left, window_right,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, TOP_LEFT: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    SHARE: tl.constexpr,
):  # fmt: skip
    """A block of global keys and a share of the queries. grad_key, grad_value: (batch, head, share, place, dim)."""
    blocks_n, shares = tl.cdiv(terms.global_count, BLOCK_N), tl.cdiv(rows_q, SHARE)
    block, rest = tl.program_id(0) % blocks_n, tl.program_id(0) // blocks_n
    share, stream_kv = rest % shares, rest // shares
    batch, kv_head, first_q, length_q, _, _, key_limit, shift = place_of(
        stream_kv, heads // group, rows_q, rows_k, terms, TOP_LEFT
    )
    columns = global_columns(block, batch, key_limit, terms, BLOCK_N)
    there = columns < key_limit
    key_base = base_of(key, batch, kv_head, 0)
    value_base = base_of(value, batch, kv_head, 0)
    key_tile = gather_tile(key_base, key.strides[2], columns, there, HEAD_DIM, BLOCK_D)
    value_tile = gather_tile(value_base, value.strides[2], columns, there, HEAD_DIM_V, BLOCK_DV)
    key_acc, value_acc = 0.0, 0.0
    if KEY:
        key_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if VALUE:
        value_acc = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    first = share * SHARE // BLOCK_M
    blocks = first, tl.cdiv(tl.minimum((share + 1) * SHARE, rows_q), BLOCK_M) - first, 0, 0, 0, 0
    key_acc, value_acc = _key_gradient(
        key_acc, value_acc, key_tile, value_tile, query, grad_out, statistics, columns, 0, blocks, batch,
        kv_head, heads, group, first_q, length_q, key_limit, shift, scale, window_left, window_right, terms,
        HEAD_DIM, HEAD_DIM_V, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, KEY, VALUE, GLOBAL,
    )  # fmt: skip
    row = (stream_kv * shares + share).to(tl.int64) * terms.global_count
    if KEY:
        base = grad_key + row * HEAD_DIM
        store_tile(base, HEAD_DIM, block * BLOCK_N, terms.global_count, key_acc, HEAD_DIM, BLOCK_N, BLOCK_D)
    if VALUE:
        base = grad_value + row * HEAD_DIM_V
        store_tile(base, HEAD_DIM_V, block * BLOCK_N, terms.global_count, value_acc, HEAD_DIM_V, BLOCK_N, BLOCK_DV)


def global_key_gradients(problem, views, statistics):
    """What the global keys and values gather beside the windows, float32 (B, Hkv, G, D) and (B, Hkv, G, Dv)."""
    shares, terms = triton.cdiv(problem.rows_q, GLOBAL_SHARE), problem.terms
    shape = problem.batch, problem.heads_kv, shares, terms.global_count
    dims = problem.head_dim, problem.head_dim_v
    parts = [torch.empty((*shape, d), dtype=torch.float32, device=problem.device) for d in dims]
    for tile, which in problem.key_gradient_tiles():
        blocks = triton.cdiv(terms.global_count, tile.block_n)
        attention_global_key_gradient_kernel[(blocks * shares * problem.batch * problem.heads_kv,)](
            *views, statistics, *parts, terms, problem.heads, problem.group, problem.rows_q, problem.rows_k,
            problem.score_scale, problem.window_left, problem.window_right, SHARE=GLOBAL_SHARE,
            **problem.constants(tile), **which,
        )  # fmt: skip
    return [part.sum(2) for part in parts]


def backward(grad_out, grad_lse, query, key, value, out, lse, residual, *options):
    """Gradients of query, key, value, mask, ALiBi slopes, bias of distance, sinks, rel_h, rel_w: see the schema."""
    *options, need_mask_grad, need_alibi_grad, need_distance_grad, need_sinks_grad, need_decomposed_grad = options
    mask, alibi_slopes, distance_bias, sinks, packed = options[0], *options[4:7], options[2] is not None
    rel_h, rel_w = options[9:11]
    problem = Problem(query, key, value, *options)
    unneeded = query.new_empty(0, dtype=torch.float32)
    grads = [in_order_of(t, t.shape[-1]) for t in (query, key, value)]
    if query.numel() == 0:
        learned = mask, alibi_slopes, distance_bias, sinks, rel_h, rel_w
        needs = need_mask_grad, need_alibi_grad, need_distance_grad, need_sinks_grad, *(need_decomposed_grad,) * 2
        for t, need in zip(learned, needs, strict=True):
            grads.append(t.new_empty(t.shape) if need else unneeded)
        return tuple(grad.zero_() for grad in grads)

    tile = problem.tile("grad_query")
    blocks = triton.cdiv(problem.max_rows_q, tile.block_m)
    rows = problem.rows_q + problem.batch * tile.block_m if packed else blocks * tile.block_m
    streams = problem.heads if packed else problem.batch * problem.heads
    workspace = query.new_empty((3, streams, rows), dtype=torch.float32)
    statistics = Statistics(workspace, streams * rows, rows, tile.block_m)
    # One part a program; a block past the end of its packed sequence writes none.
    allocate = functools.partial(query.new_zeros if packed else query.new_empty, dtype=torch.float32)
    slope_parts = allocate((problem.batch, problem.heads, blocks)) if need_alibi_grad else None
    sink_parts = allocate((problem.batch, problem.heads, blocks)) if need_sinks_grad else None
    views = [view(t) for t in (grad_out, query, key, value)]
    sizes = problem.heads, problem.group, problem.rows_q, problem.rows_k
    numbers = problem.score_scale, problem.scale, problem.window_left, problem.window_right
    of_globals = None, None
    with launch_context(query):
        attention_query_gradient_kernel[(blocks * problem.batch * problem.heads,)](
            views[0], None if grad_lse is None else grad_lse.float().contiguous(), *views[1:], view(out),
            view(residual) if residual.numel() else None, lse.contiguous(), statistics, view(grads[0]), slope_parts,
            sink_parts, problem.terms, *sizes, problem.max_rows_q, *numbers, **problem.constants(tile),
        )  # fmt: skip
        if problem.terms.global_keys is not None:
            slots = slots_of(problem.terms.global_keys, problem.rows_k)
            problem.terms = problem.terms._replace(global_slots=slots, slots_stride=batch_stride(slots))
            of_globals = [view(t) for t in global_key_gradients(problem, views, statistics)]
        if problem.rows_k > 0:
            for tile, which in problem.key_gradient_tiles():
                blocks = triton.cdiv(problem.max_rows_k, tile.block_n)
                attention_key_gradient_kernel[(blocks * problem.batch * problem.heads_kv,)](
                    *views, statistics, view(grads[1]), view(grads[2]), *of_globals, problem.terms, *sizes,
                    problem.max_rows_k, *numbers, **problem.constants(tile), **which,
                )  # fmt: skip
        grads.append(mask_gradient(problem, mask, views, statistics) if need_mask_grad else unneeded)
        of_distance = distance_gradient(problem, distance_bias, views, statistics) if need_distance_grad else unneeded
        of_map = unneeded, unneeded
        if need_decomposed_grad:
            of_map = decomposed_gradient(problem, rel_h, rel_w, views, statistics)
    if need_alibi_grad:
        per_batch = slope_parts.sum(-1)
        grads.append((per_batch if alibi_slopes.dim() == 2 else per_batch.sum(0)).to(alibi_slopes.dtype))
    else:
        grads.append(unneeded)
    grads.append(of_distance)
    grads.append(sink_parts.sum((0, 2)).to(sinks.dtype) if need_sinks_grad else unneeded)
    return *grads, *of_map
