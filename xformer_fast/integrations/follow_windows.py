"""Tokens of a map that a host rolls, cuts into windows and puts back: followed (follow.py), not moved.

Swin's blocks (and MaxViT's, with grids) roll a map (B, H, W, C), cut it by a view and a permutation into windows, treat
every token alike (projections, norms), attend inside each window, and undo all of it. `Moved` stands for such a tensor:
the map stays where it lies, and each axis of what the host sees is a list of axes of the map,

    view (B, H/w, w, W/w, w, C), permute (0, 1, 3, 2, 4, 5), view (-1, w * w, C)   ->   [b x0 x1] [y0 y1] [C]

with x and y for the outer and the inner part of a side. What treats tokens alike is done on the map; attention over
[y0 y1] (windows) or [x0 x1] (grids) is one call of `window_attention`; when the axes are back in order the map itself
comes out. Anything else moves the tokens as the host would, and the host goes on: padding after a roll, biases that
differ from window to window, dropout of weights.

The mask of shifted windows is recognised by its shape (windows, N, N) and by its values: all of them once for each
geometry, those of one window every time. torch.compile cannot look at values: there its shape has to be enough, and
where a bias (heads, N, N) would have the same one, tokens are moved. The kernel leaves out what the mask marks, where
hosts add -100, and reads no mask.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..dispatch import DEFAULT
from ..ops.window_attention import explain, window_attention
from .follow import Followed, Trace, begins, sizes_of, takes_all
from .follow_attention import Bias, Unit, Weights, product, sdpa

_MARK = -90.0  # an addend that hides: Swin's is -100


def windows_run(weight: Tensor | None, backend: str | None) -> bool:
    """Does `window_attention` run, by a kernel or where it is asked for, on modules with this weight?"""
    if weight is None or weight.is_meta:
        return True
    probe = torch.empty(0, 1, 1, 1, 32, device=weight.device)
    against = explain(probe, probe, probe, 1)
    chosen = backend or DEFAULT or next(name for name, reason in against.items() if not reason)
    return against.get(chosen) == "" and (chosen != "reference" or weight.is_cpu or backend == chosen)


@dataclass(frozen=True)
class Windows:
    """Sides of a map, sides of its windows, and how far it was rolled before it was cut."""

    sides: tuple[int, int]
    window: tuple[int, int]
    shift: tuple[int, int]

    @property
    def count(self):
        return math.prod(self.sides) // math.prod(self.window)


class Moved(Followed):
    """`base` (B, H, W, *features), of which the host sees a rearrangement.

    cut: ((x0, y0), (x1, y1)), the sizes of the two parts of each side; before the cut x is the whole side and y is 1.
    axes: for each axis that the host sees, the axes of the map that make it up: "b", "x0", "y0", "x1", "y1", or the
    index of a feature axis. Axes of size 1 are left out.
    """

    def __init__(self, trace: Trace, base: Tensor, cut, shift, axes):
        self.trace, self.base, self.cut, self.shift, self.axes = trace, base, cut, shift, axes
        batch, _, _, *features = base.shape
        (x0, y0), (x1, y1) = cut
        self.lengths = {"b": batch, "x0": x0, "y0": y0, "x1": x1, "y1": y1, **dict(enumerate(features))}
        self._shape = None

    @property
    def shape(self):
        if self._shape is None:
            self._shape = torch.Size([math.prod([self.lengths[axis] for axis in group]) for group in self.axes])
        return self._shape

    @property
    def dtype(self):
        return self.base.dtype

    @property
    def device(self):
        return self.base.device

    def of(self, base: Tensor, axes=None) -> "Moved":
        return Moved(self.trace, base, self.cut, self.shift, self.axes if axes is None else tuple(map(tuple, axes)))

    @property
    def features(self) -> list[int]:
        """The feature axes of the map that are longer than 1."""
        return [i for i, size in enumerate(self.base.shape[3:]) if size != 1]

    def in_place(self):
        """The map itself, where the host sees it in order and rolled back."""
        return self.base if not any(self.shift) and self.axes == self.whole else self

    @property
    def whole(self):
        """The axes of the map in order."""
        return _cached(_in_order, tuple(self.lengths.items()))

    def compute(self):
        base = torch.roll(self.base, [-s for s in self.shift], (1, 2)) if any(self.shift) else self.base
        batch, _, _, *features = base.shape
        base = base.reshape(batch, *self.cut[0], *self.cut[1], *features)
        places = {"b": 0, "x0": 1, "y0": 2, "x1": 3, "y1": 4} | {i: 5 + i for i in range(len(features))}
        order = [places[axis] for group in self.axes for axis in group]
        dropped = [place for place in places.values() if place not in order]
        return base.permute(*order, *dropped).reshape(self.shape)

    # what rearranges

    def on_view(self, x, *sizes):
        sizes = sizes_of(sizes)
        if sizes is None:
            return NotImplemented
        if -1 in sizes:
            known = math.prod([size for size in sizes if size != -1])
            sizes[sizes.index(-1)] = math.prod(self.shape) // known
        if self.axes == self.whole and len(sizes) == 6 and all(y == 1 for _, y in self.cut):
            return _cut(self.trace, self.base, sizes, self.shift) if _cuts(self.base, sizes) else NotImplemented
        plan = _cached(_split, tuple(self.lengths.items()), self.axes, tuple(sizes))
        if plan is None:
            return NotImplemented
        features, axes = plan
        return self.of(self.base.reshape(*self.base.shape[:3], *features), axes).in_place()

    def on_view_as(self, x, other):
        return self.on_view(x, *other.shape)

    def on_flatten(self, x, start_dim=0, end_dim=-1):
        shape = self.shape
        start, end = start_dim % len(shape), end_dim % len(shape)
        return self.on_view(x, *shape[:start], math.prod(shape[start : end + 1]), *shape[end + 1 :])

    def on_unflatten(self, x, dim, sizes):
        shape = self.shape
        dim = dim % len(shape)
        return self.on_view(x, *shape[:dim], *sizes, *shape[dim + 1 :])

    def on_permute(self, x, *order):
        order = order[0] if len(order) == 1 and isinstance(order[0], tuple | list) else order
        return self.of(self.base, [self.axes[i] for i in order]).in_place()

    def on_transpose(self, x, dim0, dim1):
        axes = list(self.axes)
        axes[dim0], axes[dim1] = axes[dim1], axes[dim0]
        return self.of(self.base, axes).in_place()

    def on_unbind(self, x, dim=0):
        size = self.shape[dim]
        return tuple(self._select(dim, i) for i in range(size)) if self._feature(dim) is not None else NotImplemented

    def on_getitem(self, x, index):
        if isinstance(index, bool) or not isinstance(index, int):
            return self if takes_all(index, self.shape) else NotImplemented
        return self._select(0, index) if self._feature(0) is not None else NotImplemented

    def _feature(self, dim) -> int | None:
        """The feature axis that is all of an axis that the host sees."""
        group = self.axes[dim]
        return group[0] if len(group) == 1 and isinstance(group[0], int) else None

    def _select(self, dim, i):
        feature, place = self._feature(dim), dim % len(self.axes)
        axes = [group for number, group in enumerate(self.axes) if number != place]
        axes = [[x - 1 if isinstance(x, int) and x > feature else x for x in group] for group in axes]
        return self.of(self.base.select(3 + feature, i), axes)

    def on_chunk(self, x, chunks, dim=0):
        feature = self._feature(dim)
        if feature is None or self.lengths[feature] % chunks or self.lengths[feature] == chunks:
            return NotImplemented
        return tuple(self.of(part) for part in self.base.chunk(chunks, 3 + feature))

    # what treats every token alike

    def on_linear(self, x, weight, bias=None):
        if not isinstance(weight, Tensor) or list(self.axes[-1]) != self.features:
            return NotImplemented
        base = F.linear(self.base.flatten(3), weight, bias)
        return self.of(base, (*self.axes[:-1], () if weight.shape[0] == 1 else (0,))).in_place()

    def on_layer_norm(self, x, normalized_shape, weight=None, bias=None, eps=1e-5):
        if len(normalized_shape) != 1 or list(self.axes[-1]) != self.features or self.base.dim() != 4:
            return NotImplemented
        return self.of(F.layer_norm(self.base, normalized_shape, weight, bias, eps))

    def on_normalize(self, x, p=2.0, dim=1, eps=1e-12, out=None):
        last = dim in (-1, len(self.axes) - 1)
        return Unit(self.trace, self) if p == 2 and eps == 1e-12 and out is None and last else NotImplemented

    def on_dropout(self, x, p=0.5, training=True, inplace=False):
        return self.of(F.dropout(self.base, p, training)) if p and training else self

    def on_cast(self, x, *args, **kwargs):
        return self.of(self.base.to(*args, **kwargs)) if args or kwargs else self.of(self.base.float())

    def on_add(self, a, b, **kwargs):
        return NotImplemented if kwargs else self._with(torch.add, b if a is self else a)

    def on_mul(self, a, b):
        return self._with(torch.mul, b if a is self else a)

    def on_div(self, a, b, **kwargs):
        return self._with(torch.div, b) if a is self and not kwargs else NotImplemented

    def _with(self, function, other):
        if isinstance(other, Moved):
            alike = other.axes == self.axes and other.cut == self.cut and other.shift == self.shift
            alike = alike and other.base.shape == self.base.shape
            return self.of(function(self.base, other.base)) if alike else NotImplemented
        if isinstance(other, Followed):
            return NotImplemented
        if isinstance(other, Tensor) and other.dim():
            other = self._aligned(other)
            if other is None:
                return NotImplemented
        return self.of(function(self.base, other))

    def _aligned(self, other: Tensor) -> Tensor | None:
        """A tensor that broadcasts to what the host sees, alike for all tokens, as one that broadcasts to the map."""
        if other.dim() > len(self.axes):
            return None
        sizes, order = [], []
        for size, group in zip(other.shape, self.axes[len(self.axes) - other.dim() :], strict=True):
            if size != 1:
                if not all(isinstance(axis, int) for axis in group):
                    return None
                sizes += [self.lengths[axis] for axis in group]
                order += group
        features = self.base.dim() - 3
        other = other.reshape(sizes).permute(sorted(range(len(order)), key=order.__getitem__))
        return other.reshape([self.lengths[i] if i in order else 1 for i in range(features)])

    def on_roll(self, x, shifts, dims=None):
        back = isinstance(dims, tuple | list) and tuple(dims) == (1, 2) and tuple(shifts) == self.shift
        return self.base if back and self.axes == self.whole else NotImplemented

    def on_pad(self, x, pad, mode="constant", value=None):
        return self if not any(pad) else NotImplemented

    # attention

    def _sides(self, part: str):
        return tuple(axis for axis in (f"{part}0", f"{part}1") if self.lengths[axis] != 1)

    def on_scaled_dot_product_attention(self, *args, **kwargs):
        return sdpa(*args, **kwargs)

    def on_matmul(self, a, b):
        return product(self.trace, a, b) if isinstance(a, Moved) and isinstance(b, Moved) else NotImplemented

    def attend(self, weights: Weights, value):
        """The attention of `weights`, whose query self is, inside windows."""
        scores = weights.scores
        moved = (self, scores.key, value)
        part = next((part for part in "yx" if self.axes[-2] == self._sides(part)), None)
        if part is None or weights.dropout_p or not all(isinstance(x, Moved) and _alike(x, self) for x in moved):
            return NotImplemented
        partition = {"y": "window", "x": "grid"}[part]
        window = self.lengths[f"{part}0"], self.lengths[f"{part}1"]
        bias, shifted = _biases(scores, self, window)
        if bias is NotImplemented or shifted != any(self.shift) or (shifted and partition == "grid"):
            return NotImplemented
        heads = [x.base if x.base.dim() == 5 else x.base.unsqueeze(3) for x in moved]
        options = {"scale": scores.scale}
        if scores.cosine:
            factor = _of_heads(scores.factor, self) if scores.factor is not None else None
            if factor is None:
                return NotImplemented
            options = {"logit_scale": factor.reshape(-1).expand(heads[0].shape[3]) * scores.scale}
        elif scores.factor is not None:
            return NotImplemented
        if shifted:
            options["shift"] = self.shift
        out = window_attention(*heads, window, bias=bias, partition=partition, backend=self.trace.backend, **options)
        return value.of(out.reshape(value.base.shape))


def _cached(function: Callable, *arguments):
    """What depends on sizes alone is found out once for each, where sizes are numbers and not symbols."""
    if torch.compiler.is_compiling():
        return function.__wrapped__(*arguments)
    try:
        hash(arguments)
    except TypeError:
        return function.__wrapped__(*arguments)
    return function(*arguments)


@functools.lru_cache(maxsize=1024)
def _in_order(lengths):
    lengths = dict(lengths)
    features = [(axis,) for axis in lengths if isinstance(axis, int)]
    order = ("b",), ("x0", "y0"), ("x1", "y1"), *features
    return tuple(tuple(axis for axis in group if lengths[axis] != 1) for group in order)


@functools.lru_cache(maxsize=4096)
def _split(lengths, axes, sizes):
    """`axes` viewed as `sizes`: the feature axes then, and the axes that the host sees; None: no view can be that."""
    lengths = dict(lengths)
    left = [(axis, lengths[axis]) for group in axes for axis in group]
    parts = [[] for axis in lengths if isinstance(axis, int)]  # the sizes that a feature axis is split into
    groups = []
    for size in sizes:
        group = []
        while size != 1:
            if not left:
                return None
            axis, length = left.pop(0)
            taken = size if size % length else length
            if taken != length:
                if length % taken or not isinstance(axis, int):
                    return None
                left.insert(0, (axis, length // taken))
            if isinstance(axis, int):
                parts[axis].append(taken)
                axis = axis, len(parts[axis]) - 1
            group.append(axis)
            size = size // taken
        groups.append(group)
    if left:
        return None
    parts = [part or [1] for part in parts]
    first = [sum(map(len, parts[:i])) for i in range(len(parts))]
    axes = [[first[axis[0]] + axis[1] if isinstance(axis, tuple) else axis for axis in group] for group in groups]
    return [size for part in parts for size in part], tuple(map(tuple, axes))


def _cuts(x: Tensor, sizes) -> bool:
    """Is (B, x0, y0, x1, y1, C) a view of the map?"""
    if x.dim() != 4 or x.shape[3] == 1:  # a map of numbers is a host's way to its mask
        return False
    return tuple(x.shape) == (sizes[0], sizes[1] * sizes[2], sizes[3] * sizes[4], sizes[5])


def _cut(trace: Trace, base: Tensor, sizes, shift) -> Moved:
    """The map seen as (B, x0, y0, x1, y1, C)."""
    cut = tuple(sizes[1:3]), tuple(sizes[3:5])
    moved = Moved(trace, base, cut, shift, ())
    names = ("b", "x0", "y0", "x1", "y1", 0)
    moved.axes = tuple((name,) if moved.lengths[name] != 1 else () for name in names)
    if any(shift):
        trace.windows = Windows(tuple(base.shape[1:3]), (cut[0][1], cut[1][1]), shift)
    return moved


def _alike(x: Moved, query: Moved) -> bool:
    """Are its tokens where the query's are, heads and channels in order behind them?"""
    if x.cut != query.cut or x.shift != query.shift or x.axes[:-1] != query.axes[:-1] or x.base.dim() not in (4, 5):
        return False
    *heads, channel = range(x.base.dim() - 3)
    within = [axis for group in x.axes[:-1] for axis in group if isinstance(axis, int)]
    return list(x.axes[-1]) == [channel][: x.base.shape[-1] != 1] and within == [h for h in heads if h in x.features]


