"""What torch has to know about the RoPE operators: fake (meta) results, gradients, transforms.

A kernel backend has three: `rope_<backend>` of one tensor, `rope_pair_<backend>` of query and key in one crossing, and
`rope_<backend>_` in place. The gradient of a rotation is the rotation back, so the first two are their own backward,
to any order, and what autograd keeps is cos, sin and the positions, never the rotated tensor.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import checks
from .attention_operator import in_order_of

OPTIONS = "int[]? sections, bool interleaved, bool inverse"
SCHEMA = f"(Tensor x, Tensor cos, Tensor sin, Tensor? positions, SymInt first, {OPTIONS}) -> Tensor"
IN_PLACE_SCHEMA = f"(Tensor(a!) x, Tensor cos, Tensor sin, Tensor? positions, SymInt first, {OPTIONS}) -> ()"
PAIR_SCHEMA = (
    "(Tensor query, Tensor key, Tensor cos, Tensor sin, Tensor? query_positions, Tensor? key_positions, "
    f"SymInt query_first, SymInt key_first, {OPTIONS}) -> (Tensor, Tensor)"
)
_LIBRARY = torch.library.Library("xformer_fast", "FRAGMENT")


@dataclass(frozen=True)
class Operators:
    """The operators of a backend; a twin is an autograd.Function over one: torch.func's transforms take no other."""

    one: Callable
    one_twin: type[torch.autograd.Function]
    pair: Callable
    pair_twin: type[torch.autograd.Function]
    in_place: Callable  # knows no gradient
    in_place_twin: type[torch.autograd.Function]


def define(backend: str, one: Callable, pair: Callable, in_place: Callable, keys=("CUDA", "CPU")):
    """Defines the operators of a backend whose kernels are launched from Python (C++ defines its own)."""
    for name, schema, function in (
        (f"rope_{backend}", SCHEMA, one),
        (f"rope_pair_{backend}", PAIR_SCHEMA, pair),
        (f"rope_{backend}_", IN_PLACE_SCHEMA, in_place),
    ):
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        for key in keys:
            _LIBRARY.impl(name, function, key)


def register(backend: str) -> Operators:
    """Registers fake and autograd rules of defined operators."""
    namespace = torch.ops.xformer_fast
    one, pair, in_place = (
        getattr(namespace, name).default for name in (f"rope_{backend}", f"rope_pair_{backend}", f"rope_{backend}_")
    )

    def turn_back(ctx, grad):
        checks.refuse_forward_ad("apply_rope", grad)
        cos, sin, positions = ctx.saved_tensors
        run = one_twin.apply if torch._C._are_functorch_transforms_active() else one
        return run(grad, cos, sin, positions, ctx.first, *_inverse(ctx.options)), *[None] * 7

    def turn_both_back(ctx, grad_query, grad_key):
        checks.refuse_forward_ad("apply_rope", grad_query, grad_key)
        cos, sin, *positions = ctx.saved_tensors
        options, grads = _inverse(ctx.options), (grad_query, grad_key)
        functorch = torch._C._are_functorch_transforms_active()
        if grad_query is not None and grad_key is not None:
            run = pair_twin.apply if functorch else pair
            return *run(*grads, cos, sin, *positions, *ctx.first, *options), *[None] * 9
        run = one_twin.apply if functorch else one
        grads = (
            None if grad is None else run(grad, cos, sin, places, first, *options)
            for grad, places, first in zip(grads, positions, ctx.first, strict=True)
        )
        return *grads, *[None] * 9

    torch.library.register_fake(one, lambda x, *rest: in_order_of(x, x.shape[-1]), lib=_LIBRARY)
    torch.library.register_fake(pair, _pair_fake, lib=_LIBRARY)
    torch.library.register_fake(in_place, lambda x, *rest: None, lib=_LIBRARY)
    torch.library.register_autograd(one, turn_back, setup_context=_save_one, lib=_LIBRARY)
    torch.library.register_autograd(pair, turn_both_back, setup_context=_save_pair, lib=_LIBRARY)
    one_twin = _function("Rope", one, _save_one, turn_back)
    pair_twin = _function("RopePair", pair, _save_pair, turn_both_back)

    def turn_in_place(x, *rest):
        in_place(x, *rest)
        return x

    def save_in_place(ctx, inputs, output):
        ctx.mark_dirty(inputs[0])
        _save_one(ctx, inputs, output)

    in_place_twin = _function("RopeInPlace", turn_in_place, save_in_place, turn_back)
    return Operators(one, one_twin, pair, pair_twin, in_place, in_place_twin)


def _function(name: str, forward, setup_context, backward) -> type[torch.autograd.Function]:
    def jvp(ctx, *tangents):
        raise NotImplementedError(checks.NO_FORWARD_AD.format("apply_rope"))

    members = {"forward": forward, "setup_context": setup_context, "backward": backward, "jvp": jvp}
    statics = {name: staticmethod(function) for name, function in members.items()}
    return type(name, (torch.autograd.Function,), statics | {"generate_vmap_rule": True})


def _inverse(options):
    sections, interleaved, inverse = options
    return sections, interleaved, not inverse


def _pair_fake(query, key, *rest) -> tuple[Tensor, Tensor]:
    return in_order_of(query, query.shape[-1]), in_order_of(key, key.shape[-1])


def _save_one(ctx, inputs, output):
    _, cos, sin, positions, ctx.first, *ctx.options = inputs
    ctx.save_for_backward(cos, sin, positions)


def _save_pair(ctx, inputs, output):
    _, _, cos, sin, query_positions, key_positions, *rest = inputs
    ctx.set_materialize_grads(False)
    ctx.first, ctx.options = rest[:2], rest[2:]
    ctx.save_for_backward(cos, sin, query_positions, key_positions)
