"""Attention in code that computes its scores itself, followed (follow.py) and computed by `xformer_fast.attention`.

A product that may be scores, Q K^T, gives the host a `Scores`. It notes what the host does with it and becomes one call
when the weights meet V. So one path serves every module, whatever its names, projections, caches and rotations are:

    matmul, @, bmm, baddbmm, einsum       the products
    * /                                   a number, or a tensor that does not vary along the keys: goes to Q
    + -                                   biases and additive masks, broadcast as they are; a `Bias` keeps its structure
    masked_fill, where: -1e4 or less      a boolean mask, with which weights may be filled with 0 again
    max with the lowest number            nothing
    softmax over the keys, dropout        in any spelling
    view, reshape, float, to, type_as     of scores and weights, batch and heads apart or together
    a[..., None] + b[..., None, :]        decomposed relative positions, with the axes of a map: SAM's, MViT's

Different from the host by intent: a masked key is left out, where hosts add a large negative number, and a query with
no key left gives zeros. Queries and keys must not be written to between the product and the softmax.
"""

import copy
import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.attention import attention, scaled_dot_product_attention
from .common import add_mask
from .follow import Apart, Followed, Trace, begins, cast_of, real, sizes_of, takes_all

_OPTIONS = "attention with these options"
_HIDES = -1e4  # what is filled in with at most this number is masked


