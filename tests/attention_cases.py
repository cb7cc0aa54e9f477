"""Random attention calls, dense and packed, and their evaluation: results and every gradient, by any backend.

A case is drawn from a seed and knows nothing of backends. `truth_and_naive` gives the two sides of the tolerance rule
of `xformer_fast.testing`; `evaluate` runs a case on a backend; `check` compares.
"""

import contextlib
import math
import random
from dataclasses import dataclass, field

import torch
from torch import Tensor

import xformer_fast
from xformer_fast import reference
from xformer_fast.testing import check_close

LENGTHS = [
    (1, 1),
    (1, 513),
    (113, 203),
    (203, 113),
    (17, 17),
    (64, 64),
    (65, 129),
    (128, 1),
    (3, 250),
    (97, 96),
    (40, 300),
]
LONG = [(1023, 1024), (1024, 777), (1, 4096), (2000, 33)]
HEAD_DIMS = [1, 2, 8, 16, 31, 32, 40, 64, 72, 80, 96, 127, 128, 160, 256]
HEADS = [(1, 1), (2, 2), (4, 2), (4, 1), (6, 2), (3, 1), (5, 5)]
LAYOUTS = [
    "contiguous",
    "transposed",
    "packed",
    "sequence_first",
    "expanded_batch",
    "expanded_heads",
    "strided",
    "offset",
]
PACKED_LAYOUTS = ["contiguous", "packed", "heads_first", "strided", "offset"]
OPTIONS = [
    "mask", "causal", "window", "key_lengths", "alibi_slopes", "sinks", "softcap", "dropout_p", "return_lse", "rope",
    "relative_bias", "scale", "aux_grad", "global_keys", "decomposed_bias",
]  # fmt: skip


DENSE_ONLY = ("mask", "global_keys", "decomposed_bias")


@dataclass
class Case:
    """One call. `tensors`: the float inputs by name ("relative_bias" is its table, "rel_h" and "rel_w" are
    `decomposed_bias`); `options`: everything else."""

    name: str
    dtype: torch.dtype
    tensors: dict[str, Tensor]
    options: dict = field(default_factory=dict)
    frozen: set = field(default_factory=set)  # tensors that require no gradient
    grad_out: Tensor | None = None
    grad_lse: Tensor | None = None
    seed: int = 0

    @property
    def packed(self) -> bool:
        return "cu_seqlens_q" in self.options

    def __str__(self):
        shapes = {
            n: (tuple(t.shape), t.stride()) if n in ("query", "key", "value") else tuple(t.shape)
            for n, t in self.tensors.items()
        }
        options = {n: _brief(v) for n, v in self.options.items()}
        return f"{self.name} {self.dtype}\n  {shapes}\n  {options}\n  frozen {self.frozen}"


def _brief(option):
    if isinstance(option, tuple):
        return tuple(_brief(part) for part in option)
    if isinstance(option, dict):
        return {name: _brief(part) for name, part in option.items()}
    if isinstance(option, Tensor):
        return option.tolist() if option.numel() <= 16 else f"{option.dtype} {tuple(option.shape)} {option.stride()}"
    return option


