"""State dicts of other libraries under the names of `xformer_fast.models`: one short table of names a model."""

import re
from collections.abc import Mapping

from torch import Tensor

Names = Mapping[str, str | tuple[str, ...] | None]


def renamed(state: Mapping[str, Tensor], names: Names) -> dict[str, Tensor]:
    """The tensors of `state` under new names.

    names: old -> new. A * of the old stands for any text without a dot (a layer's number, "weight") and fills the next
    * of the new; the first rule that fits counts. Several new names: the tensor is cut along its first axis into so
    many equal parts (packed projections). None: left out. A name that no rule fits is a KeyError.

    >>> import torch
    >>> from xformer_fast.checkpoints import renamed
    >>> names = {"h.*.qkv.*": ("layers.*.query.*", "layers.*.key.*", "layers.*.value.*"), "h.*.mask": None}
    >>> parts = renamed({"h.0.qkv.weight": torch.zeros(12, 4), "h.0.mask": torch.zeros(1)}, names)
    >>> {name: tuple(tensor.shape) for name, tensor in parts.items()}
    {'layers.0.query.weight': (4, 4), 'layers.0.key.weight': (4, 4), 'layers.0.value.weight': (4, 4)}
    """
    rules = [(re.compile(re.escape(old).replace(r"\*", "([^.]+)")), new) for old, new in names.items()]
    result = {}
    for name, tensor in state.items():
        found = next(((match, new) for rule, new in rules if (match := rule.fullmatch(name))), None)
        if found is None:
            raise KeyError(f"no rule for {name}")
        match, new = found
        targets = () if new is None else (new,) if isinstance(new, str) else new
        for target, part in zip(targets, tensor.chunk(len(targets)) if len(targets) > 1 else [tensor], strict=False):
            texts = iter(match.groups())
            result[re.sub(r"\*", lambda _, texts=texts: next(texts), target)] = part
    return result


def expect(config, **values):
    """ValueError where a host's config has anything else than these: its weights would mean something else here."""
    for name, value in values.items():
        found = getattr(config, name)
        if (list(found) if isinstance(found, tuple) else found) != value:
            raise ValueError(f"its config has {name}={found!r}; this model is one of {name}={value!r}")
