"""Where the tokens of a map are in what a host sees of it: sizes and axes, no tensor.

A map (B, H, W, *features) was rolled, each of its sides was cut in two, and each axis that the host sees is made of
axes of the map. A step, such as `viewed`, gives the layout after what the host does. A module does the same in every
call: `Layout.after` remembers what came of a step, where sizes are numbers and not symbols.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Windows:
    """Sides of a map, sides of its windows, and how far it was rolled before it was cut."""

    sides: tuple[int, int]
    window: tuple[int, int]
    shift: tuple[int, int]

    @property
    def count(self):
        return math.prod(self.sides) // math.prod(self.window)


class Layout:
    """A map's sizes, and what became of its axes.

    cut: ((x0, y0), (x1, y1)), the sizes of the two parts of each side; before the cut x is the whole side, and y is 1.
    axes: for each axis that the host sees, the axes of the map that make it up: "b", "x0", "y0", "x1", "y1", or the
    index of a feature axis. Axes of size 1 are left out. By default the map as it lies.
    """

    def __init__(self, batch, cut, features, shift, axes=None):
        self.batch, self.cut, self.features, self.shift = batch, cut, tuple(features), shift
        (x0, y0), (x1, y1) = cut
        self.lengths = {"b": batch, "x0": x0, "y0": y0, "x1": x1, "y1": y1, **dict(enumerate(self.features))}
        self.long_features = tuple(i for i, size in enumerate(self.features) if size != 1)
        order = ("b",), ("x0", "y0"), ("x1", "y1"), *((i,) for i in range(len(self.features)))
        whole = tuple(tuple(axis for axis in group if self.lengths[axis] != 1) for group in order)
        self.axes = whole if axes is None else tuple(map(tuple, axes))
        self.in_order = self.axes == whole
        self.rolled = any(shift)
        self.in_place = self.in_order and not self.rolled  # the host sees the map itself
        self.features_last = self.axes[-1] == self.long_features
        self.shape = torch.Size([math.prod([self.lengths[axis] for axis in group]) for group in self.axes])
        self.steps = {}

    def but(self, features=None, axes=None) -> "Layout":
        features, axes = self.features if features is None else features, self.axes if axes is None else axes
        return Layout(self.batch, self.cut, features, self.shift, axes)

    def after(self, step: Callable, *arguments):
        """step(self, *arguments)"""
        if torch.compiler.is_compiling():
            return step(self, *arguments)
        try:
            result = self.steps.get((step, arguments), self)
        except TypeError:  # a symbol has no hash
            return step(self, *arguments)
        if result is self:
            result = self.steps[step, arguments] = step(self, *arguments)
        return result

    @property
    def windows(self) -> Windows:
        (x0, y0), (x1, y1) = self.cut
        return Windows((x0 * y0, x1 * y1), (y0, y1), self.shift)

    def feature(self, dim) -> int | None:
        """The feature axis that is all of an axis that the host sees."""
        group = self.axes[dim]
        return group[0] if len(group) == 1 and isinstance(group[0], int) else None


def layout_of(shape, shift=(0, 0)) -> Layout:
    """A map that was rolled by -shift, not cut yet."""
    if torch.compiler.is_compiling():
        return _layout_of.__wrapped__(shape, shift)
    try:
        return _layout_of(shape, shift)
    except TypeError:
        return _layout_of.__wrapped__(shape, shift)


@functools.lru_cache(maxsize=256)
def _layout_of(shape, shift):
    batch, height, width, *features = shape
    return Layout(batch, ((height, 1), (width, 1)), features, shift)


# Steps


def viewed(layout: Layout, *sizes) -> Layout | None:
    """The map's features may be split or joined by it. None: no layout can be that."""
    if -1 in sizes:
        known = math.prod([size for size in sizes if size != -1])
        sizes = [math.prod(layout.shape) // known if size == -1 else size for size in sizes]
    if layout.in_order and len(sizes) == 6 and all(y == 1 for _, y in layout.cut):
        return _cut(layout, *sizes)
    return _split(layout, sizes)


def _cut(layout: Layout, batch, x0, y0, x1, y1, channels) -> Layout | None:
    """The map seen as (B, x0, y0, x1, y1, C), of several windows; one of numbers (C = 1) is a host's way to a mask."""
    if x0 == x1 == 1 or y0 == y1 == 1:
        return None
    (height, _), (width, _) = layout.cut
    if (batch, x0 * y0, x1 * y1) != (layout.batch, height, width) or layout.features != (channels,) or channels == 1:
        return None
    cut = Layout(batch, ((x0, y0), (x1, y1)), layout.features, layout.shift)
    axes = [(axis,) if cut.lengths[axis] != 1 else () for axis in ("b", "x0", "y0", "x1", "y1", 0)]
    return cut.but(axes=axes)


def _split(layout: Layout, sizes) -> Layout | None:
    left = [(axis, layout.lengths[axis]) for group in layout.axes for axis in group]
    parts = [[] for _ in layout.features]  # the sizes that a feature axis is split into
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
    return layout.but(features=[size for part in parts for size in part], axes=axes)


def permuted(layout: Layout, *order) -> Layout:
    return layout.but(axes=[layout.axes[i] for i in order])


def transposed(layout: Layout, dim0, dim1) -> Layout:
    axes = list(layout.axes)
    axes[dim0], axes[dim1] = axes[dim1], axes[dim0]
    return layout.but(axes=axes)


def selected(layout: Layout, dim) -> Layout | None:
    """One entry of an axis that the host sees, a feature axis of the map."""
    feature, place = layout.feature(dim), dim % len(layout.axes)
    if feature is None:
        return None
    axes = [group for number, group in enumerate(layout.axes) if number != place]
    axes = [[x - 1 if isinstance(x, int) and x > feature else x for x in group] for group in axes]
    return layout.but(features=layout.features[:feature] + layout.features[feature + 1 :], axes=axes)


def chunked(layout: Layout, chunks, dim) -> Layout | None:
    """One of equal chunks of such an axis."""
    feature = layout.feature(dim)
    if feature is None or layout.features[feature] % chunks or layout.features[feature] == chunks:
        return None
    features = list(layout.features)
    features[feature] //= chunks
    return layout.but(features=features)


def projected(layout: Layout, size) -> Layout | None:
    """Every token's features, all of them, become one axis of `size`."""
    axes = (*layout.axes[:-1], () if size == 1 else (0,))
    return layout.but(features=(size,), axes=axes) if layout.features_last else None


def aligned(layout: Layout, *shape) -> tuple | None:
    """How a tensor that broadcasts to what the host sees, alike for all tokens, broadcasts to the map: the sizes, the
    order and the sizes again to give it. None where it is not alike.
    """
    if len(shape) > len(layout.axes):
        return None
    sizes, order = [], []
    for size, group in zip(shape, layout.axes[len(layout.axes) - len(shape) :], strict=True):
        if size != 1:
            if not all(isinstance(axis, int) for axis in group):
                return None
            sizes += [layout.lengths[axis] for axis in group]
            order += group
    features = [size if i in order else 1 for i, size in enumerate(layout.features)]
    return sizes, sorted(range(len(order)), key=order.__getitem__), features


def partition(layout: Layout) -> tuple[str, tuple[int, int]] | None:
    """What the tokens of a query (..., tokens, head_dim) are together: the partition, and its window_size."""
    for partition, part in (("window", "y"), ("grid", "x")):
        sides = f"{part}0", f"{part}1"
        if layout.axes[-2] == tuple(side for side in sides if layout.lengths[side] != 1):
            return partition, tuple(layout.lengths[side] for side in sides)
    return None


def alike(layout: Layout, other: Layout) -> bool:
    """Are the other's tokens where these are, heads and channels in order behind them?"""
    if (other.cut, other.shift, other.axes[:-1]) != (layout.cut, layout.shift, layout.axes[:-1]):
        return False
    if len(other.features) not in (1, 2):
        return False
    *heads, channel = range(len(other.features))
    within = [axis for group in other.axes[:-1] for axis in group if isinstance(axis, int)]
    last = (channel,) if other.features[-1] != 1 else ()
    return other.axes[-1] == last and within == [h for h in heads if h in other.long_features]


def of_heads(layout: Layout, *lead) -> bool:
    """Does a tensor (*lead, rows, columns) that broadcasts to a query's scores vary with its heads alone?"""
    lead = (1,) * (len(layout.axes) - 2 - len(lead)) + lead
    groups = zip(lead, layout.axes[:-2], strict=True)
    return all(size == 1 or all(isinstance(axis, int) for axis in group) for size, group in groups)
