"""T5's relative position bias, and that of models like it: a vector of distances, never a matrix.

A module is recognised by `compute_bias(query_length, key_length, device, past_seen_tokens)` whose result depends on the
distance of key and query alone: tried on a few positions. It then returns a `Distances`: the host's own method computes
one row that holds every distance, its gradient reaches the host's table through autograd, and the attention function
hands it on as `relative_bias`. Layers that share the bias share the object. A module of such a class without a bias of
its own (cross attention) adds zeros of the size of the scores: they are not made, or at least not read.
"""

import inspect

import torch
from torch import Tensor, nn

from ..positions import DistanceBias
from . import PatchReport
from .common import original, restore, swap, swapped
from .follow import Trace
from .follow_attention import Rule

_ARGUMENTS = ["query_length", "key_length", "device", "past_seen_tokens"]


class Distances(Rule):
    """The bias of query_length queries, the first at past_seen_tokens, and keys from 0 on."""

    def __init__(self, module: nn.Module, query_length, key_length, device, past_seen_tokens):
        self.trace, self.host = Trace(None), original(module).compute_bias
        self.module, self.lengths, self.place = module, (query_length, key_length), (device, past_seen_tokens)

    @property
    def shape(self):
        return torch.Size((1, self.values().shape[0], *self.lengths))

    @property
    def dtype(self):
        return self.values().dtype

    @property
    def device(self):
        return self.values().device

    def compute(self) -> Tensor:
        return self.host(self.module, *self.lengths, *self.place)

    def values(self) -> Tensor:
        """(heads, Sq + Sk - 1): the row of a query that stands before, among and behind all distances that occur."""
        queries, keys = self.lengths
        device, past = self.place
        return self.host(self.module, 1, queries + keys - 1, device, past + queries - 1)[0, :, 0]

    def apply(self, call: dict):
        call["relative_bias"] = DistanceBias(self.values()[:, : self.lengths[0] + call["key"].shape[2] - 1])


class Nothing(Rule):
    """A bias that is 0."""

    trace, shape, dtype, device = Trace(None), torch.Size(()), torch.float32, torch.device("cpu")

    def compute(self) -> Tensor:
        return torch.zeros(())

    def apply(self, call: dict):
        pass


def _recipe(cls: type, backend: str | None) -> dict:
    def compute_bias(self, query_length, key_length, device=None, past_seen_tokens=0):
        return Distances(self, query_length, key_length, device, past_seen_tokens)

    return {"compute_bias": compute_bias}


def _no_bias_recipe(cls: type, backend: str | None) -> dict:
    names = list(inspect.signature(cls.forward).parameters)
    if "position_bias" not in names:  # it makes its zeros itself; transformers.py leaves them out
        return {"adds_zeros": True}
    place = names.index("position_bias") - 1

    def forward(self, *args, **kwargs):
        if len(args) <= place and kwargs.get("position_bias") is None:
            kwargs["position_bias"] = Nothing()
        return cls.forward(self, *args, **kwargs)

    return {"forward": forward}


def _depends_on_distance(module: nn.Module) -> bool:
    host = getattr(original(module), "compute_bias", None)
    if host is None or list(inspect.signature(host).parameters)[1:] != _ARGUMENTS:
        return False
    if not hasattr(module, "relative_attention_bias") or module.relative_attention_bias.weight.is_meta:
        return True
    with torch.no_grad():
        bias = Distances(module, 3, 5, None, 2)
        i, j = torch.arange(3)[:, None], torch.arange(5)
        return torch.equal(host(module, 3, 5, None, 2)[0], bias.values()[:, (j - i + 2).to(bias.device)])


def patch_model(model: nn.Module, backend: str | None, report: PatchReport):
    modules = dict(model.named_modules())
    for name in report.replaced:  # by the attention function of transformers.py, which knows these objects
        if _depends_on_distance(modules[name]):
            has_bias = getattr(modules[name], "has_relative_attention_bias", True)
            swap(modules[name], _recipe if has_bias else _no_bias_recipe, backend)


def unpatch_model(model: nn.Module):
    for module in model.modules():
        if swapped(module, _recipe) or swapped(module, _no_bias_recipe):
            restore(module)
