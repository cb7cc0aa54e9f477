"""What the host files share: is there a kernel for a model's device, masks joined, modules that change their class.

`swap` puts a module into a subclass of its own class, made once and named like it, whose members replace the host's.
Nothing is written to the module: state_dict, hooks, parametrizations and attributes stay, isinstance holds, `restore`
leaves no trace. Copies and pickles are built from the class before and the recipe, so they need no importable subclass.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..dispatch import DEFAULT
from ..ops.attention import attention, explain

Recipe = Callable[[type, str | None], dict[str, Any]]  # class before, backend -> the members that replace its own


def no_kernel(weight: Tensor | None, backend: str | None) -> str | None:
    """Why modules with this weight are left as they are, or None; raises if `backend` cannot run there."""
    if weight is None or weight.is_meta:
        return None
    dtype = weight.dtype if weight.dtype.is_floating_point and weight.dtype.itemsize > 1 else torch.bfloat16
    probe = torch.empty(0, 1, 1, 64, device=weight.device, dtype=dtype)
    if backend is not None or DEFAULT is not None:
        attention(probe, probe, probe, backend=backend)
        return None
    against = explain(attention, probe, probe, probe)
    if probe.is_cpu or next(name for name, reason in against.items() if not reason) != "reference":
        return None
    return "no kernel for its device: " + "; ".join(f"{name}: {reason}" for name, reason in against.items() if reason)


def hide(first: Tensor, second: Tensor) -> Tensor:
    """Two masks as one: bool hides (True attends), float is added."""
    if first.dtype == torch.bool and second.dtype == torch.bool:
        return first & second
    if first.dtype == torch.bool:
        first, second = second, first
    return torch.where(second, first, float("-inf")) if second.dtype == torch.bool else first + second


def add_mask(call: dict, mask: Tensor):
    """A mask beside the one in the arguments of a call of `attention`, both cut to its keys."""
    mask, first = (x if x is None else x[..., : call["key"].shape[2]] for x in (mask, call["mask"]))
    call["mask"] = mask if first is None else hide(first, mask)


def swap(module: nn.Module, recipe: Recipe, backend: str | None):
    """Gives `module` the members that recipe(class, backend) returns; a swapped module is swapped anew."""
    restore(module)
    module.__class__ = _subclass(type(module), recipe, backend)


def restore(module: nn.Module):
    module.__class__ = original(module)


def original(module: nn.Module) -> type:
    """The module's class before `swap`."""
    return getattr(type(module), "_xformer_fast_original", type(module))


def swapped(module: nn.Module, recipe: Recipe) -> bool:
    return getattr(type(module), "_xformer_fast_recipe", None) is recipe


@functools.cache
def _subclass(cls: type, recipe: Recipe, backend: str | None) -> type:
    def reduce_ex(self, protocol):
        return (_rebuild, (cls, recipe, backend), *super(subclass, self).__reduce_ex__(protocol)[2:])

    about = {"__module__": __name__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    marks = {"__reduce_ex__": reduce_ex, "_xformer_fast_original": cls, "_xformer_fast_recipe": staticmethod(recipe)}
    subclass = type(cls.__name__, (cls,), about | marks | recipe(cls, backend))
    return subclass


def _rebuild(cls: type, recipe: Recipe, backend: str | None):
    subclass = _subclass(cls, recipe, backend)
    return subclass.__new__(subclass)