def _biases(scores, query: Moved, window) -> tuple:
    """The biases of scores as one (H, N, N) or None, and whether one of them is the mask of shifted windows."""
    total, shifted = None, False
    heads = query.base.shape[3] if query.base.dim() == 5 else 1
    for bias in scores.biases:
        if isinstance(bias, Region):
            if torch.compiler.is_compiling() and bias.windows.count == heads:
                return NotImplemented, False  # is it the mask or the bias?
            shifted = True
            continue
        bias = bias if isinstance(bias, Tensor) and bias.dtype != torch.bool else None
        bias = None if bias is None else _of_heads(bias, query)
        if bias is None:
            return NotImplemented, False
        total = bias if total is None else total + bias
    if total is None:
        return None, shifted
    return total.expand(heads, math.prod(window), math.prod(window)), shifted


def _of_heads(x: Tensor, query: Moved) -> Tensor | None:
    """A tensor that broadcasts to scores, as (heads or 1, rows, columns); None where it varies in batch or windows."""
    lead = (1,) * (len(query.axes) - x.dim()) + tuple(x.shape[:-2])
    for size, group in zip(lead, query.axes[:-2], strict=True):
        if size != 1 and not all(isinstance(axis, int) for axis in group):
            return None
    return x.reshape(-1, *x.shape[-2:])


