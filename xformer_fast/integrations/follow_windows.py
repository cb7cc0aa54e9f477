"""Tokens of a map that a host rolls, cuts into windows and puts back: followed (follow.py), not moved.

Swin's blocks (and MaxViT's, with grids) roll a map (B, H, W, C), cut it by a view and a permutation into windows, treat
every token alike (projections, norms), attend inside each window, and undo all of it. `Moved` stands for such a tensor:
the map stays where it lies, and each axis of what the host sees is a list of axes of the map (map_layout.py),

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

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..dispatch import DEFAULT
from ..ops.window_attention import explain, window_attention
from . import map_layout
from .follow import Apart, Followed, Trace, begins, sizes_of, takes_all
from .follow_attention import Bias, Unit, Weights, product, sdpa
from .map_layout import Layout, Windows, layout_of

_MARK = -90.0  # an addend that hides: Swin's is -100


def windows_run(weight: Tensor | None, backend: str | None) -> bool:
    """Does `window_attention` run, by a kernel or where it is asked for, on modules with this weight?"""
    if weight is None or weight.is_meta:
        return True
    probe = torch.empty(0, 1, 1, 1, 32, device=weight.device)
    against = explain(probe, probe, probe, 1)
    chosen = backend or DEFAULT or next(name for name, reason in against.items() if not reason)
    return against.get(chosen) == "" and (chosen != "reference" or weight.is_cpu or backend == chosen)


class Moved(Followed):
    """`base` (B, H, W, *features), of which the host sees the rearrangement `layout`."""

    def __init__(self, trace: Trace, base: Tensor, layout: Layout):
        self.trace, self.base, self.layout = trace, base, layout

    @property
    def shape(self):
        return self.layout.shape

    @property
    def dtype(self):
        return self.base.dtype

    @property
    def device(self):
        return self.base.device

    def of(self, base: Tensor, layout: Layout | None = None):
        """Another map in the same layout, or in one after it; itself, where that is how the host sees it."""
        layout = self.layout if layout is None else layout
        return base if layout.in_place else Moved(self.trace, base, layout)

    def compute(self):
        layout = self.layout
        base = torch.roll(self.base, [-s for s in layout.shift], (1, 2)) if layout.rolled else self.base
        base = base.reshape(layout.batch, *layout.cut[0], *layout.cut[1], *layout.features)
        places = {axis: place for place, axis in enumerate(("b", "x0", "y0", "x1", "y1", *range(len(layout.features))))}
        order = [places[axis] for group in layout.axes for axis in group]
        dropped = [place for place in places.values() if place not in order]
        return base.permute(*order, *dropped).reshape(self.shape)

    # what rearranges

    def on_view(self, x, *sizes):
        if len(sizes) < 2 or not isinstance(sizes[0], int):
            sizes = sizes_of(sizes)
        layout = None if sizes is None else self.layout.after(map_layout.viewed, *sizes)
        if layout is None:
            return NotImplemented
        if layout.rolled and layout.cut != self.layout.cut:
            self.trace.windows = layout.windows
        features = layout.features
        base = self.base if features == self.layout.features else self.base.reshape(*self.base.shape[:3], *features)
        return self.of(base, layout)

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
        return self.of(self.base, self.layout.after(map_layout.permuted, *order))

    def on_transpose(self, x, dim0, dim1):
        return self.of(self.base, self.layout.after(map_layout.transposed, dim0, dim1))

    def on_unbind(self, x, dim=0):
        layout = self.layout.after(map_layout.selected, dim)
        if layout is None:
            return NotImplemented
        return tuple(self.of(part, layout) for part in self.base.unbind(3 + self.layout.feature(dim)))

    def on_getitem(self, x, index):
        if isinstance(index, bool) or not isinstance(index, int):
            return self if takes_all(index, self.shape) else NotImplemented
        layout = self.layout.after(map_layout.selected, 0)
        if layout is None:
            return NotImplemented
        return self.of(self.base.select(3 + self.layout.feature(0), index), layout)

    def on_chunk(self, x, chunks, dim=0):
        layout = self.layout.after(map_layout.chunked, chunks, dim)
        if layout is None:
            return NotImplemented
        return tuple(self.of(part, layout) for part in self.base.chunk(chunks, 3 + self.layout.feature(dim)))

    # what treats every token alike

    def on_linear(self, x, weight, bias=None):
        layout = self.layout.after(map_layout.projected, weight.shape[0]) if isinstance(weight, Tensor) else None
        if layout is None:
            return NotImplemented
        base = self.base if len(self.layout.features) == 1 else self.base.flatten(3)
        return self.of(F.linear(base, weight, bias), layout)

    def on_layer_norm(self, x, normalized_shape, weight=None, bias=None, eps=1e-5):
        if len(normalized_shape) != 1 or not self.layout.features_last or len(self.layout.features) != 1:
            return NotImplemented
        return self.of(F.layer_norm(self.base, normalized_shape, weight, bias, eps))

    def on_normalize(self, x, p=2.0, dim=1, eps=1e-12, out=None):
        last = dim in (-1, len(self.shape) - 1)
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
            mine, its = self.layout, other.layout
            same = (its.axes, its.cut, its.shift, its.features) == (mine.axes, mine.cut, mine.shift, mine.features)
            return self.of(function(self.base, other.base)) if same and its.batch == mine.batch else NotImplemented
        if isinstance(other, Followed):
            return NotImplemented
        if isinstance(other, Tensor) and other.dim():
            plan = self.layout.after(map_layout.aligned, *other.shape)
            if plan is None:
                return NotImplemented
            sizes, order, features = plan
            other = other.reshape(sizes).permute(order).reshape(features)
        return self.of(function(self.base, other))

    def on_roll(self, x, shifts, dims=None):
        layout = self.layout
        back = isinstance(dims, tuple | list) and tuple(dims) == (1, 2) and tuple(shifts) == layout.shift
        return self.base if back and layout.in_order else NotImplemented

    def on_pad(self, x, pad, mode="constant", value=None):
        return self if not any(pad) else NotImplemented

    # attention

    def on_scaled_dot_product_attention(self, *args, **kwargs):
        return sdpa(*args, **kwargs)

    def on_matmul(self, a, b):
        return product(self.trace, a, b) if isinstance(a, Moved) and isinstance(b, Moved) else NotImplemented

    def attend(self, weights: Weights, value):
        """The attention of `weights`, whose query self is, inside windows."""
        scores = weights.scores
        place = self.layout.after(map_layout.partition)
        if place is None or weights.dropout_p:
            return NotImplemented
        moved = (self, scores.key, value)
        if not all(isinstance(x, Moved) and self.layout.after(map_layout.alike, x.layout) for x in moved):
            return NotImplemented
        partition, window = place
        bias, shifted = _biases(scores, self, window)
        if bias is NotImplemented or shifted != self.layout.rolled or (shifted and partition == "grid"):
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
            options["shift"] = self.layout.shift
        out = window_attention(*heads, window, bias=bias, partition=partition, backend=self.trace.backend, **options)
        self.trace.windows_attended = True
        return value.of(out.reshape(value.base.shape))


def _biases(scores, query: Moved, window) -> tuple:
    """The biases of scores as one (H, N, N) or None, and whether one of them is the mask of shifted windows."""
    total, shifted = None, False
    heads = query.base.shape[3] if query.base.dim() == 5 else 1
    shape = (heads, math.prod(window), math.prod(window))
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
    return total if total is None or total.shape == shape else total.expand(shape), shifted


def _of_heads(x: Tensor, query: Moved) -> Tensor | None:
    """A tensor that broadcasts to scores, as (heads or 1, rows, columns); None where it varies in batch or windows."""
    return x.reshape(-1, *x.shape[-2:]) if query.layout.after(map_layout.of_heads, *x.shape[:-2]) else None


class Region(Bias):
    """The mask of shifted windows, (windows, N, N), while the host brings it into the shape of scores."""

    def __init__(self, trace: Trace, mask: Tensor, windows: Windows, steps=()):
        self.trace, self.mask, self.windows, self.steps = trace, mask, windows, steps

    @property
    def shape(self):
        return self.real().shape if self.steps else self.mask.shape

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
    trace.begun.append(x)
    return Moved(trace, x, layout_of(tuple(x.shape), tuple(-s for s in shifts)))


def masks_followed(method: Callable) -> Callable:
    """`method` of an attention module: given tokens that moved, it is given a stand-in for their mask as well."""

    @functools.wraps(method)
    def followed(self, *args, **kwargs):
        trace = next((x.trace for x in args if type(x) is Moved), None)
        if trace is None or trace.windows is None or torch.compiler.is_compiling():
            return method(self, *args, **kwargs)

        def stand_in(x):
            region = _region(trace, x)
            return x if region is None else region

        with Apart(trace):
            args = [stand_in(x) for x in args]
            kwargs = {name: stand_in(x) for name, x in kwargs.items()}
        return method(self, *args, **kwargs)

    return followed


@begins("view")
def _view(trace: Trace, x, *sizes):
    if not trace.maps:
        return NotImplemented
    if x.dim() == 3:
        region = _region(trace, x)
        if region is None:
            return NotImplemented
        trace.begun.append(x)
        return region.on_view(x, *sizes)
    if x.dim() != 4 or len(sizes) not in (1, 6):
        return NotImplemented
    sizes = sizes_of(sizes)
    layout = layout_of(tuple(x.shape)).after(map_layout.viewed, *sizes) if sizes and len(sizes) == 6 else None
    if layout is None:
        return NotImplemented
    trace.begun.append(x)
    return Moved(trace, x, layout)


@begins("pad")
def _pad(trace: Trace, x, pad, mode="constant", value=None):
    return NotImplemented if any(pad) or not trace.maps or x.dim() != 4 else WholeMap(trace, x, padded=True)


class WholeMap(Followed):
    """A map (B, H, W, C) that a method was given, or `padded` by nothing: that it is rolled or cut is followed."""

    def __init__(self, trace: Trace, map: Tensor, padded: bool = False):
        self.trace, self.map, self.padded = trace, map, padded

    @property
    def shape(self):
        return self.map.shape

    @property
    def dtype(self):
        return self.map.dtype

    @property
    def device(self):
        return self.map.device

    def real(self):
        return super().real() if self.padded else self.map

    def compute(self):
        return self.map.clone()

    def is_told_of(self):
        return False

    def on_roll(self, x, shifts, dims=None):
        return _roll(self.trace, self.map, shifts, dims)

    def on_view(self, x, *sizes):
        return _view(self.trace, self.map, *sizes)

    def on_pad(self, x, *args, **kwargs):
        return _pad(self.trace, self.map, *args, **kwargs)

    on_same = None


@begins("unsqueeze")
def _unsqueeze(trace: Trace, x, dim):
    region = _region(trace, x)
    if region is None:
        return NotImplemented
    trace.begun.append(x)
    return region.on_unsqueeze(x, dim)


def _region(trace: Trace, x) -> Region | None:
    """A stand-in for the mask of the windows that were cut last, if x is that."""
    if not isinstance(x, Tensor) or trace.windows is None or x.dim() != 3 or x.requires_grad:
        return None
    tokens = math.prod(trace.windows.window)
    if tuple(x.shape) != (trace.windows.count, tokens, tokens):
        return None
    found = torch.compiler.is_compiling() or _is_region_mask(x, trace.windows)
    return Region(trace, x, trace.windows) if found else None
