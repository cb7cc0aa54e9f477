"""The naive formulas: plain torch, float64-clean, differentiable, one short function an op.

They are the truth that tests and benchmarks share, and the backend that runs where no kernel does. They materialise
every score. Half inputs multiply in their own dtype and take the softmax in float32, as eager models do.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference_linear import linear_attention, linear_attention_recurrent  # noqa: F401


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask=None,
    causal=False,
    window=None,
    global_keys=None,
    key_lengths=None,
    rope=None,
    alibi_slopes=None,
    relative_bias=None,
    decomposed_bias=None,
    sinks=None,
    scale=None,
    softcap=None,
    dropout_p=0.0,
    return_lse=False,
    dropout_seed=None,
    first_batch=0,
):
    """softmax(rope(Q) rope(K)^T · scale + biases, masked) · V, with the arguments of `xformer_fast.attention`.

    `dropout_seed`: one-element int64 tensor, drawn from torch's generator if None. `first_batch`: the batch index of
    element 0 in the dropout stream (varlen counts its sequences with it).
    """
    (_, heads, len_q, dim), (kv_heads, len_k) = query.shape, key.shape[1:3]
    top_left = causal == "top_left"
    p, j = key_positions_of_queries(len_q, len_k, top_left, query.device), torch.arange(len_k, device=query.device)
    if rope is not None:
        reach = reach_before_keys(causal, window, global_keys)
        query, key = rope.rotate(query, key, top_left=top_left, reach=reach, backend="reference")
    keep = torch.ones(len_q, len_k, dtype=torch.bool, device=query.device)
    left, right = (-1, -1) if window is None else window
    if left >= 0:
        keep = keep & (j >= p - left)
    if right >= 0:
        keep = keep & (j <= p + right)
    if global_keys is not None:
        keep = keep | is_global(global_keys, len_k, query.device)
    if causal:
        keep = keep & (j <= p)
    if key_lengths is not None:
        inside = (j < key_lengths.to(query.device)[:, None])[:, None]  # (B, 1, Sk)
        keep = keep & inside[:, None]
        key, value = (t.masked_fill(~inside[..., None], 0) for t in (key, value))  # padding may hold NaN

    group = heads // kv_heads
    scores = query.unflatten(1, (kv_heads, group)) @ key[:, :, None].mT  # (B, Hkv, group, Sq, Sk)
    scores = scores.flatten(1, 2).to(torch.promote_types(query.dtype, torch.float32))
    scores = scores * (dim**-0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes[..., None, None].to(scores.dtype) * (p - j).abs()
    if relative_bias is not None:
        values = relative_bias.values_for(len_q, len_k, top_left=top_left)
        scores = scores + distance_matrix(values, len_q, len_k).to(scores.dtype)
    if decomposed_bias is not None:
        rel_h, rel_w = (rel.to(scores.dtype) for rel in decomposed_bias)
        scores = scores + (rel_h[..., :, None] + rel_w[..., None, :]).flatten(-2)
    if mask is not None and mask.dtype == torch.bool:
        keep = keep & mask
    elif mask is not None:
        scores = scores + mask.to(scores.dtype)
    scores = scores.masked_fill(~keep, float("-inf"))

    sink = None if sinks is None else sinks.to(scores.dtype)[:, None]  # (Hq, 1)
    top = scores.detach().amax(-1) if len_k else torch.full_like(scores.sum(-1), float("-inf"))
    if sink is not None:
        top = torch.maximum(top, sink.detach())
    top = top.masked_fill(top == float("-inf"), 0.0)
    weights = torch.exp(scores - top[..., None])
    denominator = weights.sum(-1)
    if sink is not None:
        denominator = denominator + torch.exp(sink - top)
    empty = denominator == 0
    denominator = denominator.masked_fill(empty, 1.0)
    lse = (top + denominator.log()).masked_fill(empty, float("-inf"))
    weights = weights / denominator[..., None]
    if dropout_p > 0:
        seed = draw_seed(query.device) if dropout_seed is None else dropout_seed
        kept = dropout_mask(seed, dropout_p, query.shape[0], heads, len_q, len_k, first_batch=first_batch)
        weights = weights * kept / (1.0 - dropout_p)
    out = weights.to(value.dtype).unflatten(1, (kv_heads, group)) @ value[:, :, None]
    return (out.flatten(1, 2), lse) if return_lse else out.flatten(1, 2)


def varlen_attention(query, key, value, cu_seqlens_q, cu_seqlens_k, *, alibi_slopes=None, key_lengths=None, **options):
    """`attention` of each packed sequence on its own: query (T, Hq, D), cu_seqlens (B + 1). lse is (Hq, T)."""
    return_lse = options.pop("return_lse", False)
    seed = options.pop("dropout_seed", None)
    if options.get("dropout_p", 0.0) > 0 and seed is None:
        seed = draw_seed(query.device)
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    outs, lses = [query.new_empty(0, query.shape[1], value.shape[2])], []
    for b in range(len(starts_q) - 1):
        q = query[starts_q[b] : starts_q[b + 1]]
        k, v = (t[starts_k[b] : starts_k[b + 1]] for t in (key, value))
        out, lse = attention(
            *(t.transpose(0, 1)[None] for t in (q, k, v)),
            key_lengths=None if key_lengths is None else key_lengths[b : b + 1],
            alibi_slopes=alibi_slopes if alibi_slopes is None or alibi_slopes.dim() == 1 else alibi_slopes[b],
            return_lse=True,
            dropout_seed=seed,
            first_batch=b,
            **options,
        )
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    out = torch.cat(outs)
    lse_dtype = torch.promote_types(query.dtype, torch.float32)
    lse = torch.cat(lses, 1) if lses else query.new_empty(query.shape[1], 0, dtype=lse_dtype)
    return (out, lse) if return_lse else out


def decode_attention(
    query,
    key_cache,
    value_cache,
    cache_lengths,
    *,
    new_key=None,
    new_value=None,
    block_table=None,
    rope=None,
    alibi_slopes=None,
    relative_bias=None,
    return_lse=False,
    **options,
):
    """`attention` of each sequence over its own cached keys, with the arguments of `xformer_fast.decode_attention`."""
    tokens, capacity = query.shape[2], key_cache.shape[2] * (1 if block_table is None else block_table.shape[1])
    appended = 0 if new_key is None else tokens
    if rope is not None:
        query, new_key = rope.rotate_tokens(query, new_key, cache_lengths + (appended - tokens), backend="reference")
    if appended:
        kv_cache_append(key_cache, value_cache, new_key, new_value, cache_lengths, block_table)
    values = None if relative_bias is None else relative_bias.values_for(tokens, capacity)
    outs, lses = [query.new_empty(0, *query.shape[1:3], value_cache.shape[3])], []
    for b, length in enumerate((cache_lengths + appended).tolist()):
        if block_table is None:
            key, value = key_cache[b, :, :length], value_cache[b, :, :length]
        else:
            pages = block_table[b, : -(-length // key_cache.shape[2])].long()
            key, value = (t[pages].transpose(0, 1).flatten(1, 2)[:, :length] for t in (key_cache, value_cache))
        out, lse = attention(
            query[b : b + 1],
            key[None],
            value[None],
            causal=True,
            alibi_slopes=alibi_slopes if alibi_slopes is None or alibi_slopes.dim() == 1 else alibi_slopes[b],
            relative_bias=None if values is None else _Distances(values[:, capacity - length :]),
            return_lse=True,
            **options,
        )
        outs.append(out)
        lses.append(lse)
    out = torch.cat(outs)
    lse_dtype = torch.promote_types(query.dtype, torch.float32)
    return (out, torch.cat(lses) if lses else query.new_empty(query.shape[:3], dtype=lse_dtype)) if return_lse else out


@dataclass
class _Distances:
    """A bias handed to `attention` as its vector of distances."""

    values: Tensor

    def values_for(self, len_q, len_k, *, top_left=False) -> Tensor:
        return self.values


def kv_cache_append(key_cache, value_cache, new_key, new_value, cache_lengths, block_table=None):
    """Writes row t of new_key and new_value, (B, Hkv, T, D), to key cache_lengths[b] + t of sequence b."""
    place = cache_lengths.long()[:, None] + torch.arange(new_key.shape[2], device=new_key.device)  # (B, T)
    if block_table is None:
        page = torch.arange(new_key.shape[0], device=new_key.device)[:, None]
    else:
        page, place = block_table.long().gather(1, place // key_cache.shape[2]), place % key_cache.shape[2]
    for cache, new in ((key_cache, new_key), (value_cache, new_value)):
        cache.transpose(1, 2)[page, place] = new.transpose(1, 2)


def key_positions_of_queries(len_q, len_k, top_left: bool, device) -> Tensor:
    """p_i, the position at which query i stands among the keys, as a column (Sq, 1)."""
    return torch.arange(len_q, device=device)[:, None] + (0 if top_left else len_k - len_q)


def reach_before_keys(causal, window, global_keys) -> int | None:
    """How far before the first key a query may stand and still see one; None: at any distance."""
    if causal:
        return 0
    return None if window is None or window[1] < 0 or global_keys is not None else window[1]


def is_global(global_keys, len_k, device) -> Tensor:
    """Which keys a count or the indices of `global_keys` name: (Sk,), or (B, 1, 1, Sk) for indices (B, G)."""
    j = torch.arange(len_k, device=device)
    if not isinstance(global_keys, Tensor):
        return j < global_keys
    found = (global_keys.to(device)[..., None] == j).any(-2)
    return found if found.dim() == 1 else found[:, None, None]


def distance_matrix(values: Tensor, len_q, len_k) -> Tensor:
    """(Hq, Sq + Sk - 1) numbers by distance, gathered to (Hq, Sq, Sk): entry (i, j) is values[j - i + Sq - 1]."""
    i, j = torch.arange(len_q, device=values.device)[:, None], torch.arange(len_k, device=values.device)
    # An embedding: its gradient sums in one order for any number of threads, that of indexing does not.
    return F.embedding(j - i + (len_q - 1), values.T).permute(2, 0, 1).contiguous()


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window_size,
    *,
    shift=0,
    relative_bias_table=None,
    bias=None,
    logit_scale=None,
    partition="window",
    scale=None,
) -> Tensor:
    """Roll, partition, attend inside each window, reverse, roll back; arguments of `xformer_fast.window_attention`.

    Liu et al., "Swin Transformer" (2021) and "Swin Transformer V2" (2022); Tu et al., "MaxViT" (2022) for the grid.
    """
    axes, grid = query.dim() - 3, partition == "grid"
    window, shift = per_axis(window_size, axes), per_axis(shift, axes)
    sides, space = query.shape[1 : axes + 1], tuple(range(1, axes + 1))
    query, key, value = (
        split_windows(torch.roll(x, [-s for s in shift], space) if any(shift) else x, window, grid)
        for x in (query, key, value)
    )
    compute = torch.promote_types(query.dtype, torch.float32)
    if logit_scale is None:
        factor = query.shape[-1] ** -0.5 if scale is None else scale
    else:
        query, key = (F.normalize(x.to(compute), dim=-1).to(x.dtype) for x in (query, key))
        factor = logit_scale[:, None, None].to(compute)
    scores = (query @ key.mT).to(compute) * factor  # (B, windows, H, N, N)
    if relative_bias_table is not None:
        # An embedding: its gradient sums in one order for any number of threads, that of indexing does not.
        index = relative_index(window, scores.device)
        scores = scores + F.embedding(index, relative_bias_table).permute(2, 0, 1).to(compute)
    if bias is not None:
        scores = scores + bias.to(compute)
    if any(shift):
        region = split_windows(wrapped_regions(sides, window, shift, scores.device), window, grid)[0, :, 0, :, 0]
        scores = scores.masked_fill((region[:, :, None] != region[:, None, :])[:, None], float("-inf"))
    out = join_windows(torch.softmax(scores, -1).to(value.dtype) @ value, sides, window, grid)
    return torch.roll(out, shift, space) if any(shift) else out


def per_axis(number, axes: int) -> tuple[int, ...]:
    return tuple(number) if isinstance(number, (tuple, list)) else (number,) * axes


def split_windows(x: Tensor, window: tuple[int, ...], grid: bool) -> Tensor:
    """(B, *space, H, D) -> (B, windows, H, tokens, D)."""
    axes = len(window)
    for axis in reversed(range(axes)):  # each axis becomes two, of the window and inside it
        inside = window[axis]
        x = x.unflatten(axis + 1, (inside, x.shape[axis + 1] // inside) if grid else (-1, inside))
    first, second = (tuple(range(start, 2 * axes + 1, 2)) for start in (1, 2))
    outer, inner = (second, first) if grid else (first, second)
    x = x.permute(0, *outer, 2 * axes + 1, *inner, 2 * axes + 2)
    return x.flatten(axes + 2, 2 * axes + 1).flatten(1, axes)


def join_windows(x: Tensor, sides, window: tuple[int, ...], grid: bool) -> Tensor:
    """The inverse of `split_windows`."""
    axes = len(window)
    counts = [side // w for side, w in zip(sides, window, strict=True)]
    x = x.unflatten(3, window).unflatten(1, counts)  # (B, *counts, H, *window, D)
    order = [(axes + 2 + i, 1 + i) if grid else (1 + i, axes + 2 + i) for i in range(axes)]
    x = x.permute(0, *(place for pair in order for place in pair), axes + 1, 2 * axes + 2)
    return x.reshape(x.shape[0], *sides, *x.shape[-2:])


def wrapped_regions(sides, window, shift, device) -> Tensor:
    """(1, *space, 1, 1): which part of the map each place of the rolled one shows, told apart where they meet."""
    region = torch.zeros(1, device=device, dtype=torch.int64)
    for side, w, s in zip(sides, window, shift, strict=True):
        place = torch.arange(side, device=device)
        region = region[..., None] * 3 + (place >= side - w) * (s > 0) + (place >= side - s)
    return region[..., None, None]


def relative_index(window: tuple[int, ...], device) -> Tensor:
    """(N, N): the row of Swin's table for each query and key of a window."""
    grids = torch.meshgrid(*(torch.arange(w, device=device) for w in window), indexing="ij")
    index = torch.zeros((), dtype=torch.int64, device=device)
    for w, place in zip(window, grids, strict=True):
        place = place.flatten()
        index = index * (2 * w - 1) + place[:, None] - place + w - 1
    return index