class Region(Bias):
    """The mask of shifted windows, (windows, N, N), while the host brings it into the shape of scores."""

    def __init__(self, trace: Trace, mask: Tensor, windows: Windows, steps=()):
        self.trace, self.mask, self.windows, self.steps = trace, mask, windows, steps

    @property
    def shape(self):
        return self.real().shape

    @property
    def dtype(self):
        return self.mask.dtype

    @property
    def device(self):
        return self.mask.device

    def compute(self):
        mask = self.mask
        for function, args, kwargs in self.steps:
            mask = function(mask, *args, **kwargs)
        return mask

    def regrouped(self, old, new):
        def regroup(mask):
            return mask.expand(*old, *mask.shape[-2:]).reshape(*new, *mask.shape[-2:])

        return self.after(regroup)

    def after(self, function, *args, **kwargs) -> "Region":
        return Region(self.trace, self.mask, self.windows, (*self.steps, (function, args, kwargs)))

    def on_view(self, x, *sizes):
        return self.after(Tensor.reshape, *sizes)

    def on_unsqueeze(self, x, dim):
        return self.after(torch.unsqueeze, dim)

    def on_expand(self, x, *sizes):
        return self.after(Tensor.expand, *sizes)

    def on_cast(self, x, *args, **kwargs):
        return self.after(Tensor.to, *args, **kwargs)


