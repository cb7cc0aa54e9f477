"""timm, and models of transformers off its AttentionInterface: modules that call torch's scaled_dot_product_attention.

One way for all of them: each method of a module's class that names `scaled_dot_product_attention` is bound again, code
untouched, to globals where that name leads to `xformer_fast.scaled_dot_product_attention`. What surrounds the call
stays timm's: projections, norms, rotation, relative position bias (a float mask here, with gradient), gates, windows.
timm's `fused_attn` reads True on such a module, also where it is off by default (Swin) or the user switched it off.

Left, with a reason: modules that compute scores themselves and that followed.py does not know (linear attention).

The rebound methods see their module's globals as they were at the first patch. Fine for a library; the modules of a
notebook, say, may rely on globals that change, so only LIBRARIES are looked at.
"""

import contextlib
import functools
import inspect
import re
import types

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from . import PatchReport
from .common import no_kernel, original, restore, swap, swapped
from .follow import Apart, Followed, innermost
from .follow_attention import sdpa
from .follow_windows import masks_followed

LIBRARIES = {"timm", "transformers"}
_NAMED = re.compile("Att(n|ention)(?![a-z])|MHSA|SHSA|GPSA|MLA")
SDPA = "scaled_dot_product_attention"


def _recipe(cls: type, backend: str | None) -> dict:
    stand_ins = _stand_ins(backend)
    members = {}
    for name, method in callers(cls).items():
        scope = {key: stand_ins.get(id(value), value) for key, value in method.__globals__.items()}
        scope.pop("__name__", None)  # torch.compile would look names up in the module of that name
        bound = types.FunctionType(method.__code__, scope, name, method.__defaults__, method.__closure__)
        bound.__kwdefaults__ = method.__kwdefaults__
        members[name] = masks_followed(functools.update_wrapper(bound, method))
    if any("fused_attn" in method.__code__.co_names for method in callers(cls).values()):
        members["fused_attn"] = property(lambda self: True)
    return members


@functools.cache
def _stand_ins(backend: str | None) -> dict[int, object]:
    """id of a global through which sdpa can be reached -> what takes its place."""

    def scaled_dot_product_attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if isinstance(query, Followed) or isinstance(attn_mask, Followed):
            return sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        mode = innermost()
        with contextlib.nullcontext() if mode is None else Apart(mode.trace):
            return ops.attention.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, backend=backend
            )

    functional = _copy(F, **{SDPA: scaled_dot_product_attention})
    layers = _copy(nn, functional=functional)
    return {
        id(F.scaled_dot_product_attention): scaled_dot_product_attention,
        id(F): functional,
        id(nn): layers,
        id(torch): _copy(torch, nn=layers),
    }


def _copy(module: types.ModuleType, **changes) -> types.ModuleType:
    copy = types.ModuleType(module.__name__)
    copy.__dict__.update(module.__dict__, **changes)
    return copy


@functools.cache
def callers(cls: type) -> dict[str, types.FunctionType]:
    """The methods of cls, its own and inherited, that name sdpa; none where one hands it a bias to be followed."""
    methods = ((name, inspect.getattr_static(cls, name)) for name in dir(cls))
    found = {name: m for name, m in methods if isinstance(m, types.FunctionType) and SDPA in m.__code__.co_names}
    return {} if any(decomposes(method.__code__) for method in found.values()) else found


def decomposes(code: types.CodeType) -> bool:
    """Does it ask for decomposed relative positions? followed.py keeps them from becoming a matrix."""
    return any("decomposed" in name for name in code.co_names)


def patch_model(model: nn.Module, backend: str | None, report: PatchReport):
    for name, module in model.named_modules():
        cls = original(module)
        libraries = LIBRARIES.intersection(base.__module__.partition(".")[0] for base in cls.__mro__)
        if not libraries:
            continue
        if not callers(cls):
            below = (m for m in module.modules() if m is not module)
            named = "timm" in libraries and _NAMED.search(cls.__name__)  # transformers.py speaks for its own
            if named and not any(_NAMED.search(type(m).__name__) for m in below):
                report.skipped[name] = (
                    "neither calls scaled_dot_product_attention nor computes scores as followed.py knows"
                )
        elif reason := no_kernel(next(module.parameters(), None), backend):
            report.skipped[name] = reason
        else:
            swap(module, _recipe, backend)
            report.replaced.append(name)


def unpatch_model(model: nn.Module):
    for module in model.modules():
        if swapped(module, _recipe):
            restore(module)