def neighborhood_attention(
    query: Tensor, key: Tensor, value: Tensor, kernel_size, *, dilation=1, causal=False, relative_bias_table=None,
    scale=None,
) -> Tensor:  # fmt: skip
    """Attention over the flattened map under a dense mask; arguments of `xformer_fast.neighborhood_attention`.

    Hassani et al., "Neighborhood Attention Transformer" (2023).
    """
    axes = query.dim() - 3
    space = query.shape[1 : axes + 1]
    kernel, dilation, causal = (per_axis(option, axes) for option in (kernel_size, dilation, causal))
    mask, index = neighborhoods(space, kernel, dilation, causal, query.device)
    if relative_bias_table is not None:
        # An embedding: its gradient sums in one order for any number of threads, that of indexing does not.
        bias = F.embedding(index, relative_bias_table).permute(2, 0, 1)
        mask = bias.masked_fill(~mask, float("-inf"))
    query, key, value = (x.flatten(1, axes).transpose(1, 2) for x in (query, key, value))
    return attention(query, key, value, mask=mask, scale=scale).transpose(1, 2).unflatten(1, space)


def neighborhoods(space, kernel, dilation, causal, device) -> tuple[Tensor, Tensor]:
    """For each query and key of a flattened map, (N, N): whether it sees it, and the row of the bias table if so.

    Places of an axis `dilation` apart are an axis of their own, of length L. There, query i sees the `kernel` keys from
    clamp(i - kernel // 2, 0, L - kernel) on, or, where causal, the keys from max(0, i - kernel + 1) to i.
    """
    seen = torch.ones(1, 1, dtype=torch.bool, device=device)
    index = torch.zeros(1, 1, dtype=torch.int64, device=device)
    for side, k, step, forward_only in zip(space, kernel, dilation, causal, strict=True):
        place = torch.arange(side, device=device)
        group, i = place % step, place // step
        length = (side - group + step - 1) // step
        last = i if forward_only else (i - k // 2).clamp(min=0).minimum(length - k) + k - 1
        keep = (group[:, None] == group) & (i <= last[:, None]) & (i > last[:, None] - k)
        row = (i - i[:, None] + k - 1).where(keep, 0)
        seen = (seen[:, None, :, None] & keep[:, None, :]).flatten(2).flatten(0, 1)
        index = (index[:, None, :, None] * (2 * k - 1) + row[:, None, :]).flatten(2).flatten(0, 1)
    return seen, index


def apply_rope(
    x: Tensor, cos: Tensor, sin: Tensor, *, positions=None, sections=None, interleaved=False, inverse=False
) -> Tensor:
    """Rotates the first R of D channels of x (B, H, S, D): pairs (x_k, x_{k+R/2}), interleaved (x_2k, x_2k+1).

    Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021). Arguments as in
    `xformer_fast.apply_rope`. Computed in float32 or better.
    """
    positions = torch.arange(x.shape[2], device=x.device) if positions is None else positions
    rotary, compute = 2 * cos.shape[1], torch.promote_types(torch.promote_types(x.dtype, cos.dtype), torch.float32)
    cos, sin = (rope_rows(table, positions, sections).to(compute) for table in (cos, sin))
    sin = -sin if inverse else sin
    head, tail = x[..., :rotary].to(compute), x[..., rotary:]
    pairs = head.unflatten(-1, (-1, 2)) if interleaved else head.unflatten(-1, (2, -1)).transpose(-1, -2)
    a, b = pairs.unbind(-1)
    turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1)
    turned = turned if interleaved else turned.transpose(-1, -2)
    return torch.cat((turned.flatten(-2).to(x.dtype), tail), -1)