_SEEN: set[Windows] = set()  # whose mask was compared as a whole


def _is_region_mask(mask: Tensor, windows: Windows) -> bool:
    part = slice(-1 if windows in _SEEN else 0, None)
    mask, apart = mask[part], _apart(windows)[part].to(mask.device)
    marked = mask <= _MARK
    found = torch.equal(marked, apart) and not mask.masked_fill(marked, 0).any()
    if found:
        _SEEN.add(windows)
    return bool(found)


@functools.lru_cache(maxsize=64)
def _apart(windows: Windows) -> Tensor:
    """(windows, N, N): True where a shifted window holds two tokens that do not belong together."""
    regions = reference.wrapped_regions(windows.sides, windows.window, windows.shift, torch.device("cpu"))
    regions = reference.split_windows(regions, windows.window, False)[0, :, 0, :, 0]
    return regions[:, :, None] != regions[:, None, :]


# Where following begins


@begins("roll")
def _roll(trace: Trace, x, shifts, dims=None):
    if not trace.maps or x.dim() != 4 or not isinstance(dims, tuple | list) or tuple(dims) != (1, 2):
        return NotImplemented
    if any(s > 0 for s in shifts) or not any(shifts):
        return NotImplemented
    moved = Moved(trace, x, tuple((side, 1) for side in x.shape[1:3]), tuple(-s for s in shifts), ())
    moved.axes = moved.whole
    return moved


@begins("view")
def _view(trace: Trace, x, *sizes):
    if not trace.maps:
        return NotImplemented
    if x.dim() == 3:
        return Region(trace, x, trace.windows).on_view(x, *sizes) if _is_region(trace, x) else NotImplemented
    sizes = sizes_of(sizes)
    return _cut(trace, x, sizes, (0, 0)) if sizes and len(sizes) == 6 and _cuts(x, sizes) else NotImplemented


@begins("unsqueeze")
def _unsqueeze(trace: Trace, x, dim):
    return Region(trace, x, trace.windows).on_unsqueeze(x, dim) if _is_region(trace, x) else NotImplemented


def _is_region(trace: Trace, x: Tensor) -> bool:
    if trace.windows is None or x.dim() != 3 or x.requires_grad:
        return False
    tokens = math.prod(trace.windows.window)
    if tuple(x.shape) != (trace.windows.count, tokens, tokens):
        return False
    return torch.compiler.is_compiling() or _is_region_mask(x, trace.windows)
