"""Random calls of `decode_attention`: contiguous and paged caches, unused parts NaN, lengths of 0 to capacity."""

import math
import random
from dataclasses import dataclass, field

import torch
from attention_cases import arrange
from torch import Tensor

import xformer_fast
from xformer_fast import reference
from xformer_fast.testing import check_close

HEADS = [(1, 1), (2, 2), (4, 2), (4, 1), (6, 2), (7, 1), (5, 5), (12, 4)]
HEAD_DIMS = [1, 2, 8, 16, 31, 33, 40, 64, 72, 80, 96, 127, 128, 256]
OPTIONS = ["window", "rope", "alibi_slopes", "relative_bias", "sinks", "softcap", "scale"]


@dataclass
class Case:
    """One call. `tensors`: the float inputs by name ("relative_bias" is its table); `options`: everything else."""

    dtype: torch.dtype
    tensors: dict[str, Tensor] = field(default_factory=dict)
    options: dict = field(default_factory=dict)

    def __str__(self):
        tensors = {n: (str(t.dtype), tuple(t.shape), t.stride()) for n, t in self.tensors.items()}
        options = {n: v.tolist() if isinstance(v, Tensor) else v for n, v in self.options.items() if n != "rope"}
        return f"{self.dtype}\n  {tensors}\n  {options}"