class Scores(Followed):
    """query @ key^T · scale + shift + biases; query (*lead, Sq, D), key (*lead, Sk, D), tensors or tokens that moved.

    With `cosine` query and key stand for their unit vectors, and `factor`, a tensor that broadcasts over keys, is part
    of the scale. `shift` is a number: softmax takes no notice of it, other functions do. A bias is a tensor that
    broadcasts to the scores, bool (True attends) or added, or a `Bias`. `cast` is the dtype that the host gave the
    scores; the kernels choose their own precision. `filled` are the masks that the host filled in.
    """

    weights = True

    def __init__(
        self, trace: Trace, query, key, scale=1.0, shift=0.0, biases=(), cosine=False, factor=None, cast=None, filled=()
    ):
        self.trace, self.query, self.key, self.scale, self.shift = trace, query, key, scale, shift
        self.biases, self.cosine, self.factor, self.cast, self.filled = biases, cosine, factor, cast, filled

    @property
    def shape(self):
        return torch.Size((*self.query.shape[:-1], self.key.shape[-2]))

    @property
    def dtype(self):
        return self.cast or self.query.dtype

    @property
    def device(self):
        return self.query.device

    def but(self, **changes) -> "Scores":
        names = ("query", "key", "scale", "shift", "biases", "cosine", "factor", "cast", "filled")
        return Scores(self.trace, **{name: getattr(self, name) for name in names} | changes)

    def operands(self) -> tuple[Tensor, Tensor]:
        """query and key as tensors, unit vectors and factor done."""
        query, key = real(self.query), real(self.key)
        if self.cosine:
            query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
        return (query if self.factor is None else query * self.factor), key

    def compute(self):
        query, key = self.operands()
        scores = query @ key.transpose(-1, -2) * self.scale
        scores = scores if self.cast is None else scores.to(self.cast)
        scores = scores + self.shift if self.shift else scores
        lowest = torch.finfo(scores.dtype).min
        for bias in self.biases:
            bias = bias.spread() if isinstance(bias, Bias) else bias
            scores = scores.masked_fill(~bias, lowest) if bias.dtype == torch.bool else scores + bias
        return scores

    def on_mul(self, a, b):
        x = b if a is self else a
        if isinstance(x, Tensor):
            if x.dim() > len(self.shape) or (x.dim() and x.shape[-1] != 1) or self.shift:
                return NotImplemented
            scaled = {"factor": x if self.factor is None else self.factor * x}
        elif isinstance(x, Followed):
            return NotImplemented
        else:
            scaled = {"scale": self.scale * x, "shift": self.shift * x}
        if any(isinstance(bias, Followed) or bias.dtype == torch.bool for bias in self.biases):
            return NotImplemented
        return self.but(**scaled, biases=tuple(bias * x for bias in self.biases))

    def on_div(self, a, b, **kwargs):
        return self.on_mul(a, 1 / b) if a is self and not kwargs and not isinstance(b, Followed) else NotImplemented

    def on_add(self, a, b, **kwargs):
        bias = b if a is self else a
        if isinstance(bias, int | float) and not kwargs:
            return self.but(shift=self.shift + bias)
        if isinstance(bias, Scores) and not kwargs:
            return self._plus(bias)
        parts = bias.parts if isinstance(bias, Sum) else (bias,)
        fits = (
            part.shape == self.shape if isinstance(part, Decomposed) else isinstance(part, Bias) or self._takes(part)
            for part in parts
        )
        if kwargs or not all(fits):
            return NotImplemented
        return self.but(biases=(*self.biases, *parts))

    def _plus(self, other: "Scores"):
        """Two products as one, features side by side: LiLT's, of text and of layout."""
        parts = self, other
        plain = all(isinstance(s.query, Tensor) and not s.cosine and s.factor is None for s in parts)
        if not plain or self.shape != other.shape or self.dtype != other.dtype:
            return NotImplemented
        query = torch.cat([s.query * s.scale for s in parts], -1)
        key = torch.cat([s.key for s in parts], -1)
        biases = (*self.biases, *other.biases)
        return Scores(self.trace, query, key, shift=self.shift + other.shift, biases=biases, cast=self.cast)

    def on_sub(self, a, b, **kwargs):
        return self.on_add(a, -b, **kwargs) if a is self and isinstance(b, Tensor) else NotImplemented

    def _takes(self, bias) -> bool:
        """Is it a tensor that broadcasts to the scores, and not the other way round?"""
        if not isinstance(bias, Tensor) or bias.dim() > len(self.shape):
            return False
        ours = self.shape[len(self.shape) - bias.dim() :]
        return all(size == 1 or size == our for size, our in zip(bias.shape, ours, strict=True))

    def on_masked_fill(self, x, mask, value):
        if isinstance(value, Tensor) or value > _HIDES:
            return NotImplemented
        keep = mask.inverted() if isinstance(mask, Bias) else ~mask if self._takes(mask) else NotImplemented
        if keep is NotImplemented:
            return NotImplemented
        return self.but(biases=(*self.biases, keep), filled=(*self.filled, mask))

    def on_max(self, a, b=None, **kwargs):
        least = b if a is self else a
        if kwargs or not isinstance(least, Tensor) or least.dim() or not least.is_cpu or torch.compiler.is_compiling():
            return NotImplemented
        return self if float(least) <= torch.finfo(self.dtype).min else NotImplemented

    def on_getitem(self, x, index):
        plain = takes_all(index, self.shape) and not torch.compiler.is_compiling()
        return ScoresOfMap(self) if plain else NotImplemented

    def on_setitem(self, x, index, value):
        """scores[:, :] = scores[:, :] + more"""
        if not takes_all(index, self.shape) or not isinstance(value, Scores) or value.query is not self.query:
            return NotImplemented
        self.__dict__.update(value.__dict__)

    def on_where(self, *args):
        condition, x, other = args if len(args) == 3 and args[1] is self else (args[1], args[0], args[-1])
        if isinstance(other, Tensor) and not other.dim() and other.is_cpu and not torch.compiler.is_compiling():
            other = float(other)
        if x is not self or len(args) != 3 or isinstance(other, Tensor | Followed) or other > _HIDES:
            return NotImplemented
        return self.but(biases=(*self.biases, condition)) if self._takes(condition) else NotImplemented

    def on_cast(self, x, *args, **kwargs):
        return self.but(cast=cast_of(self.dtype, *args, **kwargs))

    def on_view(self, x, *sizes):
        lead = _lead_of(self.shape, sizes)
        if lead is None:
            return NotImplemented
        old = self.shape[:-2]
        *biases, factor = (x if x is None else regrouped(x, old, lead) for x in (*self.biases, self.factor))
        query, key = (t.reshape(*lead, *t.shape[-2:]) for t in (self.query, self.key))
        return self.but(query=query, key=key, biases=tuple(biases), factor=factor, filled=())

    def on_view_as(self, x, other):
        return self.on_view(x, *other.shape)

    def on_softmax(self, x, dim=None, dtype=None, **kwargs):
        if dim not in (-1, len(self.shape) - 1):
            return NotImplemented
        return Weights(self if dtype is None else self.but(cast=dtype))