def draw(seed: int, dtype: torch.dtype, *, packed=False, small=False, long=False, options=None, rate=0.3) -> Case:
    """The case of a seed. `options` restricts what may be drawn, `small` keeps shapes for slow backends small."""
    rng = random.Random(f"{seed} {packed}")
    torch.manual_seed(seed)
    chosen = [name for name in (OPTIONS if options is None else options) if rng.random() < rate]
    if packed:
        chosen = [name for name in chosen if name not in DENSE_ONLY]
    heads, kv_heads = rng.choice(HEADS)
    dim = rng.choice(HEAD_DIMS)
    dim_v = dim if rng.random() < 0.7 else rng.choice(HEAD_DIMS)
    if small:
        dim, dim_v = min(dim, 80), min(dim_v, 80)
    batch = rng.choice([1, 1, 2, 3])
    case = Case(f"{'varlen' if packed else 'dense'}-{seed}", dtype, {}, seed=seed)
    if packed:
        len_q, len_k = _draw_packed(case, rng, batch + 1, small)
        shapes = {"query": (len_q, heads, dim), "key": (len_k, kv_heads, dim), "value": (len_k, kv_heads, dim_v)}
        layouts = PACKED_LAYOUTS
        batch += 1
        lengths_k = case.options["cu_seqlens_k"].diff().tolist()
    else:
        len_q, len_k = rng.choice(LONG if long else LENGTHS)
        if small:
            len_q, len_k = min(len_q, rng.choice([1, 33, 70])), min(len_k, rng.choice([1, 45, 90]))
        if long:
            batch, (heads, kv_heads), dim, dim_v = 1, rng.choice([(1, 1), (2, 1)]), min(dim, 96), min(dim_v, 96)
        elif batch * heads * len_q * len_k > 60_000:
            batch, (heads, kv_heads) = 1, rng.choice([(2, 1), (2, 2), (3, 1)])
        shapes = {
            "query": (batch, heads, len_q, dim), "key": (batch, kv_heads, len_k, dim),
            "value": (batch, kv_heads, len_k, dim_v),
        }  # fmt: skip
        layouts, lengths_k = LAYOUTS, [len_k] * batch
    layout = rng.choice(layouts)
    for name, shape in shapes.items():
        case.tensors[name] = arrange(shape, dtype, layout if rng.random() < 0.8 else rng.choice(layouts))
    _draw_options(case, rng, chosen, batch, heads, lengths_k, len_q, len_k, dim)
    finish(case)
    return case


def _draw_packed(case: Case, rng, batch: int, small: bool) -> tuple[int, int]:
    most = 40 if small else 150
    lengths_q = [rng.choice([0, 1, rng.randint(1, most), rng.randint(1, most)]) for _ in range(batch)]
    lengths_k = [
        n if rng.random() < 0.4 else rng.choice([0, 1, rng.randint(1, most), rng.randint(1, most)]) for n in lengths_q
    ]
    for name, lengths in (("q", lengths_q), ("k", lengths_k)):
        case.options[f"cu_seqlens_{name}"] = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        case.options[f"max_seqlen_{name}"] = max(lengths)
    return sum(lengths_q), sum(lengths_k)


def arrange(shape, dtype, layout: str) -> Tensor:
    """Normal numbers of a shape (B, H, S, D) or (T, H, D) in one of the layouts models come with."""
    if layout == "contiguous":
        return torch.randn(shape).to(dtype)
    if layout == "strided":  # no unit last stride
        return torch.randn(*shape[:-1], shape[-1] * 2).to(dtype)[..., ::2]
    if layout == "offset":  # odd alignment and padded rows
        return torch.randn(*shape[:-1], shape[-1] + 3).to(dtype)[..., 3:]
    if len(shape) == 3:
        if layout == "packed":  # a slice of the (T, 3, H, D) projection
            return torch.randn(shape[0], 3, *shape[1:]).to(dtype)[:, 1]
        return torch.randn(shape[1], shape[0], shape[2]).to(dtype).transpose(0, 1)
    batch, heads, length, dim = shape
    if layout == "transposed":
        return torch.randn(batch, length, heads, dim).to(dtype).transpose(1, 2)
    if layout == "packed":
        return torch.randn(batch, length, 3, heads, dim).to(dtype)[:, :, 2].transpose(1, 2)
    if layout == "sequence_first":
        return torch.randn(length, batch, heads, dim).to(dtype).permute(1, 2, 0, 3)
    if layout == "expanded_batch":
        return torch.randn(1, heads, length, dim).to(dtype).expand(shape)
    return torch.randn(batch, 1, length, dim).to(dtype).expand(shape)


