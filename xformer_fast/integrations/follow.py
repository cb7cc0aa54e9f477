"""Code of a host runs as it was written, and is followed: what it asks of torch may be answered by a stand-in.

Under `Following`, a function of torch for which following begins (a product that may be scores, a map that is rolled or
cut into windows) gives its host a `Followed` in place of a tensor. It looks like that tensor and knows how it came
about, but nothing was computed. Each function of torch that then meets it has a rule, `on_<name>`, which answers with
another Followed, or with a tensor that a kernel of ours made of all that went before (follow_attention.py,
follow_windows.py).

A function without a rule, or whose rule says NotImplemented, finds the tensor that the host would have: `real` makes it
by the host's own operations, and the host goes on with it. So a module may be followed in vain, never wrongly.
"""

import dis
import functools
import inspect
import sys
import types
import warnings
import weakref
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Trace:
    """What is followed in one call of a module."""

    def __init__(self, backend: str | None, maps: bool = False, overwrites: bool = False):
        self.backend = backend
        self.overwrites = overwrites  # the code writes to tensors in place, maybe to what attention returned
        self.maps = maps  # maps that are cut into windows are followed too: follow_windows.py
        self.windows = None  # the geometry of the map that was rolled and cut last
        self.begun = []  # maps that were rolled or cut, and masks, that following began with
        self.busy = False  # inside a rule: what it computes is not followed
        self.attended = False  # attention ran on our kernels
        self.windows_attended = False  # by `window_attention`, where the map lies
        self.unknown = None  # the first function that made scores or moved tokens be computed


class Following(TorchFunctionMode):
    """Calls of torch inside it are followed."""

    def __init__(self, trace: Trace):
        super().__init__()
        self.trace = trace

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.trace.busy:
            return func(*args, **kwargs)
        if types and any(issubclass(kind, Followed) for kind in types):
            return run(func, args, kwargs)
        begin = BEGIN.get(func)
        if begin is not None:
            result = begin(self.trace, *args, **kwargs)
            if result is not NotImplemented:
                return result
        return func(*args, **kwargs)


class Apart:
    """What is asked of torch inside it is not followed.

    The mode itself is put aside, where it is the innermost: handing it every size of every tensor that a rule looks at
    would take most of a small model's time.
    """

    def __init__(self, trace: Trace):
        self.trace = trace

    def __enter__(self):
        self.before, self.trace.busy, self.mode = self.trace.busy, True, innermost()
        if self.mode is not None:
            torch._C._pop_torch_function_stack()

    def __exit__(self, *error):
        self.trace.busy = self.before
        if self.mode is not None:
            torch._C._push_on_torch_function_stack(self.mode)


def innermost() -> Following | None:
    """The mode that follows, where it is what torch asks first, and may be put aside."""
    if torch.compiler.is_compiling() or not (modes := torch._C._len_torch_function_stack()):
        return None
    mode = torch._C._get_function_stack_at(modes - 1)
    return mode if isinstance(mode, Following) else None