class ScoresOfMap(Followed):
    """All of some scores, queries and keys with the axes of a map once they are viewed so, and what is added there."""

    weights = True

    def __init__(self, scores: Scores, sizes: tuple = (), added: tuple = ()):
        self.trace, self.scores, self.sizes, self.added = scores.trace, scores, sizes, added

    @property
    def shape(self):
        return torch.Size(self.sizes or self.scores.shape)

    @property
    def dtype(self):
        return self.scores.dtype

    @property
    def device(self):
        return self.scores.device

    def compute(self):
        return functools.reduce(torch.add, self.added, self.scores.real().reshape(self.shape))

    def on_view(self, x, *sizes):
        sizes, shape = sizes_of(sizes), self.scores.shape
        if sizes and sizes.count(-1) == 1:
            sizes[sizes.index(-1)] = math.prod(shape) // -math.prod(sizes)
        if not self.sizes and sizes and len(sizes) == len(shape) + 2:
            queries, keys = math.prod(sizes[-4:-2]), math.prod(sizes[-2:])
            fits = [*sizes[:-4], queries, keys] == list(shape)
            return ScoresOfMap(self.scores, tuple(sizes)) if fits else NotImplemented
        if not self.sizes or sizes != list(shape) or len(self.added) != 2:
            return NotImplemented
        lead, (height, width) = shape[:-1], self.sizes[-2:]
        rows = [x for x in self.added if x.shape == (*self.sizes[:-1], 1)]
        columns = [x for x in self.added if x.shape == (*self.sizes[:-2], 1, width)]
        if len(rows) != 1 or len(columns) != 1:
            return NotImplemented
        rel = Decomposed(self.trace, rows[0].reshape(*lead, height), columns[0].reshape(*lead, width), True)
        return self.scores.but(biases=(*self.scores.biases, rel))

    def on_add(self, a, b, **kwargs):
        more = b if a is self else a
        if kwargs or not self.sizes or not isinstance(more, Tensor) or more.dim() != len(self.sizes):
            return NotImplemented
        return ScoresOfMap(self.scores, self.sizes, (*self.added, more))


class Weights(Followed):
    """softmax(scores), some of them dropped."""

    weights = True

    def __init__(self, scores: Scores, dropout_p: float = 0.0):
        self.trace, self.scores, self.dropout_p = scores.trace, scores, dropout_p

    @property
    def shape(self):
        return self.scores.shape

    @property
    def dtype(self):
        return self.scores.dtype

    @property
    def device(self):
        return self.scores.device

    def leave(self):
        return None if self.trace.attended else self.real()

    def compute(self):
        return F.dropout(F.softmax(self.scores.real(), dim=-1), self.dropout_p)

    def on_dropout(self, x, p=0.5, training=True, inplace=False):
        if not training or not p:
            return self
        return NotImplemented if self.dropout_p else Weights(self.scores, p)

    def on_masked_fill(self, x, mask, value):
        """0 where the scores were filled in: those weights are 0."""
        again = any(mask is filled for filled in self.scores.filled) and not self.dropout_p
        return self if again and not isinstance(value, Tensor) and value == 0 else NotImplemented

    def on_cast(self, x, *args, **kwargs):
        return Weights(self.scores.on_cast(x, *args, **kwargs), self.dropout_p)

    def on_view(self, x, *sizes):
        scores = self.scores.on_view(x, *sizes)
        return NotImplemented if scores is NotImplemented else Weights(scores, self.dropout_p)

    def on_view_as(self, x, other):
        return self.on_view(x, *other.shape)

    def on_matmul(self, a, b):
        return self.attend(b) if a is self else NotImplemented

    def on_einsum(self, equation, *operands):
        letters = _letters(equation)
        if letters is None or len(operands) != 2 or operands[0] is not self:
            return NotImplemented
        (weights, value), out = letters
        *batch, q, k = weights
        rest = set(value) - {*batch, k}
        if len(rest) != 1 or len(value) != len(batch) + 2 or {*out} != {*batch, q, *rest}:
            return NotImplemented
        (d,) = rest
        result = self.attend(operands[1].permute([value.index(x) for x in (*batch, k, d)]))
        return result if result is NotImplemented else result.permute([(*batch, q, d).index(x) for x in out])

    def attend(self, value):
        """weights @ value, (*lead, Sq, Dv)."""
        scores = self.scores
        if value.dtype != scores.dtype and not torch.is_autocast_enabled(value.device.type):
            return NotImplemented
        if isinstance(scores.query, Followed):
            result = scores.query.attend(self, value)
            if result is not NotImplemented:
                self.trace.attended = True
                return result
            self.trace.unknown = self.trace.unknown or _OPTIONS
        value = real(value)
        query, key = scores.operands()
        lead = query.shape[:-2]
        if value.shape[:-2] != lead or key.shape[:-2] != lead:
            return NotImplemented
        rules = [bias for bias in scores.biases if isinstance(bias, Rule)]
        rows = rules[0].shape[0] if rules else math.prod(lead[:-1])
        folded = rows, math.prod(lead) // max(rows, 1)
        query, key, value = (t.reshape(*folded, *t.shape[-2:]) for t in (query, key, value))
        call = {"query": query, "key": key, "value": value, "mask": None, "scale": scores.scale}
        for rule in rules:
            rule.apply(call)
        for bias in scores.biases:
            if not isinstance(bias, Rule):
                add_mask(call, regrouped(real(bias), lead, folded))
        self.trace.attended = True
        out = attention(**call, dropout_p=self.dropout_p, backend=self.trace.backend)
        if self.trace.overwrites and out.requires_grad:  # backward reads it
            out = out.clone()
        return out.reshape(*lead, *out.shape[-2:])


