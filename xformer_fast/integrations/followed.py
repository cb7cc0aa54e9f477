"""Modules of timm and transformers that compute their scores themselves, and blocks that cut maps into windows.

A module is recognised by what its code does. A method of an attention module that takes a softmax and multiplies
matrices, or gives decomposed relative positions to sdpa, is run under `following` (follow_attention.py). So is a method
that calls functions of its file whose names end in "partition" and in "reverse", which is how the blocks of Swin and
MaxViT reach the windows that their attention works in (follow_windows.py).

torch.compile cannot trace `a @ b` of two stand-ins: under it, blocks whose attention is written so (Swin-V2) cut their
maps as their host does, and attention alone is ours.
"""

import dis
import functools
import inspect
import types

import torch
from torch import nn

from . import PatchReport
from .banded import is_banded
from .common import no_kernel, original, restore, swap, swapped
from .follow import following
from .follow_windows import WholeMap, masks_followed, windows_run
from .sdpa_callers import LIBRARIES, SDPA, callers, decomposes

_PRODUCTS = {"matmul", "bmm", "baddbmm", "einsum"}


def _recipe(cls: type, backend: str | None) -> dict:
    return {name: masks_followed(following(method, backend)) for name, method in scorers(cls).items()}


def _block_recipe(cls: type, backend: str | None) -> dict:
    return {name: following(method, backend, lambda: True, WholeMap) for name, method in partitioners(cls).items()}


def _eager_block_recipe(cls: type, backend: str | None) -> dict:
    return {name: following(method, backend, _in_eager_mode, WholeMap) for name, method in partitioners(cls).items()}


def _in_eager_mode() -> bool:
    return not torch.compiler.is_compiling()


_RECIPES = (_recipe, _block_recipe, _eager_block_recipe)


@functools.cache
def scorers(cls: type) -> dict[str, types.FunctionType]:
    """The methods that compute attention from a softmax and products of their own."""
    methods = [(name, method, written.__code__) for name, method, written in _methods(cls)]
    others = any("ALL_ATTENTION_FUNCTIONS" in code.co_names for _, _, code in methods) or callers(cls)
    if others or is_banded(cls) or "attention" not in cls.__name__.lower():
        return {}
    return {name: method for name, method, code in methods if _attends(code)}


@functools.cache
def partitioners(cls: type) -> dict[str, types.FunctionType]:
    """The methods that cut a map by a function of their file, and put it together by another."""
    ends = ("partition", "reverse")
    found = {}
    for name, method, written in _methods(cls):
        called = [called for called in written.__code__.co_names if called in written.__globals__]
        if all(any(function.endswith(end) for function in called) for end in ends):
            found[name] = method
    return found


def _methods(cls: type):
    """Name, function and the function that its decorators wrap, of each method of a library's class."""
    if LIBRARIES.intersection(base.__module__.partition(".")[0] for base in cls.__mro__):
        for name in dir(cls):
            method = inspect.getattr_static(cls, name)
            if isinstance(method, types.FunctionType):
                yield name, method, inspect.unwrap(method)


def _attends(code: types.CodeType) -> bool:
    if SDPA in code.co_names and decomposes(code):
        return True
    return not {"softmax", "Softmax"}.isdisjoint(code.co_names) and _multiplies(code)


def _multiplies(code: types.CodeType) -> bool:
    return any(name in _PRODUCTS or name.startswith("matmul_") for name in code.co_names) or _has_operator(code)


def _has_operator(code: types.CodeType) -> bool:
    """Is there an @?"""
    at = {("BINARY_MATRIX_MULTIPLY", ""), ("BINARY_OP", "@")}
    return any((i.opname, i.argrepr) in at for i in dis.get_instructions(code))


def patch_model(model: nn.Module, backend: str | None, report: PatchReport):
    for name, module in model.named_modules():
        cls = original(module)
        if scorers(cls):
            if reason := no_kernel(next(module.parameters(), None), backend):
                report.skipped[name] = reason
            else:
                swap(module, _recipe, backend)
                report.replaced.append(name)
                report.followed.append(name)
        elif partitioners(cls) and windows_run(next(module.parameters(), None), backend):
            inside = [method for m in module.modules() for method in scorers(original(m)).values()]
            operator = any(_has_operator(inspect.unwrap(method).__code__) for method in inside)
            swap(module, _eager_block_recipe if operator else _block_recipe, backend)


def unpatch_model(model: nn.Module):
    for module in model.modules():
        if any(swapped(module, recipe) for recipe in _RECIPES):
            restore(module)