def following(
    method: Callable,
    backend: str | None,
    maps: Callable[[], bool] | None = None,
    stand_in: Callable[[Trace, Tensor], "Followed"] | None = None,
) -> Callable:
    """`method` of a module, followed; `maps()` says whether cuts of maps are, too, and `stand_in` gives one for a map.

    The mode hands every call of torch to Python. So later calls of a module with such a map do without it, where they
    can: if all began with the first argument, that gets its stand-in from the start, as long as attention is reached
    so; if nothing began, they are not followed. Either way they run what the first call ran, as checkpointing needs.
    Without maps, a module whose scores had to be computed is not followed again when it is called alike.
    Attention weights that it returns beside its output come back as None; if it is asked for them it is not followed.
    """
    names = list(inspect.signature(method).parameters)
    overwrites = _overwrites(inspect.unwrap(method).__code__)
    wish = names.index("output_attentions") - 1 if "output_attentions" in names else None
    ways = weakref.WeakKeyDictionary()  # module -> {what the way depends on: "mode", "stand-in" or "plain"}

    @functools.wraps(method)
    def followed(self, *args, **kwargs):
        asked = kwargs.get("output_attentions") or (wish is not None and len(args) > wish and args[wish])
        inside = any(isinstance(x, Followed) and x.trace.maps for x in (*args, *kwargs.values()))
        if asked or inside or _weights_are_collected():  # inside: of a method that is followed
            return method(self, *args, **kwargs)
        trace = Trace(backend, maps is not None and maps(), overwrites)
        known, key, first = {}, None, args[0] if args else None
        if trace.maps and stand_in and _is_map(first) and not torch.compiler.is_compiling():
            known, key = ways.setdefault(self, {}), (first.shape, self.training)
        elif not trace.maps and isinstance(self, torch.nn.Module) and not torch.compiler.is_compiling():
            given = tuple(map(_kind, (*args, *kwargs.values())))
            known, key = ways.setdefault(self, {}), (given, tuple(kwargs), self.training)
        way = known.get(key)
        if way == "plain":
            return method(self, *args, **kwargs)
        if way == "stand-in":
            result = method(self, stand_in(trace, first), *args[1:], **kwargs)
            if not trace.windows_attended:
                known[key] = "mode"
        else:
            with Following(trace):
                result = method(self, *args, **kwargs)
            if not trace.maps:
                if (
                    trace.unknown
                    and not trace.attended
                    and key is not None
                    and len(known) < 256
                    and not _may_be_rerun()
                ):
                    known[key] = "plain"
            elif way is None and key is not None and len(known) < 256:
                by_first = len(trace.begun) == 1 and trace.begun[0] is first and trace.windows_attended
                known[key] = "stand-in" if by_first else "mode" if trace.begun or trace.attended else "plain"
        if trace.unknown and (trace.maps or not trace.attended) and not torch.compiler.is_compiling():
            what = "windows are cut" if trace.maps else "attention is computed"
            tell_once(f"{type(self).__name__}: {what} as its host does, since {trace.unknown} is not followed")
        return _returned(result)

    return followed


def _weights_are_collected() -> bool:
    """Do hooks of transformers wait for attention weights, which modules then are not asked for?"""
    capturing = sys.modules.get("transformers.utils.output_capturing")
    collector = getattr(capturing, "_active_collector", None)
    if collector is None or torch.compiler.is_compiling():
        return False
    return any("attentions" in key for key in collector.get() or ())


def _kind(x):
    """What of an argument decides which way code goes: a tensor's axes and dtype, a flag itself."""
    if isinstance(x, bool | None):
        return x
    return (x.dim(), x.dtype) if isinstance(x, Tensor) else type(x)


def _may_be_rerun() -> bool:
    """Does something (checkpointing) take what is saved for backward, and may want the call again as it was?"""
    return torch.is_grad_enabled() and torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _overwrites(code: types.CodeType) -> bool:
    """Does it write to tensors in place? (+= and the like, or a method whose name ends in _)"""
    named = any(name.endswith("_") and not name.endswith("__") for name in code.co_names)
    return named or any(i.opname == "BINARY_OP" and i.argrepr.endswith("=") for i in dis.get_instructions(code))


def _is_map(x) -> bool:
    return type(x) is Tensor and x.dim() == 4


@functools.cache
def tell_once(message: str):
    warnings.warn(message, stacklevel=3)


def _returned(result):
    if isinstance(result, Followed):
        return result.leave()
    return type(result)(map(_returned, result)) if type(result) in (tuple, list) else result


class Followed:
    """Stands for a tensor that the host's code asked for and that is not computed. `on_<name>` are the rules."""

    trace: Trace
    computed: Tensor | None = None
    weights = False  # scores or attention weights

    def compute(self) -> Tensor:
        raise NotImplementedError

    def real(self) -> Tensor:
        """The tensor, as the host's own operations make it."""
        if self.computed is None:
            with Apart(self.trace):
                self.computed = self.compute()
        return self.computed

    def leave(self):
        """What a followed method returns in its place."""
        return self.real()

    def is_told_of(self) -> bool:
        """Is it worth a warning that it has to be computed?"""
        return self.weights or self.trace.maps

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.real(), name)

    def size(self, dim=None):
        return self.shape if dim is None else self.shape[dim]

    def dim(self):
        return len(self.shape)

    @property
    def ndim(self):
        return len(self.shape)

    def on_same(self, x, *args, **kwargs):
        return x

    def on_type(self, x, *args):
        cast = getattr(type(self), "on_cast", None)
        return cast(self, x, *args) if cast and len(args) == 1 and isinstance(args[0], torch.dtype) else NotImplemented