class Unit(Followed):
    """x over its norm along the last axis; `transposed`: its last two axes are exchanged."""

    def __init__(self, trace: Trace, x, transposed: bool = False):
        self.trace, self.x, self.transposed = trace, x, transposed

    @property
    def shape(self):
        *lead, rows, columns = self.x.shape
        return torch.Size((*lead, columns, rows) if self.transposed else (*lead, rows, columns))

    @property
    def dtype(self):
        return self.x.dtype

    @property
    def device(self):
        return self.x.device

    def compute(self):
        unit = F.normalize(real(self.x), dim=-1)
        return unit.transpose(-1, -2) if self.transposed else unit

    def on_transpose(self, x, dim0, dim1):
        axes = len(self.shape)
        last = {dim0 % axes, dim1 % axes} == {axes - 2, axes - 1}
        return Unit(self.trace, self.x, not self.transposed) if last else NotImplemented

    def on_matmul(self, a, b):
        if not (isinstance(a, Unit) and isinstance(b, Unit)) or a.transposed or not b.transposed:
            return NotImplemented
        scores = product(self.trace, a.x, b.x.transpose(-1, -2))
        return scores if scores is NotImplemented else scores.but(cosine=True)


# Biases that keep their structure


class Bias(Followed):
    """Something to be added to scores, or a mask of them."""

    views = ()  # the leading sizes, before and after, of each view that scores have had since it was added

    def inverted(self):
        """A bool mask that is True where this one is False."""
        return NotImplemented

    def regrouped(self, old, new) -> "Bias":
        """For scores whose leading sizes change from `old` to `new`."""
        twin = copy.copy(self)
        twin.views = (*self.views, (tuple(old), tuple(new)))
        return twin

    def spread(self) -> Tensor:
        """The tensor, in the shape that it broadcasts to those scores in."""
        return functools.reduce(lambda bias, view: regrouped(bias, *view), self.views, self.real())

    def on_add(self, a, b, **kwargs):
        other = b if a is self else a
        if isinstance(other, Scores):
            return other.on_add(a, b, **kwargs)
        parts = other.parts if isinstance(other, Sum) else (other,)
        return NotImplemented if kwargs else Sum(self.trace, (self, *parts))

    def on_scaled_dot_product_attention(self, *args, **kwargs):
        return sdpa(*args, **kwargs)


class Rule(Bias):
    """A bias that `apply` brings into the arguments of a call of `attention`."""

    def leave(self):
        return self

    def apply(self, call: dict):
        raise NotImplementedError


