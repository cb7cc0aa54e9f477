"""The naive formulas of linear attention: the quadratic form, and the recurrent form that it equals.

    o_i = scale·φ(q_i)·S_i / (scale·φ(q_i)·z_i + eps),   S_i = Σ_j decay^(p_i - j) φ(k_j) v_jᵀ + decay^(p_i + 1) S_0

and z_i the same with v = 1, over the keys that query i sees: j <= p_i = i + Sk - Sq if causal, all of them otherwise.
A denominator of exactly zero (no key seen, no state, eps = 0) gives a row of zeros.
"""

import torch
from torch import Tensor

from . import feature_maps


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    feature_map="elu",
    causal=False,
    normalize=True,
    eps=1e-6,
    decay=None,
    scale=1.0,
    key_lengths=None,
    cu_seqlens=None,
    initial_state=None,
    return_state=False,
):
    """The quadratic form, with the arguments of `xformer_fast.linear_attention`."""
    options = {"feature_map": feature_map, "causal": causal, "normalize": normalize, "eps": eps, "decay": decay}
    if cu_seqlens is not None:
        return _packed(query, key, value, cu_seqlens, key_lengths, initial_state, return_state, scale=scale, **options)
    wide = torch.promote_types(query.dtype, torch.float32)
    heads, len_q, len_k = query.shape[1], query.shape[2], key.shape[2]
    j = torch.arange(len_k, device=query.device)
    p = torch.arange(len_q, device=query.device)[:, None] + (len_k - len_q)
    lengths = torch.full((query.shape[0],), len_k, device=query.device) if key_lengths is None else key_lengths
    inside = (j < lengths.to(query.device)[:, None])[:, None]  # (B, 1, Sk)
    key, value = (t.masked_fill(~inside[..., None], 0) for t in (key, value))  # padding may hold NaN
    phi_q, phi_k = feature_maps.apply(feature_map, query, key)
    phi_k = phi_k.masked_fill(~inside[..., None], 0)
    phi_k, value = (t.repeat_interleave(heads // key.shape[1], 1) for t in (phi_k, value))

    weights = ((j <= p) if causal else torch.ones_like(j <= p)).to(wide)  # (Sq, Sk)
    last = (lengths.to(query.device)[:, None] - 1 - j).clamp(min=0)[:, None]  # (B, 1, Sk): distance to the last key
    carry = left = ends = torch.ones((), dtype=wide, device=query.device)
    if decay is not None:
        base = decay.to(wide)[:, None]  # (Hq, 1)
        weights = weights * base[..., None] ** (p - j).clamp(min=0)
        carry = base[..., None] ** (p + 1)  # (Hq, Sq, 1): what is left of the initial state
        left, ends = base**last, (base ** lengths.to(query.device)[:, None, None])[..., None]
    scores = (phi_q @ phi_k.mT).to(wide) * weights * scale
    out, total = (scores.to(value.dtype) @ value).to(wide), scores.sum(-1, keepdim=True)
    if initial_state is not None:
        kv, z = (t.to(wide) for t in initial_state)
        out = out + scale * carry * (phi_q.to(wide) @ kv)
        total = total + scale * carry * (phi_q.to(wide) @ z[..., None])
    if normalize:
        total = total + eps
        out = torch.where(total == 0, 0.0, out / total.masked_fill(total == 0, 1.0))
    out = out.to(query.dtype)
    if not return_state:
        return out
    kept = phi_k.to(wide) * (left[..., None] if decay is not None else left)
    final_kv, final_z = kept.mT @ value.to(wide), kept.sum(2)
    if initial_state is not None:
        final_kv = final_kv + ends * kv
        final_z = final_z + (ends[..., 0] if decay is not None else ends) * z
    return out, (final_kv, final_z)


def linear_attention_recurrent(
    query: Tensor, key: Tensor, value: Tensor, *, feature_map="elu", normalize=True, eps=1e-6, decay=None, scale=1.0,
    initial_state=None,
):  # fmt: skip
    """The causal form for Sq = Sk as a recurrence over tokens: (out, final state)."""
    phi_q, phi_k = feature_maps.apply(feature_map, query, key)
    batch, heads, length, features = phi_q.shape
    phi_k, value = (t.repeat_interleave(heads // key.shape[1], 1) for t in (phi_k, value))
    if initial_state is None:
        initial_state = (
            phi_q.new_zeros(batch, heads, features, value.shape[-1]),
            phi_q.new_zeros(batch, heads, features),
        )
    kv, z = initial_state
    rate = 1.0 if decay is None else decay[:, None]
    rows = []
    for t in range(length):
        kv = kv * (rate if decay is None else rate[..., None]) + phi_k[:, :, t, :, None] * value[:, :, t, None, :]
        z = z * rate + phi_k[:, :, t]
        out = scale * torch.einsum("bhd,bhde->bhe", phi_q[:, :, t], kv)
        if normalize:
            total = scale * (phi_q[:, :, t] * z).sum(-1, keepdim=True) + eps
            out = torch.where(total == 0, 0.0, out / total.masked_fill(total == 0, 1.0))
        rows.append(out)
    return torch.stack(rows, 2) if rows else value.new_zeros(batch, heads, 0, value.shape[-1]), (kv, z)


def _packed(query, key, value, cu_seqlens, key_lengths, initial_state, return_state, **options):
    starts = cu_seqlens.tolist()
    outs, states = [query.new_empty(0, query.shape[1], value.shape[2])], []
    for b in range(len(starts) - 1):
        q, k, v = (t[starts[b] : starts[b + 1]].transpose(0, 1)[None] for t in (query, key, value))
        out, state = linear_attention(
            q, k, v, key_lengths=None if key_lengths is None else key_lengths[b : b + 1],
            initial_state=None if initial_state is None else tuple(t[b : b + 1] for t in initial_state),
            return_state=True, **options,
        )  # fmt: skip
        outs.append(out[0].transpose(0, 1))
        states.append(state)
    out = torch.cat(outs)
    if not return_state:
        return out
    if not states:
        features = feature_maps.apply(options["feature_map"], query, key)[0].shape[-1]
        wide = torch.promote_types(query.dtype, torch.float32)
        shape = 0, query.shape[1], features
        return out, (query.new_zeros(*shape, value.shape[2], dtype=wide), query.new_zeros(shape, dtype=wide))
    return out, (torch.cat([kv for kv, _ in states]), torch.cat([z for _, z in states]))
