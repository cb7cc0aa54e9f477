"""Linear attention in Triton, backward: g_i = scale dO_i / den_i, h_i = -scale (dO_i·O_i) / den_i, 0 if not normalised,

    dφ(q_i) = Σ_j w_ij (g_i·v_j + h_i) φ(k_j)
    dφ(k_j) = Σ_i w_ij (g_i·v_j + h_i) φ(q_i)
    dv_j    = Σ_i w_ij (φ(q_i)·φ(k_j)) g_i

The first two are one kernel, which carries the transposed state [DV, BLOCK_D] along the sequence for queries and
against it for keys; the last is the forward's walk, backward. Each owns a head, a segment, and a block of the channels
that it writes. States are recomputed in float32; nothing per chunk is kept. Gradients of key and value are written by
query head and summed over the group after. The decay's gradient carries M = dS / d log(decay) as well, over a whole
sequence. No float atomics: the same call gives the same bits.
"""

import torch
import triton
import triton.language as tl

from ..ops.attention_operator import in_order_of
from .attention_scores import base_of, view
from .common import block_width, dot, launch_context
from .linear_attention import (
    IDENTITY,
    NUMBERS,
    SOFTMAX,
    Problem,
    first_chunk,
    linear_walk_kernel,
    load_phi,
    load_rows,
    load_vector,
    rate_of,
    shape_of,
    state_product,
    store_rows,
    time_of,
    weights_of,
)


@triton.jit
def phi_derivative(x, MAP: tl.constexpr):
    x = x.to(tl.float32)
    if MAP == 1:
        return tl.where(x > 0, 1.0, tl.exp(tl.minimum(x, 0.0)))
    elif MAP == 2:
        return tl.where(x > 0, 1.0, 0.0)
    elif MAP == 3:
        return 2.0 * tl.maximum(x, 0.0)
    elif MAP == 4:
        return tl.exp(x)
    else:
        return tl.full(x.shape, 1.0, tl.float32)


@triton.jit
def transposed_state(
    kv, slot, first_d, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr
):
    """[BLOCK_V, BLOCK_D] of a state (.., D, DV)."""
    rows, columns = tl.arange(0, BLOCK_V), first_d + tl.arange(0, BLOCK_D)
    pointers = kv + slot.to(tl.int64) * (D * DV) + columns[None, :] * DV + rows[:, None]
    return tl.load(pointers, mask=(rows < DV)[:, None] & (columns < D)[None, :], other=0.0)