class Sum(Bias):
    """Biases kept apart."""

    def __init__(self, trace: Trace, parts: tuple):
        self.trace, self.parts = trace, parts

    @property
    def shape(self):
        return torch.broadcast_shapes(*(part.shape for part in self.parts))

    @property
    def dtype(self):
        return self.parts[0].dtype

    @property
    def device(self):
        return self.parts[0].device

    def compute(self):
        return functools.reduce(torch.add, map(real, self.parts))


class Decomposed(Rule):
    """rel_h[..., None] + rel_w[..., None, :]: (*lead, h, w, H) and (*lead, h, w, W), until the host makes one axis of
    the queries' h and w, and one of the keys' H and W: `flat`.
    """

    def __init__(self, trace: Trace, rel_h: Tensor, rel_w: Tensor, flat: bool = False):
        self.trace, self.rel_h, self.rel_w, self.flat = trace, rel_h, rel_w, flat

    @property
    def shape(self):
        sides = self.rel_h.shape[-1], self.rel_w.shape[-1]
        return torch.Size((*self.rel_h.shape[:-1], *([math.prod(sides)] if self.flat else sides)))

    @property
    def dtype(self):
        return self.rel_h.dtype

    @property
    def device(self):
        return self.rel_h.device

    def leave(self):
        return self.real()

    def compute(self):
        return (self.rel_h.unsqueeze(-1) + self.rel_w.unsqueeze(-2)).reshape(self.shape)

    def on_view(self, x, *sizes):
        shape = self.shape
        flat = shape if self.flat else (*shape[:-4], shape[-4] * shape[-3], shape[-2] * shape[-1])
        lead = _lead_of(flat, sizes)
        if lead is None:
            return NotImplemented
        rel_h, rel_w = (rel.reshape(*lead, flat[-2], rel.shape[-1]) for rel in (self.rel_h, self.rel_w))
        return Decomposed(self.trace, rel_h, rel_w, True)

    def on_view_as(self, x, other):
        return self.on_view(x, *other.shape)

    def on_unflatten(self, x, dim, sizes):
        return self.on_view(x, *self.shape[:dim], *sizes, *self.shape[dim + 1 :]) if dim >= 0 else NotImplemented

    def apply(self, call: dict):
        lead = call["query"].shape[:3]
        call["decomposed_bias"] = tuple(rel.reshape(*lead, rel.shape[-1]) for rel in (self.rel_h, self.rel_w))


# Where following begins


@begins("matmul")
def product(trace: Trace, a, b):
    """a (*lead, Sq, D) @ b (*lead, D, Sk) as scores."""
    return scores_of(trace, a, b.transpose(-1, -2)) if len(b.shape) > 2 else NotImplemented


def scores_of(trace: Trace, query, key):
    """query (*lead, Sq, D) and key (*lead, Sk, D) as scores."""
    if trace.maps and isinstance(query, Tensor):  # attention in such a block is followed by itself, if it has to be
        return NotImplemented
    shape = query.shape
    fits = len(shape) > 2 and len(key.shape) == len(shape) and key.shape[:-2] == shape[:-2]
    return Scores(trace, query, key) if fits else NotImplemented


@begins("baddbmm")
def _baddbmm(trace: Trace, bias, batch1, batch2, *, beta=1, alpha=1):
    scores = product(trace, batch1, batch2)
    if scores is NotImplemented or not isinstance(bias, Tensor):
        return NotImplemented
    return scores.but(scale=alpha, biases=(bias if beta == 1 else bias * beta,) if beta else ())


@begins("einsum")
def _einsum(trace: Trace, equation, *operands):
    operands = operands[0] if len(operands) == 1 and not isinstance(operands[0], Tensor) else operands
    letters = _letters(equation)
    if letters is None or len(operands) != 2 or not all(isinstance(x, Tensor) for x in operands):
        return NotImplemented
    (first, second), out = letters
    shared = (set(first) & set(second)) - set(out)
    if len(shared) != 1 or len(out) < 3:
        return NotImplemented
    *batch, q, k = out
    (d,) = shared
    if {*first} != {*batch, q, d} or {*second} != {*batch, k, d}:
        return NotImplemented
    query = operands[0].permute([first.index(x) for x in (*batch, q, d)])
    return product(trace, query, operands[1].permute([second.index(x) for x in (*batch, d, k)]))