def draw(seed: int, dtype: torch.dtype, *, small=False, options=OPTIONS, rate=0.25) -> Case:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    case = Case(dtype)
    chosen = [name for name in options if rng.random() < rate]
    heads, kv_heads = rng.choice(HEADS)
    dim = min(rng.choice(HEAD_DIMS), 80 if small else 256)
    dim_v = dim if rng.random() < 0.7 else min(rng.choice(HEAD_DIMS), 80 if small else 256)
    batch = rng.choice([1, 1, 2, 3])
    tokens = rng.choice([1, 1, 1, 2, 4, 7, 16, 33])
    most = rng.choice([17, 60]) if small else rng.choice([20, 90, 300, 700, 2500])
    paged, appends = rng.random() < 0.4, rng.random() < 0.6
    page_size = rng.choice([1, 3, 16, 32, 64])
    pages = -(-(most + tokens) // page_size)
    capacity = pages * page_size if paged else most + tokens
    lengths = [rng.choice([0, most, rng.randint(0, most), rng.randint(0, most)]) for _ in range(batch)]
    total = [n + appends * tokens for n in lengths]

    keys, values = torch.randn(batch, kv_heads, capacity, dim), torch.randn(batch, kv_heads, capacity, dim_v)
    for b, n in enumerate(lengths):
        keys[b, :, n:], values[b, :, n:] = math.nan, math.nan
    if paged:
        case.options["block_table"] = table = torch.full((batch, pages), -7, dtype=torch.int32)
        free = torch.randperm(batch * pages + 2).to(torch.int32)
        for b, n in enumerate(total):
            used = -(-n // page_size)
            table[b, :used], free = free[:used], free[used:]
        keys, values = (into_pages(t, table, page_size, batch * pages + 2) for t in (keys, values))
    elif rng.random() < 0.5:  # (B, S, H, D) underneath
        keys, values = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (keys, values))
    case.tensors |= {"key_cache": keys.to(dtype), "value_cache": values.to(dtype)}
    layout = rng.choice(["contiguous", "transposed", "packed", "strided", "offset"])
    case.tensors["query"] = arrange((batch, heads, tokens, dim), dtype, layout)
    case.options["cache_lengths"] = torch.tensor(lengths, dtype=rng.choice([torch.int32, torch.int64]))
    if appends:
        case.tensors["new_key"] = arrange((batch, kv_heads, tokens, dim), dtype, layout)
        case.tensors["new_value"] = arrange((batch, kv_heads, tokens, dim_v), dtype, layout)
    _draw_options(case, rng, chosen, batch, heads, tokens, capacity, dim)
    return case


def into_pages(dense: Tensor, table: Tensor, page_size: int, pages: int) -> Tensor:
    """(B, H, S, D) as (pages, H, page_size, D), NaN where no key is."""
    batch, heads, _, dim = dense.shape
    cache = torch.full((pages, heads, page_size, dim), math.nan)
    for b in range(batch):
        for i, page in enumerate(table[b].tolist()):
            if page >= 0:
                cache[page] = dense[b, :, i * page_size : (i + 1) * page_size]
    return cache


def _draw_options(case: Case, rng, chosen, batch, heads, tokens, capacity, dim):
    options, tensors = case.options, case.tensors
    aux = rng.choice([torch.float32, case.dtype])
    if "window" in chosen:
        options["window"] = (rng.choice([0, 3, 31, 200]), rng.choice([-1, 0, 5]))
    if "alibi_slopes" in chosen:
        tensors["alibi_slopes"] = (torch.rand(heads) if rng.random() < 0.5 else torch.randn(batch, heads) * 0.05).to(
            aux
        )
    if "sinks" in chosen:
        tensors["sinks"] = torch.randn(heads).to(aux)
    if "softcap" in chosen:
        options["softcap"] = rng.choice([0.7, 5.0, 30.0])
    if "scale" in chosen:
        options["scale"] = rng.choice([0.7, 2.0, -1.0, 0.0]) * dim**-0.5
    if "rope" in chosen and dim >= 2:
        rotary = 2 * rng.randint(1, dim // 2)
        angles = torch.arange(capacity)[:, None] * 10000.0 ** (-torch.arange(0, rotary, 2) / rotary)
        options["rope"] = (angles.cos(), angles.sin(), {"interleaved": rng.random() < 0.5})
    if "relative_bias" in chosen:
        if rng.random() < 0.5:
            tensors["relative_bias"], options["relative_bias"] = torch.randn(heads, tokens + capacity - 1), None
        else:
            tensors["relative_bias"], options["relative_bias"] = torch.randn(32, heads), {"bidirectional": False}


def arguments(case: Case, *, exact=False) -> dict:
    """Keyword arguments of the public function, every tensor a copy; exact: in float64."""
    tensors = {n: t.double() if exact else t for n, t in case.tensors.items()}
    for name in ("key_cache", "value_cache"):
        copy = torch.empty_strided(tensors[name].shape, tensors[name].stride(), dtype=tensors[name].dtype)
        tensors[name] = copy.copy_(tensors[name])
    keywords = {**case.options, **tensors}
    if "rope" in keywords:
        cos, sin, options = keywords["rope"]
        keywords["rope"] = xformer_fast.Rope(*((cos.double(), sin.double()) if exact else (cos, sin)), **options)
    if "relative_bias" in keywords:
        options = case.options["relative_bias"]
        table = tensors["relative_bias"]
        bias = xformer_fast.DistanceBias(table) if options is None else xformer_fast.T5Bias(table, **options)
        keywords["relative_bias"] = bias
    return keywords


@dataclass
class Result:
    out: Tensor
    lse: Tensor
    key_cache: Tensor
    value_cache: Tensor


def evaluate(case: Case, function, *, exact=False, device=None) -> Result:
    keywords = arguments(case, exact=exact)
    if device is not None:
        keywords = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in keywords.items()}
    out, lse = function(**keywords, return_lse=True)
    return Result(out, lse, keywords["key_cache"], keywords["value_cache"])


def truth_and_naive(case: Case) -> tuple[Result, Result]:
    """The formula in float64 and in the case's dtype."""
    return evaluate(case, reference.decode_attention, exact=True), evaluate(case, reference.decode_attention)


def check(case: Case, result: Result, truth: Result, naive: Result, where: str):
    """The error rule for out and lse; the caches hold what the formula wrote, and nothing else changed."""
    for name in ("out", "lse"):
        sides = (getattr(r, name).cpu() for r in (result, truth, naive))
        size = 1.0 if name == "lse" else 0.0
        check_close(*sides, f"{where} {name} of {case}", dtype=case.dtype, magnitude=size)
    for name in ("key_cache", "value_cache"):
        ours, theirs = getattr(result, name).cpu(), getattr(naive, name)
        assert torch.equal(ours.isnan(), theirs.isnan()), f"{where}: {name} was written elsewhere, {case}"
        if "rope" in case.options and name == "key_cache":  # rotated by another backend: the last bits may differ
            sides = (t.nan_to_num().cpu() for t in (ours, getattr(truth, name), theirs))
            check_close(*sides, f"{where} {name} of {case}", dtype=case.dtype)
        else:
            assert torch.equal(ours.nan_to_num(), theirs.nan_to_num()), f"{where}: {name} differs, {case}"
    assert result.out.dtype == case.dtype