_NAMES = {  # the rule -> the names that torch, Tensor and functional have for the function
    "matmul": ("matmul", "bmm", "__matmul__"),
    "baddbmm": ("baddbmm",),
    "einsum": ("einsum",),
    "add": ("add", "__add__", "__radd__", "__iadd__"),
    "sub": ("sub", "__sub__", "__isub__", "subtract"),
    "mul": ("mul", "__mul__", "__rmul__", "__imul__", "multiply"),
    "div": ("div", "__truediv__", "__itruediv__", "true_divide"),
    "masked_fill": ("masked_fill",),
    "max": ("max", "maximum"),
    "where": ("where",),
    "softmax": ("softmax",),
    "dropout": ("dropout",),
    "normalize": ("normalize",),
    "linear": ("linear",),
    "layer_norm": ("layer_norm",),
    "view": ("view", "reshape"),
    "view_as": ("view_as", "reshape_as"),
    "flatten": ("flatten",),
    "unflatten": ("unflatten",),
    "unsqueeze": ("unsqueeze",),
    "expand": ("expand",),
    "transpose": ("transpose", "swapaxes", "swapdims"),
    "permute": ("permute",),
    "unbind": ("unbind",),
    "chunk": ("chunk",),
    "getitem": ("__getitem__",),
    "setitem": ("__setitem__",),
    "roll": ("roll",),
    "pad": ("pad",),
    "scaled_dot_product_attention": ("scaled_dot_product_attention",),
    "same": ("contiguous", "clone"),
    "cast": ("float", "to", "type_as"),
    "type": ("type",),
}


def _functions(rule: str) -> list[Callable]:
    return [getattr(owner, name) for name in _NAMES[rule] for owner in (torch, Tensor, F) if hasattr(owner, name)]


_RULES = {function: f"on_{rule}" for rule in _NAMES for function in _functions(rule)}
BEGIN: dict[Callable, Callable] = {}  # function of torch -> f(trace, *its arguments), a Followed or NotImplemented


def begins(*rules: str) -> Callable:
    """Following begins with these functions, by the function that is decorated."""

    def register(begin):
        BEGIN.update({function: begin for rule in rules for function in _functions(rule)})
        return begin

    return register


def _method(function: Callable) -> Callable:
    def method(self, *args, **kwargs):
        return run(function, (self, *args), kwargs)

    return method


_OPERATORS = (  # without a rule; Python looks them up in the class, past __getattr__
    "setitem rsub rtruediv pow rpow floordiv mod rmatmul neg abs invert and or xor iand ior "
    "eq ne lt le gt ge len iter bool int float"
)
for _name in (*(name for rule in _NAMES.values() for name in rule), *(f"__{name}__" for name in _OPERATORS.split())):
    if hasattr(Tensor, _name):
        setattr(Followed, _name, _method(getattr(Tensor, _name)))


def run(func: Callable, args, kwargs):
    """A function of torch whose arguments hold a Followed: by a rule, or on tensors."""
    owner, computed = None, False
    for x in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(x, Followed):
            computed = computed or x.computed is not None
            owner = x if owner is None and x.computed is None else owner
    if computed:
        args = tuple(x.computed if isinstance(x, Followed) and x.computed is not None else x for x in args)
    rule = getattr(type(owner), _RULES.get(func, ""), None)
    if rule is not None:
        with Apart(owner.trace):
            result = rule(owner, *args, **kwargs)
        if result is not NotImplemented:
            return result
    if owner is not None and owner.is_told_of():
        owner.trace.unknown = owner.trace.unknown or func.__name__
    return func(*(real(x) for x in args), **{name: real(x) for name, x in kwargs.items()})


def real(x):
    if isinstance(x, Followed):
        return x.real()
    return type(x)(map(real, x)) if type(x) in (tuple, list) else x


def sizes_of(sizes) -> list | None:
    """The arguments of a view as a list; None for a view as another dtype."""
    sizes = list(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], tuple | list) else list(sizes)
    return None if any(isinstance(size, torch.dtype) for size in sizes) else sizes


def takes_all(index, shape) -> bool:
    """Does x[index] leave a tensor of this shape as it is?"""
    index = index if isinstance(index, tuple) else (index,)
    if len(index) > len(shape) or not all(isinstance(part, slice) and part.step is None for part in index):
        return False
    return all(part.indices(size)[:2] == (0, size) for part, size in zip(index, shape, strict=False))


def cast_of(dtype: torch.dtype, *args, **kwargs) -> torch.dtype:
    """The dtype that `x.to(...)`, `x.type_as(...)` or `x.float()` gives a tensor of `dtype`."""
    given = (*args, *kwargs.values())
    asked = [x.dtype if isinstance(x, Tensor | Followed) else x for x in given]
    return next((x for x in asked if isinstance(x, torch.dtype)), dtype if given else torch.float32)