def _letters(equation) -> tuple[list[str], str] | None:
    """ "bqd,bkd->bqk" as its terms and its result; None where a letter comes twice in one, or the result is implied."""
    if not isinstance(equation, str) or "->" not in equation or "." in equation:
        return None
    terms, out = equation.replace(" ", "").split("->")
    terms = terms.split(",")
    return (terms, out) if len(terms) == 2 and all(len({*t}) == len(t) for t in (*terms, out)) else None


@begins("normalize")
def _normalize(trace: Trace, x, p=2.0, dim=1, eps=1e-12, out=None):
    if trace.maps or torch.compiler.is_compiling():  # torch.compile knows no @ of two objects
        return NotImplemented
    last = x.dim() >= 3 and dim in (-1, x.dim() - 1)
    return Unit(trace, x) if p == 2 and eps == 1e-12 and out is None and last else NotImplemented


@begins("add")
def _outer_sum(trace: Trace, a, b, **kwargs):
    if trace.maps or kwargs or not isinstance(b, Tensor) or not a.dim() == b.dim() == 5:
        return NotImplemented
    outer = a.shape[-1] == b.shape[-2] == 1 and a.shape[:-2] == b.shape[:-2]
    return Decomposed(trace, a.squeeze(-1), b.squeeze(-2)) if outer else NotImplemented


@begins("scaled_dot_product_attention")
def _sdpa(trace: Trace, *args, **kwargs):
    trace.attended = True
    return scaled_dot_product_attention(*args, **kwargs, backend=trace.backend)


def sdpa(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """scaled_dot_product_attention of a query, or with a mask, that is a Followed."""
    trace = (query if isinstance(query, Followed) else attn_mask).trace
    with Apart(trace):
        result = NotImplemented
        if not is_causal and not enable_gqa:
            scores = scores_of(trace, query, key)
            if scores is not NotImplemented and attn_mask is not None:
                boolean = isinstance(attn_mask, Tensor) and attn_mask.dtype == torch.bool
                scores = scores.but(biases=(attn_mask,)) if boolean else scores.on_add(scores, attn_mask)
            if scores is not NotImplemented:
                scale = query.shape[-1] ** -0.5 if scale is None else scale
                result = Weights(scores.but(scale=scale), dropout_p).attend(value)
        if result is NotImplemented:
            trace.unknown = trace.unknown or _OPTIONS
            tensors = map(real, (query, key, value, attn_mask))
            result = _sdpa(trace, *tensors, dropout_p, is_causal, scale, enable_gqa)
    return result


# Shapes


def _lead_of(shape, sizes) -> list[int] | None:
    """The leading sizes of a view of `shape` whose last two sizes stay, -1 worked out; None for another view."""
    sizes = sizes_of(sizes)
    if sizes is None or len(sizes) < 2:
        return None
    if -1 in sizes:
        sizes[sizes.index(-1)] = math.prod(shape) // math.prod([size for size in sizes if size != -1])
    return sizes[:-2] if sizes[-2] == shape[-2] and sizes[-1] == shape[-1] else None


def regrouped(bias, old, new):
    """A bias of scores whose leading sizes `old` become `new`; a copy only where it varies along a part of an axis."""
    if isinstance(bias, Bias):
        return bias.regrouped(old, new)
    if bias.dim() <= 2:
        return bias
    lead = (1,) * (len(old) + 2 - bias.dim()) + tuple(bias.shape[:-2])
    if all(size == 1 for size in lead):
        return bias[(0,) * (bias.dim() - 2)]
    sizes, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        first, second = i, j
        before = after = 1
        while before != after or (i, j) == (first, second):
            if before <= after and i < len(old):
                before, i = before * old[i], i + 1
            elif j < len(new):
                after, j = after * new[j], j + 1
            else:
                break
        part = lead[first:i]
        if all(size == 1 for size in part):
            sizes += [1] * (j - second)
        elif list(part) == list(old[first:i]):
            sizes += list(new[second:j])
        else:
            return bias.expand(*old, -1, -1).reshape(*new, *bias.shape[-2:])
    return bias.reshape(*sizes, *bias.shape[-2:])