def rope_rows(table: Tensor, positions: Tensor, sections=None) -> Tensor:
    """Rows of a table (P, R/2) at positions (S,), (B, S) or (axes, B, S), broadcastable to (B, H, S, R/2)."""
    if positions.dim() < 3:
        rows = table[positions]
    else:
        parts = table.split(list(sections), dim=1)
        rows = torch.cat([part[axis] for part, axis in zip(parts, positions, strict=True)], -1)
    return rows if rows.dim() == 2 else rows[:, None]


def draw_seed(device) -> Tensor:
    return torch.randint(0, 2**62, (1,), dtype=torch.int64, device=device)


def dropout_mask(seed: Tensor, p: float, batch, heads, len_q, len_k, *, first_batch=0) -> Tensor:
    """The keep bits (B, H, Sq, Sk): Philox4x32-10 of key `seed` and counter (j // 4, i, b*H + h, 0), word j % 4.

    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011).
    """
    low = 0xFFFFFFFF
    seed = seed.reshape(())
    k0, k1 = seed & low, (seed >> 32) & low

    def axis(n, start=0):
        return torch.arange(start, start + n, device=seed.device)

    c0 = axis((len_k + 3) // 4)
    c1 = axis(len_q)[:, None].expand(-1, c0.shape[0])
    c2 = axis(batch * heads, first_batch * heads)[:, None, None].expand(-1, *c1.shape)
    c0, c1, c3 = c0.expand_as(c2), c1.expand_as(c2), torch.zeros_like(c2)
    for _ in range(10):  # int64 products wrap; their 64 bits are the unsigned ones
        m0, m1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (m1 >> 32 & low) ^ c1 ^ k0, m1 & low, (m0 >> 32 & low) ^ c3 ^ k1, m0 & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    words = torch.stack((c0, c1, c2, c3), -1).flatten(-2)[..., :len_k]
    return (words >= int(p * 2**32)).unflatten(0, (batch, heads))