@triton.jit(do_not_specialize=NUMBERS)
def linear_feature_gradient_kernel(
    query, key, value, grad_out, grad_scale, row_grad, out, start_kv, start_z, grad_final_kv, grad_final_z, decay_sums,
    cu_seqlens, key_lengths, decay, rows_q, rows_k, heads, group, segments, chunks,
    D: tl.constexpr, DV: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    MAP: tl.constexpr, CAUSAL: tl.constexpr, OF_KEY: tl.constexpr, DECAY_GRADIENT: tl.constexpr,
):  # fmt: skip
    """Gradient of query, walking forward, or (OF_KEY) of key, walking backward, for BLOCK_D channels."""
    stream, segment = tl.program_id(0) // segments, tl.program_id(0) % segments
    first_d = tl.program_id(1) * BLOCK_D
    batch, head = stream // heads, stream % heads
    first, length_q, limit, shift = shape_of(batch, cu_seqlens, key_lengths, rows_q, rows_k)
    query_base, grad_base = base_of(query, batch, head, first), base_of(grad_out, batch, head, first)
    key_base, value_base = base_of(key, batch, head // group, first), base_of(value, batch, head // group, first)
    out_base = base_of(out, batch, head, first)
    vectors = stream.to(tl.int64) * rows_q if cu_seqlens is None else head.to(tl.int64) * rows_q + first
    rate = rate_of(decay, head)
    channels = first_d + tl.arange(0, BLOCK_D)
    state, total = tl.zeros([BLOCK_V, BLOCK_D], tl.float32), tl.zeros([BLOCK_D], tl.float32)
    if start_kv is not None:
        slot = tl.program_id(0) if CAUSAL else stream
        state = transposed_state(start_kv, slot, first_d, D, DV, BLOCK_D, BLOCK_V)
        total = tl.load(start_z + slot.to(tl.int64) * D + channels, mask=channels < D, other=0.0)
    moment, moment_z = tl.zeros([BLOCK_V, BLOCK_D], tl.float32), tl.zeros([BLOCK_D], tl.float32)
    decay_sum = 0.0
    dtype = query_base.dtype.element_ty
    start = (first_chunk(shift, CHUNK) if CAUSAL else 0) + segment * chunks
    for step in range(chunks):
        chunk = start + (chunks - 1 - step if OF_KEY else step)
        positions = chunk * CHUNK + tl.arange(0, CHUNK)
        queries = positions - shift if CAUSAL else positions
        is_key = (positions >= 0) & (positions < limit)
        is_query = (queries >= 0) & (queries < length_q)
        now, later = time_of(chunk, limit, CHUNK), time_of(chunk + 1, limit, CHUNK)
        to_state, from_state, keep = weights_of(positions, rate, now, later)
        to_state, from_state = tl.where(is_key, to_state, 0.0), tl.where(is_query, from_state, 0.0)
        if CAUSAL or not OF_KEY:
            grad = load_rows(grad_out, grad_base, queries, is_query, 0, DV, BLOCK_V)
            grad = (grad * load_vector(grad_scale + vectors, queries, is_query)[:, None]).to(dtype)
            bias = load_vector(row_grad + vectors, queries, is_query)
        if CAUSAL or OF_KEY:
            tile_v = load_rows(value, value_base, positions, is_key, 0, DV, BLOCK_V)
        if OF_KEY:
            a, a_weight, a_bias = tile_v, to_state, is_key.to(tl.float32)
        else:
            a, a_weight, a_bias = grad, from_state, bias
        weighted = (a * a_weight[:, None]).to(dtype) if decay is not None else a
        a_bias_weighted = a_bias * a_weight if decay is not None else a_bias
        grad_phi = state_product(weighted, state) + a_bias_weighted[:, None] * total[None, :]
        if DECAY_GRADIENT:
            phi_q = load_phi(query, query_base, queries, is_query, first_d, D, BLOCK_D, MAP)
            by_state = tl.sum(phi_q * grad_phi, 1) * (positions + 1 - now).to(tl.float32)
            by_moment = state_product(weighted, moment) + a_bias_weighted[:, None] * moment_z[None, :]
            decay_sum += tl.sum(by_state + tl.sum(phi_q * by_moment, 1))
        if CAUSAL:
            if OF_KEY:
                phi_b = load_phi(query, query_base, queries, is_query, first_d, D, BLOCK_D, MAP)
                b, b_weight, b_bias = grad, from_state, bias
                distance = positions[None, :] - positions[:, None]
            else:
                phi_b = load_phi(key, key_base, positions, is_key, first_d, D, BLOCK_D, MAP)
                b, b_weight, b_bias = tile_v, to_state, is_key.to(tl.float32)
                distance = positions[:, None] - positions[None, :]
            scores = dot(a, tl.trans(b)) + a_bias[:, None] * b_bias[None, :]
            if decay is not None:
                scores *= tl.exp2(rate * tl.maximum(distance, 0).to(tl.float32))
            scores = tl.where(distance >= 0, scores, 0.0)
            grad_phi = dot(scores.to(dtype), phi_b.to(dtype), grad_phi)
            if DECAY_GRADIENT:
                products = dot(phi_q.to(dtype), tl.trans(phi_b.to(dtype)))
                decay_sum += tl.sum(scores * products * tl.maximum(distance, 0).to(tl.float32))
                elapsed = (later - now).to(tl.float32)
                age = b_weight * tl.maximum(later - 1 - positions, 0).to(tl.float32)
                moment = keep * (moment + elapsed * state)
                moment_z = keep * (moment_z + elapsed * total)
                moment = dot(tl.trans((b * age[:, None]).to(dtype)), phi_b.to(dtype), moment)
                moment_z += tl.sum(phi_b * age[:, None], 0)
            if decay is not None:
                b = (b * b_weight[:, None]).to(dtype)
                b_bias *= b_weight
                state *= keep
                total *= keep
            state = dot(tl.trans(b), phi_b.to(dtype), state)
            total += tl.sum(phi_b * b_bias[:, None], 0)
        if OF_KEY:
            x = load_rows(key, key_base, positions, is_key, first_d, D, BLOCK_D)
            inside = (positions >= 0) & (positions < (length_q if cu_seqlens is not None else rows_k))
            grad_phi = tl.where(is_key[:, None], grad_phi * phi_derivative(x, MAP), 0.0)
            store_rows(out, out_base, positions, inside, first_d, grad_phi, D, BLOCK_D)
        else:
            x = load_rows(query, query_base, queries, is_query, first_d, D, BLOCK_D)
            store_rows(out, out_base, queries, is_query, first_d, grad_phi * phi_derivative(x, MAP), D, BLOCK_D)
    if DECAY_GRADIENT:
        if grad_final_kv is not None:
            final = transposed_state(grad_final_kv, stream, first_d, D, DV, BLOCK_D, BLOCK_V)
            final_z = tl.load(grad_final_z + stream.to(tl.int64) * D + channels, mask=channels < D, other=0.0)
            decay_sum += tl.sum(final * moment) + tl.sum(final_z * moment_z)
        tl.store(decay_sums + tl.program_id(1) * (tl.num_programs(0)) + stream, decay_sum)


def _softmax_gradient(phi_x, grad):
    phi_x, wide = phi_x.float(), grad.float()
    return (phi_x * (wide - (phi_x * wide).sum(-1, keepdim=True))).to(grad.dtype)


def backward(
    grad_out, grad_kv, grad_z, query, key, value, out, denominator, key_lengths, cu_seqlens, decay, initial_kv,
    initial_z, feature_map, causal, normalize, eps, scale, need_decay, need_state,
):  # fmt: skip
    """Gradients of query, key, value, decay, initial kv and z: see the operator's schema."""
    softmax = feature_map == SOFTMAX
    if softmax:
        query, key, feature_map = torch.softmax(query, -1), torch.softmax(key, -1), IDENTITY
    problem = Problem(query, key, value, key_lengths, cu_seqlens, decay, feature_map, causal)
    dim, dim_v, heads = problem.dim, problem.dim_v, problem.heads
    d_query = in_order_of(query, dim)
    per_head = (*key.shape[:1], heads, *key.shape[2:3]) if not problem.packed else (key.shape[0], heads)
    whole_group = problem.group > 1
    wide = torch.float32 if whole_group else query.dtype
    d_key, d_value = (
        key.new_zeros(*per_head, n, dtype=wide) if whole_group or key_lengths is not None else in_order_of(like, n)
        for like, n in ((key, dim), (value, dim_v))
    )
    d_decay = query.new_zeros(decay.shape if need_decay else (0,), dtype=torch.float32)
    initial_shape = (problem.batch, heads, dim) if need_state else None
    d_kv = query.new_zeros((*initial_shape, dim_v) if need_state else (0,), dtype=torch.float32)
    d_z = query.new_zeros(initial_shape if need_state else (0,), dtype=torch.float32)
    if problem.streams > 0:
        empty = denominator == 0
        grad_scale = torch.where(empty, 0.0, scale / denominator.masked_fill(empty, 1.0))
        row_dots = (grad_out.float() * out.float()).sum(-1)
        row_grad = -(row_dots.T if problem.packed else row_dots) * grad_scale * float(normalize)
        row_grad = row_grad.contiguous()
        initial = None if initial_kv is None else (initial_kv, initial_z)
        final = None if grad_kv is None else (grad_kv.contiguous(), grad_z.contiguous())
        with launch_context(query):
            sums = _gradients(
                problem, query, key, value, grad_out, grad_scale, row_grad, initial, final, d_query, d_key, d_value,
                need_decay,
            )  # fmt: skip
        if need_decay:
            d_decay = sums[0].view(problem.batch, heads).sum(0) / decay
        if need_state:
            d_kv, d_z = (state.view(like.shape) for state, like in zip(sums[1], (d_kv, d_z), strict=True))
    if whole_group:
        d_key, d_value = (
            g.unflatten(1, (key.shape[1], problem.group)).sum(2).to(query.dtype) for g in (d_key, d_value)
        )
    if softmax:
        d_query, d_key = _softmax_gradient(query, d_query), _softmax_gradient(key, d_key)
    return d_query, d_key, d_value, d_decay, d_kv, d_z


def _gradients(
    problem, query, key, value, grad_out, grad_scale, row_grad, initial, final, d_query, d_key, d_value, need_decay
):  # fmt: skip
    """Writes d_query, d_key, d_value; returns sums by sequence for the decay, and the initial states' gradient."""
    causal, dim, dim_v = problem.causal, problem.dim, problem.dim_v
    block_d, block_v = problem.block(dim_v, dim), problem.block(dim, dim_v)
    blocks_d, blocks_v = triton.cdiv(dim, block_d), triton.cdiv(dim_v, block_v)
    numbers = problem.rows_q, problem.rows_k, problem.heads, problem.group
    tensors = view(query), view(key), view(value), view(grad_out)
    features = problem.constants(block_v) | {"BLOCK_D": block_d, "BLOCK_V": block_width(dim_v)}
    features["num_stages"] = 2 if max(block_width(dim), block_width(dim_v)) <= 128 else 1

    # of query
    segments, chunks = problem.cut(problem.positions if causal else problem.rows_k, blocks_d)
    if causal and need_decay:
        segments, chunks = 1, segments * chunks
    start = initial or (None, None)
    if not causal or segments > 1:
        states, whole = problem.sums(key, value, None, None, initial, segments, chunks, backward=False)
        start = states if causal else whole
    if not causal:
        segments, chunks = problem.cut(problem.rows_q, blocks_d)
    decay_sums = (
        torch.zeros(blocks_d, problem.streams, dtype=torch.float32, device=query.device) if need_decay else None
    )
    linear_feature_gradient_kernel[(problem.streams * segments, blocks_d)](
        *tensors, grad_scale, row_grad, view(d_query), *start, *(final or (None, None)), decay_sums, *problem.sequence,
        *numbers, segments, chunks, OF_KEY=False, DECAY_GRADIENT=need_decay, **features,
    )  # fmt: skip

    # of key and value: the state of queries, from the end
    segments, chunks = problem.cut(problem.positions if causal else problem.rows_q, max(blocks_d, blocks_v))
    states, whole = problem.sums(query, grad_out, grad_scale, row_grad, final, segments, chunks, backward=True)
    start = states if causal else whole
    if not causal:
        segments, chunks = problem.cut(problem.rows_k, max(blocks_d, blocks_v))
    linear_feature_gradient_kernel[(problem.streams * segments, blocks_d)](
        *tensors, grad_scale, row_grad, view(d_key), *start, None, None, None, *problem.sequence, *numbers, segments,
        chunks, OF_KEY=True, DECAY_GRADIENT=False, **features,
    )  # fmt: skip
    linear_walk_kernel[(problem.streams * segments, blocks_v)](
        view(key), view(query), view(grad_out), grad_scale, view(d_value), None, *start, None, None, *problem.sequence,
        1.0, 0.0, *numbers, segments, chunks, NORMALIZE=False, BACKWARD=True, **problem.constants(block_v),
    )  # fmt: skip
    return decay_sums.sum(0) if need_decay else None, whole