def _draw_options(case: Case, rng, chosen, batch, heads, lengths_k, len_q, len_k, dim):
    options, tensors = case.options, case.tensors
    aux_dtype = rng.choice([torch.float32, case.dtype])
    if "causal" in chosen:
        options["causal"] = rng.choice([True, "top_left"])
    top_left = options.get("causal") == "top_left"
    if "window" in chosen:
        options["window"] = (rng.choice([-1, 0, 3, 31, 100]), rng.choice([-1, 0, 2, 40]))
    if "global_keys" in chosen:
        if rng.random() < 0.8:
            options.setdefault("window", (rng.choice([0, 3, 31]), rng.choice([0, 2, 40])))
        options["global_keys"] = draw_global_keys(rng, batch, len_k)
    if "key_lengths" in chosen:
        lengths = torch.tensor([rng.choice([0, n, rng.randint(0, n)]) for n in lengths_k])
        options["key_lengths"] = lengths.to(rng.choice([torch.int32, torch.int64]))
        poison_padding(case)
    if "mask" in chosen:
        mask = draw_mask(rng, batch, heads, len_q, len_k, aux_dtype)
        (options if mask.dtype == torch.bool else tensors)["mask"] = mask
    if "alibi_slopes" in chosen:
        slopes = torch.rand(heads) if rng.random() < 0.5 else torch.randn(batch, heads) * 0.05
        tensors["alibi_slopes"] = slopes.to(aux_dtype)
    if "sinks" in chosen:
        tensors["sinks"] = torch.randn(heads).to(aux_dtype)
    if "softcap" in chosen:
        options["softcap"] = rng.choice([0.7, 5.0, 30.0])
    if "dropout_p" in chosen:
        options["dropout_p"] = rng.choice([0.1, 0.25, 0.5])
    if "scale" in chosen:
        options["scale"] = rng.choice([0.7, 2.0, -1.0, 0.0]) * dim**-0.5
    if "return_lse" in chosen:
        options["return_lse"] = True
    if "rope" in chosen and dim >= 2:
        draw_rope(case, rng, batch, len_q, len_k, dim, top_left)
    if "relative_bias" in chosen:
        if rng.random() < 0.5 and len_q + len_k > 0 and not case.packed:
            tensors["relative_bias"], options["relative_bias"] = torch.randn(heads, len_q + len_k - 1), ("distance", {})
        else:
            t5 = {"bidirectional": rng.random() < 0.5, "max_distance": rng.choice([20, 128])}
            tensors["relative_bias"], options["relative_bias"] = torch.randn(rng.choice([8, 32]), heads), ("t5", t5)
    if "decomposed_bias" in chosen:
        rows = rng.choice([n for n in range(1, len_k + 1) if len_k % n == 0])
        tensors["rel_h"], tensors["rel_w"] = (
            torch.randn(batch, heads, len_q, n).to(aux_dtype) for n in (rows, len_k // rows)
        )
    if "aux_grad" not in chosen:
        learned = ("mask", "alibi_slopes", "sinks", "relative_bias", "rel_h", "rel_w")
        case.frozen = {name for name in learned if rng.random() < 0.3}


def poison_padding(case: Case):
    """What padding holds never reaches a result: NaN shows it."""
    lengths, starts = case.options["key_lengths"].tolist(), case.options.get("cu_seqlens_k")
    for name in ("key", "value"):
        tensor = case.tensors[name]
        if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
            continue  # sequences share their memory
        for b, length in enumerate(lengths):
            if starts is None:
                tensor[b, :, length:] = math.nan
            else:
                tensor[starts[b] + length : starts[b + 1]] = math.nan


def draw_global_keys(rng, batch, len_k):
    """A count, or indices with gaps and repetitions."""
    count = rng.choice([0, 1, 2, 5, 40])
    kind = rng.choice(["count", "shared", "own", "own"])
    if kind == "count":
        return count
    shape = (count,) if kind == "shared" else (batch, count)
    return torch.randint(-1, len_k, shape).to(rng.choice([torch.int32, torch.int64]))


def draw_mask(rng, batch, heads, len_q, len_k, dtype) -> Tensor:
    """A bool or float mask with a random set of broadcast axes, layout and number of dimensions."""
    shape = [n if rng.random() < 0.6 else 1 for n in (batch, heads, len_q, len_k)]
    dims = rng.choice([4, 4, 3, 2])
    transposed = rng.random() < 0.2
    made = [*shape[:2], shape[3], shape[2]] if transposed else shape
    if rng.random() < 0.5:
        mask = torch.rand(made) < rng.choice([0.5, 0.9, 0.02])
    else:
        mask = torch.randn(made)
        if rng.random() < 0.5:
            mask = mask.masked_fill(torch.rand(made) < 0.3, -math.inf)
        mask = mask.to(dtype)
    mask = mask.mT if transposed else mask
    if rng.random() < 0.2:
        mask = mask.expand(batch, heads, len_q, len_k)
    return mask[0, 0] if dims == 2 else mask[0] if dims == 3 else mask


def draw_rope(case: Case, rng, batch, len_q, len_k, dim, top_left):
    rotary = 2 * rng.randint(1, dim // 2) if rng.random() < 0.5 else dim // 2 * 2
    options = {"interleaved": rng.random() < 0.5}
    low = len_q > len_k and not top_left
    if case.packed:
        shifts = case.options["cu_seqlens_k"].diff() - case.options["cu_seqlens_q"].diff()
        low = bool((shifts < 0).any()) and not top_left
    if low or rng.random() < 0.4:
        kind = 1 if case.packed else rng.choice([1, 2, 3])
        start = rng.choice([0, 7])
        lead = {1: (), 2: (batch,), 3: (2, batch)}[kind]
        if kind == 3:
            first = rng.randint(0, rotary // 2)
            options["sections"] = (first, rotary // 2 - first)
        options["query_positions"] = torch.randint(start, start + 500, (*lead, len_q))
        options["key_positions"] = torch.randint(start, start + 500, (*lead, len_k))
    positions = torch.arange(max(len_q + len_k, 600))[:, None]
    angles = positions * 10000.0 ** (-torch.arange(0, rotary, 2) / rotary)
    case.options["rope"] = (angles.cos(), angles.sin(), options)


def finish(case: Case):
    """Draws the gradients that come back to out and lse."""
    query, value = case.tensors["query"], case.tensors["value"]
    grad_out = torch.randn(*query.shape[:-1], value.shape[-1])
    case.grad_out = grad_out.to(case.dtype)
    if case.options.get("return_lse"):
        rows = (query.shape[1], query.shape[0]) if case.packed else query.shape[:-1]
        case.grad_lse = torch.randn(rows)


def arguments(case: Case, tensors: dict[str, Tensor], exact: bool) -> dict:
    """The keyword arguments of the public function, with `tensors` in place of the case's."""
    keywords = {**case.options, **tensors}
    if "rope" in keywords:
        device, (cos, sin, options) = tensors["query"].device, keywords["rope"]
        tables = (table.to(device, torch.float64 if exact else table.dtype) for table in (cos, sin))
        options = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in options.items()}
        keywords["rope"] = xformer_fast.Rope(*tables, **options)
    if "relative_bias" in tensors:
        kind, options = case.options["relative_bias"]
        make = xformer_fast.DistanceBias if kind == "distance" else xformer_fast.T5Bias
        keywords["relative_bias"] = make(tensors["relative_bias"], **options)
    if "rel_h" in tensors:
        keywords["decomposed_bias"] = keywords.pop("rel_h"), keywords.pop("rel_w")
    return keywords


def evaluate(case: Case, function, *, exact=False, gradients=True, device=None) -> dict[str, Tensor]:
    """Results and gradients by name. exact: inputs are raised to float64."""
    tensors, results = _call(case, function, exact, gradients, device)
    named = dict(zip(("out", "lse"), results, strict=False))
    return named | _gradients(tensors, results, (case.grad_out, case.grad_lse)) if gradients else named


def _call(case: Case, function, exact, gradients, device=None) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
    tensors = {}
    for name, tensor in case.tensors.items():
        tensor = tensor.double() if exact else tensor
        tensor = tensor if device is None else tensor.to(device)
        tensors[name] = tensor.detach().requires_grad_(gradients and name not in case.frozen)
    keywords = arguments(case, tensors, exact)
    if device is not None:
        keywords = {n: v.to(device) if isinstance(v, Tensor) and n not in tensors else v for n, v in keywords.items()}
    torch.manual_seed(case.seed)  # the dropout seed is drawn from torch's generator
    results = function(**keywords)
    return tensors, results if isinstance(results, tuple) else (results,)


def on_backend(name: str | None, *, packed=False):
    """The public function, held to one backend."""
    function = xformer_fast.varlen_attention if packed else xformer_fast.attention
    return lambda **keywords: function(**keywords, backend=name)


def formula(*, packed=False):
    """The naive formula with the public function's arguments."""

    def run(**keywords):
        if not packed:
            return reference.attention(**keywords)
        for name in ("max_seqlen_q", "max_seqlen_k"):
            keywords.pop(name)
        if (rope := keywords.pop("rope", None)) is not None:
            ends = keywords["cu_seqlens_q"], keywords["cu_seqlens_k"]
            top_left = keywords.get("causal") == "top_left"
            keywords["query"], keywords["key"] = rope.rotate_packed(
                keywords["query"], keywords["key"], *ends, top_left=top_left, backend="reference"
            )
        return reference.varlen_attention(**keywords)

    return run


def _gradients(tensors: dict[str, Tensor], results, weights, **keywords) -> dict[str, Tensor]:
    wanted = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
    weights = [weight.to(result) for weight, result in zip(weights, results, strict=False)]
    grads = torch.autograd.grad(results, list(wanted.values()), weights, **keywords)
    return {f"grad_{name}": grad for name, grad in zip(wanted, grads, strict=True)}


FEW = 64  # numbers


def truth_and_naive(case: Case, *, gradients=True) -> tuple[dict, dict]:
    """The formula in float64, and in the case's dtype.

    The naive error of a gradient of a few numbers (slopes, sinks, one query) may be next to nothing by luck: there it
    is the worst over several gradients of out.
    """
    run, threads = formula(packed=case.packed), torch.get_num_threads()
    torch.set_num_threads(1)  # many small operations: waking threads would cost more than they bring
    try:
        truth = evaluate(case, run, exact=True, gradients=gradients)
        naive = evaluate(case, run, gradients=gradients)
        few = [n for n in case.tensors if gradients and n not in case.frozen and case.tensors[n].numel() <= FEW]
        if few:
            for errors in _errors_of_other_draws(case, run):
                for name in (f"grad_{n}" for n in few):
                    other = truth[name] + errors[name]
                    if _largest(errors[name]) > _largest(naive[name] - truth[name]):
                        naive[name] = other.to(naive[name].dtype)
        return truth, naive
    finally:
        torch.set_num_threads(threads)


def _errors_of_other_draws(case: Case, run, draws=16):
    """Yields naive gradients minus exact ones for other gradients of out."""
    (exact, exact_results), (naive, naive_results) = (_call(case, run, side, True) for side in (True, False))
    for _ in range(draws):
        weights = torch.randn(case.grad_out.shape).to(case.dtype), case.grad_lse
        truth = _gradients(exact, exact_results, weights, retain_graph=True)
        result = _gradients(naive, naive_results, weights, retain_graph=True)
        yield {name: grad.double() - truth[name] for name, grad in result.items()}


def _largest(errors: Tensor) -> float:
    return errors.abs().max().item() if errors.numel() else 0.0


def check(case: Case, results: dict, truth: dict, naive: dict, context=""):
    """Shapes, dtypes and the tolerance rule for all results; the message repeats the case."""
    sizes = _cancelled_magnitudes(case) if "grad_query" in truth else {}
    for name, result in results.items():
        try:
            assert result.dtype == naive[name].dtype, f"{name} is {result.dtype}, must be {naive[name].dtype}"
            check_close(result, truth[name], naive[name], name, dtype=case.dtype, magnitude=sizes.get(name, 0.0))
        except AssertionError as failure:
            raise AssertionError(f"{context} {failure}\n{case}") from None


def _cancelled_magnitudes(case: Case) -> dict[str, float]:
    """Sizes of what cancels to nothing: an lse around 0; a query's dS, which sum to 0 without a sink, where a mask is
    constant along the keys, where it sees keys of one row or column of the map, and where it sees one key."""
    sizes = {"lse": 1.0}
    query, key, value = (case.tensors[n].double().nan_to_num(0) for n in ("query", "key", "value"))
    if "sinks" in case.tensors or not query.numel() or not key.numel():
        return sizes
    scale = abs(case.options.get("scale", query.shape[-1] ** -0.5))
    term = case.grad_out.double().norm(dim=-1).max().item() * value.norm(dim=-1).max().item()
    term /= 1.0 - case.options.get("dropout_p", 0.0)
    if (mask := case.tensors.get("mask")) is not None and mask.shape[-1] == 1 < key.shape[-2]:
        sizes["grad_mask"] = term * query.shape[0] * query.shape[1] * query.shape[2] / mask.numel()
    visible = _visible_keys(case)
    if "rel_h" in case.tensors:
        seen = visible.unflatten(3, [case.tensors[name].shape[3] for name in ("rel_h", "rel_w")])
        sizes |= {f"grad_{n}": term for n, axis in (("rel_h", 4), ("rel_w", 3)) if (seen.any(axis).sum(3) == 1).any()}
    if not (visible.sum(-1) == 1).any():
        return sizes
    sizes |= {"grad_query": term * scale * key.abs().max().item(), "grad_key": term * scale * query.abs().max().item()}
    sizes["grad_alibi_slopes"] = term * max(query.shape[-2], key.shape[-2])  # distances
    return {**dict.fromkeys(("grad_mask", "grad_relative_bias"), term), **sizes}


def _visible_keys(case: Case) -> Tensor:
    """(B, Hq, Sq, Sk), packed (Tq, Hq, Tk), of bool: where equal scores put weight."""
    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "causal", "window", "global_keys")
    options = {name: case.options[name] for name in (*names, "key_lengths") if name in case.options}
    mask = case.options.get("mask", case.tensors.get("mask"))
    if mask is not None:
        options["mask"] = mask if mask.dtype == torch.bool else mask != -math.inf
    query, key = (torch.zeros_like(case.tensors[name], dtype=torch.float32) for name in ("query", "key"))
    identity = torch.eye(key.shape[0 if case.packed else 2], device=key.device)
    value = identity[:, None].expand(-1, key.shape[1], -1) if case.packed else identity.expand(*key.shape[:2], -1, -1)
    return formula(packed=case.packed)(query=query, key=key, value=value, **options) > 0


def check_rows_of_least_numbers(backend: str, dtype: torch.dtype, length=40, device="cpu"):
    """Rows masked with nothing but -1e9, or the least number of the type, as hosts do it: their keys weigh the same."""
    generator = torch.Generator().manual_seed(0)
    *leaves, weight = (torch.randn(1, 2, length, 16, generator=generator).to(dtype).to(device) for _ in range(4))
    mask = torch.zeros(length, length, device=device)
    mask[2], mask[5], mask[6, : length // 2] = torch.finfo(torch.float32).min, -1e9, -1e9

    def gradients(function, dtype):
        tensors = [*(t.detach().to(dtype).requires_grad_() for t in leaves), mask.clone().requires_grad_()]
        out = function(query=tensors[0], key=tensors[1], value=tensors[2], mask=tensors[3])
        return [out, *torch.autograd.grad(out, tensors, weight.to(dtype))]

    with unwritten_memory_is_nan():
        results = gradients(on_backend(backend), dtype)
    exact, naive = (gradients(reference.attention, d) for d in (torch.float32, dtype))
    names = "out", "grad_query", "grad_key", "grad_value", "grad_mask"
    for name, result, wanted, formula in zip(names, results, exact, naive, strict=True):
        check_close(result, wanted, formula, f"{backend}: {name}", dtype=dtype)


@contextlib.contextmanager
def unwritten_memory_is_nan():
    """torch.empty fills with NaN inside, so that an element no kernel wrote shows."""
    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was[0], warn_only=was[1])
